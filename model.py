"""AuxVLA (paper Sec. 4, 5): images, instruction -> 8 latents -> action tokens, predictions, flow.

    losses = model(batch, stage)             # {"action": ..., "pos": ..., ...} or {"flow": ...};
                                             # through DDP in training
    actions, predictions = model.act(batch)  # normalised actions [B, H, 13] and what the decoders
                                             # read in the latents

The batch is a plain dict of tensors; data.py documents it and this file knows nothing else of data.

Axes: B batch, V views (rgb then depth of each camera, history first), P patches per view, K tokens
of past actions (0 without that history), L prompt tokens, N = 8 latents, D = 896 LLM width,
S = L + V*P + K + N prefix length, A = 13 action dimensions, H actions in a chunk.
"""

from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbone import LLM, FusedVision, KeyValues, Projector, Slots
from config import ACTION_DIM, ModelConfig
from decoders import DECODERS
from flow_head import FlowHead

# The stages (Sec. 5.2, 5.3, Fig. 3): which parts a stage trains. The rest is frozen: no gradient,
# eval mode.
TRAINED_IN = {"vlm": (1, 2), "decoders": (1, 2), "flow_head": (3,)}


def aux_input(latents: Tensor, stage: int) -> Tensor:
    """Stage 1: decoders on detached latents; stage 2: their gradients reach the VLM (Sec. 5.2)."""
    return latents.detach() if stage == 1 else latents


# --- Action tokens ---

# GAP-3 (Sec. 4.1): "discrete action tokens", of unsaid number and code. One step is 13 tokens, one
# per dimension, each one of 256 uniform bins on [-1, 1], on Prismatic's 256 <|extra_i|> ids, in
# rising order; ids are emitted, never strings.


def actions_to_bins(actions: Tensor, bins: int) -> Tensor:
    """Normalised actions in [-1, 1] -> bin indices in 0..bins-1; values outside are clipped."""
    return ((actions.clamp(-1, 1) + 1) / 2 * bins).long().clamp(max=bins - 1)


def bins_to_actions(index: Tensor, bins: int) -> Tensor:
    """Bin indices -> the centres of the bins; a round trip errs by at most 1 / bins."""
    return (index.float() + 0.5) / bins * 2 - 1


def agreed(guess: Tensor, chosen: Tensor) -> int:
    """How many leading tokens of [B, T] are guessed right in every frame."""
    return int((guess == chosen).all(0).long().cumprod(0).sum())


# --- Means over labelled frames ---


def label_counts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """How many values each loss averages over: frames with the label; valid actions for flow.

    Under several ranks or micro-batches train.py replaces these by the mean over ranks of the whole
    batch's counts, so that the sum of all gradients is that of one mean over every labelled frame,
    on any number of GPUs.
    """
    counts = {
        key.removeprefix("has_"): has.sum() for key, has in batch.items() if key.startswith("has_")
    }
    return counts | {"action": batch["action_mask"][:, 0].sum(), "flow": batch["action_mask"].sum()}


def masked_mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Mean over labelled values; 0, with a live graph, when there are none.

    No rank may skip a decoder under DDP.
    """
    return torch.where(mask.bool(), values.float(), 0.0).sum() / count.clamp(min=1e-6)


# --- The model ---


@dataclass
class Prefix:
    """What the LLM has read before it acts."""

    hidden: Tensor  # [B, N or 1, D], normed, of the tokens at the end: nothing else is read
    cache: list[KeyValues]  # per layer
    mask: Tensor  # [B, S], False at padding


class VLM(nn.Module):
    """DINOv2 + SigLIP, projector, Qwen2.5, and the eight latent queries (Sec. 4.1)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.vision = FusedVision(cfg)
        self.projector = Projector(cfg)
        self.llm = LLM(cfg.llm)
        # GAP-2 (Table 5): the decoders read latents [B, 8, 896] that are defined nowhere. Here:
        # eight learned queries behind the prompt and before the action tokens. They see no
        # ground-truth action, exist for any action code, cost no decoding, and the action tokens
        # attend to them, so that auxiliary gradients reach the action path. The other reading, the
        # states that predict the first eight action tokens, is `latents="action_states"`: it shows
        # the decoders the true earlier action dimensions in training.
        self.latent_queries = nn.Parameter(torch.randn(cfg.num_queries, cfg.llm.width) * 0.02)

    def embed_prefix(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """First prompt token, images, past actions, other prompt tokens (Prismatic), queries.

        Returns [B, S, D] and its mask [B, S].
        """
        images = batch["images"]  # [B, V, 3, H, W]
        views = images.shape[1]
        patches = self.vision(rearrange(images, "b v c h w -> (b v) c h w"))  # [B*V, P, C]
        visual = rearrange(
            self.projector(patches), "(b v) p d -> b (v p) d", v=views
        )  # [B, V*P, D]
        text = self.llm.embed(batch["prompt_ids"])  # [B, L, D]
        queries = repeat(
            self.latent_queries,
            "n d -> b n d",
            b=len(images),
        ).to(text.dtype)  # [B, N, D]
        past, past_mask = self.embed_past(batch)
        x = torch.cat(
            [text[:, :1], visual.to(text.dtype), past, text[:, 1:], queries], dim=1
        )  # [B, S, D]
        prompt = batch["prompt_mask"]  # [B, L]
        mask = torch.cat(
            [
                prompt[:, :1],
                prompt.new_ones(visual.shape[:2]),
                past_mask,
                prompt[:, 1:],
                prompt.new_ones(queries.shape[:2]),
            ],
            dim=1,
        )
        return x, mask.bool()

    def embed_past(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The last four actions as action tokens [B, K, D], masked before the episode's start."""
        prompt = batch["prompt_ids"]
        if self.cfg.history != "actions":
            ids, mask = prompt[:, :0], batch["prompt_mask"][:, :0]
            return self.llm.embed(ids), mask
        ids = self.cfg.llm.first_action_id + actions_to_bins(batch["past_actions"], self.cfg.bins)
        mask = repeat(batch["past_mask"], "b t -> b (t a)", a=ACTION_DIM)  # [B, 4 * 13]
        return self.llm.embed(rearrange(ids, "b t a -> b (t a)")), mask.bool()

    def encode(self, batch: dict[str, Tensor], action_ids: Tensor | None = None) -> Prefix:
        """Run the LLM over the prefix and, in training, over the action ids [B, A-1] behind it."""
        x, mask = self.embed_prefix(batch)
        tail = max(1, self.cfg.num_queries)
        if action_ids is not None:
            tail += action_ids.shape[1]
            x = torch.cat([x, self.llm.embed(action_ids).to(x.dtype)], dim=1)  # [B, S + A - 1, D]
            mask = torch.cat([mask, mask.new_ones(action_ids.shape)], dim=1)
        # Padding is skipped by position and mask, so a padded prompt gives what the unpadded one
        # gives.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        visible = rearrange(causal & mask[:, None, :], "b t s -> b 1 t s")
        hidden, cache = self.llm(x, self.llm.rope(positions), visible, tail=tail)
        return Prefix(hidden, cache, mask)


class AuxVLA(nn.Module):
    def __init__(self, cfg: ModelConfig, flow_head: bool = False):
        super().__init__()
        self.cfg = cfg
        self.vlm = VLM(cfg)
        self.decoders = nn.ModuleDict({name: DECODERS[name][0](cfg) for name in cfg.decoders})
        self.flow_head = FlowHead(cfg) if flow_head else None
        init_llm(self.vlm.llm, cfg.llm.init_std)
        if self.flow_head:
            init_llm(self.flow_head, cfg.llm.init_std)

    def train_stage(self, stage: int) -> list[nn.Parameter]:
        """Freeze what the stage does not train (before DDP wraps the model), return the rest."""
        for name, part in self.named_children():
            trained = stage in TRAINED_IN[name]
            part.requires_grad_(trained)
            part.train(trained)  # frozen BatchNorm must not move either
        if self.cfg.freeze_vision:
            self.vlm.vision.requires_grad_(False)
        return self.trained()

    def trained(self) -> list[nn.Parameter]:
        """What train_stage left to train."""
        return [parameter for part in self.trained_parts() for parameter in part]

    def trained_parts(self) -> list[list[nn.Parameter]]:
        """The same by part: VLM, decoders, flow head. SigLIP's prefix is empty and left out."""
        every = (part.parameters() for part in self.children())
        parts = ([p for p in part if p.requires_grad and p.numel()] for part in every)
        return [part for part in parts if part]

    def prepare_blocks(self, recompute: bool = False, compile: bool = False) -> None:
        """Recompute or compile the VLM's blocks, nearly all of its work, in place."""
        vision, llm = self.vlm.vision, self.vlm.llm
        for block in (*vision.dino.blocks, *vision.siglip.blocks, *llm.layers):
            if recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if compile:
                block.compile()

    def forward(self, batch: dict[str, Tensor], stage: int) -> dict[str, Tensor]:
        """The unweighted losses of a stage, each a scalar under its name in Eq. 4."""
        counts = batch.get("counts") or label_counts(batch)
        if stage == 3:
            with torch.no_grad():
                prefix = self.vlm.encode(batch)
            per_action = self.flow_head.loss(
                batch["actions"], batch["noise"], batch["t"], prefix.cache, prefix.mask
            )
            return {"flow": masked_mean(per_action, batch["action_mask"], counts["flow"])}

        bins = actions_to_bins(batch["actions"][:, 0], self.cfg.bins)  # [B, A]: one step (GAP-3)
        ids = self.cfg.llm.first_action_id + bins
        hidden = self.vlm.encode(batch, ids[:, :-1]).hidden  # [B, N + A - 1, D]
        # The last latent predicts the first action token. The head runs on these 13 positions only:
        # at all of them, and batch 64, the logits alone would take 42 GB.
        logits = self.vlm.llm.logits(hidden[:, -ACTION_DIM:])  # [B, A, vocabulary]
        nll = F.cross_entropy(
            rearrange(logits, "b a v -> b v a").float(), ids, reduction="none"
        )  # [B, A]
        per_frame = reduce(nll, "b a -> b", "mean")
        losses = {"action": masked_mean(per_frame, batch["action_mask"][:, 0], counts["action"])}

        latents = self.latents(hidden[:, : 1 - ACTION_DIM], hidden[:, 1 - ACTION_DIM :])
        latents = aux_input(latents, stage)  # [B, N, D]
        # In fp32: bf16 would round metres to centimetres and quaternions off the unit sphere.
        with torch.autocast(latents.device.type, enabled=False):
            for name, decoder in self.decoders.items():
                per_frame = DECODERS[name][1](decoder(latents.float()), batch[name])  # [B]
                losses[name] = masked_mean(per_frame, batch[f"has_{name}"], counts[name])
        return losses

    def latents(self, prefix_hidden: Tensor, action_hidden: Tensor | None = None) -> Tensor:
        """The latents [B, N, D]: the states of the queries, which end the prefix [B, .., D].

        Or, in the other reading of GAP-2, the first N states that predict an action token: the
        prefix's last and those behind it, action_hidden [B, A - 1, D].
        """
        if self.cfg.latents == "queries":
            return prefix_hidden[:, prefix_hidden.shape[1] - self.cfg.num_latents :]
        states = torch.cat([prefix_hidden[:, -1:], action_hidden], dim=1)  # [B, A, D]
        return states[:, : self.cfg.num_latents]

    # --- Acting ---

    @torch.no_grad()
    def act(
        self, batch: dict[str, Tensor], noise: Tensor | None = None, draft: Tensor | None = None,
        predict: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Normalised actions [B, H, 13] in [-1, 1] and the decoders' predictions for the frame.

        With `noise` [B, H, 13] the flow head denoises a chunk of H actions; without it the LLM
        decodes one step greedily, sooner if `draft` [B, 13], normalised, is nearly that step.
        """
        if noise is None or (predict and self.cfg.latents == "action_states"):
            if draft is None:
                draft = batch["images"].new_zeros(len(batch["images"]), ACTION_DIM)
            prefix, bins, states = self.decode(batch, draft)
        else:
            prefix, bins, states = self.vlm.encode(batch), None, None
        predictions = self.predict(self.latents(prefix.hidden, states)) if predict else {}
        if noise is not None:
            return self.flow_head.sample(prefix.cache, prefix.mask, noise).clamp(-1, 1), predictions
        return rearrange(bins_to_actions(bins, self.cfg.bins), "b a -> b 1 a"), predictions

    def decode(self, batch: dict[str, Tensor], guess: Tensor) -> tuple[Prefix, Tensor, Tensor]:
        """Greedy decoding of 13 action tokens over the 256 action ids, by fixed-point iteration.

        The prefix's own pass reads the guess [B, A] of all tokens too; what the model then chooses
        at each place is the next guess. A token is right when those before it are, so every pass
        finds at least one, as one token a pass would, and mostly several.

        Returns the prefix, bin indices [B, A] and the hidden states behind the prefix [B, A-1, D].
        """
        llm, first, count = self.vlm.llm, self.cfg.llm.first_action_id, self.cfg.bins
        read = ACTION_DIM - 1  # nobody reads the last token
        guess = actions_to_bins(guess, count)[:, :read]  # [B, A - 1]
        whole = self.vlm.encode(batch, first + guess)
        past, states = whole.mask.shape[1] - read, whole.hidden[:, -read:]  # [B, A - 1, D]
        bins = llm.logits(whole.hidden[:, -ACTION_DIM:], first, count).argmax(-1)  # [B, A]
        cos, sin = llm.rope(whole.mask.cumsum(-1)[:, past:] - 1)
        causal = whole.mask.new_ones(read, past + read).tril(past)
        visible = causal & rearrange(whole.mask, "b s -> b 1 1 s")  # [B, 1, A - 1, S + A - 1]

        def read_again(begin: int, end: int) -> None:
            """Read the tokens begin..end - 1 as they are chosen now, and choose those behind."""
            now = slice(begin, end)
            slots = [Slots(*key_values, past + begin) for key_values in whole.cache]
            table, mask = (cos[:, :, now], sin[:, :, now]), visible[:, :, now, : past + end]
            states[:, now], _ = llm(llm.embed(first + bins[:, now]), table, mask, slots)
            bins[:, begin + 1 : end + 1] = llm.logits(states[:, now], first, count).argmax(-1)

        if bins.is_cuda:  # all passes at once: asking whether it is done takes longer than one
            for _ in range(read):
                read_again(0, read)
        else:
            right = agreed(guess, bins[:, :read])
            found = right + 1  # by the last pass; the next one looks twice as far
            while right < read:
                end = min(read, right + 2 * found)
                guess = bins[:, right + 1 : end].clone()
                read_again(right, end)
                found = 1 + agreed(guess, bins[:, right + 1 : end])
                right += found
        cache = [KeyValues(k[:, :, :past], v[:, :, :past]) for k, v in whole.cache]
        return Prefix(whole.hidden[:, :-read], cache, whole.mask[:, :past]), bins, states

    @torch.no_grad()
    def teacher_forced(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the bins [B, A, bins] given the true earlier ones; decoders' predictions."""
        bins = actions_to_bins(batch["actions"][:, 0], self.cfg.bins)
        hidden = self.vlm.encode(batch, self.cfg.llm.first_action_id + bins[:, :-1]).hidden
        logits = self.vlm.llm.logits(
            hidden[:, -ACTION_DIM:], self.cfg.llm.first_action_id, self.cfg.bins
        )
        latents = self.latents(hidden[:, : 1 - ACTION_DIM], hidden[:, 1 - ACTION_DIM :])
        return logits, self.predict(latents)

    def predict(self, latents: Tensor) -> dict[str, Tensor]:
        """What the decoders read in the latents; grasp and seg as probabilities."""
        with torch.autocast(latents.device.type, enabled=False):
            out = {name: decoder(latents.float()) for name, decoder in self.decoders.items()}
        return {
            name: value.sigmoid() if name in ("grasp", "seg") else value
            for name, value in out.items()
        }


def init_llm(part: nn.Module, std: float) -> None:
    """Qwen2's own initialisation, for what no checkpoint fills: normal weights, no bias."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
