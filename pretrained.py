"""Public weights into AuxVLA's VLM (paper Sec. 4.1): an explicit map of names, strict both ways.

    python train.py --pretrained PRISM ...  # a Prismatic folder (or hub name), vision towers from
                                            # the hub if it has none
    python train.py --preset openvla ...    # openvla-7b: its three components from safetensors
    python train.py --pretrained hub ...    # DINOv2, SigLIP and Qwen2.5 each from its own hub
                                            # model; a new projector
    python train.py --pretrained DIR ...    # the same from DIR/dinov2-with-registers-large,
                                            # DIR/siglip-so400m-patch14-224, DIR/Qwen2.5-0.5B

Every key of a file is used or named as dead here; every parameter of the VLM is filled or named as
new. Anything else is a PretrainedError that lists the keys and shapes. HF_HUB_OFFLINE=1 is
respected: files must then be in the cache or in folders.
"""

import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from config import InputError, ModelConfig
from durable import sha256
from model import VLM
from weight_names import (
    DINO_HF,
    DINO_HF_DEAD,
    LLM_HF,
    LLM_HF_DEAD,
    LLM_HF_UNTIED,
    OPENVLA,
    PRISMATIC,
    SIGLIP_HF,
    SIGLIP_HF_DEAD,
    TIMM,
    TIMM_DEAD,
)  # fmt: skip

DINO_HUB = "facebook/dinov2-with-registers-large"
SIGLIP_HUB = "google/siglip-so400m-patch14-224"
QWEN_HUB = "Qwen/Qwen2.5-0.5B"
NEW = {"latent_queries"}  # in no public checkpoint (GAP-2)


class PretrainedError(InputError):
    """Weights that are not what their name says; the message lists keys and shapes."""


def translate(
    tensors: dict[str, Tensor], names: dict[str, str], dead: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """Rename a file's tensors by a map, fuse the parts marked "#", drop the dead, refuse others."""
    out, parts, unknown = {}, {}, []
    for key, tensor in tensors.items():
        new = next(
            (match.expand(to) for name, to in names.items() if (match := re.fullmatch(name, key))),
            None,
        )
        if new is None:
            if not any(re.fullmatch(pattern, key) for pattern in dead):
                unknown.append(f"{key} {list(tensor.shape)}")
        elif "#" in new:
            name, _, index = new.partition("#")
            parts.setdefault(name, {})[int(index)] = tensor
        else:
            out[new] = tensor
    if unknown:
        raise PretrainedError(
            f"{source}: {len(unknown)} keys that are not of this model: {', '.join(unknown[:8])}"
        )
    for name, fused in parts.items():
        try:
            out[name] = torch.cat(
                [fused[i] for i in sorted(fused)], dim=1 if name == "prefix" else 0
            )
        except RuntimeError as error:
            shapes = ", ".join(str(list(part.shape)) for part in fused.values())
            raise PretrainedError(
                f"{source}: the parts of {name} do not go together: {shapes}"
            ) from error
    return out


def drop_last_block(tensors: dict[str, Tensor], built: int) -> dict[str, Tensor]:
    """The checkpoint's last block is not built: features are the second-to-last block's output."""
    return {key: value for key, value in tensors.items() if not key.startswith(f"blocks.{built}.")}


def vision_tower(tensors: dict[str, Tensor], hub_format: bool, patches: int) -> dict[str, Tensor]:
    """A tower's translated tensors in our shapes: prefix [T, C], pos_embed [P, C].

    What does not fit stays as it is; load_pretrained names it.
    """
    out = dict(tensors)
    for name in ("prefix", "pos_embed"):
        if name in out and out[name].ndim == 3:
            out[name] = out[name][0]  # [T, C], [P or 1 + P, C]
    if "pos_embed" in out:
        pos, prefix = out["pos_embed"], out.get("prefix")
        if hub_format and prefix is not None and prefix.shape[-1] == pos.shape[-1]:
            # DINOv2 adds the first position to the cls token.
            out["prefix"], pos = torch.cat([prefix[:1] + pos[:1], prefix[1:]]), pos[1:]
        side = math.isqrt(len(pos))
        if len(pos) != patches and len(pos) == side**2:  # 518 -> 224 pixels, as timm resizes it
            grid = rearrange(pos.float(), "(h w) c -> 1 c h w", h=side)
            size = (math.isqrt(patches),) * 2
            grid = F.interpolate(
                grid, size=size, mode="bicubic", antialias=True, align_corners=False
            )
            pos = rearrange(grid, "1 c h w -> (h w) c")
        out["pos_embed"] = pos
    return out


@dataclass(frozen=True)
class Source:
    """Where the weights are: hub names or local folders."""

    # folder with checkpoints/latest-checkpoint.pt (Prismatic) or *.safetensors (openvla-7b)
    vlm: str | None = None
    dino: str = DINO_HUB
    siglip: str = SIGLIP_HUB
    qwen: str = QWEN_HUB


def folder_of(name: str, patterns: list[str], cached: bool = False) -> Path:
    """A local folder as it is; anything else is a hub name, downloaded or found in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise PretrainedError(
            f"{name}: neither a folder nor to be had from the hub ({error}). Where there is a "
            f"network: hf download {name} --local-dir DIR/{Path(name).name}; then --pretrained "
            "DIR for the hub models, or that folder itself for a whole VLM. --pretrained None "
            "starts from random weights"
        ) from error


def read_safetensors(folder: Path, headers: bool = False) -> dict[str, Tensor]:
    """All tensors of a folder's .safetensors files; of `headers`, without their content.

    Raises PretrainedError when there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PretrainedError(
            f"{folder}: no .safetensors file in it; it has "
            f"{sorted(p.name for p in folder.iterdir())[:8]}"
        )
    out = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  no dict
                    shape = file.get_slice(key).get_shape()
                    out[key] = (
                        torch.empty(shape, device="meta") if headers else file.get_tensor(key)
                    )
        except SafetensorError as error:
            raise PretrainedError(
                f"{path}: cut off or not a safetensors file ({error}); download it again"
            ) from error
    return out


def split(tensors: dict[str, Tensor], names: dict[str, str], source: str) -> dict[str, dict]:
    """A whole VLM's tensors by part: projector, llm, dino, siglip."""
    parts = {"projector": {}, "llm": {}, "dino": {}, "siglip": {}}
    for key, tensor in translate(tensors, names, (), source).items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def read_vlm(folder: Path, cfg: ModelConfig, headers: bool) -> dict[str, dict[str, Tensor]]:
    """The parts of whichever of the two formats the folder holds."""
    if list(folder.glob("*.safetensors")) and not (folder / "checkpoints").is_dir():
        parts = split(read_safetensors(folder, headers), OPENVLA, str(folder))
        return parts | {"llm": rising(parts["llm"], cfg)}
    parts = split(read_prismatic(folder, headers), PRISMATIC, str(folder))
    # A Prismatic VLM that was trained on frozen encoders is stored without them.
    kept = parts if parts["dino"] or parts["siglip"] else ("projector", "llm")
    return {part: parts[part] for part in kept}


def rising(llm: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """openvla-7b's LLM with its action tokens in our order (GAP-3).

    It was trained on actions: there a larger one has a smaller id (prismatic's ActionTokenizer).
    """
    first, end = cfg.llm.first_action_id, cfg.llm.first_action_id + cfg.bins
    tables = ("model.embed_tokens.weight", "lm_head.weight")  # [vocabulary, width]
    return llm | {
        key: torch.cat([llm[key][:first], llm[key][first:end].flip(0), llm[key][end:]])
        for key in tables
        if key in llm
    }


def read_prismatic(folder: Path, headers: bool = False) -> dict[str, Tensor]:
    """A Prismatic checkpoint's tensors as component/name; vision_backbone may be absent."""
    path = folder / "checkpoints/latest-checkpoint.pt"
    if not path.is_file():
        hubs = ", ".join(Path(name).name for name in (DINO_HUB, SIGLIP_HUB, QWEN_HUB))
        raise PretrainedError(
            f"{path}: not there, and no .safetensors in {folder} either; expected the folder of a "
            f"Prismatic checkpoint, of openvla-7b, or one that holds the folders {hubs}. Give "
            "another --pretrained"
        )
    try:
        # A pickle, Prismatic's format: only tensors and containers are ever built from it.
        components = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["model"]
    except (
        RuntimeError, OSError, EOFError, LookupError, TypeError, pickle.UnpicklingError
    ) as error:  # fmt: skip
        raise PretrainedError(
            f"{path}: cut off or not a Prismatic checkpoint ({error}); download it again"
        ) from error
    if missing := {"projector", "llm_backbone"} - set(components):
        raise PretrainedError(
            f"{path}: lacks the components {sorted(missing)}; it has {sorted(components)[:8]}"
        )
    return {
        f"{component}/{key}": tensor.to("meta") if headers else tensor
        for component, tensors in components.items()
        for key, tensor in tensors.items()
    }


def parts_of(
    vlm: VLM, source: Source, hashes: dict[str, str], headers: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part of the VLM: (prefix, tensors under our names).

    `hashes` gets the sha256 of every file read; of `headers`, which are not hashed, none.
    """

    def folder(name: str, *patterns: str) -> Path:
        found = folder_of(name, list(patterns), cached=headers)
        read = sorted(path for pattern in patterns for path in found.glob(pattern))
        for path in () if headers else read:
            hashes[f"{name}/{path.relative_to(found)}"] = sha256(path)
        return found

    whole = {}
    if source.vlm:
        files = ("config.json", "checkpoints/latest-checkpoint.pt", "*.safetensors")
        whole = read_vlm(folder(source.vlm, *files), vlm.cfg, headers)
        yield "projector.", whole["projector"]
        llm = whole["llm"]
    else:
        llm = read_safetensors(folder(source.qwen, "*.safetensors"), headers)
    names, dead = (LLM_HF, LLM_HF_DEAD) if vlm.cfg.llm.tied else (LLM_HF_UNTIED, ())
    yield "llm.", translate(llm, names, dead, "llm")
    for name, hub, names, dead in (
        ("dino", source.dino, DINO_HF, DINO_HF_DEAD),
        ("siglip", source.siglip, SIGLIP_HF, SIGLIP_HF_DEAD),
    ):
        if name in whole:
            tensors = translate(whole[name], TIMM, TIMM_DEAD, name)
        else:
            tensors = read_safetensors(folder(hub, "*.safetensors"), headers)
            tensors = translate(tensors, names, dead, hub)
        tensors = vision_tower(tensors, name not in whole, vlm.cfg.patches)
        built = len(getattr(vlm.vision, name).blocks)
        yield f"vision.{name}.", drop_last_block(tensors, built)


def load_pretrained(vlm: VLM, source: Source, headers: bool = False) -> dict[str, str]:
    """Fill the VLM; returns the sha256 of every file used, {"<--pretrained>/<file>": sha256}.

    `headers`, for a VLM on the meta device: names and shapes alone are read and compared, nothing
    is downloaded. Raises PretrainedError that names the keys and shapes which do not fit.
    """
    hashes: dict[str, str] = {}
    ours = dict(vlm.state_dict())
    new = {key for key in ours if key.startswith("projector.") and not source.vlm} | NEW
    unfilled = {key for key, value in ours.items() if value.numel()} - new  # SigLIP has no prefix
    wrong = []
    for prefix, tensors in parts_of(vlm, source, hashes, headers):
        for key, tensor in tensors.items():
            name = prefix + key
            unfilled.discard(name)
            if name in ours and ours[name].shape == tensor.shape:
                ours[name].copy_(tensor)
            else:
                expected = list(ours[name].shape) if name in ours else "no such parameter"
                wrong.append(f"{name}: the file has {list(tensor.shape)}, this model {expected}")
    lacking = [f"{name} {list(ours[name].shape)}" for name in sorted(unfilled)]
    if wrong or lacking:
        raise PretrainedError(
            f"{source.vlm or 'the hub models'}: {len(wrong)} tensors do not fit, "
            f"{len(lacking)} are missing: {'; '.join([*wrong[:8], *lacking[:8]])}. Are these the "
            "files of --preset's model, and all of them?"
        )
    return hashes


def source_of(name: str) -> Source:
    """What --pretrained names: "hub", or the folder or hub name of a whole VLM.

    A folder in it that is named as one of the hub models stands for that model.
    """
    hubs = {"dino": DINO_HUB, "siglip": SIGLIP_HUB, "qwen": QWEN_HUB}
    folders = {part: Path(name, Path(hub).name) for part, hub in hubs.items()}
    local = {part: str(folder) for part, folder in folders.items() if folder.is_dir()}
    return Source(vlm=None if name == "hub" or "qwen" in local else name, **local)
