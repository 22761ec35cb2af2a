"""Check machine, data and weights before a long run.

    python -m tools.doctor
    python -m tools.doctor --for train --data DATA --pretrained PRISM --out RUN/stage1
    python -m tools.doctor --for eval --checkpoint RUN/stage2
    python -m tools.doctor --checkpoint RUN/stage2 --data PACK  # does it act as the data do?
    torchrun --nproc_per_node=8 -m tools.doctor --for train   # do the ranks reach each other?

A line for each check: `ok` or `missing`, what was found, and for what is missing the command that
mends it. The exit code is 1 if anything is missing.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from config import PRESETS, InputError, TrainConfig, model_config, quoted
from data import Frames, make_batch
from model import VLM, AuxVLA, actions_to_bins
from policy import Policy, check_schema
from simulation.assets import check_assets
from storage.pack import open_data
from storage.pretrained import load_pretrained
from storage.terminal import cli, user_errors
from storage.tokenizer import build_tokenizer, tokenize
from training.ranks import autocast, join

ROOT = Path(__file__).parents[1]
PIP = f"{quoted(sys.executable)} -m pip install"
RESET = """from simulation.env import SubtaskEnv
SubtaskEnv('set_table', 'close', 'kitchen_counter').reset(0)
print('an environment was reset')"""
SECONDS = 60.0  # for the predictions on held-out frames
HELD_OUT = 256  # held-out frames, and held-out episodes, at most
EQUAL = 1e-5  # logits that differ by less, relative to the largest, differ by rounding only
CLIPPED = 0.1  # allowed share of a dimension's clipped actions; percentiles clip 0.02 in training
Program = Literal["all", "train", "eval", "collect"]


@dataclass(frozen=True)
class Doctor:
    # the program that is to run
    program: Annotated[Program, tyro.conf.arg(name="for")] = "all"
    # as in train.py, eval.py and collect.py; data and weights are checked only where named
    data: str | None = None
    checkpoint: str | None = None
    pretrained: str | None = None
    preset: Literal[tuple(PRESETS)] = "paper"
    out: str = "."
    device: Literal["cpu", "cuda"] | None = None


def run(*command: str) -> str:
    """Return the output of a Python program. Raises InputError with its last line if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise InputError((output.splitlines() or [f"crashed with {done.returncode}"])[-1])
    return output


# --- Software and machine ---


def check_packages(requirements: Path = ROOT / "requirements.txt") -> str:
    """Check that pip finds requirements.txt installed, with all dependencies."""
    try:
        run("-m", "pip", "install", "--dry-run", "--no-index", "-qr", str(requirements))
    except InputError as error:
        raise InputError(f"{error}. Install: {PIP} -r {quoted(requirements)}") from None
    return f"all of {requirements.name}, for Python {sys.version.split()[0]}"


def check_gpu(device: str | None = None) -> str:
    query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
    smi = subprocess.getoutput(query) if shutil.which("nvidia-smi") else ""
    if torch.cuda.is_available():
        return f"torch {torch.__version__} uses {torch.cuda.device_count()} GPUs: {smi}"
    if device == "cpu" or (device is None and not smi):
        return "none; everything runs on the CPU"
    raise InputError(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; nvidia-smi: "
        f"{smi or 'not there'}. Expected a driver (for CUDA 13: 580, for 12: 525 or later), a "
        f"torch with CUDA ({PIP} --force-reinstall torch) and no GPU hidden (unset "
        "CUDA_VISIBLE_DEVICES). Without a GPU: --device cpu"
    )


def check_disk(out: str, program: str, preset: str) -> str:
    """Check for room: in training, fp32 weights and Adam's two moments of all checkpoints."""
    need = 1  # GB of an evaluation's films, or of some demonstrations
    if program in ("all", "train"):
        with torch.device("meta"):
            model = AuxVLA(model_config(preset), flow_head=True)
        copies = TrainConfig.keep + 1  # and the one being written
        need = 12e-9 * copies * sum(each.numel() for each in model.parameters())
    path = Path(out).absolute()
    place = next(each for each in (path, *path.parents) if each.exists())
    free = shutil.disk_usage(place).free + sum(f.stat().st_size for f in path.glob("step-*/*"))
    found = f"{place}: {free / 1e9:.1f} GB free"
    if free < 1e9 * need:
        raise InputError(f"{found}, expected {need:.0f} GB ({preset}): give --out a larger disk")
    return found


def check_ranks(device: str | None, timeout: float = 10.0) -> str:
    """Under torchrun: sum a number over all ranks (NCCL or gloo)."""
    if "RANK" not in os.environ:
        return "one process; torchrun starts several"
    place = "{MASTER_ADDR} {MASTER_PORT}".format_map(os.environ)
    try:
        ranks = join(device, timeout)
        ones = torch.ones(1, device=ranks.device)
        dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=timeout))
        backend = dist.get_backend()
        ranks.leave()
    except (InputError, RuntimeError) as error:
        raise InputError(
            f"rank {os.environ['RANK']}: {error}. Check the network: nc -vz {place}; ip -br "
            "address, then export NCCL_SOCKET_IFNAME=NAME GLOO_SOCKET_IFNAME=NAME on every machine"
        ) from None
    return f"{int(ones)} of {ranks.world} by {backend}, at {place}"


# --- Simulator ---


def check_renderer() -> str:
    """Render one frame with the Vulkan driver that SAPIEN finds."""
    try:
        return re.search("^drawn by .*", run("tools/render_frame.py"), re.MULTILINE)[0]
    except InputError as error:
        raise InputError(
            f"no frame: {error}. Install Mesa 24.3 or later: make setup; or, if you chose another "
            "driver: unset VK_DRIVER_FILES VK_ICD_FILENAMES"
        ) from None


# --- Data and public weights ---


def check_data(folder: str) -> str:
    """Open a pack or MS-HAB's files; read all labels, and the last frame of each file."""
    packed = any((Path(folder) / name).is_file() for name in ("pack.json", "pack/pack.json"))
    data = open_data(folder, None if packed else True)
    last = {episode.file: row for row, episode in enumerate(data.episodes)}
    data.survey(np.arange(len(data.episodes)))
    data.read(data.starts[np.array([*last.values()]) + 1] - 1)
    return f"{len(last)} files, {len(data):,} frames; read: labels, the last frame of each file"


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


# --- A checkpoint, alone or beside data ---


def check_policy(path: str, data: str | None = None, device: str | None = None) -> str:
    """Load a checkpoint as the robot does; with data, compare what the policy knows and does."""
    policy = Policy.from_checkpoint(path, device)  # verifies every sha256
    manifest, cfg = policy.manifest, policy.model.cfg
    line = f"{path}: stage {manifest['stage']}, step {manifest['step']}; it loads"
    if data is None:
        return line
    defaults = {"val_episodes": TrainConfig.val_episodes, "tasks": (), "subtasks": ()}
    share, *only = [manifest["config"].get(key, value) for key, value in defaults.items()]
    source = open_data(data, manifest.get("data", {}).get("truncated_at_success"))
    frames = Frames(source, share, False, cfg.history, *only)
    if not len(frames):
        raise InputError(f"{data}: one episode in each file, none is held out: record more of them")
    texts = [*source.instructions, *manifest["instructions"]]
    prompts = [each.to(policy.device) for each in tokenize(texts, policy.tokenizer, cfg.llm)]

    def predict(raw: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of the 13 tokens [B, 13, bins] and the recorded tokens [B, 13]."""
        batch = make_batch(raw, policy.stats, prompts, cfg)
        logits = policy.model.teacher_forced(batch)[0].cpu()
        return logits, actions_to_bins(batch["actions"][:, 0]).cpu()

    if source.action_schema:  # collect.py's files name their actions and joints
        check_schema(source, manifest)
    with torch.no_grad(), autocast(policy.device):
        inputs, tokens = compare_inputs(policy, frames, predict), compare_tokens(frames, predict)
    return "\n".join([line, *compare_statistics(policy, frames), inputs, *tokens])


def compare_statistics(policy: Policy, frames: Frames) -> list[str]:
    """Check that the held-out actions lie within the bounds of the checkpoint's statistics."""
    actions = frames.source.actions_of(frames.episode_ids[:HELD_OUT])  # [n, 13]
    low, high = np.array(policy.stats.low), np.array(policy.stats.high)  # [13]
    outside = ((actions < low - 1e-6) | (actions > high + 1e-6)).mean(0)  # [13]
    return [f"action statistics: at most {outside.max():.1%} clipped in a dimension"] + [
        f"warning: action {slot}: {outside[slot]:.0%} of held-out actions lie outside "
        f"{low[slot]:.3g} to {high[slot]:.3g} and are clipped; expected at most {CLIPPED:.0%}"
        for slot in np.flatnonzero(outside > CLIPPED)
    ]


def compare_inputs(policy: Policy, frames: Frames, predict: Callable) -> str:
    """Check that images, depth and instruction change the logits of the action tokens."""
    raw = frames[np.array([0])]
    # The prompts are those of the data, then those of the checkpoint.
    prompt = torch.full_like(raw["instruction"], len(frames.source.instructions))
    raw |= {"rgb": raw["rgb"] * 0, "depth": raw["depth"] * 0 + 500, "instruction": prompt}
    changes = {"black and white images": {"rgb": raw["rgb"] + 255}}
    if policy.model.cfg.depth:
        changes["depths of 0.5 and 2 m"] = {"depth": raw["depth"] * 4}
    if len(policy.manifest["instructions"]) > 1:
        changes["two instructions"] = {"instruction": prompt + 1}
    logits, _ = predict(raw)
    for name, change in changes.items():
        difference = (predict(raw | change)[0] - logits).abs().max().item()
        if difference <= EQUAL * logits.abs().max().item():
            raise InputError(
                f"{name}: equal logits, expected different ones. A library may ignore the input "
                "(openvla issue 346): pip install -r requirements.txt"
            )
    return f"{', '.join(changes)}: each changes the logits"


def compare_tokens(frames: Frames, predict: Callable) -> list[str]:
    """Compare held-out action tokens with the best constant's, as many as SECONDS allow."""
    rows = np.random.default_rng(0).permutation(len(frames))[:HELD_OUT]
    parts, deadline = [], time.monotonic() + SECONDS
    for some in np.array_split(rows, -(-len(rows) // 8)):
        logits, recorded = predict(frames[some])
        parts.append(torch.stack([logits.argmax(-1), recorded]))
        if time.monotonic() > deadline:
            break
    bins, recorded = torch.cat(parts, dim=1)  # [n, 13]
    accuracy = (bins == recorded).float().mean().item()
    constant = (recorded.mode(dim=0).values == recorded).float().mean().item()
    figures = f"{accuracy:.3f} of the tokens right on {len(bins)} of {len(frames)} held-out frames"
    lines = [f"{figures}, the best constant's {constant:.3f}"]
    if accuracy <= constant:
        lines.append("warning: the policy does not know these data: train longer, on them")
    return lines


# --- All of them ---


def choose_checks(cfg: Doctor) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name and function of each check that the program needs."""
    yield "packages", check_packages
    yield "gpu", partial(check_gpu, cfg.device)
    yield "disk", partial(check_disk, cfg.out, cfg.program, cfg.preset)
    if cfg.pretrained:
        yield "pretrained", partial(check_pretrained, cfg.pretrained, cfg.preset)
    if cfg.data:
        yield "data", partial(check_data, cfg.data)
    if cfg.checkpoint:
        yield "checkpoint", partial(check_policy, cfg.checkpoint, cfg.data, cfg.device)
    if cfg.program != "train":
        yield "assets", check_assets
        yield "renderer", check_renderer
        yield "simulator", partial(run, "-c", RESET)


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
        sys.exit(main(cli(Doctor, description=__doc__)))
