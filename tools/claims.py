"""The paper's claims and tables, counted from the episodes that tools/reproduce.py ran.

    table = make_table(Path("results/set_table"), 2, rows, cell, "tiny")
    print("\n".join(to_markdown(table)))

A claim (a line of claims.csv) is a difference of two rows' success rates. Its verdict:

    agrees        the 95 % interval of our difference lies on the paper's side of 0
    disagrees     the interval lies on the other side
    cannot tell   the interval contains 0, or a row was trained only once, or the paper's own
                  rates in the columns that were run do not have the sign of its claim
    not run       a row or all columns of the claim are missing, or both rows are the same here

An interval covers two: one over episodes (Wilson; of a difference: Newcombe), one over the rates of
the training seeds (Student's t). The first does not show how much trainings differ.
"""

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import NormalDist, mean
from typing import NamedTuple

from scipy.stats import ttest_1samp, ttest_ind

from paper import COLUMNS, PAPER_COLUMNS, ROWS
from storage.files import read_json
from storage.results import markdown, read_episodes, wilson
from tools.compare import newcombe

SEED_SD = 0.1  # assumed spread of a row's success rate from one training to the next
PLANNED_EPISODES = 60  # of each column and seed
# Standard normal quantiles: two-sided test at 0.05, power 0.8.
Z, Z_POWER = (NormalDist().inv_cdf(p) for p in (0.975, 0.8))
PAPER = {  # row: {task/column: rate}
    name: {f"{task}/{c}": rate for task, rates in row.paper.items() for c, rate in rates.items()}
    for name, row in ROWS.items()
}


class Claim(NamedTuple):
    name: str
    a: str  # rows; the effect is b's rate minus a's
    b: str
    columns: str  # separated by spaces; "": all
    statement: str

    @property
    def keys(self) -> list[str]:
        """All task/column pairs that the claim covers."""
        names = self.columns.split() or PAPER_COLUMNS
        return [key for key in PAPER[self.a] if key.split("/")[1] in names]

    def paper_effect(self, keys: Sequence[str]) -> float:
        """Return the paper's mean difference over these task/column pairs."""
        return mean(PAPER[self.b][key] - PAPER[self.a][key] for key in keys)

    def seeds_needed(self, keys: Sequence[str]) -> int | None:
        """Return the trainings of each row that detect the paper's difference with power 0.8.

        None where the paper's own rates do not have the sign of its claim.
        """
        effect = self.paper_effect(keys)
        if effect * self.paper_effect(self.keys) < 1e-9:
            return None
        rates = [PAPER[row][key] for row in (self.a, self.b) for key in keys]
        chance = mean(rate * (1 - rate) for rate in rates) / (PLANNED_EPISODES * len(keys))
        spread = 2 * (SEED_SD**2 + chance) * (Z + Z_POWER) ** 2
        return max(2, math.ceil(spread / effect**2) + 1)  # + 1: t, not normal


with open(Path(__file__).with_suffix(".csv"), encoding="utf-8", newline="") as file:
    CLAIMS = [Claim(**row) for row in csv.DictReader(file)]


# --- Intervals ---


def seed_interval(*samples: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of a mean, or of the second mean minus the first.

    Two samples have a common variance. NaN with a single training in a sample.
    """
    if min(map(len, samples)) < 2:
        return math.nan, math.nan
    with warnings.catch_warnings(action="ignore"):  # scipy warns of equal rates
        test = ttest_1samp(*samples, 0) if len(samples) == 1 else ttest_ind(*samples[::-1])
        return test.confidence_interval()


def rate_of(by_seed: dict[int, tuple[int, int]]) -> dict:
    """Return a cell from {training seed: (successes, episodes)}."""
    successes, n = (sum(each[i] for each in by_seed.values()) for i in (0, 1))
    rates = {seed: s / m for seed, (s, m) in by_seed.items()}
    (low, high), (low_seeds, high_seeds) = wilson(successes, n), seed_interval([*rates.values()])
    # min and max keep their first argument where the other is NaN.
    low, high = max(0.0, min(low, low_seeds)), min(1.0, max(high, high_seeds))
    return {"n": n, "rate": successes / n, "low": low, "high": high, "by_seed": rates}


def difference(a: dict, b: dict) -> tuple[float, float, float]:
    """Return b's rate minus a's, with its interval, of two cells of `rate_of`.

    The rows ran on equal episodes but were trained apart: the samples count as independent.
    """
    counts = [(round(cell["rate"] * cell["n"]), cell["n"]) for cell in (a, b)]
    low, high = newcombe(*counts[0], *counts[1])
    seeds = seed_interval([*a["by_seed"].values()], [*b["by_seed"].values()])
    low, high = max(-1.0, min(low, seeds[0])), min(1.0, max(high, seeds[1]))
    return b["rate"] - a["rate"], low, high


# --- Episodes ---


def count_successes(row: Path) -> dict[str, dict[int, tuple[int, int]]]:
    """Return {task/column: {training seed: (successes, episodes)}} of one row's folder."""
    counts: dict[str, dict] = {}
    for path in sorted(row.glob("seed-*/*/episodes.jsonl")):
        seed, task = int(path.parts[-3].removeprefix("seed-")), path.parts[-2]
        episodes = read_episodes(path.parent)
        for column in COLUMNS:
            outcomes = [e["success_once"] for key, e in episodes.items() if key[0] == column]
            if outcomes:
                by_seed = counts.setdefault(f"{task}/{column}", {})
                by_seed[seed] = sum(outcomes), len(outcomes)
    return counts


def sum_columns(counts: dict[str, dict[int, tuple[int, int]]]) -> dict[int, tuple[int, int]]:
    """Return successes and episodes of the seeds that ran every column equally often."""
    summed = {}
    for seed in sorted({seed for by_seed in counts.values() for seed in by_seed}):
        successes, n = zip(*(by_seed.get(seed, (0, 0)) for by_seed in counts.values()))
        if len(set(n)) == 1:
            summed[seed] = sum(successes), sum(n)
    return summed


def judge(claim: Claim, folders: dict[str, Path], preset: str) -> dict:
    """Return a claim's verdict, from the episodes of its two rows in the columns that both have."""
    counts = [count_successes(folders[row]) for row in (claim.a, claim.b)]
    keys = [key for key in counts[0] if key in counts[1] and key in claim.keys]
    summed = [sum_columns({key: row[key] for key in keys}) for row in counts]
    judged = {"name": claim.name, "statement": claim.statement}
    if preset == "tiny" and ROWS[claim.a].openvla != ROWS[claim.b].openvla:
        return judged | {"verdict": "not run", "why": "both rows have one size here"}
    if not keys or not all(summed):
        return judged | {"verdict": "not run"}
    ours, low, high = difference(*map(rate_of, summed))
    paper, needed = claim.paper_effect(keys), claim.seeds_needed(keys)
    judged |= {"columns": keys, "paper": paper, "ours": ours, "low": low, "high": high}
    judged |= {"seeds": min(map(len, summed)), "seeds_needed": needed}
    if low <= 0 <= high or judged["seeds"] < 2 or needed is None:
        return judged | {"verdict": "cannot tell"}
    return judged | {"verdict": "agrees" if paper * ours > 0 else "disagrees"}


# --- Tables ---

ALWAYS = (
    "a generated apartment and a scripted expert instead of ReplicaCAD and MS-HAB's policies",
    "a fixed number of steps for each epoch of the paper",
    "a few columns of the table, by default those that a tiny model learns",
)
TINY = (
    "a model of 4.2 to 7 M parameters with random weights instead of 1.3B pre-trained ones",
    "64-pixel images in four patches of 32",
    "learning rate 3e-4 (action head 1e-3), batch 32, not a constant 2e-5 and 512",
    "warm-up and cool-down in every stage, of which rows in stages have two and others one",
)
TINY_OPENVLA = "OpenVLA's rows have the small VLM's size: Llama 2 differs in its head and biases"
UNHELD = "nothing is held in these columns: the grasp decoder's label never changes"
UNSUPPORTED = "the paper's own figures there do not have the sign of its claim"


def average_metrics(row: Path, stage: int) -> dict[str, dict]:
    """Return the held-out metrics after a row's last stage: mean over seeds, with its interval."""
    files = row.glob(f"seed-*/stage{stage}/validation.json")
    runs = [read_json(path)["metrics"] for path in files]
    metrics = {}
    for name, about in (runs[0] if runs else {}).items():
        ours = [run[name]["ours"] for run in runs]
        low, high = seed_interval(ours)
        high = min(high, 1.0) if about["unit"] == "share" else high
        metrics[name] = {"ours": mean(ours)} | ({"low": low, "high": high} if low <= high else {})
        metrics[name] |= {key: about[key] for key in ("trivial", "unit", "higher_is_better")}
    return metrics


def make_row(folder: Path, label: str, paper: dict[str, float], stage: int = 0) -> dict:
    """Return one row: its cells, their average, and its held-out metrics."""
    counts = count_successes(folder)
    cells = {key: rate_of(by_seed) | {"paper": paper.get(key)} for key, by_seed in counts.items()}
    if summed := sum_columns(counts):
        theirs = [paper[key] for key in counts if key in paper]
        cells["average"] = rate_of(summed) | {"paper": mean(theirs) if theirs else None}
    seeds = sorted({seed for by_seed in counts.values() for seed in by_seed})
    metrics = average_metrics(folder, stage)
    return {"label": label, "seeds": seeds, "cells": cells, "metrics": metrics}


def make_table(results: Path, number: int, names: Sequence[str], cell: Callable, preset: str):
    """The content of results/table-N.json, from the episodes there.

    `cell` maps a row to the row under whose name its results are kept (tools/reproduce.py).
    """
    folders = {name: results / cell(name) for name in ROWS}
    rows = {
        name: make_row(folders[name], ROWS[name].label, PAPER[name], ROWS[name].stages[-1])
        for name in names
    }
    rows |= {bound: make_row(results / bound, bound, {}) for bound in ("random", "expert")}
    columns = dict.fromkeys(key for row in rows.values() for key in row["cells"])
    holds = any(word in key for key in columns for word in ("pick", "place"))
    tiny = TINY + (TINY_OPENVLA,) * any(ROWS[n].openvla for n in names) if preset == "tiny" else ()
    return {
        "title": f"Table {number} in miniature",
        "task_columns": [key.split("/") for key in columns if key != "average"],
        "rows": rows,
        "claims": [judge(c, folders, preset) for c in CLAIMS if {c.a, c.b} <= {*names}],
        "differs": [*tiny, *ALWAYS, *([] if holds else [UNHELD])],
    }


# --- Markdown ---


def format_cell(cell: dict | None) -> str:
    """Return `0.73 [0.56, 0.86] (0.87)`, the paper's rate in parentheses."""
    if cell is None:
        return "not run"
    paper = "" if cell["paper"] is None else f" ({cell['paper']:.2f})"
    return f"{cell['rate']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]{paper}"


def format_evidence(claim: dict) -> str:
    """Return `Here +0.05 [-0.17, +0.27], the paper ...; 3 seeds, 28 would detect that`."""
    seeds, needed = claim["seeds"], claim["seeds_needed"]
    return (
        f"Here {claim['ours']:+.2f} [{claim['low']:+.2f}, {claim['high']:+.2f}], the paper in "
        f"these columns {claim['paper']:+.2f}; {seeds} seed{'s' * (seeds != 1)}, "
        f"{f'{needed} would detect that' if needed else UNSUPPORTED}"
    )


def format_claim(claim: dict) -> str:
    if claim["verdict"] == "not run":
        why = f"; {claim['why']}" if "why" in claim else ""
        return f"- {claim['name']}: not run. {claim['statement']}{why}"
    verdict = f"**{claim['verdict']}**. {claim['statement']}"
    return f"- {claim['name']}: {verdict}. {format_evidence(claim)}"


def format_metric(metric: dict | None) -> str:
    """Return `4.99 [4.61, 5.37] cm (95.6)`, the best constant in parentheses."""
    if metric is None:
        return "-"
    ends = f" [{metric['low']:.3g}, {metric['high']:.3g}]" if "low" in metric else ""
    unit = metric["unit"] if metric["unit"] not in ("share", "R2") else ""
    return f"{metric['ours']:.3g}{ends} {unit}".strip() + f" ({metric['trivial']:.3g})"


def held_out_table(rows: Iterable[dict]) -> list[str]:
    """Return the lines of held-out metrics; `rows` have a label and metrics."""
    rows = [row for row in rows if row["metrics"]]
    names = [*dict.fromkeys(name for row in rows for name in row["metrics"])]
    cells = [[row["label"], *(format_metric(row["metrics"].get(n)) for n in names)] for row in rows]
    heads = ["held out", *(name.replace("_", " ") for name in names)]
    return markdown(cells, heads) if rows else []


def to_markdown(table: dict) -> list[str]:
    """Return the lines of success rates, of held-out metrics and of claims."""
    keys = ["/".join(pair) for pair in table["task_columns"]] + ["average"]
    rows = table["rows"].values()
    success = [
        [row["label"], str(len(row["seeds"])), *(format_cell(row["cells"].get(k)) for k in keys)]
        for row in rows
    ]
    lines = [*markdown(success, [table["title"], "seeds", *keys]), "", *held_out_table(rows), ""]
    return lines + [format_claim(claim) for claim in table["claims"]]


def list_differences(table: dict) -> str:
    return f"What differs from the paper's recipe: {'; '.join(table['differs'])}."
