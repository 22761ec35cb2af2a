"""What a run survives, counted: kill -9, failing disks, flipped bytes, other numbers of processes.

test_endurance.py does a few of each, and all for results/endure.json. Each function returns its
figures; a failed assertion says what was lost.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from processes import start as launch
from processes import wait_for
from safetensors.torch import load_file
from tiny_run import command, fingerprint, flags, lines

from config import InputError
from data import Frames
from storage import checkpoint
from storage.files import sole_writer, write_json
from storage.pack import FORMAT, Pack, npy_name
from storage.trajectory import RECORD, SURVEY
from training.log import Saver

KILLED = 100  # exit code of an injected kill

# --- Training as a user starts it ---


def start(data: Path, out: Path, processes: int, restarts: int = 0, **settings) -> subprocess.Popen:
    """Start train.py, small, on the CPU, saving at every step; its output goes to OUT.txt."""
    words = flags(data, out, **dict(save_every=1, val_frames=8, seed=3) | settings)
    torchrun = ("--standalone", f"--max-restarts={restarts}") * (processes > 1)
    with open(f"{out}.txt", "ab") as log:
        return launch(*command(processes, words, torchrun), output=log, OMP_NUM_THREADS="1")


def finish(process: subprocess.Popen, out: Path) -> None:
    got = process.wait(timeout=900)
    assert got == 0, f"{out}: ended with {got}; its output is in {out}.txt"


def processes_of(out: Path, what: str = "train.py") -> list[int]:
    """torchrun, the ranks and their loaders, found by their command line."""
    found = subprocess.run(["pgrep", "-f", "--", f"{what} .*--out {out} "], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def run_whole(data: Path, out: Path, processes: int, **settings) -> tuple[str, str, str]:
    """The fingerprint of a run that nothing interrupts."""
    finish(start(data, out, processes, **settings), out)
    return fingerprint(out)


# --- Signals ---


def kills(data: Path, work: Path, count: int, **settings) -> dict:
    """Kill runs of two processes at random instants; each ends with the uninterrupted one's bytes.

    The instant is uniform over the time that an uninterrupted run takes, start-up included.
    """
    stage, settings = settings["stage"], settings | {"workers": 1}
    straight, out, began = work / f"straight{stage}", work / f"killed{stage}", time.monotonic()
    expected, takes = run_whole(data, straight, 2, **settings), time.monotonic() - began
    rng, done, runs, in_training = random.Random(stage), 0, 0, 0
    while done < count or out.exists():
        process = start(data, out, 2, **settings)
        try:
            process.wait(timeout=rng.uniform(0, takes) if done < count else 900)
        except subprocess.TimeoutExpired:
            assert done < count, f"{out}: does not end"
            for pid in processes_of(out):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            done += 1
            in_training += bool(lines(out))
            out.mkdir(exist_ok=True)
            continue
        assert process.returncode == 0, f"{out}: after {done} kills, see {out}.txt"
        assert fingerprint(out) == expected, f"{out}: other bytes than {straight}"
        runs += 1
        shutil.rmtree(out)
    return {"kills": done, "runs completed": runs, "equal": runs, "in training": in_training}


def rank_deaths(data: Path, work: Path, count: int, processes=2, steps=12) -> dict:
    """Kill one rank: torchrun starts all again, and the bytes are the same."""
    settings = dict(processes=processes, stage=2, steps=steps)
    rng, expected = random.Random(0), run_whole(data, work / "straight-rank", **settings)
    for number in range(count):
        out = work / f"rank{number}"
        process = start(data, out, restarts=1, **settings)
        wait_for(lambda out=out: (out / "step-00000003").exists(), process)
        os.kill(rng.choice(processes_of(out, "-u train.py")), signal.SIGKILL)
        finish(process, out)
        assert fingerprint(out) == expected, f"{out}: other bytes than straight-rank"
        shutil.rmtree(out)
    return {"rank deaths": count, "equal": count}


def sigterm(data: Path, work: Path, count: int) -> dict:
    """SIGTERM to torchrun: every rank saves the step it is in and ends."""
    slowest = 0.0
    for number in range(count):
        out = work / f"term{number}"
        process = start(data, out, 2, steps=10_000)
        wait_for(lambda out=out: (out / "step-00000002").exists(), process)
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        process.wait(timeout=60)
        slowest = max(slowest, time.monotonic() - began)
        trained = [line["step"] for line in lines(out) if "action" in line]
        saved = checkpoint.newest(out).name
        assert saved == f"step-{trained[-1]:08d}", f"{out}: step {trained[-1]} was taken"
        shutil.rmtree(out)
    return {"signals": count, "saved the last step": count, "slowest exit (s)": round(slowest, 1)}


# --- Other numbers of processes ---


def steps_of_epoch(data: Path) -> int:
    return len(Frames(Pack(data), 0.1, train=True)) // 8


def order(data: Path, work: Path) -> dict:
    """1, 2, 4, 8 processes, and 8 -> 2 -> 4, over two epochs: the same losses."""
    curves, epoch = {}, steps_of_epoch(data)
    settings = dict(stage=2, warmup=0, cooldown=0, val_every=1000, save_every=1000)
    for name in ("1", "2", "4", "8", "8 -> 2 -> 4"):
        out, plan = work / f"order-{name.replace(' -> ', '-')}", name.split(" -> ")
        for i, processes in enumerate(plan, 1):
            steps = 2 * epoch if i == len(plan) else i * epoch // 2
            finish(start(data, out, int(processes), steps=steps, **settings), out)
        trained = [line for line in lines(out) if "action" in line]
        losses = [[line[key] for key in ("action", "qpos", "seg")] for line in trained]
        curves[name] = np.array(losses)
    worst = {name: float(np.abs(curve / curves["1"] - 1).max()) for name, curve in curves.items()}
    return {"steps": len(curves["1"]), "largest relative difference of a loss": worst}


# --- A disk that fails ---


@contextmanager
def fault(number: int, effect: Callable[[], None]) -> Iterator[list]:
    """Do half of the `number`-th file call of a save, then `effect`. Yields the calls made."""
    made = []

    def around(call, half=lambda *_: None):
        def faulty(*args, **kwargs):
            made.append(call)
            if len(made) - 1 == number:
                half(*args)
                effect()
            return call(*args, **kwargs)

        return faulty

    def half_of_tensors(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def half_of_bytes(path, content):
        write_bytes(path, content[: len(content) // 2])

    save_file, write_bytes = checkpoint.save_file, Path.write_bytes
    names = ("fsync", "replace", "mkdir", "unlink", "rmdir")
    with (
        patch.multiple("os", **{name: around(getattr(os, name)) for name in names}),
        patch.object(checkpoint, "save_file", around(save_file, half_of_tensors)),
        patch.object(Path, "write_bytes", around(write_bytes, half_of_bytes)),
    ):
        yield made


def raise_error():
    raise OSError(errno.EIO, "injected: input/output error")


def faults(work: Path) -> dict:
    """An error, or the end of the process, at each file call of a save: a checkpoint always loads.

    With --keep 1, so that the save also removes the checkpoint before it.
    """
    tensors = [{"weight": torch.full((1000,), float(step))} for step in range(4)]

    def save(out, step):
        checkpoint.write(out, step, tensors[step], tensors[step], {}, "{}", keep=1)

    counts = {}
    for name, effect in (("error", raise_error), ("kill", lambda: os._exit(KILLED))):
        for number in range(1000):
            out, at = work / f"fault-{name}", f"{name} at call {number}"
            shutil.rmtree(out, ignore_errors=True)
            save(out, 1)
            pid = os.fork()
            if pid == 0:  # the run; it ends with the number of the calls it made
                with suppress(InputError), fault(number, effect) as made:
                    save(out, 2)
                os._exit(min(len(made), 99))
            made = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            survivor = checkpoint.newest(out)
            assert survivor, f"{out}: no checkpoint loads after {at}"
            step = int(load_file(survivor / "model.safetensors")["weight"][0])
            assert survivor.name == f"step-{step:08d}", f"{survivor}: of step {step} after {at}"
            with sole_writer(out):  # the next run
                checkpoint.resumable(out, "auto")
                save(out, 3)
            assert checkpoint.newest(out).name == "step-00000003", f"{out}: next save after {at}"
            assert not [*out.glob(".step-*")], f"{out}: remains after {at}"
            if 0 <= made <= number:  # neither KILLED nor by a signal
                counts[name] = number
                break
    return {"file calls of a save": counts["error"], "with an error": counts["error"],
            "with a kill": counts["kill"], "a checkpoint loads": sum(counts.values())}  # fmt: skip


def stall(work: Path, parameters: int = 100_000_000) -> dict:
    """What a save costs training, and what it takes in its thread, for 1.2 GB of state."""
    model = torch.nn.Linear(1000, parameters // 1000, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    saver = Saver(work / "stall", keep=1, is_main=True, step=0)
    began = time.perf_counter()
    saver.save(1, model, optimizer, {}, "{}")
    stalled = time.perf_counter() - began
    saver.close()
    took = time.perf_counter() - began
    shutil.rmtree(work / "stall")
    seconds = {"stalled (s)": round(stalled, 2), "took (s)": round(took, 2)}
    return {"GB": 12 * parameters / 1e9} | seconds


# --- Flipped bytes ---


def flips(folder: Path, check: Callable[[], None], count: int) -> int:
    """Change one byte at a time; `check` must raise an InputError that names the file.

    The files that hold the hashes, manifest.json and pack.json, are left out.
    """
    hashes = ("manifest.json", "pack.json")
    files = sorted(path for path in folder.rglob("[!.]*.*") if path.name not in hashes)
    rng = random.Random(0)
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        # Every file in turn first, then where a byte is likeliest: in the large ones.
        path = files[number] if number < len(files) else rng.choices(files, sizes)[0]
        place = rng.randrange(path.stat().st_size)
        with open(path, "r+b") as file:
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ rng.randrange(1, 256)]), place)
            with pytest.raises(InputError, match=path.name):
                check()
            os.pwrite(file.fileno(), byte, place)
    check()
    return count


# --- Size ---


def write_large_index(folder: Path, episodes: int, length: int) -> None:
    """A pack whose index is real and whose frames are a hole of the right size."""
    file = "set_table/pick/all.h5"
    entries = [
        dict(file=file, trajectory=f"traj_{i}", length=length, instruction=0, task="set_table",
             subtask="pick") for i in range(episodes)
    ]  # fmt: skip
    path = folder / npy_name(file)
    path.parent.mkdir(parents=True)
    np.lib.format.open_memmap(path, "w+", RECORD, (episodes * length,))
    np.savez(folder / "summary.npz", survey=np.zeros(episodes, SURVEY))
    about = {"instructions": [""], "action_schema": None, "qpos_names": None, "truncate": True}
    files = {file: {"sha256": "", "packed": ""}}
    content = {"format": FORMAT, "files": files, "summary": "", "episodes": entries}
    write_json(folder / "pack.json", content | about)


OPEN = """
import re, sys, time
from pathlib import Path
from data import Frames
from storage.pack import Pack
from training.order import StepOrder

def peak():  # memory in MB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before, began = peak(), time.perf_counter()
frames = Frames(Pack(sys.argv[1]), 0.02, train=True)
StepOrder(len(frames), 512, 0, 0, 10, 0, 8).batch(0)
print(len(frames), time.perf_counter() - began, peak() - before)
"""


def open_large_index(folder: Path) -> dict:
    """The paper's 44,000 episodes: opened, and the first epoch's order drawn, in a new process."""
    write_large_index(folder, episodes=44_000, length=182)
    printed, _ = launch("-c", OPEN, folder).communicate()
    frames, seconds, megabytes = map(float, printed.split())
    shutil.rmtree(folder)
    return {"frames": int(frames), "seconds": round(seconds, 2), "MB": round(megabytes)}
