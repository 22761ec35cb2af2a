"""The paper's tables from the episodes that tools/reproduce.py left, as JSON and in words.

    table = write_table(Path("results/set_table"), 2, names, cell, "tiny")  # table-2.json
    print("\n".join(lines_of(table)))

A cell is the rate over all trainings of a row, with the interval of tools/claims.py; beside it what
the row's latents know of held-out frames, and the claims' verdicts.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from paper import ROWS
from storage.files import read_json, write
from tools.claims import CLAIMS, average_of, judge, of_seeds, over_seeds, rate_of, read_cells

ALWAYS = (
    "a generated apartment and a scripted expert instead of ReplicaCAD and MS-HAB's policies",
    "a fixed number of steps for each epoch of the paper",
    "a few columns of the table, by default those that a tiny model learns",
)
TINY = (
    "a model of 4.6 M parameters with random weights instead of 1.3B pre-trained ones",
    "64-pixel images in four patches of 32",
    "learning rate 3e-4 (action head 1e-3), batch 32, not a constant 2e-5 and 512",
    "warm-up and cool-down in every stage, of which rows in stages have two and others one",
)
TINY_OPENVLA = "OpenVLA's rows have the small VLM's size: Llama 2 differs in its head and biases"
UNHELD = "nothing is held in these columns: the grasp decoder's label never changes"


def metrics_of(folder: Path, stage: int) -> dict[str, dict]:
    """The held-out metrics after a row's last stage, averaged over seeds, with their interval."""
    paths = of_seeds(folder, f"stage{stage}/validation.json")
    last = [read_json(path)["metrics"] for path in paths]
    metrics = {}
    for name in dict.fromkeys(name for each in last for name in each):
        runs = [each[name] for each in last if name in each]
        ours, half = over_seeds([[run["ours"] for run in runs]]) or (runs[0]["ours"], None)
        about = {key: runs[0][key] for key in ("trivial", "unit", "higher_is_better")}
        ends = {} if half is None else {"low": ours - half, "high": ours + half}
        metrics[name] = {"ours": ours, **ends, **about}
    return metrics


def row_of_table(folder: Path, label: str, paper: dict[str, float], stage: int = 0) -> dict:
    """One row: its cells, their average, and what its latents know."""
    counts = read_cells(folder)
    cells = {key: rate_of(by_seed) | {"paper": paper.get(key)} for key, by_seed in counts.items()}
    if summed := average_of(counts):
        theirs = [paper[key] for key in counts if key in paper]
        cells["average"] = rate_of(summed) | {"paper": mean(theirs) if theirs else None}
    seeds = sorted({int(seed) for by_seed in counts.values() for seed in by_seed})
    return {"label": label, "seeds": seeds, "cells": cells, "metrics": metrics_of(folder, stage)}


def write_table(
    results: Path, number: int, names: Sequence[str], cell: Callable, preset: str
) -> dict:
    """Write results/table-N.json from the episodes there, and return it."""
    rows = {}
    for name in names:
        paper = {f"{task}/{c}": r for task, of in ROWS[name].paper.items() for c, r in of.items()}
        folder, row = results / cell(name), ROWS[name]
        rows[name] = row_of_table(folder, row.label, paper, row.stages[-1])
    for bound in ("random", "expert"):
        rows[bound] = row_of_table(results / bound, bound, {})
    folders = {name: results / cell(name) for name in ROWS}
    columns = dict.fromkeys(key for row in rows.values() for key in row["cells"])
    held = any(word in key for key in columns for word in ("pick", "place"))
    tiny = TINY + (TINY_OPENVLA,) * (number == 1) if preset == "tiny" else ()
    table = {
        "table": number,
        "title": f"Table {number} in miniature",
        "command": f"python -m tools.reproduce --table {number}",
        "task_columns": [key.split("/") for key in columns if key != "average"],
        "rows": rows,
        "claims": [judge(claim, folders, preset) for claim in CLAIMS if claim.table == number],
        "differs": [*tiny, *ALWAYS, *([] if held else [UNHELD])],
    }
    write(results / f"table-{number}.json", (json.dumps(table, indent=1) + "\n").encode())
    return table


# --- In words ---


def cell_text(cell: dict | None) -> str:
    """`0.73 [0.56, 0.86] (0.87)`, the paper's figure in parentheses."""
    if cell is None:
        return "not run"
    paper = "" if cell["paper"] is None else f" ({cell['paper']:.2f})"
    return f"{cell['rate']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]{paper}"


OTHERWISE = "the paper's own figures there do not have the sign of its claim"


def claim_text(claim: dict) -> str:
    if claim["verdict"] == "not run":
        why = f"; {claim['why']}" if "why" in claim else ""
        return f"- {claim['name']}: not run. {claim['statement']}{why}"
    ours = f"{claim['ours']:+.2f} [{claim['low']:+.2f}, {claim['high']:+.2f}]"
    seeds = claim["seeds"]
    needed = f"{seeds} seed{'s' * (seeds != 1)}, "
    needed += f"{claim['seeds_needed']} would detect that" if claim["seeds_needed"] else OTHERWISE
    return (
        f"- {claim['name']}: **{claim['verdict']}**. {claim['statement']}. Here {ours}, the paper "
        f"in these columns {claim['paper']:+.2f}; {needed}"
    )


def metric_text(metric: dict | None) -> str:
    """`4.99 [4.61, 5.37] cm (95.6)`, the best constant in parentheses."""
    if metric is None:
        return "-"
    ends = f" [{metric['low']:.3g}, {metric['high']:.3g}]" if "low" in metric else ""
    unit = metric["unit"] if metric["unit"] not in ("share", "R2") else ""
    return f"{metric['ours']:.3g}{ends} {unit}".strip() + f" ({metric['trivial']:.3g})"


def known_lines(table: dict) -> list[str]:
    """What each row's latents know of held-out frames, in Markdown."""
    rows = [row for row in table["rows"].values() if row["metrics"]]
    names = [*dict.fromkeys(name for row in rows for name in row["metrics"])]
    headings = " | ".join(name.replace("_", " ") for name in names)
    lines = [f"| held out | {headings} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        texts = (metric_text(row["metrics"].get(name)) for name in names)
        lines.append(f"| {row['label']} | {' | '.join(texts)} |")
    return lines if rows else []


def lines_of(table: dict) -> list[str]:
    """The table in Markdown, what the rows know, then the claims."""
    keys = ["/".join(pair) for pair in table["task_columns"]] + ["average"]
    lines = [f"| {table['title']} | seeds | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for row in table["rows"].values():
        texts = (cell_text(row["cells"].get(key)) for key in keys)
        lines.append(f"| {row['label']} | {len(row['seeds'])} | {' | '.join(texts)} |")
    return [*lines, "", *known_lines(table), "", *map(claim_text, table["claims"])]


def differs_text(table: dict) -> str:
    return f"What differs from the paper's recipe: {'; '.join(table['differs'])}."
