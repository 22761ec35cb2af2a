"""Recorded or live frames -> a batch (paper Sec. 3, 4.2).

    python data.py download  # MS-HAB's released demonstrations -> data/; resumable
    python data.py pack      # data/ -> data/pack: memory-mapped records; resumable
    python data.py verify    # every file of data/pack against its sha256

Frames and the policy give raw batches of B frames. The pictures show T time steps: the current
one and, with history "frames", the 4 before it (T = 5, oldest first):

    rgb [B, T, 2, h, w, 3] uint8     head camera, hand camera; depth [B, T, 2, h, w] int16 mm
    instruction [B]                  row of the prompts
    past_actions [B, 4, 13]          history "actions": robot units, oldest first
    past_mask [B, 4]                 0 before the start of the episode

Recorded frames add the other fields of storage.trajectory.RECORD. make_batch turns a raw batch into
the batch, the contract between data and model (L: prompt length, C: cameras, V: views of a step):

    images       [B, T*V, 3, H, W]   in [0, 1]; of each step head rgb, hand rgb, head depth,
                                     hand depth
    past_actions [B, 4, 13]          normalised; past_mask [B, 4]
    prompt_ids   [B, L] int64        first token, padding, the other tokens
    prompt_mask  [B, L] bool         absent where no prompt is padded
    actions      [B, 8, 13]          normalised to [-1, 1] by ActionStats (GAP-23)
    action_mask  [B, 8]              0 past the end of the episode
    pos [B, 2] m, world frame        grasp [B] 0 or 1             qpos [B, 12] rad (prismatic: m)
    obj [B, 7] m, wxyz, base frame   seg [B, C, 128, 128] 0 or 1
    has_pos ... has_seg [B] bool     does the frame have the label?

Live frames give images, past actions and prompts only.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from config import CAMERAS, DEPTH_SCALE_MM, HISTORY, IMAGE_SIZE, LABELS, InputError, ModelConfig
from storage.h5 import Episode, Index
from storage.trajectory import RECORD, remarks

# --- Images ---


def normalize_depth(depth_mm: Tensor) -> Tensor:
    """Depth in whole millimetres -> [0, 1]; near is 1, far is 0 (Eq. 1).

    Depth beyond 32.767 m wraps to negative int16 numbers and counts as infinite.
    GAP-20 (Eq. 1): depth 0 means that the ray hit nothing, yet becomes 1, "touching". We keep Eq. 1
    as it stands, as MS-HAB's own policies do.
    """
    if depth_mm.is_floating_point():
        raise ValueError(f"depth is {depth_mm.dtype}, expected integer millimetres")
    depth = torch.where(depth_mm < 0, torch.inf, depth_mm.float())
    # Eq. 1: p_obs = 1 - tanh(depth / 1000)
    return 1 - torch.tanh(depth / DEPTH_SCALE_MM)


def preprocess(rgb: Tensor, depth_mm: Tensor, cfg: ModelConfig) -> Tensor:
    """Camera pictures -> `images` [B, T*V, 3, H, W] in [0, 1], in training and acting.

    rgb [B, T, 2, h, w, 3] uint8 and depth_mm [B, T, 2, h, w] integer, head camera then hand.
    """
    chosen = [CAMERAS.index(camera) for camera in cfg.cameras]
    views = [resize(rgb[:, :, chosen].float() / 255, cfg.image_size)]
    if cfg.depth:
        # GAP-4 (Sec. 4.2): the paper does not say how depth enters an RGB encoder. We add it as
        # one more picture, repeated to three channels.
        near = rearrange(normalize_depth(depth_mm[:, :, chosen]), "b t v h w -> b t v h w 1")
        views.append(repeat(resize(near, cfg.image_size), "b t v 1 h w -> b t v c h w", c=3))
    return rearrange(torch.cat(views, dim=2), "b t v c h w -> b (t v) c h w")


def resize(images: Tensor, size: int) -> Tensor:
    """[B, T, V, h, w, C] -> [B, T, V, C, size, size], bicubic with antialiasing as PIL's."""
    flat = rearrange(images, "b t v h w c -> (b t v) c h w")
    flat = F.interpolate(flat, (size, size), mode="bicubic", antialias=True, align_corners=False)
    b, t = images.shape[:2]
    return rearrange(flat.clamp(0, 1), "(b t v) c h w -> b t v c h w", b=b, t=t)


def read_cameras(obs: dict) -> tuple[Tensor, Tensor]:
    """MS-HAB's observation -> rgb [B, 2, h, w, 3], depth [B, 2, h, w] int16 mm; head, then hand."""
    sensors = [obs["sensor_data"][f"fetch_{camera}"] for camera in CAMERAS]
    rgb = torch.stack([sensor["rgb"] for sensor in sensors], dim=1)
    depth = torch.stack([sensor["depth"][..., 0] for sensor in sensors], dim=1)
    return rgb, depth


def history_steps(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps t [B] of an episode -> the steps t-4 ... t, and whether each exists, both [B, 5].

    GAP-5: the first step replaces steps before it, in training and acting alike.
    """
    steps = rearrange(step, "b -> b 1") + np.arange(-HISTORY, 1)
    return np.maximum(steps, 0), steps >= 0


# --- Actions ---


@dataclass(frozen=True)
class ActionStats:
    """Per action dimension, the bounds that normalisation maps to -1 and 1 (GAP-23)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def controller(lowest: np.ndarray, highest: np.ndarray) -> "ActionStats":
        """The controller's bounds, -1 and 1, given the data's ranges `lowest`, `highest` [13].

        A constant dimension keeps its value as both bounds: no action token holds it exactly.
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

    def normalize(self, actions: Tensor) -> Tensor:
        """Robot units [..., 13] -> [-1, 1], clipped; a constant dimension becomes 0."""
        low, high = bounds_on(self, actions.device)
        span = high - low
        scaled = 2 * (actions - low) / span.clamp(min=1e-8) - 1
        return torch.where(span > 0, scaled, 0.0).clamp(-1, 1)

    def denormalize(self, actions: Tensor) -> Tensor:
        """[-1, 1] -> robot units; a constant dimension becomes its constant."""
        low, high = bounds_on(self, actions.device)
        return low + (actions + 1) / 2 * (high - low)


@lru_cache(maxsize=8)
def bounds_on(stats: ActionStats, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds [13] on a device."""
    return torch.tensor([stats.low, stats.high], device=device).unbind()


# --- Batch ---


def raw_batch(records: np.ndarray, history: str = "none") -> dict[str, Tensor]:
    """The raw batch of RECORDs [B, T]; with a history T = 5, the current step last."""
    now = records[:, -1]
    raw = {name: now[name] for name in RECORD.names}
    seen = records if history == "frames" else records[:, -1:]
    raw |= {"rgb": seen["rgb"], "depth": seen["depth"]}
    if history == "actions":
        raw["past_actions"] = records["actions"][:, :-1, 0]  # [B, 4, 13]
        raw["past_mask"] = history_steps(now["frame"])[1][:, :-1]  # [B, 4]
    # A loader process can send and pin contiguous copies only.
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in raw.items()}


def make_batch(
    raw: dict[str, Tensor], stats: ActionStats, prompts: tuple[Tensor, ...], cfg: ModelConfig
) -> dict[str, Tensor]:
    """Raw batch -> batch on the device of `prompts`, tokenize's result for all instructions."""
    device = prompts[0].device
    raw = {name: value.to(device, non_blocking=True) for name, value in raw.items()}
    chosen = [CAMERAS.index(camera) for camera in cfg.cameras]
    rows = raw["instruction"].long()
    batch = {"images": preprocess(raw["rgb"], raw["depth"], cfg)}
    batch |= zip(("prompt_ids", "prompt_mask"), (each[rows] for each in prompts))
    if cfg.history == "actions":
        batch["past_actions"] = stats.normalize(raw["past_actions"])
        batch["past_mask"] = raw["past_mask"]
    if "actions" not in raw:  # live frames
        return batch
    batch["actions"] = stats.normalize(raw["actions"])
    batch["action_mask"] = raw["action_mask"].float()
    batch["seg"] = unpack_masks(raw["seg"][:, chosen])
    batch |= {name: raw[name] for name in ("pos", "grasp", "qpos", "obj")}
    return batch | {f"has_{name}": raw["has"][:, i].bool() for i, name in enumerate(LABELS)}


def unpack_masks(bits: Tensor) -> Tensor:
    """One bit per pixel [B, C, 128*128/8] -> [B, C, 128, 128] float 0 or 1."""
    shifts = torch.arange(7, -1, -1, device=bits.device)
    pixels = (rearrange(bits, "b c n -> b c n 1") >> shifts) & 1
    return rearrange(pixels, "b c (h w) bit -> b c h (w bit)", h=IMAGE_SIZE).float()


def batch_shapes(
    cfg: ModelConfig, b: int, noise: bool = False, prompt_length: int | None = None
) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a batch of b frames; `noise` adds noise and times of stage 3.

    `prompt_length` defaults to the longest allowed.
    """
    length = prompt_length or cfg.llm.prompt_length
    shapes = {
        "images": (b, cfg.num_views, 3, cfg.image_size, cfg.image_size),
        "prompt_ids": (b, length), "prompt_mask": (b, length),
        "seg": (b, len(cfg.cameras), IMAGE_SIZE, IMAGE_SIZE),
    }  # fmt: skip
    recorded = ("actions", "action_mask", "pos", "grasp", "qpos", "obj")
    shapes |= {name: (b, *RECORD[name].shape) for name in recorded}
    shapes |= {f"has_{name}": (b,) for name in LABELS}
    if cfg.history == "actions":
        shapes["past_mask"] = (b, HISTORY)
        shapes["past_actions"] = (b, HISTORY, *RECORD["actions"].shape[1:])
    return shapes | ({"noise": shapes["actions"], "t": (b,)} if noise else {})


def check_batch(batch: dict[str, Tensor], cfg: ModelConfig) -> None:
    """Raise ValueError, naming the key, unless shapes and ranges are those of the table above."""
    length = min(batch["prompt_ids"].shape[-1], cfg.llm.prompt_length)
    for key, shape in batch_shapes(cfg, len(batch["images"]), prompt_length=length).items():
        got = tuple(batch[key].shape) if key in batch else "nothing"
        if got != shape and (key, got) != ("prompt_mask", "nothing"):
            raise ValueError(f"batch[{key!r}]: got {got}, expected {shape}")
    for key, lowest in (("images", 0), ("actions", -1)):
        low, high = (x.item() for x in batch[key].aminmax())
        if not lowest <= low <= high <= 1:
            raise ValueError(f"batch[{key!r}]: values {low}..{high}, expected {lowest}..1")


# --- Frames ---


class Frames(Dataset):
    """Training or held-out frames; item [i, j, ...] is the raw batch of those frames."""

    def __init__(
        self, source: Index, held_out: float, train: bool,
        history: str = "none", tasks: tuple[str, ...] = (), subtasks: tuple[str, ...] = (),
    ):  # fmt: skip
        """Hold out the last share `held_out` of every file's episodes: at least one, never all.

        `tasks` and `subtasks` select files <task>/<subtask>/<target>.h5; empty: all. Raises
        InputError if they select none.
        """
        self.source, self.history = source, history
        wanted = [
            (not tasks or e.task in tasks) and (not subtasks or e.subtask in subtasks)
            for e in source.episodes
        ]
        if not any(wanted):
            which = " / ".join(" or ".join(each) for each in (tasks, subtasks) if each)
            files = ", ".join(sorted({e.file for e in source.episodes}))
            raise InputError(f"{source.folder}: no demonstrations of {which}; it has {files}")
        keep = np.array(wanted) & (last_episodes(source.episodes, held_out) != train)
        self.episode_ids = np.flatnonzero(keep)
        # int32: the index of the paper's 8 million frames takes 32 MB.
        self.frames = np.flatnonzero(np.repeat(keep, np.diff(source.starts))).astype(np.int32)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def instructions(self) -> list[str]:
        """The sentences of these episodes; other episodes of the source may have others."""
        used = {self.source.episodes[e].instruction for e in self.episode_ids}
        return [text for row, text in enumerate(self.source.instructions) if row in used]

    @property
    def blocks(self) -> np.ndarray | None:
        """The block of each frame (storage/h5.py); None in a pack."""
        starts = self.source.blocks
        return None if starts is None else np.searchsorted(starts, self.frames, side="right") - 1

    def __getitem__(self, rows: np.ndarray) -> dict[str, Tensor]:
        frames = rearrange(self.frames[rows], "b -> b 1")
        if self.history != "none":
            _, step = self.source.place(self.frames[rows])  # [B]
            frames = frames + history_steps(step)[0] - rearrange(step, "b -> b 1")  # [B, 5]
        records = self.source.read(rearrange(frames, "b t -> (b t)"))
        return raw_batch(rearrange(records, "(b t) -> b t", b=len(frames)), self.history)

    @cached_property
    def survey(self) -> np.ndarray:
        """Labels and ranges of these episodes, [n] of SURVEY."""
        return self.source.survey(self.episode_ids)

    @property
    def remarks(self) -> list[str]:
        """Sentences about skipped trajectories and oddities in these demonstrations."""
        files = [self.source.episodes[e].file for e in self.episode_ids]
        every = [episode.file for episode in self.source.episodes]
        single = (file for file in dict.fromkeys(files) if every.count(file) == 1)
        alone = [f"{file}: one episode, none is held out" for file in single]
        return [*self.source.notes, *alone, *remarks(self.survey, files)]

    def stats(self, bounds: str) -> ActionStats:
        """Action bounds: "controller" or "percentiles" of these episodes."""
        if bounds == "percentiles":
            return ActionStats.percentiles(self.source.actions_of(self.episode_ids))
        actions = self.survey["actions"]  # [n, 2, 13]
        return ActionStats.controller(actions[:, 0].min(0), actions[:, 1].max(0))

    def names(self, rows: np.ndarray) -> list[str]:
        """File, trajectory and frame of each row."""
        episodes, steps = self.source.place(self.frames[rows])
        entries = [self.source.episodes[e] for e in episodes]
        return [f"{e.file} {e.trajectory} frame {step}" for e, step in zip(entries, steps)]


def last_episodes(episodes: list[Episode], share: float) -> np.ndarray:
    """Whether each episode [n] is held out: the last `share` of its file, at least one, not all."""
    files = np.array([episode.file for episode in episodes])
    out = np.zeros(len(files), bool)
    for file in np.unique(files):
        rows = np.flatnonzero(files == file)
        number = min(len(rows) - 1, max(1, round(share * len(rows))))
        out[rows[len(rows) - number :]] = True
    return out


if __name__ == "__main__":
    from storage.download import download
    from storage.pack import pack, verify
    from storage.terminal import cli, user_errors

    with user_errors():
        cli({"pack": pack, "verify": verify, "download": download})
