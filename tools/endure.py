"""What a run survives, in full counts: kill -9, failing disks, flipped bytes, other numbers of GPUs.

    python -m tools.endure --data PACK --work FOLDER --out results/endure.json

Takes an hour and a half on two cores; the tests run a few of each. Every figure is "n of n": the
first that is not ends the program with an error that says what was lost.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import tyro
from safetensors.torch import load_file
from tqdm import tqdm

import checkpoint
from config import InputError, explained
from durable import read_lines, sha256, write_sealed
from pack import BLOCK, PACKED, Pack, block_name

ROOT = Path(__file__).parent.parent
EIO = OSError(5, "injected: input/output error")


class Lost(InputError):
    """Something did not survive; the message says what."""


# --- Training as a user starts it ---


def start(out: Path, processes: int, *flags, restarts: int = 0) -> subprocess.Popen:
    """Start train.py, small, on the CPU, saving at every step."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    torchrun += [f"--max-restarts={restarts}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "train.py", "--preset", "tiny"]
    command += ["--device", "cpu", "--batch-size", "8", "--micro-batch", "8", "--log-every", "1"]
    command += ["--val-frames", "8", "--save-every", "1", "--out", out, *flags]
    with open(f"{out}.txt", "ab") as log:
        return subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log,
        )  # fmt: skip


def finish(process: subprocess.Popen, out: Path, code: int = 0) -> None:
    """Wait for the end. Raises Lost if it is not the one expected."""
    if (got := process.wait(timeout=900)) != code:
        raise Lost(f"{out}: ended with {got}, expected {code}; its output is in {out}.txt")


def processes_of(out: Path, what: str = "train.py") -> list[int]:
    """torchrun, the ranks and their loaders, found by their command line."""
    found = subprocess.run(["pgrep", "-f", "--", f"{what} .*--out {out} "], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def kill_all(process: subprocess.Popen, out: Path) -> None:
    """kill -9 everything that the run consists of, at once."""
    for pid in processes_of(out):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def fingerprint(out: Path) -> tuple[str, str, str]:
    """Step, weights and optimizer of the newest whole checkpoint."""
    folder = checkpoint.newest(out)
    hashes = [sha256(folder / f"{name}.safetensors") for name in ("model", "optimizer")]
    return folder.name, *hashes


# --- kill -9 ---


def kills(data: Path, work: Path, count: int, stage: int, init_from: Path | None, steps=30) -> dict:
    """Kill runs of two processes at random instants; each ends with the uninterrupted one's bytes.

    The instant is uniform over the time that an uninterrupted run takes, start-up included.
    """
    flags = ["--data", data, "--stage", stage, "--steps", steps, "--workers", "1", "--seed", "3"]
    flags += ["--init-from", init_from] if init_from else []
    straight, out, began = work / f"straight{stage}", work / f"killed{stage}", time.monotonic()
    finish(start(straight, 2, *flags), straight)
    takes, expected = time.monotonic() - began, fingerprint(straight)
    rng, done, runs, reached = random.Random(stage), 0, 0, []
    bar = tqdm(total=count, desc=f"kill -9, stage {stage}", disable=None)
    while True:
        process = start(out, 2, *flags)
        try:
            process.wait(timeout=rng.uniform(0, takes) if done < count else 900)
        except subprocess.TimeoutExpired:
            if done == count:
                raise Lost(f"{out}: does not end") from None
            kill_all(process, out)
            done += 1
            bar.update()
            reached.append(len(read_lines(out / "log.jsonl")))
            continue
        if process.returncode or fingerprint(out) != expected:
            raise Lost(f"{out}: after {done} kills it ended with {process.returncode} and other "
                       f"bytes than {straight}; its output is in {out}.txt")  # fmt: skip
        runs += 1
        shutil.rmtree(out)
        if done == count:
            bar.close()
            return {"kills": done, "runs completed": runs, "equal": runs,
                    "in training": sum(lines > 0 for lines in reached)}  # fmt: skip


def rank_deaths(data: Path, work: Path, count: int) -> dict:
    """Kill one rank of two: torchrun starts both again, and the bytes are the same."""
    flags = ["--data", data, "--stage", 2, "--steps", 12, "--seed", "3"]
    straight, rng = work / "straight-rank", random.Random(0)
    finish(start(straight, 2, *flags), straight)
    for number in range(count):
        out = work / f"rank{number}"
        process = start(out, 2, *flags, restarts=1)
        wait_for(lambda out=out: (out / "step-00000003").exists(), process)
        ranks = [pid for pid in processes_of(out, "-u train.py")]
        os.kill(rng.choice(ranks), signal.SIGKILL)
        finish(process, out)
        if fingerprint(out) != fingerprint(straight):
            raise Lost(f"{out}: other bytes than {straight}")
        shutil.rmtree(out)
    return {"rank deaths": count, "equal": count}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds=300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise Lost(f"{process.args}: ended early, or nothing happened in {seconds} s")
        time.sleep(0.02)


def sigterm(data: Path, work: Path, count: int) -> dict:
    """SIGTERM to torchrun: every rank saves the step it is in and ends."""
    slowest, flags = 0.0, ["--data", data, "--stage", 1, "--steps", 10_000, "--seed", "3"]
    for number in range(count):
        out = work / f"term{number}"
        process = start(out, 2, *flags)
        wait_for(lambda out=out: (out / "step-00000002").exists(), process)
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        process.wait(timeout=60)
        slowest = max(slowest, time.monotonic() - began)
        trained = [line["step"] for line in read_lines(out / "log.jsonl") if "action" in line]
        if checkpoint.newest(out).name != f"step-{trained[-1]:08d}":
            raise Lost(f"{out}: step {trained[-1]} was taken, {checkpoint.newest(out)} is saved")
        shutil.rmtree(out)
    return {"signals": count, "saved the last step": count, "slowest exit (s)": round(slowest, 1)}


# --- Other numbers of processes ---


def order(data: Path, work: Path, epochs: int = 2) -> dict:
    """1, 2, 4, 8 processes, and 8 -> 2 -> 4, over two epochs: the same losses."""
    curves, per_epoch = {}, 0
    for name, plan in {"1": [1], "2": [2], "4": [4], "8": [8], "8 -> 2 -> 4": [8, 2, 4]}.items():
        out = work / f"order-{name.replace(' -> ', '-')}"
        for i, processes in enumerate(plan, 1):
            flags = ["--data", data, "--stage", 2, "--warmup", 0, "--cooldown", 0, "--seed", 3]
            flags += ["--epochs", 0, epochs, 0, "--val-every", 1000, "--save-every", 1000]
            if i < len(plan):
                flags += ["--steps", i * per_epoch // 2]
            finish(start(out, processes, *flags), out)
        lines = [line for line in read_lines(out / "log.jsonl") if "action" in line]
        curves[name] = np.array([[line[key] for key in ("action", "qpos", "seg")] for line in lines])
        per_epoch = len(lines) // epochs
    worst = {
        name: float(np.abs(curve / curves["1"] - 1).max()) for name, curve in curves.items()
    }
    return {"steps": len(curves["1"]), "largest relative difference of a loss": worst}


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
        checkpoint_save(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    checkpoint_save, nothing = checkpoint.save_file, lambda *_: None
    write_bytes, write_text = Path.write_bytes, Path.write_text
    with (
        patch("checkpoint.save_file", around("tensors", checkpoint_save, half_of_tensors)),
        patch.object(Path, "write_bytes", around(
            "write", write_bytes, lambda path, content: write_bytes(path, content[:len(content) // 2])
        )),
        patch.object(Path, "write_text", around(
            "write", write_text, lambda path, text: write_text(path, text[: len(text) // 2])
        )),
        patch("os.fsync", around("fsync", os.fsync, nothing)),
        patch("os.replace", around("rename", os.replace, nothing)),
        patch("os.mkdir", around("mkdir", os.mkdir, nothing)),
        patch("os.unlink", around("unlink", os.unlink, nothing)),
        patch("os.rmdir", around("rmdir", os.rmdir, nothing)),
    ):  # fmt: skip
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
            with checkpoint.sole_writer(out):  # the next run
                save(out, 3)
            if checkpoint.newest(out).name != "step-00000003" or list(out.glob(".step-*")):
                raise Lost(f"{out}: the next save after {effect} at call {number} is not whole")
            if 0 <= made <= number and made != KILLED:
                counts[effect] = number
                break
    return {"file calls of a save": counts["error"], "with an error": counts["error"],
            "with a kill": counts["kill"], "a checkpoint loads": sum(counts.values())}  # fmt: skip


KILLED = 100  # exit code of an injected kill


def effects(name: str) -> Callable[[], None]:
    def raise_error():
        raise EIO

    return raise_error if name == "error" else lambda: os._exit(KILLED)


# --- Flipped bytes ---


def flips(folder: Path, check: Callable[[], None], count: int, rng: random.Random) -> int:
    """Change one byte at a time; `check` must raise an InputError that names the file."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
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
    """As training reads a pack: statistics, then every record."""
    pack = Pack(folder)
    pack.actions_of(np.arange(len(pack.episodes)))
    pack.read(np.arange(len(pack)))


# --- Size ---


def write_large_index(folder: Path, episodes: int, length: int) -> None:
    """A pack whose index is real and whose blocks are holes of the right size."""
    entries = [
        {"file": f"set_table/pick/{i % 9}.h5", "trajectory": f"traj_{i}", "length": length,
         "instruction": 0} for i in range(episodes)
    ]  # fmt: skip
    frames = episodes * length
    names = [block_name(number) for number in range(-(-frames // BLOCK))]
    for number, name in enumerate(names):
        with open(folder / name, "wb") as file:
            file.truncate(min(BLOCK, frames - number * BLOCK) * PACKED.itemsize)
    about = {"instructions": [""], "action_schema": None, "qpos_names": None}
    content = {"files": dict.fromkeys(names, "0" * 64), "record": PACKED.itemsize} | about
    write_sealed(folder / "pack.json", content | {"sizes": {}, "episodes": entries})


OPEN = """
import resource, sys, time
from data import Frames, Pack, StepOrder
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
frames = Frames(Pack(sys.argv[1]), 0.02, train=True)
StepOrder(len(frames), 512, 0, 0, 10, 0, 8).batch(0)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(frames), time.perf_counter() - began, used / 1024)
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
    saver = checkpoint.Saver(work / "stall", keep=1, is_main=True, step=0)
    began = time.perf_counter()
    saver.save(1, model, optimizer, {}, "{}")
    stalled = time.perf_counter() - began
    saver.close()
    took = time.perf_counter() - began
    shutil.rmtree(work / "stall")
    return {"GB": 12 * parameters / 1e9, "stalled (s)": round(stalled, 2), "took (s)": round(took, 2)}


@dataclass(frozen=True)
class EndureConfig:
    data: Path  # a small pack: some hundred frames
    work: Path  # an empty folder, for the runs
    out: Path  # the figures, JSON
    kills: int = 200  # over the three stages
    deaths: int = 20  # of one rank
    signals: int = 20
    flips: int = 1000  # of a checkpoint, and of a pack


def main(cfg: EndureConfig) -> None:
    cfg.work.mkdir(parents=True, exist_ok=True)
    pack, rng = cfg.work / "pack", random.Random(0)
    shutil.copytree(cfg.data, pack, dirs_exist_ok=True)
    figures = {
        "index": open_large_index(cfg.work / "index"), "stall": stall(cfg.work),
        "faults": faults(cfg.work), "order": order(pack, cfg.work),
    }  # fmt: skip
    figures["SIGTERM"] = sigterm(pack, cfg.work, cfg.signals)
    before = None
    for stage, count in zip((1, 2, 3), np.diff(np.linspace(0, cfg.kills, 4).astype(int))):
        figures[f"kill -9, stage {stage}"] = kills(pack, cfg.work, int(count), stage, before)
        before = cfg.work / f"straight{stage}"
    figures["rank deaths"] = rank_deaths(pack, cfg.work, cfg.deaths)
    saved = checkpoint.newest(before)
    looks = {"checkpoint": (saved, lambda: checkpoint.read_manifest(saved)),
             "pack": (pack, lambda: read_all(pack))}  # fmt: skip
    for name, (folder, check) in looks.items():
        figures[f"flipped bytes, {name}"] = {"named": flips(folder, check, cfg.flips, rng)}
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(cfg.out, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    with explained():
        main(tyro.cli(EndureConfig, description=__doc__))
