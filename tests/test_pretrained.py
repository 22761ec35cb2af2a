"""Public weights load by an explicit map: the manifests fit, features are kept, damage is named."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files import write_demos
from hub_server import Hub
from originals import (
    DINO,
    QWEN,
    SIGLIP,
    STEP,
    compare,
    prismatic_components,
    save_openvla,
    save_prismatic,
    save_shards,
)
from safetensors.torch import load_file, save_file

from config import BINS, InputError, model_config
from model import VLM
from paper import HUB_DATASETS
from storage import checkpoint, pretrained
from storage.download import download
from storage.files import sha256
from storage.pretrained import HUB, INDEX, PretrainedError, download_command, load_pretrained
from storage.tokenizer import build_tokenizer
from tools.reference import build_originals
from train import main
from training.flags import parse

TESTS = Path(__file__).parent
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
    """A small file of each source, and what it was made of."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    hub = build_originals(CFG, dino_image_size=160)  # 5 x 5 positions for our 2 x 2
    vlm, llama = build_originals(CFG, CFG.image_size), build_originals(LLAMA, CFG.image_size)
    components = prismatic_components(vlm, CFG, folder / "of-vlm")
    hub.save(folder / "hub")
    save_prismatic(components, folder / "prismatic")
    vla = prismatic_components(llama, LLAMA, folder / "of-llama")
    save_openvla(vla, folder / "openvla")
    save_prismatic(vla, folder / "openvla-prismatic", config="vla")
    actions = slice(LLAMA.llm.first_action_id, LLAMA.llm.first_action_id + BINS)
    with torch.no_grad():  # both forms of openvla-7b count its actions down, we count up
        for table in (llama.llm.get_input_embeddings(), llama.llm.get_output_embeddings()):
            table.weight[actions] = table.weight[actions].flip(0)
    originals = {"hub": hub, "prismatic": vlm, "openvla": llama, "openvla-prismatic": llama}
    return folder, originals, components


def load(folder, cfg=CFG):
    vlm = VLM(cfg, meta=True).eval()
    return vlm, load_pretrained(vlm, str(folder))


@pytest.mark.parametrize("source", ["hub", "prismatic", "openvla", "openvla-prismatic"])
def test_each_source_gives_the_features_and_logits_of_transformers(source, files):
    folder, originals, _ = files
    cfg = LLAMA if "openvla" in source else CFG
    vlm, hashes = load(folder / source, cfg)
    compare(vlm, originals[source], cfg, tolerance=1e-5)
    names = {
        "hub": [f"{name}/{file}" for name in (QWEN, DINO, SIGLIP)
                for file in ("config.json", "model.safetensors")],
        "prismatic": ["config.json", STEP], "openvla-prismatic": ["config.json", STEP],
        "openvla": ["config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2)), INDEX],
    }  # fmt: skip
    assert list(hashes) == [f"{folder / source}/{name}" for name in names[source]]
    assert all(sha256(Path(path)) == value for path, value in hashes.items())


def test_a_prismatic_file_fills_the_projector_and_keeps_the_latents(files):
    folder, _, components = files
    vlm = VLM(CFG)
    queries = vlm.latent_queries.clone()
    load_pretrained(vlm, str(folder / "prismatic"))
    assert torch.equal(vlm.projector[2].weight, components["projector"]["projector.2.weight"])
    assert torch.equal(vlm.latent_queries, queries)


def test_a_vlm_on_the_meta_device_is_filled_like_one_with_initial_values(files):
    folder, *_ = files
    built = VLM(CFG)
    load_pretrained(built, str(folder / "hub"))
    filled, _ = load(folder / "hub")
    for (name, one), other in zip(filled.named_buffers(), built.buffers(), strict=True):
        assert torch.equal(one, other), name
    for (name, one), other in zip(filled.named_parameters(), built.parameters(), strict=True):
        is_new = name.startswith(("latent_queries", "projector"))
        assert one.requires_grad and one.isfinite().all() and (is_new or torch.equal(one, other)), (
            name
        )


def test_a_prismatic_file_without_encoders_takes_them_from_folders_beside_it(files, tmp_path):
    folder, originals, components = files
    bare = {name: part for name, part in components.items() if name != "vision_backbone"}
    save_prismatic(bare, tmp_path / "bare")
    for name in (DINO, SIGLIP):
        shutil.copytree(folder / "hub" / name, tmp_path / "bare" / name)
    vlm, hashes = load(tmp_path / "bare")
    mixed = replace(originals["hub"], llm=originals["prismatic"].llm)
    compare(vlm, mixed, CFG, tolerance=1e-5)
    assert len(hashes) == 6


# --- The real files' keys and shapes ---


def test_the_paper_preset_is_filled_exactly_by_the_real_checkpoints_keys_and_shapes(tmp_path):
    """The manifest is that of Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b."""
    manifest = json.loads((TESTS / "prismatic_manifest.json").read_text())
    with torch.device("meta"):
        vlm = VLM(model_config("paper"))
        components = {part: {key: torch.empty(shape) for key, shape in manifest[part].items()}
                      for part in ("projector", "llm_backbone", "vision_backbone")}  # fmt: skip
    load_pretrained(vlm, str(save_prismatic(components, tmp_path / "prism")))


def test_the_openvla_preset_is_filled_exactly_by_openvla_7bs_keys_and_shapes(monkeypatch, tmp_path):
    manifest = json.loads((TESTS / "openvla_manifest.json").read_text())["keys"]
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


def refusal(folder, cfg):
    with pytest.raises(PretrainedError) as caught:
        load(folder, cfg)
    return str(caught.value)


def test_a_missing_tensor_is_named_with_its_shape(damaged):
    folder, path, key, name, shape, cfg = damaged
    edit(path, lambda tensors: tensors.pop(key))
    assert f"1 are missing: {name} {shape}" in refusal(folder, cfg)


def test_an_unknown_tensor_is_named_with_its_shape(damaged):
    folder, path, key, *_, cfg = damaged
    edit(path, lambda tensors: tensors.update({f"{key}.surprise": torch.zeros(2)}))
    assert f"{key.split('.')[-1]}.surprise [2]" in refusal(folder, cfg)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(damaged):
    folder, path, key, name, shape, cfg = damaged
    edit(path, lambda tensors: tensors.update({key: torch.zeros(7, 3)}))
    message = refusal(folder, cfg)
    misfit = f"{name}: the file has [7, 3], this model {shape}"
    assert f"1 tensors do not fit, 0 are missing: {misfit}" in message


def test_a_file_that_was_cut_off_is_named(damaged):
    folder, path, *_, cfg = damaged
    content = path.read_bytes()
    for size in (len(content) // 2, 20_000, 0):
        path.write_bytes(content[:size])
        assert f"{path}: cut off" in refusal(folder, cfg)


def test_a_file_that_is_not_there_is_named_or_what_it_should_hold(damaged):
    folder, path, *_, cfg = damaged
    path.unlink()
    message = refusal(folder, cfg)
    lacking = [f"{each}: neither checkpoints/latest" for each in (folder, path.parent)]
    assert any(text in message for text in (*lacking, f"names {path.name}; expected files"))
    assert "it has " in message or INDEX in message


def test_the_parts_of_one_tensor_that_do_not_go_together_are_named(files, tmp_path):
    folder = shutil.copytree(files[0] / "hub", tmp_path / "hub")
    wrong = {"encoder.layer.0.attention.attention.key.weight": torch.zeros(192, 96)}
    edit(folder / DINO / "model.safetensors", lambda tensors: tensors.update(wrong))
    message = refusal(folder, CFG)
    assert "blocks.0.qkv.weight do not go together: [192, 96], [192, 192]" in message


def test_a_prismatic_file_is_refused_whole_when_a_part_of_it_is_foreign(files, tmp_path):
    *_, components = files
    dino = {k: v for k, v in components["vision_backbone"].items() if k.startswith("dino")}
    for i, (content, expected) in enumerate((
        (components | {"optimizer": {"step": torch.zeros(3)}},
         "1 keys that are not of this model: optimizer/step [3]"),
        (components | {"vision_backbone": dino},
         "are missing: vision.siglip.blocks.0.fc1.bias [768]"),
        ({"projector": components["projector"]}, "has no tensors of the llm"),
    )):  # fmt: skip
        assert expected in refusal(save_prismatic(content, tmp_path / str(i)), CFG)
    path = save_prismatic({}, tmp_path / "other") / STEP
    for content in ({"model": Path("a foreign object")}, {"weights": {}}, [torch.zeros(3)]):
        torch.save(content, path)
        assert "cut off or in another format" in refusal(tmp_path / "other", CFG)


def test_shards_of_an_older_save_beside_new_ones_are_not_read(files, tmp_path):
    folder = shutil.copytree(files[0] / "openvla", tmp_path / "openvla")
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in
               load_file(path).items()}  # fmt: skip
    zero = {key: torch.zeros_like(value) for key, value in tensors.items()}
    save_shards(zero, folder, 3)
    save_shards(tensors, folder, 2)  # the newest save, which the index names
    vlm, hashes = load(folder, LLAMA)
    compare(vlm, files[1]["openvla"], LLAMA, tolerance=1e-5)
    assert not any("of-00003" in name for name in hashes)

    save_file(zero, folder / "model.safetensors")
    assert "model.safetensors beside model.safetensors.index.json" in refusal(folder, LLAMA)
    (folder / INDEX).write_text("{}")
    assert f"{folder / INDEX}: names no shards" in refusal(folder, LLAMA)
    (folder / INDEX).unlink()
    assert "is in another file of the folder too" in refusal(folder, LLAMA)


@pytest.mark.parametrize("source", ["prismatic", "openvla"])
def test_a_vlm_of_which_nothing_says_whether_it_was_trained_on_actions_is_refused(
    source, files, tmp_path
):
    folder = shutil.copytree(files[0] / source, tmp_path / "vlm")
    (folder / "config.json").unlink()
    message = refusal(folder, LLAMA if source == "openvla" else CFG)
    assert f"{folder / 'config.json'}: cannot be read" in message


# --- The hub ---

PRISM = "Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b"


@pytest.fixture
def hub(files, monkeypatch, tmp_path):
    """The hub's repository of PRISM as it is, three steps, for its real client."""
    folder, step = files[0] / "prismatic", (files[0] / "prismatic" / STEP).read_bytes()
    older = ("step-000000-epoch-00-loss=9.1.pt", "step-010396-epoch-00-loss=0.6.pt")
    names = ("README.md", "config.yaml", "prism-qwen25-x7.jsonl", "run-metrics.jsonl")
    repository = {f"checkpoints/{name}": b"an older step" for name in older} | {STEP: step}
    repository |= {"config.json": (folder / "config.json").read_bytes()}
    server = Hub({PRISM: dict.fromkeys(names, b"") | repository})
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    given = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    given |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
    for name, value in given.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield server
    server.shutdown()
    server.server_close()


def test_of_a_repository_with_three_steps_the_last_alone_is_fetched(
    hub, files, monkeypatch, tmp_path
):
    vlm, hashes = load(PRISM)
    compare(vlm, files[1]["prismatic"], CFG, tolerance=1e-5)
    assert sorted(hub.fetched) == [STEP, "config.json"]
    assert list(hashes) == [f"{PRISM}/config.json", f"{PRISM}/{STEP}"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(PRISM)[1] == hashes  # from the cache

    latest = hub.repositories[PRISM] | {"checkpoints/latest-checkpoint.pt": b""}
    assert pretrained.select_files(latest, PRISM)[-1] == "checkpoints/latest-checkpoint.pt"


def test_the_command_that_fetches_a_repository_leads_to_a_folder_that_loads(hub, files, tmp_path):
    command = f"{Path(sys.executable).parent}/{download_command(PRISM, tmp_path / 'my prism')}"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    subprocess.run(["bash", "-c", command], env=env, check=True)
    assert sorted(hub.fetched) == [STEP, "config.json"]
    compare(load(tmp_path / "my prism")[0], files[1]["prismatic"], CFG, tolerance=1e-5)


def test_a_repository_without_weights_is_refused_naming_its_files(hub):
    del hub.repositories[PRISM][STEP]
    names = [name for name in hub.repositories[PRISM] if not name.startswith("checkpoints/")]
    hub.repositories[PRISM] = {name: b"" for name in names}
    assert f"{PRISM}: neither checkpoints/latest-checkpoint.pt" in refusal(PRISM, CFG)
    assert all(name in refusal(PRISM, CFG) for name in names) and hub.fetched == []


def test_what_the_hub_gives_to_those_whom_it_knows_names_the_login(hub, tmp_path):
    hub.gated = {PRISM, HUB_DATASETS["set_table"]}
    for ask in (
        lambda: load(PRISM),
        lambda: build_tokenizer(replace(model_config("paper").llm, tokenizer=PRISM)),
        lambda: download(tmp_path / "data", tasks=("set_table",)),
    ):
        with pytest.raises(InputError, match=r"401 .*hf auth login"):
            ask()


# --- From the command line ---


def test_a_checkpoint_records_source_and_sha256_of_the_public_weights(files, tmp_path):
    write_demos(tmp_path / "data/set_table/close/kitchen_counter", lengths=(30, 8))
    flags = (
        f"--preset tiny --pretrained {files[0]}/prismatic --data {tmp_path}/data --steps 1 "
        f"--lr 1e-9 --out {tmp_path}/stage1 --batch-size 8 --device cpu --val-frames 8 "
        "--model.llm.kv-heads 2 --model.dino.depth 3 --model.dino.registers 4 "
        "--model.siglip.depth 3"
    )
    main(parse(flags.split()))
    saved = checkpoint.newest(tmp_path / "stage1")
    manifest, source = checkpoint.read_manifest(saved), files[0] / "prismatic"
    expected = ("config.json", STEP)
    assert manifest["config"]["pretrained"] == str(source)
    assert manifest["pretrained"] == {
        f"{source}/{name}": sha256(source / name) for name in expected
    }
    weight = load_file(saved / "model.safetensors")["vlm.vision.dino.blocks.1.qkv.weight"]
    written = files[2]["vision_backbone"]["dino_featurizer.blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(weight, written, rtol=0, atol=1e-6)


HUB_SCRIPT = """
from test_pretrained import CFG, VLM, load_pretrained
print(*load_pretrained(VLM(CFG), "hub"), sep="\\n")
"""


def python(*args, cache):
    """Run as on a machine without a network, with an own cache of the hub."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *args], cwd=TESTS.parent, env=env, capture_output=True, text=True
    )


def test_offline_the_hub_models_come_from_the_cache(files, tmp_path):
    for name in HUB.values():
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(files[0] / "hub" / Path(name).name, model / "snapshots" / ("0" * 40))
        (model / "refs").mkdir()
        (model / "refs/main").write_text("0" * 40)
    done = python("-c", HUB_SCRIPT, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    files = ("config.json", "model.safetensors")
    assert done.stdout.split() == [f"{name}/{file}" for name in HUB.values() for file in files]


def test_offline_and_without_a_cache_the_error_says_what_to_do(tmp_path):
    write_demos(tmp_path / "data/set_table/close/fridge", lengths=(40, 8))
    flags = f"--preset tiny --pretrained hub --data {tmp_path}/data --out {tmp_path}/out"
    done = python("train.py", *flags.split(), cache=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {HUB['llm']}: not to be had from the hub")
    assert f"hf download {HUB['llm']} --include" in done.stderr and f"DIR/{QWEN}" in done.stderr
