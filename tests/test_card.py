"""The README's commands, with no folder named: pack, stages 1 to 3, evaluation."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from processes import REPOSITORY, run, smaller
from torch.distributed.run import get_args_parser

from collect import CollectConfig
from config import InputError, TrainConfig
from training.flags import parse

LINES = """
python data.py pack
torchrun --nproc_per_node=8 train.py --stage 1
torchrun --nproc_per_node=8 train.py --stage 2
torchrun --nproc_per_node=8 train.py --stage 3
python eval.py
"""
SMALLER = {
    "train.py": "--preset tiny --steps 2 --batch-size 8 --micro-batch 4 --val-frames 8",
    "eval.py": "--columns close_drawer --episodes 1 --horizon 5",
}


def test_the_readmes_commands_lead_from_demonstrations_to_the_table(recorded, tmp_path):
    assert CollectConfig("set_table", "close", "fridge").out == Path("data")
    shutil.copytree(recorded, tmp_path / "data")
    for path in REPOSITORY.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    printed = ""
    for line in LINES.strip().splitlines():
        printed += run(*smaller(line, SMALLER), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "initialised from runs/auxvla-all/stage1/step-00000002" in printed
    assert "initialised from runs/auxvla-all/stage2/step-00000002" in printed
    stage3 = json.loads((tmp_path / "runs/auxvla-all/stage3/config.json").read_text())
    assert stage3["data"] == "data" and stage3["init_from"] == "runs/auxvla-all/stage2"
    results = json.loads((tmp_path / "runs/auxvla-all/eval/results.json").read_text())
    assert results["columns"]["close_drawer"]["n"] == 1
    assert "stage3" in str(results["manifest"])


MISSING = {
    "--stage 2": "no stage 1 in runs/auxvla-all: .* train.py --stage 1; or --row auxvla-naive for",
    "--stage 3": "no stage 2 in runs/auxvla-all: .* train.py --stage 2$",
    "--stage 3 --row auxvla-action-head": "no stage 2 in runs/.*-head: .* --row auxvla-action-head",
    "--stage 2 --run-name mine --preset tiny": "no stage 1 in runs/mine: .* --run-name mine .*tiny",
}


@pytest.mark.parametrize("flags", MISSING)
def test_a_missing_stage_is_named_with_the_command_that_trains_it(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=MISSING[flags]):
        parse(flags.split())


def test_folders_are_of_the_run_or_its_row_unless_they_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = parse(["--stage", "1"])
    assert (first.data, first.out, first.init_from) == ("data", "runs/auxvla-all/stage1", None)
    naive = parse(["--row", "auxvla-naive", "--stage", "2"])
    assert (naive.out, naive.init_from) == ("runs/auxvla-naive/stage2", None)
    Path("runs/mine/stage1/step-00000001").mkdir(parents=True)
    assert parse(["--stage", "2", "--run-name", "mine"]).init_from == "runs/mine/stage1"
    given = parse(["--stage", "2", "--init-from", "A", "--data", "D", "--out", "O"])
    assert (given.data, given.out, given.init_from) == ("D", "O", "A")


def test_the_help_of_train_py_loads_no_module_that_help_does_not_need():
    """FSDP, DTensor, transformers and matplotlib take a second each, the simulator several."""
    code = "import sys, train, contextlib\nwith contextlib.suppress(SystemExit):\n"
    code += "    train.parse(['--help'])\nprint(*sys.modules)"
    loaded = set(run("-c", code).splitlines()[-1].split())
    assert "train" in loaded
    heavy = {"transformers", "matplotlib", "mani_skill", "sapien"}
    assert not loaded & (heavy | {"torch.distributed.fsdp", "torch.distributed.tensor"})


def test_torchrun_takes_no_flag_of_train_for_its_own():
    """torchrun accepts abbreviations of its options, also after the script's name."""
    options = [each for action in get_args_parser()._actions for each in action.option_strings]
    flags = ["--" + field.name.replace("_", "-") for field in fields(TrainConfig)]
    assert not [flag for flag in flags if any(option.startswith(flag) for option in options)]
