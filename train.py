"""Train one stage of AuxVLA (paper Sec. 5): demonstrations -> a checkpoint.

    torchrun --nproc_per_node=8 train.py --stage 1   # data/ -> runs/auxvla-all/stage1
    torchrun --nproc_per_node=8 train.py --stage 2   # continues from that run's stage 1
    torchrun --nproc_per_node=8 train.py --stage 3   # continues from that run's stage 2
    python train.py --preset tiny --stage 1          # one process, CPU or GPU
    python train.py --row auxvla-grasp --stage 1     # a row of the paper's tables (python paper.py)

--data, --out and --init-from name other folders. A stopped run continues with the same command.
"""

import sys
import time
import warnings
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from config import CHUNK, InputError, TrainConfig
from data import ActionStats, Frames, check_batch, make_batch
from decoders import label_counts
from flow_head import draw_noise
from model import AuxVLA
from storage import checkpoint
from storage.files import sole_writer
from storage.terminal import user_errors
from storage.tokenizer import tokenize
from training import memory
from training.flags import parse
from training.log import Log, Saver, check_tracker
from training.order import StepOrder, loader, open_frames
from training.ranks import STOPPED, Ranks, autocast, halve_frozen, join, shard, signals
from training.start import build_model, choose_start, describe_run, prepare_data, settle_config
from training.validation import validate


def distribute(model: AuxVLA, cfg: TrainConfig, ranks: Ranks) -> nn.Module:
    """The module that forward passes go through: the model on its device, under DDP, or sharded."""
    if ranks.world == 1:
        return model.to(ranks.device)
    if cfg.shard:
        return shard(model, ranks.device)
    # The mask decoder's last kernel has an axis of length 1, whose stride has no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # find_unused_parameters: else DDP rebuilds its buckets after step 1, sums in another order, and
    # a resumed run differs in the last bits.
    return DDP(model.to(ranks.device), find_unused_parameters=True, gradient_as_bucket_view=True)


# --- A step ---


def learning_rate(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Constant in the paper (Sec. 6.1); a preset may warm up and cool down, linearly."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    cool = min(1.0, (num_steps - step) / (cfg.cooldown * num_steps)) if cfg.cooldown else 1.0
    return cfg.lr * warm * cool


def global_counts(batch: dict[str, Tensor], stop: bool, ranks: Ranks) -> dict[str, Tensor]:
    """Number of labels per loss, averaged over ranks; "stop" above 0 if any rank got a signal.

    Each rank divides by these counts, so DDP's mean gradient is that of one mean over all labels.
    """
    counts = label_counts(batch) | {"stop": torch.tensor(stop, device=ranks.device)}
    stacked = torch.stack([count.float() for count in counts.values()])
    return dict(zip(counts, ranks.sum(stacked) / ranks.world))


def step_noise(cfg: TrainConfig, step: int, ranks: Ranks) -> dict[str, Tensor]:
    """The rank's share of the flow head's noise and times, drawn for the global batch."""
    generator = torch.Generator().manual_seed(cfg.seed * 2**32 + step)
    noise, t = draw_noise(cfg.batch_size, CHUNK, generator)
    mine = slice(ranks.rank, None, ranks.world)
    return {"noise": noise[mine].to(ranks.device), "t": t[mine].to(ranks.device)}


def accumulate(ddp: nn.Module, batch: dict[str, Tensor], cfg: TrainConfig) -> dict[str, Tensor]:
    """Forward and backward over a rank's batch, in micro-batches; its share of each loss.

    Each micro-batch divides by the label counts of the global batch, so the losses add up.
    """
    counts, device, sums = batch.pop("counts"), batch["images"].device, {}
    split = {key: value.split(cfg.micro_batch) for key, value in batch.items()}
    micros = [dict(zip(split, parts)) for parts in zip(*split.values())]
    for i, micro in enumerate(micros):
        # DDP: all-reduce only after the last micro-batch. FSDP cannot skip it: unreduced gradients
        # would be full-size.
        if isinstance(ddp, DDP):
            ddp.require_backward_grad_sync = i == len(micros) - 1
        with autocast(device):
            losses = ddp(micro | {"counts": counts}, cfg.stage)  # the bare model would not reduce
        # Eq. 4, plus the action loss (Sec. 4.3)
        sum(getattr(cfg.weights, name) * loss for name, loss in losses.items()).backward()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.detach()
    return sums


def take_step(
    ddp: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], lr: float,
    cfg: TrainConfig, ranks: Ranks,
) -> tuple[dict[str, Tensor], Tensor] | None:  # fmt: skip
    """One optimizer step: the rank's share of each loss, and the gradient norm.

    If a loss or gradient of any rank is not finite: None, and the model stays as it was.
    """
    buffers = [*ddp.buffers()]
    before = [buffer.clone() for buffer in buffers]  # the forward pass updates BatchNorm's
    losses = accumulate(ddp, batch, cfg)
    # GAP-24: each part is clipped alone. In stage 1 the decoders' gradients end at the latents
    # (Sec. 5.2), so they should not scale the VLM's step either.
    lengths = [
        checkpoint.full_tensor(nn.utils.clip_grad_norm_(part["params"], cfg.grad_clip or torch.inf))
        for part in optimizer.param_groups
    ]
    grad_norm = torch.stack([length.to(ranks.device) for length in lengths]).norm()
    # The sum over ranks is finite only if every term is: all ranks take the step, or none does.
    if finite := ranks.sum(sum(losses.values()) + grad_norm).isfinite():
        for part in optimizer.param_groups:
            part["lr"] = lr
        optimizer.step()
    else:
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
    optimizer.zero_grad()
    return (losses, grad_norm) if finite else None


# --- The stage ---


@dataclass
class Stage:
    """What the steps of a stage need."""

    cfg: TrainConfig  # with the settings that checkpoint and data decide
    frames: Frames
    held_out: Frames
    order: StepOrder
    stats: ActionStats
    prompts: tuple[Tensor, ...]  # tokenize's: ids and, if some are padded, mask, each [n, L]
    model: AuxVLA
    ddp: nn.Module  # the forward pass goes through it
    optimizer: torch.optim.Optimizer
    manifest: dict  # of the checkpoints
    tokenizer: str


def prepare(cfg: TrainConfig, ranks: Ranks) -> Stage:
    """Data, model and optimizer, as the checkpoint left them. Raises InputError before a step."""
    if cfg.batch_size % ranks.world:
        raise InputError(f"--batch-size {cfg.batch_size}: no multiple of {ranks.world} processes")
    frames, held_out = open_frames(cfg)
    memory.check_shared_memory(cfg, frames)
    start = choose_start(cfg, ranks)
    cfg = settle_config(cfg, start, frames, ranks.is_main)
    num_steps = cfg.steps or cfg.epochs[cfg.stage - 1] * (len(frames) // cfg.batch_size)
    if start.step > num_steps:
        raise InputError(
            f"{start.folder} is beyond the {num_steps} steps asked for: give --steps {start.step} "
            "or more, or another --out"
        )
    # Rank 0 plans: a rank with another number of micro-batches would wait for the others.
    cfg = ranks.on_main(lambda: memory.settle_micro_batch(cfg, ranks.world, ranks.device))
    line = ranks.on_main(lambda: memory.describe_plan(cfg, ranks.world, ranks.device))
    if ranks.is_main:
        print(*frames.remarks, line, sep="\n")
    if ranks.is_main and ranks.device.type == "cuda":
        off = "not compiled; compiling needs Triton, a C compiler and Python.h"
        print("blocks are", "compiled; --no-compile turns it off" if cfg.compile else off)
    stats, tokenizer = prepare_data(cfg, frames, start)
    model, pretrained = build_model(cfg, start, ranks.is_main)
    halve_frozen(model, cfg, ranks.device)
    model.train_stage(cfg.stage)  # before DDP, which registers what requires a gradient
    model.prepare_blocks(cfg.recompute, cfg.compile)
    ddp = distribute(model, cfg, ranks)
    parts = [{"params": part} for part in model.trained_parts()]
    optimizer = torch.optim.Adam(parts, lr=cfg.lr, betas=cfg.betas, fused=True)  # Sec. 6.1
    if start.resumed:
        checkpoint.load_optimizer(model, optimizer, start.folder)
    order = StepOrder(
        len(frames), cfg.batch_size, cfg.seed, start.step, num_steps, ranks.rank, ranks.world,
        frames.blocks, cfg.stage,
    )  # fmt: skip
    prompts = tokenize(frames.source.instructions, tokenizer, cfg.model.llm)
    prompts = tuple(each.to(ranks.device) for each in prompts)
    manifest = describe_run(cfg, frames, stats, pretrained, start, num_steps)
    return Stage(
        cfg, frames, held_out, order, stats, prompts, model, ddp, optimizer, manifest,
        tokenizer.to_str(),
    )  # fmt: skip


def train(stage: Stage, ranks: Ranks) -> int:
    """Take the steps; return the exit code: 0, STOPPED by a signal, 1 after too many bad steps."""
    cfg, frames, order, model = stage.cfg, stage.frames, stage.order, stage.model
    step, num_steps, skipped, stopped = order.first, order.last, 0, False
    limit = ranks.on_main(lambda: memory.matmul_rate(ranks.device) / memory.sample_flop(cfg))
    log = Log(cfg, step, num_steps, ranks, limit)
    log.describe(frames, stage.held_out, model)
    saver = Saver(Path(cfg.out), cfg.keep, ranks.is_main, step)
    state = (model, stage.optimizer, stage.manifest, stage.tokenizer)
    # Rank 0 validates alone; with --shard every rank must take part in a forward pass.
    validates_here = len(stage.held_out) and (ranks.is_main or (cfg.shard and ranks.world > 1))

    with signals() as stop, closing(saver):
        for raw in log.time_waits(loader(frames, order, cfg.workers)):
            batch = make_batch(raw, stage.stats, stage.prompts, cfg.model)
            if step == order.first:
                check_batch(batch, cfg.model)
            batch["counts"] = global_counts(batch, stop(), ranks)
            if stopped := bool(batch["counts"]["stop"]):
                break
            batch |= step_noise(cfg, step, ranks)
            lr = learning_rate(step, num_steps, cfg)
            losses_and_norm = take_step(stage.ddp, stage.optimizer, batch, lr, cfg, ranks)
            step += 1
            if losses_and_norm:
                log.add(*losses_and_norm)
                skipped = 0
            else:
                log.skip(step, frames.names(order.batch(step - 1)))
                skipped += 1

            last = step == num_steps or skipped == cfg.max_skipped
            if step % cfg.log_every == 0 or last:
                log.write(step, lr)
            if step % cfg.save_every == 0 or last:
                saver.save(step, *state)
            if validates_here and (step % cfg.val_every == 0 or step == num_steps):
                began = time.perf_counter()
                with torch.compiler.set_stance("force_eager"):  # its batches have other sizes
                    figures = validate(model, stage.held_out, stage.stats, stage.prompts, cfg)
                log.write_validation(step, *figures, time.perf_counter() - began)
            if last:
                break
        if stopped:
            saver.save(step, *state)
    # A run fails after too many skipped steps in a row, or if it skipped every step.
    gave_up = skipped if skipped in (cfg.max_skipped, step - order.first) else 0
    log.close(step, stopped, gave_up)
    return STOPPED if stopped else int(gave_up > 0)


def main(cfg: TrainConfig) -> int:
    check_tracker(cfg.tracker)
    ranks = join(cfg.device)
    with ExitStack() as lock:  # rank 0 holds it; where it is taken already, every rank ends
        ranks.on_main(lambda: lock.enter_context(sole_writer(Path(cfg.out))))
        code = train(prepare(cfg, ranks), ranks)
    ranks.leave()
    return code


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(parse(description=__doc__)))
