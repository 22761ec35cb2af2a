"""What a run needs, looked at before it starts: each check is a function that returns findings.

    require(packages(), disk(out, checkpoint_bytes(model)))  # InputError if anything is missing

Here are software and machine; files are in check_files.py and check_assets.py. No check loads
weights or imports the simulator. tools/doctor.py prints them all.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import nn

from config import HISTORY, InputError, TrainConfig, quoted
from storage.trajectory import RECORD
from training.ranks import join

ROOT = Path(__file__).parents[1]
PYTHONS = ((3, 11), (3, 12))  # mani_skill's mplib has wheels for no other (tools/setup.sh)
# The oldest NVIDIA driver for what torch was built with (CUDA's compatibility table).
DRIVERS = {"11": 450, "12": 525, "13": 580}
PIP = f"{quoted(sys.executable)} -m pip install"


@dataclass(frozen=True)
class Finding:
    state: Literal["ok", "warn", "missing"]
    what: str
    got: str
    expected: str = ""
    mend: str = ""  # a command

    def __str__(self) -> str:
        line = f"{self.state:8}{self.what:19} {self.got}"
        line += f"; expected {self.expected}" if self.expected else ""
        return line + (f"\n{'':8}{'':20}mend: {self.mend}" if self.mend else "")


def brief(error: Exception) -> str:
    """An error's first sentence; what mends it is said apart."""
    sentence = str(error).splitlines()[0].partition(". ")[0]
    return sentence + ")" * (sentence.count("(") - sentence.count(")"))


def require(*findings: list[Finding]) -> None:
    """Raise InputError, saying all that is missing and what mends it."""
    if lacking := [each for found in findings for each in found if each.state == "missing"]:
        raise InputError("\n".join(["this run lacks something:", *map(str, lacking)]))


# --- Software ---


def python(version: tuple[int, ...] = sys.version_info) -> list[Finding]:
    state = "ok" if tuple(version[:2]) in PYTHONS else "missing"
    got = ".".join(map(str, version[:3]))
    if state == "ok":
        return [Finding(state, "python", got)]
    return [Finding(state, "python", got, "3.11 or 3.12", "make setup PYTHON=python3.11")]


def packages(deep: bool = True, requirements: Path = ROOT / "requirements.txt") -> list[Finding]:
    """requirements.txt and, if `deep`, what each of its packages requires in turn."""
    lines = [line for line in requirements.read_text(encoding="utf-8").splitlines() if line.strip()]
    waiting, found = [(Requirement(line), requirements.name) for line in lines], []
    seen, followed = {}, set()
    while waiting:
        need, by = waiting.pop()
        if need.name not in seen:
            seen[need.name] = of(need.name)
        version, requires = seen[need.name]
        if version is None or not need.specifier.contains(version, prereleases=True):
            got = f"{need.name} {version or 'is not installed'}"
            mend = f"{PIP} -r {quoted(requirements)}"
            if by != requirements.name:
                mend += f" '{need.name}{need.specifier}'"
            found.append(Finding("missing", "packages", got, f"{need} ({by})", mend))
        extras = need.extras or {""}
        for text in requires if deep and (need.name, *extras) not in followed else ():
            part = Requirement(text)
            if not part.marker or any(part.marker.evaluate({"extra": e}) for e in extras):
                waiting.append((part, f"{need.name} {version}"))
        followed.add((need.name, *extras))
    got = f"{len(lines)} of {requirements.name}"
    got += f", {len(seen)} with all that they require" if deep else ""
    return found or [Finding("ok", "packages", got)]


def of(name: str) -> tuple[str | None, list[str]]:
    """The version of an installed package, and what it requires."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None, []
    return found.version, found.requires or []


# --- Machine ---


def gpu(device: str | None = None) -> list[Finding]:
    """The GPUs, the driver, and whether torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    output = ""
    if shutil.which(query[0]):
        answer = subprocess.run(query, capture_output=True, encoding="utf-8")
        output = answer.stdout.strip() or answer.stderr.strip()
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return cuda_findings(output, torch.__version__, torch.version.cuda, usable, device)


def cuda_findings(
    smi: str, version: str, cuda: str | None, usable: int, device: str | None
) -> list[Finding]:
    """What to say of nvidia-smi's lines (name, driver, memory), torch and its CUDA."""
    if usable:
        return [Finding("ok", "gpu", f"{usable} usable by torch {version}; {smi}")]
    if not smi:
        got, expected = "no GPU, torch runs on the CPU", "a GPU, for --device cuda"
        if device != "cuda":
            return [Finding("ok", "gpu", got)]
        return [Finding("missing", "gpu", got, expected, "the same command with --device cpu")]
    wheel, _, _ = version.partition("+")
    reinstall = f"{PIP} --force-reinstall torch=={wheel}"
    driver = re.search(r", (\d+)\.[\d.]+,", smi)
    if driver is None:
        mend = "sudo modprobe nvidia || sudo apt-get install --reinstall nvidia-driver-580"
        return [Finding("missing", "gpu", f"nvidia-smi says: {smi}", "a working driver", mend)]
    if cuda is None:
        expected = "a torch that was built with CUDA"
        return [Finding("missing", "gpu", f"torch {version}; {smi}", expected, reinstall)]
    got, least = f"torch {version} (CUDA {cuda}) finds no GPU; {smi}", DRIVERS[cuda.split(".")[0]]
    if int(driver[1]) >= least:
        expected, mend = "CUDA_VISIBLE_DEVICES that names one", "unset CUDA_VISIBLE_DEVICES"
    else:
        expected, mend = f"driver {least} or later", "sudo apt-get install nvidia-driver-580"
        if int(driver[1]) >= DRIVERS["12"]:
            mend += f"  # or {reinstall} from torch's own index for CUDA 12.6"
    return [Finding("missing", "gpu", got, expected, mend)]


def size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def disk(out: str | Path, need: float) -> list[Finding]:
    """May `out` be written to, and are `need` bytes free? Checkpoints in it count as free."""
    out = Path(out).absolute()
    place = next(path for path in (out, *out.parents) if path.exists())
    if not place.is_dir():
        mend = f"--out {quoted(f'{place}-out')}"
        return [Finding("missing", "--out", f"{place}: a file", "a folder", mend)]
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        expected = "a folder that may be written to"
        mend = f"chmod u+w {quoted(place)}  # or another --out"
        return [Finding("missing", "--out", f"{place}: {error.strerror}", expected, mend)]
    held = sum(path.stat().st_size for path in out.glob("step-*/*"))
    got = f"{place}: {size(shutil.disk_usage(place).free)} free"
    if shutil.disk_usage(place).free + held >= need:
        return [Finding("ok", "--out", got)]
    mend = f"df -h  # for an --out on a larger disk; du -xsh {quoted(place)}/* says what is here"
    return [Finding("missing", "--out", got, f"{size(need)}", mend)]


def checkpoint_bytes(model: nn.Module, keep: int = TrainConfig.keep) -> float:
    """Weights and Adam's two moments in fp32: the kept, the best and the one that is written."""
    all_of_it = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return (4 * all_of_it + 8 * trained) * (keep + 2)


def shared_memory(
    batch_size: int, workers: int, history: str = "none", folder: str = "/dev/shm"
) -> list[Finding]:
    """Room for the frames that all loader processes keep ready, two batches each."""
    pictures = sum(RECORD[name].itemsize for name in ("rgb", "depth"))
    frame = RECORD.itemsize + (HISTORY * pictures if history == "frames" else 0)
    total, need = shutil.disk_usage(folder).total, 2 * workers * batch_size * frame
    if total >= need:
        return [Finding("ok", folder, size(total))]
    least = f"{-(-need // 2**30)}g"
    mend = f"mount -o remount,size={least} {quoted(folder)}"
    mend += f" (or docker run --shm-size={least}); --workers 0"
    expected = f"{size(need)} for {workers} loader processes"
    return [Finding("missing", folder, size(total), expected, mend)]


def ranks(device: str | None, timeout: float = 10.0) -> list[Finding]:
    """Under torchrun: do all ranks come, and does a sum over them (NCCL or gloo) arrive?"""
    if "RANK" not in os.environ:
        return [Finding("ok", "ranks", "one process; start with torchrun to look for others")]
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    place = f"{os.environ.get('MASTER_ADDR')} {os.environ.get('MASTER_PORT')}"
    try:
        all_ranks = join(device, timeout)
        ones = torch.ones(1, device=all_ranks.device)
        dist.all_reduce(ones, async_op=True).wait(timedelta(seconds=timeout))
        backend = dist.get_backend()
        all_ranks.leave()
    except (InputError, RuntimeError) as error:
        got = f"rank {rank}, {place}: {brief(error)}"
        mend = (
            f"nc -vz {place}; ip -br address, then export NCCL_SOCKET_IFNAME=NAME "
            "GLOO_SOCKET_IFNAME=NAME on every machine; the same torchrun on all of them"
        )
        return [Finding("missing", "ranks", got, f"{world} ranks within {timeout:.0f} s", mend)]
    return [Finding("ok", "ranks", f"{int(ones)} of {world} by {backend}, at {place}")]
