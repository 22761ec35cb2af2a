"""Demonstrations and weights, looked at without reading all of them.

    require(demonstrations("DATA"), checkpoint_weights("RUN/stage1"))

Of demonstrations and packs as much is read as SECONDS allow, of weights the headers only; a finding
says how much that was. A checkpoint beside its data is loaded, and acts for up to a minute.
"""

import random
import sys
import time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import checkpoint
import pretrained
from config import LABELS, PRESETS, InputError, TrainConfig, model_config, quoted
from data import Batcher, build_tokenizer, check_tokenizer, tokenize
from demonstrations import Demonstrations, h5_files, label_command, load_sidecar
from durable import mend_of
from model import VLM, AuxVLA, actions_to_bins
from pack import Pack
from policy import Policy
from samples import Frames, open_data
from tools.checks import ROOT, Finding, brief, size
from trajectory import DataError
from validation import action_accuracy
from weight_files import DINO_HUB, LAST_STEPS, QWEN_HUB, SIGLIP_HUB, fetching

SECONDS = 4.0  # for samples of demonstrations or a pack
HASHED = 2e9  # bytes of a checkpoint, up to which it is compared with its sha256
ACTING = 60.0  # seconds in which a checkpoint is looked at beside its data
HELD_OUT = 256  # its frames, and episodes, at most
EQUAL = 1e-5  # of the largest logit: what fp32 rounds
CLIPPED = 0.1  # share of a dimension's actions outside the statistics: 0.02 in training

WITH_OBJECT = ("pick", "place")  # the others move a part of the furniture (GAP-8)

# --- Demonstrations ---


def demonstrations(folder: str | Path, seconds: float = SECONDS) -> list[Finding]:
    """--data: a pack, or MS-HAB's files."""
    folder = Path(folder)
    if (folder / "pack.json").is_file() or list(folder.glob("frames-*.bin")):
        return pack_findings(folder, seconds)
    files = h5_files(folder)
    if not files:
        names = [path.name for path in folder.parent.glob("*/") if path.name != folder.name]
        near = [
            folder.with_name(name) for name in get_close_matches(folder.name, names, cutoff=0.5)
        ]
        near = [path for path in near if h5_files(path)]
        mend = (
            f"--data {quoted(near[0])}"
            if near
            else (f"python data.py download --out {quoted(folder)}")
        )
        got = f"{folder}: {'no .h5 below it' if folder.is_dir() else 'not there'}"
        return [Finding("missing", "--data", got, "<task>/<subtask>/<target>.h5 and .json", mend)]
    found = []
    for path in files:
        try:
            load_sidecar(path)
        except (DataError, OSError) as error:
            found.append(unreadable(path.with_suffix(".json"), error))
    if found:
        return found
    try:
        demos = Demonstrations(folder)
    except InputError as error:
        return [misplaced(folder, error)]
    return read_samples(demos, time.monotonic() + seconds)


def read_samples(demos: Demonstrations, deadline: float) -> list[Finding]:
    """The end of each file's first and last episode, until the deadline; which labels they have."""
    last_of = {episode.file: row for row, episode in enumerate(demos.episodes)}
    first_of = {episode.file: row for row, episode in reversed([*enumerate(demos.episodes)])}
    found, lacking, read = [], {}, 0
    for file in random.sample(sorted(last_of), len(last_of)):
        if time.monotonic() > deadline:
            break
        read += 1
        try:
            ends = [demos.starts[row[file] + 1] - 1 for row in (first_of, last_of)]
            has = demos.read(ends)["has"].max(0)  # [labels]
        except InputError as error:
            found.append(unreadable(demos.folder / file, error))
            continue
        for label, there in zip(LABELS, has):
            if not there and (label != "obj" or Path(file).parent.name in WITH_OBJECT):
                lacking.setdefault(label, []).append(file)
    total = sum((demos.folder / file).stat().st_size for file in last_of)
    got = f"{len(last_of)} files, {size(total)}, {len(demos):,} frames; read in {read} files"
    return [Finding("ok" if not found else "warn", "--data", got), *found] + [
        Finding(
            "warn", "labels", f"no {label} in {len(files)} of {read} files: {files[0]}",
            f"labels for the {label} decoder, which learns nothing from these files",
            label_command(files[0], f"{demos.folder}-labelled"),
        )
        for label, files in lacking.items()
    ]  # fmt: skip


def misplaced(folder: Path, error: InputError) -> Finding:
    """A file that may be whole, and is not to be lost: it does not fit those it lies beside."""
    pair, aside = error.file.with_suffix(""), f"{folder}-aside"
    mend = f"mkdir -p {quoted(aside)} && mv {quoted(f'{pair}.h5', f'{pair}.json', f'{aside}/')}"
    return Finding("missing", "--data", brief(error), "files of one robot in MS-HAB's tree", mend)


def unreadable(path: Path, error: Exception) -> Finding:
    """A file that is damaged, or that the system kept from us though it may be whole."""
    *out, task, subtask, _ = ("", "", *path.absolute().parts)
    mend = mend_of(path, error if isinstance(error, OSError) else error.__cause__) or (
        f"{aside(path)}python data.py download --out {quoted(Path(*out))} --tasks {quoted(task)} "
        f"--subtasks {quoted(subtask)} --targets {quoted(path.stem)}  # or collect.py again"
    )
    return Finding("missing", "--data", brief(error), "a whole .h5 and its .json", mend)


def aside(path: Path) -> str:
    """The beginning of a command that makes what is there anew."""
    return f"mv {quoted(path, f'{path}.damaged')} && " if path.exists() else ""


def pack_findings(folder: Path, seconds: float) -> list[Finding]:
    """Sizes of all files; as many as there is time for, in random order, against their sha256."""
    deadline, compared = time.monotonic() + seconds, 0
    try:
        pack = Pack(folder)
        for name in random.sample(sorted(pack.hashes), len(pack.hashes)):
            if compared and time.monotonic() > deadline:
                break
            pack.verify(name)
            compared += 1
    except (InputError, OSError) as error:
        again = f"python data.py pack --data DATA --out {quoted(folder)}"
        if isinstance(error, FileNotFoundError):  # no pack.json: packing was stopped, and goes on
            mend = again
        else:
            mend = mend_of(getattr(error, "filename", folder), error) or f"{aside(folder)}{again}"
        return [Finding("missing", "--data", brief(error), "a whole pack", mend)]
    got = f"{len(pack):,} frames; sha256 of {compared} of {len(pack.hashes)} files compared"
    rest = "" if compared == len(pack.hashes) else f" (all: python data.py verify {quoted(folder)})"
    return [Finding("ok", "--data", got + rest)]


# --- Weights ---


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Every tensor's shape, from the file's header alone; SafetensorError when it is cut off."""
    with safe_open(path, "pt") as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118


def checkpoint_weights(path: str | Path) -> list[Finding]:
    """--checkpoint: manifest, hashes, and the header's keys and shapes against the model."""
    path = Path(path)
    steps = checkpoint.steps_in(path)
    folder = path if (path / "manifest.json").is_file() or not steps else steps[-1]
    older = [step for step in steps or checkpoint.steps_in(path.parent) if step.name < folder.name]
    again = f"mv {quoted(folder, f'{folder}.damaged')}  # then copy it again, or train it again"
    mend = f"--checkpoint {quoted(older[-1])}" if older else again

    def lacking(got: str, expected: str) -> list[Finding]:
        return [Finding("missing", "--checkpoint", got, expected, mend)]

    if not folder.is_dir():
        mend = f"python train.py --stage 1 --data DATA --out {quoted(path)}"
        return lacking(f"{path}: no checkpoint", "RUN/stageN or a step in it")
    total = sum(file.stat().st_size for file in folder.iterdir())
    try:
        manifest = checkpoint.read_manifest(folder, verify=total < HASHED)
        theirs = shapes_in(folder / "model.safetensors")
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        cfg = checkpoint.model_config_of(manifest)
        check_tokenizer(tokenizer, cfg.llm, folder / "tokenizer.json")
    except (InputError, OSError, SafetensorError) as error:
        if isinstance(error, checkpoint.CheckpointError):  # of another format
            mend = "git log --oneline -- checkpoint.py  # one of these versions reads it"
        mend = mend_of(getattr(error, "filename", folder), error) or mend
        return lacking(f"{folder}: {brief(error)}", "a whole checkpoint")
    with torch.device("meta"):
        ours = AuxVLA(cfg, flow_head=manifest["stage"] == 3).state_dict()
    ours = {key: list(value.shape) for key, value in ours.items()}
    if wrong := [*checkpoint.differences(ours, theirs).values()]:
        return lacking(f"{folder}: {len(wrong)} tensors: {'; '.join(wrong[:3])}", "its own model's")
    hashed = "every sha256 compared" if total < HASHED else "sha256 not compared, it is large"
    got = f"{folder}: stage {manifest['stage']}, {len(theirs)} tensors, {size(total)}, {hashed}"
    return [Finding("ok", "--checkpoint", got)]


def pretrained_weights(name: str, preset: str, tokenizer: str | None = None) -> list[Finding]:
    """--pretrained: every key and shape against the preset's model, and its tokenizer."""
    cfg = model_config(preset)
    try:
        with torch.device("meta"):
            vlm = VLM(cfg)
        pretrained.load_pretrained(vlm, pretrained.source_of(name), headers=True)
        found = [Finding("ok", "--pretrained", f"{name}: all keys and shapes of --preset {preset}")]
    except InputError as error:
        hubs = (DINO_HUB, SIGLIP_HUB, QWEN_HUB)
        part = next((hub for hub in hubs if Path(hub).name in brief(error)), None)
        whole = PRESETS[preset].get("pretrained") or TrainConfig.pretrained
        if name in ("hub", whole, *LAST_STEPS):  # those are in the hub's cache
            mend = fetching(part or (whole if name == "hub" else name))
        else:
            folder = Path(name, Path(part).name) if part else Path(name)
            mend = fetching(part or whole, folder)
            if folder.is_dir():  # which may be whole, and another model's
                mend = f"mv {quoted(folder, f'{folder}-aside')} && {mend}"
        expected = f"the weights of --preset {preset}"
        found = [Finding("missing", "--pretrained", brief(error), expected, mend)]
    llm = replace(cfg.llm, tokenizer=tokenizer or cfg.llm.tokenizer)
    try:
        got = f"{llm.tokenizer}: {build_tokenizer(llm).get_vocab_size()} tokens"
        return [*found, Finding("ok", "tokenizer", got)]
    except InputError as error:
        mend = f"{quoted('hf', 'download', cfg.llm.tokenizer)} tokenizer.json --local-dir FOLDER"
        expected = f"tokenizer.json of the LLM of --preset {preset}"
        return [*found, Finding("missing", "tokenizer", brief(error), expected, mend)]


# --- A checkpoint beside its data ---


def acting(
    path: str | Path, data: str | Path, device: str | None = None, seconds: float = ACTING
) -> list[Finding]:
    """--checkpoint on --data: is it of this robot, does it look, is it right on held-out frames?"""
    deadline = time.monotonic() + seconds
    try:
        policy = Policy.from_checkpoint(path, device)
        cfg, of = policy.model.cfg, {"val_episodes": TrainConfig.val_episodes}
        of |= policy.manifest["config"]
        only = of.get("tasks", ()), of.get("subtasks", ())
        frames = Frames(open_data(data), of["val_episodes"], False, cfg.history, *only)
    except (InputError, FileNotFoundError) as error:
        mend = f"python -m tools.doctor --for train --data {quoted(data)}"
        return [Finding("missing", "acting", brief(error), "a checkpoint and its data", mend)]
    known = policy.manifest["instructions"]
    texts = [*frames.source.instructions, known[0], known[-1]]
    batcher = Batcher(cfg, policy.stats, tokenize(texts, policy.tokenizer, cfg.llm))
    on_gpu = policy.device.type == "cuda"
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=on_gpu):
        return [
            *name_findings(policy.manifest, frames.source), *statistics_findings(policy, frames),
            *sight_findings(policy, frames, batcher),
            *accuracy_findings(policy, frames, batcher, deadline),
        ]  # fmt: skip


def name_findings(manifest: dict, data: Demonstrations | Pack) -> list[Finding]:
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
    got = f"{len(actions)} held-out actions, at most {outside.max():.1%} clipped in a dimension"
    return found or [Finding("ok", "action_stats", f"{got}; {constant.sum()} are constant")]


def sight_findings(policy: Policy, frames: Frames, batcher: Batcher) -> list[Finding]:
    """Do pictures, depth and instruction change the logits of the action tokens?"""
    raw, known = frames[np.array([0])], policy.manifest["instructions"]
    *_, one, other = range(len(batcher.prompts[0]))
    same = torch.ones_like(raw["instruction"])
    raw |= {"rgb": raw["rgb"] * 0, "depth": raw["depth"] * 0 + 500, "instruction": same * one}
    changes = {"black and white pictures": {"rgb": raw["rgb"] + 255}}
    if policy.model.cfg.depth:
        changes["depths of 0.5 and 2 m"] = {"depth": raw["depth"] * 4}
    if known[0] != known[-1]:
        changes["two instructions"] = {"instruction": same * other}
    logits, _ = policy.model.teacher_forced(batcher(raw, policy.device))
    found = []
    for what, change in changes.items():
        changed, _ = policy.model.teacher_forced(batcher(raw | change, policy.device))
        differ, largest = ((x.abs().max().item()) for x in (changed - logits, logits))
        if differ > EQUAL * largest:
            got = f"{what}: logits up to {largest:.2g} differ by up to {differ:.2g}"
            found.append(Finding("ok", "acting", got))
            continue
        expected = (
            "others: weights are lost, or a newer library leaves them out (openvla's issue 346)"
        )
        mend = f"{sys.executable} -m pip install -r {quoted(ROOT / 'requirements.txt')}"
        found.append(Finding("missing", "acting", f"{what}: equal logits", expected, mend))
    if known[0] == known[-1]:
        got = f"no second instruction to compare: the checkpoint knows {known[0]!r} alone"
        found.append(Finding("ok", "acting", got))
    return found


def accuracy_findings(
    policy: Policy, frames: Frames, batcher: Batcher, deadline: float
) -> list[Finding]:
    """The share of held-out action tokens that are right, on the frames that there is time for."""
    rows, began = np.random.default_rng(0).permutation(len(frames))[:HELD_OUT], time.monotonic()
    bins, true, each, count = [], [], 0.0, 1
    while len(true) < len(rows) and (not true or time.monotonic() + count * each < deadline):
        batch = batcher(frames[rows[len(true) : len(true) + count]], policy.device)
        bins += policy.model.teacher_forced(batch)[0].argmax(-1).cpu()
        true += actions_to_bins(batch["actions"][:, 0], policy.model.cfg.bins).cpu()
        each, count = (time.monotonic() - began) / len(true), min(16, 2 * count)
    figure = action_accuracy({"bins": torch.stack(bins), "true_bins": torch.stack(true)}, batcher)
    got = f"{figure['ours']:.3f} of the tokens right on {len(true)} of {len(frames)} held-out "
    got += f"frames, {each:.2g} s each"
    better = f"above the best constant's {figure['trivial']:.3f}"
    if figure["ours"] > figure["trivial"]:
        return [Finding("ok", "accuracy", f"{got}, {better}")]
    mend = f"python train.py --stage {policy.manifest['stage']} --data DATA  # its data, longer"
    return [Finding("warn", "accuracy", got, better, mend)]
