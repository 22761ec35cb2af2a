"""Check a checkpoint: does it load, and does its policy act as the data do?

print(check_policy("RUN/stage2", "PACK"))
"""

import time
from pathlib import Path

import numpy as np
import torch

from config import InputError, TrainConfig, quoted
from data import Frames, make_batch
from model import actions_to_bins
from policy import Policy
from storage.h5 import Index
from storage.pack import open_data
from storage.tokenizer import tokenize
from training.start import differences

SECONDS = 60.0  # for held-out frames
HELD_OUT = 256  # held-out frames, and held-out episodes, at most
EQUAL = 1e-5  # logits that differ by less, relative to the largest, differ by rounding only
RARE = 3  # with so few recorded tokens in a dimension, a policy may use one
CLIPPED = 0.1  # of a dimension's actions may lie outside; percentiles leave 0.02 of training's


def check_policy(
    path: str | Path, data: str | Path | None = None, device: str | None = None
) -> str:
    """Load a checkpoint as the robot does; compare it with data, if given.

    With data: names of actions and joints, statistics, sensitivity to each input, held-out tokens.
    """
    policy = Policy.from_checkpoint(path, device)  # verifies every sha256
    manifest, cfg = policy.manifest, policy.model.cfg
    lines = [f"{path}: stage {manifest['stage']}, step {manifest['step']}; it loads"]
    if data is None:
        return lines[0]
    trained = {"val_episodes": TrainConfig.val_episodes, "tasks": (), "subtasks": ()}
    trained |= manifest["config"]
    # Raw files end where they ended in training; a pack has its own ends.
    cut = manifest.get("data", {}).get("truncated_at_success")
    source = open_data(data, None if (Path(data) / "pack.json").is_file() else cut)
    only = trained["tasks"], trained["subtasks"]
    frames = Frames(source, trained["val_episodes"], False, cfg.history, *only)
    known = manifest["instructions"]
    prompts = tokenize([*source.instructions, known[0], known[-1]], policy.tokenizer, cfg.llm)
    prompts = tuple(each.to(policy.device) for each in prompts)

    def predict(raw: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the 13 tokens [B, 13, bins] and the recorded tokens [B, 13]."""
        batch = make_batch(raw, policy.stats, prompts, cfg)
        logits = policy.model.teacher_forced(batch)[0].cpu()
        return logits, actions_to_bins(batch["actions"][:, 0]).cpu()

    on_gpu = policy.device.type == "cuda"
    with torch.no_grad(), torch.autocast(policy.device.type, torch.bfloat16, enabled=on_gpu):
        lines += compare_names(manifest, source)
        lines += compare_statistics(policy, frames)
        lines += compare_inputs(predict, frames, known, cfg.depth, len(source.instructions))
        lines += compare_tokens(predict, frames, manifest)
    return "\n".join(lines)


def compare_names(manifest: dict, data: Index) -> list[str]:
    """Compare the names of actions and joints, slot by slot."""
    lines = []
    for key in ("action_schema", "qpos_names"):
        trained, here = manifest[key], getattr(data, key)
        if None in (trained, here):  # MS-HAB's released files name neither
            lines.append(f"{key}: not named by the {'data' if trained else 'checkpoint'}")
        elif wrong := differences(*(dict(enumerate(each)) for each in (here, trained))):
            raise InputError(
                f"{key}: data (here) and checkpoint (there) differ: slot "
                f"{'; slot '.join([*wrong.values()][:3])}. Record with the checkpoint's robot"
            )
        else:
            lines.append(f"{key}: {len(here)} equal slots")
    return lines


def compare_statistics(policy: Policy, frames: Frames) -> list[str]:
    """Check that each dimension has a width, and that the held-out actions lie within it."""
    actions = frames.source.actions_of(frames.episode_ids[:HELD_OUT])  # [n, 13]
    low, high = np.array(policy.stats.low), np.array(policy.stats.high)
    outside = ((actions < low - 1e-6) | (actions > high + 1e-6)).mean(0)  # [13]
    wide, constant = np.isfinite(high - low) & (high > low), (high == low) & (outside == 0)
    schema = policy.manifest["action_schema"] or [{"name": ""}] * len(low)
    lines = [f"action statistics: at most {outside.max():.1%} clipped in a dimension"]
    for slot in np.flatnonzero(~constant & (~wide | (outside > CLIPPED))):
        text = f"slot {slot} {schema[slot]['name']}: {low[slot]:.3g} to {high[slot]:.3g}, "
        text += f"{outside[slot]:.0%} of {len(actions)} held-out actions outside"
        if not wide[slot]:
            preset = policy.manifest["config"].get("preset", "paper")
            raise InputError(
                f"{text}; expected a width. Train again: python train.py --preset {preset} "
                f"--stage 1 --data {quoted(frames.source.folder)} --out RUN/stage1"
            )
        lines.append(f"warning: {text}; expected at most {CLIPPED:.0%}, which are clipped")
    return lines


def compare_inputs(predict, frames: Frames, known: list[str], depth: bool, first: int) -> list[str]:
    """Check that images, depth and instruction change the logits of the action tokens.

    `first`, `first + 1`: the prompts of the checkpoint's first and last instruction.
    """
    raw = frames[np.array([0])]
    same = torch.ones_like(raw["instruction"])
    raw |= {"rgb": raw["rgb"] * 0, "depth": raw["depth"] * 0 + 500, "instruction": same * first}
    changes = {"black and white images": {"rgb": raw["rgb"] + 255}}
    if depth:
        changes["depths of 0.5 and 2 m"] = {"depth": raw["depth"] * 4}
    if known[0] != known[-1]:
        changes["two instructions"] = {"instruction": same * (first + 1)}
    logits, _ = predict(raw)
    for name, change in changes.items():
        differ = (predict(raw | change)[0] - logits).abs().max().item()
        if differ <= EQUAL * logits.abs().max().item():
            raise InputError(
                f"{name}: equal logits, expected different ones. A library may ignore the input "
                "(openvla issue 346): pip install -r requirements.txt"
            )
    lines = [f"{', '.join(changes)}: each changes the logits"]
    return lines + [f"one instruction alone: {known[0]!r}"] * (known[0] == known[-1])


def compare_tokens(predict, frames: Frames, manifest: dict) -> list[str]:
    """Compare held-out action tokens with the best constant's, as many as SECONDS allow."""
    rows = np.random.default_rng(0).permutation(len(frames))[:HELD_OUT]
    bins, true, deadline = [], [], time.monotonic() + SECONDS
    while len(true) < len(rows) and (not true or time.monotonic() < deadline):
        logits, recorded = predict(frames[rows[len(true) : len(true) + 8]])
        bins, true = [*bins, *logits.argmax(-1)], [*true, *recorded]
    bins, true = torch.stack(bins), torch.stack(true)  # [n, 13]
    accuracy = (bins == true).float().mean().item()
    constant = (true.mode(dim=0).values == true).float().mean().item()
    names = [slot["name"] for slot in manifest["action_schema"] or ({"name": "action"},) * 13]
    used = [(len(p.unique()), len(t.unique())) for p, t in zip(bins.T, true.T)]
    texts = ", ".join(f"{name} {p} of {t}" for name, (p, t) in zip(names, used))
    lines = [
        f"{accuracy:.3f} of the tokens right on {len(true)} of {len(frames)} held-out frames, the "
        f"best constant's {constant:.3f}",
        f"different tokens, predicted of recorded: {texts}",
    ]
    if accuracy <= constant or any(p == 1 and t > RARE for p, t in used):
        lines.append("warning: the policy does not know these data: train longer, on them")
    return lines
