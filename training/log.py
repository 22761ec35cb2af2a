"""What a training run writes as it goes: log, validation, a progress line, checkpoints."""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from config import TrainConfig
from paper import describe
from storage import checkpoint
from storage.files import read_lines, write
from training.ranks import Ranks


class Log:
    """log.jsonl, a progress line, validation.json. Every rank counts, the main one writes."""

    def __init__(
        self, cfg: TrainConfig, step: int, num_steps: int, ranks: Ranks, frames: int,
        held_out: int, params: list[Tensor],
    ):  # fmt: skip
        self.cfg, self.num_steps, self.ranks, self.out = cfg, num_steps, ranks, Path(cfg.out)
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited, self.mark, self.since = 0.0, time.perf_counter(), time.perf_counter()
        if not ranks.is_main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write(self.out / "config.json", json.dumps(checkpoint.plain(cfg), indent=1).encode())
        path = self.out / "log.jsonl"
        # Lines behind the checkpoint that we resume from will be written again.
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
        # For the whole run.
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(
            total=num_steps, initial=step, desc=f"stage {cfg.stage}",
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        if cfg.row:
            print(describe(cfg.row))
        trained = sum(p.numel() for p in params) / 1e6
        print(
            f"stage {cfg.stage}: {frames:,} frames, {held_out:,} held out, "
            f"{trained:.1f}M trained parameters, {num_steps} steps of {cfg.batch_size}"
        )
        self.track, self.end_tracking = open_tracker(cfg)

    def waiting(self) -> None:
        """From here on the time goes to the data."""
        self.mark = time.perf_counter()

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self.mark

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """A step that was taken: the rank's share of each loss."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.steps, self.grad_norm = self.steps + 1, grad_norm

    def skip(self, step: int, frames: list[str]) -> None:
        """A step that was not taken, on any rank, and the frames that it was to train on."""
        if self.ranks.is_main:
            self.emit(step, {"step": step, "stage": self.cfg.stage, "skipped": frames})
            tqdm.write(
                f"{step:>7}/{self.num_steps}  skipped: a loss or gradient is not finite; the "
                f"frames are in {self.out / 'log.jsonl'}"
            )

    def write(self, step: int, lr: float) -> None:
        """Means since the last line; collective, since each rank holds its share of every loss."""
        if not self.steps:  # all were skipped
            return
        names, values = list(self.sums), torch.stack(list(self.sums.values())) / self.steps
        values = self.ranks.sum(values) / self.ranks.world
        seconds = time.perf_counter() - self.since
        line = {"step": step, "stage": self.cfg.stage} | dict(zip(names, values.tolist()))
        line |= {
            "samples_per_s": self.steps * self.cfg.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "lr": lr,
            "grad_norm": float(self.grad_norm),
            "eta_s": (self.num_steps - step) * seconds / self.steps,
        }
        self.sums, self.steps, self.waited, self.since = {}, 0, 0.0, time.perf_counter()
        if self.ranks.is_main:
            self.emit(step, line)
            hidden = ("step", "stage", "lr", "grad_norm")
            shown = [f"{k} {v:.4g}" for k, v in line.items() if k not in hidden]
            self.bar.update(step - self.bar.n)
            tqdm.write(f"{step:>7}/{self.num_steps}  " + "  ".join(shown))

    def write_validation(self, step: int, losses: dict, metrics: dict, seconds: float) -> None:
        """`seconds` it took, which are neither training nor waiting."""
        flat = {f"val_{name}": value for name, value in losses.items()}
        flat |= {f"val_{name}": figure["ours"] for name, figure in metrics.items()}
        self.emit(step, {"step": step, "stage": self.cfg.stage} | flat)
        scores = {"step": step, "losses": losses, "metrics": metrics}
        write(self.out / "validation.json", json.dumps(scores, indent=1).encode())
        tqdm.write(
            f"{step:>7} held out (best constant in brackets): "
            + "  ".join(
                f"{k} {m['ours']:.3g} ({m['trivial']:.3g})"
                + ", which never changes" * m.get("constant", False)
                for k, m in metrics.items()
            )
        )
        self.since += seconds

    def close(self, step: int, stopped: bool, gave_up: bool) -> None:
        """Say how the run ended."""
        if not self.ranks.is_main:
            return
        self.bar.close()
        self.file.close()
        self.end_tracking()
        if gave_up:
            print(
                f"error: {self.cfg.max_skipped} steps in a row had a loss or gradient that is not "
                f"finite. The state before them is saved in {self.out}, their frames are named in "
                "its log.jsonl: look at those, or lower --lr",
                file=sys.stderr,
            )
        elif stopped:
            kept = f"step {step} is saved in {self.out}" if step else "before the first step"
            print(f"stage {self.cfg.stage}: told to stop, {kept}")
        else:
            print(f"stage {self.cfg.stage}: {step} steps done, newest checkpoint in {self.out}")

    def emit(self, step: int, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.track(step, {name: value for name, value in line.items() if name != "skipped"})


def open_tracker(cfg: TrainConfig) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
    """What logs the numbers of a step, and what ends it. Both trackers are optional installs."""
    if cfg.tracker is None:
        return lambda step, line: None, lambda: None
    if cfg.tracker == "wandb":
        import wandb

        run = wandb.init(project="auxvla", config=checkpoint.plain(cfg), dir=cfg.out)
        return lambda step, line: run.log(line, step=step), run.finish
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(cfg.out)

    def track(step: int, line: dict) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, step)

    return track, writer.close


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, while training goes on.

    `step` is the one that `out` already has, if any. A failed save, whatever the error, is told on
    stderr at once and training goes on; `close` raises the error unless a later save succeeded.
    """

    def __init__(self, out: Path, keep: int, is_main: bool, step: int):
        self.out, self.keep, self.is_main, self.step = out, keep, is_main, step
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.saving: Future | None = None  # keeps the thread's error, of any class

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, manifest: dict,
        tokenizer: str,
    ) -> None:  # fmt: skip
        """Copy the state and return; every rank calls it, the main one writes."""
        if step == self.step:
            return
        self.failed()  # waits for the save before
        tensors = checkpoint.snapshot(model, optimizer, self.is_main)
        self.step = step
        if self.is_main:
            self.submit(checkpoint.write, step, *tensors, manifest, tokenizer)

    def rate(self, step: int, score: float) -> None:
        """Add the held-out loss to the checkpoint of `step`, if that is the one saved last.

        So the save comes before the validation, which may die.
        """
        if self.saving and step == self.step and not self.failed():
            self.submit(checkpoint.rate, step, score)

    def submit(self, job: Callable, *args) -> None:
        self.saving = self.pool.submit(job, self.out, *args, self.keep)
        self.saving.add_done_callback(tell)

    def failed(self) -> BaseException | None:
        """Wait for the last save; the error that ended it, if any."""
        return self.saving.exception() if self.saving else None

    def close(self) -> None:
        """Wait for the last save. Raises the error that ended it, if any."""
        self.pool.shutdown()
        if error := self.failed():
            raise error


def tell(saving: Future) -> None:
    if error := saving.exception():
        print(f"warning: {type(error).__name__}: {error}", file=sys.stderr)
