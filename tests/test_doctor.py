"""tools/doctor.py names what is missing, with the command that mends it, and nothing else."""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from files import write_demos
from originals import released_components, save_prismatic
from processes import REPOSITORY as ROOT
from processes import run
from safetensors.torch import load_file, save_file
from tiny_run import train

from config import InputError
from storage.checkpoint import steps_in
from storage.files import read_json, sha256, write_json
from storage.pack import pack
from tools import doctor
from tools.doctor import check_policy

TRAINED = ROOT / "weights/stage2"


@pytest.fixture(scope="module")
def good(data) -> Path:
    """The folder of `data`: demos/, pack/ and, from here on, a checkpoint in stage1/."""
    train(data, data.parent / "stage1", steps=1, val_frames=8)
    return data.parent


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(name, output): put a program before the machine's own."""
    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU here, whatever nvidia-smi says")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(name: str, output: str) -> None:
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{output}"\n')
        (tmp_path / name).chmod(0o755)

    return write


@pytest.mark.parametrize(
    "installed, required, words",
    [
        ("einops 0.4.1", "einops>=0.8", "einops>=0.8.*pip install -r .*requirements.txt"),
        ("mplib 0.0.1", "mani_skill", "mplib==0.1.1"),  # what a package requires of another
        ("numpy 2.0", "# ours\nnumpy\nteleport==1.0  # none", "teleport==1.0.*pip install"),
    ],
)
def test_a_wrong_or_missing_package_is_named(installed, required, words, tmp_path, monkeypatch):
    name, version = installed.split()
    about = tmp_path / f"{name}-{version}.dist-info/METADATA"
    about.parent.mkdir()
    about.write_text(f"Name: {name}\nVersion: {version}\nMetadata-Version: 2.1\n")
    (tmp_path / "requirements.txt").write_text(required)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match=words):
        doctor.check_packages(tmp_path / "requirements.txt")


def test_a_gpu_that_torch_does_not_find_is_named(program):
    program("nvidia-smi", "H100, 550.90.07")
    words = "nvidia-smi: H100.*580.*force-reinstall torch.*VISIBLE_DEVICES"
    with pytest.raises(InputError, match=words):
        doctor.check_gpu()
    program("nvidia-smi", "")
    with pytest.raises(InputError, match=r"nvidia-smi: not there.*Without a GPU: --device cpu"):
        doctor.check_gpu("cuda")
    program("nvidia-smi", "H100, 550.90.07")
    assert doctor.check_gpu("cpu").startswith("none")


def test_a_missing_vulkan_driver_is_named(monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere/lvp_icd.json")
    with pytest.raises(InputError, match=r"rendering device.*unset VK_DRIVER_FILES"):
        doctor.check_renderer()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"GB free, expected .* larger disk"):
        doctor.check_disk(str(tmp_path / "run"), "train", "paper")


def test_demonstrations_and_their_pack_are_read(good, tmp_path):
    for name in ("demos", "pack"):
        assert doctor.check_data(str(good / name)).startswith("2 files, 136 frames")
    pack(str(good / "demos"), str(tmp_path / "pack"), truncate_at_success=False)
    assert doctor.check_data(str(tmp_path)).startswith("2 files, 136 frames")


def test_public_weights_of_another_model_are_named_and_absent_ones_are_not(tmp_path, monkeypatch):
    components = released_components()
    key = "llm.model.layers.3.mlp.down_proj.weight"
    components["llm_backbone"][key] = torch.empty(4, 4, device="meta")
    save_prismatic(components, tmp_path)
    with pytest.raises(InputError, match=r"llm.layers.3.*\[4, 4\].*Are these all files"):
        doctor.check_pretrained(str(tmp_path), "paper")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = doctor.check_pretrained("openvla/openvla-7b-prismatic", "openvla")
    assert "not in the hub's cache yet" in found


def check_changed(folder: Path, data: Path, silent: str | None = None, **manifest) -> str:
    """Check a copy of TRAINED with one part's weights at 0 and other entries of its manifest."""
    step = steps_in(shutil.copytree(TRAINED, folder / "stage2"))[-1]
    file = step / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v * (not silent or not k.startswith(silent)) for k, v in tensors.items()}, file)
    manifest = read_json(step / "manifest.json") | manifest
    manifest["files"] |= {file.name: sha256(file)}
    manifest["sizes"] = {name: (step / name).stat().st_size for name in manifest["files"]}
    write_json(step / "manifest.json", manifest)
    return check_policy(folder / "stage2", data, "cpu")


def test_a_fault_of_a_checkpoint_is_named(recorded, tmp_path):
    for stage, start in ((1, "$"), (2, " --init-from .*stage1$")):
        trained = rf"not there; train it: python train.py --stage {stage} --out \S+{start}"
        with pytest.raises(InputError, match=trained):
            check_policy(tmp_path / f"stage{stage}", device="cpu")
    with pytest.raises(InputError, match=r"black and white images: equal logits.*pip install -r"):
        check_changed(tmp_path / "silent", recorded, "vlm.projector.")
    schema = read_json(steps_in(TRAINED)[-1] / "manifest.json")["action_schema"]
    schema[1]["name"] = "wrist"
    with pytest.raises(InputError, match=r"slot 1: .*'wrist'.* has .*'shoulder_lift_joint'"):
        check_changed(tmp_path / "other", recorded, action_schema=schema)
    narrow = {"low": [0.9] * 13, "high": [1.0] * 13}
    found = check_changed(tmp_path / "narrow", recorded, action_stats=narrow)
    assert re.search("warning: action 4: .* outside 0.9 to 1 .*; expected at most 10%", found)


def test_a_policy_that_acts_as_the_data_do_is_told_from_one_that_does_not(recorded, tmp_path):
    found = check_policy(TRAINED, recorded, "cpu")
    assert "black and white images, depths of 0.5 and 2 m, two instructions: each changes" in found
    figures = r"(0.\d+) of the tokens right on (\d+) of \2 .* constant's (0.\d+)"
    right, _, constant = re.search(figures, found).groups()
    assert float(right) > float(constant) and "warning" not in found
    data = shutil.copytree(recorded, tmp_path / "data")
    with h5py.File(data / "set_table/close/kitchen_counter.h5", "r+") as file:
        for trajectory in file.values():  # the best constant is right everywhere
            trajectory["actions"][:] = 0
    assert "warning: the policy does not know" in check_policy(TRAINED, data, "cpu")


def test_a_checkpoint_is_compared_with_demonstrations_that_end_as_in_its_training(good, tmp_path):
    file = write_demos(tmp_path / "set_table/close/fridge", (12, 9), has_object=False)
    with h5py.File(file, "r+") as content:
        content["traj_1/success"][3:] = True
    assert "4 of 4 held-out frames" in check_policy(good / "stage1", tmp_path, "cpu")
    assert "of the tokens right" in check_policy(good / "stage1", good / "pack", "cpu")
    write_demos(tmp_path / "one/set_table/close/fridge", (12,), has_object=False)
    with pytest.raises(InputError, match="one episode in each file, none is held out"):
        check_policy(good / "stage1", tmp_path / "one", "cpu")


def test_the_program_ends_with_0_where_nothing_is_missing(good, assets, tmp_path):
    flags = ("--for", "eval", "--checkpoint", good / "stage1", "--out", tmp_path / "eval")
    output = run("-m", "tools.doctor", *flags)
    assert "missing" not in output
    for name in ("packages", "checkpoint", "assets", "simulator", "renderer"):
        assert re.search(rf"^ok +{name}", output, re.MULTILINE), output


def test_the_program_ends_with_1_and_names_all_that_is_missing(tmp_path):
    planted = {"MS_ASSET_DIR": "", "VK_DRIVER_FILES": "/nowhere.json"}
    output = run("-m", "tools.doctor", "--data", tmp_path, "--preset", "tiny", code=1, **planted)
    missing = re.findall("^missing +(.{14})", output, re.MULTILINE)
    assert [name.strip() for name in missing] == ["data", "assets", "renderer", "simulator"], output


def test_ranks_under_torchrun_find_each_other_and_a_missing_one_is_named(good, monkeypatch):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 -m tools.doctor"
    flags = ("--for", "train", "--preset", "tiny", "--data", good / "pack", "--device", "cpu")
    output = run(*torchrun.split(), *flags)
    assert "2 of 2 by gloo" in output and output.count("ok      packages") == 1
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_PORT", 29711)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match=r"rank 0: .*nc -vz 127.0.0.1 29711.*SOCKET_IFNAME"):
        doctor.check_ranks("cpu", 1.0)


def test_make_clean_removes_the_demo_alone(tmp_path):
    for name in ("assets", "runs/demo", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"assets", "runs", "mine"}


def test_setup_stops_at_a_gpu_without_vulkan_until_the_cpu_is_chosen(program, tmp_path):
    packages = Path(site.getsitepackages()[0]).relative_to(sys.prefix)
    (tmp_path / ".venv" / packages).mkdir(parents=True)
    installed = [f"{packages}/{path.name}" for path in Path(sys.prefix, packages).iterdir()]
    for name in ("bin", "pyvenv.cfg", *installed):  # in a copy that may be written to
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / ".venv" / packages / "auxvla.pth").unlink(missing_ok=True)
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    program("nvidia-smi", "a GPU")
    program("apt-get", "")
    environment = os.environ | {"PYTHON": sys.executable}
    for chosen in ({}, {"VK_ICD_FILENAMES": "/usr/share/vulkan/icd.d/lvp_icd.json"}):
        command = ["bash", tmp_path / "tools/setup.sh"]
        done = subprocess.run(command, env=environment | chosen, capture_output=True, text=True)
        assert done.returncode == (0 if chosen else 1), done.stderr
        assert ("NVIDIA_DRIVER_CAPABILITIES=all" in done.stderr) == (not chosen), done.stderr
        assert "mesa-vulkan-drivers" not in done.stdout + done.stderr  # SAPIEN would not use it
