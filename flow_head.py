"""The flow-matching action expert (paper Sec. 4.1, 5.3, 6.4), after pi0.

    loss = head.loss(actions, noise, t, cache, prefix_mask)  # training: one noised chunk per frame
    actions = head.sample(cache, prefix_mask, noise)         # 10 Euler steps: normalised [B, 8, 13]

`cache` is the frozen VLM's keys and values of every layer, prefix_mask [B, S] marks the tokens that
exist.

Time runs as in pi0's code, against its paper: t = 1 is noise, t = 0 is the action.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import KeyValues, LLMLayer, Slots, rope
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
    """A narrower transformer of the LLM's depth and heads that reads its keys and values by layer.

    GAP-15 (Sec. 5.3): "denoising from the rich, frozen latent representations" leaves open what is
    attended to. Read as pi0: every layer's keys and values of the whole prefix (images, prompt,
    latents). The prefix stays causal, as it was trained; there is no proprioception token, since
    the paper has no such input.
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

    def behind(self, prefix_mask: Tensor, horizon: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """RoPE's tables and the mask [B, 1, H, S + H] of actions that stand behind a prefix [B, S].

        They see all of it and each other, in both directions.
        """
        steps = torch.arange(horizon, device=prefix_mask.device)
        table = rope(
            prefix_mask.sum(-1, keepdim=True) + steps, self.llm.head_dim, self.llm.rope_theta
        )
        visible = F.pad(prefix_mask, (0, horizon), value=True)  # [B, S + H]
        return table, repeat(visible, "b s -> b 1 h s", h=horizon)

    def velocity(
        self, x_t: Tensor, t: Tensor, cache: list[KeyValues], prefix_mask: Tensor
    ) -> Tensor:
        """Velocity [B, H, 13] of noised actions x_t [B, H, 13] at t [B]; prefix_mask [B, S]."""
        behind = self.behind(prefix_mask, x_t.shape[1])
        return self.transformer(x_t, time_embedding(t, self.cfg.width), cache, *behind)

    def transformer(
        self,
        x_t: Tensor,
        time: Tensor,
        cache: list[KeyValues] | list[Slots],
        table: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        """The velocity, given what all Euler steps share; time [B or 1, W]."""
        time = time[:, None].expand(len(x_t), x_t.shape[1], -1)  # [B, H, W]
        x = self.action_time_in(torch.cat([self.action_in(x_t), time], dim=-1))  # [B, H, W]
        # The residual stream is fp32 under autocast, as the VLM's is: bf16 would round every sum.
        x = self.action_time_out(F.silu(x)).float()
        for layer, past in zip(self.layers, cache):
            x, _ = layer(x, table, mask, past)
        return self.action_out(self.norm(x)).float()

    def loss(
        self, actions: Tensor, noise: Tensor, t: Tensor, cache: list[KeyValues], prefix_mask: Tensor
    ) -> Tensor:
        """Squared error of the velocity per action, [B, H].

        For normalised chunks and noise [B, H, 13], times t [B].
        """
        t_ = rearrange(t, "b -> b 1 1")
        x_t = t_ * noise + (1 - t_) * actions
        target = noise - actions  # dx_t / dt
        return (self.velocity(x_t, t, cache, prefix_mask) - target).square().mean(-1)

    @torch.no_grad()
    def sample(self, cache: list[KeyValues], prefix_mask: Tensor, noise: Tensor) -> Tensor:
        """From noise [B, H, 13] at t = 1 to actions at t = 0 in 10 equal Euler steps (Sec. 6.4)."""
        x, num_steps, horizon = noise, self.cfg.denoise_steps, noise.shape[1]
        grown = ([F.pad(each, (0, 0, 0, horizon)) for each in layer] for layer in cache)
        slots = [Slots(*layer, prefix_mask.shape[1]) for layer in grown]
        behind = self.behind(prefix_mask, horizon)
        t = 1 - torch.arange(num_steps, device=noise.device) / num_steps
        for time in time_embedding(t, self.cfg.width).split(1):  # [1, W]
            x = x - self.transformer(x, time, slots, *behind) / num_steps
        return x
