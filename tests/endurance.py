"""What a run survives, in full counts: kill -9, failing disks, flipped bytes, changed GPU counts.

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

import checkpoint
from config import explained
from durable import read_lines, sha256, write
from tools.faults import Lost, faults, flips, open_large_index, read_all, stall

ROOT = Path(__file__).parent.parent

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
        curves[name] = np.array(
            [[line[key] for key in ("action", "qpos", "seg")] for line in lines]
        )
        per_epoch = len(lines) // epochs
    worst = {name: float(np.abs(curve / curves["1"] - 1).max()) for name, curve in curves.items()}
    return {"steps": len(curves["1"]), "largest relative difference of a loss": worst}


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
    """Every part that is not in --out yet; each is written there when it is done."""
    cfg.work.mkdir(parents=True, exist_ok=True)
    pack, rng = cfg.work / "pack", random.Random(0)
    shutil.copytree(cfg.data, pack, dirs_exist_ok=True)
    straight = {stage: cfg.work / f"straight{stage}" for stage in (1, 2, 3)}

    def checkpoint_flips() -> dict:
        saved = checkpoint.newest(straight[3])
        return flips(saved, lambda: checkpoint.read_manifest(saved), cfg.flips, rng)

    parts = {
        "index": lambda: open_large_index(cfg.work / "index"),
        "stall": lambda: stall(cfg.work),
        "faults": lambda: faults(cfg.work),
        "order": lambda: order(pack, cfg.work),
        "SIGTERM": lambda: sigterm(pack, cfg.work, cfg.signals),
    }
    for stage, share in zip((1, 2, 3), np.diff(np.linspace(0, cfg.kills, 4).astype(int))):
        parts[f"kill -9, stage {stage}"] = lambda stage=stage, share=int(share): kills(
            pack, cfg.work, share, stage, straight.get(stage - 1)
        )
    parts |= {
        "rank deaths": lambda: rank_deaths(pack, cfg.work, cfg.deaths),
        "flipped bytes, checkpoint": checkpoint_flips,
        "flipped bytes, pack": lambda: flips(pack, lambda: read_all(pack), cfg.flips, rng),
    }
    figures = json.loads(cfg.out.read_bytes()) if cfg.out.exists() else {}
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if name not in figures:
            figures[name] = part()
            write(cfg.out, (json.dumps(figures, indent=1) + "\n").encode())
            print(f"{name}: {figures[name]}", flush=True)


if __name__ == "__main__":
    with explained():
        main(tyro.cli(EndureConfig, description=__doc__))
