"""Write the report of a run: success table, held-out metrics, loss curves, films.

    python -m tools.report --run RUN     # RUN/report.md: the tables; RUN/report.html: all of it

It reads results and films of RUN/eval*/ (one folder per policy), log.jsonl and validation.json of
the folders in STAGES, and RUN/table-N.json of tools/reproduce.py; absent parts are "not run".
report.html (its template: report.html.j2) is one file with charts and films, without scripts.
"""

import base64
import io
import json
import re
from itertools import product
from pathlib import Path
from textwrap import fill

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rcParams
from matplotlib.figure import Figure

from config import LOSSES, InputError, quoted
from paper import DEFAULT_ROW, ROWS
from storage.files import read_json, read_lines, write
from storage.results import NOT_RUN, columns_to_show, success_table
from storage.terminal import cli, user_errors
from tools.claims import format_evidence, held_out_table, list_differences, to_markdown

FILM = re.compile(r"(.+)_(\d+)_(success|fail)")  # column, seed: how eval.py names a finished film
NOTE = """\
Success at any step of an episode, with the Wilson 95 % interval: two intervals that
overlap do not separate two policies. The paper's rates are of the real apartments. In
parentheses: the paper's rate; of held-out figures, the best constant's."""
BLUE, RED = "#4a7fc4", "#d23f31"  # in charts: our rates, the paper's
STAGES = {"stage1": BLUE, "stage1-more": "#8a5fc4", "stage2": "#e07b1a", "stage3": "#2a9d5c"}
rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
rcParams["svg.fonttype"] = "none"  # text stays text, in the browser's font

# --- The run's files ---


def read_curves(run: Path) -> dict[str, list[tuple[str, str, tuple, tuple]]]:
    """Return {loss: [("stage1", "train", steps, values), ...]}, stages end to end."""
    curves, start = {}, 0
    for stage in STAGES:
        lines = read_lines(run / stage / "log.jsonl")
        for loss, (which, prefix) in product(LOSSES, (("train", ""), ("val", "val_"))):
            key = prefix + loss
            points = [(start + line["step"], line[key]) for line in lines if key in line]
            if points:
                curves.setdefault(loss, []).append((stage, which, *zip(*points)))
        start += max((line["step"] for line in lines), default=0)
    return curves


def read_evaluations(run: Path) -> dict[str, dict]:
    """Return {heading: results}: ours or the policy's name; a second one has its folder added."""
    evaluations = {}
    for path in sorted(run.glob("eval*/results.json")):
        results = read_json(path)
        policy = results["manifest"]["policy"]
        heading = "ours" if policy == "learned" else policy
        if heading in evaluations:
            heading += f" ({path.parent.name})"
        evaluations[heading] = results
    return evaluations


def read_films(run: Path) -> dict[str, str]:
    """Return {caption: base64} of every evaluation's finished films."""
    films = {}
    for path in sorted(run.glob("eval*/videos/*.mp4")):
        if film := FILM.fullmatch(path.stem):
            column, seed, outcome = film.groups()
            caption = f"{column}, seed {seed}: {outcome} ({path.parts[-3]})"
            films[caption] = base64.b64encode(path.read_bytes()).decode()
    return films


def read_run(run: Path) -> dict:
    """Return all that a report shows, by the names that report.html.j2 uses."""
    evaluations, curves = read_evaluations(run), read_curves(run)
    manifests = {heading: results["manifest"] for heading, results in evaluations.items()}
    learned = [each for each in manifests.values() if each["policy"] == "learned"]
    rows = {(each["row"], each["task"]) for each in learned} or {(DEFAULT_ROW, "set_table")}
    files = [path for name in STAGES for path in run.glob(f"{name}/validation.json")]
    validation = [{"label": path.parent.name} | read_json(path) for path in files]
    tables = [read_json(path) for path in sorted(run.glob("table-*.json"))]
    columns = {heading: {} for heading in ("ours", "random", "expert")}
    several = len({task for _, task in rows}) > 1
    papers = {ROWS[n].label + f", {t}" * several: ROWS[n].paper.get(t, {}) for n, t in sorted(rows)}
    return {
        "title": run.resolve().name,
        "tables": tables,
        # A folder of tables alone is not a run: it has no sections that say "not run".
        "is_run": bool(not tables or evaluations or validation or curves),
        "columns": columns | {heading: each["columns"] for heading, each in evaluations.items()},
        "papers": papers,
        "validation": validation,
        "curves": curves,
        "films": read_films(run),
        "manifests": json.dumps(manifests, indent=2) if manifests else "",
    }


# --- Charts ---


def to_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element, in which black becomes the page's text colour."""
    file, metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def loss_chart(loss: str, lines: list[tuple]) -> str:
    """Draw a loss of read_curves: a colour for each stage, held-out values dashed."""
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axis = figure.subplots()
    for stage, which, steps, values in lines:
        style = dict(ls="--", lw=1.8) if which == "val" else dict(lw=1, alpha=0.6)
        axis.plot(steps, values, color=STAGES[stage], label=f"{stage} {which}", **style)
    axis.set_title(loss, loc="left", fontweight="bold")
    axis.set_xlabel("step, stages end to end")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    if all(min(values) > 0 for *_, values in lines):
        axis.set_yscale("log")
    return to_svg(figure)


def rate_chart(rows: list[dict], column: str) -> str:
    """Draw a bar for each row that has the column: its interval as a line, the paper as a mark."""
    lines = [(row["label"], row["cells"][column]) for row in rows if column in row["cells"]]
    if not lines:
        return ""
    figure = Figure(figsize=(4, 0.35 + 0.3 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for y, (_, cell) in enumerate(lines):
        axis.barh(y, 1, 0.6, color="black", alpha=0.07)
        axis.barh(y, cell["rate"], 0.6, color=BLUE, alpha=0.75)
        axis.plot([cell["low"], cell["high"]], [y, y], "k|-", ms=7, lw=1.2)
        axis.text(1.04, y, f"{cell['rate']:.2f}", va="center", fontweight="bold")
        if cell["paper"] is not None:
            axis.plot([cell["paper"]] * 2, [y - 0.42, y + 0.42], color=RED, lw=2.5)
    axis.set(xlim=(-0.01, 1.01), ylim=(len(lines) - 0.5, -0.5), xticks=(0, 0.5, 1))
    axis.set_yticks(range(len(lines)), [fill(name, 22) for name, _ in lines], parse_math=False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return to_svg(figure)


# --- Markdown and HTML ---


def verdict(metric: dict) -> str:
    """Return how a held-out metric compares with the trivial predictor's."""
    if metric.get("constant"):
        return "the label never changes"
    ours, trivial = metric["ours"], metric["trivial"]
    beats = ours > trivial if metric["higher_is_better"] else ours < trivial
    return f"{'beats' if beats else 'does not beat'} the trivial predictor"


def make_markdown(found: dict) -> str:
    """Return report.md: the tables of tools/reproduce.py, then the run's."""
    sections = {
        table["title"]: [*to_markdown(table), "", list_differences(table)]
        for table in found["tables"]
    }
    if found["is_run"]:
        manifests = found["manifests"]
        sections |= {
            "Success": success_table(found["columns"], found["papers"]),
            "Held-out episodes": held_out_table(found["validation"]),
            "Manifests": ["```json", manifests, "```"] if manifests else [],
        }
    lines = [f"# {found['title']}", "", NOTE]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *(content or [NOT_RUN])]
    return "\n".join(lines) + "\n"


def make_html(found: dict) -> str:
    """Fill in report.html.j2."""
    rows = []  # as in a table of tools/claims.py; only our own rates have the paper's beside them
    for heading, columns in found["columns"].items():
        papers = {} if heading.startswith("ours") else {"paper": None}
        cells = {name: c | {"rate": c["success_once"]} | papers for name, c in columns.items()}
        rows.append({"label": heading, "cells": cells})
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    jinja.filters["words"] = lambda name: name.replace("_", " ")
    functions = (rate_chart, loss_chart, verdict, format_evidence)
    jinja.globals |= {function.__name__: function for function in functions}
    names = columns_to_show(found["columns"])
    return jinja.get_template("report.html.j2").render(found, rows=rows, names=names)


def is_run(folder: Path) -> bool:
    return any([*folder.glob(part)] for part in ("stage*/", "eval*/", "table-*.json"))


def write_report(run: Path) -> Path:
    """Write the report of RUN, a folder with stage*/ and eval*/; return RUN/report.md."""
    if not is_run(run):
        parent = run.resolve().parent
        hint = f": python -m tools.report --run {quoted(parent)}" if is_run(parent) else ""
        raise InputError(f"{run}: expected a folder with stage1/, eval/ or table-N.json{hint}")
    found, file = read_run(run), run / "report.md"
    write(run / "report.html", make_html(found).encode())
    write(file, make_markdown(found).encode())
    print(file.read_text(encoding="utf-8").partition("## Manifests")[0])
    print(f"In full, with charts: {run / 'report.html'}")
    return file


if __name__ == "__main__":
    with user_errors():
        cli(write_report)
