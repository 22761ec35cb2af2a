"""AuxVLA (paper Sec. 4, 5): images, instruction -> 8 latents -> action tokens, predictions, flow.

    losses = model(batch, stage)             # {"action": ..., "pos": ..., ...} or {"flow": ...}
    actions, predictions = model.act(batch)  # normalised actions [B, H, 13], decoder outputs
    python model.py --preset paper           # prints the number of parameters, part by part

The batch is a plain dict of tensors. data.py documents the keys; this file imports nothing of data.

Axes: B batch, V views (of each time step head rgb, hand rgb, head depth, hand depth), P patches per
view, K tokens of past actions (0 without that history), L prompt tokens, N = 8 latents, D = 896 LLM
width, S = L + V*P + K + N prefix length, A = 13 action dimensions, H actions in a chunk.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbone import (
    LLM,
    FusedVision,
    KeyValues,
    LLMLayer,
    Projector,
    VisionBlock,
    actions_to_bins,
    bins_to_actions,
    init_weights,
    repeat_heads,
    rope,
)
from config import ACTION_DIM, BINS, PRESETS, ModelConfig, model_config
from decoders import DECODERS, label_counts, masked_mean
from flow_head import FlowHead

# The stages that train a part (Sec. 5.2, 5.3, Fig. 3). In the others it is frozen, in eval mode.
TRAINED_IN = {"vlm": (1, 2), "decoders": (1, 2), "flow_head": (3,)}


def aux_input(latents: Tensor, stage: int) -> Tensor:
    """Stage 1: decoders read detached latents. Stage 2: their losses reach the VLM (Sec. 5.2)."""
    return latents.detach() if stage == 1 else latents


# --- The model ---


@dataclass
class Encoded:
    """The LLM's output for a prefix and, if given, the first A - 1 action tokens after it."""

    # Final-norm states of the queries (if there are none: of the last prefix token), then of the
    # action tokens
    hidden: Tensor  # [B, N or N + A - 1, D]
    cache: list[KeyValues]  # KV cache per layer
    mask: Tensor  # [B, S or S + A - 1], False at padding


NUM_READ = ACTION_DIM - 1  # tokens that a decoding pass reads: the 13th is never fed back


@dataclass
class Decoding:
    """A state of greedy decoding. AuxVLA.read_tokens changes it in place."""

    prefix: Encoded  # its hidden states are those of the last pass
    bins: Tensor  # [B, A]
    settled: Tensor  # how many first tokens are final: the last pass predicted what it had read
    cache: list[KeyValues]  # of prefix and tokens
    table: tuple[Tensor, Tensor]  # RoPE's, of the tokens
    visible: Tensor  # [B, 1, A - 1, S + A - 1]: 0 where a token attends, else -inf


def count_equal(one: Tensor, other: Tensor) -> Tensor:
    """Number of first columns in which [B, T] and [B, T] are equal."""
    return (one == other).all(0).long().cumprod(0).sum()


class VLM(nn.Module):
    """DINOv2 + SigLIP, projector, Qwen2.5, and the eight latent queries (Sec. 4.1).

    `meta`: encoders and LLM have shapes only, until load_pretrained or load_weights fills them.
    """

    def __init__(self, cfg: ModelConfig, meta: bool = False):
        super().__init__()
        self.cfg = cfg
        device = torch.device("meta") if meta else nullcontext()
        with device:
            self.vision = FusedVision(cfg)
        self.projector = Projector(cfg)
        with device:
            self.llm = LLM(cfg.llm)
        # GAP-2 (Table 5): the decoders read latents [B, 8, 896], which the paper does not define.
        # Here: eight learned queries after the prompt and before the action tokens. The queries see
        # no ground-truth action, and the action tokens attend to them, so auxiliary gradients reach
        # the action path. The other reading, `latents="action_states"`: the states that predict the
        # first eight action tokens. In training these know the true earlier action dimensions.
        self.latent_queries = nn.Parameter(torch.randn(cfg.num_queries, cfg.llm.width) * 0.02)

    def embed_prefix(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings of the prefix [B, S, D] and their mask [B, S].

        In this order: first prompt token, images, past actions, other prompt tokens, queries.
        Prismatic, too, puts the images after the first token.
        """
        images, ids = batch["images"], batch["prompt_ids"]  # [B, V, 3, H, W], [B, L]
        prompt_mask = batch.get("prompt_mask", torch.ones_like(ids))
        patches = self.vision(rearrange(images, "b v c h w -> (b v) c h w"))  # [B*V, P, C]
        visual = rearrange(self.projector(patches), "(b v) p d -> b (v p) d", b=len(images))
        text = self.llm.embed(ids)  # [B, L, D]
        queries = repeat(self.latent_queries, "n d -> b n d", b=len(images))  # [B, N, D]
        parts = [
            (text[:, :1], prompt_mask[:, :1]),
            (visual, prompt_mask.new_ones(visual.shape[:2])),  # [B, V*P, D]
            (text[:, 1:], prompt_mask[:, 1:]),
            (queries, prompt_mask.new_ones(queries.shape[:2])),
        ]
        if self.cfg.history == "actions":
            parts.insert(2, self.embed_past(batch))
        x = torch.cat([embedded.to(text.dtype) for embedded, _ in parts], dim=1)  # [B, S, D]
        return x, torch.cat([mask for _, mask in parts], dim=1).bool()

    def embed_past(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The last four actions as tokens [B, K, D]; mask [B, K], False before the episode."""
        ids = self.cfg.llm.first_action_id + actions_to_bins(batch["past_actions"])
        mask = repeat(batch["past_mask"], "b t -> b (t a)", a=ACTION_DIM)  # [B, 4 * 13]
        return self.llm.embed(rearrange(ids, "b t a -> b (t a)")), mask

    def encode(self, batch: dict[str, Tensor], action_ids: Tensor | None = None) -> Encoded:
        """Run the LLM over the prefix and, if given, the first A - 1 action ids [B, A - 1]."""
        x, mask = self.embed_prefix(batch)
        tail = max(1, self.cfg.num_queries)
        if action_ids is not None:
            tail += action_ids.shape[1]
            x = torch.cat([x, self.llm.embed(action_ids).to(x.dtype)], dim=1)  # [B, S + A - 1, D]
            mask = F.pad(mask, (0, action_ids.shape[1]), value=True)
        # Positions count real tokens only, so a padded prompt gives the unpadded prompt's result.
        positions = mask.cumsum(-1) - 1
        visible = None  # causal: nothing is padded
        if "prompt_mask" in batch or self.cfg.history == "actions":
            causal = mask.new_ones(x.shape[1], x.shape[1]).tril()
            visible = rearrange(causal & mask[:, None, :], "b t s -> b 1 t s")
        hidden, cache = self.llm(x, rope(positions, self.cfg.llm), visible, tail=tail)
        return Encoded(hidden, cache, mask)


class AuxVLA(nn.Module):
    """The VLM, the decoders of its latents and, in stage 3, the flow head; `meta` as in VLM."""

    def __init__(self, cfg: ModelConfig, flow_head: bool = False, meta: bool = False):
        super().__init__()
        self.cfg, self.compiled = cfg, False
        self.vlm = VLM(cfg, meta)
        self.decoders = nn.ModuleDict({name: DECODERS[name][0](cfg) for name in cfg.decoders})
        self.flow_head = FlowHead(cfg) if flow_head else None
        if not meta:
            init_weights(self.vlm.llm, cfg.llm.init_std)
        if self.flow_head:
            init_weights(self.flow_head, cfg.llm.init_std)

    # --- Training ---

    def train_stage(self, stage: int) -> list[nn.Parameter]:
        """Freeze the parts that the stage does not train; return the trained parameters.

        Call it before DDP wraps the model: DDP registers the parameters that require a gradient.
        """
        for name, part in self.named_children():
            trained = stage in TRAINED_IN[name]
            part.requires_grad_(trained)
            part.train(trained)  # eval mode also freezes BatchNorm's statistics
        if self.cfg.freeze_vision:
            self.vlm.vision.requires_grad_(False)
        return [parameter for part in self.trained_parts() for parameter in part]

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """The trained parameters of VLM, decoders and flow head, each a list; no empty lists."""
        every = (part.parameters() for part in self.children())
        # Empty parameters, such as SigLIP's prefix, get no gradient.
        parts = ([p for p in part if p.requires_grad and p.numel()] for part in every)
        return [part for part in parts if part]

    def prepare_blocks(self, recompute: bool = False, compile: bool = False) -> None:
        """Recompute or compile the blocks of encoders, LLM and flow head, in place."""
        for block in self.modules():
            if compile and isinstance(block, (VisionBlock, LLMLayer)):
                block.forward = torch.compile(block.forward, dynamic=False)
            if recompute and isinstance(block, (VisionBlock, LLMLayer)):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, batch: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The unweighted losses of a stage, each a scalar under its name in config.LOSSES."""
        counts = batch.get("counts") or label_counts(batch)
        if stage == 3:
            with torch.no_grad():
                prefix = self.vlm.encode(batch)
            per_action = self.flow_head.loss(
                batch["actions"], batch["noise"], batch["t"], prefix.cache, prefix.mask
            )  # [B, H]
            return {"flow": masked_mean(per_action, batch["action_mask"], counts["flow"])}

        ids, hidden = self.encode_actions(batch)
        # At the 13 labels only: at all positions the logits of 64 frames would take 42 GB.
        logits = rearrange(self.vlm.llm.logits(hidden[:, -ACTION_DIM:]), "b a v -> b v a").float()
        nll = F.cross_entropy(logits, ids, reduction="none")  # [B, A]
        per_frame = reduce(nll, "b a -> b", "mean")
        losses = {"action": masked_mean(per_frame, batch["action_mask"][:, 0], counts["action"])}
        for name, output in self.decode_latents(aux_input(hidden, stage)).items():
            per_frame = DECODERS[name][1](output, batch[name])  # [B]
            losses[name] = masked_mean(per_frame, batch[f"has_{name}"], counts[name])
        return losses

    def encode_actions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The labels' action ids [B, A] and, with teacher forcing, hidden [B, N + A - 1, D].

        The last A states predict the ids: the last latent predicts the first one.
        """
        bins = actions_to_bins(batch["actions"][:, 0])  # [B, A]: one step (GAP-3)
        ids = self.cfg.llm.first_action_id + bins
        return ids, self.vlm.encode(batch, ids[:, :-1]).hidden

    def decode_latents(self, hidden: Tensor) -> dict[str, Tensor]:
        """The decoders' outputs; grasp and seg are logits. The latents are the first N states.

        With `latents="action_states"` there are no queries, so the first N states are those that
        predict the first N action tokens (GAP-2).
        """
        latents = hidden[:, : self.cfg.num_latents].float()  # [B, N, D]
        # In fp32: bf16 would round metres to centimetres and quaternions off the unit sphere.
        with torch.autocast(latents.device.type, enabled=False):
            return {name: decoder(latents) for name, decoder in self.decoders.items()}

    # --- Acting ---

    @torch.no_grad()
    def act(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, draft: Tensor | None = None,
        predict: bool = True, run: Callable = operator.call,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Normalised actions [B, H, 13] in [-1, 1] and, if `predict`, the decoders' predictions.

        With `noise` [B, H, 13] the flow head denoises a chunk of H actions. Without noise the LLM
        decodes one step greedily, faster if `draft` [B, 13] (normalised) is close to that step.
        `run` calls each part; policy.Graphs replays a CUDA graph instead.
        """
        if noise is None or (predict and self.cfg.latents == "action_states"):
            if draft is None:
                draft = batch["images"].new_zeros(len(batch["images"]), ACTION_DIM)
            prefix, bins = self.decode_actions(batch, draft, run)
        else:
            prefix, bins = run(self.vlm.encode, batch), None
        predictions = run(self.predict, {"hidden": prefix.hidden}) if predict else {}
        if noise is not None:
            return run(self.denoise, {"noise": noise}, prefix), predictions
        return rearrange(bins_to_actions(bins), "b a -> b 1 a"), predictions

    def decode_actions(
        self, batch: dict[str, Tensor], draft: Tensor, run: Callable = operator.call
    ) -> tuple[Encoded, Tensor]:
        """Greedy decoding of the 13 action tokens, all at once, by fixed-point iteration.

        A pass reads the tokens that the pass before predicted, the first pass `draft` [B, A]. Each
        pass fixes at least one more token, so 13 suffice; a pass that changes nothing is the last.
        Returns the hidden states, with cache and mask [B, S] of the prefix only, and the bins
        [B, A].
        """
        state = run(self.read_draft, batch | {"draft": draft})
        while (settled := int(state.settled)) < NUM_READ:  # the host waits for a GPU once a pass
            # CUDA graphs and compiled blocks have fixed shapes; others skip the settled tokens.
            run(self.read_tokens, {}, state, 0 if state.bins.is_cuda or self.compiled else settled)
        return state.prefix, state.bins

    def read_draft(self, batch: dict[str, Tensor]) -> Decoding:
        """The first pass: over the prefix and the first 12 tokens of `draft` [B, A]."""
        llm, first = self.vlm.llm, self.cfg.llm.first_action_id
        guess = actions_to_bins(batch["draft"])[:, :NUM_READ]  # [B, A - 1]
        out = self.vlm.encode(batch, first + guess)
        mask, length = out.mask, out.mask.shape[1] - NUM_READ  # [B, S + A - 1], S
        bins = llm.logits(out.hidden[:, -ACTION_DIM:], first, BINS).argmax(-1)  # [B, A]
        heads = llm.cfg.heads if bins.is_cuda else llm.cfg.kv_heads
        cache = [repeat_heads(layer, heads) for layer in out.cache]
        before = [KeyValues(k[:, :, :length], v[:, :, :length]) for k, v in cache]
        visible = mask[:, None, None] & mask.new_ones(NUM_READ, mask.shape[1]).tril(length)
        return Decoding(
            prefix=Encoded(out.hidden, before, mask[:, :length]),
            bins=bins,
            settled=count_equal(guess, bins[:, :NUM_READ]),
            cache=cache,
            table=rope(mask.cumsum(-1)[:, length:] - 1, self.cfg.llm),
            visible=torch.where(visible, 0.0, -torch.inf).to(out.hidden.dtype),
        )

    def read_tokens(self, inputs: dict, state: Decoding, begin: int) -> None:
        """A pass over tokens begin..11 writes their states and the next bins. `inputs` is empty."""
        llm, first, now = self.vlm.llm, self.cfg.llm.first_action_id, slice(begin, NUM_READ)
        guess = state.bins[:, now].clone()  # [B, T]
        table = tuple(each[:, :, now] for each in state.table)
        visible = state.visible[:, :, now]  # [B, 1, T, S + A - 1]
        hidden, _ = llm(llm.embed(first + guess), table, visible, state.cache)  # [B, T, D]
        state.prefix.hidden[:, begin - NUM_READ :] = hidden
        state.bins[:, begin + 1 :] = llm.logits(hidden, first, BINS).argmax(-1)
        state.settled.copy_(begin + count_equal(guess, state.bins[:, now]))

    def denoise(self, batch: dict[str, Tensor], prefix: Encoded) -> Tensor:
        """The flow head's chunk [B, H, 13] from `noise`, in [-1, 1]."""
        return self.flow_head.sample(prefix.cache, prefix.mask, batch["noise"]).clamp(-1, 1)

    @torch.no_grad()
    def teacher_forced(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [B, A, 256] of each token given the true earlier ones; decoders' predictions."""
        _, hidden = self.encode_actions(batch)
        logits = self.vlm.llm.logits(hidden[:, -ACTION_DIM:], self.cfg.llm.first_action_id, BINS)
        return logits, self.predict({"hidden": hidden})

    def predict(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The decoders' outputs for `hidden` [B, N or more, D], grasp and seg as probabilities."""
        return {
            name: output.sigmoid() if name in ("grasp", "seg") else output
            for name, output in self.decode_latents(inputs["hidden"]).items()
        }


def print_parameters(preset: Literal[tuple(PRESETS)] = "paper") -> None:
    """Print the number of parameters of each part, counted on the meta device."""
    with torch.device("meta"):
        model = AuxVLA(model_config(preset), flow_head=True)
    counts = Counter()
    for name, parameter in model.named_parameters():
        part = re.match(r"vlm\.vision\.\w+|vlm\.\w+|decoders\.\w+|\w+", name)[0]
        counts[part.removeprefix("vlm.")] += parameter.numel()
    for part, count in (counts | {"all": counts.total()}).items():
        print(f"{part:18} {count:>15,}")


if __name__ == "__main__":
    from storage.terminal import cli, user_errors

    with user_errors():
        cli(print_parameters)
