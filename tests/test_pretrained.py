"""Public weights load by an explicit map: the manifest fits, formats agree, bad files are named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from config import ModelConfig, VisionConfig, model_config
from model import VLM
from pretrained import (
    TIMM,
    TIMM_DEAD,
    PretrainedError,
    Source,
    load_pretrained,
    read_openvla,
    read_prismatic,
    translate,
)

TINY = model_config("tiny")
# Small, but with everything the real towers have: a cls token, four registers, LayerScale.
CFG = replace(TINY, dino=replace(TINY.dino, depth=3, registers=4))


def random_timm_tower(cfg: VisionConfig, patches: int, patch: int) -> dict[str, torch.Tensor]:
    """A tower under timm's names, last block, final norm and pooling head included."""
    w = cfg.width
    shapes = {
        "pos_embed": (1, patches, w),
        "patch_embed.proj.weight": (w, 3, patch, patch),
        "patch_embed.proj.bias": (w,),
    }
    if cfg.cls_token:
        shapes |= {"cls_token": (1, 1, w), "reg_token": (1, cfg.registers, w)}
    for i in range(cfg.depth):
        shapes |= {f"blocks.{i}.{k}": v for k, v in {
            "norm1.weight": (w,), "norm1.bias": (w,), "norm2.weight": (w,), "norm2.bias": (w,),
            "attn.qkv.weight": (3 * w, w), "attn.qkv.bias": (3 * w,),
            "attn.proj.weight": (w, w), "attn.proj.bias": (w,),
            "mlp.fc1.weight": (cfg.mlp, w), "mlp.fc1.bias": (cfg.mlp,),
            "mlp.fc2.weight": (w, cfg.mlp), "mlp.fc2.bias": (w,),
        }.items()}  # fmt: skip
        if cfg.layer_scale is not None:
            shapes |= {f"blocks.{i}.ls1.gamma": (w,), f"blocks.{i}.ls2.gamma": (w,)}
    shapes |= {"norm.weight": (w,), "norm.bias": (w,)}
    if not cfg.cls_token:
        shapes |= {"attn_pool.latent": (1, 1, w), "attn_pool.q.weight": (w, w)}
    return {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}


def write_prismatic(folder: Path, cfg: ModelConfig, vision=True, drop=None) -> dict:
    """A Prismatic folder with random weights; returns the components as written."""
    llm = VLM(cfg).llm
    names = {
        "embed": "model.embed_tokens", "norm": "model.norm", "input_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    } | {k: f"self_attn.{k}_proj" for k in "qkvo"}  # fmt: skip
    names |= {k: f"mlp.{k}_proj" for k in ("gate", "up", "down")}
    out = {}
    for key, value in llm.state_dict().items():
        *head, module, kind = key.split(".")
        out[".".join(["llm", *(["model", *head] if head else []), names[module], kind])] = (
            torch.randn_like(value) * 0.1
        )
    out["llm.lm_head.weight"] = out["llm.model.embed_tokens.weight"]
    projector = {
        f"projector.{k}": torch.randn_like(v) for k, v in VLM(cfg).projector.state_dict().items()
    }
    components = {"projector": projector, "llm_backbone": out}
    if vision:
        components["vision_backbone"] = {
            f"{name}_featurizer.{k}": v
            for name in ("dino", "siglip")
            for k, v in random_timm_tower(getattr(cfg, name), cfg.patches, cfg.patch_size).items()
        }
    if drop:
        del components["llm_backbone"][drop]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"model_id": "test"}}))
    torch.save({"model": components}, folder / "checkpoints/latest-checkpoint.pt")
    return components


def timm_to_hub(timm: dict, cfg: VisionConfig, siglip: bool) -> dict:
    """The same tower as transformers 4 files name it."""
    out = {}
    for key, value in timm.items():
        parts = key.split(".")
        if key == "pos_embed":
            if siglip:
                out["vision_model.embeddings.position_embedding.weight"] = value[0]
            else:  # the hub file keeps a position for the cls token; timm has folded it in
                out["embeddings.position_embeddings"] = torch.cat(
                    [torch.zeros(1, 1, cfg.width), value], dim=1
                )
        elif parts[0] in ("cls_token", "reg_token"):
            out[f"embeddings.{'cls_token' if parts[0] == 'cls_token' else 'register_tokens'}"] = (
                value
            )
        elif parts[0] == "patch_embed":
            stem = (
                "vision_model.embeddings.patch_embedding"
                if siglip
                else "embeddings.patch_embeddings.projection"
            )
            out[f"{stem}.{parts[-1]}"] = value
        elif parts[0] == "blocks":
            stem = (
                f"vision_model.encoder.layers.{parts[1]}" if siglip else f"encoder.layer.{parts[1]}"
            )
            rest = ".".join(parts[2:])
            if "qkv" in rest:
                names = (
                    ("self_attn.{}_proj", "qkv")
                    if siglip
                    else ("attention.attention.{}", ("query", "key", "value"))
                )
                for name, chunk in zip(names[1], value.chunk(3)):
                    out[f"{stem}.{names[0].format(name)}.{parts[-1]}"] = chunk.contiguous()
                continue
            renames = {"attn.proj": "self_attn.out_proj" if siglip else "attention.output.dense"}
            renames |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
            renames |= {"norm1": "layer_norm1", "norm2": "layer_norm2"} if siglip else {}
            for old, new in renames.items():
                rest = rest.replace(old, new)
            out[f"{stem}.{rest}"] = value
        elif parts[0] == "norm":
            out[("vision_model.post_layernorm." if siglip else "layernorm.") + parts[-1]] = value
        else:
            out["vision_model.head.probe"] = value
    return out


@pytest.fixture(scope="module")
def prismatic(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("prism")
    return folder, write_prismatic(folder, CFG)


def load(source, cfg=CFG):
    vlm = VLM(cfg).eval()
    return vlm, load_pretrained(vlm, source)


def test_a_prismatic_file_fills_the_vlm_and_leaves_a_hash(prismatic):
    folder, components = prismatic
    vlm, hashes = load(Source(vlm=str(folder)))
    assert any(
        key.endswith("latest-checkpoint.pt") and len(value) == 64 for key, value in hashes.items()
    )
    qkv = components["vision_backbone"]["dino_featurizer.blocks.1.attn.qkv.weight"]
    assert torch.equal(vlm.vision.dino.blocks[1].qkv.weight, qkv)
    assert torch.equal(
        vlm.llm.embed.weight, components["llm_backbone"]["llm.model.embed_tokens.weight"]
    )


def test_hub_towers_with_split_qkv_give_the_features_of_the_fused_original(prismatic, tmp_path):
    folder, components = prismatic
    names = {}
    for name in ("dino", "siglip"):
        timm = {
            k.partition(".")[2]: v
            for k, v in components["vision_backbone"].items()
            if k.startswith(name)
        }
        names[name] = tmp_path / name
        names[name].mkdir()
        save_file(
            timm_to_hub(timm, getattr(CFG, name), name == "siglip"),
            names[name] / "model.safetensors",
        )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "checkpoints").mkdir()
    (bare / "config.json").write_text("{}")
    without = {k: v for k, v in components.items() if k != "vision_backbone"}
    torch.save({"model": without}, bare / "checkpoints/latest-checkpoint.pt")
    one, _ = load(Source(vlm=str(folder)))
    other, _ = load(Source(vlm=str(bare), dino=str(names["dino"]), siglip=str(names["siglip"])))
    images = torch.rand(2, 3, CFG.image_size, CFG.image_size)
    with torch.no_grad():
        torch.testing.assert_close(one.vision(images), other.vision(images), rtol=0, atol=0)
        dino_first = one.vision(images)[..., : CFG.dino.width]
        torch.testing.assert_close(dino_first, one.vision.dino(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dino", "siglip"])
def test_a_tower_equals_the_hidden_state_of_transformers(name, prismatic):
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    folder, _ = prismatic
    cfg, (vlm, _) = getattr(CFG, name), load(Source(vlm=str(folder)))
    tower = getattr(vlm.vision, name)
    common = dict(
        hidden_size=cfg.width, num_hidden_layers=cfg.depth - 1, num_attention_heads=cfg.heads,
        hidden_act="gelu", image_size=CFG.image_size, patch_size=CFG.patch_size,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    if name == "dino":
        reference = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                **common, mlp_ratio=cfg.mlp // cfg.width, num_register_tokens=cfg.registers
            )
        )
    else:
        reference = SiglipVisionModel(SiglipVisionConfig(**common, intermediate_size=cfg.mlp))
    fill_reference(reference, tower.state_dict(), name == "siglip")
    images = torch.rand(2, 3, CFG.image_size, CFG.image_size)
    with torch.no_grad():
        hidden = reference(
            pixel_values=(images - tower.mean) / tower.std, output_hidden_states=True
        ).hidden_states[-1]
        torch.testing.assert_close(tower(images), hidden[:, cfg.prefix_tokens :], rtol=0, atol=1e-5)


def fill_reference(reference, state, siglip):
    """Our tower's weights into transformers' module, by its in-memory names."""
    theirs = dict(reference.named_parameters())

    def put(suffix, value):
        (name,) = [key for key in theirs if key.endswith(suffix)]
        theirs[name].data.copy_(value.reshape(theirs[name].shape))

    layer = "encoder.layers.{}." if siglip else "encoder.layer.{}."
    for key, value in state.items():
        parts = key.split(".")
        if key == "pos_embed":
            if siglip:
                put("position_embedding.weight", value)
            else:
                put("position_embeddings", torch.cat([torch.zeros(1, value.shape[1]), value]))
        elif key == "prefix":
            if not siglip:
                put("cls_token", value[:1])
                put("register_tokens", value[1:])
        elif parts[0] == "patch_embed":
            put(
                f"{'patch_embedding' if siglip else 'patch_embeddings.projection'}.{parts[1]}",
                value,
            )
        elif parts[2] == "qkv":
            for name, chunk in zip("qkv", value.chunk(3)):
                put(
                    f"{layer.format(parts[1])}{'self_attn' if siglip else 'attention'}"
                    f".{name}_proj.{parts[3]}",
                    chunk,
                )
        else:
            names = {
                "proj": "self_attn.out_proj" if siglip else "attention.o_proj",
                "fc1": "mlp.fc1",
                "fc2": "mlp.fc2",
            }
            names |= {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
            names |= (
                {"norm1": "layer_norm1", "norm2": "layer_norm2"}
                if siglip
                else {"norm1": "norm1", "norm2": "norm2"}
            )
            put(layer.format(parts[1]) + ".".join([names[parts[2]], *parts[3:]]), value)


def test_positions_of_a_518_pixel_checkpoint_are_resized_to_our_grid(prismatic, tmp_path):
    _, components = prismatic
    timm = {
        k.partition(".")[2]: v
        for k, v in components["vision_backbone"].items()
        if k.startswith("dino")
    }
    wide = timm | {"pos_embed": torch.ones(1, 37 * 37, CFG.dino.width)}
    hub = timm_to_hub(wide, CFG.dino, siglip=False)
    hub["embeddings.position_embeddings"][:, 0] = 5.0  # the cls token's own
    (tmp_path / "wide").mkdir()
    save_file(hub, tmp_path / "wide/model.safetensors")
    save_file(timm_to_hub(
        {k.partition(".")[2]: v for k, v in components["vision_backbone"].items()
         if k.startswith("siglip")}, CFG.siglip, True,
    ), tmp_path / "model.safetensors")  # fmt: skip
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    torch.save({"model": {k: v for k, v in components.items() if k != "vision_backbone"}},
               bare / "checkpoints/latest-checkpoint.pt")  # fmt: skip
    vlm, _ = load(Source(vlm=str(bare), dino=str(tmp_path / "wide"), siglip=str(tmp_path)))
    torch.testing.assert_close(
        vlm.vision.dino.pos_embed, torch.ones_like(vlm.vision.dino.pos_embed)
    )
    torch.testing.assert_close(vlm.vision.dino.prefix[0], timm["cls_token"][0, 0] + 5)


TESTS = Path(__file__).parent


def test_the_paper_preset_is_filled_exactly_by_the_real_checkpoints_keys_and_shapes(monkeypatch):
    """The manifest is that of Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b."""
    manifest = json.loads((TESTS / "prismatic_manifest.json").read_text())
    with torch.device("meta"):
        vlm = VLM(model_config("paper"))
        components = {part: {key: torch.empty(shape) for key, shape in manifest[part].items()}
                      for part in ("projector", "llm_backbone", "vision_backbone")}  # fmt: skip
    monkeypatch.setattr("pretrained.read_vlm", lambda folder: components)
    monkeypatch.setattr("pretrained.sha256", lambda path: "")
    load_pretrained(vlm, Source(vlm=str(TESTS)))


def test_the_openvla_preset_is_filled_exactly_by_openvla_7bs_keys_and_shapes(monkeypatch):
    manifest = json.loads((TESTS / "openvla_manifest.json").read_text())["keys"]
    with torch.device("meta"):
        vlm = VLM(model_config("openvla"))
        tensors = {key: torch.empty(shape) for key, shape in manifest.items()}
    monkeypatch.setattr("pretrained.read_safetensors", lambda folder: dict(tensors))
    monkeypatch.setattr("pretrained.read_vlm", read_openvla)
    monkeypatch.setattr("pretrained.sha256", lambda path: "")
    assert len(tensors) == 982
    load_pretrained(vlm, Source(vlm=str(TESTS)))
    del tensors["language_model.lm_head.weight"]
    with pytest.raises(PretrainedError, match=r"lack 1 parameters: .*llm\.head\.weight"):
        load_pretrained(vlm, Source(vlm=str(TESTS)))


def write_openvla(folder: Path, components: dict) -> None:
    """A Prismatic file's components as openvla-7b's two shards name them."""
    prefixes = {
        "dino_featurizer.": "vision_backbone.featurizer.",
        "siglip_featurizer.": "vision_backbone.fused_featurizer.",
        "projector.0": "projector.fc1", "projector.2": "projector.fc2",
        "projector.4": "projector.fc3", "llm.": "language_model.",
    }  # fmt: skip
    tensors = {
        prefixes[prefix] + key.removeprefix(prefix).replace(".gamma", ".scale_factor"): value
        for part in components.values()
        for key, value in part.items()
        for prefix in prefixes
        if key.startswith(prefix)
    }
    tensors["language_model.lm_head.weight"] = torch.randn(TINY.llm.vocab, TINY.llm.width)
    folder.mkdir()
    names = sorted(tensors)
    for i, half in enumerate((names[::2], names[1::2])):
        shard = {name: tensors[name].clone() for name in half}
        save_file(shard, folder / f"model-{i + 1:05d}-of-00002.safetensors")


def test_openvla_shards_give_what_the_same_weights_give_in_prismatics_format(prismatic, tmp_path):
    folder, components = prismatic
    bare = {k: v for k, v in components["llm_backbone"].items() if not k.endswith("_proj.bias")}
    write_openvla(tmp_path / "openvla", components | {"llm_backbone": bare})
    llama = replace(CFG, llm=replace(CFG.llm, tied=False, qkv_bias=False))
    vlm, hashes = load(Source(vlm=str(tmp_path / "openvla")), llama)
    other, _ = load(Source(vlm=str(folder)))
    images = torch.rand(2, 3, CFG.image_size, CFG.image_size)
    with torch.no_grad():
        ours, theirs = (each.projector(each.vision(images)) for each in (vlm, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(vlm.llm.layers[1].q.weight, other.llm.layers[1].q.weight)
    assert not torch.equal(vlm.llm.head.weight, vlm.llm.embed.weight) and len(hashes) == 2
    shard = tmp_path / "openvla/model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(PretrainedError, match=r"00002\.safetensors: cut off"):
        load(Source(vlm=str(tmp_path / "openvla")), llama)
    shard.unlink()
    with pytest.raises(PretrainedError, match=r"lack \d+ parameters"):
        load(Source(vlm=str(tmp_path / "openvla")), llama)


def test_an_unknown_key_a_missing_one_and_a_wrong_shape_are_named(prismatic, tmp_path):
    with pytest.raises(PretrainedError, match=r"1 keys .* surprise \[2\]"):
        translate({"surprise": torch.zeros(2)}, TIMM, TIMM_DEAD, "file")
    write_prismatic(tmp_path / "missing", CFG, drop="llm.model.layers.2.mlp.up_proj.weight")
    with pytest.raises(PretrainedError, match=r"lack 1 parameters: .*llm.layers.2.up.weight"):
        load(Source(vlm=str(tmp_path / "missing")))
    folder, _ = prismatic
    with pytest.raises(
        PretrainedError, match=r"dino.prefix: the file has \[5, 192\], this model has \[2, 192\]"
    ):
        load(Source(vlm=str(folder)), replace(CFG, dino=replace(CFG.dino, registers=1)))


def test_a_truncated_or_foreign_file_is_refused(prismatic, tmp_path):
    folder, _ = prismatic
    path = tmp_path / "checkpoints/latest-checkpoint.pt"
    path.parent.mkdir()
    content = (folder / "checkpoints/latest-checkpoint.pt").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PretrainedError, match="cut off or not a Prismatic checkpoint"):
        read_prismatic(tmp_path)
    torch.save({"model": Path("a foreign object")}, path)
    with pytest.raises(PretrainedError, match="cut off or not a Prismatic checkpoint"):
        read_prismatic(tmp_path)
    with pytest.raises(PretrainedError, match=r"not there, and no \.safetensors"):
        read_prismatic(tmp_path / "nowhere")


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("not in the cache, and no network")

    monkeypatch.setattr("pretrained.snapshot_download", offline)
    with pytest.raises(PretrainedError, match="--pretrained FOLDER"):
        load(Source(vlm="nobody/no-such-model"))
