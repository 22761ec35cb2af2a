"""Public weights into AuxVLA's VLM (paper Sec. 4.1): an explicit map of names, strict both ways.

    python train.py --pretrained PRISM ...  # a Prismatic folder (or hub name), vision towers from
                                            # the hub if it has none
    python train.py --preset openvla ...    # openvla-7b, or its Prismatic form openvla-7b-prismatic
    python train.py --pretrained hub ...    # DINOv2, SigLIP and Qwen2.5 each from its own hub
                                            # model; a new projector
    python train.py --pretrained DIR ...    # the same from DIR/dinov2-with-registers-large,
                                            # DIR/siglip-so400m-patch14-224, DIR/Qwen2.5-0.5B

Every key of a file is used or named as dead here; every parameter of the VLM is filled or named as
new. Anything else is a PretrainedError that lists the keys and shapes. HF_HUB_OFFLINE=1 is
respected: files must then be in the cache or in folders.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from config import ModelConfig
from storage.files import sha256
from storage.weight_files import (
    DINO_HUB,
    QWEN_HUB,
    SIGLIP_HUB,
    PretrainedError,
    files_in,
    folder_of,
    read_prismatic,
    read_safetensors,
    trained_on_actions,
)
from storage.weight_names import (
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

NEW = {"latent_queries"}  # in no public checkpoint (GAP-2)


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

    vlm: str | None = None  # Prismatic's, openvla-7b or its Prismatic form
    dino: str = DINO_HUB
    siglip: str = SIGLIP_HUB
    qwen: str = QWEN_HUB


def split(tensors: dict[str, Tensor], names: dict[str, str], source: str) -> dict[str, dict]:
    """A whole VLM's tensors by part: projector, llm, dino, siglip."""
    parts = {"projector": {}, "llm": {}, "dino": {}, "siglip": {}}
    for key, tensor in translate(tensors, names, (), source).items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def read_vlm(folder: Path, cfg: ModelConfig, headers: bool) -> dict[str, dict[str, Tensor]]:
    """The parts of whichever of the two formats the folder holds."""
    *_, path = files = files_in(folder)
    if path.suffix == ".pt":
        parts = split(read_prismatic(path, headers), PRISMATIC, str(folder))
    else:
        parts = split(read_safetensors(files, headers), OPENVLA, str(folder))
    if trained_on_actions(folder):
        parts["llm"] = rising(parts["llm"], cfg)
    # A Prismatic VLM that was trained on frozen encoders is stored without them.
    kept = parts if parts["dino"] or parts["siglip"] else ("projector", "llm")
    return {part: parts[part] for part in kept}


def rising(llm: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """The LLM of a VLA with its action tokens in our order (GAP-3).

    There a larger action has a smaller id (Prismatic's ActionTokenizer).
    """
    first, end = cfg.llm.first_action_id, cfg.llm.first_action_id + cfg.bins
    tables = ("model.embed_tokens.weight", "lm_head.weight")  # [vocabulary, width]
    return llm | {
        key: torch.cat([llm[key][:first], llm[key][first:end].flip(0), llm[key][end:]])
        for key in tables
        if key in llm
    }


def parts_of(
    vlm: nn.Module, source: Source, hashes: dict[str, str], headers: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part of the VLM: (prefix, tensors under our names).

    `hashes` gets the sha256 of every file read; of `headers`, which are not hashed, none.
    """

    def folder(name: str) -> Path:
        found = folder_of(name, cached=headers)
        for path in () if headers else files_in(found):
            hashes[f"{name}/{path.relative_to(found)}"] = sha256(path)
        return found

    whole = {}
    if source.vlm:
        whole = read_vlm(folder(source.vlm), vlm.cfg, headers)
        yield "projector.", whole["projector"]
        llm = whole["llm"]
    else:
        llm = read_safetensors(files_in(folder(source.qwen)), headers)
    names, dead = (LLM_HF, LLM_HF_DEAD) if vlm.cfg.llm.tied else (LLM_HF_UNTIED, ())
    yield "llm.", translate(llm, names, dead, "llm")
    for name, hub, names, dead in (
        ("dino", source.dino, DINO_HF, DINO_HF_DEAD),
        ("siglip", source.siglip, SIGLIP_HF, SIGLIP_HF_DEAD),
    ):
        if name in whole:
            tensors = translate(whole[name], TIMM, TIMM_DEAD, name)
        else:
            tensors = read_safetensors(files_in(folder(hub)), headers)
            tensors = translate(tensors, names, dead, hub)
        tensors = vision_tower(tensors, name not in whole, vlm.cfg.patches)
        built = len(getattr(vlm.vision, name).blocks)
        yield f"vision.{name}.", drop_last_block(tensors, built)


def load_pretrained(vlm: nn.Module, source: Source, headers: bool = False) -> dict[str, str]:
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
