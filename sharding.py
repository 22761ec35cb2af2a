"""A model too large for one GPU, divided among all of them by torch's own FSDP2.

OpenVLA's 7.5B parameters are 30 GB in fp32 and 120 GB with gradients and Adam's moments. Sharded,
each of R ranks keeps 1 / R of every tensor, and gathers one block's weights at a time to compute
with them. A step is the same as DDP's, and so is a checkpoint: it holds whole tensors.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from model import AuxVLA


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


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, gathered on the CPU by all ranks together; others as they are."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor as `parameter` is kept: its rank's shard, or whole on its device."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
