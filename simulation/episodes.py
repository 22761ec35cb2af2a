"""Episodes of one policy, several at a time: which ones can be simulated at once, and their steps.

    for job in batches(episodes, envs=16):
        records = run_episodes(SubtaskEnvs(..., num_envs=16), policy, job.seeds, cfg)

One environment on the CPU is a batch of one, by the same code.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mani_skill.utils.common import to_cpu_tensor
from sapien import physx

from config import ACTION_DIM, InputError
from simulation.env import SubtaskEnvs, draw_plan
from training.checks import gpu_physics, require
from training.ranks import device_of


def check_envs(envs: int, scripted: bool, device: str | None = None) -> None:
    """Raise InputError when so many environments cannot be simulated at once.

    Downloads what the workers' simulators would each download (checks.gpu_physics).
    """
    if envs == 1:
        return
    what, instead = f"--envs {envs}", "leave it out, --workers 2 runs two processes"
    if scripted:
        raise InputError(
            f"{what}: the scripted expert drives one environment, on the CPU; {instead}"
        )
    if device_of(device).type == "cpu":
        raise InputError(
            f"{what}: ManiSkill simulates several environments in one process on a GPU alone, "
            f"expected a GPU that torch finds, and no --device cpu; {instead}"
        )
    require(gpu_physics(physx.version(), fetch=True))


def simulation_of(envs: int) -> str:
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


def batches(episodes: Iterable[tuple[str, int, bool, str | None]], envs: int) -> list[Job]:
    """Episodes (column, seed, filmed, cupboard) as jobs of at most `envs`, alike but in the seed.

    A filmed episode has a job of its own.
    """
    alike: dict[tuple, list[int]] = {}
    for column, seed, filmed, cupboard in episodes:
        alike.setdefault((column, filmed, cupboard), []).append(seed)
    return [
        Job(column, seeds[i : i + size], filmed)
        for (column, filmed, _), seeds in alike.items()
        for size in [1 if filmed else envs]
        for i in range(0, len(seeds), size)
    ]


def filled(seeds: list[int], envs: int) -> list[int]:
    """One for each environment: those to spare repeat the last one."""
    return seeds + seeds[-1:] * (envs - len(seeds))


class RandomPolicy:
    """Uniform actions from each episode's seed: what success costs when nothing is known."""

    obs_mode = "state_dict"  # no pictures: ten times as fast

    def __init__(self, envs: SubtaskEnvs):
        self.envs = envs

    def reset(self) -> None:
        self.generators = [np.random.default_rng(each["seed"]) for each in self.envs.episodes]

    def act(self, obs: dict, instructions: Sequence[str]) -> np.ndarray:
        """Actions [N, 13] in [-1, 1]."""
        actions = [generator.uniform(-1, 1, ACTION_DIM) for generator in self.generators]
        return np.stack(actions).astype(np.float32)


def run_episodes(envs: SubtaskEnvs, policy, seeds: list[int], cfg, film=None) -> list[dict]:
    """Run the episodes that the seeds address, at most one for each environment; their records.

    The episodes of environments to spare are dropped: so the policy's batch keeps its size, and a
    GPU its graph. A batch takes as long as its longest episode; each record has its share of that.
    """
    torch.manual_seed(seeds[0])  # what a policy samples must not depend on the episodes before
    started, thought = time.perf_counter(), 0.0
    obs = envs.start(filled(seeds, envs.num_envs))
    policy.reset()
    outcomes = [Outcome(cfg.horizon, cfg.stop_at_success) for _ in seeds]
    while not all(outcome.settled for outcome in outcomes):
        asked = time.perf_counter()
        actions = policy.act(obs, envs.instructions)  # [N, 13]
        thought += time.perf_counter() - asked
        if film is not None:  # before the step: predictions are about this observation
            film.add(to_cpu_tensor(obs), envs.elapsed)
        obs, info = envs.move(actions)
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
    """What is counted of an episode while it runs; settled, it no longer changes.

    GAP-18 (Sec. 6.1): the paper does not say whether success counts once or at the end. We keep
    both: after a success the episode goes on to the horizon (MS-HAB: continuous_task), unless told
    not to.
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
        """Count a step, unless the others of its batch alone go on."""
        if self.settled:
            return
        self.actions.update(action.tobytes())
        self.success_once, self.success = self.success_once or success, success
        self.length += 1

    def record(self) -> dict:
        """Its part of the line."""
        return {
            "success_once": self.success_once,
            "success_at_end": None if self.stop_at_success else self.success,
            "length": self.length,
            "actions": self.actions.hexdigest()[:16],  # two runs that acted alike have the same
        }


def scenes(plan_file: Path, episodes: list[dict], first_seed: int) -> dict[str, int]:
    """Return how many scenes of the split were reached, of how many, in how many seeds all are.

    MS-HAB's plans lie unevenly over the scenes, and a seed draws a plan: 30 seeds miss some.
    """
    plans = json.loads(plan_file.read_bytes())["plans"]
    missing, seed = {plan["build_config_name"] for plan in plans}, first_seed
    of = len(missing)
    while missing:
        plan, _ = draw_plan(seed, len(plans))
        missing.discard(plans[plan]["build_config_name"])
        seed += 1
    reached = {episode["scene"] for episode in episodes}
    return {"reached": len(reached), "of": of, "seeds_for_all": seed - first_seed}
