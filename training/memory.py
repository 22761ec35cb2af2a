"""What a training step will hold in memory, counted before the first one without running it.

    plan = memory_plan(cfg, world, device)   # {"weights": bytes, ...} per process

The forward pass runs once on tensors that have shapes and no content (torch's FakeTensorMode), and
what autograd keeps of it is added up. Not counted: what lives within one kernel or block only, and
the allocator's own share; a tenth of the device is left for them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import InputError, TrainConfig
from data import batch_shapes
from model import AuxVLA

SPARE = 0.9  # of a device's memory may be planned


def kept_for_backward(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, weights apart."""
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
    """Bytes per process: weights, gradients, Adam's moments, what the backward pass needs."""
    with torch.device("meta"):
        model = AuxVLA(cfg.model, flow_head=cfg.stage == 3)
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        model.to_empty(device=device)
        trained = sum(p.numel() for p in model.train_stage(cfg.stage))
        model.prepare_blocks(recompute=cfg.recompute)
        model.eval()  # BatchNorm would wait for the other ranks

        def forward(frames: int) -> Callable[[], object]:
            kinds = {"prompt_ids": torch.long, "prompt_mask": torch.bool}
            batch = {
                name: torch.zeros(shape, dtype=kinds.get(name, torch.float32))
                for name, shape in batch_shapes(cfg.model, frames, noise=True).items()
            }
            return lambda: model(batch, cfg.stage)

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            one, two = (kept_for_backward(model, forward(frames)) for frames in (1, 2))
    share = 4 / (world if cfg.shard else 1)
    return {
        "weights": share * sum(p.numel() for p in model.parameters()),
        "gradients": share * trained,
        "Adam's moments": 2 * share * trained,
        "the same for every batch": max(0, 2 * one - two),  # autocast's copies of the weights
        "a frame's activations": two - one,
    }


def describe_plan(
    plan: dict[str, float], cfg: TrainConfig, world: int, device: torch.device
) -> str:
    """The plan in a line. Raises InputError, with the flag that mends it, if a GPU is too small."""
    *fixed, frame = plan.values()
    frames = min(cfg.micro_batch, cfg.batch_size // world)
    needed = sum(fixed) + frames * frame
    parts = [f"{name} {size / 2**30:.2g}" for name, size in list(plan.items())[:-1]]
    parts.append(f"activations of {frames} frames {frames * frame / 2**30:.2g}")
    line = f"memory, GiB per process: {', '.join(parts)}; in all {needed / 2**30:.3g}"
    if device.type != "cuda":
        return line
    limit = SPARE * torch.cuda.get_device_properties(device).total_memory
    if needed <= limit:
        return f"{line} of {limit / SPARE / 2**30:.3g}"
    fit = int((limit - sum(fixed)) // frame)
    remedy = f"--micro-batch {fit}" if fit >= 1 else "--shard on more GPUs"
    if not cfg.recompute:
        remedy += ", or --recompute, which keeps little, for a third more arithmetic"
    raise InputError(f"{line}, but the GPU has {limit / SPARE / 2**30:.3g}: give {remedy}")
