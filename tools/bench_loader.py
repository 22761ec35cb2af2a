"""Frames per second of the loader, beside reading one frame at a time; `tools.bench loader`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import CAMERAS
from demonstrations import Demonstrations
from pack import Pack, pack
from samples import Frames, StepOrder, loader
from trajectory import RECORD


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """Each contestant gives one value a round; {name: median, min, max}."""
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            values[name].append(contestant())
    return {name: spread(each) for name, each in values.items()}


def seconds(run: Callable[[], object], device: torch.device | None = None) -> float:
    began = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class SingleFrames(Dataset):
    """The reference: one frame by one read of each dataset, as MS-HAB's own loader does it."""

    def __init__(self, source: Demonstrations):
        self.files = {e.file: h5py.File(source.folder / e.file) for e in source.episodes}
        self.frames = [(e.file, e.trajectory, t) for e in source.episodes for t in range(e.length)]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        file, trajectory, t = self.frames[row]
        group = self.files[file][trajectory]
        paths = ["agent/qpos", "extra/is_grasped", "extra/obj_pose_wrt_base"]
        paths += [f"sensor_data/fetch_{c}/{kind}" for c in CAMERAS for kind in ("rgb", "depth")]
        return {path: group[f"obs/{path}"][t] for path in paths} | {"action": group["actions"][t]}


def epoch(
    source: Demonstrations | Pack, batch: int = 64, steps: int | None = None
) -> Callable[[], float]:
    """Frames per second over an epoch of ours, or so many steps, from cold caches of our own."""
    frames = Frames(source, 0.02, train=True)
    steps = min(steps or len(frames), len(frames) // batch)

    def run() -> float:
        order = StepOrder(len(frames), batch, 0, 0, steps, 0, 1, frames.blocks)
        return steps * batch / seconds(lambda: [frames[rows] for rows in order])

    return run


def single(dataset: SingleFrames, count: int) -> Callable[[], float]:
    rng = np.random.default_rng(0)
    return lambda: (
        count / seconds(lambda: [dataset[row] for row in rng.integers(0, len(dataset), count)])
    )


def through_torch(dataset: SingleFrames, count: int) -> Callable[[], float]:
    """The same reads in the worker of a torch DataLoader."""

    def run() -> float:
        rows = np.random.default_rng(0).integers(0, len(dataset), count).tolist()
        batches = DataLoader(dataset, batch_size=32, sampler=rows, num_workers=1)
        return count / seconds(lambda: list(batches))

    return run


def inflate(source: Demonstrations) -> Callable[[], float]:
    """The limit of the files: whole trajectories, one after the other."""
    chosen = range(min(40, len(source.episodes)))
    count = sum(source.episodes[e].length for e in chosen)
    return lambda: count / seconds(lambda: [source.read_episode(e) for e in chosen])


def memory() -> Callable[[], float]:
    """The limit of the pack: records copied from memory to memory."""
    records, out = np.ones(256, RECORD), np.empty(256, RECORD)
    return lambda: 10 * 256 / seconds(lambda: [np.copyto(out, records) for _ in range(10)])


def wait_per_step(source: Pack, batch: int, consumption: float, steps: int = 40) -> float:
    """Milliseconds that a step waits for its batch when a device takes `consumption` frames/s."""
    frames = Frames(source, 0.02, train=True)
    order = StepOrder(len(frames), batch, 0, 0, steps, 0, 1, frames.blocks)
    batches, waited = iter(loader(frames, order, workers=1)), []
    for _ in range(steps):
        waited.append(seconds(lambda: next(batches)))
        time.sleep(batch / consumption)
    return 1000 * statistics.median(waited[5:])


def diversity(source: Demonstrations, batch: int) -> dict[str, float]:
    """Entropy of the trajectories in a batch, bits: shuffled by blocks, and in full."""
    frames = Frames(source, 0.02, train=True)
    episode = np.searchsorted(source.starts, frames.frames, side="right")
    steps, out = len(frames) // batch, {}
    for name, blocks in (("blocks", frames.blocks), ("full", None)):
        order = StepOrder(len(frames), batch, 0, 0, steps, 0, 1, blocks)
        shares = [np.unique(episode[rows], return_counts=True)[1] / len(rows) for rows in order]
        out[name] = float(np.mean([-(p * np.log2(p)).sum() for p in shares]))
    return out


@dataclass(frozen=True)
class LoaderBench:
    data: Path  # demonstrations in MS-HAB's layout, untouched
    json: Path | None = None
    rounds: int = 5
    consumption: float = 448.0  # frames per second of the training run whose wait is measured
    batch: int = 64

    def run(self) -> dict:
        source = Demonstrations(self.data)
        with TemporaryDirectory() as folder:
            pack(str(self.data), folder)
            packed, dataset = Pack(folder), SingleFrames(source)
            frames_per_s = in_turns(
                {
                    "one frame, one read (MS-HAB)": single(dataset, 200),
                    "the same in a torch DataLoader": through_torch(dataset, 200),
                    "ours, files": lambda: epoch(Demonstrations(self.data))(),
                    "ours, pack": epoch(packed),
                    "limit of files: inflate": inflate(source),
                    "limit of the pack: memory": memory(),
                },
                self.rounds,
            )
            waits = wait_per_step(packed, self.batch, self.consumption)
        return {
            "unit": "frames/s", "frames": len(source), "figures": frames_per_s,
            "wait per step (ms)": waits, "consumption": self.consumption,
            "entropy of trajectories per batch (bits)": diversity(source, self.batch),
        }  # fmt: skip
