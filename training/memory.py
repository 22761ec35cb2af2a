"""Estimate the GPU memory of a training step before the first one, from a forward pass.

    plan = memory_plan(cfg, world, device)   # {"weights": bytes, ...} per process

The pass runs on tensors without content (torch's FakeTensorMode) and adds up those that autograd
keeps. Temporary tensors and the allocator's share are not counted: a tenth of the GPU stays free.
"""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import HISTORY, InputError, TrainConfig
from data import batch_shapes
from model import AuxVLA
from storage.trajectory import RECORD

USABLE = 0.9  # share of a device's memory that a plan may take


def kept_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, without weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()  # noqa: F841  keeps the graph, and with it every storage, alive
    return sum(kept.values())


def memory_plan(cfg: TrainConfig, world: int, device: torch.device) -> dict[str, float]:
    """Bytes per process: weights, gradients, Adam's moments, tensors kept for the backward pass."""
    with torch.device("meta"):
        model = AuxVLA(cfg.model, flow_head=cfg.stage == 3)

    def kept(frames: int) -> int:
        kinds = {"prompt_ids": torch.long, "prompt_mask": torch.bool}
        batch = {
            name: torch.zeros(shape, dtype=kinds.get(name, torch.float32))
            for name, shape in batch_shapes(cfg.model, frames, noise=True).items()
        }
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return kept_for_backward(model, lambda: model(batch, cfg.stage))

    with FakeTensorMode(allow_non_fake_inputs=True), device:
        model.to_empty(device=device)
        trained = sum(p.numel() for p in model.train_stage(cfg.stage))
        model.eval()  # BatchNorm would wait for the other ranks
        one, two = kept(1), kept(2)
        per_frame, constant = two - one, max(0, 2 * one - two)
        if cfg.recompute:
            model.prepare_blocks(recompute=True)
            inputs, vision = kept(2) - kept(1), model.vlm.vision
            blocks = len(vision.dino.blocks) + len(vision.siglip.blocks) + len(model.vlm.llm.layers)
            # The backward pass holds the activations of one recomputed block and their gradients.
            per_frame = inputs + 2 * (per_frame - inputs) / blocks
    share = 4 / (world if cfg.shard else 1)
    return {
        "weights": share * sum(p.numel() for p in model.parameters()),
        "gradients": share * trained,
        "Adam's moments": 2 * share * trained,
        "bf16 copies of the weights": constant,
        "activations of a frame": per_frame,
    }


def describe_plan(
    plan: dict[str, float], cfg: TrainConfig, world: int, device: torch.device
) -> str:
    """The plan in a line. InputError, with a flag that helps, if GPU or machine is too small."""
    *fixed, frame = plan.values()
    frames = min(cfg.micro_batch, cfg.batch_size // world)
    needed = sum(fixed) + frames * frame
    parts = [f"{name} {size / 2**30:.2g}" for name, size in list(plan.items())[:-1]]
    parts.append(f"activations of {frames} frames {frames * frame / 2**30:.2g}")
    line = f"memory, GiB per process: {', '.join(parts)}; in all {needed / 2**30:.3g}"
    if device.type == "cuda":
        kind, larger = "GPU", "--shard on more GPUs"
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        kind, larger = "machine", "--preset tiny"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        total = memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes here
    if needed <= USABLE * total:
        return f"{line} of {total / 2**30:.3g}"
    fit = int((USABLE * total - sum(fixed)) // frame)
    remedy = f"--micro-batch {fit}" if fit >= 1 else larger
    remedy += ", or --recompute, for a third more arithmetic" * (not cfg.recompute)
    raise InputError(f"{line}, but the {kind} has {total / 2**30:.3g}: give {remedy}")


def check_shared_memory(cfg: TrainConfig) -> None:
    """Raise InputError if the loader processes' batches, two each, do not fit."""
    pictures = sum(RECORD[name].itemsize for name in ("rgb", "depth"))
    frame = RECORD.itemsize + (HISTORY * pictures if cfg.model.history == "frames" else 0)
    free, need = shutil.disk_usage("/dev/shm").free, 2 * cfg.workers * cfg.batch_size * frame
    if free < need:
        size = f"{-(-need // 2**30)}g"
        raise InputError(
            f"/dev/shm has {free / 1e9:.1f} GB free, {cfg.workers} loader processes need "
            f"{need / 1e9:.1f} GB: mount -o remount,size={size} /dev/shm (or docker run "
            f"--shm-size={size}), or give --workers 0"
        )
