"""Episodes in one simulator process: which ones run at once, the loop, and what is counted.

    for job in batches(episodes, envs=16):
        records = run_episodes(SubtaskEnvs(..., num_envs=16), policy, job.seeds, cfg)

One environment on the CPU is a batch of one, by the same code. `cfg` is an eval.EvalConfig.
"""

import ctypes
import fcntl
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mani_skill.utils.common import to_cpu_tensor
from sapien import physx

from config import ACTION_DIM, InputError, quoted
from household.expert import ScriptedExpert
from paper import COLUMNS
from policy import Policy, check_schema
from simulation.env import SubtaskEnvs, draw_plan
from simulation.rl_expert import RLPolicy
from training.ranks import device_of

# --- Several environments at once ---


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

    SAPIEN downloads PhysX's library at its first use, in every process. With `download` one
    process of this machine at a time does so here. Raises InputError when a library does not load.
    """
    try:
        ctypes.CDLL("libcuda.so")
    except OSError as error:  # torch asks for libcuda.so.1, which every driver has
        raise InputError(
            f"{error}; --envs needs the driver's libcuda.so. This makes the link: "
            "sudo ln -s $(ldconfig -p | grep -om1 '/.*libcuda.so.1$') /usr/lib/libcuda.so"
        ) from error
    library = Path.home() / ".sapien/physx" / physx.version() / "libPhysXGpu_64.so"
    if not library.exists() and not download:
        return f"no {library} yet: the first --envs downloads it from GitHub"
    library.parent.mkdir(parents=True, exist_ok=True)
    load = "import sapien.physx as p; p.enable_gpu()"
    with open(library.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-W", "ignore", "-c", load]  # a damaged library may crash it
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


# --- The worker ---


class RandomPolicy:
    """Uniform actions from each episode's seed: the success rate of chance."""

    obs_mode = "state_dict"  # no images: ten times as fast

    def __init__(self, envs: SubtaskEnvs):
        self.envs = envs

    def reset(self) -> None:
        self.generators = [np.random.default_rng(each["seed"]) for each in self.envs.episodes]

    def act(self, obs: dict, instructions: Sequence[str]) -> np.ndarray:
        """Return actions [N, 13] in [-1, 1]."""
        actions = [generator.uniform(-1, 1, ACTION_DIM) for generator in self.generators]
        return np.stack(actions).astype(np.float32)


POLICIES = {
    "learned": Policy, "expert": ScriptedExpert, "random": RandomPolicy, "rl": RLPolicy
}  # fmt: skip


def make_envs(cfg, column: str, filmed: bool) -> SubtaskEnvs:
    """Make a column's simulator, which renders the images that the policy or the film reads."""
    what, mode = COLUMNS[column], POLICIES[cfg.policy].obs_mode
    return SubtaskEnvs(
        cfg.task, what.subtask, what.target_in(cfg.task), cfg.split,
        obs_mode="rgb+depth+segmentation" if filmed else mode, real_meshes=cfg.real_meshes,
        simulation=simulation_backend(cfg.envs), num_envs=1 if filmed else cfg.envs,
    )  # fmt: skip


def film_name(column: str, seed: int) -> str:
    return f"{column}_{seed}".replace(":", "_")  # scp reads a colon as a host


def run_jobs(cfg, jobs: Iterable[Job]) -> Iterator[list[dict]]:
    """Yield each job's episodes. A simulator is kept while column and film stay the same."""
    learned = Policy.from_checkpoint(cfg.checkpoint, cfg.device) if cfg.checkpoint else None
    for (column, filmed), group in groupby(jobs, attrgetter("column", "filmed")):
        envs = make_envs(cfg, column, filmed)
        if learned is not None:
            check_schema(envs, learned.manifest)
            learned.predict = filmed  # a film alone shows the auxiliary predictions
        rl = cfg.rl_policy(column, envs.mshab.device)
        policy = learned or rl or POLICIES[cfg.policy](envs)
        for job in group:
            film = None
            if filmed:
                from simulation.film import Film  # here: only a film needs imageio and PIL

                name = film_name(column, job.seeds[0])
                film = Film(envs, learned, cfg.out / "videos", name)
            records = run_episodes(envs, policy, job.seeds, cfg, film)
            yield [{"column": column, **record} for record in records]
        envs.close()


def run_episodes(envs: SubtaskEnvs, policy, seeds: list[int], cfg, film=None) -> list[dict]:
    """Run the episodes of the seeds, at most one for each environment, and return their records.

    A batch keeps its size, so that a GPU keeps its graph: environments to spare run along. A batch
    takes as long as its longest episode, and each record has an equal share of that time.
    """
    torch.manual_seed(seeds[0])  # what a policy samples must not depend on the episodes before
    started, thought = time.perf_counter(), 0.0
    obs = envs.reset(pad_seeds(seeds, envs.num_envs))
    policy.reset()
    outcomes = [Outcome(cfg.horizon, cfg.stop_at_success) for _ in seeds]
    while not all(outcome.settled for outcome in outcomes):
        asked = time.perf_counter()
        actions = policy.act(obs, envs.instructions)  # [N, 13]
        thought += time.perf_counter() - asked
        if film is not None:  # before the step: predictions are about this observation
            film.add(to_cpu_tensor(obs), envs.elapsed)
        obs, info = envs.step(actions)
        for outcome, action, success in zip(outcomes, actions, info["success"].tolist()):
            outcome.add(action, success)
    if film is not None:
        film.save(outcomes[0].success_once)
    shares = {"seconds": time.perf_counter() - started, "policy_seconds": thought}
    shares = {name: round(value / len(seeds), 2) for name, value in shares.items()}
    return [
        episode | {"target": target} | outcome.record() | shares
        for episode, target, outcome in zip(envs.episodes, envs.targets, outcomes)
    ]


@dataclass
class Outcome:
    """The counts of one episode; settled, they no longer change.

    GAP-18 (Sec. 6.1): the paper does not say whether success counts once or at the end. Both are
    kept: after a success the episode goes on to the horizon (MS-HAB: continuous_task), unless
    `stop_at_success`.
    """

    horizon: int
    stop_at_success: bool
    success_once: bool = False
    success: bool = False  # after the last step
    length: int = 0
    actions: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def settled(self) -> bool:
        return self.length == self.horizon or (self.success_once and self.stop_at_success)

    def add(self, action: np.ndarray, success: bool) -> None:
        """Count a step; a settled episode ignores the steps of the others in its batch."""
        if self.settled:
            return
        self.actions.update(action.tobytes())
        self.success_once, self.success = self.success_once or success, success
        self.length += 1

    def record(self) -> dict:
        return {
            "success_once": self.success_once,
            "success_at_end": None if self.stop_at_success else self.success,
            "length": self.length,
            "actions": self.actions.hexdigest()[:16],  # equal for two runs with equal actions
        }


def count_scenes(plan_file: Path, episodes: list[dict], first_seed: int) -> dict[str, int]:
    """Count the scenes that were reached, those of the split, and the seeds that reach them all.

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
