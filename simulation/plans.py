"""The plan that a seed draws, jobs of several seeds, checks of --envs. Imports no simulator."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import InputError
from training.ranks import device_of


def draw_plan(seed: int, count: int) -> tuple[int, np.random.Generator]:
    """Return the index of a seed's plan among `count`, and the generator that draws its start."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(count)), rng


def articulations(plan_file: Path) -> Callable[[int], str]:
    """Return a function from a seed to its episode's articulation, such as `fridge`; "": none."""
    subtasks = [plan["subtasks"][0] for plan in json.loads(plan_file.read_bytes())["plans"]]
    owners = [subtask.get("articulation_config") or subtask for subtask in subtasks]
    names = [owner.get("articulation_type") or "" for owner in owners]
    return lambda seed: names[draw_plan(seed, len(names))[0]]


def check_envs(envs: int, scripted: bool, device: str | None = None) -> None:
    """Raise InputError when this machine or expert cannot simulate `envs` environments at once.

    Loads the driver's libcuda.so and PhysX's GPU library, which SAPIEN downloads if missing. Called
    before the workers start, which would each download it.
    """
    if envs == 1:
        return
    if scripted:
        raise InputError("--envs: the scripted expert drives one environment; use --workers 2")
    if device_of(device).type == "cpu":
        raise InputError("--envs: several environments need a GPU; on a CPU use --workers 2")
    load = "import ctypes, sapien.physx as p; ctypes.CDLL('libcuda.so'); p.enable_gpu()"
    # In another process: a damaged library may crash it.
    command = [sys.executable, "-W", "ignore", "-c", load]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        if "libcuda.so:" in reason:  # torch loads libcuda.so.1, which every driver has
            mend = "sudo ln -s $(ldconfig -p | grep -om1 '/.*libcuda.so.1$') /usr/lib/libcuda.so"
        elif any(Path.home().glob(".sapien/physx/*/libPhysXGpu_64.so")):
            mend = "mv ~/.sapien/physx ~/.sapien/physx.aside  # SAPIEN downloads it again"
        else:
            reason = f"no GPU library in ~/.sapien/physx, none from GitHub ({reason.split(':')[0]})"
            fetch = 'python -c "import sapien.physx as p; p.enable_gpu()"'
            mend = f"{fetch}  # where there is internet; then copy ~/.sapien here"
        raise InputError(f"--envs {envs}: SAPIEN cannot load PhysX: {reason}. {mend}")


def simulation_backend(envs: int) -> str:
    """ManiSkill's simulation backend. CPU and GPU physics give different episodes.

    GAP-27 (Sec. 6.1): the paper names neither backend nor split nor seeds. Here: CPU physics (GPU
    physics with --envs), the val split (GAP-18), and each seed draws a plan and with it a scene.
    """
    return "physx_cpu" if envs == 1 else "physx_cuda"


class Job(NamedTuple):
    """Episodes that a worker simulates at once."""

    column: str  # in collect.py a target
    seeds: list[int]
    filmed: bool = False


def batches(episodes: Iterable[tuple[str, int, bool, str]], envs: int) -> list[Job]:
    """Group episodes (column, seed, filmed, articulation) into jobs of at most `envs`.

    The episodes of a job differ in the seed alone. A filmed episode has a job of its own.
    """
    groups: dict[tuple, list[int]] = {}
    for column, seed, filmed, articulation in episodes:
        groups.setdefault((column, filmed, articulation), []).append(seed)
    jobs = []
    for (column, filmed, _), seeds in groups.items():
        size = 1 if filmed else envs
        jobs += [Job(column, seeds[i : i + size], filmed) for i in range(0, len(seeds), size)]
    return jobs


def pad_seeds(seeds: list[int], num_envs: int) -> list[int]:
    """Repeat the last seed up to `num_envs` seeds; the repeated episodes are dropped."""
    return seeds + seeds[-1:] * (num_envs - len(seeds))
