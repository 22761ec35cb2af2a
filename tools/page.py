"""RUN/report.html: a run's report as one file for a browser, without server, network or library.

Success with intervals beside the paper's, held-out metrics, losses, the films, and for one episode
of each evaluation a slider over what the policy saw and predicted. Where tools/reproduce.py left
RUN/table-N.json, each of those tables with its claims. page.css and page.js go into the file.
"""

import json
import re
from html import escape
from pathlib import Path

from durable import write
from tools.markup import (
    NOT_RUN,
    anchor,
    bars,
    count,
    data,
    figures,
    interval,
    plot,
    section,
    table,
    words,
)
from tools.slider import walk
from tools.tables import OTHERWISE

LIMIT = 20_000_000  # bytes of films and steps in the page, as text; about the page's size
FILM = re.compile(r"(.+)_(\d+)_(success|fail)")  # column, seed: how eval.py and Film name them


# --- A run ---


def success(columns: dict[str, dict], papers: dict[str, dict], note: str, learned: set) -> str:
    """From {policy: {column: figures}} and {row: {column: rate}}, as in report.success_table."""
    names = dict.fromkeys(name for each in (*papers.values(), *columns.values()) for name in each)

    def cell(policy: str, name: str) -> dict | None:
        if (found := columns[policy].get(name)) is None:
            return None
        paper = found["paper"] if policy in learned else None
        return found | {"rate": found["success_once"], "paper": paper}

    def text(found: dict | None) -> str:
        if found is None:
            return figures(None)
        end, n = found["success_at_end"], found["n"]
        at_end = [] if end is None else [f"at the end {end:.2f}"]
        return figures(found, f"{round(found['rate'] * n)}/{n}", *at_end)

    rows = [
        [words(name), *(text(cell(policy, name)) for policy in columns)]
        + [f"{paper[name]:.2f}" if name in paper else "-" for paper in papers.values()]
        for name in names
    ]
    heads = ["", *map(escape, columns), *(f"paper, {escape(row)}" for row in papers)]
    groups = []
    for name in names:
        lines = [(escape(p), cell(p, name)) for p in columns if name in columns[p]]
        groups += [(words(name), lines)] if lines else []
    ends = [each["success_at_end"] for of in columns.values() for each in of.values()]
    stopped = f'<p class="note">Success at the end: {NOT_RUN} where episodes stop at a success.</p>'
    warning = f'<p class="warning">{escape(note)}</p>' if note else ""
    parts = [table(heads, rows, "success"), warning, stopped if None in ends else ""]
    return section("Success", *parts, bars(groups) if groups else "")


def held_out(validation: dict[str, dict]) -> str:
    rows = []
    for stage, metrics in validation.items():
        for name, m in metrics.items():
            better = (m["ours"] > m["trivial"]) == m["higher_is_better"] and m["ours"] != m[
                "trivial"
            ]
            ours, trivial = (
                escape(f"{m[key]:.3g} {m['unit']}".strip()) for key in ("ours", "trivial")
            )
            verdict = "beats it" if better else "<b>does not beat it</b>"
            verdict = "the label never changes" if m.get("constant") else verdict
            rows.append(
                [escape(stage), words(name), f"<b>{ours}</b>", trivial, verdict, str(m["n"])]
            )
    heads = ("stage", "metric", "ours", "trivial predictor", "", "frames")
    return section("Held-out episodes", table(heads, rows, "held-out metrics") if rows else "")


def losses(curves: dict[str, list[tuple]]) -> str:
    plots = ""
    for loss, lines in curves.items():
        drawn = [(f"{stage} {which}", steps, values) for stage, which, steps, values in lines]
        plots += plot(loss, drawn, log=True)
    about = (
        '<p class="note">Against steps, stages end to end: <span class="stage1">stage 1</span>, '
        '<span class="stage2">2</span>, <span class="stage3">3</span>; held-out dashed. '
        "Logarithmic.</p>"
    )
    return section("Losses", f'<div class="plots">{plots}</div>{about}' if plots else "")


# --- Films and steps ---


class Budget:
    """What still fits into the page; `left_out` names what did not."""

    def __init__(self):
        self.left, self.left_out = LIMIT, []

    def fits(self, path: Path, run: Path, size: float) -> bool:
        if size > self.left:
            self.left_out.append(f"{path.relative_to(run)} ({size / 1e6:.1f} MB)")
            return False
        self.left -= size
        return True


def films(run: Path, kind: str) -> list[Path]:
    """The finished ones."""
    return [
        path for path in sorted(run.glob(f"eval*/videos/*.{kind}")) if FILM.fullmatch(path.stem)
    ]


def title_of(path: Path) -> str:
    """`close drawer, seed 0: success (eval)` of eval/videos/close_drawer_0_success.mp4."""
    column, seed, outcome = FILM.fullmatch(path.stem).groups()
    return f"{words(column)}, seed {seed}: <b>{outcome}</b> ({escape(path.parts[-3])})"


def video(path: Path) -> str:
    source, label = data("video/mp4", path.read_bytes()), words(path.stem)
    return (
        f'<figure><video controls preload="metadata" aria-label="{label}" src="{source}"></video>'
        f"<figcaption>{title_of(path)}</figcaption></figure>"
    )


def chosen_films(run: Path) -> list[Path]:
    """The steps of one episode of each evaluation: the first with an object, or the first."""
    of_evaluation: dict[Path, list[Path]] = {}
    for path in films(run, "json"):
        of_evaluation.setdefault(path.parent, []).append(path)

    def has_object(path: Path) -> bool:
        return "obj" in json.loads(path.read_bytes())["steps"][0]["true"]

    return [max(paths, key=has_object) for paths in of_evaluation.values()]


def moving(run: Path) -> list[str]:
    """Both sections, within the page's budget: first the steps, then films in order."""
    budget = Budget()
    walks = [
        walk(json.loads(path.read_bytes()), title_of(path), number)
        for number, path in enumerate(chosen_films(run))
        if budget.fits(path, run, path.stat().st_size)
    ]
    videos = [
        video(path)
        for path in films(run, "mp4")
        if budget.fits(path, run, path.stat().st_size * 4 / 3)
    ]
    gallery = f'<div class="gallery">{"".join(videos)}</div>' if videos else ""
    if budget.left_out:
        names = ", ".join(map(escape, budget.left_out))
        gallery += f'<p class="warning">Left out, for the size of this page: {names}.</p>'
    return [section("Step by step", *walks), section("Films", gallery)]


# --- Tables in miniature ---


def table_cell(cell: dict | None) -> str:
    if cell is None:
        return figures(None)
    rates = " ".join(f"{rate:.2f}" for rate in cell["by_seed"].values())
    paper = "" if cell["paper"] is None else f'<span class="paper">paper {cell["paper"]:.2f}</span>'
    return figures(cell, f"{cell['n']} episodes, by seed {rates}", paper)


def metric_cell(m: dict | None, trained: bool) -> str:
    if m is None:  # a row without that decoder
        return '<span class="absent">not measured</span>' if trained else figures(None)
    ends = f"[{m['low']:.3g}, {m['high']:.3g}]" if "low" in m else "one seed"
    text = f"<b>{m['ours']:.3g} {escape(m['unit'])}</b><small>{ends}</small>"
    return f"{text}<small>trivial {m['trivial']:.3g}</small>"


def claim(each: dict) -> str:
    verdict, text = escape(each["verdict"]), escape(each["statement"])
    if each["verdict"] != NOT_RUN:
        ours = f"{each['ours']:+.2f} {interval(each['low'], each['high'], '+')}"
        theirs = NOT_RUN if each["paper"] is None else f"{each['paper']:+.2f}"
        ran, needed = count(each["seeds"], "seed"), each["seeds_needed"]
        enough = f"{needed} would detect the paper's" if needed else OTHERWISE
        text += f'<small><span class="paper">paper {theirs}</span>, here {ours}, {ran} ({enough})'
        text += "</small>"
    elif "why" in each:
        text += f"<small>{escape(each['why'])}</small>"
    return f'<li><span class="verdict {anchor(verdict)}">{verdict}</span><div>{text}</div></li>'


def miniature(made: dict) -> str:
    """The section of one table-N.json."""
    rows, columns = made["rows"].values(), ["/".join(pair) for pair in made["task_columns"]]
    keys = [*columns, "average"]
    cells = [
        [f"{escape(row['label'])}<small>{count(len(row['seeds']), 'seed')}</small>"]
        + [table_cell(row["cells"].get(key)) for key in keys]
        for row in rows
    ]
    groups = [
        (words(key), [(escape(row["label"]), row["cells"].get(key)) for row in rows])
        for key in keys
    ]
    differs = "".join(f"<li>{escape(each)}</li>" for each in made["differs"])
    return section(
        made["title"],
        f"<p><code>{escape(made['command'])}</code></p>",
        table(["", *map(words, keys)], cells, made["title"]),
        bars(groups),
        known(made),
        f'<h3>Claims</h3><ul class="claims">{"".join(map(claim, made["claims"]))}</ul>',
        f"<h3>What differs from the paper</h3><ul>{differs}</ul>",
    )


def known(made: dict) -> str:
    """The held-out metrics of each row that is trained."""
    learners = [row for row in made["rows"].values() if row["metrics"] or not row["seeds"]]
    names = [*dict.fromkeys(name for row in learners for name in row["metrics"])]
    cells = [
        [escape(row["label"])]
        + [metric_cell(row["metrics"].get(name), bool(row["metrics"])) for name in names]
        for row in learners
    ]
    label = f"{made['title']}: held-out metrics"
    title = "<h3>What each row knows of held-out frames</h3>"
    return title + table(["", *map(words, names)], cells, label) if names else ""


# --- The page ---


def write_page(
    run: Path,
    columns: dict,
    papers: dict,
    note: str,
    validation: dict,
    curves: dict,
    manifests: dict,
) -> Path:
    """Write RUN/report.html from what report.py read, and from the run's films and tables."""
    tables = [json.loads(path.read_bytes()) for path in sorted(run.glob("table-*.json"))]
    sections = {made["title"]: miniature(made) for made in tables}
    if not tables or manifests or validation or curves:  # a folder of tables alone is not a run
        listing = escape(json.dumps(manifests, indent=2))
        listing = (
            f'<pre class="scroll" tabindex="0" role="region" aria-label="manifests">{listing}</pre>'
        )
        learned = {name for name, each in manifests.items() if each["policy"] == "learned"}
        steps, gallery = moving(run)
        sections |= {
            "Success": success(columns, papers, note, learned),
            "Step by step": steps, "Films": gallery,
            "Held-out episodes": held_out(validation), "Losses": losses(curves),
            "Manifests": section("Manifests", listing if manifests else ""),
        }  # fmt: skip
    title, here = escape(run.resolve().name), Path(__file__)
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in sections)
    style, code = (here.with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js"))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body><header><h1>{title}</h1>"
        f"<nav>{links}</nav></header><main>{''.join(sections.values())}</main>"
        f"<script>{code}</script></body></html>\n"
    )
    write(run / "report.html", page.encode())
    return run / "report.html"
