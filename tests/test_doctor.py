"""tools/doctor.py names what is missing, with the command that mends it, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import write_demos
from originals import save_prismatic
from safetensors.torch import load_file, save_file

from config import InputError
from data import make_batch, raw_batch
from policy import Policy
from storage.checkpoint import steps_in
from storage.files import read_json, sha256, write_json
from storage.h5 import Demonstrations
from storage.pack import pack
from storage.tokenizer import tokenize
from tools import doctor
from tools.check_policy import check_policy
from train import main
from training.flags import parse

ROOT = Path(__file__).parents[1]
SMI = "NVIDIA H100 80GB HBM3, 550.90.07, 81559 MiB"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Demonstrations, a pack, a checkpoint, Prismatic's file without its numbers, weights/stage2.

    And demonstrations whose actions are those that weights/stage2 takes.
    """
    folder = tmp_path_factory.mktemp("good")
    write_demos(folder / "demos/set_table/pick/013_apple", lengths=(30, 8))
    write_demos(folder / "demos/set_table/close/fridge", lengths=(12, 8), has_object=False)
    pack(str(folder / "demos"), str(folder / "pack"))
    flags = f"--preset tiny --data {folder / 'pack'} --out {folder / 'stage1'} --steps 1 "
    main(parse((flags + "--batch-size 8 --device cpu --val-frames 8").split()))
    write_prismatic(folder / "prism")
    shutil.copytree(ROOT / "weights/stage2", folder / "stage2")
    write_known(Policy.from_checkpoint(folder / "stage2", "cpu"), folder)
    return folder


def write_prismatic(folder: Path, **changed: torch.Tensor):
    """Prismatic's file of the paper's VLM on the meta device, with other tensors of the LLM."""
    manifest = json.loads((ROOT / "tests/prismatic_manifest.json").read_text())
    components = {
        part: {key: torch.empty(shape, device="meta") for key, shape in manifest[part].items()}
        for part in ("projector", "llm_backbone", "vision_backbone")
    }
    components["llm_backbone"] |= changed
    save_prismatic(components, folder)


def write_known(policy: Policy, folder: Path) -> None:
    """FOLDER/known: demonstrations of the policy's robot whose actions the policy takes."""
    for seed, target in enumerate(("fridge", "kitchen_counter")):
        path = write_demos(folder / "known/set_table/close" / target, (9, 8), False, seed, False)
        sidecar = json.loads(path.with_suffix(".json").read_text())
        sidecar |= {key: policy.manifest[key] for key in ("action_schema", "qpos_names")}
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    raw = Demonstrations(shutil.copytree(folder / "known", folder / "images"))
    cfg, records = policy.model.cfg, raw.read(np.arange(len(raw)))
    prompts = tokenize(raw.instructions, policy.tokenizer, cfg.llm)
    batch = make_batch(raw_batch(records[:, None]), policy.stats, prompts, cfg)
    actions = policy.stats.denormalize(policy.model.act(batch)[0][:, 0]).numpy()
    for begin, episode in zip(raw.starts, raw.episodes):
        with h5py.File(folder / "known" / episode.file, "r+") as file:
            file[f"{episode.trajectory}/actions"][:] = actions[begin : begin + episode.length]


class Plant:
    """Copies of good files to damage, and the environment to change."""

    def __init__(self, good: Path, tmp: Path, patch: pytest.MonkeyPatch):
        self.good, self.tmp, self.patch = good, tmp, patch

    def copy(self, name: str) -> Path:
        return shutil.copytree(self.good / name, self.tmp / name)

    def program(self, name: str, output: str) -> None:
        """Put a program before the machine's own."""
        if torch.cuda.is_available():
            pytest.skip("torch finds a GPU here, whatever nvidia-smi says")
        (self.tmp / name).write_text(f'#!/bin/sh\necho "{output}"\n')
        (self.tmp / name).chmod(0o755)
        self.patch.setenv("PATH", f"{self.tmp}:{os.environ['PATH']}")


@pytest.fixture
def plant(good, tmp_path, monkeypatch) -> Plant:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Plant(good, tmp_path, monkeypatch)


FAULTS: dict[str, tuple[Callable, str]] = {}


def fault(words: str):
    """Register a function that plants a fault and runs the check; `words` of its error."""

    def register(function: Callable[[Plant], str]):
        FAULTS[function.__name__] = (function, words)
        return function

    return register


@fault(r"\(3, 14\), expected one of .*make setup PYTHON=python3.11")
def another_python(plant):
    plant.patch.setattr(sys, "version_info", (3, 14, 0))
    return doctor.check_packages()


@fault("einops 0.4.1, expected einops.*: .*pip install -r .*requirements.txt")
def a_wrong_version(plant):
    folder = plant.tmp / "einops-0.4.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: einops\nVersion: 0.4.1\nMetadata-Version: 2.1\n")
    plant.patch.syspath_prepend(plant.tmp)
    return doctor.check_packages()


@fault("teleport none, expected teleport==1.0")
def a_package_that_is_not_installed(plant):
    (plant.tmp / "requirements.txt").write_text("# our own\nnumpy\nteleport==1.0  # none\n")
    return doctor.check_packages(plant.tmp / "requirements.txt")


@fault("finds no GPU; nvidia-smi: NVIDIA H100.*580.*--force-reinstall torch.*CUDA_VISIBLE_DEVICES")
def a_gpu_that_torch_does_not_find(plant):
    plant.program("nvidia-smi", SMI)
    return doctor.check_gpu()


@fault("nvidia-smi: not there.*Without a GPU: --device cpu")
def no_gpu_for_device_cuda(plant):
    plant.program("nvidia-smi", "")
    return doctor.check_gpu("cuda")


@fault("failed to find a rendering device.*Unset .*VK_DRIVER_FILES.*nowhere")
def no_vulkan_driver(plant):
    plant.patch.setenv("VK_DRIVER_FILES", "/nowhere/lvp_icd.json")
    return doctor.check_renderer()


@fault("SAPIEN looks for NVIDIA's Vulkan driver alone.*CAPABILITIES=all.*-gl-.*MIG.*export VK_ICD")
def a_gpu_without_vulkan(plant):
    plant.program("nvidia-smi", SMI)
    return doctor.check_renderer()


@fault("GB free, expected .* GB for --preset paper.*larger disk: df -h")
def a_full_disk(plant):
    usage = shutil.disk_usage(plant.tmp)._replace(free=10**8)
    plant.patch.setattr(shutil, "disk_usage", lambda path: usage)
    return doctor.check_disk(str(plant.tmp / "run"), "train", "paper")


@fault("no .h5 demonstrations below")
def a_folder_without_demonstrations(plant):
    return doctor.check_data(str(plant.tmp))


@fault("fridge.h5.*cannot be read.*Download or record it again")
def an_h5_that_is_cut_off(plant):
    file = plant.copy("demos") / "set_table/close/fridge.h5"
    os.truncate(file, file.stat().st_size // 2)
    return doctor.check_data(str(plant.tmp / "demos"))


@fault("no fridge.json beside it")
def an_h5_without_its_json(plant):
    (plant.copy("demos") / "set_table/close/fridge.json").unlink()
    return doctor.check_data(str(plant.tmp / "demos"))


@fault("traj_1: success is None")
def an_episode_without_success(plant):
    with h5py.File(plant.copy("demos") / "set_table/close/fridge.h5", "r+") as file:
        del file["traj_1/success"]
    return doctor.check_data(str(plant.tmp / "demos"))


@fault(r"llm.layers.3.*\[4, 4\].*Are these all files of --preset")
def pretrained_weights_of_another_model(plant):
    key = "llm.model.layers.3.mlp.down_proj.weight"
    write_prismatic(plant.tmp / "prism", **{key: torch.empty(4, 4, device="meta")})
    return doctor.check_pretrained(str(plant.tmp / "prism"), "paper")


@fault("no undamaged checkpoint there.*python train.py --stage 1")
def a_checkpoint_that_is_not_there(plant):
    return check_policy(plant.tmp / "stage1", device="cpu")


def changed(plant, change=lambda tensors: tensors, **manifest) -> str:
    """Check a copy of weights/stage2 with other tensors and other entries of its manifest."""
    step = steps_in(plant.copy("stage2"))[-1]
    file = step / "model.safetensors"
    save_file(change(load_file(file)), file)
    manifest = read_json(step / "manifest.json") | manifest
    manifest["files"] |= {file.name: sha256(file)}
    manifest["sizes"] = {name: (step / name).stat().st_size for name in manifest["files"]}
    write_json(step / "manifest.json", manifest)
    return check_policy(plant.tmp / "stage2", plant.good / "known", "cpu")


@fault("black and white images: equal logits.*pip install -r requirements.txt")
def images_that_do_not_reach_the_llm(plant):
    def silence(tensors):
        return {k: v * (not k.startswith("vlm.projector.")) for k, v in tensors.items()}

    return changed(plant, silence)


@fault("slot 0 shoulder_pan_joint: 0.2 to 0.2, 100% of .* outside.*--preset tiny --stage 1")
def statistics_without_a_width(plant):
    return changed(plant, action_stats={"low": [0.2] * 13, "high": [0.2] * 13})


@fault("slot 1.name: shoulder_lift_joint here, wrist there")
def a_checkpoint_of_another_robot(plant):
    schema = read_json(steps_in(plant.good / "stage2")[-1] / "manifest.json")["action_schema"]
    schema[1]["name"] = "wrist"
    return changed(plant, action_schema=schema)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_the_command_that_mends_it(name, plant):
    function, words = FAULTS[name]
    with pytest.raises(InputError, match=f"(?s){words}"):
        print(function(plant))


# --- Warnings, and what is in order ---


def test_good_files_pass_and_what_is_known_of_them_is_said(good, plant):
    assert doctor.check_data(str(good / "demos")).startswith("2 files, 58 frames")
    assert "2 files, 58 frames" in doctor.check_data(str(good / "pack"))
    found = check_policy(good / "stage2", good / "known", "cpu")
    assert "black and white images, depths of 0.5 and 2 m, two instructions: each changes" in found
    right, constant = re.search(
        r"(0.9\d+) of the tokens .* 16 of 16 .* constant's (0.\d+)", found
    ).groups()
    assert float(right) > float(constant) and "warning" not in found


def test_warnings_name_missing_labels_clipped_actions_and_unknown_demonstrations(good, plant):
    write_demos(plant.copy("demos") / "set_table/close/fridge", labels=False)
    with h5py.File(plant.tmp / "demos/set_table/pick/013_apple.h5", "r+") as file:
        file["traj_0/actions"][3, 12] = 12.5
    found = doctor.check_data(str(plant.tmp / "demos"))
    assert re.search("warning: set_table/close/fridge.h5 has no .*seg.*collect.py", found)
    assert re.search("warning: .*013_apple.h5: .* of action values clipped to", found)
    for file in Path(shutil.copytree(good / "known", plant.tmp / "known")).rglob("*.h5"):
        with h5py.File(file, "r+") as content:
            for trajectory in content.values():  # the best constant is right everywhere
                trajectory["actions"][:] = 0
    found = check_policy(good / "stage2", plant.tmp / "known", "cpu")
    assert "warning: the policy does not know" in found
    found = changed(plant, action_stats={"low": [0.9] * 13, "high": [1.0] * 13})
    assert re.search("warning: slot 4 .*: 0.9 to 1, .* outside; expected at most 10%", found)


def test_public_weights_that_training_will_fetch_are_not_missing(plant):
    found = doctor.check_pretrained("openvla/openvla-7b-prismatic", "openvla")
    assert "not in the hub's cache yet" in found


def test_a_checkpoint_is_compared_with_demonstrations_that_end_as_in_its_training(good, tmp_path):
    file = write_demos(tmp_path / "set_table/close/fridge", (12, 9), has_object=False)
    with h5py.File(file, "r+") as content:
        content["traj_1/success"][3:] = True
    assert "4 of 4 held-out frames" in check_policy(good / "stage1", tmp_path, "cpu")
    assert "of the tokens right" in check_policy(good / "stage1", good / "pack", "cpu")


def test_a_gpu_that_does_not_draw_is_a_warning(plant):
    plant.patch.setattr(torch.cuda, "is_available", lambda: True)
    plant.patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    plant.patch.setattr(doctor, "run", lambda *command: "drawn by llvmpipe (LLVM 15.0.6)\nwarning")
    assert "warning: NVIDIA H100 does not draw" in doctor.check_renderer()


# --- The program ---


def start_doctor(*flags, program=(sys.executable,), **environment) -> tuple[int, str]:
    done = subprocess.run(
        [*program, "-m", "tools.doctor", *map(str, flags)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_the_program_ends_with_0_where_nothing_is_missing(good, assets, tmp_path):
    flags = ("--for", "eval", "--checkpoint", good / "stage1", "--out", tmp_path / "eval")
    code, output = start_doctor(*flags)
    assert code == 0 and "missing" not in output, output
    for name in ("packages", "checkpoint", "assets", "simulator", "renderer"):
        assert re.search(rf"^ok +{name}", output, re.MULTILINE), output
    assert "shared memory" not in output  # of training


def test_the_program_ends_with_1_and_names_all_that_is_missing(tmp_path):
    planted = {"MS_ASSET_DIR": "", "VK_DRIVER_FILES": "/nowhere.json"}
    code, output = start_doctor("--data", tmp_path, "--preset", "tiny", **planted)
    assert code == 1
    missing = re.findall("^missing +(.{14})", output, re.MULTILINE)
    assert [name.strip() for name in missing] == ["data", "assets", "renderer", "simulator"], output


def test_ranks_under_torchrun_find_each_other_and_a_missing_one_is_named(good, monkeypatch):
    program = (Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node=2")
    flags = ("--for", "train", "--preset", "tiny", "--data", good / "pack", "--device", "cpu")
    code, output = start_doctor(*flags, program=program)
    assert code == 0 and "2 of 2 by gloo" in output and output.count("ok      packages") == 1
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_PORT", 29711)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"rank 0 of 2: .*nc -vz 127.0.0.1 29711.*SOCKET_IFNAME"):
        doctor.check_ranks("cpu", 1.0)


# --- make ---


def test_make_clean_removes_the_runs_and_no_download(tmp_path):
    for name in ("assets/data", "runs/demo", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"assets", "assets/data", "runs", "runs/mine"}


def test_setup_stops_at_a_gpu_without_vulkan_until_the_cpu_is_chosen(plant):
    for name in ("bin", "lib", "pyvenv.cfg"):  # as if installed, in a copy that may be written to
        (plant.tmp / ".venv").mkdir(exist_ok=True)
        (plant.tmp / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    for name in ("requirements.txt", "constraints.txt"):
        (plant.tmp / name).touch()
    (plant.tmp / "tools").symlink_to(ROOT / "tools")
    plant.program("nvidia-smi", "a GPU")
    plant.program("apt-get", "")
    environment = os.environ | {"PYTHON": sys.executable}
    for chosen in ({}, {"VK_ICD_FILENAMES": "/usr/share/vulkan/icd.d/lvp_icd.json"}):
        command = ["bash", plant.tmp / "tools/setup.sh"]
        done = subprocess.run(command, env=environment | chosen, capture_output=True, text=True)
        assert done.returncode == (0 if chosen else 1), done.stderr
        assert ("NVIDIA_DRIVER_CAPABILITIES=all" in done.stderr) == (not chosen), done.stderr
        assert "mesa-vulkan-drivers" not in done.stdout + done.stderr  # SAPIEN would not use it
