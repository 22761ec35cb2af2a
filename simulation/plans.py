"""Which episodes run, and which of them at once: plans, scenes, batches. Imports no simulator."""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import InputError, quoted
from training.ranks import device_of

# --- Plans ---


def draw_plan(seed: int, count: int) -> tuple[int, np.random.Generator]:
    """Return the index of a seed's plan among `count`, and the generator that draws its start."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(count)), rng


def articulations(plan_file: Path) -> Callable[[int], str]:
    """Return a function from a seed to the articulation that its episode opens, closes or picks
    from (`fridge`); "" where there is none."""
    plans = json.loads(plan_file.read_bytes())["plans"]
    subtasks = [plan["subtasks"][0] for plan in plans]
    names = [
        (each.get("articulation_config") or each).get("articulation_type") for each in subtasks
    ]
    return lambda seed: names[draw_plan(seed, len(names))[0]] or ""


def count_scenes(plan_file: Path, episodes: list[dict], first_seed: int) -> dict[str, int]:
    """Count the reached scenes, the split's scenes, and the seeds that reach all of them.

    MS-HAB's plans lie unevenly over the scenes, and a seed draws a plan: 30 seeds miss some.
    """
    plans = json.loads(plan_file.read_bytes())["plans"]
    missing, seed = {plan["build_config_name"] for plan in plans}, first_seed
    total = len(missing)
    while missing:
        plan, _ = draw_plan(seed, len(plans))
        missing.discard(plans[plan]["build_config_name"])
        seed += 1
    reached = {episode["scene"] for episode in episodes}
    return {"reached": len(reached), "of": total, "seeds_for_all": seed - first_seed}


# --- Batches ---


def check_envs(envs: int, scripted: bool, device: str | None = None) -> None:
    """Raise InputError when so many environments cannot be simulated at once.

    Downloads PhysX's GPU library if it is missing.
    """
    if envs == 1:
        return
    instead = "leave it out; --workers 2 runs two processes"
    if scripted:
        raise InputError(
            f"--envs {envs}: the scripted expert drives one environment, on the CPU; {instead}"
        )
    if device_of(device).type == "cpu":
        raise InputError(
            f"--envs {envs}: ManiSkill simulates several environments in one process on a GPU "
            f"alone, expected a GPU that torch finds, and no --device cpu; {instead}"
        )
    check_gpu_physics()


def check_gpu_physics(download: bool = True) -> str:
    """Load what --envs needs: the driver's libcuda.so and PhysX's GPU library.

    SAPIEN downloads PhysX's library at its first use: with `download` here, before the workers
    would each do so. Raises InputError when a library does not load.
    """
    try:
        ctypes.CDLL("libcuda.so")
    except OSError as error:  # torch asks for libcuda.so.1, which every driver has
        raise InputError(
            f"{error}; --envs needs the driver's libcuda.so. This makes the link: "
            "sudo ln -s $(ldconfig -p | grep -om1 '/.*libcuda.so.1$') /usr/lib/libcuda.so"
        ) from error
    from sapien import physx  # here: programs that simulate on the CPU start faster without it

    library = Path.home() / ".sapien/physx" / physx.version() / "libPhysXGpu_64.so"
    if not library.exists() and not download:
        return f"no {library} yet: the first --envs downloads it from GitHub"
    load = "import sapien.physx as p; p.enable_gpu()"
    command = [sys.executable, "-W", "ignore", "-c", load]  # a damaged library may crash a process
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        aside = f"mv {quoted(library)} {quoted(library)}.aside && " if library.exists() else ""
        raise InputError(
            f"PhysX on a GPU: {library}: {reason}. SAPIEN downloads it from GitHub: "
            f"{aside}{quoted(sys.executable)} -c '{load}'; without internet, run this on another "
            "machine and copy its ~/.sapien here"
        )
    return f"{library} loads"


def simulation_backend(envs: int) -> str:
    """ManiSkill's simulation backend. CPU and GPU physics give different episodes.

    GAP-27 (Sec. 6.1): the paper names neither backend nor split nor seeds. Here: CPU physics (the
    GPU's with --envs), the val split (GAP-18), and each seed draws a plan and with it a scene.
    """
    return "physx_cpu" if envs == 1 else "physx_cuda"


class Job(NamedTuple):
    """Episodes of a column, in collect.py of a target, that are simulated at once."""

    column: str
    seeds: list[int]
    filmed: bool = False


def batches(episodes: Iterable[tuple[str, int, bool, str]], envs: int) -> list[Job]:
    """Group episodes (column, seed, filmed, articulation) into jobs of at most `envs`.

    The episodes of a job differ in the seed alone. A filmed episode has a job of its own.
    """
    groups: dict[tuple, list[int]] = {}
    for column, seed, filmed, articulation in episodes:
        groups.setdefault((column, filmed, articulation), []).append(seed)
    return [
        Job(column, seeds[i : i + size], filmed)
        for (column, filmed, _), seeds in groups.items()
        for size in [1 if filmed else envs]
        for i in range(0, len(seeds), size)
    ]


def pad_seeds(seeds: list[int], num_envs: int) -> list[int]:
    """Repeat the last seed for the environments to spare; their episodes are dropped."""
    return seeds + seeds[-1:] * (num_envs - len(seeds))


def film_name(column: str, seed: int) -> str:
    return f"{column}_{seed}".replace(":", "_")  # scp reads a colon as a host
