"""The ranks of a run: how they find each other, agree, are told to stop, and leave.

ranks = join(device)                   # under torchrun: all of them, or an error naming who is
total = ranks.sum(tensor)              # missing; without it: a world of one, no communication
with signals() as stop: ...            # stop() is true once SIGTERM or SIGUSR1 has arrived
ranks.leave()
"""

import gc
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from config import InputError
from model import AuxVLA

# How long the ranks wait for each other, seconds: to begin; to end, when one may still be saving.
JOIN_TIMEOUT, LEAVE_TIMEOUT = 120.0, 3600.0
STOPPED = 75  # exit code of a run that was told to stop, and saved (sysexits.h: EX_TEMPFAIL)


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    store: dist.Store | None = None  # None without torchrun

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: str | None) -> str | None:
        """The main rank's value, on every rank."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def decided(self, decide: Callable[[], str]) -> str:
        """What the main rank decides, on every rank; when it refuses, the others end in silence."""
        said = None
        try:
            said = decide() if self.is_main else None
        finally:
            said = self.from_main(said)
        if said is None:
            raise SystemExit(1)
        return said

    def leave(self) -> None:
        """End together. Call it when nothing holds DDP any more."""
        if self.store is None:
            return
        # DDP's reducer holds the process group. Were it dropped after the group, gloo's threads
        # would be joined while they wait for the interpreter that waits for them: 1 run of 20 hung.
        gc.collect()
        deadline = time.monotonic() + LEAVE_TIMEOUT
        while missing := absent(self.store, "leave", self.rank, self.world):
            wait_for(missing, self.rank, self.world, deadline)
        dist.destroy_process_group()


# Through the store, since a collective that lacks a rank can only say that it timed out.


def absent(store: dist.Store, place: str, rank: int, world: int) -> list[int]:
    """Come to `place`; the ranks that have not come there yet."""
    store.set(f"{place}/{rank}", "here")
    return [other for other in range(world) if not store.check([f"{place}/{other}"])]


def wait_for(missing: list[int], rank: int, world: int, deadline: float) -> None:
    """Wait a little. Raises InputError, naming the missing ranks, after the deadline."""
    if time.monotonic() > deadline:
        raise InputError(
            f"rank {rank} waited in vain: of {world} ranks these did not come: {missing}. Their "
            "own output says why; start all nodes with the same command at about the same time"
        )
    time.sleep(0.01)


def gather(store: dist.Store, rank: int, world: int, timeout: float) -> dist.Store:
    """Wait for all ranks of this start; a store of their own. InputError names the missing.

    torchrun keeps one store when it starts ranks again, and what the dead have left there must not
    be taken for the living's. So each process brings a new name, the main one calls the roll, and
    only who is on it answers.
    """
    me, deadline = uuid4().hex, time.monotonic() + timeout
    names, missing = [f"name/{other}" for other in range(world)], [0]  # until it calls the roll
    store.set(names[rank], me)
    while True:
        if rank == 0:
            store.set("roll", " ".join(store.get(n).decode() for n in names if store.check([n])))
        roll = store.get("roll").decode() if store.check(["roll"]) else ""
        if me in roll:
            own = dist.PrefixStore(hashlib.sha256(roll.encode()).hexdigest(), store)
            if not (missing := absent(own, "begin", rank, world)):
                return own
        wait_for(missing, rank, world, deadline)


def device_of(name: str | None) -> torch.device:
    """--device; by default what is there. Raises InputError for a GPU that is not."""
    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise InputError(
            "--device cuda: torch finds no GPU here. `python -m tools.doctor --device cuda` says "
            "why; --device cpu does without"
        )
    return torch.device(name or ("cuda" if usable else "cpu"))


def join(device: str | None, timeout: float = JOIN_TIMEOUT) -> Ranks:
    """This process's place among the ranks that torchrun started (GPUs: NCCL, CPUs: gloo)."""
    kind = device_of(device).type
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        # Before anything else allocates, or every rank opens a context on GPU 0.
        torch.cuda.set_device(local_rank)
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device(kind))
    place = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    store = gather(store, rank, world, timeout)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world
    )
    return Ranks(rank, world, place, store)


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and SIGUSR1 (a scheduler's) only make the yielded function return True."""
    arrived = []
    before = {
        number: signal.signal(number, lambda *_: arrived.append(1))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shard(model: AuxVLA, device: torch.device) -> None:
    """Divide the model, which is whole on every rank, among the ranks' devices. In place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    vlm = model.vlm
    for block in (*vlm.vision.dino.blocks, *vlm.vision.siglip.blocks, *vlm.llm.layers):
        fully_shard(block, mesh=mesh)
    empty = {p for p in model.parameters() if not p.numel()}  # FSDP2 cannot divide nothing
    for parameter in empty:
        parameter.data = parameter.data.to(device)
    # The rest is one group, divided again after each forward pass: otherwise its whole tensors
    # would stand in the place of the parameters that the optimizer knows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=empty)
    for method in ("act", "teacher_forced"):  # entrances beside forward()
        register_fsdp_forward_method(model, method)
