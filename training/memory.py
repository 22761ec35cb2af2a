"""What a training step costs, before the first one: GPU memory and arithmetic.

    plan = memory_plan(cfg, world, device)          # {"weights": bytes, ...} per process
    sample_flop(cfg) / matmul_rate(device)          # seconds of a frame at full speed

Plan and operations are counted in steps on tensors without content (torch's FakeTensorMode). The
plan is the peak of such a step; a tenth of the GPU stays free for fragmentation.
"""

import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from config import HISTORY, InputError, TrainConfig
from data import Frames, batch_shapes
from model import AuxVLA
from storage.trajectory import RECORD
from training.order import loader_processes
from training.ranks import autocast, halve_frozen

USABLE = 0.9  # share of a device's memory that a plan may take
FRAMES = 8, 32  # in flight in two dry runs: the plan is the straight line through their peaks


class Meter(TorchDispatchMode):
    """The bytes of all tensors that operations make, now and at most; each storage once."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()
        self.add(tensors)

    def add(self, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.alive.add(key)
                self.now += size
                weakref.finalize(storage, self.free, key, size)
        self.peak = max(self.peak, self.now)

    def free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None) -> object:
        out = function(*args, **(kwargs or {}))
        self.add(out)
        return out


@contextmanager
def dry_run(
    cfg: TrainConfig, frames: int, device: torch.device
) -> Iterator[tuple[AuxVLA, Callable[[], None]]]:
    """A model without content, ready to train, and a forward and backward pass of a micro-batch."""
    with torch.device("meta"):
        model = AuxVLA(cfg.model, flow_head=cfg.stage == 3)
    kinds = {"prompt_ids": torch.long, "prompt_mask": torch.bool}
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        model.to_empty(device=device)
        halve_frozen(model, cfg, device)
        for parameter in model.train_stage(cfg.stage):
            parameter.grad = torch.empty_like(parameter)  # of earlier micro-batches
        model.eval()  # BatchNorm would wait for the other ranks
        model.prepare_blocks(cfg.recompute)
        batch = {
            name: torch.zeros(shape, dtype=kinds.get(name, torch.float32))
            for name, shape in batch_shapes(cfg.model, frames, noise=True).items()
        }

        def step() -> None:
            with autocast(device):
                losses = model(batch, cfg.stage)
            sum(losses.values()).backward()

        yield model, step


@lru_cache
def measure(cfg: TrainConfig, frames: int, device: torch.device) -> tuple[int, int, int]:
    """Bytes of the weights, of the gradients, and of the rest of a step's peak."""
    with dry_run(cfg, frames, device) as (model, step):
        parameters = [*model.parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        held = [sum(tensor.nbytes for tensor in each) for each in (parameters, gradients)]
        with Meter(*parameters, *gradients) as meter:
            step()
    return *held, meter.peak - sum(held)


def memory_plan(cfg: TrainConfig, world: int, device: torch.device) -> dict[str, float]:
    """Bytes per process: weights, gradients, Adam's moments, and the rest of a step's peak."""
    cfg = TrainConfig(model=cfg.model, stage=cfg.stage, recompute=cfg.recompute, shard=cfg.shard)
    (weights, gradients, few), (_, _, many) = (measure(cfg, n, device) for n in FRAMES)
    per_frame = (many - few) / (FRAMES[1] - FRAMES[0])
    share = 1 / (world if cfg.shard else 1)
    return {
        "weights": share * weights,
        "gradients": share * gradients,
        "Adam's moments": share * 2 * gradients,
        "copies of the weights": max(0, few - FRAMES[0] * per_frame),
        "activations of a frame": per_frame,
    }


def sample_flop(cfg: TrainConfig) -> float:
    """Floating-point operations of a frame's forward and backward pass, recomputation left out."""
    # By the math kernel: torch does not count the operations of a CPU's fused one.
    with (
        dry_run(replace(cfg, recompute=False), 1, torch.device("cpu")) as (_, step),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        step()
    return counter.get_total_flops()


def matmul_rate(device: torch.device) -> float:
    """FLOP per second of a large matrix product, the best of five: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # training's own stream stays as it is
    a = torch.randn(n, n, generator=generator, dtype=dtype, device=device)
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        rates.append(2 * n**3 / (time.perf_counter() - began))
    return max(rates)


def memory_of(device: torch.device) -> float:
    """Bytes that a process may take of its GPU or, without one, of the machine."""
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return USABLE * memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes here


def frames_that_fit(cfg: TrainConfig, world: int, device: torch.device) -> int:
    *fixed, frame = memory_plan(cfg, world, device).values()
    return max(0, int((memory_of(device) - sum(fixed)) // frame))


def settle_micro_batch(cfg: TrainConfig, world: int, device: torch.device) -> TrainConfig:
    """--micro-batch auto: a rank's batch in as few pieces as fit, all of about one size."""
    if cfg.micro_batch != "auto":
        return cfg
    frames = cfg.batch_size // world
    pieces = -(-frames // max(1, frames_that_fit(cfg, world, device)))
    return replace(cfg, micro_batch=-(-frames // pieces))


def flags_that_fit(cfg: TrainConfig, world: int, device: torch.device) -> str:
    """The first two sets of flags whose plan fits."""
    recompute, frames = replace(cfg, recompute=True), min(cfg.micro_batch, cfg.batch_size // world)
    sharded, sizes = replace(recompute, shard=True), (2, 4, 8, 16, 32, 64)
    trials = [("", cfg, world), ("--recompute", recompute, world)]
    trials += [(f"--recompute --shard on {n} GPUs", sharded, n) for n in sizes]
    fitting = []
    for flags, trial, gpus in trials if device.type == "cuda" else trials[:2]:
        if fit := frames_that_fit(trial, gpus, device):
            fitting.append(flags if fit >= frames else f"--micro-batch {fit} {flags}".strip())
    return ", or ".join(fitting[:2]) or "--preset tiny"


def describe_plan(cfg: TrainConfig, world: int, device: torch.device) -> str:
    """The plan in a line. InputError, with flags that fit, if GPU or machine is too small."""
    plan, frames = memory_plan(cfg, world, device), min(cfg.micro_batch, cfg.batch_size // world)
    plan[f"activations of {frames} frames"] = frames * plan.pop("activations of a frame")
    parts = ", ".join(f"{name} {round(size / 2**30, 3):.2g}" for name, size in plan.items())
    needed, usable = sum(plan.values()), memory_of(device)
    line = f"memory, GiB per process: {parts}; in all {needed / 2**30:.3g}"
    total = f"{usable / USABLE / 2**30:.3g}"
    if needed <= usable:
        return f"{line} of {total}"
    kind = "GPU" if device.type == "cuda" else "machine"
    flags = flags_that_fit(cfg, world, device)
    raise InputError(f"{line}, but the {kind} has {total}: give {flags}")


def check_shared_memory(cfg: TrainConfig, frames: Frames) -> None:
    """Raise InputError if /dev/shm is too small for the loader processes' batches, two each."""
    if not (workers := loader_processes(frames, cfg.workers)):
        return
    pictures = sum(RECORD[name].itemsize for name in ("rgb", "depth"))
    frame = RECORD.itemsize + (HISTORY * pictures if cfg.model.history == "frames" else 0)
    ranks, here = (int(os.environ.get(n, 1)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    need = 2 * workers * cfg.batch_size * here // ranks * frame
    if (free := shutil.disk_usage("/dev/shm").free) < need:
        size = f"{-(-need // 2**30)}g"
        raise InputError(
            f"/dev/shm has {free / 1e9:.1f} GB free, {workers} loader processes a rank need "
            f"{need / 1e9:.1f} GB: mount -o remount,size={size} /dev/shm (or docker run "
            f"--shm-size={size}), or give --workers 0"
        )
