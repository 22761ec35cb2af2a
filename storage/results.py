"""The files of an evaluation and its table of success rates.

OUT/episodes.jsonl has one line for each finished episode, OUT/config.json the settings of all of
them. Older evaluations have the settings on every line.
"""

from pathlib import Path

from tabulate import tabulate

from config import InputError
from paper import COLUMNS, PAPER_COLUMNS
from storage.files import read_json, read_lines

NOT_RUN = "not run"
# Settings of evaluations that were written before these keys existed.
IMPLIED = {"simulation": "physx_cpu", "device": "cpu", "compile": False}


def read_episodes(out: Path, mend: bool = False) -> dict[tuple[str, int], dict]:
    """Return {(column, seed): episode with the run's settings} of an evaluation's folder.

    `mend` cuts off a last line that was torn by a kill. Raises DamagedError for any other damage.
    """
    config = out / "config.json"
    settings = IMPLIED | (read_json(config) if config.exists() else {})
    lines = read_lines(out / "episodes.jsonl", mend)
    return {(line["column"], line["seed"]): settings | line for line in lines}


def check_settings(out: Path, episodes: dict[tuple[str, int], dict], settings: dict) -> None:
    """Raise InputError when the folder's episodes were run with other settings."""
    for episode in episodes.values():
        for name, ours in settings.items():
            if episode.get(name) != ours:
                raise InputError(
                    f"{out} has episodes with {name} = {episode.get(name)!r}, this run has "
                    f"{ours!r}: give another --out"
                )


def table(episodes: list[dict], paper: dict[str, float]) -> dict[str, dict]:
    """Return {column: n, success_once, success_at_end, low, high, paper}; None where not run."""
    columns = {}
    for name in COLUMNS:
        in_column = [episode for episode in episodes if episode["column"] == name]
        if not in_column:
            continue
        n, once = len(in_column), sum(episode["success_once"] for episode in in_column)
        ends = [episode["success_at_end"] for episode in in_column]
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


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of successes / n."""
    from scipy.stats import binomtest  # here: the import takes a second

    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def format_rate(column: dict | None) -> str:
    """Write `22/30 = 0.73 [0.56, 0.86]` and the success at the end."""
    if column is None:
        return NOT_RUN
    n, once, end = column["n"], column["success_once"], column["success_at_end"]
    at_end = NOT_RUN if end is None else f"{end:.2f}"
    interval = f"[{column['low']:.2f}, {column['high']:.2f}]"
    return f"{round(once * n)}/{n} = {once:.2f} {interval}, at the end {at_end}"


def markdown(cells: list[list[str]], heads: list[str]) -> list[str]:
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True).splitlines()


def columns_to_show(policies: dict[str, dict]) -> list[str]:
    """Return the paper's columns, and any other in {policy: {column: figures}}."""
    ran = {name for columns in policies.values() for name in columns}
    return [name for name in COLUMNS if name in PAPER_COLUMNS or name in ran]


def success_table(policies: dict[str, dict], papers: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a table from {policy: {column: figures}} and {row: {column: rate}}."""
    cells = []
    for name in columns_to_show(policies):
        theirs = [f"{paper[name]:.2f}" if name in paper else "-" for paper in papers.values()]
        ours = [format_rate(columns.get(name)) for columns in policies.values()]
        cells.append([name, *ours, *theirs])
    return markdown(cells, ["", *policies, *(f"paper, {row}" for row in papers)])
