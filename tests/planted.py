"""Faults for tools/doctor.py to find, planted for real wherever one machine can have them.

Here those of software and machine; planted_files.py has those of files.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tools import doctor
from training import checks
from training.checks import Finding

ROOT = Path(__file__).parents[1]
NO_DEVICE = "RuntimeError: failed to find a rendering device"
SMI = "NVIDIA H100 80GB HBM3, {}.90.07, 81559 MiB"
LIBRARY = next(Path(sysconfig.get_path("purelib")).glob("sapien/vulkan_library/libvulkan.so*"))


class Plant:
    """Copies of whole things to be damaged, and the environment to be changed."""

    def __init__(self, whole: Path, apartment: Path, tmp_path: Path, monkeypatch, request):
        self.whole, self.apartment, self.tmp = whole, apartment, tmp_path
        self.patch, self.request = monkeypatch, request

    def copy(self, name: str) -> Path:
        return shutil.copytree(self.whole / name, self.tmp / name)

    def assets(self) -> Path:
        return shutil.copytree(self.apartment, self.tmp / "my assets")

    def package(self, name: str, version: str, *lines: str) -> None:
        """Metadata of a package that Python finds before the installed one's."""
        folder = self.tmp / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        text = [f"Name: {name}", f"Version: {version}", "Metadata-Version: 2.1", *lines]
        (folder / "METADATA").write_text("\n".join(text) + "\n")
        self.patch.syspath_prepend(self.tmp / "site")


def elsewhere(check: str, **environment: str) -> list[Finding]:
    """What a check finds in a process of its own."""
    script = "from sapien import physx; from training import checks; "
    script += f"print([vars(each) for each in {check}])"
    output = subprocess.check_output(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | environment, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return [Finding(**each) for each in literal_eval(output.splitlines()[-1])]


FAULTS: dict[str, tuple] = {}


def fault(got: str, mend: str):
    """A function that plants a fault and returns the findings; what they say and what mends it."""

    def register(function: Callable[[Plant], list[Finding]]):
        FAULTS[function.__name__] = (function, got, mend)
        return function

    return register


# --- Software ---


@fault("3.14.0", "make setup PYTHON=python3.11")
def another_Python(plant):
    """Planted as a number: there is one Python here."""
    return checks.python((3, 14, 0))


@fault("einops 0.4.1", "pip install -r .*requirements.txt")
def a_wrong_version(plant):
    plant.package("einops", "0.4.1")
    return checks.packages(deep=False)


@fault("teleport is not installed", "pip install -r")
def a_package_that_is_not_there(plant):
    lines = (ROOT / "requirements.txt").read_text() + "teleport==1.0\n"
    (plant.tmp / "requirements.txt").write_text(lines)
    return checks.packages(requirements=plant.tmp / "requirements.txt")


@fault(r"numpy 2.*numpy<2 \(h5py 3.99\)", "'numpy<2'")
def two_packages_that_do_not_go_together(plant):
    plant.package("h5py", "3.99", "Requires-Dist: numpy<2")
    return checks.packages()


@fault("No module named 'mshab.envs'", "pip install --force")
def another_package_named_mshab(plant):
    (plant.tmp / "site/mshab").mkdir(parents=True)
    (plant.tmp / "site/mshab/__init__.py").touch()
    plant.patch.setenv("PYTHONPATH", str(plant.tmp / "site"))
    plant.patch.setattr(doctor, "PATIENCE", 60)
    return doctor.simulator()


# --- GPU and renderer ---


def program(plant: Plant, name: str, output: str) -> None:
    """A program that is found before the machine's own; it notes that it ran."""
    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU here, whatever nvidia-smi says")
    script = f"#!/bin/sh\necho '{name}' $* >> '{plant.tmp}/ran'\necho \"{output}\"\n"
    (plant.tmp / name).write_text(script)
    (plant.tmp / name).chmod(0o755)
    if str(plant.tmp) not in os.environ["PATH"]:
        plant.patch.setenv("PATH", f"{plant.tmp}:{os.environ['PATH']}")


def fake_smi(plant: Plant, text: str) -> list[Finding]:
    program(plant, "nvidia-smi", text)
    return checks.gpu()


@fault("H100", "pip install --force-reinstall torch==")
def a_torch_without_CUDA_beside_a_GPU(plant):
    """nvidia-smi is a script that answers as the real one; so is the next one's."""
    plant.patch.setattr(torch.version, "cuda", None)
    return fake_smi(plant, SMI.format(580))


@fault("couldn't communicate", "nvidia-driver")
def a_driver_that_does_not_answer(plant):
    return fake_smi(plant, "NVIDIA-SMI has failed because it couldn't communicate with the driver.")


@fault("CUDA 13.0.*550.90.*driver 580", "nvidia-driver-580  # or .*torch==2.13.0 .*CUDA 12.6")
def a_driver_too_old_for_torchs_CUDA(plant):
    """Planted as nvidia-smi's line: it takes a GPU to have a driver."""
    return checks.cuda_findings(SMI.format(550), "2.13.0", "13.0", usable=0, device=None)


@fault("finds no GPU", "unset CUDA_VISIBLE_DEVICES")
def a_hidden_GPU(plant):
    """Planted likewise."""
    return checks.cuda_findings(SMI.format(580), "2.13.0", "13.0", usable=0, device=None)


@fault("no GPU", "--device cpu")
def no_GPU_for_device_cuda(plant):
    return checks.cuda_findings("", "2.13.0+cpu", None, usable=0, device="cuda")


@fault(f"{NO_DEVICE}; VK_DRIVER_FILES=/nowhere", "unset VK_DRIVER_FILES")
def no_Vulkan_driver(plant):
    plant.patch.setenv("VK_DRIVER_FILES", "/nowhere/lvp_icd.json")
    return doctor.renderer()


@fault(f"{NO_DEVICE}; VK_ICD_FILENAMES=/", "unset VK_ICD_FILENAMES")
def a_Vulkan_driver_whose_library_is_gone(plant):
    icd = {"library_path": "/nowhere/libvulkan_lvp.so", "api_version": "1.4.305"}
    path = plant.tmp / "icd.json"
    path.write_text(json.dumps({"ICD": icd, "file_format_version": "1.0.1"}))
    plant.patch.setenv("VK_ICD_FILENAMES", str(path))
    return doctor.renderer()


@fault("ErrorFeatureNotPresent.*Mesa 24.3", "make -C .* setup")
def an_old_Mesa(plant):
    """Planted as what Mesa 22.3.6 answers."""
    return doctor.renderer_findings("RuntimeError: createDeviceUnique: ErrorFeatureNotPresent", {})


@fault("^drawn by llvmpipe.*expected .*H100", "NVIDIA_DRIVER_CAPABILITIES=all")
def a_GPU_that_does_not_draw(plant):
    """Planted as what render_frame.py prints, beside the name that torch would give."""
    output = "drawn by llvmpipe (LLVM 15.0.6, 256 bits)\nUserWarning: Failed to find glvnd\n  warn("
    return doctor.drawn_findings(output, "NVIDIA H100")


@fault(f"{NO_DEVICE}; SAPIEN looks for NVIDIA", "CAPABILITIES=all; .*-gl-.* MIG.* export")
def a_GPU_without_Vulkan(plant):
    """Its nvidia-smi is planted; SAPIEN then really looks for no other driver."""
    program(plant, "nvidia-smi", SMI.format(580))
    return doctor.renderer()


@fault(NO_DEVICE, "^rm -f .*make .* setup$")
def a_CPU_that_is_to_draw_beside_a_GPU_and_has_no_Mesa(plant):
    """Planted as SAPIEN's output: without the variable, it would be the fault before."""
    return doctor.renderer_findings(NO_DEVICE, {"VK_ICD_FILENAMES": doctor.LAVAPIPE})


# --- Disk and memory ---


@fault("MB free; expected 0.1 GB", "larger disk")
def a_full_disk(plant):
    return checks.disk(plant.request.getfixturevalue("small_disk") / "run", 1e8)


@fault("Read-only file system|Permission denied", "chmod u\\+w")
def a_read_only_folder(plant):
    if os.geteuid() == 0:  # whom permissions do not stop
        folder = plant.request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    else:
        folder = plant.tmp
        folder.chmod(0o500)
    return checks.disk(folder / "run/eval", 1)


@fault("2.1 MB; expected 43.1 MB for 4", "mount -o remount,size=1g|--shm-size")
def a_small_dev_shm(plant):
    return checks.shared_memory(32, 4, folder=str(plant.request.getfixturevalue("small_disk")))


# --- Ranks ---


def lonely(rank: int) -> list[Finding]:
    """What one of two ranks finds when the other never starts."""
    place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                 MASTER_PORT="29711")  # fmt: skip
    return elsewhere("checks.ranks('cpu', 1.0)", **place)


@fault("rank 0, .*; expected 2 ranks within 1 s", "nc -vz 127.0.0.1 29711")
def a_rank_that_never_comes(plant):
    return lonely(0)


@fault("rank 1, .*29711.*expected 2 ranks", "NCCL_SOCKET_IFNAME")
def a_main_rank_that_nobody_reaches(plant):
    return lonely(1)
