"""Public weights for AuxVLA's VLM (paper Sec. 4.1). `--pretrained` takes

    PRISM  a Prismatic checkpoint, openvla-7b or openvla-7b-prismatic: a folder or a hub name.
           Vision encoders that the checkpoint lacks come from the hub
    hub    DINOv2, SigLIP and Qwen2.5, each from its own hub repository; the projector is new
    DIR    the same three from DIR/dinov2-with-registers-large, DIR/siglip-so400m-patch14-224 and
           DIR/Qwen2.5-0.5B

weight_names.py maps a file's keys to our names and lists the keys that nothing reads. Any other
key, a parameter that no file fills, and a wrong shape are an InputError. Downloads go through
huggingface_hub; with HF_HUB_OFFLINE=1 its cache must have the files.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from einops import rearrange
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from config import BINS, InputError, ModelConfig, quoted
from storage import weight_names
from storage.download import reachable
from storage.files import READ_ERRORS, read_json, sha256

HUB = {
    "llm": "Qwen/Qwen2.5-0.5B",
    "dino": "facebook/dinov2-with-registers-large",
    "siglip": "google/siglip-so400m-patch14-224",
}
# Prismatic repositories hold many steps, 2.6 or 30 GB each. These are the last.
LAST_STEPS = {
    "Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b": "020792-epoch-01-loss=0.5268",
    "openvla/openvla-7b-prismatic": "295000-epoch-40-loss=0.2200",
}
INDEX = "model.safetensors.index.json"  # of several shards: {"weight_map": {key: shard}}

# --- Files ---


def find_folder(name: str, cached_only: bool) -> Path:
    """`name` itself if it is a folder, else that hub repository, downloaded or in the cache."""
    if Path(name).is_dir():
        return Path(name)
    folder = f"DIR/{Path(name).name}"
    command = ["hf", "download", name, "--local-dir", folder]
    if step := LAST_STEPS.get(name):
        command += ["--include", "config.json", "--include", f"checkpoints/step-{step}.pt"]
    remedy = (
        f"Where there is a network: {quoted(*command)}; then "
        f"--pretrained {'DIR' if name in HUB.values() else folder}. --pretrained None starts from "
        "random weights"
    )
    with reachable(name, remedy):
        try:
            files = [] if cached_only else select_files(HfApi().list_repo_files(name), name)
        except (HTTPError, OSError):
            files = []  # the hub does not answer, the cache may have the files
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=cached_only))


def select_files(names: Iterable[str], source: object) -> list[str]:
    """config.json and the weights; of Prismatic's .pt, latest-checkpoint.pt, else the last step."""
    names = sorted(names)
    steps = {
        name: int(found[1]) if found[1] else math.inf
        for name in names
        if (found := re.fullmatch(r"checkpoints/(?:latest-checkpoint|step-(\d+).*)\.pt", name))
    }
    weights = [name for name in names if name == INDEX or re.fullmatch(r"[^/]+\.safetensors", name)]
    if steps:
        weights = [max(steps, key=steps.get)]
    if not weights:
        raise InputError(
            f"{source} has {', '.join(names[:12]) or 'no files'}; expected *.safetensors, "
            "checkpoints/latest-checkpoint.pt, checkpoints/step-*.pt, or folders named "
            f"{', '.join(Path(name).name for name in HUB.values())}. Give another --pretrained"
        )
    return ["config.json"] * ("config.json" in names) + weights


def files_in(folder: Path) -> list[Path]:
    """The files that select_files picks in a folder; of shards only those that the index names."""
    found = [*folder.glob("*"), *folder.glob("checkpoints/*")]
    names = select_files((str(path.relative_to(folder)) for path in found), folder)
    if INDEX in names:
        listed = set(read_json(folder / INDEX).get("weight_map", {}).values())
        if lacking := sorted(listed - set(names)):
            raise InputError(f"{folder / INDEX} names {', '.join(lacking)}: download them again")
        names = [name for name in names if name in listed or name.endswith(".json")]
    return [folder / name for name in names]


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or, named component/key, of a Prismatic .pt file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    # Prismatic's format is a pickle. weights_only builds tensors and containers alone.
    parts = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["model"]
    return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def read_tensors(files: list[Path], headers: bool) -> dict[str, Tensor]:
    """The tensors of all weight files; with `headers` only their shapes, on the meta device."""
    out: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".json":
            continue
        try:
            tensors = read_file(path)
        except (*READ_ERRORS, SafetensorError) as error:
            text = f"{path}: cut off or in another format ({error}); download it again"
            raise InputError(text) from error
        if twice := sorted(out.keys() & tensors.keys()):
            raise InputError(f"{path}: {twice[0]} is in two files; move the older save elsewhere")
        out |= {key: tensor.to("meta") if headers else tensor for key, tensor in tensors.items()}
    return out


# --- Names and shapes ---


def translate(tensors: dict[str, Tensor], names: dict[str, str], source: str) -> dict[str, Tensor]:
    """Rename tensors by a map, fuse the parts marked "#", drop the unused, refuse unknown keys."""
    out, parts, unknown = {}, {}, []
    for key, tensor in tensors.items():
        found = ((re.fullmatch(pattern, key), new) for pattern, new in names.items())
        new = next((match.expand(new) for match, new in found if match), None)
        name, _, index = (new or "").partition("#")
        if new is None:
            unknown.append(f"{key} {list(tensor.shape)}")
        elif index:
            parts.setdefault(name, {})[index] = tensor
        elif name:
            out[name] = tensor
    if unknown:
        raise InputError(
            f"{source}: {len(unknown)} keys that are not of this model: {', '.join(unknown[:8])}"
        )
    for name, fused in parts.items():
        ordered = [fused[i] for i in sorted(fused)]
        out[name] = torch.cat(ordered, dim=1 if name == "prefix" else 0)
    return out


def fit_encoder(tensors: dict[str, Tensor], from_hub: bool, patches: int) -> dict[str, Tensor]:
    """An encoder's translated tensors in our shapes: prefix [T, C], pos_embed [P, C].

    Tensors of unexpected shapes stay as they are: load_pretrained names them.
    """
    out = dict(tensors)
    for name in ("prefix", "pos_embed"):
        if name in out and out[name].ndim == 3:
            out[name] = out[name][0]  # [T, C], [P or 1 + P, C]
    if "pos_embed" in out:
        pos, prefix = out["pos_embed"], out.get("prefix")
        if from_hub and prefix is not None and prefix.shape[-1] == pos.shape[-1]:
            # DINOv2 adds the first position to the cls token.
            out["prefix"], pos = torch.cat([prefix[:1] + pos[:1], prefix[1:]]), pos[1:]
        side = math.isqrt(len(pos))
        if len(pos) != patches and len(pos) == side**2:  # 518 -> 224 pixels, resized as timm does
            pos = rearrange(pos.float(), "(h w) c -> 1 c h w", h=side)
            size = (math.isqrt(patches),) * 2
            pos = F.interpolate(pos, size, mode="bicubic", antialias=True, align_corners=False)
            pos = rearrange(pos, "1 c h w -> (h w) c")
        out["pos_embed"] = pos
    return out


def reverse_actions(llm: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """A VLA's LLM with its action tokens in our order (GAP-3).

    In Prismatic's ActionTokenizer a larger action has a smaller id, here a larger one.
    """
    first, end = cfg.llm.first_action_id, cfg.llm.first_action_id + BINS
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & llm.keys()  # [vocabulary, width]
    return llm | {
        key: torch.cat([llm[key][:first], llm[key][first:end].flip(0), llm[key][end:]])
        for key in tables
    }


# --- Into the model ---


def choose_sources(name: str) -> dict[str, str]:
    """The hub names or folders of the parts: llm, dino, siglip; "vlm" if `name` is a whole VLM."""
    sources = {}
    for part, hub in HUB.items():
        folder = Path(name, Path(hub).name)
        sources[part] = str(folder) if folder.is_dir() else hub
    if name != "hub" and sources["llm"] == HUB["llm"]:
        sources["vlm"] = name
    return sources


def split_vlm(
    tensors: dict[str, Tensor], folder: Path, cfg: ModelConfig
) -> dict[str, dict[str, Tensor]]:
    """A whole VLM's tensors by part: projector, llm, dino, siglip."""
    prismatic = any("/" in key for key in tensors)
    names = weight_names.PRISMATIC if prismatic else weight_names.OPENVLA
    parts = {"projector": {}, "llm": {}, "dino": {}, "siglip": {}}
    for key, tensor in translate(tensors, names, str(folder)).items():
        part, _, key = key.partition("/")
        parts[part][key] = tensor
    # Only a VLA's config.json has "vla" (Prismatic) or "norm_stats" (openvla).
    if {"vla", "norm_stats"} & set(read_json(folder / "config.json")):
        parts["llm"] = reverse_actions(parts["llm"], cfg)
    return parts


def read_parts(
    vlm: nn.Module, sources: dict[str, str], hashes: dict[str, str], headers: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each part of the VLM: (prefix, tensors under our names). `hashes` gets each file's sha256."""

    def read(name: str) -> tuple[dict[str, Tensor], Path]:
        folder = find_folder(name, cached_only=headers)
        files = files_in(folder)
        for path in () if headers else files:
            hashes[f"{name}/{path.relative_to(folder)}"] = sha256(path)
        return read_tensors(files, headers), folder

    parts = {}
    if "vlm" in sources:
        parts = split_vlm(*read(sources["vlm"]), vlm.cfg)
        yield "projector.", parts["projector"]
    llm = parts["llm"] if parts else read(sources["llm"])[0]
    tied = vlm.cfg.llm.tied
    yield "llm.", translate(llm, weight_names.LLM_HF if tied else weight_names.LLM_HF_UNTIED, "llm")
    # Prismatic stores no encoders that stayed frozen while the VLM was trained.
    stored = bool(parts and (parts["dino"] or parts["siglip"]))
    for name, names in (("dino", weight_names.DINO_HF), ("siglip", weight_names.SIGLIP_HF)):
        if stored:
            tensors = translate(parts[name], weight_names.TIMM, name)
        else:
            tensors = translate(read(sources[name])[0], names, sources[name])
        last = f"blocks.{len(getattr(vlm.vision, name).blocks)}."  # never built: backbone.py
        tensors = {key: value for key, value in tensors.items() if not key.startswith(last)}
        yield f"vision.{name}.", fit_encoder(tensors, not stored, vlm.cfg.patches)


def load_pretrained(vlm: nn.Module, name: str, headers: bool = False) -> dict[str, str]:
    """Fill the VLM, which may be on the meta device, from what --pretrained names.

    Returns the sha256 of every file used, {"<source>/<file>": sha256}. With `headers` only names
    and shapes are compared: nothing is downloaded or hashed, and the VLM stays without values.
    Raises InputError that names the keys and shapes which do not fit.
    """
    sources, hashes, wrong = choose_sources(name), {}, []
    ours = vlm.state_dict()
    # SigLIP has no prefix tokens: an empty parameter, in no file
    empty = {key: torch.empty(value.shape) for key, value in ours.items() if not value.numel()}
    vlm.load_state_dict(empty, strict=False, assign=True)
    unfilled = ours.keys() - empty.keys() - {"latent_queries"}  # in no public checkpoint (GAP-2)
    if "vlm" not in sources:
        unfilled = {key for key in unfilled if not key.startswith("projector.")}
    for prefix, tensors in read_parts(vlm, sources, hashes, headers):
        filled = {}
        for key, tensor in tensors.items():
            key = prefix + key
            unfilled.discard(key)
            if key in ours and ours[key].shape == tensor.shape:
                filled[key] = tensor.to(torch.float32, copy=True).contiguous()
            else:
                expected = list(ours[key].shape) if key in ours else "no such parameter"
                wrong.append(f"{key}: the file has {list(tensor.shape)}, this model {expected}")
        vlm.load_state_dict(filled, strict=False, assign=True)
    lacking = [f"{key} {list(ours[key].shape)}" for key in sorted(unfilled)]
    if wrong or lacking:
        raise InputError(
            f"{name}: {len(wrong)} tensors do not fit, {len(lacking)} are missing: "
            f"{'; '.join([*wrong[:8], *lacking[:8]])}. Are these all files of --preset's model?"
        )
    return hashes
