"""The parts of RUN/report.html: sections, tables, bars with intervals, small plots; HTML as text.

Text that comes from files goes through `escape` or `words`; all else is ours.
"""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape

NOT_RUN = "not run"
WIDTH, HEIGHT, POINTS = 200, 60, 200  # of a plot's own coordinates; points of a line
LEGEND = (
    '<p class="note">Bar: success rate. Line: 95 % interval; two that overlap do not separate two '
    'policies. <span class="paper">Mark</span>: the paper, in the real apartments.</p>'
)


def section(title: str, *parts: str) -> str:
    """A section that the page's navigation finds by its title; without parts it is not run."""
    name, body = anchor(title), "".join(parts) or f"<p>{NOT_RUN}</p>"
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table of HTML cells that scrolls in itself, not the page; a row begins with its name."""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    region = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def words(name: str) -> str:
    return escape(name.replace("_", " "))


def count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def interval(low: float, high: float, sign: str = "") -> str:
    return f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def figures(cell: dict | None, *small: str) -> str:
    """A rate over its interval and what else is known of it."""
    if cell is None:
        return f'<span class="absent">{NOT_RUN}</span>'
    lines = "".join(
        f"<small>{each}</small>" for each in (interval(cell["low"], cell["high"]), *small)
    )
    return f"<b>{cell['rate']:.2f}</b>{lines}"


def bar(name: str, cell: dict | None) -> str:
    """One line of a bar chart; `cell` has rate, low, high, paper."""
    if cell is None:
        return f'<div class="bar"><span>{name}</span><span class="absent">{NOT_RUN}</span></div>'
    rate, low, high = (100 * cell[key] for key in ("rate", "low", "high"))
    paper, text = cell.get("paper"), f"<b>{cell['rate']:.2f}</b> {interval(low / 100, high / 100)}"
    mark = "" if paper is None else f'<path class="paper" d="M{100 * paper:.1f} 0V10"/>'
    return (
        f'<div class="bar"><span>{name}</span>'
        f'<svg viewBox="-1 0 102 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/>'
        f'<rect class="fill" y="2" width="{rate:.1f}" height="6"/>'
        f'<path class="interval" d="M{low:.1f} 5H{high:.1f}M{low:.1f} 3V7M{high:.1f} 3V7"/>{mark}'
        f"</svg><span>{text}</span></div>"
    )


def bars(groups: Iterable[tuple[str, list[tuple[str, dict | None]]]]) -> str:
    charts = (
        f"<div><h3>{name}</h3>{''.join(bar(*line) for line in lines)}</div>"
        for name, lines in groups
    )
    return f'<div class="bars">{"".join(charts)}</div>{LEGEND}'


def plot(
    title: str, lines: list[tuple], within: Sequence = (), log: bool = False, readout: str = ""
) -> str:
    """A small plot of lines (class, x, y), x rising; y axis from the least to the greatest value.

    The axis contains the values `within`. With a readout there is a cursor, which page.js moves.
    """
    xs = [x for _, steps, _ in lines for x in steps]
    ys = [*within, *(y for *_, values in lines for y in values)]
    scale = math.log if log and min(ys) > 0 else float
    left, right, bottom, top = min(xs), max(xs), scale(min(ys)), scale(max(ys))
    across, up = (right - left) or 1, (top - bottom) or 1

    def points(steps, values) -> str:
        every = -(-len(steps) // POINTS)
        pairs = zip(steps[::every], values[::every])
        return " ".join(
            f"{WIDTH * (x - left) / across:.1f},{HEIGHT * (1 - (scale(y) - bottom) / up):.1f}"
            for x, y in pairs
        )

    drawn = "".join(
        f'<polyline class="{kind}" points="{points(x, y)}"/>' for kind, x, y in lines if len(x)
    )
    cursor = f'<path class="cursor" d="M0 0V{HEIGHT}"/>' if readout else ""
    return (
        f'<figure class="plot"><figcaption>{escape(title)}{readout}</figcaption>'
        f'<div class="axes"><span>{max(ys):.3g}</span><span>{min(ys):.3g}</span>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}{cursor}</svg></div></figure>"
    )


def data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def script(value) -> str:
    """JSON that no text in it can end."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
