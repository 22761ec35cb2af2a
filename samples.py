"""Which frames a step trains on (paper Sec. 3, 6.1): the same on any number of processes.

    frames = Frames(open_data("PACK"), held_out=0.02, train=True)
    order = StepOrder(len(frames), batch_size=512, seed=0, first=step, last=num_steps, ...)
    for raw in loader(frames, order, workers=4): ...   # what Batcher makes a batch of

The state of the order is the step: a resumed run draws the epoch's permutation again and begins at
its place, without reading what came before.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import HISTORY, LABELS, InputError, TrainConfig, quoted
from data import ActionStats, to_tensors
from demonstrations import SHUFFLE_POOL, Demonstrations
from pack import Pack
from trajectory import remarks


class Frames(Dataset):
    """Training or held-out frames; item [i, j, ...] is the raw batch of those frames."""

    def __init__(
        self, source: Demonstrations | Pack, held_out: float, train: bool,
        history: str = "none", tasks: tuple[str, ...] = (), subtasks: tuple[str, ...] = (),
    ):  # fmt: skip
        """Hold out the last share `held_out` of every file's episodes, at least one.

        `tasks` and `subtasks`, where given, leave only their files, <task>/<subtask>/<target>.h5;
        InputError if none is left. `history` adds what Batcher needs of the steps before.
        """
        self.source, self.history = source, history
        files = np.array([episode.file for episode in source.episodes])
        wanted = [
            (not tasks or episode.task in tasks) and (not subtasks or episode.subtask in subtasks)
            for episode in source.episodes
        ]
        if not any(wanted):
            raise InputError(
                f"{source.folder}: no demonstrations of {'/'.join((*tasks, *subtasks))} "
                f"in <task>/<subtask>/<target>.h5; it has {', '.join(sorted(set(files)))}"
            )
        keep = np.zeros(len(files), bool)
        for file in np.unique(files):
            rows = np.flatnonzero(files == file)
            first_val = len(rows) - max(1, round(held_out * len(rows)))
            keep[rows[:first_val] if train else rows[first_val:]] = wanted[rows[0]]
        self.episode_ids = np.flatnonzero(keep)
        # 4 bytes a frame: the index of the paper's 8 million takes 32 MB.
        self.frames = np.flatnonzero(np.repeat(keep, np.diff(source.starts))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def instructions(self) -> list[str]:
        """The sentences of these episodes; the source may have others."""
        used = {self.source.episodes[e].instruction for e in self.episode_ids}
        return [text for row, text in enumerate(self.source.instructions) if row in used]

    @property
    def blocks(self) -> np.ndarray | None:
        """The block of each frame, where reading one inflates its neighbours; None in a pack."""
        starts = self.source.blocks
        return None if starts is None else np.searchsorted(starts, self.frames, side="right") - 1

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        now = self.frames[rows]  # [B]
        records = self.source.read(now)
        if self.history == "none":
            return to_tensors(records)
        ago = np.arange(-HISTORY, 0)
        # GAP-5: before the episode's start its first frame stands in, in training and acting alike.
        past = now[:, None] + np.maximum(ago, -records["frame"][:, None])  # [B, 4]
        earlier = rearrange(
            self.source.read(rearrange(past, "b t -> (b t)")), "(b t) -> b t", t=HISTORY
        )
        seen = (
            {"past_rgb": earlier["rgb"], "past_depth": earlier["depth"]}
            if self.history == "frames"
            else {
                "past_actions": earlier["actions"][:, :, 0],
                "past_mask": ago >= -records["frame"][:, None],
            }
        )
        return to_tensors(records) | {
            name: torch.from_numpy(np.array(value, order="C")) for name, value in seen.items()
        }

    @cached_property
    def survey(self) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        return self.source.survey(self.episode_ids)

    @property
    def labelled(self) -> dict[str, int]:
        """How many of the frames have each label."""
        return dict(zip(LABELS, self.survey["labelled"].sum(0).tolist()))

    @property
    def remarks(self) -> list[str]:
        return remarks(self.survey, [self.source.episodes[e].file for e in self.episode_ids])

    def stats(self, bounds: str) -> ActionStats:
        """Action bounds: "controller" or "percentiles" of these episodes."""
        if bounds == "percentiles":
            return ActionStats.percentiles(self.source.actions_of(self.episode_ids))
        actions = self.survey["actions"]  # [n, 2, 13]
        return ActionStats.controller(actions[:, 0].min(0), actions[:, 1].max(0))

    def names(self, rows: np.ndarray) -> list[str]:
        """File, trajectory and frame of each row, as a person looks for them."""
        frames = self.frames[rows]
        episodes = np.searchsorted(self.source.starts, frames, side="right") - 1
        return [
            f"{self.source.episodes[e].file} {self.source.episodes[e].trajectory} "
            f"frame {frame - self.source.starts[e]}"
            for e, frame in zip(episodes, frames)
        ]


class StepOrder:
    """Which frames a step trains on: a pure function of seed, stage and step, on any rank count.

    Every epoch is a new permutation of all frames, of which an incomplete last batch is left out.
    Iterating gives a rank's share of the batches `first`..`last` - 1. With `blocks`, the block of
    each frame [num_frames], those that are read together stay near each other.
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
            # Each stage has its own order; stage 1 keeps the one it had before stages differed.
            seeds = (self.seed, epoch) if self.stage == 1 else (self.seed, epoch, self.stage)
            self.order, self.epoch = self.shuffled(np.random.default_rng(seeds)), epoch
        return self.order[step * self.batch_size : (step + 1) * self.batch_size]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All rows of Frames, [num_frames], in any order or in a window of SHUFFLE_POOL blocks.

        The window slides: blocks come in random order, each of their frames somewhere in the
        window behind its block's place, so that blocks are read at an even rate.
        """
        if self.blocks is None:
            return rng.permutation(np.arange(self.num_frames, dtype=np.int32))
        _, block = np.unique(self.blocks, return_inverse=True)  # [num_frames], without gaps
        place = rng.permutation(block.max() + 1)[block]
        return np.argsort(place + SHUFFLE_POOL * rng.random(self.num_frames)).astype(np.int32)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self):
        for step in range(self.first, self.last):
            yield self.batch(step)[self.rank :: self.world]


def loader(frames: Frames, order, workers: int) -> DataLoader:
    """Raw batches in the given order.

    One process reads MS-HAB's files, where each would inflate the same blocks; several a pack. Its
    own generator: otherwise each new iterator would draw from the global random state, which
    shifts the noise of a resumed run.
    """
    if frames.blocks is not None:
        workers = min(workers, 1)
    return DataLoader(
        frames, sampler=order, batch_size=None, num_workers=workers,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
        persistent_workers=workers > 0,
    )  # fmt: skip


def open_data(folder: str | Path, truncate: bool | None = None) -> Demonstrations | Pack:
    """A pack if the folder is one, else the demonstrations below it.

    `truncate` ends demonstrations at their success; None takes a pack as it is. Raises
    FileNotFoundError when the folder has neither, InputError when its pack is of the other kind.
    """
    if not (Path(folder) / "pack.json").is_file():
        return Demonstrations(folder, bool(truncate))
    pack = Pack(folder)
    if truncate not in (None, pack.truncate):
        kinds = {True: "demonstrations that end at their success", False: "whole demonstrations"}
        flag = "--no-truncate-at-success"
        again = "python data.py pack " + f"{flag} " * (not truncate)
        raise InputError(
            f"{folder}: a pack of {kinds[pack.truncate]}, expected one of {kinds[truncate]}. "
            f"{'Give' if truncate else 'Drop'} {flag}, or pack again: {again}--data DATA --out "
            f"{quoted(f'{folder}-again')}"
        )
    return pack


def open_frames(cfg: TrainConfig) -> tuple[Frames, Frames]:
    """Training and held-out frames."""
    data = open_data(cfg.data, cfg.truncate_at_success)
    frames, held_out = (
        Frames(data, cfg.val_episodes, train, cfg.model.history, cfg.tasks, cfg.subtasks)
        for train in (True, False)
    )
    if len(frames) < cfg.batch_size:
        raise InputError(
            f"{cfg.data}: {len(frames)} training frames ({len(held_out)} more are held out) are "
            f"less than one batch of {cfg.batch_size}; record more, or give a smaller --batch-size"
        )
    return frames, held_out
