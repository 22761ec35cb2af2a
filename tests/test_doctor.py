"""tools/doctor.py finds what planted.py and planted_files.py plant, and nothing else."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from files import write_demos
from planted import FAULTS, ROOT, Plant
from planted_files import resealed, write_known, write_prismatic  # and its faults

from config import InputError
from data import pack
from policy import Policy
from tools import checks
from tools.check_assets import assets as asset_findings
from tools.check_files import checkpoint_weights, demonstrations, pretrained_weights
from tools.check_policy import acting
from tools.doctor import Doctor, chosen
from train import main, parse


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Demonstrations, a pack, a checkpoint, and Prismatic's file without its numbers.

    And the checkpoint that README shows, beside demonstrations that it knows.
    """
    folder = tmp_path_factory.mktemp("whole")
    write_demos(folder / "demos/set_table/pick/013_apple", lengths=(30, 8))
    write_demos(folder / "demos/set_table/close/fridge", lengths=(12, 8), has_object=False)
    pack(str(folder / "demos"), str(folder / "pack"))
    flags = f"--preset tiny --data {folder / 'pack'} --out {folder / 'stage1'} --steps 1 "
    main(parse((flags + "--batch-size 8 --device cpu --val-frames 8").split()))
    write_prismatic(folder / "prism")
    shutil.copytree(ROOT / "weights/stage2", folder / "stage2")
    write_known(Policy.from_checkpoint(folder / "stage2", "cpu"), folder)
    return folder


@pytest.fixture
def plant(whole, assets, tmp_path, monkeypatch, request) -> Plant:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Plant(whole, assets, tmp_path, monkeypatch, request)


def doctor(*flags, program=(sys.executable,), **environment) -> tuple[int, str]:
    """The exit code and the output of the program as a user starts it."""
    done = subprocess.run(
        [*program, "-m", "tools.doctor", *map(str, flags)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_the_command_that_mends_it(name, plant):
    function, got, mend = FAULTS[name]
    found = [each for each in function(plant) if each.state != "ok"]
    assert any(
        re.search(got, f"{each.got}; expected {each.expected}") and re.search(mend, each.mend)
        for each in found
    ), "\n".join(map(str, found))


@pytest.mark.parametrize(
    "name",
    [
        "an_object_that_is_missing",
        "a_folder_under_a_wrong_name",
        "an_archive_unpacked_one_level_too_deep",
    ],
)
def test_the_command_mends_the_apartment(name, plant):
    lacking = [each for each in FAULTS[name][0](plant) if each.state == "missing"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", lacking[0].mend]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, check=True)
    assert {each.state for each in asset_findings(plant.tmp / "assets")} == {"ok"}


def test_what_mends_a_file_is_right_for_a_path_with_a_space(tmp_path):
    path = write_demos(tmp_path / "my demos/set_table/close/fridge")
    path.write_bytes(path.read_bytes()[:5000])
    broken = [each for each in demonstrations(tmp_path / "my demos") if each.mend]
    words = [shlex.split(each.mend.partition("  #")[0]) for each in broken]
    assert any(word[:3] == ["rm", "-f", str(path)] for word in words), broken


def test_a_demonstration_in_a_wrong_folder_is_moved_aside_and_not_lost(plant):
    (lacking,) = FAULTS["a_file_in_a_wrong_folder"][0](plant)
    before = sorted(path.read_bytes() for path in plant.tmp.rglob("*.h5"))
    subprocess.run(["bash", "-c", lacking.mend], check=True)
    assert before == sorted(path.read_bytes() for path in plant.tmp.rglob("*.h5"))
    assert {each.state for each in demonstrations(plant.tmp / "demos")} == {"ok"}


def test_nothing_is_found_where_nothing_is_missing(whole, assets, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = [
        *checks.python(), *checks.packages(), *checks.disk(whole, 1), *checks.ranks("cpu"),
        *checks.shared_memory(1, 1), *demonstrations(whole / "demos"),
        *demonstrations(whole / "pack"), *checkpoint_weights(whole / "stage1"),
        *pretrained_weights(str(whole / "prism"), "paper")[:1],  # its tokenizer is not here
        *asset_findings(assets), *acting(whole / "stage2", whole / "known", "cpu"),
    ]  # fmt: skip
    assert {each.state for each in found} == {"ok"}, "\n".join(map(str, found))


def test_reading_samples_ends_at_its_time_and_says_how_far_it_came(whole):
    (found,) = demonstrations(whole / "pack", seconds=0)
    assert "sha256 of 1 of 2 files compared (all: python data.py verify" in found.got
    assert "read in 0 files" in demonstrations(whole / "demos", seconds=0)[0].got


def test_the_program_looks_at_a_checkpoint_beside_its_data_whatever_it_is_for(whole):
    given = {"checkpoint": str(whole / "stage2"), "data": str(whole / "known")}
    for part in ("all", "eval", "collect"):
        checks_of = [getattr(check, "func", None) for check in chosen(Doctor(part, **given))]
        assert acting in checks_of
    flags = ("--for", "train", "--preset", "tiny", "--device", "cpu")
    _, output = doctor(*flags, *(f"--{name}={value}" for name, value in given.items()))
    for text in ("black and white pictures", "depths of 0.5 and 2 m", "two instructions"):
        assert re.search(rf"^ok +acting +{text}: logits up to \S+ differ by", output, re.M), output
    told = "of the tokens right on 16 of 16 held-out frames, .* above the best constant's"
    assert re.search(rf"^ok +accuracy +0.9\d+ {told}", output, re.M), output


def test_a_checkpoint_of_one_instruction_is_not_compared_with_another(whole):
    resealed(shutil.copytree(whole / "stage2", whole / "one"), instructions=["close the fridge"])
    found = acting(whole / "one", whole / "known", "cpu")
    assert "no second instruction to compare: the checkpoint knows 'close the fridge'" in str(found)


def test_of_a_slow_checkpoint_the_pictures_are_looked_at_and_the_rest_is_said_to_be_left(whole):
    found = acting(whole / "stage2", whole / "known", "cpu", seconds=0)[3:]
    assert [each.state for each in found] == ["ok", "warn", "warn", "warn"]
    assert all("not looked at" in each.got for each in found[1:]), found


def test_the_program_ends_with_0_where_nothing_is_missing(whole, assets, tmp_path):
    flags = ("--for", "eval", "--checkpoint", whole / "stage1", "--out", tmp_path / "eval")
    code, output = doctor(*flags)
    assert code == 0 and "nothing missing" in output
    for what in ("python", "packages", "--checkpoint", "ReplicaCAD", "simulator", "renderer"):
        assert re.search(rf"^(ok|warn) +{what}", output, re.MULTILINE), output
    assert "/dev/shm" not in output  # of training


def test_the_program_ends_with_1_and_says_all_that_is_missing(tmp_path):
    small = ("--preset", "tiny")  # whose run the disk of any machine takes
    planted = {"MS_ASSET_DIR": "", "VK_DRIVER_FILES": "/nowhere.json"}
    code, output = doctor("--data", tmp_path, *small, **planted)
    assert code == 1 and "3 missing" in output, output
    for what in ("--data", "MS_ASSET_DIR", "renderer"):
        assert re.search(rf"^missing +{what}.*\n +mend: ", output, re.MULTILINE), output


def test_ranks_under_torchrun_find_each_other(whole):
    program = (Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node=2")
    flags = ("--for", "train", "--preset", "tiny", "--data", whole / "pack", "--device", "cpu")
    code, output = doctor(*flags, program=program)
    assert code == 0 and "2 of 2 by gloo" in output and output.count("nothing missing") == 1


def test_a_run_that_requires_something_names_it_before_it_starts(tmp_path):
    checks.require(checks.python(), checks.disk(tmp_path, 1))
    with pytest.raises(InputError, match=r"MB free|GB free.*\n.*mend: df -h"):
        checks.require(checks.python(), checks.disk(tmp_path, 1e18))


def test_no_check_of_training_imports_the_simulator():
    script = "import sys, tools.check_files, tools.checks; print('sapien' in sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    assert printed.strip() == "False"
