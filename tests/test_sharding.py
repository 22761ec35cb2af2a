"""FSDP2 on two gloo processes: the same steps as one process, one kind of checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from files import write_demos
from safetensors.torch import load_file

from storage import checkpoint

ROOT = Path(__file__).parent.parent
ONE = [sys.executable, "train.py"]
TWO = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
]  # fmt: skip


def train(command, data, out, steps, *others, preset="tiny-openvla"):
    given = dict(
        preset=preset, data=data, out=out, steps=steps, batch_size=8, micro_batch=2,
        device="cpu", log_every=1, val_frames=4, cooldown=0, warmup=0,
    )  # fmt: skip
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in given.items())
    arguments = [part for pair in pairs for part in pair]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, *others], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(one: Path, two: Path, tolerance: float):
    """Two runs: equal losses, weights, moments."""
    for file in ("model", "optimizer"):
        ours, theirs = (
            load_file(checkpoint.newest(out) / f"{file}.safetensors") for out in (one, two)
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].shape == theirs[key].shape, key
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=tolerance, msg=key)
    logs = [
        [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)
    ]
    for ours, theirs in zip(*logs, strict=True):
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
    train(ONE, data, out, 2)
    return out


def test_two_sharded_processes_take_the_steps_of_one_and_either_resumes_the_other(
    data, one, tmp_path
):
    train(TWO, data, tmp_path / "two", 2)
    compare(one, tmp_path / "two", 1e-5)
    (tmp_path / "back").mkdir()
    for source, command, out in ((tmp_path / "two", ONE, "two"), (one, TWO, "back")):
        if out == "back":
            subprocess.run(["cp", "-r", f"{source}/.", tmp_path / out], check=True)
        assert "resumed" in train(command, data, tmp_path / out, 3)
    compare(tmp_path / "two", tmp_path / "back", 1e-5)


def test_a_sharded_model_with_every_decoder_takes_the_steps_of_one_process(data, tmp_path):
    """As after `--preset tiny --shard`: BatchNorm, the latents and stage 1 and 2 included."""
    for command, out in ((ONE, "one"), (TWO, "two")):
        given = ("--stage", "2", "--micro-batch", "8", "--shard")
        train(command, data, tmp_path / out, 1, *given, preset="tiny")
    for name in ("exp_avg",):
        ours, theirs = (
            load_file(checkpoint.newest(tmp_path / out) / "optimizer.safetensors")
            for out in ("one", "two")
        )
        for key in ours:
            if key.endswith(name):
                torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=1e-6, msg=key)
