"""tools/doctor.py finds what planted.py and planted_files.py plant, and nothing else."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import pytest
from files import write_demos
from planted import FAULTS, ROOT, Plant, program
from planted_files import resealed, write_known, write_prismatic  # and its faults

from config import InputError
from paper import parse
from policy import Policy
from storage.pack import pack
from tools.check_files import checkpoint_weights, demonstrations, pretrained_weights
from tools.check_policy import acting
from tools.doctor import DRAW, LAVAPIPE, Doctor, chosen
from train import main
from training import checks


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


def test_make_clean_removes_the_runs_and_no_download(tmp_path):
    for name in ("assets/data", "runs/demo", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"assets", "assets/data", "runs", "runs/mine"}


def test_setup_stops_at_a_GPU_without_Vulkan_until_the_CPU_is_chosen(plant):
    for name in ("bin", "lib", "pyvenv.cfg"):  # as if installed, in a copy that may be written to
        (plant.tmp / ".venv").mkdir(exist_ok=True)
        (plant.tmp / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (plant.tmp / "requirements.txt").touch()
    (plant.tmp / "tools").symlink_to(ROOT / "tools")
    program(plant, "nvidia-smi", "a GPU")
    program(plant, "apt-get", "")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    for given in ({}, {"VK_ICD_FILENAMES": LAVAPIPE}):
        command = ["bash", plant.tmp / "tools/setup.sh"]
        done = subprocess.run(command, env=environment | given, capture_output=True, text=True)
        assert done.returncode == (0 if given else 1), done.stderr
        told = [line in done.stderr for line in (*DRAW[:-1], f"export VK_ICD_FILENAMES={LAVAPIPE}")]
        assert told == [not given] * len(DRAW), done.stderr
    assert "mesa" not in (plant.tmp / "ran").read_text()


CHECKS = {"demonstrations", "checkpoint_weights", "resealed"}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (plant, _, mend) in FAULTS.items()
        if mend != "^$" and CHECKS & {*plant.__code__.co_names}
    ],
)
def test_a_mend_that_is_pasted_loses_no_file(name, plant):
    """In a folder whose name a shell divides; unquoted, the command would be about neighbours."""
    top, plant.tmp = plant.tmp, plant.tmp / "my data (é)"
    for folder in (plant.tmp, top / "my", top / "data", top / "(é)", top / "bin"):
        folder.mkdir()
        (folder / "neighbour").write_text(str(folder))
    for tool in ("python", "hf"):
        (top / "bin" / tool).write_text("#!/bin/sh\n")
        (top / "bin" / tool).chmod(0o755)
    found = [each for each in FAULTS[name][0](plant) if each.mend]
    before = Counter(path.read_bytes() for path in top.rglob("*") if path.is_file())
    for mend in [each.mend for each in found]:
        if mend.startswith("--"):
            assert Path(shlex.split(mend)[1]).is_dir()
        else:
            path = f"{top / 'bin'}:{os.environ['PATH']}"
            subprocess.run(["bash", "-c", mend], cwd=top, env={"PATH": path}, check=True)
    assert found and before <= Counter(p.read_bytes() for p in top.rglob("*") if p.is_file())


FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int fd, int operation) {
    char *number = getenv("FLOCK_ERRNO");
    return number ? (errno = atoi(number), -1) : 0;
}
"""
LOOK = """
import os, resource, sys
from tools.check_files import demonstrations
for folder in sys.argv[1:]:
    if "errno" in folder:
        os.environ["FLOCK_ERRNO"] = folder[-2:]
    if folder.endswith("files"):
        del os.environ["FLOCK_ERRNO"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 4, 999))
    (mend,) = {each.mend for each in demonstrations(folder) if each.mend}
    print(mend)
"""


def test_a_file_that_may_be_whole_is_named_by_what_keeps_it_from_us(plant):
    if not (shutil.which("cc") and shutil.which("setpriv")):
        pytest.skip("needs a C compiler, and setpriv for root")
    (plant.tmp / "flock.c").write_text(FLOCK)
    command = ["cc", "-shared", "-fPIC", "-o", "flock.so", "flock.c"]
    subprocess.run(command, cwd=plant.tmp, check=True)
    expected = {
        "h5": "chmod u+r {}.h5  # its owner, or root",
        "json": "chmod u+r {}.json  # its owner, or root",
        "errno-11": "fuser -v {}.h5  # wait until that program has closed it",  # a writer's lock
        "errno-37": "export HDF5_USE_FILE_LOCKING=FALSE",  # no locks, like 95; HDF5 ignores 38
        "errno-95": "export HDF5_USE_FILE_LOCKING=FALSE",
        "files": "ulimit -n 4096",
    }
    for name in expected:
        for number in range(9 if name == "files" else 1):
            file = write_demos(plant.tmp / name / f"{number}/close/fridge", lengths=(2, 2))
        if name in ("h5", "json"):
            file.with_suffix(f".{name}").chmod(0)
    root = ["setpriv", "--bounding-set", "-all"] * (os.geteuid() == 0)
    done = subprocess.run(
        [*root, sys.executable, "-c", LOOK, *(plant.tmp / name for name in expected)],
        cwd=ROOT, env=os.environ | {"LD_PRELOAD": str(plant.tmp / "flock.so")},
        capture_output=True, text=True,
    )  # fmt: skip
    wanted = [text.format(plant.tmp / name / "0/close/fridge") for name, text in expected.items()]
    assert done.stdout.splitlines() == wanted, done.stderr


def test_a_damaged_file_below_a_hubs_folder_is_downloaded_by_its_tasks_name(tmp_path):
    file = write_demos(tmp_path / "MS-HAB-SetTable/close/fridge", lengths=(2, 2))
    os.truncate(file, 20_000)
    assert "--tasks set_table --subtasks close" in demonstrations(tmp_path)[1].mend


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
        *acting(whole / "stage2", whole / "known", "cpu"),
    ]  # fmt: skip
    assert {each.state for each in found} == {"ok"}, "\n".join(map(str, found))


def test_reading_samples_ends_at_its_time_and_says_how_far_it_came(whole):
    (found,) = demonstrations(whole / "pack", seconds=0)
    assert "sha256 of 1 of 3 files compared (all: python data.py verify" in found.got
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


def test_a_checkpoint_is_looked_at_on_demonstrations_that_end_as_its_own_did(whole, tmp_path):
    """A field that cannot be read is a finding, and not the end."""
    for name in ("whole", "damaged"):
        file = write_demos(tmp_path / name / "set_table/close/fridge", (12, 9), has_object=False)
        with h5py.File(file, "r+") as content:
            content["traj_1/success"][3:] = True
            if name == "damaged":
                content["traj_1/obs/sensor_data/fetch_head"].move("rgb", "gone")
    found = acting(whole / "stage1", tmp_path / "whole", "cpu")
    assert any("4 of 4 held-out frames" in each.got for each in found)
    (lacking,) = acting(whole / "stage1", tmp_path / "damaged", "cpu")
    assert lacking.state == "missing" and "traj_1" in lacking.got


def test_a_checkpoint_is_looked_at_on_the_pack_that_it_was_trained_on(whole):
    flags = ("--checkpoint", whole / "stage1", "--data", whole / "pack", "--for", "train")
    code, output = doctor(*flags, "--preset", "tiny", "--device", "cpu")
    assert code == 0 and re.search(r"^(ok|warn) +accuracy", output, re.MULTILINE), output


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
    script = "import sys, tools.check_files, training.checks; print('sapien' in sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    assert printed.strip() == "False"
