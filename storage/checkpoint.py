"""A checkpoint: a folder that resumes training exactly and drives the robot.

    RUN/stage1/step-00000250/model.safetensors      weights
                             optimizer.safetensors  Adam's moments, by parameter name
                             tokenizer.json
                             manifest.json          config, stage, step, action statistics and
                                                    schema; size and sha256 of the other files
    RUN/stage1/last                                 the name of the newest
    RUN/stage1/step-00000500.damaged                moved aside: the run resumed from an older one

A checkpoint is written under a hidden name, fsynced and renamed. It contains no pickles. Without
optimizer.safetensors it still drives the robot and starts the next stage:

    python -m storage.checkpoint export --checkpoint RUN/stage2 --out RUN/light  # bf16, to share
"""

import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import dacite
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import InputError, ModelConfig, quoted
from storage import files
from storage.files import DamagedError, read_json, sha256, sync, well_formed, write_json
from storage.terminal import cli, user_errors

FORMAT = 2
MOMENTS = "optimizer.safetensors"


# --- Writing ---


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, is_main: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the host: weights by name, Adam's state as "<parameter>/<moment>".

    Collective if the model is sharded; ranks other than the main one get empty dicts.
    """
    moments = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }

    def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = ((key, full_tensor(tensor.detach())) for key, tensor in tensors.items())
        return {key: t.to("cpu", copy=True).contiguous() for key, t in full if is_main}

    return copy(model.state_dict()), copy(moments)


def write(
    out: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor] | None,
    manifest: dict, tokenizer: str, keep: int,
) -> None:  # fmt: skip
    """Write out/step-NNNNNNNN and out/last; without moments the checkpoint cannot be resumed.

    The newest `keep` checkpoints stay, and damaged ones, which are not counted. Raises InputError
    when the disk fails or a tensor is not finite; older checkpoints stay as they were.
    """
    if bad := [k for k, t in (weights | (moments or {})).items() if not t.isfinite().all()]:
        raise InputError(
            f"{out}: step {step} is not saved: {len(bad)} tensors not finite ({bad[0]}); lower --lr"
        )
    final = out / f"step-{step:08d}"
    partial = out / f".{final.name}.partial"
    try:
        partial.mkdir(parents=True)
        save_file(weights, partial / "model.safetensors")
        if moments is not None:
            save_file(moments, partial / MOMENTS)
        (partial / "tokenizer.json").write_bytes(tokenizer.encode())
        sizes, hashes, mode = {}, {}, (partial / "tokenizer.json").stat().st_mode
        for path in sorted(partial.iterdir()):
            path.chmod(mode)  # safetensors ignores the umask: only the owner could read its files
            sync(path)
            sizes[path.name], hashes[path.name] = path.stat().st_size, sha256(path)
        manifest = {"format": FORMAT, "step": step} | manifest
        write_json(partial / "manifest.json", manifest | {"sizes": sizes, "files": hashes})
        if final.exists():
            discard(final)
        os.replace(partial, final)
        sync(out)
        files.write(out / "last", final.name.encode())
        for folder in [*filter(is_complete, steps_in(out))][:-keep]:
            discard(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise InputError(
            f"{final}: could not be saved ({error}); earlier checkpoints in {out} are as they were"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_complete(folder: Path) -> bool:
    """Are all files there, by size? Hashing takes a minute for each save of the paper's model."""
    with suppress(InputError):
        return bool(read_manifest(folder, verify=False))
    return False


def discard(folder: Path) -> None:
    """Remove a checkpoint; under a hidden name, so that a kill leaves no damaged one."""
    trash = folder.with_name(f".{folder.name}.trash")
    os.replace(folder, trash)
    shutil.rmtree(trash)


# --- Finding ---


def steps_in(out: Path) -> list[Path]:
    """The checkpoints of a stage's folder, oldest first, without step-NNNNNNNN.damaged."""
    return sorted(path for path in out.glob("step-*") if path.is_dir() and not path.suffix)


def read_manifest(folder: Path, verify: bool = True, moments: bool = True) -> dict:
    """The manifest of a checkpoint, after comparing size and sha256 of every file.

    `verify` False compares sizes only. `moments` False skips Adam's file, twice as large as the
    weights. Raises DamagedError naming the file, InputError for another format.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{folder}: format {manifest.get('format')!r}, expected {FORMAT}: another version of "
            "this code wrote it. Give another --out or --checkpoint"
        )
    with well_formed(folder / "manifest.json"):
        if not isinstance(manifest["step"], int):
            raise TypeError(f"step is {manifest['step']!r}")
        sizes = manifest.get("sizes", {})  # older manifests have no sizes
        for name, expected in manifest["files"].items():
            path = folder / name
            if name == MOMENTS and not moments:
                continue
            same = path.is_file() and path.stat().st_size == sizes.get(name, path.stat().st_size)
            if not same or (verify and sha256(path) != expected):
                raise DamagedError(f"{path}: missing or damaged, not what the manifest describes")
    return manifest


def newest(out: Path, moments: bool = True) -> Path | None:
    """The newest undamaged checkpoint of a stage's folder; damaged ones are named on stderr."""
    for folder in reversed(steps_in(out)):
        try:
            read_manifest(folder, moments=moments)
            return folder
        except DamagedError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
    return None


def resumable(out: Path, resume: str) -> Path | None:
    """The checkpoint that a run continues from; None if `out` has none yet.

    The caller must be the only writer of `out`: remains of killed saves are removed, and damaged
    checkpoints newer than the returned one are renamed, so that later saves can take their names.
    Raises InputError if every checkpoint is damaged, or if `resume` is "never" and one is not.
    """
    for remains in out.glob(".step-*"):
        shutil.rmtree(remains)
    steps, found = steps_in(out), newest(out)
    if steps and not found:
        raise InputError(
            f"{out}: none of its {len(steps)} checkpoints is undamaged. Copy one again, give "
            f"another --out, or start anew: mv {quoted(out, f'{out}.damaged')}"
        )
    if found and resume == "never":
        raise InputError(f"{out}: holds {found.name}; give another --out, or drop --resume never")
    for folder in steps[steps.index(found) + 1 :] if found else ():
        aside = folder.with_name(f"{folder.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        os.replace(folder, aside)
        print(f"warning: moved {folder} to {aside.name}", file=sys.stderr)
    return found


def resolve(path: str | Path) -> Path:
    """`path` if it is a checkpoint, else the newest one in it. The InputError says what to run."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    if found := newest(path, moments=False):
        return found
    if stages := sorted(path.glob("stage[123]")):
        raise InputError(f"{path} is a run; give one of its stages: {quoted(*stages)}")
    if path.exists():
        raise InputError(f"{path}: no undamaged checkpoint in it; expected RUN/stageN")
    stage = int(path.name[5:]) if path.name in ("stage2", "stage3") else 1
    command = f"python train.py --stage {stage} --out {quoted(path)}"
    if stage > 1:
        command += f" --init-from {quoted(path.with_name(f'stage{stage - 1}'))}"
    raise InputError(f"{path}: not there; train it: {command}")


# --- Loading ---


def model_config_of(manifest: dict) -> ModelConfig:
    try:
        model = manifest["config"]["model"]
        return dacite.from_dict(ModelConfig, model, dacite.Config(cast=[tuple]))
    except (KeyError, TypeError, dacite.DaciteError) as error:
        raise DamagedError(f"the manifest's model cannot be built: {error!r}") from error


def to_json(config) -> dict:
    """A config dataclass as JSON has it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def load_weights(model: nn.Module, folder: Path, new: tuple[str, ...] = ()) -> None:
    """Fill the model, also on the meta device, with fp32 copies; only `new` parts may be absent."""
    weights = {
        name: weight.to(torch.float32 if weight.is_floating_point() else weight.dtype, copy=True)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = [key for key in missing if not key.startswith(new)]
    if missing or unexpected:
        raise InputError(
            f"{folder}: another model or a later stage: lacks {missing[:5]}, has {unexpected[:5]}"
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load Adam's state. Raises InputError for a checkpoint that was exported without it."""
    if not (folder / MOMENTS).is_file():
        raise InputError(
            f"{folder}: has no {MOMENTS}. Give another --out and --init-from {quoted(folder)}"
        )
    from torch.distributed.tensor import DTensor, distribute_tensor  # here: --help loads faster

    parameters = dict(model.named_parameters())
    with safe_open(folder / MOMENTS, "pt") as file:  # one tensor at a time
        for key in sorted(file.keys()):  # in the same order on every rank
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            value = file.get_tensor(key).to(parameter.device)
            if moment != "step" and isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][moment] = value


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on the CPU, of an FSDP shard (collective); any other tensor unchanged."""
    from torch.distributed.tensor import DTensor  # here: --help loads faster

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def export(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint to share: matrices in bf16, without moments, with the training logs.

    Args:
        checkpoint: RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
        out: a new folder, for --checkpoint and --init-from, in the form of RUN/stageN
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is there already; give another --out")
    folder = resolve(checkpoint)
    manifest = read_manifest(folder, moments=False)
    weights = {
        name: weight.bfloat16() if weight.is_floating_point() and weight.ndim > 1 else weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    manifest["published_from"] = sha256(folder / "manifest.json")
    write(out, manifest["step"], weights, None, manifest, tokenizer, keep=1)
    for log in ("config.json", "log.jsonl", "validation.json"):
        with suppress(FileNotFoundError):
            shutil.copyfile(folder.parent / log, out / log)
    print(f"{out}: stage {manifest['stage']}, step {manifest['step']}, matrices in bf16")


if __name__ == "__main__":
    with user_errors():
        cli({"export": export}, description=__doc__)
