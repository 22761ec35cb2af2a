"""The files of public weights: which of them are read, how they are fetched, and what is in them.

    for path in files_in(folder_of("openvla/openvla-7b-prismatic")): ...  # config.json, one .pt

pretrained.py puts their tensors into the model.
"""

import json
import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import InputError, quoted
from storage.download import reachable

DINO_HUB = "facebook/dinov2-with-registers-large"
SIGLIP_HUB = "google/siglip-so400m-patch14-224"
QWEN_HUB = "Qwen/Qwen2.5-0.5B"
INDEX = "model.safetensors.index.json"  # of several shards: {"weight_map": {key: shard}}
# What a printed command fetches. Of the steps in Prismatic's repositories, 2.6 or 30 GB each, only
# the last is read.
FETCHED = ("config.json", INDEX, "*.safetensors", "checkpoints/latest-checkpoint.pt")
LAST_STEPS = {
    "Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b": "020792-epoch-01-loss=0.5268",
    "openvla/openvla-7b-prismatic": "295000-epoch-40-loss=0.2200",
}


class PretrainedError(InputError):
    """Weights that are not what their name says; the message lists keys and shapes."""


def chosen(names: Iterable[str], source: object) -> list[str]:
    """The names of the files that hold the weights, and config.json, in a folder or repository.

    Of several Prismatic checkpoints latest-checkpoint.pt, or else the last step's. Raises
    PretrainedError, naming the files seen, if there are no weights.
    """
    names = sorted(names)
    steps = {
        name: int(found[1]) if found[1] else math.inf
        for name in names
        if (found := re.fullmatch(r"checkpoints/(?:latest-checkpoint|step-(\d+).*)\.pt", name))
    }
    weights = [max(steps, key=steps.get)] if steps else [
        name for name in names if name == INDEX or re.fullmatch(r"[^/]+\.safetensors", name)
    ]  # fmt: skip
    if not weights:
        hubs = ", ".join(Path(name).name for name in (DINO_HUB, SIGLIP_HUB, QWEN_HUB))
        raise PretrainedError(
            f"{source}: neither checkpoints/latest-checkpoint.pt, checkpoints/step-*.pt nor "
            f"*.safetensors in it; it has {', '.join(names[:12]) or 'no files'}. Give another "
            "--pretrained: the folder of a Prismatic checkpoint, of openvla-7b, or one that holds "
            f"the folders {hubs}"
        )
    return ["config.json"] * ("config.json" in names) + weights


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that are read: `chosen`; of shards those that the index names."""
    found = [*folder.glob("*"), *folder.glob("checkpoints/*")]
    paths = [folder / name for name in chosen((str(p.relative_to(folder)) for p in found), folder)]
    if folder / INDEX not in paths:
        return paths
    try:
        named = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{folder / INDEX}: no index of shards ({error!r})") from error
    there = {path.name for path in paths}
    if lacking := sorted(named - there):
        raise PretrainedError(f"{folder}: {INDEX} names {lacking}, which are not there")
    if "model.safetensors" in there - named:  # transformers would read this one
        raise PretrainedError(
            f"{folder}: model.safetensors beside {INDEX}, which names {sorted(named)}: two saves; "
            "move the files of the older one into another folder"
        )
    return [path for path in paths if path.suffix == ".json" or path.name in named]


def fetching(name: str, folder: str | Path | None = None) -> str:
    """The command that downloads what is read of a hub model, to a folder or to the cache."""
    last = [f"checkpoints/step-{LAST_STEPS[name]}.pt"] if name in LAST_STEPS else []
    patterns = ["config.json", *last] if last else FETCHED
    include = [part for pattern in patterns for part in ("--include", pattern)]
    return quoted("hf", "download", name, *include, *(("--local-dir", folder) if folder else ()))


def folder_of(name: str, cached: bool = False) -> Path:
    """A local folder as it is; anything else is a hub name, downloaded or found in the cache."""
    if Path(name).is_dir():
        return Path(name)
    mend = (
        f"Where there is a network: {fetching(name, f'DIR/{Path(name).name}')}; then --pretrained "
        "DIR for the hub models, or that folder itself for a whole VLM. --pretrained None starts "
        "from random weights"
    )
    with reachable(name, mend):
        try:
            wanted = [] if cached else chosen(HfApi().list_repo_files(name), name)
        except (HTTPError, OSError):
            wanted = []  # the hub does not answer: the cache may have it
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=cached))


def trained_on_actions(folder: Path) -> bool:
    """Was the VLM trained on actions? Then its config.json has `vla` (Prismatic) or `norm_stats`.

    Raises PretrainedError where config.json cannot be read: nothing else tells.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        return bool({"vla", "norm_stats"} & set(config))
    except (OSError, ValueError, TypeError) as error:
        raise PretrainedError(
            f"{folder / 'config.json'}: it tells whether the model was trained on actions, and "
            f"cannot be read ({error}); download it from where the weights are"
        ) from error


def read_safetensors(files: list[Path], headers: bool = False) -> dict[str, Tensor]:
    """All tensors of the .safetensors among the files; of `headers`, without their content.

    Raises PretrainedError for a file that is cut off, and for a key that comes twice.
    """
    out, file_of = {}, {}
    for path in (path for path in files if path.suffix == ".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  no dict
                    if key in out:
                        raise PretrainedError(
                            f"{path}: {key} is in {file_of[key].name} too, and no {INDEX} names "
                            "one of them: move the files of the older save into another folder"
                        )
                    file_of[key] = path
                    if headers:
                        out[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
                    else:
                        out[key] = file.get_tensor(key)
        except SafetensorError as error:
            raise PretrainedError(
                f"{path}: cut off or not a safetensors file ({error}); download it again"
            ) from error
    return out


def read_prismatic(path: Path, headers: bool = False) -> dict[str, Tensor]:
    """A Prismatic checkpoint's tensors as component/name; vision_backbone may be absent."""
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
