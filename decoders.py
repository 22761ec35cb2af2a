"""The five auxiliary decoders (paper Sec. 4.3, Table 5) and their losses (Eqs. 2 and 3).

Every decoder reads the latents [B, N, D] (8 x 896 in the paper) and nothing else, so any subset can
be trained (Tables 2 and 3). A loss returns one value per frame, [B]; model.py averages over the
frames that have the label. paper.py's rows choose the data that each decoder trains on (Sec. 3).

    pos    GlobalPositionDecoder  [B, 2]   base x, y, metres, world frame
    grasp  GraspDecoder           [B]      logit: is the target held?
    qpos   QposDecoder            [B, 12]  joint positions, rad (prismatic: m)
    obj    ObjectPoseDecoder      [B, 7]   target object relative to the base: x, y, z, metres, and
                                           unit quaternion wxyz
    seg    MaskDecoder            [B, C, 128, 128]  logits: the target object's pixels, per camera
"""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from config import QPOS_DIM, ModelConfig


class MLPDecoder(nn.Module):
    """Projection 896 -> 512, average over the latents, MLP 512 -> 256 -> 128 -> out (Table 5)."""

    out_dim: int

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = cfg.decoder.width
        self.feature_proj = nn.Linear(cfg.llm.width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, self.out_dim),
        )  # fmt: skip

    def forward(self, latents: Tensor) -> Tensor:
        # GAP-11 (Table 5): the pooling is listed last, even after the quaternion's normalisation,
        # and no activation is named. Here: pooling before the MLP; GELU, as in the mask decoder.
        pooled = reduce(self.feature_proj(latents), "b n d -> b d", "mean")  # [B, 512]
        return self.mlp(pooled)  # [B, out_dim]


class GlobalPositionDecoder(MLPDecoder):
    # GAP-9 (Sec. 4.3): "2D coordinates" of the robot, without a frame. Here: world x, y of the base
    # in metres, for Table 5's output [B, 2]; SG-VLA's figure shows [x, y, z].
    out_dim = 2


class GraspDecoder(MLPDecoder):
    out_dim = 1

    def forward(self, latents: Tensor) -> Tensor:
        return rearrange(super().forward(latents), "b 1 -> b")  # [B] logit


class ObjectPoseDecoder(MLPDecoder):
    # GAP-8 (Sec. 4.3): the paper does not name the pose's frame. Here: the base, since the abstract
    # says "relative positions". MS-HAB's branch that records segmentation and objects
    # (save_seg_obs) stores object poses in the world frame instead.
    out_dim = 7

    def forward(self, latents: Tensor) -> Tensor:
        position, quaternion = super().forward(latents).split([3, 4], dim=-1)
        return torch.cat([position, F.normalize(quaternion, dim=-1)], dim=-1)  # [B, 7]


def sincos_positions(length: int, width: int) -> Tensor:
    """Fixed sine-cosine position encodings [length, width] (Sec. 4.3)."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * frequency  # [length, width / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class QposDecoder(nn.Module):
    """Twelve learned mask tokens and the latents go through a two-layer transformer (Table 5)."""

    # GAP-10 (Sec. 4.3): "12-dimensional", without joint names. Here: Fetch's 15 joints except the 3
    # of the base, in MS-HAB's order.

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width = cfg.decoder.width
        self.feature_proj = nn.Linear(cfg.llm.width, width)
        self.mask_tokens = nn.Parameter(torch.randn(QPOS_DIM, width) * 0.02)
        positions = sincos_positions(QPOS_DIM + cfg.num_latents, width)
        self.register_buffer("positions", positions, persistent=False)
        layer = nn.TransformerEncoderLayer(
            width, cfg.decoder.heads, cfg.decoder.mlp, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.transformer = nn.TransformerEncoder(
            layer, cfg.decoder.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.out = nn.Linear(width, 1)

    def forward(self, latents: Tensor) -> Tensor:
        mask_tokens = repeat(self.mask_tokens, "j d -> b j d", b=len(latents))
        tokens = torch.cat([mask_tokens, self.feature_proj(latents)], dim=1)  # [B, 12 + N, 512]
        tokens = self.transformer(tokens + self.positions)
        return rearrange(self.out(tokens[:, :QPOS_DIM]), "b j 1 -> b j")  # [B, 12]


class SumOverRanks(torch.autograd.Function):
    """Differentiable all-reduce; torch.distributed.nn.functional.all_reduce is deprecated."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SumOverRanks.apply(grad)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over the frames of all ranks, on any device (torch's SyncBatchNorm needs a GPU)."""

    # GAP-17 (Table 5): "BatchNorm", trained on 8 GPUs. Statistics are taken over all ranks, since
    # per-GPU statistics would make a step depend on the number of GPUs. Under gradient accumulation
    # they are taken per micro-batch.

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x = x.float()
        sums = [reduce(each, "b c h w -> c", "sum") for each in (x, x.square())]
        sums = SumOverRanks.apply(torch.stack(sums))  # [2, C]
        count = dist.get_world_size() * x[:, 0].numel()
        mean = sums[0] / count
        var = (sums[1] / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class CameraMaskDecoder(nn.Module):
    """Latents -> 64 x 8 x 8 -> four transposed convolutions -> one 128 x 128 mask (Table 5)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        width, self.grid, channels = cfg.decoder.width, cfg.decoder.grid, cfg.decoder.channels
        self.feature_proj = nn.Sequential(
            nn.Linear(cfg.llm.width, width), nn.GELU(), nn.Linear(width, width // 2)
        )  # 896 -> 512 -> 256
        # GAP-12 (Table 5): "Spatial proj to 8x8x64" from [B, 8, 256], without details. We flatten
        # all latents, so that each latent can describe its own part of the image.
        self.spatial_proj = nn.Linear(cfg.num_latents * width // 2, channels[0] * self.grid**2)
        # Each transposed convolution doubles the side: 8 -> 16 -> 32 -> 64 -> 128.
        transpose_conv = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        stages = []
        for c_in, c_out in pairwise(channels):  # BatchNorm would cancel a bias
            stages += [transpose_conv(c_in, c_out, bias=False), BatchNorm(c_out), nn.GELU()]
        self.upsample = nn.Sequential(*stages, transpose_conv(channels[-1], 1))

    def forward(self, latents: Tensor) -> Tensor:
        features = rearrange(self.feature_proj(latents), "b n d -> b (n d)")  # [B, 8 x 256]
        grid = rearrange(
            self.spatial_proj(features), "b (c h w) -> b c h w", h=self.grid, w=self.grid
        )  # [B, 64, 8, 8]
        grid = grid.contiguous(memory_format=torch.channels_last)  # 20 % faster
        return rearrange(self.upsample(grid), "b 1 h w -> b h w")  # [B, 128, 128]


class MaskDecoder(nn.Module):
    # GAP-7 (Table 5, Fig. 1): Table 5 has one mask [B, 1, 128, 128], Fig. 1 one for each camera.
    # Here: one decoder per camera.

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cameras = nn.ModuleList(CameraMaskDecoder(cfg) for _ in cfg.cameras)

    def forward(self, latents: Tensor) -> Tensor:  # [B, N, D] -> [B, C, 128, 128]
        return torch.stack([decoder(latents) for decoder in self.cameras], dim=1)


# --- Losses, one value per frame ---


def pos_loss(pred: Tensor, target: Tensor) -> Tensor:
    # Eq. 2: L_pos = MSE(p_hat, p)
    return (pred - target).square().mean(-1)  # [B], m^2


def grasp_loss(pred: Tensor, target: Tensor) -> Tensor:
    # Eq. 2: L_grasp = CrossEntropy(y_hat, y)
    # GAP-6 (Eqs. 2-3, Table 5): "CrossEntropy" over a single logit would be 0 for any prediction.
    # Here: binary cross-entropy with logits, which Sec. 4.3 and SG-VLA name for the mask.
    return F.binary_cross_entropy_with_logits(pred, target, reduction="none")  # [B]


def qpos_loss(pred: Tensor, target: Tensor) -> Tensor:
    # Eq. 3: L_qpos = MSE(J_hat, J)
    return (pred - target).square().mean(-1)  # [B], rad^2


def obj_loss(pred: Tensor, target: Tensor) -> Tensor:
    # Eq. 2: L_obj = ||t_hat - t||^2 + (1 - |q_hat . q|)
    # |.|, because q and -q are the same rotation.
    position_error = (pred[:, :3] - target[:, :3]).square().sum(-1)  # [B], m^2
    rotation_error = 1 - (pred[:, 3:] * F.normalize(target[:, 3:], dim=-1)).sum(-1).abs()  # [B]
    return position_error + rotation_error


def seg_loss(pred: Tensor, target: Tensor) -> Tensor:
    # Eq. 3: L_seg = CrossEntropy(M_hat, M), binary (GAP-6), averaged over pixels and cameras
    loss = F.binary_cross_entropy_with_logits(pred, target.to(pred.dtype), reduction="none")
    return reduce(loss, "b c h w -> b", "mean")


DECODERS = {
    "pos": (GlobalPositionDecoder, pos_loss),
    "grasp": (GraspDecoder, grasp_loss),
    "qpos": (QposDecoder, qpos_loss),
    "obj": (ObjectPoseDecoder, obj_loss),
    "seg": (MaskDecoder, seg_loss),
}


# --- Means over labelled frames ---


def label_counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labelled frames (for flow, valid actions) per loss; train.global_counts: over all ranks."""
    counts = {name: batch[f"has_{name}"].sum() for name in DECODERS if f"has_{name}" in batch}
    return counts | {"action": batch["action_mask"][:, 0].sum(), "flow": batch["action_mask"].sum()}


def masked_mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Mean over labelled values. Without labels it is 0, and its gradients are 0, for DDP."""
    return torch.where(mask.bool(), values.float(), 0.0).sum() / count.clamp(min=1e-6)
