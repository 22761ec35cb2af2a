"""The files of an evaluation: a line for each episode, and what is counted in it and from them.

Under torchrun each rank writes a file of its own, OUT/episodes.RANK.jsonl, so that no line is torn
by another writer. `merge` moves them into OUT/episodes.jsonl, also after a kill.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import InputError
from durable import append, read_lines
from tasks import COLUMNS, draw_plan, wilson

# What is true of the lines from before their program wrote the key.
IMPLIED = {"simulation": "physx_cpu", "device": "cpu"}


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


def address(episode: dict) -> tuple[str, int]:
    """Column and seed: what a run has once."""
    return episode["column"], episode["seed"]


def part(path: Path, rank: int | str) -> Path:
    """Where a rank ("*": any) writes the episodes that belong in `path`."""
    return path.with_name(f"{path.stem}.{rank}{path.suffix}")


def merge(path: Path) -> list[dict]:
    """Move the ranks' episodes into `path`, each once; return all of it.

    Killed between any two of its steps and done again, it ends with the same lines.
    """
    episodes = read_lines(path, mend=True)
    for file in sorted(path.parent.glob(part(path, "*").name)):
        done = {address(episode) for episode in episodes}
        for episode in read_lines(file, mend=True):
            if address(episode) not in done:
                append(path, episode)
                episodes.append(episode)
        file.unlink()
    return episodes


def check_same_run(path: Path, episodes: list[dict], identity: dict):
    """Raise InputError when the file holds episodes of another evaluation."""
    for episode in episodes:
        before = IMPLIED | episode
        for name, now in identity.items():
            theirs = before.get(name)
            if isinstance(now, dict) and isinstance(theirs, dict):  # by column, which may be added
                now = {key: now.get(key, value) for key, value in theirs.items()}
            if theirs != now:
                raise InputError(
                    f"{path} has episodes with {name} = {theirs!r}, this run has "
                    f"{now!r}: one table cannot mix them. Give another --out"
                )


def table(episodes: list[dict], paper: dict[str, float]) -> dict[str, dict]:
    """Return {column: n, success_once, success_at_end, low, high, paper}; None where not run."""
    columns = {}
    for name in COLUMNS:
        of_column = [episode for episode in episodes if episode["column"] == name]
        if not of_column:
            continue
        n, once = len(of_column), sum(episode["success_once"] for episode in of_column)
        ends = [episode["success_at_end"] for episode in of_column]
        low, high = wilson(once, n)
        columns[name] = {
            "n": n,
            "success_once": once / n,
            "success_at_end": None if None in ends else sum(ends) / n,
            "low": low,
            "high": high,
            "paper": paper.get(name),
        }
    return columns


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
