"""The report of a run: success table, held-out metrics, curves, videos. And what draws the videos.

    python -m tools.report --run RUN     # RUN/report.md, curves.png, results.json, videos/

Reads RUN/eval*/results.json (one folder per policy), RUN/stage[123]/log.jsonl and validation.json.
What is not there is "not run". `Film` is what `eval.py --video` draws with.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from config import CAMERAS, LOSSES, explained
from data import normalize_depth
from durable import read_lines
from rows import ROWS
from tasks import COLUMNS, PAPER_COLUMNS

FPS = 20  # the control rate: films run in real time
VIEW, INSET, PANEL = 512, 128, 208  # pixels; all sums are multiples of 16, as h264 wants them
PREDICTED, TRUE = np.array([255, 110, 0]), np.array([0, 255, 90])  # colours of masks and of text
FONT = ImageFont.load_default(13)
NOT_RUN = "not run"
DEFAULT_ROW = "auxvla-all"


# --- Videos ---


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels just outside a mask [H, W]: an outline that hides nothing of the target."""
    padded = np.pad(mask, 1)
    grown = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~mask


def draw_masks(rgb: np.ndarray, true: np.ndarray, predicted: np.ndarray | None) -> np.ndarray:
    """Tint the predicted mask (probability above 1/2) and outline the true one; uint8 [H, W, 3]."""
    image = rgb.astype(float)
    if predicted is not None:
        inside = predicted > 0.5
        image[inside] = 0.4 * image[inside] + 0.6 * PREDICTED
    image[outline(true)] = TRUE
    return image.astype(np.uint8)


def numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.2f}" for value in values)


class Film:
    """One episode in the style of Fig. 4: a view from outside, the four inputs, the predictions.

    `policy` is the learned one, whose `predictions` are drawn, or None. Insets from top to bottom:
    head depth, head RGB, hand depth, hand RGB. Orange is predicted, green is true.
    """

    obs_mode = "rgb+depth+segmentation"  # what it draws

    def __init__(self, env, policy, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.env, self.policy, self.folder, self.name = env, policy, folder, name
        self.part = folder / f"{name}.part.mp4"
        self.writer = imageio.get_writer(self.part, fps=FPS, codec="libx264", quality=7)

    def add(self, obs: dict, step: int):
        """Draw one observation; call after `policy.act` on it."""
        self.writer.append_data(self.frame(obs, step))

    def save(self, success: bool):
        """Finish the file under its final name."""
        self.writer.close()
        self.part.replace(self.folder / f"{self.name}_{'success' if success else 'fail'}.mp4")

    def frame(self, obs: dict, step: int) -> np.ndarray:
        """Compose uint8 [VIEW, VIEW + INSET + PANEL, 3]."""
        # Within a chunk of actions the policy does not look: its predictions are the chunk's first.
        predictions = {} if self.policy is None else self.policy.predictions
        canvas = np.zeros((VIEW, VIEW + INSET + PANEL, 3), np.uint8)
        canvas[:, :VIEW] = Image.fromarray(self.env.third_person()).resize((VIEW, VIEW))
        insets = []
        for camera, mask in zip(CAMERAS, self.env.target_masks(obs), strict=True):
            data, seg = obs["sensor_data"][f"fetch_{camera}"], None
            near = normalize_depth(data["depth"][0]).cpu().numpy()  # [128, 128, 1] in (0, 1]
            if "seg" in predictions and camera in self.policy.model.cfg.cameras:
                seg = predictions["seg"][0, self.policy.model.cfg.cameras.index(camera)]
            insets.append(np.repeat(255 * near, 3, axis=-1).astype(np.uint8))
            insets.append(draw_masks(data["rgb"][0].cpu().numpy(), mask, seg))
        canvas[:, VIEW : VIEW + INSET] = np.concatenate(insets)
        image = Image.fromarray(canvas)
        self.write(ImageDraw.Draw(image), obs, step, predictions)
        return np.asarray(image)

    def write(self, draw: ImageDraw.ImageDraw, obs: dict, step: int, predictions: dict):
        """Write every predicted quantity above its true value."""
        extra, predicted, true = obs["extra"], tuple(PREDICTED), tuple(TRUE)
        rows = [
            ("holds the target", "grasp", extra["is_grasped"][0]),
            ("base x y, world (m)", "pos", self.env.pos),
        ]
        obj = extra["obj_pose_wrt_base"][0, :3]
        if obj.any():  # MS-HAB writes zeros where a subtask has no object
            rows.append(("object x y z, base (m)", "obj", obj))
        lines = [(self.env.instruction, "white"), (f"step {step}", "white"), ("", "white")]
        for title, key, value in rows:
            value = np.asarray(value, float).ravel()
            lines.append((title, "white"))
            if key in predictions:
                guess = predictions[key][0].ravel()[: len(value)]
                lines.append((f"  {numbers(guess)}  predicted", predicted))
            lines.append((f"  {numbers(value)}  true", true))
        lines += [("", "white"), ("target: outline true", true)]
        if "seg" in predictions:
            lines.append(("target: tint predicted", predicted))
        for i, (text, colour) in enumerate(lines):
            draw.text((VIEW + INSET + 8, 8 + 17 * i), text, fill=colour, font=FONT)


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
        results = json.loads(path.read_text())
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
    """The commit of this code, None outside of git."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "-q", "--verify", "HEAD"]
    return subprocess.run(git, capture_output=True).stdout.decode().strip() or None


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
            verdict = "beats" if beats else "does not beat"
            ours, trivial = (f"{m[key]:.3g} {m['unit']}".strip() for key in ("ours", "trivial"))
            cells = (stage, name, ours, trivial, m["n"], f"{verdict} the trivial predictor")
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
    names = ("task", "split", "horizon", "assets")
    differ = [name for name in names if len({each.get(name) for each in manifests}) > 1]
    if not differ:
        return []
    return ["", f"**Not the same episodes**: these evaluations differ in {', '.join(differ)}."]


def write_report(run: Path) -> Path:
    """Write RUN/report.md, curves.png, results.json and videos/; return the report's path."""
    evaluations, curves, videos = read_evaluations(run), read_curves(run), gather_videos(run)
    validation = {
        path.parent.name: json.loads(path.read_text())["metrics"]
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
    listing = ["```json", json.dumps(manifests, indent=2), "```"]
    lines = [
        f"# {run.resolve().name}",
        "",
        "Success at any step of an episode, with the Wilson 95 % interval: two intervals that",
        "overlap do not separate two policies. The paper's figures are of the real apartments.",
        *section("Success", success_table(columns, papers)),
        *unlike([*manifests.values()]),
        *section("Held-out episodes", metrics_table(validation)),
        *section("Losses", ["![losses](curves.png)"] if curves else []),
        *section("Videos", [f"- [{name}]({name})" for name in videos]),
        *section("Manifests", listing if manifests else []),
    ]
    (run / "report.md").write_text("\n".join(lines) + "\n")
    results = {"evaluations": evaluations, "validation": validation, "videos": videos}
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return run / "report.md"


def main(run: Path):
    """Write the report of RUN, a folder with stage*/ and eval*/."""
    if not run.is_dir():
        raise FileNotFoundError(
            f"{run}: no such run. One begins with: "
            f"python train.py --stage 1 --data DATA --out {run}/stage1"
        )
    report = write_report(run)
    print(report.read_text().partition("## Losses")[0] + f"All of it: {report}")


if __name__ == "__main__":
    with explained():
        tyro.cli(main)
