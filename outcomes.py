"""The files of an evaluation: a line for each episode, and what is counted from the lines.

Under torchrun each rank writes a file of its own, OUT/episodes.RANK.jsonl, so that no line is torn
by another writer. `merge` moves them into OUT/episodes.jsonl, also after a kill.
"""

import json
from pathlib import Path

from config import InputError
from durable import append, read_lines
from tasks import COLUMNS, draw_plan, wilson


def address(episode: dict) -> tuple[str, int]:
    """Column and seed: what a run has once."""
    return episode["column"], episode["seed"]


def part(path: Path, rank: int) -> Path:
    """Where a rank writes the episodes that belong in `path`."""
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
        for name, now in identity.items():
            if episode.get(name) != now:
                raise InputError(
                    f"{path} has episodes with {name} = {episode.get(name)!r}, this run has "
                    f"{now!r}: one table cannot mix them. Give another --out, or remove "
                    f"{path.parent}"
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
    plans = json.loads(plan_file.read_text())["plans"]
    missing, seed = {plan["build_config_name"] for plan in plans}, first_seed
    of = len(missing)
    while missing:
        plan, _ = draw_plan(seed, len(plans))
        missing.discard(plans[plan]["build_config_name"])
        seed += 1
    reached = {episode["scene"] for episode in episodes}
    return {"reached": len(reached), "of": of, "seeds_for_all": seed - first_seed}
