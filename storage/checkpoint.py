"""A checkpoint: a folder that resumes training exactly and drives the robot.

    RUN/stage1/step-00000250/model.safetensors      weights
                             optimizer.safetensors  Adam's moments, by parameter name
                             tokenizer.json
                             manifest.json          config, stage, step, action statistics and
                                                    schema; size and sha256 of the other files
    RUN/stage1/last, best                           names: the newest, the lowest held-out loss
    RUN/stage1/step-00000500.damaged                moved aside: the run resumed from an older one

A checkpoint is written under a hidden name, fsynced and renamed. It contains no pickles. Without
optimizer.safetensors it still drives the robot and starts the next stage:

    python -m storage.checkpoint export --checkpoint RUN/stage2 --out RUN/light  # bf16, to share
"""

import json
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import dacite
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import InputError, ModelConfig, quoted, user_errors
from storage.files import DamagedError, read_json, sha256, sync, write_json
from storage.files import write as write_file

FORMAT = 2
MOMENTS = "optimizer.safetensors"


# --- Writing ---


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, is_main: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the host: weights by name, Adam's state as "<parameter>/<moment>".

    Collective if the model is sharded; ranks other than the main one get empty dicts.
    """
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        moments |= {f"{name}/{key}": value for key, value in state.items()}

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = ((key, full_tensor(tensor.detach())) for key, tensor in tensors.items())
        return {key: t.to("cpu", copy=True).contiguous() for key, t in full if is_main}

    return copies(model.state_dict()), copies(moments)


def write(
    out: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor] | None,
    manifest: dict, tokenizer: str, keep: int,
) -> None:  # fmt: skip
    """Write out/step-NNNNNNNN and out/last, then `prune`.

    Without moments the checkpoint cannot be resumed. Raises InputError when the disk fails;
    older checkpoints stay as they were.
    """
    final = out / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial, weights, moments, tokenizer, {"format": FORMAT, "step": step} | manifest)
        if final.exists():
            discard(final)
        os.replace(partial, final)
        sync(out)
        write_file(out / "last", final.name.encode())
        prune(out, keep, final)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise InputError(
            f"{final}: could not be saved ({error}); earlier checkpoints in {out} are as they were"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(
    folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor] | None, tokenizer: str,
    manifest: dict,
) -> None:  # fmt: skip
    save_file(weights, folder / "model.safetensors")
    if moments is not None:
        save_file(moments, folder / MOMENTS)
    (folder / "tokenizer.json").write_bytes(tokenizer.encode())
    files, mode = sorted(folder.iterdir()), (folder / "tokenizer.json").stat().st_mode
    for path in files:
        path.chmod(mode)  # safetensors ignores the umask: its files are readable by the owner only
        sync(path)
    sizes = {path.name: path.stat().st_size for path in files}
    hashes = {path.name: sha256(path) for path in files}
    write_json(folder / "manifest.json", manifest | {"sizes": sizes, "files": hashes})


def rate(out: Path, step: int, score: float, keep: int) -> None:
    """Add the held-out loss of a checkpoint to its manifest, then `prune`."""
    path = out / f"step-{step:08d}/manifest.json"
    write_json(path, read_json(path) | {"score": score})
    prune(out, keep, path.parent)


def prune(out: Path, keep: int, saved: Path) -> None:
    """Write the name of the checkpoint with the lowest score to out/best; remove old checkpoints.

    The best, `saved` and the newest `keep` stay. Damaged checkpoints are neither counted nor
    removed. Only sizes are compared: hashing takes a minute for each save of the paper's model.
    """
    scores = {}
    for folder in steps_in(out):
        with suppress(InputError):
            scores[folder] = read_manifest(folder, verify=False).get("score", math.inf)
    best = min(scores, key=scores.get, default=None)
    if scores.get(best, math.inf) < math.inf:
        write_file(out / "best", best.name.encode())
    for folder in {*list(scores)[:-keep]} - {best, saved}:
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint. The hidden name keeps a kill in between from leaving a damaged one."""
    trash = folder.with_name(f".{folder.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


def tidy(out: Path) -> None:
    """Remove the remains of killed saves. The caller must be the only writer of `out`."""
    for pattern in (".step-*.partial", ".step-*.trash"):
        for remains in out.glob(pattern):
            shutil.rmtree(remains)


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
            f"{folder}: format {manifest.get('format')}, expected {FORMAT}. Use the version of "
            "this code that wrote it, or give another --out or --checkpoint"
        )
    sizes = manifest.get("sizes", {})  # older manifests have no sizes
    for name, expected in manifest["files"].items():
        path = folder / name
        if name == MOMENTS and not moments:
            continue
        same = path.is_file() and path.stat().st_size == sizes.get(name, path.stat().st_size)
        if not same or (verify and sha256(path) != expected):
            raise DamagedError(f"{path}: missing or damaged, the manifest has another sha256")
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
    Raises InputError if all checkpoints are damaged, or if one is not and `resume` is "never".
    """
    tidy(out)
    steps, found = steps_in(out), newest(out)
    if steps and not found:
        raise InputError(
            f"{out}: none of its {len(steps)} checkpoints is undamaged. Nothing was changed. Copy "
            f"one again, or start in another --out; to start here: mv "
            f"{quoted(out, f'{out}.damaged')}"
        )
    if found and resume == "never":
        raise InputError(
            f"{out}: holds {found.name}; choose another --out, or drop --resume never to continue"
        )
    for folder in steps[steps.index(found) + 1 :] if found else ():
        aside = folder.with_name(f"{folder.name}.damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        os.replace(folder, aside)
        print(f"warning: moved {folder} to {aside.name}", file=sys.stderr)
    return found


def resolve(path: str | Path) -> Path:
    """The checkpoint in its own folder, or the newest of a stage's. InputError says what to run."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = newest(path, moments=False) if path.is_dir() else None
    if found is None:
        raise InputError(
            f"{path}: no undamaged checkpoint there; train one: python train.py --stage 1 "
            f"--out {quoted(path)}"
        )
    return found


# --- Loading ---


def model_config_of(manifest: dict) -> ModelConfig:
    return dacite.from_dict(ModelConfig, manifest["config"]["model"], dacite.Config(cast=[tuple]))


def to_json(config) -> dict:
    """A config dataclass as JSON has it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def load_weights(model: nn.Module, folder: Path, new: tuple[str, ...] = ()) -> None:
    """Fill the model, which may be on the meta device, with fp32 copies of the file's weights.

    Parts named in `new` may be absent from the file, others not.
    """
    weights = {
        name: weight.to(torch.float32 if weight.is_floating_point() else weight.dtype, copy=True)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = [key for key in missing if not key.startswith(new)]
    if missing or unexpected:
        raise InputError(
            f"{folder}: lacks {missing[:5]} and has unknown {unexpected[:5]}; "
            "the file is of another model or of a later stage"
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load Adam's state. Raises InputError for a checkpoint that was exported without it."""
    if not (folder / MOMENTS).is_file():
        raise InputError(
            f"{folder}: has no {MOMENTS}, so its stage cannot be resumed. It can start a stage: "
            f"--init-from {quoted(folder)}, with another --out"
        )
    parameters = dict(model.named_parameters())
    with safe_open(folder / MOMENTS, "pt") as file:  # one tensor at a time
        for key in sorted(file.keys()):  # in the same order on every rank
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            value = file.get_tensor(key).to(parameter.device)
            if moment != "step" and is_sharded(parameter):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][moment] = value


def is_sharded(tensor: Tensor) -> bool:
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # importing it takes a second

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered on the CPU by all ranks together; others unchanged."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def export(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint to share: matrices in bf16, without moments, with the training logs.

    Args:
        checkpoint: RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
        out: a new folder, for --checkpoint and --init-from, in the form of RUN/stageN
    """
    if out.exists():
        raise InputError(f"{out}: is there already; give another --out")
    folder = resolve(checkpoint)
    manifest = read_manifest(folder, moments=False)
    weights = {
        name: weight.bfloat16() if weight.is_floating_point() and weight.ndim > 1 else weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    about = manifest | {"published_from": sha256(folder / "manifest.json")}
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    write(out, manifest["step"], weights, None, about, tokenizer, keep=1)
    for log in ("config.json", "log.jsonl", "validation.json"):
        if (folder.parent / log).is_file():
            shutil.copyfile(folder.parent / log, out / log)
    print(f"{out}: stage {manifest['stage']}, step {manifest['step']}, matrices in bf16")


if __name__ == "__main__":
    with user_errors():
        tyro.extras.subcommand_cli_from_dict({"export": export}, description=__doc__)
