"""What a training run writes as it goes: log.jsonl, validation.json, a progress line."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
from config import TrainConfig


class Log:
    """log.jsonl, a progress line, validation.json. Every rank counts, rank 0 writes."""

    def __init__(
        self, cfg: TrainConfig, step: int, num_steps: int, is_main: bool, frames: int,
        held_out: int, params: int,
    ):  # fmt: skip
        self.cfg, self.num_steps, self.is_main, self.out = cfg, num_steps, is_main, Path(cfg.out)
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited, self.mark, self.since = 0.0, time.perf_counter(), time.perf_counter()
        if not is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.json").write_text(json.dumps(checkpoint.plain(cfg), indent=1))
        path = self.out / "log.jsonl"
        old = path.read_text().splitlines() if path.is_file() else []
        # Lines behind the checkpoint that we resume from will be written again.
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115  for the whole run
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            desc=f"stage {cfg.stage}",
            disable=not sys.stderr.isatty(),
        )
        print(
            f"stage {cfg.stage}: {frames:,} frames, {held_out:,} held out, "
            f"{params / 1e6:.1f}M trained parameters, {num_steps} steps of {cfg.batch_size}"
        )
        self.tracker = open_tracker(cfg) if cfg.tracker else None

    def waiting(self) -> None:
        """From here on the time goes to the data."""
        self.mark = time.perf_counter()

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self.mark

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():  # a micro-batch's loss is its share of the batch's mean
            self.sums[name] = self.sums.get(name, 0.0) + loss.detach()

    def write(self, step: int, lr: float, grad_norm: Tensor, world: int) -> None:
        """Means since the last line; collective, since each rank holds its share of every loss."""
        names, values = list(self.sums), torch.stack(list(self.sums.values())) / self.steps
        if world > 1:
            dist.all_reduce(values)
            values /= world
        seconds = time.perf_counter() - self.since
        line = {"step": step, "stage": self.cfg.stage} | dict(zip(names, values.tolist()))
        line |= {
            "samples_per_s": self.steps * self.cfg.batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        line |= {
            "lr": lr,
            "grad_norm": float(grad_norm),
            "eta_s": (self.num_steps - step) * seconds / self.steps,
        }
        self.sums, self.steps, self.waited, self.since = {}, 0, 0.0, time.perf_counter()
        if self.is_main:
            self.emit(step, line)
            shown = {
                k: f"{v:.4g}"
                for k, v in line.items()
                if k not in ("step", "stage", "lr", "grad_norm")
            }
            self.bar.update(step - self.bar.n)
            tqdm.write(
                f"{step:>7}/{self.num_steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items())
            )

    def write_validation(self, step: int, losses: dict, metrics: dict, seconds: float) -> None:
        """`seconds` it took, which are neither training nor waiting."""
        flat = {f"val_{name}": value for name, value in losses.items()}
        self.emit(
            step,
            {"step": step, "stage": self.cfg.stage}
            | flat
            | {f"val_{k}": m["ours"] for k, m in metrics.items()},
        )
        (self.out / "validation.json").write_text(
            json.dumps({"step": step, "losses": losses, "metrics": metrics}, indent=1)
        )
        tqdm.write(
            f"{step:>7} held out (best constant in brackets): "
            + "  ".join(f"{k} {m['ours']:.3g} ({m['trivial']:.3g})" for k, m in metrics.items())
        )
        self.since += seconds

    def emit(self, step: int, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        if self.tracker:
            self.tracker(step, line)


def open_tracker(cfg: TrainConfig):
    """A function (step, values) that logs to tensorboard or wandb; both are optional installs."""
    if cfg.tracker == "wandb":
        import wandb

        run = wandb.init(project="auxvla", config=checkpoint.plain(cfg), dir=cfg.out)
        return lambda step, line: run.log(line, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(cfg.out)
    return lambda step, line: [writer.add_scalar(name, value, step) for name, value in line.items()]
