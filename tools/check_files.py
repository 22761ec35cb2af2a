"""Demonstrations and weights, looked at without reading all of them.

    require(demonstrations("DATA"), checkpoint_weights("RUN/stage1"))

Of demonstrations and packs as much is read as SECONDS allow, of weights the headers only; a finding
says how much that was.
"""

import random
import time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from config import LABELS, PRESETS, InputError, TrainConfig, model_config, quoted
from model import VLM, AuxVLA
from storage import checkpoint, pretrained
from storage.files import mend_of, sha256
from storage.h5 import (
    Demonstrations,
    h5_files,
    label_command,
    load_sidecar,
    task_and_subtask,
)  # fmt: skip
from storage.pack import Pack, damaged
from storage.pretrained import HUB, LAST_STEPS, download_command
from storage.tokenizer import build_tokenizer, check_tokenizer
from storage.trajectory import DataError, remarks
from training.checks import Finding, brief, size

SECONDS = 4.0  # for samples of demonstrations or a pack
HASHED = 2e9  # bytes of a checkpoint, up to which it is compared with its sha256
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
        close = map(folder.with_name, get_close_matches(folder.name, names, cutoff=0.5))
        near = next((f"--data {quoted(path)}" for path in close if h5_files(path)), None)
        mend = near or f"python data.py download --out {quoted(folder)}"
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
    """Labels and remarks of each file's first and last episode, until the deadline."""
    last_of = {episode.file: row for row, episode in enumerate(demos.episodes)}
    first_of = {episode.file: row for row, episode in reversed([*enumerate(demos.episodes)])}
    found, notes, lacking, read = [], [], {}, 0
    for file in random.sample(sorted(last_of), len(last_of)):
        if time.monotonic() > deadline:
            break
        read += 1
        try:
            rows = [first_of[file], last_of[file]]
            has = demos.read(demos.starts[np.array(rows) + 1] - 1)["has"].max(0)  # [labels]
            notes += [n for n in remarks(demos.survey(rows), [file, file]) if n.startswith(file)]
        except InputError as error:
            found.append(unreadable(demos.folder / file, error))
            continue
        for label, there in zip(LABELS, has):
            if not there and (label != "obj" or Path(file).parent.name in WITH_OBJECT):
                lacking.setdefault(label, []).append(file)
    total = sum((demos.folder / file).stat().st_size for file in last_of)
    got = f"{len(last_of)} files, {size(total)}, {len(demos):,} frames; read in {read} files"
    found = [Finding("ok" if not found else "warn", "--data", got), *found]
    return found + [Finding("warn", "--data", note) for note in notes] + [
        Finding(
            "warn", "labels", f"no {label} in {len(files)} of {read} files: {files[0]}",
            f"labels for the {label} decoder, which learns nothing from these files",
            label_command(demos.episodes[last_of[files[0]]], demos.folder),
        )
        for label, files in lacking.items()
    ]  # fmt: skip


def misplaced(folder: Path, error: InputError) -> Finding:
    """A file that does not fit those beside it. It may be whole, so it is moved aside."""
    pair, other = Path(str(error).partition(".h5")[0].partition(".json")[0]), f"{folder}-aside"
    mend = f"mkdir -p {quoted(other)} && mv {quoted(f'{pair}.h5', f'{pair}.json', f'{other}/')}"
    return Finding("missing", "--data", brief(error), "files of one robot in MS-HAB's tree", mend)


def unreadable(path: Path, error: Exception) -> Finding:
    """A file that is damaged, or whole and not readable (permissions, locks)."""
    *out, task, subtask, _ = ("", "", *path.absolute().parts)
    task = task_and_subtask(path)[0] or task  # of the hub's name
    mend = mend_of(path, error if isinstance(error, OSError) else error.__cause__) or (
        f"{aside(path)}python data.py download --out {quoted(Path(*out))} --tasks {quoted(task)} "
        f"--subtasks {quoted(subtask)} --targets {quoted(path.stem)}  # or collect.py again"
    )
    return Finding("missing", "--data", brief(error), "a whole .h5 and its .json", mend)


def aside(path: Path) -> str:
    """What goes before a command that makes a file anew: the old one is moved aside."""
    return f"mv {quoted(path, f'{path}.damaged')} && " if path.exists() else ""


def pack_findings(folder: Path, seconds: float) -> list[Finding]:
    """Sizes of all files; as many as there is time for, in random order, against their sha256."""
    deadline, compared = time.monotonic() + seconds, 0
    try:
        pack = Pack(folder)
        for name in random.sample(sorted(pack.hashes), len(pack.hashes)):
            if compared and time.monotonic() > deadline:
                break
            if sha256(folder / name) != pack.hashes[name]:
                raise damaged(folder, f"{folder / name}: its sha256 differs")
            compared += 1
    except (InputError, OSError) as error:
        again = f"python data.py pack --data DATA --out {quoted(folder)}"
        mend = mend_of(getattr(error, "filename", folder), error) or f"{aside(folder)}{again}"
        if not (folder / "pack.json").is_file():  # no pack.json: packing was stopped, and goes on
            mend = again
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
        moments = (folder / checkpoint.MOMENTS).is_file()  # left out of what is shared
        manifest = checkpoint.read_manifest(folder, total < HASHED, moments)
        theirs = shapes_in(folder / "model.safetensors")
        tokenizer = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
        cfg = checkpoint.model_config_of(manifest)
        check_tokenizer(tokenizer, cfg.llm, folder / "tokenizer.json")
    except (InputError, OSError, SafetensorError) as error:
        if isinstance(error, checkpoint.CheckpointError):  # of another format
            mend = "git log --oneline -- storage/checkpoint.py  # one of these versions reads it"
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
        pretrained.load_pretrained(vlm, name, headers=True)
        found = [Finding("ok", "--pretrained", f"{name}: all keys and shapes of --preset {preset}")]
    except InputError as error:
        part = next((hub for hub in HUB.values() if Path(hub).name in brief(error)), None)
        whole = PRESETS[preset].get("pretrained") or TrainConfig.pretrained
        if name in ("hub", whole, *LAST_STEPS):  # those are in the hub's cache
            mend = download_command(part or (whole if name == "hub" else name))
        else:
            folder = Path(name, Path(part).name) if part else Path(name)
            mend = download_command(part or whole, folder)
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
