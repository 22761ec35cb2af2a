"""The slider over an episode's steps: what the policy saw, its masks and numbers beside the truth.

The HTML that page.js moves, from the file that tools/film.py writes beside a film.
"""

from html import escape

from config import CAMERAS
from tools.markup import plot, script

QUANTITIES = {  # titles of a decoder's numbers, and values that their plots' axes must contain
    "grasp": (["holds the target"], [0, 1]),
    "pos": (["base x, world (m)", "base y, world (m)"], []),
    "obj": (["object x, from the base (m)", "object y (m)", "object z (m)"], []),
}


def views(pictures: dict[str, str]) -> str:
    """The four inputs; those in colour under the layers of their masks."""
    shown = ""
    for camera in CAMERAS:
        layers = [f"{camera}_{mask}" for mask in ("predicted", "true")]
        layers = "".join(f'<img data-picture="{x}" alt="">' for x in layers if x in pictures)
        for kind, above in (("rgb", layers), ("depth", "")):
            image = f'<img data-picture="{camera}_{kind}" alt="{camera} {kind}">'
            caption = f"<figcaption>{camera} {kind}</figcaption>"
            shown += f'<figure><div class="stack">{image}{above}</div>{caption}</figure>'
    return f'<div class="views">{shown}</div>'


def quantity(steps: list[dict], key: str, i: int, title: str, within: list | tuple = ()) -> str:
    """One number over the episode, and at the cursor."""
    lines = []
    for which in ("true", "predicted"):
        pairs = [(n, step[which][key][i]) for n, step in enumerate(steps) if key in step[which]]
        lines.append((which, *zip(*pairs)) if pairs else (which, (), ()))
    readout = "".join(
        f' <span class="{which}"><span data-of="{which}/{key}/{i}"></span> {which}</span>'
        for which in ("predicted", "true")
    )
    return plot(title, lines, within, readout=f'<span class="readout">{readout}</span>')


def plots(film: dict) -> str:
    """What the decoders read; the joints, where one reads them, behind a fold."""
    steps, joints = film["steps"], ""
    shown = [
        quantity(steps, key, i, title, within)
        for key, (titles, within) in QUANTITIES.items()
        for i, title in enumerate(titles)
        if key in steps[0]["true"]
    ]
    if "qpos" in steps[0]["predicted"]:
        each = [quantity(steps, "qpos", i, title) for i, title in enumerate(film["qpos_names"])]
        joints = f'<div class="plots">{"".join(each)}</div>'
        joints = f"<details><summary>{len(each)} joints</summary>{joints}</details>"
    return f'<div class="plots">{"".join(shown)}</div>{joints}'


def walk(film: dict, title: str, number: int) -> str:
    """An episode; `title` is HTML, `number` tells the page's sliders apart."""
    boxes = "".join(
        f'<label class="{mask}"><input type="checkbox" value="{mask}" checked> {mask} mask</label>'
        for mask in ("predicted", "true")
        if f"{CAMERAS[0]}_{mask}" in film["steps"][0]["pictures"]
    )
    return (
        f'<div class="walk"><h3>{escape(film["instruction"])} <small>{title}</small></h3>'
        f'<div class="controls"><button type="button">Play</button>'
        f'<label for="step-{number}">Step</label>'
        f'<input type="range" id="step-{number}" max="{len(film["steps"]) - 1}" value="0">'
        f'<output for="step-{number}"></output>{boxes}</div>'
        f"{views(film['steps'][0]['pictures'])}{plots(film)}{script(film['steps'])}</div>"
    )
