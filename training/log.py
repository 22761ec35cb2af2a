"""What a training run writes: log.jsonl, validation.json, lines on the terminal, checkpoints."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config import InputError, TrainConfig
from data import Frames
from model import AuxVLA
from paper import describe
from storage import checkpoint
from storage.files import append, dumps, read_lines, well_formed, write, write_json
from training.ranks import Ranks


class Log:
    """Sums of losses and times on every rank; files and terminal on the main one."""

    def __init__(self, cfg: TrainConfig, step: int, num_steps: int, ranks: Ranks, limit: float):
        self.limit = limit  # samples per second of a rank at its device's full speed
        self.cfg, self.num_steps, self.ranks, self.out = cfg, num_steps, ranks, Path(cfg.out)
        self.clear()
        if not ranks.is_main:
            return
        write_json(self.out / "config.json", checkpoint.to_json(cfg))
        path = self.out / "log.jsonl"
        # Drop lines newer than the checkpoint that the run resumes: those steps run again.
        with well_formed(path):
            kept = [line for line in read_lines(path) if line["step"] <= step]
        write(path, "".join(f"{dumps(line)}\n" for line in kept).encode())
        if cfg.row:
            print(describe(cfg.row))
        self.track, self.end_tracking = open_tracker(cfg)

    def describe(self, frames: Frames, held_out: Frames, model: AuxVLA) -> None:
        """Print what the stage trains, and on what."""
        trained = sum(p.numel() for part in model.trained_parts() for p in part) / 1e6
        if self.ranks.is_main:
            print(
                f"stage {self.cfg.stage}: {len(frames):,} frames, {len(held_out):,} held out, "
                f"{trained:.1f}M trained parameters, {self.num_steps} steps of "
                f"{self.cfg.batch_size}, {self.cfg.micro_batch} frames at a time"
                f"{'' if self.cfg.grad_clip else ', gradients are not clipped'}"
            )

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def time_waits(self, batches: Iterable) -> Iterator:
        """Yield the batches; add up the time until each arrives."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Add a step: this rank's share of each loss, and the gradient norm."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.steps, self.grad_norm = self.steps + 1, grad_norm

    def skip(self, step: int, frames: list[str]) -> None:
        """Write a step that no rank took, and the names of its frames."""
        if self.ranks.is_main:
            self.emit(step, {"skipped": frames})
            print(f"{step:>7}/{self.num_steps}  skipped: a loss or gradient is not finite")

    def write(self, step: int, lr: float) -> None:
        """Write the means since the last line. Collective: each rank has a share of the losses."""
        if not self.steps:  # all were skipped
            return
        means = torch.stack(list(self.sums.values())) / self.steps
        means = self.ranks.sum(means) / self.ranks.world
        seconds = time.perf_counter() - self.since
        # A mean of exactly 0 had no labels.
        losses = {name: loss for name, loss in zip(self.sums, means.tolist()) if loss}
        samples = self.steps * self.cfg.batch_size / seconds
        speed = {
            "samples_per_s": samples,
            "mfu": samples / (self.ranks.world * self.limit),
            "data_wait": self.waited / seconds,
            "eta_s": (self.num_steps - step) * seconds / self.steps,
        }
        self.clear()
        if self.ranks.is_main:
            self.emit(step, losses | speed | {"lr": lr, "grad_norm": float(self.grad_norm)})
            figures = [f"{name} {value:.4g}" for name, value in (losses | speed).items()]
            print(f"{step:>7}/{self.num_steps}  " + "  ".join(figures))

    def write_validation(self, step: int, losses: dict, metrics: dict, seconds: float) -> None:
        """Write held-out figures; their `seconds` count neither as training nor as waiting."""
        if not self.ranks.is_main:
            return
        ours = losses | {name: figure["ours"] for name, figure in metrics.items()}
        self.emit(step, {f"val_{name}": value for name, value in ours.items()})
        figures = {"step": step, "losses": losses, "metrics": metrics}
        write_json(self.out / "validation.json", figures)
        text = f"{step:>7} held out (best constant in brackets):"
        for name, metric in metrics.items():
            text += f" {name} {metric['ours']:.3g} ({metric['trivial']:.3g})"
            text += ", which never changes" * metric.get("constant", False)
        print(text)
        self.since += seconds

    def emit(self, step: int, figures: dict) -> None:
        line = {"step": step, "stage": self.cfg.stage} | figures
        append(self.out / "log.jsonl", line)
        if "skipped" not in line:
            self.track(step, line)

    def close(self, step: int, stopped: bool, gave_up: int) -> None:
        """Print how the run ended: by a signal, or after `gave_up` steps that were skipped."""
        if not self.ranks.is_main:
            return
        self.end_tracking()
        if gave_up:
            print(
                f"error: {gave_up} steps in a row had a loss or gradient that is not finite. "
                f"{self.out}/log.jsonl names their frames: look at them, or lower --lr",
                file=sys.stderr,
            )
        how = "stopped by a signal after" if stopped else "ended with"
        saved = f"its checkpoint is in {self.out}" if step else "there is nothing to save yet"
        saved += "; the same command goes on" * stopped
        print(f"stage {self.cfg.stage} {how} step {step}, {saved}")


def check_tracker(name: str | None) -> None:
    """Raise InputError, before a run begins, if its tracker is not installed."""
    if name and not find_spec(name):
        raise InputError(f"--tracker {name} is not installed: pip install {name}")


def open_tracker(cfg: TrainConfig) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
    """Functions that log a step and that end. wandb and tensorboard are optional installs."""
    if cfg.tracker is None:
        return lambda step, line: None, lambda: None
    if cfg.tracker == "wandb":
        import wandb

        run = wandb.init(project="auxvla", config=checkpoint.to_json(cfg), dir=cfg.out)
        return lambda step, line: run.log(line, step=step), run.finish
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(cfg.out)

    def add(step: int, line: dict) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, step)

    return add, writer.close


class Saver:
    """Writes checkpoints in a thread, one at a time, while training continues.

    `step` is that of the checkpoint that `out` already has. A failed save is printed at once, and
    `close` raises the error if no later save succeeded.
    """

    def __init__(self, out: Path, keep: int, is_main: bool, step: int):
        self.out, self.keep, self.is_main, self.step = out, keep, is_main, step
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.saving: Future | None = None

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, manifest: dict, tokenizer: str
    ) -> None:  # fmt: skip
        """Copy the state and return. Collective; the main rank writes."""
        if step == self.step:
            return
        self.failed()  # waits for the previous save
        tensors = checkpoint.snapshot(model, optimizer, self.is_main)
        self.step = step
        if self.is_main:
            self.saving = self.pool.submit(self.write, step, *tensors, manifest, tokenizer)

    def write(self, *state) -> None:
        try:
            checkpoint.write(self.out, *state, self.keep)
        except BaseException as error:
            print(f"warning: {type(error).__name__}: {error}", file=sys.stderr)
            raise

    def failed(self) -> BaseException | None:
        """Wait for the last save; return its error, if any."""
        return self.saving.exception() if self.saving else None

    def close(self) -> None:
        """Wait for the last save. Raises its error, if any."""
        self.pool.shutdown()
        if error := self.failed():
            raise error
