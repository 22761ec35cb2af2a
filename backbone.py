"""The Prismatic VLM's three parts: two vision transformers, projector, LLM (paper Sec. 4.1).

    FusedVision  images [N, 3, H, W] in [0, 1]  ->  patches [N, P, C_dino + C_siglip], DINO first
    Projector    patches                        ->  visual tokens [N, P, D]
    LLM          embeddings [B, T, D]           ->  hidden [B, T, D], each layer's keys and values

Prismatic feeds its LLM the second-to-last block's output, without final norm and prefix tokens. So
the last block, the final norm and SigLIP's pooling head are not built.

q, k, v (and gate, up) are fused into one matmul: at batch 1 kernel launches dominate.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from config import BINS, LLMConfig, ModelConfig, VisionConfig


def draw_normal(*shape: int, std: float) -> Tensor:
    """Initial values ~ N(0, std^2). On the meta device normal_ would only import torch._dynamo."""
    weight = torch.empty(shape)
    return weight if weight.is_meta else weight.normal_(std=std)


def init_weights(part: nn.Module, std: float) -> None:
    """Qwen2's own initialisation, for parameters that no file fills: normal weights, no bias."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def halve(model: nn.Module) -> None:
    """Cast the parameters to bf16, in place. Decoders stay fp32: they predict metres."""
    for name, parameter in model.named_parameters():
        if not name.startswith("decoders."):
            parameter.data = parameter.data.to(torch.bfloat16)


# --- Vision ---


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.heads = cfg.heads
        self.norm1 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width, eps=1e-6)
        self.fc1 = nn.Linear(cfg.width, cfg.mlp)
        self.fc2 = nn.Linear(cfg.mlp, cfg.width)
        if cfg.layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((cfg.width,), cfg.layer_scale))
            self.scale2 = nn.Parameter(torch.full((cfg.width,), cfg.layer_scale))
        else:
            self.scale1 = self.scale2 = 1.0

    def forward(self, x: Tensor) -> Tensor:  # [N, T, C] -> [N, T, C]
        q, k, v = rearrange(
            self.qkv(self.norm1(x)), "n t (three h d) -> three n h t d", three=3, h=self.heads
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)")
        x = x + self.scale1 * self.proj(attended)
        # Exact GELU in both encoders, as Prismatic trained them; transformers' SigLIP defaults to
        # the tanh form.
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """DINOv2 or SigLIP, up to the second-to-last block."""

    def __init__(self, cfg: VisionConfig, patch_size: int, patches: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, cfg.width, patch_size, stride=patch_size)
        # The cls token, then the registers.
        self.prefix = nn.Parameter(draw_normal(cfg.prefix_tokens, cfg.width, std=0.02))
        self.pos_embed = nn.Parameter(draw_normal(patches, cfg.width, std=0.02))
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth - 1))
        # No checkpoint fills these: they have values even when the model is built on meta.
        for name in ("mean", "std"):
            value = torch.tensor(getattr(cfg, name), device="cpu")[:, None, None]
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [0, 1] -> patch features [N, P, C]."""
        # The patch convolution as a matrix product: several times faster on a CPU.
        conv, p = self.patch_embed, self.patch_embed.kernel_size[0]
        x = (images - self.mean) / self.std
        pixels = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p)
        weight = rearrange(conv.weight, "d c p q -> d (c p q)")
        x = F.linear(pixels.to(weight.dtype), weight, conv.bias)  # [N, P, C]
        prefix = repeat(self.prefix, "t c -> n t c", n=len(x))
        x = torch.cat([prefix, x + self.pos_embed], dim=1)  # [N, prefix + P, C]
        for block in self.blocks:
            x = block(x)
        return x[:, len(self.prefix) :]  # [N, P, C]


class FusedVision(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.dino = VisionTransformer(cfg.dino, cfg.patch_size, cfg.patches)
        self.siglip = VisionTransformer(cfg.siglip, cfg.patch_size, cfg.patches)

    def forward(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, P, C_dino + C_siglip]
        return torch.cat([self.dino(images), self.siglip(images)], dim=-1)


class Projector(nn.Sequential):
    """Prismatic's fused-gelu-mlp: 2176 -> 8704 -> 896 -> 896 in the paper preset."""

    def __init__(self, cfg: ModelConfig):
        hidden, width = cfg.projector_hidden, cfg.llm.width
        super().__init__(
            nn.Linear(cfg.dino.width + cfg.siglip.width, hidden), nn.GELU(),
            nn.Linear(hidden, width), nn.GELU(), nn.Linear(width, width),
        )  # fmt: skip


# --- Language ---


class KeyValues(NamedTuple):
    """One layer's KV cache: each [B, kv heads, T, head_dim], keys after RoPE."""

    k: Tensor
    v: Tensor


def rope(positions: Tensor, cfg: LLMConfig) -> tuple[Tensor, Tensor]:
    """RoPE's tables [B, 1, T, head_dim] at integer positions [B, T]: cosines, signed sines."""
    even = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    frequency = cfg.rope_theta ** (-even / cfg.head_dim)
    angle = rearrange(positions[:, :, None] * frequency, "b t f -> b 1 t f")
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to [B, heads, T, head_dim]; Qwen2 pairs a head's first half with its second."""
    return x * table[0] + x.roll(x.shape[-1] // 2, dims=-1) * table[1]


def repeat_heads(cache: KeyValues, heads: int) -> KeyValues:
    """One key and value for each of the query's heads.

    With grouped heads and a mask SDPA falls back to the math kernel on CUDA, which keeps all scores
    in memory. Repeated keys and values keep the fused kernel.
    """
    groups = heads // cache.k.shape[1]
    if groups == 1:
        return cache
    return KeyValues(*(repeat(x, "b h s d -> b (h g) s d", g=groups) for x in cache))


def append_keys(past: KeyValues, new: KeyValues, length: int) -> KeyValues:
    """The cache of past and new tokens; in place if `past` has room up to `length` tokens."""
    if past.k.shape[2] < length:
        return KeyValues(*(torch.cat(pair, dim=2) for pair in zip(past, new)))
    for old, fresh in zip(past, new):
        groups = old.unflatten(1, (fresh.shape[1], -1))  # repeated heads: [B, kv heads, g, ...]
        groups[..., length - fresh.shape[2] :, :] = fresh[:, :, None]
    return past


class LLMLayer(nn.Module):
    """One pre-norm layer: grouped-query attention, SwiGLU.

    The action expert has another `width`, but the LLM's heads and head_dim, since it attends to the
    LLM's keys.
    """

    def __init__(self, cfg: LLMConfig, width: int, mlp: int):
        super().__init__()
        self.cfg = cfg
        heads = cfg.heads + 2 * cfg.kv_heads
        self.input_norm = nn.RMSNorm(width, eps=cfg.norm_eps)
        self.qkv = nn.Linear(width, heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.o = nn.Linear(cfg.heads * cfg.head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=cfg.norm_eps)
        self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None,
        past: KeyValues | None = None, tail: int | None = None,
    ) -> tuple[Tensor, KeyValues]:  # fmt: skip
        """x [B, T, width]; mask [B, 1, T, past + T], True or 0 where a query attends; None: causal.

        Returns x and the KV cache of past and new tokens. With `tail`, x is of the last `tail`
        tokens only; keys and values are of all.
        """
        heads, kv_heads = self.cfg.heads, self.cfg.kv_heads
        qkv = rearrange(
            self.qkv(self.input_norm(x)), "b t (h d) -> b h t d", d=self.cfg.head_dim
        )  # [B, heads + 2 kv heads, T, head_dim]
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        q, k = rotate(qk, table).to(v.dtype).split([heads, kv_heads], dim=1)
        cache = KeyValues(k, v)
        if past is not None:
            cache = append_keys(past, cache, mask.shape[-1])  # [B, kv heads, past + T, head_dim]
        if tail is not None:
            if mask is None:  # `is_causal` would align the tail with the first keys
                mask = q.new_ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
            x, q, mask = x[:, -tail:], q[:, :, -tail:], mask[:, :, -tail:]
        k, v = repeat_heads(cache, heads) if k.is_cuda else cache
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
        )
        x = x + self.o(rearrange(attended, "b h t d -> b t (h d)"))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # each [B, T, mlp]
        return x + self.down(F.silu(gate) * up), cache


class LLM(nn.Module):
    """The causal LLM: Qwen2.5 (tied head, biases) or Llama 2 (neither)."""

    def __init__(self, cfg: LLMConfig):
        super().__init__()
        self.cfg = cfg
        table = draw_normal(cfg.vocab, cfg.width, std=1.0)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(LLMLayer(cfg, cfg.width, cfg.mlp) for _ in range(cfg.depth))
        self.norm = nn.RMSNorm(cfg.width, eps=cfg.norm_eps)
        if not cfg.tied:
            self.head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None,
        past: list[KeyValues] | None = None, tail: int | None = None,
    ) -> tuple[Tensor, list[KeyValues]]:  # fmt: skip
        """x [B, T, D], table = rope(positions [B, T], cfg), mask [B, 1, T, past + T] or None.

        Returns final-norm hidden states [B, T, D] and the KV cache per layer. With `tail` the last
        layer computes the last `tail` tokens only, [B, tail, D]: saves 8 % of a tiny training step,
        1 % of the paper's.
        """
        cache = []
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            x, keys = layer(x, table, mask, past[i] if past else None, tail if is_last else None)
            cache.append(keys)
        return self.norm(x), cache

    def logits(self, hidden: Tensor, first: int = 0, count: int | None = None) -> Tensor:
        """Logits [..., count] over `count` ids from `first` on; default: the whole vocabulary."""
        rows = self.embed.weight if self.cfg.tied else self.head.weight  # [vocabulary, D]
        return F.linear(hidden, rows if count is None else rows[first : first + count])


# --- Action tokens ---

# GAP-3 (Sec. 4.1): the paper does not say how "discrete action tokens" encode an action. Here one
# step is 13 tokens, one per dimension; a token is one of 256 uniform bins on [-1, 1]. The token ids
# are first_action_id + bin: in the paper preset Prismatic's <|extra_0|> to <|extra_255|>.


def actions_to_bins(actions: Tensor) -> Tensor:
    """Normalised actions in [-1, 1] -> bins in 0..255; values outside are clipped."""
    return ((actions.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(max=BINS - 1)


def bins_to_actions(bins: Tensor) -> Tensor:
    """Bins -> their centres. A round trip errs by at most 1 / 256."""
    return (bins.float() + 0.5) / BINS * 2 - 1
