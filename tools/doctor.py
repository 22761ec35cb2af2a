"""What this machine lacks, and the command that mends it, in 15 seconds.

    python -m tools.doctor
    python -m tools.doctor --for train --data DATA --pretrained PRISM --out RUN/stage1
    python -m tools.doctor --for eval --checkpoint RUN/stage2 --out RUN/eval
    python -m tools.doctor --checkpoint RUN/stage2 --data PACK  # is the policy sound?
    torchrun --nproc_per_node=8 -m tools.doctor --for train   # and do the ranks reach each other?

One line per check: ok, warn or missing; what was got, what was expected; below it the command that
mends it. Ends with 0 only if nothing is missing.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import tyro
from huggingface_hub import constants

from config import PRESETS, InputError, TrainConfig, model_config, quoted, user_errors
from model import AuxVLA
from simulation.assets import check_assets
from tools.check_files import checkpoint_weights, demonstrations, pretrained_weights
from tools.check_policy import acting
from training import checks
from training.checks import ROOT, Finding

PATIENCE = 12.0  # seconds for a program that is started
BUSY = "this machine may be busy"  # ends `expected` of a check that had too little time
SETUP = f"rm -f {quoted(ROOT / '.venv/setup-done')} && make -C {quoted(ROOT)} setup"
LAVAPIPE = "/usr/share/vulkan/icd.d/lvp_icd.json"  # Mesa's driver file
# For a machine whose nvidia-smi works and whose Vulkan does not; setup.sh prints it too.
DRAW = (
    "in a container: docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all",
    "on bare metal: apt-get install libnvidia-gl-N, N as of the driver (Debian: nvidia-vulkan-icd)",
    "a MIG slice cannot draw: take a whole GPU",
    f"on the CPU, slowly, in every shell: export VK_ICD_FILENAMES={LAVAPIPE} && {SETUP}",
)
RESULTS = 1e9  # bytes of videos, or of some demonstrations


@dataclass(frozen=True)
class Doctor:
    # the part that is needed
    part: Annotated[Literal["all", "train", "eval", "collect"], tyro.conf.arg(name="for")] = "all"
    # of train.py, eval.py and collect.py; what is not given is not looked at
    data: str | None = None
    checkpoint: str | None = None
    pretrained: str | None = None
    tokenizer: str | None = None  # --model.llm.tokenizer
    preset: Literal[tuple(PRESETS)] = "paper"
    out: str = "."
    device: Literal["cpu", "cuda"] | None = None
    workers: int | None = None  # default: the preset's
    batch_size: int | None = None  # likewise

    def of_preset(self, name: str) -> object:
        given, default = getattr(self, name), getattr(TrainConfig, name)
        return PRESETS[self.preset].get(name, default) if given is None else given


# --- Programs that are started, since they may crash or hang ---


def start(*command: str) -> tuple[int | None, str]:
    """A Python program's exit code, None if it took too long, and its output."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8",
            timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, (done.stdout + done.stderr).strip()


def renderer() -> list[Finding]:
    """One frame, drawn by whatever Vulkan finds."""
    code, output = start("tools/render_frame.py")
    if code is None:
        got, mend = f"no frame after {PATIENCE:.0f} s", "time python tools/render_frame.py"
        return [Finding("warn", "renderer", got, f"one; {BUSY}", mend)]
    if code == 0:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return drawn_findings(output, name)
    return renderer_findings(output, os.environ)


def drawn_findings(output: str, gpu: str | None) -> list[Finding]:
    """What to say of render_frame.py's output: a GPU that torch uses should have drawn."""
    drawn = re.search("^drawn by .*", output, re.MULTILINE)[0]  # SAPIEN's warnings stand beside it
    if gpu is None or "llvmpipe" not in drawn:
        return [Finding("ok", "renderer", drawn)]
    expected = f"by {gpu}, which is many times faster"
    return [Finding("warn", "renderer", drawn, expected, "; ".join(DRAW[:-1]))]


def renderer_findings(output: str, environment: dict[str, str]) -> list[Finding]:
    """Why no frame was drawn, by render_frame.py's output and the environment."""
    got, mend = (output.splitlines() or ["it crashed"])[-1], SETUP
    variables = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
    if names := [each for each in variables if environment.get(each, LAVAPIPE) != LAVAPIPE]:
        got += f"; {names[0]}={environment[names[0]]}"
        mend = f"unset {' '.join(names)}"
    elif "NVIDIA's Vulkan driver alone" in output:
        got += "; SAPIEN looks for NVIDIA's Vulkan driver alone, since nvidia-smi works"
        mend = "; or ".join(DRAW)
    expected = "a frame; Mesa's renderer for the CPU draws one from Mesa 24.3 on"
    return [Finding("missing", "renderer", got, expected, mend)]


def simulator() -> list[Finding]:
    """Do ManiSkill and MS-HAB import here, as eval.py and collect.py do it?"""
    code, output = start("-c", "import simulation.env")
    if code is None:
        got, mend = f"no import after {PATIENCE:.0f} s", "time python -c 'import simulation.env'"
        return [Finding("warn", "simulator", got, f"less; {BUSY}", mend)]
    if code == 0:
        return [Finding("ok", "simulator", "mani_skill and mshab import")]
    reason, libraries = output.splitlines()[-1], ".so" in output
    requirements = quoted(ROOT / "requirements.txt")
    mend = f"{checks.PIP} --force-reinstall -r {requirements}"
    expected = "mani_skill and mshab of requirements.txt"
    return [Finding("missing", "simulator", reason, expected, SETUP if libraries else mend)]


def gpu_physics() -> list[Finding]:
    """What eval.py and collect.py --envs N load."""
    check = "from simulation.episodes import check_gpu_physics as c; print(c(download=False))"
    code, output = start("-c", check)
    state = "ok" if code == 0 else "missing"
    return [Finding(state, "PhysX on a GPU", (output.splitlines() or [""])[-1])]


def apartment() -> list[Finding]:
    """MS_ASSET_DIR's folders, and a sample of its files."""
    try:
        return [Finding("ok", "MS_ASSET_DIR", check_assets())]
    except InputError as error:
        return [Finding("missing", "MS_ASSET_DIR", str(error))]


# --- All of them ---


def free_disk(cfg: Doctor) -> list[Finding]:
    if cfg.part in ("eval", "collect") or (cfg.part == "all" and cfg.checkpoint):
        return checks.disk(cfg.out, RESULTS)
    with torch.device("meta"):
        model = AuxVLA(model_config(cfg.preset), flow_head=True)
    return checks.disk(cfg.out, checks.checkpoint_bytes(model))


def chosen(cfg: Doctor) -> Iterator[Callable[[], list[Finding]]]:
    """The checks of the part, what takes longest last."""
    yield checks.python
    yield checks.packages
    yield partial(checks.gpu, cfg.device)
    yield partial(free_disk, cfg)
    if cfg.part in ("all", "train"):
        yield partial(checks.shared_memory, cfg.of_preset("batch_size"), cfg.of_preset("workers"))
        if cfg.data:
            yield partial(demonstrations, cfg.data)
        if cfg.pretrained:
            yield partial(pretrained_weights, cfg.pretrained, cfg.preset, cfg.tokenizer)
    if cfg.checkpoint and cfg.part != "collect":
        yield partial(checkpoint_weights, cfg.checkpoint)
    if cfg.checkpoint and cfg.data:
        yield partial(acting, cfg.checkpoint, cfg.data, cfg.device)
    if cfg.part != "train":
        yield apartment
        if torch.cuda.is_available():
            yield gpu_physics
        yield simulator
        yield renderer


def main(cfg: Doctor) -> int:
    """Print the findings; 0 unless something is missing. Other ranks only look for each other."""
    began = time.perf_counter()
    found = checks.ranks(cfg.device)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return int(any(each.state == "missing" for each in found))
    print(*found, sep="\n", flush=True)
    with ThreadPoolExecutor(max_workers=16) as pool:
        for future in [pool.submit(check) for check in chosen(cfg)]:
            found += future.result()
            print(*future.result(), sep="\n", flush=True)
    missing = sum(each.state == "missing" for each in found)
    unseen = sum(each.expected.endswith(BUSY) for each in found)
    rest = f", {unseen} not looked at" if unseen else ""
    print(f"{missing or 'nothing'} missing{rest}, {time.perf_counter() - began:.1f} s")
    return int(missing > 0)


if __name__ == "__main__":
    constants.HF_HUB_OFFLINE = True  # it looks, it does not download
    with user_errors():
        sys.exit(main(tyro.cli(Doctor, description=__doc__)))
