"""What tools/endure.py does to files: failing disks, flipped bytes, millions of frames.

Each function returns its figures, or raises Lost, which says what did not survive.
"""

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import checkpoint
from config import InputError
from durable import sole_writer, write_sealed
from logs import Saver
from pack import BLOCK, PACKED, Pack, block_name

ROOT = Path(__file__).parent.parent
KILLED = 100  # exit code of an injected kill


class Lost(InputError):
    """Something did not survive; the message says what."""


# --- A disk that fails ---


@contextmanager
def fault(number: int, effect: Callable[[], None]) -> Iterator[list[str]]:
    """Under every file call of a save: at the `number`-th one, half of it happens, then `effect`.

    Yields the calls that were made so far.
    """
    made: list[str] = []

    def around(name, call, half):
        def faulty(*args, **kwargs):
            made.append(name)
            if len(made) - 1 == number:
                half(*args)
                effect()
            return call(*args, **kwargs)

        return faulty

    def half_of_tensors(tensors, path):
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def half_of(write):
        return lambda path, content: write(path, content[: len(content) // 2])

    def nothing(*_):
        pass

    save_file, bytes_, text = checkpoint.save_file, Path.write_bytes, Path.write_text
    with (
        patch("checkpoint.save_file", around("tensors", save_file, half_of_tensors)),
        patch.object(Path, "write_bytes", around("write", bytes_, half_of(bytes_))),
        patch.object(Path, "write_text", around("write", text, half_of(text))),
        patch("os.fsync", around("fsync", os.fsync, nothing)),
        patch("os.replace", around("rename", os.replace, nothing)),
        patch("os.mkdir", around("mkdir", os.mkdir, nothing)),
        patch("os.unlink", around("unlink", os.unlink, nothing)),
        patch("os.rmdir", around("rmdir", os.rmdir, nothing)),
    ):
        yield made


def faults(work: Path) -> dict:
    """At each file call of a save: an error, or the end of the process. A checkpoint always loads.

    The save is the hardest: it names a new best, and the checkpoint before it goes (--keep 1).
    """
    tensors = [{"weight": torch.full((1000,), float(step))} for step in range(4)]

    def save(out, step):
        manifest = {"score": 1.0 / step}
        checkpoint.write(out, step, tensors[step], tensors[step], manifest, "{}", keep=1)

    counts = {}
    for effect in ("error", "kill"):
        for number in range(1000):
            out = work / f"fault-{effect}"
            shutil.rmtree(out, ignore_errors=True)
            save(out, 1)
            pid = os.fork()
            if pid == 0:  # the run; it ends with the number of the calls it made
                with suppress(checkpoint.CheckpointError), fault(number, effects(effect)) as made:
                    save(out, 2)
                os._exit(min(len(made), 99))
            made = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            survivor = checkpoint.newest(out)
            if survivor is None:
                raise Lost(f"{out}: no checkpoint loads after {effect} at call {number}")
            step = int(load_file(survivor / "model.safetensors")["weight"][0])
            if survivor.name != f"step-{step:08d}":
                raise Lost(f"{survivor}: has the weights of step {step}")
            with sole_writer(out):  # the next run
                checkpoint.tidy(out)
                save(out, 3)
            if checkpoint.newest(out).name != "step-00000003" or list(out.glob(".step-*")):
                raise Lost(f"{out}: the next save after {effect} at call {number} is not whole")
            if 0 <= made <= number and made != KILLED:
                counts[effect] = number
                break
    return {"file calls of a save": counts["error"], "with an error": counts["error"],
            "with a kill": counts["kill"], "a checkpoint loads": sum(counts.values())}  # fmt: skip


def effects(name: str) -> Callable[[], None]:
    def raise_error():
        raise OSError(errno.EIO, "injected: input/output error")

    return raise_error if name == "error" else lambda: os._exit(KILLED)


# --- Flipped bytes ---


def flips(folder: Path, check: Callable[[], None], count: int, rng: random.Random) -> int:
    """Change one byte at a time; `check` must raise an InputError that names the file."""
    files = [path for path in sorted(folder.iterdir()) if path.name != ".lock"]
    sizes = [path.stat().st_size for path in files]
    for number in tqdm(range(count), desc=f"flip a byte of {folder.name}", disable=None):
        # Every file in turn first, then where a byte is likeliest: in the large ones.
        path = files[number] if number < len(files) else rng.choices(files, sizes)[0]
        place = rng.randrange(path.stat().st_size)
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ rng.randrange(1, 256)]))
        try:
            check()
        except InputError as error:
            if path.name not in str(error):
                raise Lost(f"{path}, byte {place}: reported as {error}") from error
        else:
            raise Lost(f"{path}, byte {place}: changed, and not noticed")
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    check()
    return count


def read_all(folder: Path) -> None:
    """As training reads a pack: survey and statistics, then every record."""
    pack = Pack(folder)
    every = np.arange(len(pack.episodes))
    pack.survey(every), pack.actions_of(every)
    pack.read(np.arange(len(pack)))


# --- Size ---


def write_large_index(folder: Path, episodes: int, length: int) -> None:
    """A pack whose index is real and whose blocks are holes of the right size."""
    entries = [
        {"file": f"set_table/pick/{i % 9}.h5", "task": "set_table", "subtask": "pick",
         "trajectory": f"traj_{i}", "length": length, "instruction": 0} for i in range(episodes)
    ]  # fmt: skip
    frames = episodes * length
    names = [block_name(number) for number in range(-(-frames // BLOCK))]
    for number, name in enumerate(names):
        with open(folder / name, "wb") as file:
            file.truncate(min(BLOCK, frames - number * BLOCK) * PACKED.itemsize)
    about = {"instructions": [""], "action_schema": None, "qpos_names": None}
    files = dict.fromkeys([*names, "survey.npy"], "0" * 64)
    content = {"files": files, "record": PACKED.itemsize} | about
    write_sealed(folder / "pack.json", content | {"sizes": {}, "episodes": entries})


OPEN = """
import re, sys, time
from samples import Frames, Pack, StepOrder

STATUS = "/proc/self/status"

def memory(which):  # kB of now (VmRSS), or of the peak since the reset (VmHWM)
    return int(re.search(rf"{which}:\\s+(\\d+)".encode(), open(STATUS, "rb").read())[1])

open("/proc/self/clear_refs", "w", encoding="utf-8").write("5")  # forget the peak of the imports
before, began = memory("VmRSS"), time.perf_counter()
frames = Frames(Pack(sys.argv[1]), 0.02, train=True)
StepOrder(len(frames), 512, 0, 0, 10, 0, 8).batch(0)
print(len(frames), time.perf_counter() - began, (memory("VmHWM") - before) / 1024)
"""


def open_large_index(folder: Path) -> dict:
    """The paper's 44,000 episodes: opened, and the first epoch's order drawn, in a new process."""
    folder.mkdir(exist_ok=True)
    write_large_index(folder, episodes=44_000, length=182)
    command = [sys.executable, "-c", OPEN, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    frames, seconds, megabytes = map(float, done.stdout.split())
    shutil.rmtree(folder)
    return {"frames": int(frames), "seconds": round(seconds, 2), "MB": round(megabytes)}


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
    return {
        "GB": 12 * parameters / 1e9,
        "stalled (s)": round(stalled, 2),
        "took (s)": round(took, 2),
    }
