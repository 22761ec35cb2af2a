"""FSDP2 on two gloo processes: the same steps as one process, one kind of checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files import write_demos
from tiny_run import flags, lines, weights

ROOT = Path(__file__).parent.parent
ONE = [sys.executable, "train.py"]
TWO = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
]  # fmt: skip


def start(command, data, out, steps, *words, preset="tiny-openvla", **others) -> str:
    small = dict(preset=preset, steps=steps, micro_batch=2, val_frames=4, cooldown=0, warmup=0)
    done = subprocess.run(
        [*command, *flags(data, out, **small | others), *words], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(one: Path, two: Path, tolerance: float):
    """Two runs: equal losses, weights, moments."""
    for file in ("model", "optimizer"):
        ours, theirs = weights(one, file), weights(two, file)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].shape == theirs[key].shape, key
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=tolerance, msg=key)
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        for key in ("action", "grad_norm", "val_action", "seg", "val_seg"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_demos(folder / "set_table/close/fridge", lengths=(30, 30))
    return folder


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharding") / "one"
    start(ONE, data, out, 2)
    return out


def test_two_sharded_processes_take_the_steps_of_one_and_either_resumes_the_other(
    data, one, tmp_path
):
    start(TWO, data, tmp_path / "two", 2)
    compare(one, tmp_path / "two", 1e-5)
    (tmp_path / "back").mkdir()
    for source, command, out in ((tmp_path / "two", ONE, "two"), (one, TWO, "back")):
        if out == "back":
            subprocess.run(["cp", "-r", f"{source}/.", tmp_path / out], check=True)
        assert "resumed" in start(command, data, tmp_path / out, 3)
    compare(tmp_path / "two", tmp_path / "back", 1e-5)


def test_a_sharded_model_with_every_decoder_takes_the_steps_of_one_process(data, tmp_path):
    """As after `--preset tiny --shard`: BatchNorm, the latents and stage 1 and 2 included."""
    for command, out in ((ONE, "one"), (TWO, "two")):
        small = dict(stage=2, micro_batch=8, preset="tiny")
        start(command, data, tmp_path / out, 1, "--shard", **small)
    ours, theirs = (weights(tmp_path / out, "optimizer") for out in ("one", "two"))
    for key in ours:
        if key.endswith("exp_avg"):
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=1e-6, msg=key)
