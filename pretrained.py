"""Public weights into AuxVLA's VLM (paper Sec. 4.1): an explicit map of names, strict both ways.

    python train.py --pretrained PRISM ...  # a Prismatic folder (or hub name), vision towers from
                                            # the hub if it has none
    python train.py --preset openvla ...    # openvla-7b: its three components from safetensors
    python train.py --pretrained hub ...    # DINOv2, SigLIP and Qwen2.5 each from its own hub
                                            # model; a new projector

Every key of a file is used or named as dead here; every parameter of the VLM is filled or named as
new. Anything else is a PretrainedError that lists the keys and shapes. HF_HUB_OFFLINE=1 is
respected: files must then be in the cache or in folders.
"""

import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from checkpoint import sha256
from config import InputError
from model import VLM

DINO_HUB = "facebook/dinov2-with-registers-large"
SIGLIP_HUB = "google/siglip-so400m-patch14-224"
QWEN_HUB = "Qwen/Qwen2.5-0.5B"
NEW = {"latent_queries"}  # in no public checkpoint (GAP-2)

# Name in the file (a regular expression) -> name here. "#0" marks the first part of a tensor that
# is fused here.
TIMM = {
    r"cls_token": "prefix#0",
    r"reg_token": "prefix#1",
    r"pos_embed": "pos_embed",
    r"patch_embed\.proj\.(\w+)": r"patch_embed.\1",
    r"blocks\.(\d+)\.(norm[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.ls([12])\.(gamma|scale_factor)": r"blocks.\1.scale\2",
}
TIMM_DEAD = (r"norm\.\w+", r"attn_pool\..*")
DINO_HF = {
    r"embeddings\.cls_token": "prefix#0",
    r"embeddings\.register_tokens": "prefix#1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.\1",
    r"encoder\.layer\.(\d+)\.(norm[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)": r"blocks.\1.qkv.\2#0",
    r"encoder\.layer\.(\d+)\.attention\.attention\.key\.(\w+)": r"blocks.\1.qkv.\2#1",
    r"encoder\.layer\.(\d+)\.attention\.attention\.value\.(\w+)": r"blocks.\1.qkv.\2#2",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.proj.\2",
    r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.scale\2",
    r"encoder\.layer\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
}
DINO_HF_DEAD = (r"embeddings\.mask_token", r"layernorm\.\w+")
SIGLIP_HF = {
    r"vision_model\.embeddings\.patch_embedding\.(\w+)": r"patch_embed.\1",
    r"vision_model\.embeddings\.position_embedding\.weight": "pos_embed",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)": r"blocks.\1.qkv.\2#0",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.k_proj\.(\w+)": r"blocks.\1.qkv.\2#1",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.v_proj\.(\w+)": r"blocks.\1.qkv.\2#2",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.proj.\2",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
}
SIGLIP_HF_DEAD = (
    r"text_model\..*",
    r"logit_(scale|bias)",
    r"vision_model\.(post_layernorm|head)\..*",
)
LLM_HF = {
    r"model\.embed_tokens\.weight": "embed.weight",
    r"model\.norm\.weight": "norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.(\w+)": r"layers.\1.\2.\3",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight": r"layers.\1.\2.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.input_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.mlp_norm.weight",
}
LLM_HF_DEAD = (r"lm_head\.weight",)  # tied: equal to the embedding, stored twice
LLM_HF_UNTIED = LLM_HF | {r"lm_head\.weight": "head.weight"}  # Llama 2
PROJECTOR = {r"projector\.(\d)\.(\w+)": r"\1.\2"}
# openvla-7b's names of the components -> Prismatic's, which the maps above read.
OPENVLA = {
    r"vision_backbone\.featurizer\.(.*)": r"vision_backbone/dino_featurizer.\1",
    r"vision_backbone\.fused_featurizer\.(.*)": r"vision_backbone/siglip_featurizer.\1",
    r"projector\.fc1\.(\w+)": r"projector/projector.0.\1",
    r"projector\.fc2\.(\w+)": r"projector/projector.2.\1",
    r"projector\.fc3\.(\w+)": r"projector/projector.4.\1",
    r"language_model\.(.*)": r"llm_backbone/llm.\1",
}


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
        out[name] = torch.cat([fused[i] for i in sorted(fused)], dim=1 if name == "prefix" else 0)
    return out


def drop_last_block(tensors: dict[str, Tensor], built: int) -> dict[str, Tensor]:
    """The checkpoint's last block is not built: features are the second-to-last block's output."""
    return {key: value for key, value in tensors.items() if not key.startswith(f"blocks.{built}.")}


def vision_tower(tensors: dict[str, Tensor], hub_format: bool, patches: int) -> dict[str, Tensor]:
    """A tower's translated tensors in our shapes: prefix [T, C], pos_embed [P, C]."""
    if "pos_embed" not in tensors:
        return tensors  # a partial file; load_pretrained names all that it lacks
    pos = tensors["pos_embed"]
    pos = pos[0] if pos.ndim == 3 else pos  # [P or 1 + P, C]
    if hub_format and "prefix" in tensors:  # DINOv2 adds the first position to the cls token
        tensors["prefix"] = tensors["prefix"].clone()
        tensors["prefix"][0, 0] += pos[0]
        pos = pos[1:]
    if len(pos) != patches:  # 518 -> 224 pixels, as timm resizes it
        grid = rearrange(pos.float(), "(h w) c -> 1 c h w", h=math.isqrt(len(pos)))
        size = (math.isqrt(patches),) * 2
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True, align_corners=False)
        pos = rearrange(grid, "1 c h w -> (h w) c")
    if "prefix" in tensors:
        tensors["prefix"] = rearrange(tensors["prefix"], "1 t c -> t c")
    return tensors | {"pos_embed": pos}


@dataclass(frozen=True)
class Source:
    """Where the weights are: hub names or local folders."""

    # folder with checkpoints/latest-checkpoint.pt (Prismatic) or *.safetensors (openvla-7b)
    vlm: str | None = None
    dino: str = DINO_HUB
    siglip: str = SIGLIP_HUB
    qwen: str = QWEN_HUB


def folder_of(name: str, patterns: list[str]) -> Path:
    """A local folder as it is; anything else is a hub name, downloaded or found in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise PretrainedError(
            f"{name}: neither a folder nor to be had from the hub ({error}). Download it where "
            "there is a network, then give --pretrained FOLDER; --pretrained None starts from "
            "random weights"
        ) from error


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's .safetensors files. Raises PretrainedError when there are none."""
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
                out |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
        except SafetensorError as error:
            raise PretrainedError(
                f"{path}: cut off or not a safetensors file ({error}); download it again"
            ) from error
    return out


def read_openvla(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The components of openvla-7b's shards, under Prismatic's names."""
    components = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    for key, tensor in translate(read_safetensors(folder), OPENVLA, (), str(folder)).items():
        component, _, name = key.partition("/")
        components[component][name] = tensor
    return components


def read_vlm(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The components of whichever of the two formats the folder holds."""
    if (folder / "checkpoints").is_dir() or not list(folder.glob("*.safetensors")):
        return read_prismatic(folder)
    return read_openvla(folder)


def read_prismatic(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The components of a Prismatic checkpoint: projector, llm_backbone, maybe vision_backbone."""
    path = folder / "checkpoints/latest-checkpoint.pt"
    if not path.is_file():
        raise PretrainedError(
            f"{path}: not there, and no .safetensors in {folder} either; expected the folder of a "
            "Prismatic checkpoint or of openvla-7b. Give another --pretrained"
        )
    try:
        # A pickle, Prismatic's format: only tensors and containers are ever built from it.
        components = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["model"]
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise PretrainedError(
            f"{path}: cut off or not a Prismatic checkpoint ({error}); download it again"
        ) from error
    if missing := {"projector", "llm_backbone"} - set(components):
        raise PretrainedError(
            f"{path}: lacks the components {sorted(missing)}; it has {sorted(components)}"
        )
    return components


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def parts_of(
    vlm: VLM, source: Source, hashes: dict[str, str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part of the VLM: (prefix, tensors under our names).

    `hashes` gets the sha256 of every file read.
    """

    def folder(name: str, *patterns: str) -> Path:
        found = folder_of(name, list(patterns))
        hashes.update(
            {
                f"{name}/{path.name}": sha256(path)
                for pattern in patterns
                for path in sorted(found.glob(pattern))
            }
        )
        return found

    built = {name: len(getattr(vlm.vision, name).blocks) for name in ("dino", "siglip")}
    components = {}
    if source.vlm:
        files = ("config.json", "checkpoints/latest-checkpoint.pt", "*.safetensors")
        components = read_vlm(folder(source.vlm, *files))
        yield "projector.", translate(components["projector"], PROJECTOR, (), "projector")
        llm = strip(components["llm_backbone"], "llm.")
    else:
        llm = read_safetensors(folder(source.qwen, "*.safetensors"))
    names, dead = (LLM_HF, LLM_HF_DEAD) if vlm.cfg.llm.tied else (LLM_HF_UNTIED, ())
    yield "llm.", translate(llm, names, dead, "llm")
    for name, hub, names, dead in (
        ("dino", source.dino, DINO_HF, DINO_HF_DEAD),
        ("siglip", source.siglip, SIGLIP_HF, SIGLIP_HF_DEAD),
    ):
        timm = "vision_backbone" in components
        if timm:
            tensors = strip(components["vision_backbone"], f"{name}_featurizer.")
            tensors = translate(tensors, TIMM, TIMM_DEAD, f"{name}_featurizer")
        else:
            tensors = translate(read_safetensors(folder(hub, "*.safetensors")), names, dead, hub)
        tensors = vision_tower(tensors, not timm, vlm.cfg.patches)
        yield f"vision.{name}.", drop_last_block(tensors, built[name])


def load_pretrained(vlm: VLM, source: Source) -> dict[str, str]:
    """Fill the VLM; returns the sha256 of every file used.

    Raises PretrainedError on any key or shape that does not fit.
    """
    hashes: dict[str, str] = {}
    new = (
        NEW
        if source.vlm
        else NEW | {key for key in vlm.state_dict() if key.startswith("projector.")}
    )
    ours, filled = dict(vlm.state_dict()), set()
    for prefix, tensors in parts_of(vlm, source, hashes):
        for key, tensor in tensors.items():
            name = prefix + key
            if name not in ours or ours[name].shape != tensor.shape:
                expected = list(ours[name].shape) if name in ours else "no such parameter"
                raise PretrainedError(
                    f"{name}: the file has {list(tensor.shape)}, this model has {expected}"
                )
            ours[name].copy_(tensor)
            filled.add(name)
    empty = {key for key, value in ours.items() if not value.numel()}  # SigLIP has no cls token
    if missing := ours.keys() - filled - new - empty:
        raise PretrainedError(f"the files lack {len(missing)} parameters: {sorted(missing)[:8]}")
    return hashes


def source_of(name: str) -> Source:
    """--pretrained: "hub" for the three hub models, otherwise folder or hub name of a whole VLM."""
    return Source() if name == "hub" else replace(Source(), vlm=name)
