"""The files of an evaluation: a line for each episode, and the tables that are counted from them.

Under torchrun each rank writes a file of its own, OUT/episodes.RANK.jsonl, so that no line is torn
by another writer. `merge` moves them into OUT/episodes.jsonl, also after a kill.
"""

import math
from pathlib import Path

from tabulate import tabulate

from config import InputError
from paper import COLUMNS, PAPER_COLUMNS
from storage.files import append, read_lines

NOT_RUN = "not run"
# What is true of the lines from before their program wrote the key.
IMPLIED = {"simulation": "physx_cpu", "device": "cpu"}


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


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of successes / n; z is the two-sided 95 % quantile."""
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(column: dict | None) -> str:
    """Write `22/30 = 0.73 [0.56, 0.86]` and the success at the end."""
    if column is None:
        return NOT_RUN
    n, once, end = column["n"], column["success_once"], column["success_at_end"]
    at_end = NOT_RUN if end is None else f"{end:.2f}"
    interval = f"[{column['low']:.2f}, {column['high']:.2f}]"
    return f"{round(once * n)}/{n} = {once:.2f} {interval}, at the end {at_end}"


def markdown(cells: list[list[str]], heads: list[str]) -> list[str]:
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True).splitlines()


def shown(policies: dict[str, dict]) -> list[str]:
    """Return the paper's columns, and those that a policy of {policy: {column: figures}} has."""
    ran = {name for columns in policies.values() for name in columns}
    return [name for name in COLUMNS if name in PAPER_COLUMNS or name in ran]


def success_table(policies: dict[str, dict], papers: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a table from {policy: {column: figures}} and {row: {column: rate}}."""
    cells = []
    for name in shown(policies):
        theirs = [f"{paper[name]:.2f}" if name in paper else "-" for paper in papers.values()]
        cells.append([name, *(rate(columns.get(name)) for columns in policies.values()), *theirs])
    return markdown(cells, ["", *policies, *(f"paper, {row}" for row in papers)])
