"""Is a checkpoint sound: the data's robot, inputs that change its output, right held-out tokens?

    print(*acting("RUN/stage2", "PACK"), sep="\\n")

The checkpoint is loaded, as the robot loads it, and reads as many frames as ACTING allows.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from config import TrainConfig, quoted
from data import Frames, make_batch, open_data
from model import actions_to_bins
from policy import Policy
from storage import checkpoint
from storage.h5 import Index
from storage.tokenizer import tokenize
from training.checks import PIP, ROOT, Finding, brief
from training.validation import action_accuracy

ACTING = 60.0  # seconds for all checks of a checkpoint
HELD_OUT = 256  # held-out frames, and held-out episodes, at most
EQUAL = 1e-5  # logits that differ by less, relative to the largest, differ by rounding only
RARE = 3  # where the data have so few tokens in a dimension, a policy may use one
CLIPPED = 0.1  # of a dimension's actions may lie outside; percentiles leave 0.02 of training's


def acting(
    path: str | Path, data: str | Path, device: str | None = None, seconds: float = ACTING
) -> list[Finding]:
    """--checkpoint on --data: names, statistics, sensitivity to each input, held-out tokens."""
    deadline = time.monotonic() + seconds
    try:
        policy = Policy.from_checkpoint(path, device)
        cfg, of = policy.model.cfg, {"val_episodes": TrainConfig.val_episodes}
        of |= policy.manifest["config"]
        only = of.get("tasks", ()), of.get("subtasks", ())
        # The frames of its training: a pack has its own end, raw files are cut as they were then.
        cut = policy.manifest.get("data", {}).get("truncated_at_success")
        cut = None if (Path(data) / "pack.json").is_file() else cut
        frames = Frames(open_data(data, cut), of["val_episodes"], False, cfg.history, *only)
        known = policy.manifest["instructions"]
        texts = [*frames.source.instructions, known[0], known[-1]]
        prompts = tokenize(texts, policy.tokenizer, cfg.llm)
        prompts = tuple(each.to(policy.device) for each in prompts)
        batcher = partial(make_batch, stats=policy.stats, prompts=prompts, cfg=cfg)
        on_gpu = policy.device.type == "cuda"
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=on_gpu):
            return [
                *name_findings(policy.manifest, frames.source),
                *statistics_findings(policy, frames),
                *sight_findings(policy, frames, batcher, deadline),
                *accuracy_findings(policy, frames, batcher, deadline),
            ]
    except ValueError as error:  # tokenize has a ValueError of its own
        mend = f"python -m tools.doctor --for train --data {quoted(data)}"
        return [Finding("missing", "acting", brief(error), "a checkpoint and its data", mend)]


def name_findings(manifest: dict, data: Index) -> list[Finding]:
    """Do checkpoint and data name the same actions and joints, slot by slot?"""
    found = []
    for key in ("action_schema", "qpos_names"):
        trained, here = manifest[key], getattr(data, key)
        if None in (trained, here):  # MS-HAB's released files name neither
            got = f"not named by the {'checkpoint' if trained is None else 'data'}, not compared"
            found.append(Finding("ok", key, got))
        elif wrong := checkpoint.differences(*(dict(enumerate(each)) for each in (here, trained))):
            slots = "; slot ".join([*wrong.values()][:3])
            got = f"data (here) and checkpoint (there) differ: slot {slots}"
            mend = "python collect.py  # demonstrations of the checkpoint's robot"
            found.append(Finding("missing", key, got, "the same in both", mend))
        else:
            found.append(Finding("ok", key, f"{len(here)} slots, the same in data and checkpoint"))
    return found


def statistics_findings(policy: Policy, frames: Frames) -> list[Finding]:
    """Has each dimension a width, and do the held-out actions lie in it?"""
    actions = frames.source.actions_of(frames.episode_ids[:HELD_OUT])  # [n, 13]
    low, high = np.array(policy.stats.low), np.array(policy.stats.high)
    outside = ((actions < low - 1e-6) | (actions > high + 1e-6)).mean(0)  # [13]
    wide, constant = np.isfinite(high - low) & (high > low), (high == low) & (outside == 0)
    schema = policy.manifest["action_schema"] or [{"name": ""}] * len(low)
    mend = f"python train.py --stage 1 --data {quoted(frames.source.folder)} --out RUN/stage1"
    found = []
    for slot in np.flatnonzero(~constant & (~wide | (outside > CLIPPED))):
        got = f"slot {slot} {schema[slot]['name']}: {low[slot]:.3g} to {high[slot]:.3g}, "
        got += f"{outside[slot]:.0%} of {len(actions)} held-out actions outside"
        state, expected = "missing", "a width, as the data have"
        if wide[slot]:
            state, expected = "warn", f"at most {CLIPPED:.0%}, which are clipped"
        found.append(Finding(state, "action_stats", got, expected, mend))
    got = f"{len(actions)} held-out actions, at most {outside.max():.1%} clipped in a dimension; "
    got += f"{constant.sum()} dimensions are constant"
    return found or [Finding("ok", "action_stats", got)]


def too_slow(what: str) -> Finding:
    got, mend = f"{what}: not looked at, the time is over", "the same command with --device cuda"
    return Finding("warn", "acting", got, "a GPU, or more cores of the CPU", mend)


def sight_findings(
    policy: Policy, frames: Frames, batcher: partial, deadline: float
) -> list[Finding]:
    """Do pictures, depth and instruction change the logits of the action tokens?"""
    raw, known = frames[np.array([0])], policy.manifest["instructions"]
    *_, one, other = range(len(batcher.keywords["prompts"][0]))
    same = torch.ones_like(raw["instruction"])
    raw |= {"rgb": raw["rgb"] * 0, "depth": raw["depth"] * 0 + 500, "instruction": same * one}
    changes = {"black and white pictures": {"rgb": raw["rgb"] + 255}}
    if policy.model.cfg.depth:
        changes["depths of 0.5 and 2 m"] = {"depth": raw["depth"] * 4}
    if known[0] != known[-1]:
        changes["two instructions"] = {"instruction": same * other}
    logits, _ = policy.model.teacher_forced(batcher(raw))
    found = []
    for what, change in changes.items():
        if found and time.monotonic() > deadline:
            found.append(too_slow(what))
            continue
        changed, _ = policy.model.teacher_forced(batcher(raw | change))
        differ, largest = (x.abs().max().item() for x in (changed - logits, logits))
        if differ > EQUAL * largest:
            got = f"{what}: logits up to {largest:.2g} differ by up to {differ:.2g}"
            found.append(Finding("ok", "acting", got))
            continue
        expected = "different ones: a library may ignore the pictures (openvla issue 346)"
        mend = f"{PIP} -r {quoted(ROOT / 'requirements.txt')}"
        found.append(Finding("missing", "acting", f"{what}: equal logits", expected, mend))
    if known[0] == known[-1]:
        got = f"no second instruction to compare: the checkpoint knows {known[0]!r} alone"
        found.append(Finding("ok", "acting", got))
    return found


def accuracy_findings(
    policy: Policy, frames: Frames, batcher: partial, deadline: float
) -> list[Finding]:
    """The share of held-out action tokens that are right, on the frames that there is time for."""
    if time.monotonic() > deadline:
        return [too_slow("held-out frames")]
    rows, began = np.random.default_rng(0).permutation(len(frames))[:HELD_OUT], time.monotonic()
    bins, true, each, count = [], [], 0.0, 1
    while len(true) < len(rows) and (not true or time.monotonic() + count * each < deadline):
        batch = batcher(frames[rows[len(true) : len(true) + count]])
        bins += policy.model.teacher_forced(batch)[0].argmax(-1).cpu()
        true += actions_to_bins(batch["actions"][:, 0], policy.model.cfg.bins).cpu()
        each, count = (time.monotonic() - began) / len(true), min(16, 2 * count)
    found = [token_finding(policy, torch.stack(bins), torch.stack(true))]
    figure = action_accuracy(
        {"bins": torch.stack(bins), "true_bins": torch.stack(true)}, policy.stats
    )
    got = f"{figure['ours']:.3f} of the tokens right on {len(true)} of {len(frames)} held-out "
    got += f"frames, {each:.2g} s each"
    better = f"above the best constant's {figure['trivial']:.3f}"
    if figure["ours"] > figure["trivial"]:
        return [*found, Finding("ok", "accuracy", f"{got}, {better}")]
    mend = f"python train.py --stage {policy.manifest['stage']} --data DATA  # its data, longer"
    return [*found, Finding("warn", "accuracy", got, better, mend)]


def token_finding(policy: Policy, bins: torch.Tensor, true: torch.Tensor) -> Finding:
    """How many different tokens each action dimension has, predicted and recorded [n, 13]."""
    schema = policy.manifest["action_schema"] or [{"name": f"action {i}"} for i in range(13)]
    used = [(len(p.unique()), len(t.unique())) for p, t in zip(bins.T, true.T)]
    texts = [f"{slot['name']} {p} of {t}" for slot, (p, t) in zip(schema, used)]
    got = f"different tokens, predicted of recorded: {', '.join(texts)}"
    if all(p > 1 or t <= RARE for p, t in used):
        return Finding("ok", "tokens", got)
    expected = "more than one where the data have many: longer training, or --action-bounds"
    return Finding("warn", "tokens", got, expected)
