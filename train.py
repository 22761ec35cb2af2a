"""Train one stage of AuxVLA (paper Sec. 5): demonstrations -> a checkpoint.

    torchrun --nproc_per_node=8 train.py --stage 1 --data DATA --out RUN/stage1
    torchrun ... train.py --stage 2 --init-from RUN/stage1 --data DATA --out RUN/stage2
    torchrun ... train.py --stage 3 --init-from RUN/stage2 --data DATA --out RUN/stage3
    python train.py --row auxvla-grasp ...  # a row of the paper's tables, see python config.py
    python train.py --preset tiny ...       # one process, CPU or GPU; the same run

The same command goes on where the last one stopped. --data is a folder of MS-HAB's files or,
faster, a pack of them.
"""

import os
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
from config import PRESETS, InputError, TrainConfig, explained
from data import (
    ActionStats,
    Batcher,
    Frames,
    StepOrder,
    build_tokenizer,
    check_batch,
    loader,
    open_data,
    tokenize,
)
from flow_head import draw_noise
from logs import Log
from model import AuxVLA, label_counts
from pretrained import load_pretrained, source_of
from rows import check_row, preset_of, row_of, summary
from sharding import shard, whole
from validation import validate

# What a resumed run may change. None alters a step, but `steps` and `epochs` move the cool-down.
MAY_CHANGE = {
    "data", "out", "init_from", "resume", "steps", "epochs", "device", "workers", "val_every",
    "val_frames",
}  # fmt: skip
MAY_CHANGE |= {"pretrained", "log_every", "save_every", "keep", "tracker", "shard"}


def setup_distributed(device: str | None) -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device; under torchrun joins the group (GPUs: NCCL, CPUs: gloo)."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        # Before anything else allocates, or every rank opens a context on GPU 0.
        torch.cuda.set_device(local_rank)
    if "RANK" not in os.environ:
        return 0, 1, torch.device(kind)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return (
        dist.get_rank(),
        dist.get_world_size(),
        torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind),
    )


def learning_rate(step: int, num_steps: int, cfg: TrainConfig) -> float:
    """Constant in the paper (Sec. 6.1); a preset may warm up and cool down, linearly."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    cool = min(1.0, (num_steps - step) / (cfg.cooldown * num_steps)) if cfg.cooldown else 1.0
    return cfg.lr * warm * cool


def global_counts(batch: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """Labels, averaged over ranks: DDP's mean gradient is then that of one mean over all labels."""
    counts = label_counts(batch)
    stacked = torch.stack([count.float() for count in counts.values()])
    if world > 1:
        dist.all_reduce(stacked)
    return dict(zip(counts, stacked / world))


def micro_batches(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Slices of a rank's batch; divided by the whole's counts, their losses add up to its loss."""
    counts = batch.pop("counts")
    split = {key: value.split(size) for key, value in batch.items()}
    return [
        {key: parts[i] for key, parts in split.items()} | {"counts": counts}
        for i in range(len(split["images"]))
    ]


def prepare(cfg: TrainConfig, is_main: bool) -> tuple[AuxVLA, dict, Path | None]:
    """The model, its manifest (statistics, tokenizer), the checkpoint to resume from, if any."""
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    model = AuxVLA(cfg.model, flow_head=cfg.stage == 3)
    resumed = checkpoint.newest(Path(cfg.out))
    if resumed and cfg.resume == "never":
        raise FileExistsError(
            f"{cfg.out}: holds {resumed.name}; choose another --out, or drop --resume never to go "
            "on"
        )
    source = resumed or (checkpoint.resolve(cfg.init_from) if cfg.init_from else None)
    if source is None:
        hashes = load_pretrained(model.vlm, source_of(cfg.pretrained)) if cfg.pretrained else {}
        return model, {"pretrained": hashes}, None
    manifest = checkpoint.read_manifest(source, verify=not resumed)  # newest() has compared it
    ours, theirs = checkpoint.plain(cfg), manifest["config"]
    ignored = MAY_CHANGE if resumed else set(ours) - {"model"}
    different = checkpoint.differences(
        *({k: v for k, v in c.items() if k not in ignored} for c in (ours, theirs))
    )
    if different:
        raise checkpoint.CheckpointError(
            f"{source} was made with another configuration ({'; '.join(different)}). "
            "Give the same flags, or another --out."
        )
    checkpoint.load_weights(model, source, new=() if resumed else ("flow_head.",))
    if is_main:
        print(f"{'resumed' if resumed else 'initialised'} from {source}")
    return model, manifest | {"folder": str(source)}, resumed


def main(cfg: TrainConfig) -> None:
    rank, world, device = setup_distributed(cfg.device)
    is_main, out = rank == 0, Path(cfg.out)
    if cfg.batch_size % world:
        raise InputError(
            f"--batch-size {cfg.batch_size} must be a multiple of the {world} processes"
        )
    model, origin, resumed = prepare(cfg, is_main)
    model.train_stage(cfg.stage)  # before DDP, which registers what requires a gradient
    sharded = cfg.shard and world > 1
    if sharded:
        shard(model, device)
    else:
        model.to(device)
    params = model.trained()
    optimizer = torch.optim.Adam(params, lr=cfg.lr, betas=cfg.betas)  # Sec. 6.1
    if resumed:
        checkpoint.load_optimizer(model, optimizer, resumed)
    step = origin["step"] if resumed else 0

    data = open_data(cfg.data)
    frames, held_out = (
        Frames(data, cfg.val_episodes, train, cfg.model.history, cfg.tasks, cfg.subtasks)
        for train in (True, False)
    )
    if len(frames) < cfg.batch_size:
        raise InputError(
            f"{cfg.data}: {len(frames)} training frames ({len(held_out)} more are held out) are "
            f"less than one batch of {cfg.batch_size}; record more, or give a smaller --batch-size"
        )
    # Later stages keep the first one's units: its weights were trained in them.
    begun = "action_stats" in origin
    stats = (
        ActionStats(**{k: tuple(v) for k, v in origin["action_stats"].items()})
        if begun
        else frames.stats()
    )
    saved = Path(origin["folder"]) / "tokenizer.json" if begun else None
    tokenizer = Tokenizer.from_file(str(saved)) if saved else build_tokenizer(cfg.model.llm)
    batcher = Batcher(cfg.model, stats, tokenize(data.instructions, tokenizer, cfg.model.llm))
    manifest = describe(cfg, data, stats) | {"pretrained": origin["pretrained"]}
    if resumed and origin["data"] != manifest["data"]:
        raise checkpoint.CheckpointError(
            f"{resumed}: was trained on {origin['data']}, {cfg.data} has {manifest['data']}. "
            "Give the same data, or another --out with --init-from"
        )
    if is_main and cfg.row:
        print("\n".join(f"{key:9} {text}" for key, text in summary(cfg.row).items()))
    num_steps = cfg.steps or cfg.epochs[cfg.stage - 1] * (len(frames) // cfg.batch_size)
    order = StepOrder(len(frames), cfg.batch_size, cfg.seed, step, num_steps, rank, world)
    log = Log(
        cfg, step, num_steps, is_main, len(frames), len(held_out), sum(p.numel() for p in params)
    )
    ddp = DDP(model) if world > 1 and not sharded else model

    for raw in loader(frames, order, cfg.workers):
        log.data_arrived()
        batch = batcher(raw, device)
        if step == order.first:
            check_batch(batch, cfg.model)
        batch["counts"] = global_counts(batch, world)
        # Noise is drawn for the global batch and shared out, so a step does not depend on the
        # number of processes.
        generator = torch.Generator().manual_seed(cfg.seed * 2**32 + step)
        noise, t = draw_noise(cfg.batch_size, cfg.model.flow.action_horizon, generator)
        batch |= {"noise": noise[rank::world].to(device), "t": t[rank::world].to(device)}
        lr = learning_rate(step, num_steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micros = micro_batches(batch, cfg.micro_batch)
        for i, micro in enumerate(micros):
            # All-reduce once per step, not per micro-batch. Shards could not: the sum stays whole.
            if world > 1 and not sharded:
                ddp.require_backward_grad_sync = i == len(micros) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = ddp(micro, cfg.stage)  # never the bare model: it would skip the all-reduce
            # Eq. 4, plus the action loss (Sec. 4.3)
            sum(getattr(cfg.weights, name) * loss for name, loss in losses.items()).backward()
            log.add(losses)
        grad_norm = whole(nn.utils.clip_grad_norm_(params, cfg.grad_clip))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        last = step == num_steps
        log.steps += 1
        if step % cfg.log_every == 0 or last:
            log.write(step, lr, grad_norm, world)
        if (is_main or sharded) and len(held_out) and (step % cfg.val_every == 0 or last):
            began = time.perf_counter()
            figures = validate(model, held_out, batcher, cfg, device)
            if is_main:
                log.write_validation(step, *figures, time.perf_counter() - began)
        if (is_main or sharded) and (step % cfg.save_every == 0 or last):
            checkpoint.save(
                out, step, model, optimizer, manifest, tokenizer.to_str(), cfg.keep, is_main
            )
        log.waiting()
    if is_main:
        print(f"stage {cfg.stage}: {step} steps done, newest checkpoint in {out}")
    if world > 1:
        dist.barrier()  # rank 0 may still be saving
        dist.destroy_process_group()


def describe(cfg: TrainConfig, data, stats: ActionStats) -> dict:
    """What a checkpoint says of itself, beside its step and its files' hashes."""
    return {
        "stage": cfg.stage,
        "config": checkpoint.plain(cfg),
        "action_stats": {"low": stats.low, "high": stats.high},
        "action_schema": data.action_schema,
        "qpos_names": data.qpos_names,
        "instructions": data.instructions,
        # A resumed run must find the same frames: the order and the held-out episodes follow them.
        "data": {"frames": len(data), "episodes": len(data.episodes)},
        "torch": torch.__version__,
    }


def given(args: list[str], flag: str) -> str | None:
    """The value of a flag that decides on the defaults of the others."""
    values = [b for a, b in pairwise(args) if a == flag]
    values += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return values[-1] if values else None


def parse(args: list[str] | None = None) -> TrainConfig:
    """The command line over the defaults of its --preset and --row.

    Raises InputError when a flag contradicts the row.
    """
    args = sys.argv[1:] if args is None else args
    name, preset = given(args, "--row"), given(args, "--preset")
    row = row_of(name) if name else None
    default = replace(TrainConfig(data="", out=""), data=tyro.MISSING, out=tyro.MISSING)
    if preset in (None, *PRESETS):  # otherwise tyro names the choices
        chosen = preset_of(row, preset) if row else preset or "paper"
        default = replace(default, preset=chosen, **PRESETS[chosen])
        pairs = pairwise(["", *args])  # without --preset, which is now in the default
        args = [b for a, b in pairs if "--preset" not in (a, b.partition("=")[0])]
    if row:
        default = replace(
            default, model=replace(default.model, **row.model), tasks=row.tasks,
            subtasks=row.subtasks, epochs=row.epochs,
        )  # fmt: skip
    cfg = tyro.cli(TrainConfig, default=default, args=args, description=__doc__)
    if row:
        check_row(cfg)
    elif not cfg.epochs[cfg.stage - 1] and not cfg.steps:
        raise InputError(f"--epochs {cfg.epochs} give stage {cfg.stage} none; give --steps")
    return cfg


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line at once
    with explained():
        main(parse())
