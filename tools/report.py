"""The report of a run: success table, held-out metrics, curves, videos.

    python -m tools.report --run RUN     # RUN/report.md, report.html, results.json, videos/

Reads RUN/eval*/results.json (one folder per policy), RUN/stage[123]/log.jsonl and validation.json.
What is not there is "not run". report.html (tools/page.py) is the same and more in one file.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from config import LOSSES, InputError, explained, quoted
from durable import read_json, read_lines
from outcomes import IMPLIED
from rows import DEFAULT_ROW, ROWS
from tasks import COLUMNS, PAPER_COLUMNS
from tools.markup import NOT_RUN
from tools.page import write_page
from tools.tables import differs_text, lines_of

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


def plot_curves(curves: dict, path: Path):
    rows = math.ceil(len(curves) / 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.axis("off")
    for axis, (loss, lines) in zip(axes, curves.items(), strict=False):
        for stage, which, steps, values in lines:
            style = dict(ls="--", marker="o", ms=3) if which == "val" else dict(alpha=0.6)
            style |= dict(color=f"C{stage.removeprefix('stage')}", label=f"{stage} {which}")
            axis.plot(steps, values, **style)
        axis.set(title=loss, xlabel="step, stages end to end")
        if all(min(values) > 0 for *_, values in lines):
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


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


def rate(column: dict | None) -> str:
    """Write `22/30 = 0.73 [0.56, 0.86]` and the success at the end."""
    if column is None:
        return NOT_RUN
    n, once, end = column["n"], column["success_once"], column["success_at_end"]
    at_end = NOT_RUN if end is None else f"{end:.2f}"
    interval = f"[{column['low']:.2f}, {column['high']:.2f}]"
    return f"{round(once * n)}/{n} = {once:.2f} {interval}, at the end {at_end}"


def code_commit() -> str | None:
    """The commit of this code, None outside of git; `-dirty` behind it if a program differs."""
    git = ["git", "-C", Path(__file__).parent]
    head = subprocess.run([*git, "rev-parse", "-q", "--verify", "HEAD"], capture_output=True)
    if not (commit := head.stdout.decode().strip()):
        return None
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"])
    return commit + "-dirty" * changed.returncode


def success_table(policies: dict[str, dict], papers: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a table from {policy: {column: figures}} and {row: {column: rate}}."""
    cells = [["", *policies, *(f"paper, {row}" for row in papers)]]
    for name in COLUMNS:
        if name not in PAPER_COLUMNS and not any(name in columns for columns in policies.values()):
            continue
        theirs = [f"{paper[name]:.2f}" if name in paper else "-" for paper in papers.values()]
        cells.append([name, *(rate(columns.get(name)) for columns in policies.values()), *theirs])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    pad = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells]
    return [f"| {' | '.join(line)} |" for line in pad]


def metrics_table(validation: dict[str, dict]) -> list[str]:
    """Return the lines of the held-out metrics beside the trivial predictor's, stage by stage."""
    if not validation:
        return []
    lines = ["| stage | metric | ours | trivial | n | |", "|---" * 6 + "|"]
    for stage, metrics in validation.items():
        for name, m in metrics.items():
            beats = m["ours"] > m["trivial"] if m["higher_is_better"] else m["ours"] < m["trivial"]
            verdict = f"{'beats' if beats else 'does not beat'} the trivial predictor"
            verdict = "the label never changes" if m.get("constant") else verdict
            ours, trivial = (f"{m[key]:.3g} {m['unit']}".strip() for key in ("ours", "trivial"))
            cells = (stage, name, ours, trivial, m["n"], verdict)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def gather_videos(run: Path) -> list[str]:
    """Copy every evaluation's videos to RUN/videos, and return their paths in RUN."""
    gathered = []
    for path in sorted(run.glob("eval*/videos/*.mp4")):
        if path.name.endswith(".part.mp4"):
            continue
        name = Path("videos") / f"{path.parent.parent.name}_{path.name}"
        (run / "videos").mkdir(exist_ok=True)
        shutil.copyfile(path, run / name)
        gathered.append(str(name))
    return gathered


def section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(lines or [NOT_RUN])]


def unlike(manifests: list[dict]) -> list[str]:
    """The sentence that belongs under a table of evaluations that are not of the same episodes."""
    names = ("task", "split", "horizon", "assets", "simulation")
    manifests = [IMPLIED | each for each in manifests]
    differ = [name for name in names if len({each.get(name) for each in manifests}) > 1]
    if not differ:
        return []
    return ["", f"**Not the same episodes**: these evaluations differ in {', '.join(differ)}."]


def write_report(run: Path) -> Path:
    """Write RUN/report.md and .html, curves.png, results.json and videos/; the first one's path."""
    evaluations, curves, videos = read_evaluations(run), read_curves(run), gather_videos(run)
    validation = {
        path.parent.name: read_json(path)["metrics"]
        for path in sorted(run.glob("stage[123]/validation.json"))
    }
    if curves:
        plot_curves(curves, run / "curves.png")
    manifests = {heading: results["manifest"] for heading, results in evaluations.items()}
    learned = [each for each in manifests.values() if each["policy"] == "learned"]
    rows = {(each["row"], each["task"]) for each in learned} or {(DEFAULT_ROW, "set_table")}
    papers = {ROWS[name].label: ROWS[name].paper.get(task, {}) for name, task in sorted(rows)}
    columns = {key: {} for key in ("ours", "random", "expert")}
    columns |= {heading: results["columns"] for heading, results in evaluations.items()}
    different = unlike([*manifests.values()])
    tables = [read_json(path) for path in sorted(run.glob("table-*.json"))]
    made = [
        line for table in tables
        for line in section(table["title"], [*lines_of(table), "", differs_text(table)])
    ]  # fmt: skip
    listing = ["```json", json.dumps(manifests, indent=2), "```"]
    lines = [
        f"# {run.resolve().name}",
        "",
        "Success at any step of an episode, with the Wilson 95 % interval: two intervals that",
        "overlap do not separate two policies. The paper's figures are of the real apartments.",
        *made,
    ]
    if not tables or evaluations or validation or curves:  # a folder of tables alone is not a run
        lines += [
            *section("Success", success_table(columns, papers)),
            *different,
            *section("Held-out episodes", metrics_table(validation)),
            *section("Losses", ["![losses](curves.png)"] if curves else []),
            *section("Videos", [f"- [{name}]({name})" for name in videos]),
            *section("Manifests", listing if manifests else []),
        ]
    (run / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = {"evaluations": evaluations, "validation": validation, "videos": videos}
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    note = "".join(different).replace("**", "")
    write_page(run, columns, papers, note, validation, curves, manifests)
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
