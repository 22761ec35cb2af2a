"""Faults in the apartment, the demonstrations and the weights, on copies of whole ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from files import write_demos
from originals import save_prismatic
from planted import ROOT, fault
from safetensors.torch import load_file, save_file

from config import TINY_MODEL
from data import make_batch, raw_batch
from policy import Policy
from storage import checkpoint
from storage.files import read_json, sha256, write_json
from storage.h5 import Demonstrations
from storage.tokenizer import build_tokenizer, tokenize
from tools.check_files import checkpoint_weights, demonstrations, pretrained_weights
from tools.check_policy import acting
from training.checks import Finding


def write_prismatic(folder: Path, change: Callable[[dict], None] = lambda components: None):
    manifest = json.loads((ROOT / "tests/prismatic_manifest.json").read_text())
    parts = ("projector", "llm_backbone", "vision_backbone")
    components = {
        part: {key: torch.empty(shape, device="meta") for key, shape in manifest[part].items()}
        for part in parts
    }
    change(components)
    save_prismatic(components, folder)


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


# --- Demonstrations ---


@fault("fridge.h5.*truncated", "mv .*fridge.h5.damaged && .* --targets fridge")
def an_h5_that_is_cut_off(plant):
    folder = plant.copy("demos")
    cut(folder / "set_table/close/fridge.h5")
    return demonstrations(folder)


@fault("no fridge.json beside it", "^python data.py download")
def an_h5_without_its_json(plant):
    folder = plant.copy("demos")
    (folder / "set_table/close/fridge.json").unlink()
    return demonstrations(folder)


@fault("fridge.json: not whole", "data.py download")
def a_json_that_is_cut_off(plant):
    folder = plant.copy("demos")
    cut(folder / "set_table/close/fridge.json")
    return demonstrations(folder)


@fault("fridge.json: expected MS-HAB's `episodes`", "data.py download")
def a_json_of_something_else(plant):
    folder = plant.copy("demos")
    (folder / "set_table/close/fridge.json").write_text('{"episodes": [0]}')
    return demonstrations(folder)


@fault("names no subtask", "mkdir -p .*demos-aside && mv .*shut/fridge.h5 .*shut/fridge.json")
def a_file_in_a_wrong_folder(plant):
    folder = plant.copy("demos")
    (folder / "set_table/close").rename(folder / "set_table/shut")
    write_demos(folder / "set_table/close/kitchen_counter")
    return demonstrations(folder)


@fault("no seg in 1 of 2 files: set_table/close/fridge.h5", "collect.py")
def labels_that_are_missing(plant):
    write_demos(plant.copy("demos") / "set_table/close/fridge", labels=False)
    return demonstrations(plant.tmp / "demos")


@fault("fridge.h5: .* of action values clipped to", "^$")
def actions_beyond_the_controllers_bounds(plant):
    with h5py.File(plant.copy("demos") / "set_table/close/fridge.h5", "r+") as file:
        file["traj_0/actions"][3, 12] = 12.5
    return demonstrations(plant.tmp / "demos")


@fault("no .h5 below it", "--data .*/rearrange-dataset$")
def demonstrations_under_another_name(plant):
    plant.copy("demos").rename(plant.tmp / "rearrange-dataset")
    (plant.tmp / "rearrange/task_plans").mkdir(parents=True)
    return demonstrations(plant.tmp / "rearrange")


@fault("kitchen_counter.npy: .*sha256 differs", "mv (.*) .*damaged && python data.py pack .* \\1$")
def a_changed_byte_in_a_pack(plant):
    flip(plant.copy("pack") / "set_table/close/kitchen_counter.npy")
    return demonstrations(plant.tmp / "pack")


@fault("no pack.json", "^python data.py pack")
def a_pack_that_was_not_finished(plant):
    (plant.copy("pack") / "pack.json").unlink()
    return demonstrations(plant.tmp / "pack")


# --- Weights ---


def resealed(folder: Path, **change) -> list[Finding]:
    """Findings on a step whose files were changed, and its manifest with them and in `change`."""
    step = checkpoint.steps_in(folder)[-1]
    manifest = read_json(step / "manifest.json") | change
    manifest["files"] = {name: sha256(step / name) for name in manifest["files"]}
    manifest["sizes"] = {name: (step / name).stat().st_size for name in manifest["files"]}
    write_json(step / "manifest.json", manifest)
    return checkpoint_weights(folder)


@fault("1 tensors: .*qpos", "copy .* again")
def weights_of_another_model(plant):
    file = checkpoint.steps_in(plant.copy("stage1"))[-1] / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "qpos" in key)
    save_file(tensors | {key: tensors[key][:1].clone()}, file)
    return resealed(plant.tmp / "stage1")


@fault("model.safetensors: missing or damaged", "copy .* again")
def a_cut_checkpoint(plant):
    cut(checkpoint.steps_in(plant.copy("stage1"))[-1] / "model.safetensors")
    return checkpoint_weights(plant.tmp / "stage1")


@fault("incomplete|Incomplete", "copy .* again")
def a_cut_checkpoint_with_a_manifest_to_it(plant):
    cut(checkpoint.steps_in(plant.copy("stage1"))[-1] / "model.safetensors")
    return resealed(plant.tmp / "stage1")


@fault("optimizer.safetensors: damaged", "--checkpoint .*step-00000000$")
def a_changed_byte_in_a_checkpoint(plant):
    step = checkpoint.steps_in(plant.copy("stage1"))[-1]
    shutil.copytree(step, step.with_name("step-00000000"))
    flip(step / "optimizer.safetensors")
    return checkpoint_weights(plant.tmp / "stage1")


@fault("no checkpoint", "python train.py --stage 1")
def a_checkpoint_that_is_not_there(plant):
    return checkpoint_weights(plant.tmp / "stage1")


@fault("601 tokens, .*; the action ids begin at 256", "copy .* again")
def a_tokenizer_of_another_checkpoint(plant):
    step = checkpoint.steps_in(plant.copy("stage1"))[-1]
    tokenizer = json.loads((step / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {f"word{i}": i for i in range(600)} | {"<unk>": 599}
    (step / "tokenizer.json").write_text(json.dumps(tokenizer))
    return resealed(plant.tmp / "stage1")


@fault(r"llm.layers.3.*\[4, 4\]", "mv .* && hf download Stanford-ILIAD.*step-020792-.* --local-dir")
def pre_trained_weights_of_another_model(plant):
    def change(components):
        key = "llm.model.layers.3.mlp.down_proj.weight"
        components["llm_backbone"][key] = torch.empty(4, 4, device="meta")

    write_prismatic(plant.tmp / "prism", change)
    return pretrained_weights(str(plant.tmp / "prism"), "paper")


@fault("7b-prismatic: not to be had", "hf download openvla/.* --include .*step-295000-[^*]*$")
def a_repository_that_is_not_in_the_cache(plant):
    return pretrained_weights("openvla/openvla-7b-prismatic", "openvla")


@fault("model.safetensors: cut off", "mv .*0.5B-aside && hf download Qwen/Qwen2.5-0.5B --include")
def a_cut_safetensors(plant):
    file = plant.tmp / "weights/Qwen2.5-0.5B/model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"model.norm.weight": torch.ones(896)}, file)
    cut(file)
    return pretrained_weights(str(plant.tmp / "weights"), "paper")


@fault(r"no token <\|im_start\|>", "hf download .* tokenizer.json")
def a_wrong_tokenizer(plant):
    build_tokenizer(TINY_MODEL.llm).save(str(plant.tmp / "tokenizer.json"))
    return pretrained_weights(str(plant.whole / "prism"), "paper", str(plant.tmp))


# --- A checkpoint beside its data ---


def write_known(policy: Policy, folder: Path) -> None:
    """FOLDER/known: demonstrations of the policy's robot whose actions are those that it takes."""
    for seed, target in enumerate(("fridge", "kitchen_counter")):
        path = write_demos(folder / "known/set_table/close" / target, (9, 8), False, seed, False)
        about = json.loads(path.with_suffix(".json").read_text())
        about |= {key: policy.manifest[key] for key in ("action_schema", "qpos_names")}
        path.with_suffix(".json").write_text(json.dumps(about))
    raw = Demonstrations(shutil.copytree(folder / "known", folder / "pictures"))
    cfg, records = policy.model.cfg, raw.read(np.arange(len(raw)))
    prompts = tokenize(raw.instructions, policy.tokenizer, cfg.llm)
    batch = make_batch(raw_batch(records[:, None]), policy.stats, prompts, cfg)
    actions = policy.stats.denormalize(policy.model.act(batch)[0][:, 0]).numpy()
    for begin, episode in zip(raw.starts, raw.episodes):
        with h5py.File(folder / "known" / episode.file, "r+") as file:
            file[f"{episode.trajectory}/actions"][:] = actions[begin : begin + episode.length]


def beside(plant, **change) -> list[Finding]:
    """Findings on the copy of weights/stage2 in tmp, with `change` in its manifest."""
    resealed(plant.tmp / "stage2", **change)
    return acting(plant.tmp / "stage2", plant.whole / "known", "cpu")


@fault("black and white pictures: equal logits", "pip install -r .*requirements.txt")
def pictures_that_no_longer_reach_the_llm(plant):
    file = checkpoint.steps_in(plant.copy("stage2"))[-1] / "model.safetensors"
    tensors = load_file(file)
    for key in (key for key in tensors if key.startswith("vlm.projector.")):
        tensors[key] *= 0
    save_file(tensors, file)
    return beside(plant)


@fault("slot 0 shoulder_pan_joint: 0.2 to 0.2, 100% of .* outside; expected a width", "--stage 1")
def statistics_without_a_width(plant):
    plant.copy("stage2")
    return beside(plant, action_stats={"low": [0.2] * 13, "high": [0.2] * 13})


@fault("slot 4 .*: 0.9 to 1, .* outside; expected at most 10%", "train.py --stage 1")
def statistics_that_clip_the_actions(plant):
    plant.copy("stage2")
    return beside(plant, action_stats={"low": [0.9] * 13, "high": [1.0] * 13})


@fault("slot 1.name: shoulder_lift_joint here, wrist there", "collect.py")
def a_checkpoint_of_another_robot(plant):
    step = checkpoint.steps_in(plant.copy("stage2"))[-1]
    schema = checkpoint.read_manifest(step)["action_schema"]
    schema[1]["name"] = "wrist"
    return beside(plant, action_schema=schema)


@fault("of the tokens right on .*; expected above the best constant's", "train.py --stage 2")
def demonstrations_that_the_checkpoint_does_not_know(plant):
    plant.copy("stage2")
    return acting(plant.tmp / "stage2", plant.whole / "demos", "cpu")
