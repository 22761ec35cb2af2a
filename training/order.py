"""The frames of a run, their order by step, and the loader that reads them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from config import InputError, TrainConfig
from data import Frames
from storage.h5 import SHUFFLE_POOL
from storage.pack import open_data
from training.ranks import ignore_signals


def open_frames(cfg: TrainConfig) -> tuple[Frames, Frames]:
    """Training and held-out frames."""
    data = open_data(cfg.data, cfg.truncate_at_success)
    options = cfg.model.history, cfg.tasks, cfg.subtasks
    frames, held_out = (Frames(data, cfg.val_episodes, train, *options) for train in (True, False))
    data.survey(held_out.episode_ids)  # reads all labels: bad ones end the run now
    if len(frames) < cfg.batch_size:
        raise InputError(
            f"{cfg.data}: {len(frames)} training and {len(held_out)} held-out frames, expected a "
            f"training batch of {cfg.batch_size}. Record more, or give a smaller --batch-size"
        )
    return frames, held_out


class StepOrder:
    """The global batch of each step: a function of seed, stage and step, not of the world size.

    Each epoch permutes all frames and drops the incomplete last batch. Iterating gives the rank's
    share of the batches `first`..`last` - 1. `blocks` [num_frames] gives the block of each frame;
    the frames of a block then stay near each other.
    """

    def __init__(
        self, num_frames: int, batch_size: int, seed: int, first: int, last: int, rank: int,
        world: int, blocks: np.ndarray | None = None, stage: int = 1,
    ):  # fmt: skip
        self.num_frames, self.batch_size, self.seed = num_frames, batch_size, seed
        self.first, self.last, self.rank, self.world = first, last, rank, world
        self.blocks, self.epoch, self.stage = blocks, None, stage

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step, rows of Frames [batch_size]."""
        epoch, step = divmod(step, self.num_frames // self.batch_size)
        if epoch != self.epoch:
            # Each stage has its own order. Stage 1 has no number in its seed, as in older runs.
            seeds = (self.seed, epoch) if self.stage == 1 else (self.seed, epoch, self.stage)
            self.order, self.epoch = self.shuffled(np.random.default_rng(seeds)), epoch
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """A permutation of the rows of Frames, [num_frames].

        With blocks, blocks come in random order, and each frame moves to a random place among the
        SHUFFLE_POOL blocks that follow its own: blocks are then read at an even rate.
        """
        if self.blocks is None:
            return rng.permutation(np.arange(self.num_frames, dtype=np.int32))
        _, block = np.unique(self.blocks, return_inverse=True)  # [num_frames], without gaps
        place = rng.permutation(block.max() + 1)[block]
        return np.argsort(place + SHUFFLE_POOL * rng.random(self.num_frames)).astype(np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.first, self.last):
            yield self.batch(step)[self.rank :: self.world]


def loader_processes(frames: Frames, workers: int) -> int:
    """`workers`; one at most for .h5 files, whose blocks each process would inflate again."""
    return workers if frames.blocks is None else min(workers, 1)


def loader(frames: Frames, order: StepOrder, workers: int) -> DataLoader:
    """Raw batches in the given order."""
    workers = loader_processes(frames, workers)
    # An iterator draws a seed; with its own generator it leaves torch's global random state alone.
    return DataLoader(
        frames, sampler=order, batch_size=None, num_workers=workers, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,
    )  # fmt: skip
