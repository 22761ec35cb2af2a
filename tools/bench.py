"""Ours against what a user would otherwise run, side by side in one process.

    python -m tools.bench loader --data DATA --json FILE   # DATA: files in MS-HAB's layout
    python -m tools.bench train --preset tiny --json FILE
    python -m tools.bench act --preset tiny --json FILE    # or --checkpoint RUN/stage2 --data DATA
    python -m tools.bench episode --checkpoint RUN/stage2 --json FILE
    python -m tools.bench scale --data DATA --json FILE --plot FILE.png

The contestants take turns, a round each, on one CPU thread or one GPU; a figure is the median of
its rounds with the smallest and largest. The limit is measured in the same run: memory, inflate, or
the device's rate of matrix products. `tools/naive.py` is the reference model.
"""

import json
import platform
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from config import explained
from distributed import device_of
from tools.bench_act import ActBench
from tools.bench_episode import EpisodeBench
from tools.bench_loader import LoaderBench
from tools.bench_scale import ScaleBench
from tools.bench_train import TrainBench

# --- What is printed ---


def show(result: dict) -> None:
    width = max(map(len, result["figures"]))
    for name, figure in result["figures"].items():
        low, high = figure["min"], figure["max"]
        print(f"{name:{width}}  {figure['median']:10.4g} {result['unit']}  [{low:.4g}, {high:.4g}]")
    for name, value in result.items():
        if name not in ("unit", "figures"):
            print(f"{name}: {value}")


Verb = (
    Annotated[LoaderBench, tyro.conf.subcommand("loader")]
    | Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[ActBench, tyro.conf.subcommand("act")]
    | Annotated[EpisodeBench, tyro.conf.subcommand("episode")]
    | Annotated[ScaleBench, tyro.conf.subcommand("scale")]
)


def main(cfg: Verb) -> None:
    device = device_of(getattr(cfg, "device", "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)  # one core's figures: steady, and comparable between machines
    if cfg.json:
        cfg.json.parent.mkdir(parents=True, exist_ok=True)  # better missed now than afterwards
    result = cfg.run()
    show(result)
    if cfg.json:
        about = {"torch": torch.__version__, "platform": platform.platform()}
        about["device"] = torch.cuda.get_device_name() if device.type == "cuda" else processor()
        about["date"] = time.strftime("%Y-%m-%d")
        text = json.dumps({"about": about, **result}, indent=1, default=str) + "\n"
        cfg.json.write_text(text, encoding="utf-8")


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


if __name__ == "__main__":
    with explained():
        main(tyro.cli(Verb, description=__doc__))
