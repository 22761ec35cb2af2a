"""A checkpoint: a folder that is enough to resume training exactly and enough to drive the robot.

    RUN/stage1/step-00000250/model.safetensors      weights
                             optimizer.safetensors  Adam's moments, by parameter name
                             tokenizer.json
                             manifest.json          config, stage, step, action statistics and
                                                    schema, sha256 of each file and of itself
    RUN/stage1/last, best                           names: the newest, the lowest held-out loss
    RUN/stage1/step-00000500.damaged                moved aside: the run resumed from an older one

A checkpoint is written under a hidden name, its manifest last, fsynced and renamed. No pickles.
Without optimizer.safetensors it still drives the robot and starts the next stage:

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
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from config import InputError, ModelConfig, TrainConfig, quoted, user_errors
from storage.files import DamagedError, read_json, sha256, sync, write_json
from storage.files import write as write_whole

FORMAT = 2
MOMENTS = "optimizer.safetensors"
# What a resumed run may change. None alters a step, but `steps` and `epochs` move the cool-down.
MAY_CHANGE = {
    "data", "out", "init_from", "resume", "steps", "epochs", "device", "workers", "val_every",
    "val_frames", "pretrained", "log_every", "save_every", "keep", "max_skipped", "tracker",
    "shard", "recompute", "action_bounds",
}  # fmt: skip


class CheckpointError(InputError):
    """A checkpoint that cannot be used here, though its files may be whole; it is named."""


# --- Writing ---


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies on the host: weights by name, Adam's state as "<parameter>/<moment>".

    Collective where the model is sharded; ranks that do not `keep` get empty dicts.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }

    def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, tensor in tensors.items():
            full = whole(tensor.detach())
            if keep:
                out[key] = full.to("cpu", copy=True).contiguous()
        return out

    return copies(model.state_dict()), copies(moments)


def write(
    out: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor] | None,
    manifest: dict, tokenizer: str, keep: int,
) -> None:  # fmt: skip
    """Write out/step-NNNNNNNN, then out/last; then `prune`.

    Without moments it drives the robot and starts a stage, but does not resume one. Raises
    CheckpointError when the disk fails; the older ones are then as they were.
    """
    final = folder_of(out, step)
    partial = hidden(final, "partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "model.safetensors")
        if moments is not None:
            save_file(moments, partial / MOMENTS)
        (partial / "tokenizer.json").write_bytes(tokenizer.encode())
        files, mode = sorted(partial.iterdir()), (partial / "tokenizer.json").stat().st_mode
        for path in files:
            path.chmod(mode)  # safetensors lets nobody else read; this is the umask's
            sync(path)
        hashes = {path.name: sha256(path) for path in files}
        sizes = {path.name: path.stat().st_size for path in files}
        content = {"format": FORMAT, "step": step, **manifest, "sizes": sizes, "files": hashes}
        write_json(partial / "manifest.json", content)
        if final.exists():  # never in a run: `resumable` has moved damaged ones aside
            discard(final)
        os.replace(partial, final)
        sync(out)
        write_whole(out / "last", final.name.encode())
        prune(out, keep, final)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise CheckpointError(
            f"{final}: could not be saved ({error}); earlier checkpoints in {out} are as they were"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rate(out: Path, step: int, score: float, keep: int) -> None:
    """Write a step's score into its manifest, then `prune`."""
    path = folder_of(out, step) / "manifest.json"
    write_json(path, read_json(path) | {"score": score})
    prune(out, keep, path.parent)


def prune(out: Path, keep: int, saved: Path) -> None:
    """Name the one of the lowest `score` in out/best; keep it, `saved` and the newest `keep`.

    Damaged checkpoints are not counted and not removed. Only the manifest's seal and the files'
    sizes are compared: hashing all files would take a minute at each save of the paper's model.
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
        write_whole(out / "best", best.name.encode())
    for folder in [*scores][:-keep]:
        if folder not in (best, saved):
            discard(folder)


def folder_of(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def discard(folder: Path) -> None:
    """Remove a checkpoint; killed in between, it does not stay behind as a damaged one."""
    trash = hidden(folder, "trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


# --- Reading ---


def steps_in(out: Path) -> list[Path]:
    """The checkpoints of a stage's folder, oldest first, without step-NNNNNNNN.damaged."""
    return sorted(path for path in out.glob("step-*") if path.is_dir() and not path.suffix)


def read_manifest(folder: Path, verify: bool = True, moments: bool = True) -> dict:
    """The manifest of a checkpoint, after comparing every file with its size and its sha256.

    Without `verify` the sizes alone are compared (older manifests have none). Without `moments`
    Adam's file, twice the weights and needed to resume only, is not looked at. Raises DamagedError
    naming the file, CheckpointError for a manifest of another format.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {manifest.get('format')}, expected {FORMAT}. Use the version of "
            "this code that wrote it, or give another --out or --checkpoint"
        )
    sizes = manifest.get("sizes", {})
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
    """The newest whole checkpoint of a stage's folder; damaged ones are named on stderr.

    Raises CheckpointError for one of another format.
    """
    for folder in reversed(steps_in(out)):
        try:
            read_manifest(folder, moments=moments)
            return folder
        except DamagedError as error:
            print(f"warning: skipped {error}", file=sys.stderr)
    return None


def resumable(out: Path, resume: str) -> Path | None:
    """The checkpoint that a run goes on from; None where `out` has none yet.

    Nobody else may be writing to `out`: what killed saves have left is removed, and damaged
    checkpoints behind the one returned are moved aside, so that none has the number of a later
    save. Raises CheckpointError when none is whole, FileExistsError when one is and `resume` is
    "never".
    """
    tidy(out)
    steps, found = steps_in(out), newest(out)
    if steps and not found:
        raise CheckpointError(
            f"{out}: none of its {len(steps)} checkpoints is whole. Nothing was changed. Copy one "
            f"again, or begin anew in another --out; to begin anew here: mv {quoted(out)} "
            f"{quoted(f'{out}.damaged')}"
        )
    if found and resume == "never":
        raise InputError(
            f"{out}: holds {found.name}; choose another --out, or drop --resume never to go on"
        )
    for folder in steps[steps.index(found) + 1 :] if found else ():
        names = (folder.with_name(f"{folder.name}.damaged{n or ''}") for n in count())
        aside = next(path for path in names if not path.exists())
        os.replace(folder, aside)
        print(f"warning: moved {folder} to {aside.name}", file=sys.stderr)
    return found


def tidy(out: Path) -> None:
    """Remove what killed saves have left. Nobody else may be writing to `out`."""
    for pattern in (".step-*.partial", ".step-*.trash"):
        for left in out.glob(pattern):
            shutil.rmtree(left)


def resolve(path: str | Path) -> Path:
    """A checkpoint from its own folder or its stage's, to act or to start a stage with.

    FileNotFoundError says what to run.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = newest(path, moments=False) if path.is_dir() else None
    if found is None:
        raise InputError(
            f"{path}: no whole checkpoint there; train one: python train.py --stage 1 --data DATA "
            f"--out {quoted(path)}"
        )
    return found


def model_config_of(manifest: dict) -> ModelConfig:
    return dacite.from_dict(ModelConfig, manifest["config"]["model"], dacite.Config(cast=[tuple]))


def decoders_of(out: str, init_from: str | None) -> tuple[str, ...] | None:
    """Decoders of the checkpoint in `out`, which a run resumes, else of `init_from`; None: of none.

    Damaged checkpoints are passed over: `resumable` and `resolve` name them.
    """
    for place in (Path(out), *([Path(init_from)] if init_from else [])):
        alone = (place / "manifest.json").is_file()
        for folder in [place] if alone else reversed(steps_in(place)):
            try:
                manifest = read_manifest(folder, verify=False, moments=False)
            except InputError:
                continue
            return model_config_of(manifest).decoders
    return None


def differences(ours: dict, theirs: dict, prefix: str = "") -> dict[str, str]:
    """{field: what it is here and there} for every leaf in which two nested dicts differ."""
    out = {}
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out[f"{prefix}{key}"] = f"{prefix}{key}: {a} here, {b} there"
    return out


def plain(config) -> dict:
    """A config as JSON sees it: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


def check_config(cfg: TrainConfig, manifest: dict, source: Path, resumed: bool):
    """Raise CheckpointError, naming the fields, unless the run may go on from `source`.

    A stage that starts from it (not `resumed`) needs the same model only. A field that is newer
    than the checkpoint has its default there.
    """
    theirs = plain(TrainConfig(data="", out="")) | manifest["config"]
    fields = differences(plain(cfg), theirs | {"model": plain(model_config_of(manifest))})

    def matters(name: str) -> bool:
        if resumed:
            return name.split(".")[0] not in MAY_CHANGE
        if manifest["stage"] != 3 and name.startswith("model.flow."):
            return False  # there is no flow head to take
        return name.startswith("model.") and name != "model.freeze_vision"

    different = [text for name, text in fields.items() if matters(name)]
    if different:
        more = f"; {len(different) - 4} more" if len(different) > 4 else ""
        raise CheckpointError(
            f"{source} was made with another configuration ({'; '.join(different[:4])}{more}). "
            + (
                "Give the same flags, or another --out"
                if resumed
                else "Give its --row or its --model flags, or another --init-from"
            )
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
            "it is of another model, or of a later stage"
        )


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Adam's state. Raises CheckpointError for a checkpoint that was shared without it."""
    if not (folder / MOMENTS).is_file():
        raise CheckpointError(
            f"{folder}: has no {MOMENTS}, so that its stage cannot go on. It starts one: "
            f"--init-from {quoted(folder)}, and another --out"
        )
    parameters = dict(model.named_parameters())
    with safe_open(folder / MOMENTS, "pt") as file:  # one tensor at a time
        for key in sorted(file.keys()):  # in the same order on every rank
            name, _, moment = key.rpartition("/")
            value = file.get_tensor(key)
            parameter = parameters[name]
            optimizer.state[parameter][moment] = (
                value.to(parameter.device) if moment == "step" else like(value, parameter)
            )


def export(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint to share: matrices in bf16, no moments, the training logs beside it.

    Args:
        checkpoint: RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
        out: a new folder, which --checkpoint and --init-from take like RUN/stageN
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


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered on the CPU by all ranks together; others as they are."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor as `parameter` is kept: its rank's shard, or whole on its device."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
