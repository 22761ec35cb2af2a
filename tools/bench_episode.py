"""Seconds per evaluated episode, and what they go to; `tools.bench episode`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from env import SubtaskEnv
from eval import EvalConfig, run_jobs
from policy import Policy
from rollout import Job, run_episodes
from tasks import COLUMNS
from tools.bench_loader import spread
from tools.film import Film
from workers import Workers


@dataclass
class Watched:
    """A policy whose actions are kept, to be played again without it."""

    policy: Policy
    forget: bool  # decode without a draft: the plain path
    actions: list[np.ndarray] = field(default_factory=list)

    def reset(self) -> None:
        self.policy.reset()
        self.actions.clear()

    def act(self, obs: dict, instruction: str) -> np.ndarray:
        if self.forget:
            self.policy.draft = None
        self.actions.append(self.policy.act(obs, instruction))
        return self.actions[-1]


class Played:
    """Recorded actions: what an episode costs the simulator alone."""

    def __init__(self, actions: list[np.ndarray]):
        self.actions = actions

    def reset(self) -> None:
        self.left = iter(self.actions)

    def act(self, obs: dict, instruction: str) -> np.ndarray:
        return next(self.left)


@dataclass(frozen=True)
class EpisodeBench:
    checkpoint: Path  # RUN/stage2 or RUN/stage3
    json: Path | None = None
    column: str = "close_drawer"
    episodes: int = 6
    workers: int = 2
    horizon: int = 200

    def run(self) -> dict:
        with TemporaryDirectory() as out:
            cfg = EvalConfig(
                out=Path(out), checkpoint=self.checkpoint, columns=(self.column,),
                horizon=self.horizon,
            )  # fmt: skip
            alone, split = self.in_one_process(cfg)
            several = list(self.in_workers(cfg))
        figures = {name: spread(values) for name, values in alone.items()}
        figures[f"ours, {self.workers} processes, per episode"] = spread(several)
        return {"unit": "s", "figures": figures, "split of ours, one process (s)": split}

    def in_one_process(self, cfg: EvalConfig) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Seconds of each episode by the plain path and by ours, and where ours go to."""
        what, policy = COLUMNS[self.column], Policy.from_checkpoint(self.checkpoint, "cpu")
        policy.predict = False
        make = partial(SubtaskEnv, cfg.task, what.subtask, what.target_in(cfg.task), cfg.split)
        full, ours, blind = make(Film.obs_mode), make(Policy.obs_mode), make("state_dict")
        seconds = {"plain path, one process": [], "ours, one process": []}
        simulated, thought = [], []
        for seed in range(-1, self.episodes):  # the first one warms up
            watched = Watched(policy, forget=False)
            (plain,) = run_episodes(full, Watched(policy, forget=True), [abs(seed)], cfg)
            (mine,) = run_episodes(ours, watched, [abs(seed)], cfg)
            (alone,) = run_episodes(blind, Played(watched.actions), [abs(seed)], cfg)
            if seed >= 0:
                for name, record in zip(seconds, (plain, mine)):
                    seconds[name].append(record["seconds"])
                thought.append(mine["policy_seconds"])
                simulated.append(alone["seconds"])
        whole = np.mean(seconds["ours, one process"])
        split = {"policy": np.mean(thought), "simulation": np.mean(simulated)}
        split["rendering"] = whole - sum(split.values())
        return seconds, {name: round(float(value), 2) for name, value in split.items()}

    def in_workers(self, cfg: EvalConfig) -> Iterator[float]:
        """Seconds between results, in steady state: the first of each worker is not counted."""
        count = (self.episodes + 1) * self.workers
        jobs = iter([Job(self.column, [seed]) for seed in range(count)])
        workers, since = Workers(self.workers, partial(run_jobs, cfg)), 0.0
        for done, _ in enumerate(workers.run(lambda running: next(jobs, None)), start=1):
            if done > self.workers:
                yield (time.perf_counter() - since) / (done - self.workers)
            elif done == self.workers:
                since = time.perf_counter()
