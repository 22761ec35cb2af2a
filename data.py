"""From a recorded or a live frame to a batch (paper Sec. 3, 4.2), and the pack that makes it fast.

    python data.py pack --data DATA --out PACK  # fixed-size records, memory-mapped; resumable
    python data.py verify PACK                  # every block against its checksum
    python data.py download --out DATA          # MS-HAB's released demonstrations; resumable

The batch, the only contract between data and model (L = prompt length, C = cameras, V = views):

    images       [B, V, 3, H, W]     float in [0, 1]; head rgb, hand rgb, head depth, hand depth;
                                     history "frames": those of the 4 time steps before come first
    past_actions [B, 4, 13]          history "actions": the last four, normalised, oldest first;
                                     past_mask [B, 4]: 0 before the start of the episode
    prompt_ids   [B, L] int64        first token, padding, the other tokens; prompt_mask [B, L] bool
    actions      [B, 8, 13]          normalised to [-1, 1] by ActionStats (GAP-23)
    action_mask  [B, 8]              0 past the end of the episode
    pos [B, 2] m, world frame        grasp [B] 0 or 1             qpos [B, 12] rad (prismatic: m)
    obj [B, 7] m, wxyz, base frame   seg [B, C, 128, 128] 0 or 1
    has_pos ... has_seg [B] bool     does the frame have the label?

Everything that turns recorded numbers into these, and back, is in this file and is used by training
and acting alike.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from config import (
    ACTION_DIM,
    CAMERAS,
    DEPTH_SCALE_MM,
    HISTORY,
    IMAGE_SIZE,
    LABELS,
    QPOS_DIM,
    RECORDED_ACTIONS,
    InputError,
    ModelConfig,
    TrainConfig,
    quoted,
    user_errors,
)  # fmt: skip
from storage.download import download
from storage.h5 import SHUFFLE_POOL, Demonstrations
from storage.pack import Pack, pack, verify
from storage.trajectory import RECORD, remarks

# --- Images ---


def normalize_depth(depth_mm: Tensor) -> Tensor:
    """Depth in whole millimetres -> [0, 1]; near is 1, far is 0 (Eq. 1).

    Recorded and live depth is int16. Beyond 32.767 m it wraps to negative numbers, which are far.
    GAP-20 (Eq. 1): depth 0 means that nothing was hit, yet becomes 1, "touching". Kept: MS-HAB's
    own policies do so.

    Raises ValueError on float input, which is likely metres and would become all ones.
    """
    if depth_mm.is_floating_point():
        raise ValueError(
            f"depth is {depth_mm.dtype}, expected integer millimetres; multiply metres by 1000 and "
            "round"
        )
    depth = torch.where(depth_mm < 0, torch.inf, depth_mm.float())
    # Eq. 1: p_obs = 1 - tanh(depth / 1000)
    return 1 - torch.tanh(depth / DEPTH_SCALE_MM)


def preprocess(rgb: Tensor, depth_mm: Tensor, cfg: ModelConfig) -> Tensor:
    """Camera pictures -> `images` [B, V, 3, H, W] in [0, 1]; one function for training and acting.

    rgb [B, 2, h, w, 3] uint8 and depth_mm [B, 2, h, w] integer, head then hand.
    """
    chosen = [CAMERAS.index(camera) for camera in cfg.cameras]
    views = [
        resize(rearrange(rgb[:, chosen].float() / 255, "b v h w c -> b v c h w"), cfg.image_size)
    ]
    if cfg.depth:
        # GAP-4 (Sec. 4.2): how depth enters an RGB encoder is not said; as one more picture,
        # repeated to three channels.
        near = resize(
            rearrange(normalize_depth(depth_mm[:, chosen]), "b v h w -> b v 1 h w"), cfg.image_size
        )
        views.append(repeat(near, "b v 1 h w -> b v c h w", c=3))
    return torch.cat(views, dim=1)  # [B, V, 3, H, W]


def preprocess_steps(seen: list[tuple[Tensor, Tensor]], cfg: ModelConfig) -> Tensor:
    """`images` of several time steps' (rgb, depth), oldest first, [B, steps * V, 3, H, W]."""
    return torch.cat([preprocess(rgb, depth, cfg) for rgb, depth in seen], dim=1)


def resize(images: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, as PIL for Prismatic; [B, V, C, h, w] -> [B, V, C, size, size]."""
    flat = rearrange(images, "b v c h w -> (b v) c h w")
    flat = F.interpolate(
        flat, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return rearrange(flat.clamp(0, 1), "(b v) c h w -> b v c h w", b=len(images))


def cameras(obs: dict) -> tuple[Tensor, Tensor]:
    """A live observation of MS-HAB -> rgb [B, 2, h, w, 3] uint8, depth [B, 2, h, w] int16 mm.

    Head camera, then hand camera.
    """
    sensors = [obs["sensor_data"][f"fetch_{camera}"] for camera in CAMERAS]
    rgb = torch.stack([sensor["rgb"] for sensor in sensors], dim=1)
    depth = torch.stack([sensor["depth"][..., 0] for sensor in sensors], dim=1)
    return rgb, depth


# --- Actions ---


@dataclass(frozen=True)
class ActionStats:
    """Per action dimension, the bounds that normalisation maps to -1 and 1 (GAP-23)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def controller(lowest: np.ndarray, highest: np.ndarray) -> "ActionStats":
        """The controller's own bounds, -1 and 1, given the data's lowest and highest actions [13].

        A dimension that never moves keeps its one value, which no action token holds exactly.
        """
        still = lowest == highest
        low, high = np.where(still, lowest, -1.0), np.where(still, lowest, 1.0)
        return ActionStats(tuple(low.tolist()), tuple(high.tolist()))

    @staticmethod
    def percentiles(actions: np.ndarray) -> "ActionStats":
        """1st and 99th percentile of all actions [n, 13]; if they coincide, minimum and maximum."""
        low, high = np.quantile(actions, 0.01, axis=0), np.quantile(actions, 0.99, axis=0)
        flat = high - low < 1e-6
        low, high = np.where(flat, actions.min(0), low), np.where(flat, actions.max(0), high)
        return ActionStats(tuple(low.tolist()), tuple(high.tolist()))

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor([self.low, self.high], device=like.device)
        return low, high

    def normalize(self, actions: Tensor) -> Tensor:
        """Robot units [..., 13] -> [-1, 1], clipped; a constant dimension becomes 0."""
        low, high = self._tensors(actions)
        span = high - low
        scaled = 2 * (actions - low) / span.clamp(min=1e-8) - 1
        return torch.where(span > 0, scaled, 0.0).clamp(-1, 1)

    def denormalize(self, actions: Tensor) -> Tensor:
        """[-1, 1] -> robot units; a constant dimension becomes its constant regardless."""
        low, high = self._tensors(actions)
        return low + (actions + 1) / 2 * (high - low)


# --- Batch ---


def to_tensors(records: np.ndarray) -> dict[str, Tensor]:
    """RECORDs [B] -> their fields as tensors; small types, ready to travel to the device."""
    return {name: torch.from_numpy(np.array(records[name], order="C")) for name in RECORD.names}


@dataclass
class Batcher:
    """Makes the batch on the device from what the loader sends: raw pictures, actions, labels."""

    cfg: ModelConfig
    stats: ActionStats
    prompts: tuple[Tensor, Tensor]  # of every instruction of the data

    def __call__(self, raw: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        raw = {name: value.to(device, non_blocking=True) for name, value in raw.items()}
        ids, mask = (prompt.to(device)[raw["instruction"].long()] for prompt in self.prompts)
        chosen = [CAMERAS.index(camera) for camera in self.cfg.cameras]
        steps = [(raw["rgb"], raw["depth"])]
        if self.cfg.history == "frames":
            steps = list(zip(raw["past_rgb"].unbind(1), raw["past_depth"].unbind(1))) + steps
        batch = {
            "images": preprocess_steps(steps, self.cfg),
            "prompt_ids": ids,
            "prompt_mask": mask,
            "actions": self.stats.normalize(raw["actions"]),
            "action_mask": raw["action_mask"].float(),
            "seg": unpack_masks(raw["seg"][:, chosen]),
        }
        batch |= {name: raw[name] for name in ("pos", "grasp", "qpos", "obj")}
        if self.cfg.history == "actions":
            batch["past_actions"] = self.stats.normalize(raw["past_actions"])
            batch["past_mask"] = raw["past_mask"]
        return batch | {f"has_{name}": raw["has"][:, i].bool() for i, name in enumerate(LABELS)}


def unpack_masks(bits: Tensor) -> Tensor:
    """One bit per pixel [B, C, 128*128/8] -> [B, C, 128, 128] float 0 or 1."""
    shifts = torch.arange(7, -1, -1, device=bits.device)
    pixels = (rearrange(bits, "b c n -> b c n 1") >> shifts) & 1
    return rearrange(pixels, "b c (h w) bit -> b c h (w bit)", h=IMAGE_SIZE).float()


def batch_shapes(
    cfg: ModelConfig, b: int, noise: bool = False, prompt: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every key of a batch of b frames; `noise` adds what stage 3 draws.

    `prompt` is the length of the prompts, by default the longest that may be.
    """
    prompt = prompt or cfg.llm.prompt_length
    shapes = {
        "images": (b, cfg.num_views, 3, cfg.image_size, cfg.image_size),
        "prompt_ids": (b, prompt), "prompt_mask": (b, prompt),
        "actions": (b, RECORDED_ACTIONS, ACTION_DIM), "action_mask": (b, RECORDED_ACTIONS),
        "pos": (b, 2), "grasp": (b,), "qpos": (b, QPOS_DIM), "obj": (b, 7),
        "seg": (b, len(cfg.cameras), IMAGE_SIZE, IMAGE_SIZE),
    } | {f"has_{name}": (b,) for name in LABELS}  # fmt: skip
    if cfg.history == "actions":
        shapes |= {"past_actions": (b, HISTORY, ACTION_DIM), "past_mask": (b, HISTORY)}
    return shapes | ({"noise": shapes["actions"], "t": (b,)} if noise else {})


def check_batch(batch: dict[str, Tensor], cfg: ModelConfig) -> None:
    """Raise ValueError, naming key, got and expected, unless a batch is as the file's top says."""
    length = batch["prompt_ids"].shape[-1]
    shapes = batch_shapes(cfg, len(batch["images"]), prompt=min(length, cfg.llm.prompt_length))
    for key, shape in shapes.items():
        if key not in batch or tuple(batch[key].shape) != shape:
            got = tuple(batch[key].shape) if key in batch else "nothing"
            raise ValueError(f"batch[{key!r}]: got {got}, expected {shape}")
    for key, low in (("images", 0), ("actions", -1)):
        if not (batch[key].min() >= low and batch[key].max() <= 1):
            raise ValueError(
                f"batch[{key!r}]: values {batch[key].min()}..{batch[key].max()}, expected {low}..1"
            )


# --- Frames and their order ---


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
    InputError when the folder has neither or its pack is of the other kind.
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


if __name__ == "__main__":
    with user_errors():
        tyro.extras.subcommand_cli_from_dict({"pack": pack, "verify": verify, "download": download})
