"""The processes (ranks) of a run: joining, sums, signals, leaving, sharding.

ranks = join(device)         # under torchrun all ranks, or an error that names the missing ones
total = ranks.sum(tensor)    # without torchrun: one rank, no communication
with signals() as stop: ...  # stop() is True after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1
ranks.leave()
"""

import gc
import hashlib
import os
import shutil
import signal
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from backbone import halve
from config import InputError, TrainConfig
from model import AuxVLA

# Seconds that ranks wait for each other: at the start; later, when one may be saving.
JOIN_TIMEOUT, STEP_TIMEOUT = 120.0, 3600.0
# Ctrl-C, a terminal that closes, and what schedulers send, to the loader processes as well
STOPS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # exit code of a run that was stopped by a signal and saved (EX_TEMPFAIL)
BF16 = {"cuda"}  # kinds of devices that compute in bf16; a CPU gains nothing by it


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_main(self, function: Callable[[], object]) -> object:
        """The result of `function` on rank 0. If it raises there, the other ranks exit quietly."""
        message = [None, True]  # result, failed
        try:
            if self.is_main:
                message = [function(), False]
        finally:
            if self.world > 1:
                dist.broadcast_object_list(message, device=self.device)
        result, failed = message
        if failed:
            raise SystemExit(1)
        return result

    def leave(self) -> None:
        """Wait for all ranks, then close the process group. The caller must have dropped DDP."""
        if dist.is_initialized():
            gc.collect()  # frees DDP's reducer: if it outlived the group, gloo could hang (1 in 20)
            dist.barrier()
            dist.destroy_process_group()


def gather(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """Wait for all ranks of this start; return a store of their own.

    Raises InputError, naming the missing ranks, after `timeout` seconds. After a restart torchrun's
    key-value store still has the keys of the crashed ranks. So each process writes a new id, and
    rank 0 publishes the ids that it sees. A rank proceeds when its own id is published, under a
    prefix made from all ids.
    """
    own_id, deadline = uuid4().hex, time.monotonic() + timeout
    keys, missing = [f"id/{other}" for other in range(world)], [0]  # until rank 0 lists this rank
    store.set(keys[rank], own_id)
    while missing:
        if time.monotonic() > deadline:
            raise InputError(
                f"rank {rank} waited in vain: of {world} ranks these did not come: {missing}. See "
                "their output; start all nodes with the same command at about the same time"
            )
        if rank == 0:
            store.set("ids", " ".join(store.get(k).decode() for k in keys if store.check([k])))
        ids = store.get("ids").decode() if store.check(["ids"]) else ""
        if own_id in ids:
            own = dist.PrefixStore(hashlib.sha256(ids.encode()).hexdigest(), store)
            own.set(f"here/{rank}", "")
            missing = [other for other in range(world) if not own.check([f"here/{other}"])]
        time.sleep(0.01)
    return own


def device_of(name: str | None) -> torch.device:
    """The device of --device; None: a GPU if there is one. InputError for cuda without a GPU."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise InputError(
            "--device cuda: torch finds no GPU here; why: python -m tools.doctor --device cuda"
        )
    return torch.device(name or ("cuda" if usable else "cpu"))


def autocast(device: torch.device) -> torch.autocast:
    """bf16 for what has fp32 weights, on devices that compute in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in BF16)


def halve_frozen(model: AuxVLA, cfg: TrainConfig, device: torch.device) -> None:
    """Stage 3 only reads the VLM: on a GPU it then has bf16 weights, and needs no autocast.

    Not with --shard: FSDP2 expects weights of one dtype.
    """
    if cfg.stage == 3 and device.type in BF16 and not cfg.shard:
        halve(model.vlm)
        model.vlm.encode = torch.autocast(device.type, enabled=False)(model.vlm.encode)


def missing_to_compile(kind: str) -> str:
    """What torch.compile needs for a kind of device and this machine lacks; empty: nothing."""
    variable, *compilers = ("CC", "gcc", "clang") if kind == "cuda" else ("CXX", "g++")
    needed = {
        "Triton": kind != "cuda" or find_spec("triton"),
        compilers[0]: os.environ.get(variable) or any(map(shutil.which, compilers)),
        "Python.h": Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file(),
    }
    return ", ".join(name for name, found in needed.items() if not found)


def check_compiler(kind: str) -> None:
    if lacking := missing_to_compile(kind):
        raise InputError(f"--compile needs {lacking}: apt-get install build-essential python3-dev")


def join(device: str | None, timeout: float = JOIN_TIMEOUT) -> Ranks:
    """This process's place among the ranks that torchrun started; without torchrun one rank."""
    own, backend = device_of(device), "gloo"
    if own.type == "cuda":
        own, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        if own.index >= (gpus := torch.cuda.device_count()):
            raise InputError(f"torch finds {gpus} GPUs: give torchrun --nproc_per_node={gpus}")
        torch.cuda.set_device(own)  # before any allocation, or every rank allocates on GPU 0 too
    if "RANK" not in os.environ:
        return Ranks(0, 1, own)
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = gather(store, rank, world, timeout)
    limit = timedelta(seconds=STEP_TIMEOUT)
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, own)


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Inside the block, a signal of STOPS only makes the yielded function return True."""
    received = []
    before = {number: signal.signal(number, lambda *_: received.append(1)) for number in STOPS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """In a loader process: the main process ends it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def shard(model: AuxVLA, device: torch.device) -> AuxVLA:
    """Divide the model, which every rank holds in full, among the ranks' devices (FSDP2)."""
    # Imported here: takes a second, and most runs do not shard.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    vlm = model.vlm
    for block in (*vlm.vision.dino.blocks, *vlm.vision.siglip.blocks, *vlm.llm.layers):
        fully_shard(block, mesh=mesh)
    empty = {p for p in model.parameters() if not p.numel()}  # FSDP2 cannot divide empty tensors
    for parameter in empty:
        parameter.data = parameter.data.to(device)
    # The rest is one group, sharded again after each forward pass: otherwise its full tensors would
    # replace the parameters that the optimizer holds.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=empty)
    for method in ("act", "teacher_forced"):  # they also run forward passes
        register_fsdp_forward_method(model, method)
    return model
