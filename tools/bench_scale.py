"""Cost grows as its work: files, views, batch; `tools.bench scale` draws the three curves."""

import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from config import PRESETS, ModelConfig
from demonstrations import Demonstrations
from distributed import device_of
from model import AuxVLA
from pack import Pack, pack
from tools.bench_act import Contestants, as_seen, random_frames
from tools.bench_loader import epoch, seconds
from tools.bench_train import Step, model_of, random_batch

VIEWS: dict[int, dict] = {  # inputs by number of views (Tables 1, 2)
    1: dict(cameras=("head",), depth=False),
    2: dict(cameras=("head",)),
    4: dict(),
    20: dict(history="frames"),
}


def many_times(data: Path, times: int, folder: Path) -> Path:
    """A folder with every file of `data` so many times, as links."""
    for copy in range(times):
        for path in data.rglob("*.*"):
            link = folder / str(copy) / path.relative_to(data)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), link)
    return folder


@dataclass(frozen=True)
class ScaleBench:
    data: Path  # demonstrations in MS-HAB's layout
    json: Path | None = None
    plot: Path | None = None  # .png
    preset: Literal[tuple(PRESETS)] = "tiny"
    times: int = 10
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rounds: int = 5
    steps: int = 60  # batches of 64 that a pack is timed over
    device: Literal["cpu", "cuda"] | None = None  # default: what is there

    def run(self) -> dict:
        cfg, device = model_of(self.preset, None), device_of(self.device)
        curves = {
            "loader, frames/s against files (1 = the data)": self.loading(),
            "training step, ms a frame against views": self.training(cfg, device),
            "action tokens, ms a query against batch": self.acting(device),
        }
        if self.plot:
            draw(curves, self.plot)
        figures = {
            f"{title}: {name}, {x}": {"median": y, "min": y, "max": y}
            for title, lines in curves.items()
            for name, line in lines.items()
            for x, y in line.items()
        }
        return {"unit": "", "figures": figures, "curves": curves}

    def loading(self) -> dict[str, dict[int, float]]:
        """From files, and from a pack, which for `times` files is packed too."""
        files, packs = {}, {}
        for times in (1, self.times):
            with TemporaryDirectory() as folder:
                linked = many_times(self.data, times, Path(folder) / "data")
                files[times] = epoch(Demonstrations(linked))()  # whole: it first fills its window
                pack(str(linked), f"{folder}/pack")
                run = epoch(Pack(f"{folder}/pack"), steps=self.steps)
                packs[times] = statistics.median(run() for _ in range(self.rounds))
        return {"files": files, "pack": packs}

    def training(self, cfg: ModelConfig, device: torch.device) -> dict[str, dict[int, float]]:
        out, size = {}, 16
        for views, change in VIEWS.items():
            inputs = replace(cfg, **change)
            model = AuxVLA(inputs)
            model.train_stage(2)
            step = Step(model, random_batch(inputs, size, device), device, fused=True)
            step()
            took = statistics.median(seconds(step, device) for _ in range(self.rounds))
            out[views] = 1000 * took / size
        return {"step": out}

    def acting(self, device: torch.device) -> dict[str, dict[int, float]]:
        runs = Contestants.build(self.preset, None, None, device).runs()
        out: dict[str, dict[int, float]] = {"ours": {}, "transformers": {}}
        chosen = {"ours": "ours, tokens, first step", "transformers": "transformers generate"}
        for size in self.batches:
            frames = [as_seen(records) for records in random_frames(size, self.rounds + 1)]
            for line, name in chosen.items():
                took = [seconds(lambda: runs[name](seen), device) for seen in frames]  # noqa: B023
                out[line][size] = 1000 * statistics.median(took[1:])
        return out


def draw(curves: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False)
    for panel, (title, lines) in zip(panels[0], curves.items()):
        for name, line in lines.items():
            panel.loglog(line.keys(), line.values(), "o-", label=name)
        panel.set_title(title, fontsize=8)
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
