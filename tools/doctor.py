"""Check machine, data and weights before a long run.

    python -m tools.doctor
    python -m tools.doctor --for train --data DATA --pretrained PRISM --out RUN/stage1
    python -m tools.doctor --for eval --checkpoint RUN/stage2
    python -m tools.doctor --checkpoint RUN/stage2 --data PACK  # is the policy sound?
    torchrun --nproc_per_node=8 -m tools.doctor --for train   # do the ranks reach each other?

Each check prints `ok` or `missing` and what it found; for what is missing also the command that
mends it. The exit code is 1 if anything is missing.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from packaging.requirements import Requirement

from config import LABELS, PRESETS, InputError, TrainConfig, model_config, quoted, user_errors
from model import VLM, AuxVLA
from simulation.assets import check_assets
from simulation.plans import check_gpu_physics
from storage.h5 import label_command
from storage.pack import open_data
from storage.pretrained import load_pretrained
from storage.tokenizer import build_tokenizer
from storage.trajectory import remarks
from tools.check_policy import check_policy
from training.memory import check_shared_memory
from training.ranks import join

ROOT = Path(__file__).parents[1]
PYTHONS = ((3, 11), (3, 12))  # mani_skill's mplib has wheels for no other (tools/setup.sh)
PIP = f"{quoted(sys.executable)} -m pip install"
PATIENCE = 180.0  # seconds that a started program may take
WITH_OBJECT = ("pick", "place")  # the other subtasks move a part of the furniture (GAP-8)
RESULTS = 1e9  # bytes of an evaluation's videos, or of some demonstrations


@dataclass(frozen=True)
class Doctor:
    # which programs to check for
    part: Annotated[Literal["all", "train", "eval", "collect"], tyro.conf.arg(name="for")] = "all"
    # as in train.py, eval.py and collect.py; data and weights are checked only if given
    data: str | None = None
    checkpoint: str | None = None
    pretrained: str | None = None
    preset: Literal[tuple(PRESETS)] = "paper"
    out: str = "."
    device: Literal["cpu", "cuda"] | None = None


def run(*command: str) -> str:
    """Return the output of a Python program. Raises InputError with its last line if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8",
            timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(f"python {quoted(*command)}: no answer in {PATIENCE:.0f} s") from None
    output = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise InputError((output.splitlines() or [f"crashed with {done.returncode}"])[-1])
    return output


# --- Software and machine ---


def check_packages(requirements: Path = ROOT / "requirements.txt") -> str:
    """Check Python, requirements.txt, then what the packages require of each other."""
    python = sys.version_info[:2]
    if python not in PYTHONS:
        raise InputError(
            f"Python {python}, expected one of {PYTHONS}: make setup PYTHON=python3.11"
        )
    lines = requirements.read_text(encoding="utf-8").splitlines()
    needs = [
        Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()
    ]
    for need in needs:
        try:
            found = version(need.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not need.specifier.contains(found, prereleases=True):
            raise InputError(
                f"{need.name} {found}, expected {need}: {PIP} -r {quoted(requirements)}"
            )
    try:
        run("-m", "pip", "check")
    except InputError as error:
        raise InputError(f"{error}\nInstall again: {PIP} -r {quoted(requirements)}") from None
    return f"Python {python[0]}.{python[1]}, {len(needs)} packages of {requirements.name}"


def check_gpu(device: str | None = None) -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    smi = ""
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, encoding="utf-8")
        smi = answer.stdout.strip() or answer.stderr.strip()
    if torch.cuda.is_available():
        return f"torch {torch.__version__} uses {torch.cuda.device_count()} GPUs: {smi}"
    if not smi and device != "cuda":
        return "none; everything runs on the CPU"
    raise InputError(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; nvidia-smi: "
        f"{smi or 'not there'}. Expected a driver (for CUDA 13: 580, for 12: 525 or later; "
        f"apt-get install nvidia-driver-580), a torch with CUDA ({PIP} --force-reinstall torch) "
        "and no GPU hidden (unset CUDA_VISIBLE_DEVICES). Without a GPU: --device cpu"
    )


def check_disk(out: str, part: str, preset: str) -> str:
    """Check for room: of training, weights and Adam's two moments in fp32 of all checkpoints."""
    need = RESULTS
    if part in ("all", "train"):
        with torch.device("meta"):
            model = AuxVLA(model_config(preset), flow_head=True)
        copies = TrainConfig.keep + 1  # and the one being written
        need = 12 * copies * sum(parameter.numel() for parameter in model.parameters())
    place = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents)
                 if path.exists())  # fmt: skip
    free = shutil.disk_usage(place).free + sum(f.stat().st_size for f in place.glob("step-*/*"))
    if free < need:
        raise InputError(
            f"{place}: {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB for --preset "
            f"{preset}. Give an --out on a larger disk: df -h"
        )
    return f"{place}: {free / 1e9:.1f} GB free"


def check_loaders(cfg: TrainConfig) -> str:
    check_shared_memory(cfg)
    return f"enough for {cfg.workers} loader processes"


def check_ranks(device: str | None, timeout: float = 10.0) -> str:
    """Under torchrun: sum a number over all ranks (NCCL or gloo)."""
    if "RANK" not in os.environ:
        return "one process; torchrun starts several"
    place = f"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"
    try:
        ranks = join(device, timeout)
        ones = torch.ones(1, device=ranks.device)
        dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=timeout))
        backend = dist.get_backend()
        ranks.leave()
    except (InputError, RuntimeError) as error:
        raise InputError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: {error}. Check the network: "
            f"nc -vz {place}; ip -br address, then export NCCL_SOCKET_IFNAME=NAME "
            "GLOO_SOCKET_IFNAME=NAME on every machine"
        ) from None
    return f"{int(ones)} of {ranks.world} by {backend}, at {place}"


# --- Simulator ---


def check_renderer() -> str:
    """Render one frame with the Vulkan driver that SAPIEN finds."""
    try:
        drawn = re.search("^drawn by .*", run("tools/render_frame.py"), re.MULTILINE)[0]
    except InputError as error:
        chosen = {
            v: os.environ[v] for v in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if v in os.environ
        }
        mend = f"Unset {chosen}" if chosen else "Install Mesa 24.3 or later: make setup"
        raise InputError(f"no frame: {error}. {mend}") from None
    if "llvmpipe" in drawn and torch.cuda.is_available():
        drawn += (
            f"\nwarning: {torch.cuda.get_device_name()} does not draw. See tools/render_frame.py"
        )
    return drawn


def check_simulator() -> str:
    """Import ManiSkill and MS-HAB, and reset one environment."""
    reset = "SubtaskEnv('set_table', 'close', 'kitchen_counter').reset(0)"
    run("-c", f"from simulation.env import SubtaskEnv; {reset}")
    return "an environment was reset"


# --- Data and weights ---


def check_data(folder: str) -> str:
    """Open a pack or MS-HAB's files; read the last frame of each file's first and last episode."""
    data = open_data(folder, None if (Path(folder) / "pack.json").is_file() else True)
    files = [episode.file for episode in data.episodes]
    first = np.unique(files, return_index=True)[1]  # [files]
    last = len(files) - 1 - np.unique(files[::-1], return_index=True)[1]  # [files]
    rows = np.concatenate([first, last])
    has = data.read(data.starts[rows + 1] - 1)["has"]  # [2 files, labels]
    has = has[: len(first)] | has[len(first) :]
    lines = [f"{len(set(files))} files, {len(data):,} frames; one frame of each was read"]
    for note in remarks(data.survey(rows), [files[row] for row in rows]):
        lines.append(f"warning: {note}")
    for row, present in zip(first, has):
        episode = data.episodes[row]
        lacking = [n for n, found in zip(LABELS, present) if not found
                   and (n != "obj" or episode.subtask in WITH_OBJECT)]  # fmt: skip
        if lacking:
            lines.append(
                f"warning: {episode.file} has no {', '.join(lacking)}: its decoder learns nothing "
                f"from the file. Record it again: {label_command(episode, folder)}"
            )
    return "\n".join(lines)


def check_pretrained(name: str, preset: str) -> str:
    """Compare every key and shape of public weights with the preset's model, and the tokenizer."""
    cfg = model_config(preset)
    try:
        with torch.device("meta"):
            load_pretrained(VLM(cfg), name, headers=True)
        build_tokenizer(cfg.llm)
    except InputError as error:
        if not isinstance(error.__cause__, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            raise
        return f"{name}: not in the hub's cache yet, training downloads it"
    return f"{name}: all keys and shapes of --preset {preset}, and its tokenizer"


# --- All of them ---


def choose_checks(cfg: Doctor) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name and function of each check that the part needs."""
    yield "packages", check_packages
    yield "gpu", partial(check_gpu, cfg.device)
    yield "disk", partial(check_disk, cfg.out, cfg.part, cfg.preset)
    if cfg.part in ("all", "train"):
        yield "shared memory", partial(check_loaders, TrainConfig(**PRESETS[cfg.preset]))
        if cfg.pretrained:
            yield "pretrained", partial(check_pretrained, cfg.pretrained, cfg.preset)
    if cfg.data:
        yield "data", partial(check_data, cfg.data)
    if cfg.checkpoint:
        yield "checkpoint", partial(check_policy, cfg.checkpoint, cfg.data, cfg.device)
    if cfg.part != "train":
        yield "assets", check_assets
        yield "renderer", check_renderer
        yield "simulator", check_simulator
        if torch.cuda.is_available():
            yield "gpu physics", check_gpu_physics


def report(name: str, check: Callable[[], str]) -> bool:
    """Run and print a check; return whether something is missing."""
    try:
        state, text = "ok", check()
    except InputError as error:
        state, text = "missing", str(error)
    print(f"{state:8}{name:14} " + text.replace("\n", f"\n{'':23}"), flush=True)
    return state == "missing"


def main(cfg: Doctor) -> int:
    constants.HF_HUB_OFFLINE = True  # nothing is downloaded
    missing = report("ranks", partial(check_ranks, cfg.device))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other ranks only look for each other
        missing += sum(report(*each) for each in choose_checks(cfg))
    return int(missing > 0)


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(tyro.cli(Doctor, description=__doc__)))
