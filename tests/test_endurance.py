"""Nothing is lost: kills, failing disks, flipped bytes, bad numbers.

In full counts: ENDURE=results/endure.json python -m pytest -m slow tests/test_endurance.py
"""

import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import endurance
import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run, start
from tiny_run import fingerprint, flags, lines, run_command, train, weights

from config import InputError
from storage import checkpoint
from storage.files import write_json
from storage.pack import verify
from training.ranks import gather

# --- Kills and failing disks ---


def test_at_every_file_call_of_a_save_an_error_or_a_kill_leaves_a_checkpoint(tmp_path):
    figures = endurance.faults(tmp_path)
    assert figures["with an error"] == figures["with a kill"] > 20


def test_a_run_killed_at_a_random_instant_ends_with_the_uninterrupted_ones_bytes(data, tmp_path):
    assert endurance.kills(data, tmp_path, count=1, stage=2, steps=6)["kills"] == 1


def test_one_of_four_ranks_dies_all_are_started_again_and_the_bytes_are_the_same(data, tmp_path):
    """Four, as the order of a sum of more than two gradients depends on DDP's buckets."""
    assert endurance.rank_deaths(data, tmp_path, 1, processes=4, steps=6)["equal"] == 1


def test_a_signal_to_torchrun_saves_the_step_that_was_taken(data, tmp_path):
    assert endurance.sigterm(data, tmp_path, 1)["slowest exit (s)"] < 20


WRITE = """
import os, sys, time
from pathlib import Path
from storage.files import sole_writer
from storage.terminal import user_errors
with user_errors(), sole_writer(Path(sys.argv[1])):
    print("writing", flush=True)
    if sys.argv[2:]:
        os.fork()
        time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    """A killed run frees the folder although a process that it forked, such as a loader, lives."""
    first = start("-c", WRITE, tmp_path, "forks")
    assert first.stdout.readline() == "writing\n"
    assert f"process {first.pid} is writing" in run("-c", WRITE, tmp_path, code=1)
    first.kill()
    first.wait()
    run("-c", WRITE, tmp_path)
    os.killpg(first.pid, signal.SIGKILL)
    # A folder that may not be written to
    assert run("-c", WRITE, "/sys/run", code=1).startswith("error: ")


# --- Flipped bytes ---


def test_one_changed_byte_of_a_pack_or_a_checkpoint_is_reported_with_the_file(data, tmp_path):
    folder, tensors = shutil.copytree(data, tmp_path / "pack"), {"weight": torch.randn(1000)}
    assert endurance.flips(folder, lambda: verify(folder), 30) == 30
    checkpoint.write(tmp_path, 1, tensors, tensors, {"stage": 1}, '{"a": 1}', keep=1)
    saved = checkpoint.newest(tmp_path)
    assert endurance.flips(saved, lambda: checkpoint.read_manifest(saved), 200) == 200


# --- Numbers that go bad ---


def plant_nan(data: Path, out: Path, rows) -> Path:
    """A pack in which these records' position is NaN."""
    shutil.copytree(data, out)
    np.load(out / "set_table/close/kitchen_counter.npy", mmap_mode="r+")["pos"][rows] = np.nan
    return out


def test_a_frame_with_nan_skips_its_step_on_all_ranks_and_changes_no_byte(data, tmp_path):
    bad, out = plant_nan(data, tmp_path / "pack", [17]), tmp_path / "out"
    steps = endurance.steps_of_epoch(data)  # every frame at most once
    endurance.finish(endurance.start(bad, out, 2, stage=2, steps=steps, keep=99), out)
    (skip,) = [line for line in lines(out) if "skipped" in line]
    assert "set_table/close/kitchen_counter.h5 traj_0 frame 17" in skip["skipped"]
    assert len(skip["skipped"]) == 8

    def content(step: int) -> list[bytes]:
        return [path.read_bytes() for path in sorted(out.glob(f"step-{step:08d}/*.safetensors"))]

    assert content(skip["step"] - 1) == content(skip["step"]) != content(skip["step"] + 1)


def test_bad_steps_in_a_row_stop_the_run_with_a_saved_state(data, tmp_path, capsys):
    bad = plant_nan(data, tmp_path / "pack", slice(None))
    code = train(bad, tmp_path / "out", stage=2, max_skipped=3, steps=9)
    assert code == 1 and "3 steps in a row" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "out").name == "step-00000003"
    # Stage 2 does not see stage 1's batches again.
    train(bad, tmp_path / "1", max_skipped=1)
    one, two = (lines(tmp_path / name)[0]["skipped"] for name in ("1", "out"))
    assert {*one} != {*two}
    assert all(t.isfinite().all() for t in weights(tmp_path / "out").values())


def test_tensorboard_gets_the_numbers_and_a_skipped_step_does_not_end_it(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    bad, out = plant_nan(data, tmp_path / "pack", [17]), tmp_path / "out"
    steps = endurance.steps_of_epoch(data)
    assert train(bad, out, tracker="tensorboard", steps=steps) == 0
    assert any("skipped" in line for line in lines(out))
    assert events.EventAccumulator(str(out)).Reload().Scalars("action")[-1].step == steps


# --- The index, and where the ranks meet ---


def test_the_index_of_eight_million_frames_opens_small_and_at_once(tmp_path):
    figures = endurance.open_large_index(tmp_path / "index")
    assert figures["frames"] > 7_800_000 and figures["MB"] < 200
    assert figures["seconds"] < 20  # under 1 on a quiet machine, see docs/running.md


def make_store():
    return dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=5))


def test_missing_ranks_are_named():
    store = make_store()
    with ThreadPoolExecutor() as threads:
        present = [threads.submit(gather, store, rank, 4, 1.0) for rank in (0, 2)]
    for rank in present:
        with pytest.raises(InputError, match=r"of 4 ranks these did not come: \[1, 3\]"):
            rank.result()


def test_ranks_that_are_started_again_do_not_meet_the_dead_ones():
    """torchrun keeps its store: the new main rank waits for the other new ranks."""
    store = make_store()
    with ThreadPoolExecutor() as threads:
        dead = [threads.submit(gather, store, rank, 3, 5.0) for rank in range(3)]
        assert all(rank.result() for rank in dead)
    with ThreadPoolExecutor() as threads:
        main = threads.submit(gather, store, 0, 3, 5.0)
        time.sleep(0.5)
        assert not main.done()
        others = [threads.submit(gather, store, rank, 3, 5.0) for rank in (2, 1)]
        stores = [rank.result() for rank in (main, *others)]
    stores[0].set("key", "of the living")
    assert stores[2].get("key") == b"of the living"


def test_two_machines_take_the_same_steps_as_one(data, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}")
    node = partial(run_command, 1, *flags(data, tmp_path / "two"), torchrun=machines)
    with ThreadPoolExecutor() as threads:
        for future in [threads.submit(node) for _ in range(2)]:
            future.result()
    run_command(2, *flags(data, tmp_path / "one"))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


# --- All of it ---


@pytest.mark.slow  # half an hour on two cores
def test_nothing_is_lost_in_full_counts(data, tmp_path):
    """The figures go to the file that $ENDURE names."""

    def flip_checkpoint() -> int:
        saved = checkpoint.newest(tmp_path / "straight3")
        return endurance.flips(saved, lambda: checkpoint.read_manifest(saved), 1000)

    def kill(stage: int) -> dict:
        before = {"init_from": tmp_path / f"straight{stage - 1}"} if stage > 1 else {}
        return endurance.kills(data, tmp_path, 20, stage=stage, steps=30, **before)

    parts = {
        "index": lambda: endurance.open_large_index(tmp_path / "index"),
        "stall": lambda: endurance.stall(tmp_path),
        "faults": lambda: endurance.faults(tmp_path),
        "order": lambda: endurance.order(data, tmp_path),
        "SIGTERM": lambda: endurance.sigterm(data, tmp_path, 10),
        **{f"kill -9, stage {stage}": partial(kill, stage) for stage in (1, 2, 3)},
        "rank deaths": lambda: endurance.rank_deaths(data, tmp_path, 10),
        "flipped bytes, checkpoint": flip_checkpoint,
        "flipped bytes, pack": lambda: endurance.flips(data, lambda: verify(data), 1000),
    }
    figures = {}
    for name, part in parts.items():
        figures[name] = part()
        write_json(Path(os.environ.get("ENDURE", tmp_path / "endure.json")), figures)
