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

from config import InputError
from durable import sha256
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
    r"model\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)": r"layers.\1.qkv.\2#0",
    r"model\.layers\.(\d+)\.self_attn\.k_proj\.(\w+)": r"layers.\1.qkv.\2#1",
    r"model\.layers\.(\d+)\.self_attn\.v_proj\.(\w+)": r"layers.\1.qkv.\2#2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)": r"layers.\1.o.\2",
    r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": r"layers.\1.gate_up.weight#0",
    r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": r"layers.\1.gate_up.weight#1",
    r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": r"layers.\1.down.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.input_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.mlp_norm.weight",
}
LLM_HF_DEAD = (r"lm_head\.weight",)  # tied: equal to the embedding, stored twice
LLM_HF_UNTIED = LLM_HF | {r"lm_head\.weight": "head.weight"}  # Llama 2
# A whole VLM's names -> part/name: the LLM's names are then the hub model's, the towers' timm's.
PRISMATIC = {
    r"projector/projector\.(.*)": r"projector/\1",
    r"llm_backbone/llm\.(.*)": r"llm/\1",
    r"vision_backbone/(dino|siglip)_featurizer\.(.*)": r"\1/\2",
}
OPENVLA = {
    r"projector\.fc1\.(\w+)": r"projector/0.\1",
    r"projector\.fc2\.(\w+)": r"projector/2.\1",
    r"projector\.fc3\.(\w+)": r"projector/4.\1",
    r"language_model\.(.*)": r"llm/\1",
    r"vision_backbone\.featurizer\.(.*)": r"dino/\1",
    r"vision_backbone\.fused_featurizer\.(.*)": r"siglip/\1",
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


def folder_of(name: str, patterns: list[str]) -> Path:
    """A local folder as it is; anything else is a hub name, downloaded or found in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise PretrainedError(
            f"{name}: neither a folder nor to be had from the hub ({error}). Where there is a "
            f"network: hf download {name} --local-dir DIR/{Path(name).name}; then --pretrained "
            "DIR for the hub models, or that folder itself for a whole VLM. --pretrained None "
            "starts from random weights"
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


def split(tensors: dict[str, Tensor], names: dict[str, str], source: str) -> dict[str, dict]:
    """A whole VLM's tensors by part: projector, llm, dino, siglip."""
    parts = {"projector": {}, "llm": {}, "dino": {}, "siglip": {}}
    for key, tensor in translate(tensors, names, (), source).items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def read_vlm(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The parts of whichever of the two formats the folder holds."""
    if list(folder.glob("*.safetensors")) and not (folder / "checkpoints").is_dir():
        return split(read_safetensors(folder), OPENVLA, str(folder))
    parts = split(read_prismatic(folder), PRISMATIC, str(folder))
    # A Prismatic VLM that was trained on frozen encoders is stored without them.
    kept = parts if parts["dino"] or parts["siglip"] else ("projector", "llm")
    return {part: parts[part] for part in kept}


def read_prismatic(folder: Path) -> dict[str, Tensor]:
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
        f"{component}/{key}": tensor
        for component, tensors in components.items()
        for key, tensor in tensors.items()
    }


def parts_of(
    vlm: VLM, source: Source, hashes: dict[str, str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part of the VLM: (prefix, tensors under our names).

    `hashes` gets the sha256 of every file read.
    """

    def folder(name: str, *patterns: str) -> Path:
        found = folder_of(name, list(patterns))
        for path in sorted(path for pattern in patterns for path in found.glob(pattern)):
            hashes[f"{name}/{path.relative_to(found)}"] = sha256(path)
        return found

    whole = {}
    if source.vlm:
        files = ("config.json", "checkpoints/latest-checkpoint.pt", "*.safetensors")
        whole = read_vlm(folder(source.vlm, *files))
        yield "projector.", whole["projector"]
        llm = whole["llm"]
    else:
        llm = read_safetensors(folder(source.qwen, "*.safetensors"))
    names, dead = (LLM_HF, LLM_HF_DEAD) if vlm.cfg.llm.tied else (LLM_HF_UNTIED, ())
    yield "llm.", translate(llm, names, dead, "llm")
    for name, hub, names, dead in (
        ("dino", source.dino, DINO_HF, DINO_HF_DEAD),
        ("siglip", source.siglip, SIGLIP_HF, SIGLIP_HF_DEAD),
    ):
        if name in whole:
            tensors = translate(whole[name], TIMM, TIMM_DEAD, name)
        else:
            tensors = translate(read_safetensors(folder(hub, "*.safetensors")), names, dead, hub)
        tensors = vision_tower(tensors, name not in whole, vlm.cfg.patches)
        built = len(getattr(vlm.vision, name).blocks)
        yield f"vision.{name}.", drop_last_block(tensors, built)


def load_pretrained(vlm: VLM, source: Source) -> dict[str, str]:
    """Fill the VLM; returns the sha256 of every file used, {"<--pretrained>/<file>": sha256}.

    Raises PretrainedError that names the keys and shapes which do not fit.
    """
    hashes: dict[str, str] = {}
    ours = dict(vlm.state_dict())
    new = {key for key in ours if key.startswith("projector.") and not source.vlm} | NEW
    unfilled = {key for key, value in ours.items() if value.numel()} - new  # SigLIP has no prefix
    wrong = []
    for prefix, tensors in parts_of(vlm, source, hashes):
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
