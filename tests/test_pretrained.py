"""Public weights load by an explicit map: the manifests fit, features are kept, damage is named."""

import shutil
from dataclasses import replace
from pathlib import Path

import originals
import pytest
import torch
from hub_server import Hub
from originals import DINO, QWEN, SIGLIP, STEP, compare, released_components, save_prismatic
from safetensors.torch import load_file, save_file
from tiny_run import train

from config import BINS, InputError, model_config
from model import VLM
from storage import checkpoint
from storage.files import read_json, sha256
from storage.pretrained import HUB, INDEX, load_pretrained, select_files
from storage.tokenizer import build_tokenizer
from tools.reference import build_originals, save_originals

TINY = model_config("tiny")
# Small, but with everything the real ones have: four registers, LayerScale, shared keys.
CFG = replace(
    TINY,
    dino=replace(TINY.dino, depth=3, registers=4),
    siglip=replace(TINY.siglip, depth=3),
    llm=replace(TINY.llm, kv_heads=2),
)
LLAMA = replace(CFG, llm=replace(CFG.llm, tied=False, qkv_bias=False))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of small files of each source, the models in them, a Prismatic file's parts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    hub = build_originals(CFG, dino_image_size=160)  # 5 x 5 positions for our 2 x 2
    vlm, llama = build_originals(CFG, CFG.image_size), build_originals(LLAMA, CFG.image_size)
    components = originals.prismatic_components(vlm, CFG, folder / "of-vlm")
    save_originals(hub, folder / "hub")
    save_prismatic(components, folder / "prismatic")
    vla = originals.prismatic_components(llama, LLAMA, folder / "of-llama")
    originals.save_openvla(vla, folder / "openvla")
    save_prismatic(vla, folder / "openvla-prismatic", config="vla")
    actions = slice(LLAMA.llm.first_action_id, LLAMA.llm.first_action_id + BINS)
    with torch.no_grad():  # both forms of openvla-7b count its actions down, we count up
        llm = llama["llm"]
        for table in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            table.weight[actions] = table.weight[actions].flip(0)
    models = {"hub": hub, "prismatic": vlm, "openvla": llama, "openvla-prismatic": llama}
    return folder, models, components


def load(folder, cfg=CFG):
    vlm = VLM(cfg, meta=True).eval()
    return vlm, load_pretrained(vlm, str(folder))


@pytest.mark.parametrize("source", ["hub", "prismatic", "openvla", "openvla-prismatic"])
def test_each_source_gives_the_features_and_logits_of_transformers(source, files):
    folder, models, _ = files
    cfg = LLAMA if "openvla" in source else CFG
    vlm, hashes = load(folder / source, cfg)
    compare(vlm, models[source], cfg, tolerance=1e-5)
    assert len(hashes) == {"hub": 6, "openvla": 4}.get(source, 2)
    assert all(sha256(Path(path)) == value for path, value in hashes.items())


@pytest.mark.parametrize(
    ("source", "new"),
    [("hub", ("latent_queries", "projector")), ("prismatic", ("latent_queries",))],
)
def test_what_no_file_has_keeps_its_initial_value_also_on_the_meta_device(source, new, files):
    folder, _, components = files
    built = VLM(CFG)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    load_pretrained(built, str(folder / source))
    filled, _ = load(folder / source)
    assert all(map(torch.equal, filled.buffers(), built.buffers()))
    for (name, one), other in zip(filled.named_parameters(), built.parameters(), strict=True):
        kept = name.startswith(new)
        assert torch.equal(other, before[name] if kept else one), name
        assert one.requires_grad and one.isfinite().all(), name
    if source == "prismatic":
        written = components["projector"]["projector.2.weight"]
        assert torch.equal(built.projector[2].weight, written)


def test_a_prismatic_file_without_encoders_takes_them_from_folders_beside_it(files, tmp_path):
    folder, models, components = files
    bare = {name: part for name, part in components.items() if name != "vision_backbone"}
    save_prismatic(bare, tmp_path / "bare")
    for name in (DINO, SIGLIP):
        shutil.copytree(folder / "hub" / name, tmp_path / "bare" / name)
    vlm, hashes = load(tmp_path / "bare")
    mixed = models["hub"] | {"llm": models["prismatic"]["llm"]}
    compare(vlm, mixed, CFG, tolerance=1e-5)
    assert len(hashes) == 6


# --- The real files' keys and shapes ---


def test_the_paper_preset_is_filled_exactly_by_the_real_checkpoints_keys_and_shapes(tmp_path):
    vlm = VLM(model_config("paper"), meta=True)
    load_pretrained(vlm, str(save_prismatic(released_components(), tmp_path / "prism")))


def test_the_openvla_preset_is_filled_exactly_by_openvla_7bs_keys_and_shapes(monkeypatch, tmp_path):
    manifest = read_json(Path(__file__).parent / "openvla_manifest.json")["keys"]
    with torch.device("meta"):
        vlm = VLM(model_config("openvla"))
        tensors = {key: torch.empty(shape) for key, shape in manifest.items()}
    # A safetensors file, unlike a Prismatic one, cannot hold meta tensors: 15 GB on the disk.
    monkeypatch.setattr("storage.pretrained.read_tensors", lambda files, headers: tensors)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"norm_stats": {}}')
    assert len(tensors) == 982
    load_pretrained(vlm, str(tmp_path))


# --- Wrong files ---


def edit(path, change):
    """Change a file's tensors, which are named as the file names them, in place."""
    if path.suffix == ".pt":
        components = torch.load(path, weights_only=True)["model"]
        change(components["llm_backbone"])
        torch.save({"model": components}, path)
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


DOWN, POSITIONS = ("llm.layers.2.down.weight", "[192, 512]"), ("vision.dino.pos_embed", "[4, 192]")
SOURCES = {  # file, a key in it, our name and shape
    "prismatic": (STEP, "llm.model.layers.2.mlp.down_proj.weight", *DOWN),
    "openvla": (
        "model-00001-of-00002.safetensors", "vision_backbone.featurizer.pos_embed", *POSITIONS,
    ),
    "hub": (f"{DINO}/model.safetensors", "embeddings.position_embeddings", *POSITIONS),
}  # fmt: skip


@pytest.fixture(params=list(SOURCES))
def damaged(request, files, tmp_path):
    """A copy of a source's folder to be damaged: folder, file, key, our name, our shape, config."""
    folder = shutil.copytree(files[0] / request.param, tmp_path / "copy")
    file, *names = SOURCES[request.param]
    return folder, folder / file, *names, LLAMA if request.param == "openvla" else CFG


def refusal(folder, cfg=CFG):
    with pytest.raises(InputError) as caught:
        load(folder, cfg)
    return str(caught.value)


CHANGES = {  # a change of the tensor `key`, and the refusal
    "removed": (lambda tensors, key: tensors.pop(key), "1 are missing: {name} {shape}"),
    "added": (lambda tensors, key: tensors.update({f"{key}.more": torch.zeros(2)}), ".more [2]"),
    "reshaped": (
        lambda tensors, key: tensors.update({key: torch.zeros(7, 3)}),
        "1 tensors do not fit, 0 are missing: {name}: the file has [7, 3], this model {shape}",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_does_not_fit_is_named_with_its_shape(change, damaged):
    folder, path, key, name, shape, cfg = damaged
    function, words = CHANGES[change]
    edit(path, lambda tensors: function(tensors, key))
    assert words.format(name=name, shape=shape) in refusal(folder, cfg)


def test_a_file_that_was_cut_off_is_named(damaged):
    folder, path, *_, cfg = damaged
    content = path.read_bytes()
    for size in (len(content) // 2, 0):
        path.write_bytes(content[:size])
        assert f"{path}: cut off" in refusal(folder, cfg)


def test_a_missing_file_is_named_or_the_folder_that_lacks_it(damaged):
    folder, path, *_, cfg = damaged
    path.unlink()
    message = refusal(folder, cfg)
    lacking = [f"{each} has " for each in (folder, path.parent)]
    assert any(text in message for text in (*lacking, f"{INDEX} names {path.name}"))


def test_a_prismatic_file_is_refused_whole_when_a_part_of_it_is_foreign(files, tmp_path):
    *_, components = files
    dino = {k: v for k, v in components["vision_backbone"].items() if k.startswith("dino")}
    moments = {"optimizer": {"step": torch.ones(3)}}
    refused = {
        "1 keys that are not of this model: optimizer/step [3]": moments,
        "are missing: vision.siglip.blocks.0.fc1.bias [768]": {"vision_backbone": dino},
        "are missing: llm.embed.weight": {"llm_backbone": {}},
    }
    for i, (message, parts) in enumerate(refused.items()):
        assert message in refusal(save_prismatic(components | parts, tmp_path / str(i)))
    path = save_prismatic({}, tmp_path / "other") / STEP
    for content in ({"model": Path("a foreign object")}, {"weights": {}}, [torch.zeros(3)]):
        torch.save(content, path)
        assert "cut off or in another format" in refusal(tmp_path / "other")


def test_shards_of_an_older_save_are_not_read_and_config_and_index_are_needed(files, tmp_path):
    folder = shutil.copytree(files[0] / "openvla", tmp_path / "openvla")
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in
               load_file(path).items()}  # fmt: skip
    zero = {key: torch.zeros_like(value) for key, value in tensors.items()}
    originals.save_shards(zero, folder, 3)
    originals.save_shards(tensors, folder, 2)  # the newest save, which the index names
    save_file(zero, folder / "model.safetensors")
    vlm, hashes = load(folder, LLAMA)
    compare(vlm, files[1]["openvla"], LLAMA, tolerance=1e-5)
    assert len(hashes) == 4
    (folder / "config.json").unlink()  # which says whether the VLM was trained on actions
    assert f"{folder / 'config.json'}: not there" in refusal(folder, LLAMA)
    (folder / INDEX).unlink()
    assert "is in two files" in refusal(folder, LLAMA)


# --- The hub ---

PRISM = "Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b"


@pytest.fixture
def hub(files, monkeypatch, tmp_path):
    """The hub's repository of PRISM as it is, three steps, for its real client."""
    folder = files[0] / "prismatic"
    names = ["README.md", "config.yaml", "prism-qwen25-x7.jsonl", "run-metrics.jsonl"]
    names += [f"checkpoints/step-{step}-epoch-00-loss=0.6.pt" for step in ("000000", "010396")]
    repository = {name: (folder / name).read_bytes() for name in (STEP, "config.json")}
    with Hub({PRISM: dict.fromkeys(names, b"") | repository}) as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        constants |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield server


def test_of_a_repository_with_three_steps_the_last_alone_is_fetched(hub, files, monkeypatch):
    vlm, hashes = load(PRISM)
    compare(vlm, files[1]["prismatic"], CFG, tolerance=1e-5)
    assert sorted(hub.fetched) == [STEP, "config.json"]
    assert list(hashes) == [f"{PRISM}/config.json", f"{PRISM}/{STEP}"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(PRISM)[1] == hashes  # from the cache

    latest = hub.repositories[PRISM] | {"checkpoints/latest-checkpoint.pt": b""}
    assert select_files(latest, PRISM) == ["config.json", "checkpoints/latest-checkpoint.pt"]


def test_the_three_hub_models_are_read_from_their_repositories_then_from_the_cache(
    hub, files, monkeypatch
):
    names = ("config.json", "model.safetensors")
    for repository in HUB.values():
        folder = files[0] / "hub" / Path(repository).name
        hub.repositories[repository] = {name: (folder / name).read_bytes() for name in names}
    used = [f"{repository}/{name}" for repository in HUB.values() for name in names]
    assert list(load("hub")[1]) == used
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert list(load("hub")[1]) == used and len(hub.fetched) == 6


def test_a_repository_without_weights_is_refused_naming_its_files(hub):
    names = [name for name in hub.repositories[PRISM] if not name.startswith("checkpoints/")]
    hub.repositories[PRISM] = dict.fromkeys(names, b"")
    message = refusal(PRISM)
    assert all(name in message for name in names) and hub.fetched == []


def test_a_gated_repository_is_refused_with_the_command_that_logs_in(hub):
    hub.gated = {PRISM}
    with pytest.raises(InputError, match=r"401 .*hf auth login"):
        load(PRISM)
    with pytest.raises(InputError, match=r"401 .*hf auth login"):
        build_tokenizer(replace(model_config("paper").llm, tokenizer=PRISM))


def test_offline_and_without_a_cache_the_error_says_what_to_do(monkeypatch, tmp_path):
    for name, value in {"OFFLINE": True, "CACHE": str(tmp_path)}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.HF_HUB_{name}", value)
    message = refusal("hub")
    assert message.startswith(f"{HUB['llm']}: not available from the hub")
    assert f"hf download {HUB['llm']} --local-dir DIR/{QWEN}; then --pretrained DIR." in message


# --- From the command line ---


def test_a_checkpoint_records_source_and_sha256_of_the_public_weights(data, files, tmp_path):
    source = files[0] / "prismatic"
    words = "--model.llm.kv-heads 2 --model.dino.depth 3 --model.dino.registers 4 "
    words += f"--model.siglip.depth 3 --pretrained {source}"
    train(data, tmp_path / "stage1", *words.split(), steps=1, lr=1e-9)
    saved = checkpoint.newest(tmp_path / "stage1")
    manifest = checkpoint.read_manifest(saved)
    hashes = {f"{source}/{name}": sha256(source / name) for name in ("config.json", STEP)}
    assert manifest["config"]["pretrained"] == str(source) and manifest["pretrained"] == hashes
    weight = load_file(saved / "model.safetensors")["vlm.vision.dino.blocks.1.qkv.weight"]
    written = files[2]["vision_backbone"]["dino_featurizer.blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(weight, written, rtol=0, atol=1e-6)
