"""Evaluation episodes in one simulator process. `cfg` is an eval.EvalConfig.

for records in run_jobs(cfg, [Job("close_drawer", seeds=[0, 1])]): ...
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import attrgetter

import numpy as np
import torch
from mani_skill.utils.common import to_cpu_tensor

from config import ACTION_DIM
from household.expert import ScriptedExpert
from paper import CHAIN
from policy import Policy, check_schema
from simulation.chain import ChainEnv, navigate
from simulation.env import SubtaskEnvs
from simulation.plans import Job, pad_seeds, simulation_backend
from simulation.rl_expert import RLPolicy


class RandomPolicy:
    """Uniform actions, drawn from each episode's seed."""

    obs_mode = "state_dict"  # without images, ten times as fast

    def __init__(self, envs: SubtaskEnvs):
        self.envs = envs

    def reset(self) -> None:
        self.generators = [np.random.default_rng(each["seed"]) for each in self.envs.episodes]

    def act(self, obs: dict, instructions: Sequence[str]) -> np.ndarray:
        """Return actions [N, 13] in [-1, 1]; both arguments are unused."""
        actions = [generator.uniform(-1, 1, ACTION_DIM) for generator in self.generators]
        return np.stack(actions).astype(np.float32)


DRIVE_STEPS = 600  # at most, between two subtasks of a chain; undisturbed it takes about 190
POLICIES = dict(learned=Policy, expert=ScriptedExpert, random=RandomPolicy, rl=RLPolicy)


def run_jobs(cfg, jobs: Iterable[Job]) -> Iterator[list[dict]]:
    """Yield each job's records. Consecutive jobs with the same images share a simulator."""
    learned = cfg.checkpoint and Policy.from_checkpoint(cfg.checkpoint, cfg.device, cfg.compile)
    for (column, filmed), group in groupby(jobs, attrgetter("column", "filmed")):
        # The simulator renders only images that the policy or the film reads.
        mode = "rgb+depth+segmentation" if filmed else POLICIES[cfg.policy].obs_mode
        envs = ChainEnv(*cfg.address(column), cfg.split, mode) if cfg.chain else SubtaskEnvs(
            *cfg.address(column), cfg.split, obs_mode=mode,
            simulation=simulation_backend(cfg.envs), num_envs=1 if filmed else cfg.envs,
        )  # fmt: skip
        if learned is not None:
            check_schema(envs, learned.manifest)
            learned.predict = filmed  # only films show the auxiliary predictions
        if cfg.policy == "rl":
            policy = RLPolicy.load(cfg.policies, *cfg.address(column), envs.mshab.device)
        else:
            policy = learned or POLICIES[cfg.policy](envs)
        for job in group:
            film = None
            if filmed:
                from simulation.film import Film  # here: only films need imageio and PIL

                name = f"{cfg.chain or column}_{job.seeds[0]}".replace(":", "_")  # scp splits at :
                film = Film(envs, learned, cfg.out / "videos", name)
            run = run_chain if cfg.chain else run_episodes
            records = run(envs, policy, job.seeds, cfg, film)
            yield [{"column": column, **record} for record in records]
        envs.close()


def run_episodes(envs: SubtaskEnvs, policy, seeds: list[int], cfg, film=None) -> list[dict]:
    """Run the episodes of at most `envs.num_envs` seeds together and return their records.

    All environments step until the longest episode ends. Each record has an equal share of the
    time.
    """
    torch.manual_seed(seeds[0])  # a policy's samples must not depend on earlier episodes
    started = time.perf_counter()
    obs = envs.reset(pad_seeds(seeds, envs.num_envs))
    outcomes = [Outcome(cfg.horizon, cfg.stop_at_success) for _ in seeds]
    _, policy_seconds = roll_out(envs, policy, obs, outcomes, film)
    if film is not None:
        film.save(outcomes[0].success_once)
    times = {"seconds": time.perf_counter() - started, "policy_seconds": policy_seconds}
    shares = {name: round(value / len(seeds), 2) for name, value in times.items()}
    return [
        episode | {"target": target} | outcome.record() | shares
        for episode, target, outcome in zip(envs.episodes, envs.targets, outcomes)
    ]


def roll_out(envs, policy, obs: dict, outcomes: list, film=None) -> tuple[dict, float]:
    """Step until every outcome has ended. Returns the last observation, the policy's seconds."""
    policy.reset()
    policy_seconds = 0.0
    while not all(outcome.ended for outcome in outcomes):
        asked = time.perf_counter()
        actions = policy.act(obs, envs.instructions)  # [N, 13]
        policy_seconds += time.perf_counter() - asked
        if film is not None:  # before the step: the predictions are for this observation
            film.add(to_cpu_tensor(obs), envs.elapsed)
        obs, info = envs.step(actions)
        for outcome, action, success in zip(outcomes, actions, info["success"].tolist()):
            outcome.add(action, success)
    return obs, policy_seconds


def run_chain(envs: ChainEnv, policy, seeds: list[int], cfg, film=None) -> list[dict]:
    """Run one chain and return a record for each subtask; after a failure the later ones fail.

    The scripted expert drives the robot to the start pose of each subtask.
    """
    torch.manual_seed(seeds[0])
    obs, driver, records, reached = envs.reset(seeds), ScriptedExpert(envs), [], True
    for envs.index, (column, kind) in enumerate(CHAIN.items()):
        started, policy_seconds, outcome = time.perf_counter(), 0.0, Outcome(cfg.horizon, True)
        if reached:
            driver.reset()
            for action in islice(navigate(driver, envs), DRIVE_STEPS):
                if film is not None:
                    envs.place_video_camera()
                    film.add(to_cpu_tensor(obs), None)
                obs, _ = envs.step(action[None])
            envs.begin()
            obs, policy_seconds = roll_out(envs, policy, obs, [outcome], film)
        reached = outcome.success_once
        named = {"column": column, "subtask": kind.subtask, "target": envs.targets[0]}
        seconds = round(time.perf_counter() - started, 2)
        times = {"seconds": seconds, "policy_seconds": round(policy_seconds, 2)}
        records.append(envs.episodes[0] | named | outcome.record() | times)
    if film is not None:
        film.save(reached)
    return records


@dataclass
class Outcome:
    """The outcome of one episode.

    GAP-18 (Sec. 6.1): the paper does not say whether success counts once or at the end. Both are
    recorded: after a success the episode continues to the horizon (MS-HAB: continuous_task),
    unless `stop_at_success`.
    """

    horizon: int
    stop_at_success: bool
    success_once: bool = False
    success: bool = False  # after the last step
    length: int = 0
    actions: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    @property
    def ended(self) -> bool:
        return self.length == self.horizon or (self.success_once and self.stop_at_success)

    def add(self, action: np.ndarray, success: bool) -> None:
        """Count a step, unless the episode has ended and only others of its batch go on."""
        if self.ended:
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
