"""Public models with random weights, as transformers builds and saves them, and Prismatic's files.

transformers writes the hub's own names and shapes, so these are the formats of the real files.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbone import rope
from config import ModelConfig
from model import VLM
from storage.pretrained import HUB, INDEX

DINO, SIGLIP, QWEN = (Path(HUB[part]).name for part in ("dino", "siglip", "llm"))

RENAMED = (
    (r"vision_model\.|embeddings\.(?=cls|mask)", ""),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings?(\.weight)?", "pos_embed"),
    (r"embeddings\.patch_embedding(s\.projection)?", "patch_embed.proj"),
    (r"encoder\.layers?\.", "blocks."),
    (r"attention\.output\.dense|self_attn\.out_proj", "attn.proj"),
    (r"attention\.attention\.|self_attn\.", "attn."),
    (r"(?<=attn\.)([qkv])(uery|ey|alue|_proj)\.", r"\1."),
    (r"layer_norm(\d)", r"norm\1"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^(post_)?layernorm\.", "norm."),
    (r"^head\.", "attn_pool."),
)


def timm_tower(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tower of a hub file as timm names it: fused qkv, the cls token's position folded in."""
    out = {}
    for key, value in hub.items():
        if key.startswith(("text_model.", "logit_")) or key.endswith("mask_token"):
            continue
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        out[key] = value
    for key in [key for key in out if ".attn.q." in key]:
        parts = [out.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        out[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    if "cls_token" in out:
        out["cls_token"] += out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    else:
        out["pos_embed"] = out["pos_embed"][None]
    return out


def prismatic_components(originals: dict, cfg: ModelConfig, folder: Path) -> dict[str, dict]:
    """The originals, and a random projector, as the components of a Prismatic checkpoint."""
    projector = VLM(cfg).projector.state_dict()
    hub = {}
    for name, model in originals.items():
        model.save_pretrained(folder / name)
        hub[name] = load_file(folder / name / "model.safetensors")
    llm = hub.pop("llm")
    llm.setdefault("lm_head.weight", llm["model.embed_tokens.weight"].clone())  # tied, stored twice
    return {
        "projector": {f"projector.{key}": value for key, value in projector.items()},
        "llm_backbone": {f"llm.{key}": value for key, value in llm.items()},
        "vision_backbone": {
            f"{name}_featurizer.{key}": value
            for name, tower in hub.items()
            for key, value in timm_tower(tower).items()
        },
    }


def released_components(fill=lambda shape: torch.empty(shape, device="meta")) -> dict[str, dict]:
    """The keys and shapes of Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b."""
    manifest = json.loads((Path(__file__).parent / "prismatic_manifest.json").read_text())
    parts = ("projector", "llm_backbone", "vision_backbone")
    return {part: {key: fill(shape) for key, shape in manifest[part].items()} for part in parts}


# As the hub's repositories name them: the last of their steps.
STEP = "checkpoints/step-020792-epoch-01-loss=0.5268.pt"


def save_prismatic(components: dict[str, dict], folder: Path, config: str = "model") -> Path:
    """A repository as Prismatic uploads it; `config` is "vla" for a model trained on actions."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({config: {}, "seed": 7}))
    torch.save({"model": components}, folder / STEP)
    return folder


OPENVLA_NAMES = {
    "dino_featurizer.": "vision_backbone.featurizer.",
    "siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.0": "projector.fc1", "projector.2": "projector.fc2",
    "projector.4": "projector.fc3", "llm.": "language_model.",
}  # fmt: skip


def save_openvla(components: dict[str, dict], folder: Path) -> None:
    """The same tensors as openvla-7b names them, in two shards."""
    tensors = {
        new + key.removeprefix(old).replace(".gamma", ".scale_factor"): value
        for part in components.values()
        for key, value in part.items()
        for old, new in OPENVLA_NAMES.items()
        if key.startswith(old)
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"norm_stats": {"bridge_orig": {}}}')
    save_shards(tensors, folder, 2)


def save_shards(tensors: dict[str, Tensor], folder: Path, count: int) -> None:
    """`count` shards and the index that names them; every count-th tensor is in the same one."""
    shards = {}
    for i in range(count):
        part = {name: tensors[name] for name in sorted(tensors)[i::count]}
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(part, folder / name)
        shards |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


@torch.no_grad()
def compare(vlm: VLM, originals: dict, cfg: ModelConfig, tolerance: float) -> None:
    """Our features are the second-to-last block's of both towers, our logits the LLM's."""
    images = torch.rand(2, 3, cfg.image_size, cfg.image_size)
    features = vlm.vision(images).split([cfg.dino.width, cfg.siglip.width], dim=-1)
    towers = {"dino": originals["dino"], "siglip": originals["siglip"].vision_model}
    for ours, (name, tower) in zip(features, towers.items()):
        part = getattr(cfg, name)
        mean, std = (torch.tensor(each)[:, None, None] for each in (part.mean, part.std))
        states = tower(pixel_values=(images - mean) / std, output_hidden_states=True).hidden_states
        assert states[-2].abs().max() > 0.5
        theirs = states[-2][:, part.prefix_tokens :]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    ids = torch.randint(0, cfg.llm.vocab, (2, 17))
    causal = torch.ones(2, 17, 17, dtype=torch.bool).tril()
    table = rope(torch.arange(17).expand(2, 17), cfg.llm)
    hidden, _ = vlm.llm(vlm.llm.embed(ids), table, causal[:, None])
    theirs = originals["llm"](ids).logits
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(vlm.llm.logits(hidden), theirs, rtol=0, atol=1e-5)
