"""The flow-matching action expert (paper Sec. 4.1, 5.3, 6.4), after pi0.

    loss = head.loss(actions, noise, t, cache, prefix_mask)  # training: one noised chunk per frame
    actions = head.sample(cache, prefix_mask, noise)         # 10 Euler steps: normalised [B, 8, 13]

`cache` is the frozen VLM's KV cache of the prefix; prefix_mask [B, S] is False at padding.

Time runs as in pi0's code, opposite to its paper: t = 1 is noise, t = 0 is the action.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import KeyValues, LLMLayer, repeat_heads, rope
from config import ACTION_DIM, ModelConfig


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sine-cosine embedding [B, width] of flow time t [B] in (0, 1]; periods 0.004 to 4 (pi0)."""
    fraction = torch.linspace(0, 1, width // 2, device=t.device)
    period = 0.004 * (4.0 / 0.004) ** fraction
    angle = 2 * math.pi * t[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def draw_noise(frames: int, horizon: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise [frames, H, 13] ~ N(0, 1) and times [frames] of a training step.

    pi0: t = 0.999 Beta(1.5, 1) + 0.001, denser near noise. Beta(1.5, 1) is u^(1/1.5) for uniform u.
    """
    noise = torch.randn(frames, horizon, ACTION_DIM, generator=generator)
    return noise, 0.999 * torch.rand(frames, generator=generator) ** (1 / 1.5) + 0.001


class FlowHead(nn.Module):
    """A narrower transformer of the LLM's depth and heads; each layer reads the LLM layer's cache.

    GAP-15 (Sec. 5.3): "denoising from the rich, frozen latent representations" does not say what
    the head attends to. Here, as in pi0: the keys and values of the whole prefix (images, prompt,
    latents) in every layer. The prefix stays causal, as it was trained. There is no proprioception
    token, since the paper has no such input.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.llm = cfg.flow, cfg.llm
        width = cfg.flow.width
        self.action_in = nn.Linear(ACTION_DIM, width)
        self.action_time_in = nn.Linear(2 * width, width)
        self.action_time_out = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            LLMLayer(cfg.llm, width, cfg.flow.mlp) for _ in range(cfg.llm.depth)
        )
        self.norm = nn.RMSNorm(width, eps=cfg.llm.norm_eps)
        self.action_out = nn.Linear(width, ACTION_DIM)

    def chunk_context(
        self, prefix_mask: Tensor, horizon: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """RoPE tables and attention mask [B, 1, H, S + H] of actions that follow a prefix [B, S].

        The actions see the whole prefix and each other, in both directions.
        """
        steps = torch.arange(horizon, device=prefix_mask.device)
        positions = prefix_mask.sum(-1, keepdim=True) + steps  # [B, H]
        visible = F.pad(prefix_mask, (0, horizon), value=True)  # [B, S + H]
        return rope(positions, self.llm), repeat(visible, "b s -> b 1 h s", h=horizon)

    def velocity(
        self, x_t: Tensor, embedded_t: Tensor, cache: list[KeyValues],
        table: tuple[Tensor, Tensor], mask: Tensor,
    ) -> Tensor:  # fmt: skip
        """Velocity [B, H, 13] of noised actions x_t [B, H, 13].

        embedded_t [B or 1, W] is time_embedding(t); table and mask are chunk_context's.
        """
        embedded_t = embedded_t[:, None].expand(*x_t.shape[:2], -1)  # [B, H, W]
        # Under autocast the weights, and with them the residual stream, are fp32; a policy on a GPU
        # has bf16 weights.
        dtype = self.norm.weight.dtype
        x = torch.cat([self.action_in(x_t.to(dtype)), embedded_t.to(dtype)], dim=-1)
        x = self.action_time_out(F.silu(self.action_time_in(x))).to(dtype)  # [B, H, W]
        for layer, past in zip(self.layers, cache):
            x, _ = layer(x, table, mask, past)
        return self.action_out(self.norm(x)).float()

    def loss(
        self, actions: Tensor, noise: Tensor, t: Tensor, cache: list[KeyValues], prefix_mask: Tensor
    ) -> Tensor:
        """Mean squared error of the velocity, [B, H], for normalised actions [B, H, 13]."""
        weight = rearrange(t, "b -> b 1 1")
        x_t = weight * noise + (1 - weight) * actions
        target = noise - actions  # dx_t / dt
        context = self.chunk_context(prefix_mask, actions.shape[1])
        velocity = self.velocity(x_t, time_embedding(t, self.cfg.width), cache, *context)
        return (velocity - target).square().mean(-1)

    @torch.no_grad()
    def sample(self, cache: list[KeyValues], prefix_mask: Tensor, noise: Tensor) -> Tensor:
        """From noise [B, H, 13] at t = 1 to actions at t = 0 in 10 equal Euler steps (Sec. 6.4)."""
        x, num_steps, horizon = noise, self.cfg.denoise_steps, noise.shape[1]
        heads = self.llm.heads if noise.is_cuda else self.llm.kv_heads
        # Room for the actions' keys, which every step writes in place.
        cache = [
            KeyValues(*(F.pad(x, (0, 0, 0, horizon)) for x in repeat_heads(layer, heads)))
            for layer in cache
        ]
        table, visible = self.chunk_context(prefix_mask, horizon)
        # A float mask, as attention adds it: each layer and step would convert a boolean one.
        mask = torch.where(visible, 0.0, -torch.inf).to(self.norm.weight.dtype)
        t = 1 - torch.arange(num_steps, device=noise.device) / num_steps
        for embedded_t in time_embedding(t, self.cfg.width).split(1):  # [1, W]
            x = x - self.velocity(x, embedded_t, cache, table, mask) / num_steps
        return x
