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
import os
import shutil
import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path

import dacite
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import InputError, ModelConfig, TrainConfig, quoted, user_errors
from storage.files import DamagedError, read_json, sha256, sync, write_json
from storage.files import write as write_file

FORMAT = 2
MOMENTS = "optimizer.safetensors"
# Fields of TrainConfig that may differ on resume. None changes an optimizer step, except that steps
# and epochs shift the cool-down.
RESUME_MAY_CHANGE = {
    "data", "out", "run", "init_from", "resume", "steps", "epochs", "device", "workers",
    "val_every", "val_frames", "pretrained", "log_every", "save_every", "keep", "max_skipped",
    "tracker", "shard", "recompute", "action_bounds",
}  # fmt: skip


class CheckpointError(InputError):
    """A checkpoint that cannot be used here; the message names it."""


# --- Writing ---


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, is_main: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the host: weights by name, Adam's state as "<parameter>/<moment>".

    Collective if the model is sharded; ranks other than the main one get empty dicts.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        full = ((key, full_tensor(tensor.detach())) for key, tensor in tensors.items())
        return {key: t.to("cpu", copy=True).contiguous() for key, t in full if is_main}

    return copies(model.state_dict()), copies(moments)


def write(
    out: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor] | None,
    manifest: dict, tokenizer: str, keep: int,
) -> None:  # fmt: skip
    """Write out/step-NNNNNNNN and out/last, then `prune`.

    Without moments the checkpoint cannot be resumed. Raises CheckpointError when the disk fails;
    older checkpoints stay as they were.
    """
    final = folder_of(out, step)
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
        raise CheckpointError(
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
    folder = folder_of(out, step)
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"score": score})
    prune(out, keep, folder)


def prune(out: Path, keep: int, saved: Path) -> None:
    """Write the name of the checkpoint with the lowest score to out/best; remove old checkpoints.

    The best, `saved` and the newest `keep` stay. Damaged checkpoints are neither counted nor
    removed. Only sizes are compared: hashing takes a minute for each save of the paper's model.
    """
    scores = {}
    for folder in steps_in(out):
        try:
            scores[folder] = read_manifest(folder, verify=False).get("score")
        except InputError:
            continue
    rated = [folder for folder, score in scores.items() if score is not None]
    best = min(rated, key=scores.get, default=None)
    if best:
        write_file(out / "best", best.name.encode())
    for folder in [*scores][:-keep]:
        if folder not in (best, saved):
            discard(folder)


def folder_of(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


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
    weights. Raises DamagedError naming the file, CheckpointError for another format.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {manifest.get('format')}, expected {FORMAT}. Use the version of "
            "this code that wrote it, or give another --out or --checkpoint"
        )
    sizes = manifest.get("sizes", {})  # older manifests have no sizes
    for name, expected in manifest["files"].items():
        path = folder / name
        if name == MOMENTS and not moments:
            continue
        if not path.is_file() or path.stat().st_size != sizes.get(name, path.stat().st_size):
            raise DamagedError(f"{path}: missing or damaged, its size differs from the manifest's")
        if verify and sha256(path) != expected:
            raise DamagedError(f"{path}: damaged, its sha256 differs from the manifest's")
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
        raise CheckpointError(
            f"{out}: none of its {len(steps)} checkpoints is undamaged. Nothing was changed. Copy "
            f"one again, or start in another --out; to start here: mv "
            f"{quoted(out, f'{out}.damaged')}"
        )
    if found and resume == "never":
        raise InputError(
            f"{out}: holds {found.name}; choose another --out, or drop --resume never to continue"
        )
    for folder in steps[steps.index(found) + 1 :] if found else ():
        names = (folder.with_name(f"{folder.name}.damaged{n or ''}") for n in count())
        aside = next(path for path in names if not path.exists())
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


# --- Comparing and loading ---


def model_config_of(manifest: dict) -> ModelConfig:
    return dacite.from_dict(ModelConfig, manifest["config"]["model"], dacite.Config(cast=[tuple]))


def differences(ours: dict, theirs: dict, prefix: str = "") -> dict[str, str]:
    """Flatten two nested dicts; return {path: "path: a here, b there"} where they differ."""
    out = {}
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out[f"{prefix}{key}"] = f"{prefix}{key}: {a} here, {b} there"
    return out


def to_json(config) -> dict:
    """A config dataclass as JSON has it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def check_config(cfg: TrainConfig, manifest: dict, source: Path, resumed: bool) -> None:
    """Raise CheckpointError, naming the fields, unless the run may start from `source`.

    A field that is newer than the checkpoint has its default there.
    """
    theirs = to_json(TrainConfig()) | manifest["config"]
    fields = differences(to_json(cfg), theirs | {"model": to_json(model_config_of(manifest))})
    if resumed:
        wrong = [
            text for name, text in fields.items() if name.split(".")[0] not in RESUME_MAY_CHANGE
        ]
        mend = "Give the same flags, or another --out"
    else:  # A stage needs the same model; the flow head is new unless stage 3 trained one.
        free = ("model.freeze_vision",) + ("model.flow.",) * (manifest["stage"] != 3)
        parts = {name: text for name, text in fields.items() if name.startswith("model.")}
        wrong = [text for name, text in parts.items() if not name.startswith(free)]
        mend = "Give its --row or its --model flags, or another --init-from"
    if wrong:
        more = f"; {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{source} was made with another configuration ({'; '.join(wrong[:4])}{more}). {mend}"
        )


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
        raise CheckpointError(
            f"{folder}: lacks {missing[:5]} and has unknown {unexpected[:5]}; "
            "the file is of another model or of a later stage"
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load Adam's state. Raises CheckpointError for a checkpoint that was exported without it."""
    if not (folder / MOMENTS).is_file():
        raise CheckpointError(
            f"{folder}: has no {MOMENTS}, so its stage cannot be resumed. It can start a stage: "
            f"--init-from {quoted(folder)}, with another --out"
        )
    parameters = dict(model.named_parameters())
    with safe_open(folder / MOMENTS, "pt") as file:  # one tensor at a time
        for key in sorted(file.keys()):  # in the same order on every rank
            name, _, moment = key.rpartition("/")
            parameter, value = parameters[name], file.get_tensor(key).to(parameters[name].device)
            optimizer.state[parameter][moment] = (
                value if moment == "step" else shard_like(value, parameter)
            )


def is_sharded(tensor: Tensor) -> bool:
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # importing it takes a second

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered on the CPU by all ranks together; others unchanged."""
    return tensor.full_tensor().cpu() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's shard of a full tensor if the parameter is sharded, else the tensor itself."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


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
