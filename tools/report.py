"""The report of a run: success table, held-out metrics, curves, films.

    python -m tools.report --run RUN     # RUN/report.md, report.html, results.json, videos/

Reads RUN/eval*/results.json (one folder per policy), RUN/stage[123]/log.jsonl and validation.json,
and the tables of tools/reproduce.py, RUN/table-N.json. What is not there is "not run". report.html
(its template: report.html.j2) is one file for a browser, with charts and films.
"""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path
from textwrap import fill

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from config import LOSSES, InputError, explained, quoted
from paper import DEFAULT_ROW, ROWS
from storage.files import read_json, read_lines, write
from storage.results import IMPLIED, NOT_RUN, columns_to_show, markdown, success_table
from tools.tables import OTHERWISE, differs_text, lines_of

FILM = re.compile(r"(.+)_(\d+)_(success|fail)")  # column, seed: how eval.py names a finished film
LIMIT = 20_000_000  # bytes of films inside report.html
BLUE, RED = "#4a7fc4", "#d23f31"  # in charts: our figures, the paper's
STAGES = {"stage1": BLUE, "stage2": "#e07b1a", "stage3": "#2a9d5c"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"svg.fonttype": "none"}  # text stays text, in the browser's font

# --- The run's files ---


def read_curves(run: Path) -> dict[str, list[tuple[str, str, tuple, tuple]]]:
    """Return {loss: [("stage1", "train", steps, values), ...]}, stages end to end."""
    curves, start = {}, 0
    for log in sorted(run.glob("stage[123]/log.jsonl")):
        lines = read_lines(log)
        for loss in LOSSES:
            for which, key in (("train", loss), ("val", f"val_{loss}")):
                points = [(start + line["step"], line[key]) for line in lines if key in line]
                if points:
                    curves.setdefault(loss, []).append((log.parent.name, which, *zip(*points)))
        start += max((line["step"] for line in lines), default=0)
    return curves


def read_evaluations(run: Path) -> dict[str, dict]:
    """Return {heading: results}: ours, random or expert, and the folder where one has two."""
    evaluations = {}
    for path in sorted(run.glob("eval*/results.json")):
        results = read_json(path)
        if "manifest" not in results:
            raise InputError(
                f"{path}: not of an evaluation, expected its `manifest`. eval.py with the same "
                "flags writes it again from the episodes beside it"
            )
        policy = results["manifest"]["policy"]
        heading = "ours" if policy == "learned" else policy
        if heading in evaluations:
            heading += f" ({path.parent.name})"
        evaluations[heading] = results
    return evaluations


def gather_videos(run: Path) -> dict[str, str]:
    """Copy every evaluation's finished films to RUN/videos; return {path in RUN: caption}."""
    gathered = {}
    for path in sorted(run.glob("eval*/videos/*.mp4")):
        if film := FILM.fullmatch(path.stem):
            column, seed, outcome = film.groups()
            name = Path("videos") / f"{path.parts[-3]}_{path.name}"
            (run / "videos").mkdir(exist_ok=True)
            shutil.copyfile(path, run / name)
            gathered[str(name)] = f"{column}, seed {seed}: {outcome} ({path.parts[-3]})"
    return gathered


# --- Tables in Markdown ---


def verdict(metric: dict) -> str:
    """Say how a held-out metric compares with the trivial predictor's."""
    if metric.get("constant"):
        return "the label never changes"
    ours, trivial = metric["ours"], metric["trivial"]
    beats = ours > trivial if metric["higher_is_better"] else ours < trivial
    return f"{'beats' if beats else 'does not beat'} the trivial predictor"


def metrics_table(validation: dict[str, dict]) -> list[str]:
    """Return the lines of the held-out metrics beside the trivial predictor's, stage by stage."""
    cells = []
    for stage, metrics in validation.items():
        for name, m in metrics.items():
            values = [f"{m[key]:.3g} {m['unit']}".strip() for key in ("ours", "trivial")]
            cells.append([stage, name, *values, str(m["n"]), verdict(m)])
    return markdown(cells, ["stage", "metric", "ours", "trivial", "n", ""]) if cells else []


def unlike(manifests: list[dict]) -> str:
    """Warn when evaluations in one table are not of the same episodes; "" when they are."""
    names = ("task", "split", "horizon", "assets", "simulation")
    manifests = [IMPLIED | each for each in manifests]
    differ = [name for name in names if len({each.get(name) for each in manifests}) > 1]
    return f"these evaluations differ in {', '.join(differ)}." if differ else ""


# --- Charts ---


def svg(figure: Figure) -> str:
    """Draw a figure as an <svg> element, in which black becomes the page's text colour."""
    file, about = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=about)
    text = file.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def draw_loss(axis: Axes, loss: str, lines: list[tuple[str, str, tuple, tuple]]):
    """Draw a loss of read_curves: a colour for each stage, held-out values dashed."""
    for stage, which, steps, values in lines:
        style = dict(ls="--", lw=1.8) if which == "val" else dict(lw=1, alpha=0.6)
        axis.plot(steps, values, color=STAGES[stage], label=f"{stage} {which}", **style)
    axis.set_title(loss, loc="left", fontweight="bold")
    axis.grid(alpha=0.3)
    if all(min(values) > 0 for *_, values in lines):
        axis.set_yscale("log")


@rc_context(STYLE)
def plot_curves(curves: dict, path: Path):
    """Write all losses as one PNG, for report.md."""
    rows = math.ceil(len(curves) / 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.axis("off")
    for axis, (loss, lines) in zip(axes, curves.items(), strict=False):
        draw_loss(axis, loss, lines)
        axis.set_xlabel("step, stages end to end")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


@rc_context(STYLE)
def loss_chart(loss: str, lines: list[tuple[str, str, tuple, tuple]]) -> str:
    figure = Figure(figsize=(4, 2.1), layout="constrained")
    draw_loss(figure.subplots(), loss, lines)
    return svg(figure)


@rc_context(STYLE)
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
    return svg(figure)


# --- The report ---


def figures_of(results: dict) -> dict[str, dict]:
    """Return an evaluation's columns with `rate` and `paper` as in a cell of tools/tables.py."""
    learned = results["manifest"]["policy"] == "learned"
    return {
        name: each | {"rate": each["success_once"], "paper": each["paper"] if learned else None}
        for name, each in results["columns"].items()
    }


def read_run(run: Path) -> dict:
    """Return all that a report shows, by the names that report.html.j2 uses."""
    evaluations = read_evaluations(run)
    manifests = {heading: results["manifest"] for heading, results in evaluations.items()}
    learned = [each for each in manifests.values() if each["policy"] == "learned"]
    rows = {(each["row"], each["task"]) for each in learned} or {(DEFAULT_ROW, "set_table")}
    validation = {
        path.parent.name: read_json(path)["metrics"]
        for path in sorted(run.glob("stage[123]/validation.json"))
    }
    columns = {heading: figures_of(results) for heading, results in evaluations.items()}
    tables = [read_json(path) for path in sorted(run.glob("table-*.json"))]
    curves = read_curves(run)
    return {
        "title": run.resolve().name,
        "tables": tables,
        # A folder of tables alone is not a run: it gets no sections that say "not run".
        "is_run": bool(not tables or evaluations or validation or curves),
        "evaluations": evaluations,
        "columns": {key: {} for key in ("ours", "random", "expert")} | columns,
        "papers": {ROWS[name].label: ROWS[name].paper.get(task, {}) for name, task in sorted(rows)},
        "warning": unlike([*manifests.values()]),
        "validation": validation,
        "curves": curves,
        "videos": gather_videos(run),
        "manifests": json.dumps(manifests, indent=2) if manifests else "",
    }


def section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(lines or [NOT_RUN])]


def in_markdown(found: dict) -> str:
    lines = [
        f"# {found['title']}",
        "",
        "Success at any step of an episode, with the Wilson 95 % interval: two intervals that",
        "overlap do not separate two policies. The paper's figures are of the real apartments.",
    ]
    for table in found["tables"]:
        lines += section(table["title"], [*lines_of(table), "", differs_text(table)])
    if found["is_run"]:
        listing = ["```json", found["manifests"], "```"] if found["manifests"] else []
        warning = ["", f"**Not the same episodes**: {found['warning']}"] * bool(found["warning"])
        lines += [
            *section("Success", success_table(found["columns"], found["papers"])),
            *warning,
            *section("Held-out episodes", metrics_table(found["validation"])),
            *section("Losses", ["![losses](curves.png)"] if found["curves"] else []),
            *section("Videos", [f"- [{name}]({name})" for name in found["videos"]]),
            *section("Manifests", listing),
        ]
    return "\n".join(lines) + "\n"


def in_html(found: dict, run: Path) -> str:
    """Fill in report.html.j2; films stand in the page until LIMIT is reached."""
    films, left = {}, LIMIT
    for name in found["videos"]:
        content = base64.b64encode((run / name).read_bytes()).decode()
        if len(content) <= left:
            films[name], left = content, left - len(content)
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    jinja.filters["words"] = lambda name: name.replace("_", " ")
    jinja.globals |= dict(rate_chart=rate_chart, loss_chart=loss_chart, verdict=verdict)
    jinja.globals |= dict(colours=STAGES, otherwise=OTHERWISE)
    rows = [{"label": name, "cells": cells} for name, cells in found["columns"].items()]
    stages = [{"label": name, "metrics": of} for name, of in found["validation"].items()]
    more = dict(rows=rows, names=columns_to_show(found["columns"]), stages=stages, films=films)
    return jinja.get_template("report.html.j2").render(found, **more)


def write_report(run: Path) -> Path:
    """Write RUN/report.md and .html, curves.png, results.json and videos/; the first one's path."""
    found = read_run(run)
    if found["curves"]:
        plot_curves(found["curves"], run / "curves.png")
    results = {key: found[key] for key in ("evaluations", "validation")}
    results["videos"] = [*found["videos"]]
    write(run / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write(run / "report.html", in_html(found, run).encode())
    write(run / "report.md", in_markdown(found).encode())
    return run / "report.md"


def main(run: Path):
    """Write the report of RUN, a folder with stage*/ and eval*/."""
    if not run.is_dir():
        raise FileNotFoundError(
            f"{run}: no such run. One begins with: "
            f"python train.py --stage 1 --data DATA --out {quoted(run / 'stage1')}"
        )
    if (run / "episodes.jsonl").exists():
        raise InputError(
            f"{run}: is one evaluation, expected the folder of the run that holds it: "
            f"python -m tools.report --run {quoted(run.resolve().parent)}"
        )
    report = write_report(run)
    print(
        report.read_text(encoding="utf-8").partition("## Losses")[0]
        + f"All of it: {report}, {report.with_suffix('.html')}"
    )


if __name__ == "__main__":
    with explained():
        tyro.cli(main)
