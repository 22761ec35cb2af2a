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

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

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
    LLMConfig,
    ModelConfig,
    explained,
    quoted,
)  # fmt: skip
from download import download, reachable
from pack import pack, verify
from tasks import ARTICULATIONS, OBJECTS, SUBTASKS, instruction
from trajectory import RECORD

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


# --- Instructions ---


def build_tokenizer(cfg: LLMConfig) -> Tokenizer:
    """The LLM's tokenizer: from a folder, or from the hub or its cache.

    "words" makes one from the words of the prompt and of every instruction, without download.
    Raises InputError when it is not to be had or is not this LLM's.
    """
    if cfg.tokenizer != "words":
        file = Path(cfg.tokenizer) / "tokenizer.json"
        mend = (
            f"Where there is a network: {quoted('hf', 'download', cfg.tokenizer, file.name)} "
            "--local-dir FOLDER; then give --model.llm.tokenizer FOLDER"
        )
        with reachable(cfg.tokenizer, mend):
            found = file if file.is_file() else hf_hub_download(cfg.tokenizer, file.name)
        tokenizer = Tokenizer.from_file(str(found))
    else:
        names = {name for objects in OBJECTS.values() for name in objects} | set(ARTICULATIONS)
        texts = [instruction(subtask, name) for subtask in SUBTASKS for name in names]
        split = pre_tokenizers.Whitespace()
        text = " ".join([cfg.prompt.format(""), *texts]).lower()
        words = sorted({word for word, _ in split.pre_tokenize_str(text)})
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = split
    check_tokenizer(tokenizer, cfg, cfg.tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, cfg: LLMConfig, source: object) -> None:
    """Raise InputError, naming what was found, unless action ids and prompt fit the tokenizer.

    The action ids follow all its tokens (Qwen2.5), begin at <|extra_0|> (Prismatic's Qwen) or are
    the last of its own vocabulary (Llama), as in Prismatic's ActionTokenizer; those of "words" lie
    anywhere above its tokens. A special token of the prompt is one id; the prompt ends in a space.
    """
    size, own = tokenizer.get_vocab_size(), tokenizer.get_vocab_size(with_added_tokens=False)
    first, extra = cfg.first_action_id, tokenizer.token_to_id("<|extra_0|>")
    special, found = re.findall(r"<\|.*?\|>", cfg.prompt), []
    if cfg.tokenizer == "words":
        special, fits = [], first >= size
    elif extra is None:
        fits = first in (size, own - ModelConfig.bins)
    else:
        fits = first == extra
    if not fits:
        place = "" if extra is None else f", <|extra_0|> is {extra}"
        found = [f"{size} tokens, {own} of them its own{place}; the action ids begin at {first}"]
    found += [f"no token {name}" for name in special if tokenizer.token_to_id(name) is None]
    ends = {id: tokenizer.id_to_token(id) for id in cfg.prompt_end}
    found += [f"{id} is {token!r}, no lone space" for id, token in ends.items() if token != "▁"]
    if found:
        raise InputError(
            f"{source}: the tokenizer of another model: {'; '.join(dict.fromkeys(found))}. Give "
            "the LLM's own, --model.llm.tokenizer HUB-NAME or FOLDER"
        )


def tokenize(
    instructions: list[str], tokenizer: Tokenizer, cfg: LLMConfig
) -> tuple[Tensor, Tensor]:
    """Prompts of one length, the longest's: ids and mask [n, L].

    Padding stands between the first token and the rest, where the images go, so that every prompt
    ends at the latents.
    """
    # Llama's tokenizer begins with its <s>; Qwen's adds nothing.
    prompts = [cfg.prompt.format(text.lower()) for text in instructions]
    prompts = [prompt.lower() if cfg.tokenizer == "words" else prompt for prompt in prompts]
    tokens = [[*tokenizer.encode(prompt).ids, *cfg.prompt_end] for prompt in prompts]
    longest, text = max((len(prompt), text) for prompt, text in zip(tokens, instructions))
    if longest > cfg.prompt_length:
        raise ValueError(
            f"{text!r} needs {longest} tokens; raise llm.prompt_length above {cfg.prompt_length}"
        )
    ids = torch.zeros(len(tokens), longest, dtype=torch.long)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for row, (first, *rest) in enumerate(tokens):
        begin = longest - len(rest)
        ids[row, 0], mask[row, 0] = first, True
        ids[row, begin:], mask[row, begin:] = torch.tensor(rest), True
    return ids, mask


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


if __name__ == "__main__":
    with explained():
        tyro.extras.subcommand_cli_from_dict({"pack": pack, "verify": verify, "download": download})
