"""A checkpoint: a folder that is enough to resume training exactly and enough to drive the robot.

    RUN/stage1/step-00000250/model.safetensors      weights
                             optimizer.safetensors  Adam's moments, by parameter name
                             tokenizer.json
                             manifest.json          config, stage, step, action statistics and
                                                    schema, sha256 of each file
    RUN/stage1/last                                 the newest one's name

It is written under a temporary name, fsynced and renamed; the manifest is written last. No pickle
anywhere.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import dacite
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from config import InputError, ModelConfig
from sharding import like, whole

FORMAT = 1


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message names the file."""


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Adam's state as {"<parameter>/<moment>": tensor}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": whole(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    manifest: dict,
    tokenizer: str,
    keep: int,
    is_main: bool = True,
):
    """Write out/step-NNNNNNNN and out/last, then drop all but the newest `keep`.

    Every rank calls it, since a sharded model is gathered by all; the main one writes. On a full
    disk the older ones stay whole.
    """
    weights = {key: whole(value).contiguous() for key, value in model.state_dict().items()}
    moments = optimizer_tensors(model, optimizer)
    if not is_main:
        return
    final = out / f"step-{step:08d}"
    partial = out / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "tokenizer.json").write_text(tokenizer)
        files = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(
            json.dumps({"format": FORMAT, "step": step, **manifest, "files": files}, indent=1)
        )
        for path in [*partial.iterdir(), partial]:
            fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        (out / "last.partial").write_text(final.name)
        fsync(out / "last.partial")
        os.replace(out / "last.partial", out / "last")
        fsync(out)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be saved ({error}); earlier checkpoints in {out} are whole"
        ) from error
    for old in steps_in(out)[:-keep]:
        shutil.rmtree(old)


def steps_in(out: Path) -> list[Path]:
    """The checkpoints of a stage's folder, oldest first."""
    return sorted(path for path in out.glob("step-*") if path.is_dir())


def read_manifest(folder: Path, verify: bool = True) -> dict:
    """The manifest of a checkpoint, after comparing every file with its sha256."""
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder}: no manifest.json, so it is not a whole checkpoint")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / 'manifest.json'}: damaged ({error})") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {manifest.get('format')}, this code reads {FORMAT}"
        )
    for name, expected in manifest["files"].items() if verify else ():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name}: missing or damaged, its sha256 differs from the manifest's"
            )
    return manifest


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint of a stage's folder; damaged ones are named on stderr."""
    for folder in reversed(steps_in(out)):
        try:
            read_manifest(folder)
            return folder
        except CheckpointError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
    return None


def resolve(path: str | Path) -> Path:
    """A checkpoint from its own folder or its stage's. FileNotFoundError says what to run."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = newest(path) if path.is_dir() else None
    if found is None:
        raise FileNotFoundError(
            f"{path}: no checkpoint there; train one: python train.py --stage 1 --data DATA "
            f"--out {path}"
        )
    return found


def model_config_of(manifest: dict) -> ModelConfig:
    return dacite.from_dict(ModelConfig, manifest["config"]["model"], dacite.Config(cast=[tuple]))


def differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """`field: ours, theirs` for every leaf in which two nested dicts differ."""
    out = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a} here, {b} there")
    return out


def plain(config) -> dict:
    """A config as JSON sees it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def load_weights(model: nn.Module, folder: Path, new: tuple[str, ...] = ()) -> None:
    """Weights into the model.

    Parts named in `new` may be absent from the file, parts unknown to the model are an error.
    """
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    missing = [key for key in missing if not key.startswith(new)] if new else missing
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: lacks {missing[:5]} and has unknown {unexpected[:5]}; "
            "it is of another model"
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    parameters = dict(model.named_parameters())
    with safe_open(folder / "optimizer.safetensors", "pt") as file:  # one tensor at a time
        for key in sorted(file.keys()):  # in the same order on every rank
            name, _, moment = key.rpartition("/")
            value = file.get_tensor(key)
            # Adam keeps its step counter on the CPU.
            optimizer.state[parameters[name]][moment] = (
                value if moment == "step" else like(value, parameters[name])
            )
