"""Train one stage of AuxVLA (paper Sec. 5): demonstrations -> a checkpoint.

    torchrun --nproc_per_node=8 train.py --stage 1 --data DATA --out RUN/stage1
    torchrun ... train.py --stage 2 --init-from RUN/stage1 --data DATA --out RUN/stage2
    torchrun ... train.py --stage 3 --init-from RUN/stage2 --data DATA --out RUN/stage3
    python train.py --row auxvla-grasp ...  # a row of the paper's tables, see python paper.py
    python train.py --preset tiny ...       # one process, CPU or GPU; the same run

The same command goes on where the last one stopped. --data: MS-HAB's files or, faster, a pack.
"""

import hashlib
import sys
import time
import warnings
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from config import LABELS, RECORDED_ACTIONS, InputError, TrainConfig, user_errors
from data import ActionStats, Frames, StepOrder, check_batch, loader, make_batch, open_frames
from decoders import BatchNorm
from flow_head import draw_noise
from model import AuxVLA, label_counts
from paper import parse
from storage import checkpoint
from storage.checkpoint import whole
from storage.files import sole_writer
from storage.h5 import Index, label_command
from storage.pretrained import load_pretrained
from storage.tokenizer import build_tokenizer, tokenize
from training.checks import disk, packages, require, shared_memory
from training.log import Log, Saver
from training.memory import describe_plan, memory_plan
from training.ranks import STOPPED, Ranks, join, shard, signals
from training.validation import validate


def learning_rate(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Constant in the paper (Sec. 6.1); a preset may warm up and cool down, linearly."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    cool = min(1.0, (num_steps - step) / (cfg.cooldown * num_steps)) if cfg.cooldown else 1.0
    return cfg.lr * warm * cool


def global_counts(batch: dict[str, Tensor], stop: bool, ranks: Ranks) -> dict[str, Tensor]:
    """Labels, averaged over ranks: DDP's mean gradient is then that of one mean over all labels.

    On the same way: "stop", above 0 if any rank has been told to.
    """
    counts = label_counts(batch) | {"stop": torch.tensor(stop, device=ranks.device)}
    stacked = torch.stack([count.float() for count in counts.values()])
    return dict(zip(counts, ranks.sum(stacked) / ranks.world))


def step_noise(cfg: TrainConfig, step: int, ranks: Ranks) -> dict[str, Tensor]:
    """The rank's share of what the flow head is trained on: noise and times.

    Drawn for the global batch, so that a step does not depend on the number of processes.
    """
    generator = torch.Generator().manual_seed(cfg.seed * 2**32 + step)
    noise, t = draw_noise(cfg.batch_size, RECORDED_ACTIONS, generator)
    mine = slice(ranks.rank, None, ranks.world)
    return {"noise": noise[mine].to(ranks.device), "t": t[mine].to(ranks.device)}


def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Slices of a rank's batch; divided by the whole's counts, their losses add up to its loss."""
    counts = batch.pop("counts")
    split = {key: value.split(size) for key, value in batch.items()}
    return [
        {key: parts[i] for key, parts in split.items()} | {"counts": counts}
        for i in range(len(split["images"]))
    ]


def prepare(cfg: TrainConfig, ranks: Ranks) -> tuple[AuxVLA, dict, Path | None]:
    """The model, its manifest (statistics, tokenizer), the checkpoint to resume from, if any."""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    # The main rank alone hashes the files.
    found = ranks.decided(lambda: str(checkpoint.resumable(Path(cfg.out), cfg.resume) or ""))
    resumed = Path(found) if found else None
    source = resumed or (checkpoint.resolve(cfg.init_from) if cfg.init_from else None)
    from_file = bool(source or cfg.pretrained)
    model = AuxVLA(cfg.model, flow_head=cfg.stage == 3, meta=from_file)
    if source is None:
        if cfg.stage == 2 and not cfg.row and ranks.is_main:
            print("stage 2 without --init-from RUN/stage1: naive co-training (Table 2)")
        build_tokenizer(cfg.model.llm)  # fails now rather than after all weights were read
        hashes = load_pretrained(model.vlm, cfg.pretrained) if cfg.pretrained else {}
        return model, {"pretrained": hashes}, None
    # resumable() has compared the hashes of what we resume; a stage starts without the moments.
    manifest = checkpoint.read_manifest(source, verify=not resumed, moments=bool(resumed))
    checkpoint.check_config(cfg, manifest, source, bool(resumed))
    checkpoint.load_weights(model, source, new=() if resumed else ("flow_head.",))
    if ranks.is_main:
        print(f"{'resumed' if resumed else 'initialised'} from {source}")
        if cfg.stage == 3 and manifest["stage"] == 1:
            print("stage 3 on a stage-1 checkpoint: the paper's starts from stage 2 (Sec. 5)")
    return model, manifest | {"folder": str(source)}, resumed


def moving_buffers(model: AuxVLA) -> list[Tensor]:
    """What a forward pass changes: the mask decoders' running statistics."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    return [buffer for norm in norms if norm.training for buffer in norm.buffers()]


def choose_decoders(cfg: TrainConfig, frames: Frames, is_main: bool) -> TrainConfig:
    """Leave out, of the default five decoders, those whose label no training frame has.

    A run that resumes or starts from a checkpoint keeps the checkpoint's. Raises InputError for a
    decoder that was asked for and has no label.
    """
    default = cfg.model.decoders == LABELS and not cfg.row
    kept = checkpoint.decoders_of(cfg.out, cfg.init_from) if default else cfg.model.decoders
    decoders = LABELS if kept is None else kept
    lacking = [name for name in decoders if cfg.stage < 3 and not frames.labelled[name]]
    if lacking:
        lacks = f"no training frame of {cfg.data} has a label for: {', '.join(lacking)}"
        mend = label_command(frames.source.episodes[frames.episode_ids[0]], cfg.data)
        if lacking == ["obj"]:
            mend = "those of pick or place: no other subtask has an object (GAP-8)"
        if not default:
            raise InputError(f"{lacks}. Record labels: {mend}; or train without these decoders")
        if is_main:
            print(f"warning: {lacks}. NOT TRAINED: these decoders. To record labels: {mend}")
    if kept is None:
        decoders = tuple(name for name in LABELS if name not in lacking)
    return replace(cfg, model=replace(cfg.model, decoders=decoders))


def load_data(
    cfg: TrainConfig, frames: Frames, origin: dict, resumed: Path | None
) -> tuple[ActionStats, Tokenizer, dict]:
    """Action statistics, the tokenizer, and what a checkpoint says of the data.

    Later stages keep the first one's units and tokenizer: its weights were trained with them.
    """
    data = frames.source
    if "action_stats" in origin:
        stats = ActionStats(**{k: tuple(v) for k, v in origin["action_stats"].items()})
        tokenizer = Tokenizer.from_buffer((Path(origin["folder"]) / "tokenizer.json").read_bytes())
    else:
        stats, tokenizer = frames.stats(cfg.action_bounds), build_tokenizer(cfg.model.llm)
    manifest = describe(cfg, data, frames, stats) | {"pretrained": origin["pretrained"]}
    if resumed and origin["data"] != manifest["data"]:
        raise checkpoint.CheckpointError(
            f"{resumed}: was trained on {origin['data']}, {cfg.data} has {manifest['data']}. "
            "Give the same data, or another --out with --init-from"
        )
    return stats, tokenizer, manifest


def main(cfg: TrainConfig) -> int:
    """Train the stage; the process's exit code: 0, STOPPED after a signal, 1 if it gave up."""
    require(packages(deep=False), shared_memory(cfg.batch_size, cfg.workers, cfg.model.history))
    ranks = join(cfg.device)
    with ExitStack() as held:

        def begin() -> str:
            require(disk(cfg.out, 0))
            held.enter_context(sole_writer(Path(cfg.out)))
            return "mine"

        ranks.decided(begin)
        code = train(cfg, ranks)
    ranks.leave()
    return code


def accumulate(ddp: nn.Module, batch: dict[str, Tensor], cfg: TrainConfig) -> dict[str, Tensor]:
    """Forward and backward over a rank's batch, in micro-batches; its share of each loss."""
    device, sums = batch["images"].device, {}
    micros = micro_batches(batch, cfg.micro_batch)
    for i, micro in enumerate(micros):
        # All-reduce once per step, not per micro-batch. Shards could not: the sum stays whole.
        if isinstance(ddp, DDP):
            ddp.require_backward_grad_sync = i == len(micros) - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = ddp(micro, cfg.stage)  # never the bare model: it would skip the all-reduce
        # Eq. 4, plus the action loss (Sec. 4.3)
        sum(getattr(cfg.weights, name) * loss for name, loss in losses.items()).backward()
        for name, loss in losses.items():  # a micro-batch's loss is its share of the batch's mean
            sums[name] = sums.get(name, 0.0) + loss.detach()
    return sums


def take_step(
    ddp: nn.Module, optimizer: torch.optim.Optimizer, moving: list[Tensor],
    batch: dict[str, Tensor], cfg: TrainConfig, ranks: Ranks,
) -> tuple[dict[str, Tensor], Tensor] | None:  # fmt: skip
    """An optimizer step: the rank's share of each loss and the gradient's norm.

    None, with weights and running statistics as before, if one of them is not finite on any rank.
    """
    before = [buffer.clone() for buffer in moving]
    losses = accumulate(ddp, batch, cfg)
    # GAP-24: each part is clipped alone, so that in stage 1 the decoders' gradients, which end at
    # the latents (Sec. 5.2), do not scale the VLM's step either.
    norms = [
        whole(nn.utils.clip_grad_norm_(part["params"], cfg.grad_clip)).to(ranks.device)
        for part in optimizer.param_groups
    ]
    grad_norm = torch.stack(norms).norm()
    # This sum is finite only if all its terms are: all ranks take the step, or none does.
    finite = ranks.sum(sum(losses.values()) + grad_norm).isfinite()
    if finite:
        optimizer.step()
    else:
        for buffer, value in zip(moving, before):
            buffer.copy_(value)
    optimizer.zero_grad(set_to_none=True)
    return (losses, grad_norm) if finite else None


def distribute(model: AuxVLA, cfg: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model on its device, divided or copied among the ranks: what forward passes go through.

    Afterwards model.trained_parts() are the parameters to optimize.
    """
    if ranks.world == 1:
        return model.to(ranks.device)
    if cfg.shard:
        shard(model, ranks.device)
        return model
    # The mask decoder's last kernel has an axis of length 1, whose stride means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # DDP would reorder its buckets after a run's first step, and with them the sums of more than
    # two ranks. Looking for unused parameters, of which there are none, keeps it from that, so that
    # a resumed run adds like the uninterrupted one.
    return DDP(model.to(ranks.device), find_unused_parameters=True, gradient_as_bucket_view=True)


def train(cfg: TrainConfig, ranks: Ranks) -> int:
    rank, world, device = ranks.rank, ranks.world, ranks.device
    if cfg.batch_size % world:
        raise InputError(
            f"--batch-size {cfg.batch_size} must be a multiple of the {world} processes"
        )
    frames, held_out = open_frames(cfg)
    cfg = choose_decoders(cfg, frames, ranks.is_main)
    plan = describe_plan(memory_plan(cfg, world, device), cfg, world, device)
    if ranks.is_main:
        print(*frames.remarks, plan, sep="\n")
    model, origin, resumed = prepare(cfg, ranks)
    if "action_stats" in origin:  # load_data keeps them; older checkpoints had percentiles
        cfg = replace(cfg, action_bounds=origin["config"].get("action_bounds", "percentiles"))
    if resumed:  # what its weights began with, whatever is given now
        cfg = replace(cfg, init_from=origin["config"]["init_from"])
    model.train_stage(cfg.stage)  # before DDP, which registers what requires a gradient
    model.prepare_blocks(cfg.recompute, cfg.compile)
    ddp = distribute(model, cfg, ranks)
    parts, moving = [{"params": part} for part in model.trained_parts()], moving_buffers(model)
    params = [parameter for part in parts for parameter in part["params"]]
    optimizer = torch.optim.Adam(parts, lr=cfg.lr, betas=cfg.betas, fused=True)  # Sec. 6.1
    if resumed:
        checkpoint.load_optimizer(model, optimizer, resumed)
    step, skipped, stopped = origin["step"] if resumed else 0, 0, False
    stats, tokenizer, manifest = load_data(cfg, frames, origin, resumed)
    prompts = tokenize(frames.source.instructions, tokenizer, cfg.model.llm)
    prompts = tuple(each.to(device) for each in prompts)  # ids and mask [n, L]
    num_steps = cfg.steps or cfg.epochs[cfg.stage - 1] * (len(frames) // cfg.batch_size)
    if step > num_steps:
        raise InputError(
            f"{resumed} is beyond the {num_steps} steps asked for: give --steps {step} or more, or "
            "another --out"
        )
    order = StepOrder(
        len(frames), cfg.batch_size, cfg.seed, step, num_steps, rank, world, frames.blocks,
        cfg.stage,
    )  # fmt: skip
    log = Log(cfg, step, num_steps, ranks, len(frames), len(held_out), params)
    saver = Saver(Path(cfg.out), cfg.keep, ranks.is_main, step)
    everywhere = ranks.is_main or (cfg.shard and world > 1)  # shards are validated by all ranks

    with signals() as stop, closing(saver):
        for raw in loader(frames, order, cfg.workers):
            log.data_arrived()
            batch = make_batch(raw, stats, prompts, cfg.model)
            if step == order.first:
                check_batch(batch, cfg.model)
            batch["counts"] = global_counts(batch, stop(), ranks)
            if stopped := bool(batch["counts"]["stop"]):
                break
            batch |= step_noise(cfg, step, ranks)
            lr = learning_rate(step, num_steps, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            taken = take_step(ddp, optimizer, moving, batch, cfg, ranks)
            if taken:
                log.add(*taken)
                skipped = 0
            else:
                log.skip(step + 1, frames.names(order.batch(step)))
                skipped += 1
            step += 1

            last = step == num_steps
            if step % cfg.log_every == 0 or last:
                log.write(step, lr)
            if step % cfg.save_every == 0 or last:
                saver.save(step, model, optimizer, manifest, tokenizer.to_str())
            if everywhere and len(held_out) and (step % cfg.val_every == 0 or last):
                began = time.perf_counter()
                figures = validate(model, held_out, stats, prompts, cfg)
                saver.rate(step, figures[0]["flow" if cfg.stage == 3 else "action"])
                if ranks.is_main:
                    log.write_validation(step, *figures, time.perf_counter() - began)
            if skipped == cfg.max_skipped:
                break
            log.waiting()

        gave_up = skipped == cfg.max_skipped
        if stopped or gave_up:
            saver.save(step, model, optimizer, manifest, tokenizer.to_str())
    log.close(step, stopped, gave_up)
    return STOPPED if stopped else int(gave_up)


def describe(cfg: TrainConfig, data: Index, frames: Frames, stats: ActionStats) -> dict:
    """What a checkpoint says of itself, beside its step and its files' hashes."""
    return {
        "stage": cfg.stage,
        "config": checkpoint.plain(cfg),
        "action_stats": {"low": stats.low, "high": stats.high},
        "action_schema": data.action_schema,
        "qpos_names": data.qpos_names,
        "instructions": frames.instructions,
        "trained": {"frames": len(frames), "episodes": len(frames.episode_ids)},
        # A resumed run must find the same frames: the order and the held-out episodes follow them.
        "data": {
            "frames": len(data),
            "episodes": len(data.episodes),
            "packed": data.blocks is None,
            "truncated_at_success": data.truncate,
            "sha256": hashlib.sha256(repr(data.episodes).encode()).hexdigest(),
        },
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    with user_errors():
        sys.exit(main(parse(description=__doc__)))
