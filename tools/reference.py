"""The reference of the benchmark: AuxVLA of transformers' modules, used as they come.

`tools/bench.py` measures our model against this port. Both have the same decoders and losses. The
port also computes what ours leaves out: the last block of each vision tower, and the logits of
every position over the whole vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import Projector
from config import ACTION_DIM, ModelConfig
from data import ActionStats, cameras
from decoders import DECODERS
from model import AuxVLA, actions_to_bins, bins_to_actions, label_counts, masked_mean
from policy import Policy
from storage.pretrained import HUB, load_pretrained
from storage.tokenizer import build_tokenizer

# --- The public models ---


@dataclass
class Originals:
    """The public models that a VLM is made of."""

    dino: nn.Module
    siglip: nn.Module  # with the text tower that the hub's file has too
    llm: nn.Module

    def save(self, folder: Path) -> None:
        """Each model in a folder of its own, with the hub's names, as --pretrained reads them."""
        for part, model in vars(self).items():
            model.save_pretrained(folder / Path(HUB[part]).name)


def build_originals(cfg: ModelConfig, dino_image_size: int) -> Originals:
    """The public models with random weights.

    Every bias and scale gets noise: at zero and one, a wrong map of names could pass unseen.
    """
    dino, siglip = cfg.dino, cfg.siglip
    common = dict(hidden_act="gelu", patch_size=cfg.patch_size, layer_norm_eps=1e-6)
    originals = Originals(
        transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            hidden_size=dino.width, num_hidden_layers=dino.depth, num_attention_heads=dino.heads,
            mlp_ratio=dino.mlp // dino.width, num_register_tokens=dino.registers,
            image_size=dino_image_size, **common,
        )),
        transformers.SiglipModel(transformers.SiglipConfig(
            vision_config=dict(
                hidden_size=siglip.width, num_hidden_layers=siglip.depth,
                num_attention_heads=siglip.heads, intermediate_size=siglip.mlp,
                image_size=cfg.image_size, **common,
            ),
            text_config=dict(hidden_size=siglip.width, num_hidden_layers=1, vocab_size=9),
        )),
        causal_lm(cfg),
    )  # fmt: skip
    with torch.no_grad():
        for model in vars(originals).values():
            for parameter in model.eval().parameters():
                shake = 0.1 if parameter.ndim == 1 else 0.02
                parameter.add_(torch.randn_like(parameter), alpha=shake)
    return originals


def causal_lm(cfg: ModelConfig) -> nn.Module:
    """Qwen2, or Llama where the head is not tied."""
    llm, family = cfg.llm, "Qwen2" if cfg.llm.tied else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=llm.vocab, hidden_size=llm.width, num_hidden_layers=llm.depth,
        num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads,
        intermediate_size=llm.mlp, rms_norm_eps=llm.norm_eps, initializer_range=llm.init_std,
        tie_word_embeddings=llm.tied,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


# --- AuxVLA made of them ---


class Port(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        originals = build_originals(cfg, cfg.image_size)
        self.dino, self.siglip, self.llm = originals.dino, originals.siglip, originals.llm
        self.projector = Projector(cfg)
        self.latent_queries = nn.Parameter(torch.randn(cfg.num_queries, cfg.llm.width) * 0.02)
        self.decoders = nn.ModuleDict({name: DECODERS[name][0](cfg) for name in cfg.decoders})

    def load_into(self, ours: AuxVLA) -> None:
        """Give `ours` the port's weights, through the files that pretrained.py reads."""
        with TemporaryDirectory() as folder:
            Originals(self.dino, self.siglip, self.llm).save(Path(folder))
            load_pretrained(ours.vlm, folder)
        ours.vlm.projector.load_state_dict(self.projector.state_dict())
        ours.decoders.load_state_dict(self.decoders.state_dict())
        with torch.no_grad():
            ours.vlm.latent_queries.copy_(self.latent_queries)

    def as_policy(self, device: torch.device) -> Policy:
        """Our model with the port's weights, of actions that are normalised already."""
        ours = AuxVLA(self.cfg)
        self.load_into(ours)
        stats = ActionStats((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
        words = replace(self.cfg.llm, tokenizer="words", first_action_id=256)  # needs no file
        return Policy(ours.to(device).eval(), stats, build_tokenizer(words), {}, device)

    def features(self, images: Tensor) -> Tensor:  # [B, V, 3, H, W] -> [B, V*P, C]
        """Patches of the second-to-last block, as Prismatic takes them."""
        flat = rearrange(images, "b v c h w -> (b v) c h w")
        out = []
        towers = (self.dino, self.cfg.dino), (self.siglip.vision_model, self.cfg.siglip)
        for tower, part in towers:
            mean, std = (flat.new_tensor(x)[:, None, None] for x in (part.mean, part.std))
            states = tower(pixel_values=(flat - mean) / std, output_hidden_states=True)
            out.append(states.hidden_states[-2][:, part.prefix_tokens :])
        return rearrange(torch.cat(out, dim=-1), "(b v) p c -> b (v p) c", b=len(images))

    def prefix(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, D] and mask [B, S], in the order of ours."""
        embed, prompt = self.llm.get_input_embeddings(), batch["prompt_ids"]
        visual = self.projector(self.features(batch["images"]))
        queries = repeat(self.latent_queries, "n d -> b n d", b=len(prompt))
        x = torch.cat([embed(prompt[:, :1]), visual, embed(prompt[:, 1:]), queries], dim=1)
        mask = batch["prompt_mask"]
        ones = [mask.new_ones(part.shape[:2]) for part in (visual, queries)]
        return x, torch.cat([mask[:, :1], ones[0], mask[:, 1:], ones[1]], dim=1).long()

    def forward(self, batch: dict[str, Tensor], stage: int = 2) -> dict[str, Tensor]:
        """The losses of stage 2, named as ours."""
        bins = actions_to_bins(batch["actions"][:, 0], self.cfg.bins)
        ids = self.cfg.llm.first_action_id + bins
        x, mask = self.prefix(batch)
        x = torch.cat([x, self.llm.get_input_embeddings()(ids)], dim=1)
        mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
        labels = torch.full(x.shape[:2], -100, device=x.device)
        labels[:, -ACTION_DIM:] = ids
        out = self.llm(
            inputs_embeds=x, attention_mask=mask, output_hidden_states=True,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `generate` counts them
        )  # fmt: skip
        logits = rearrange(out.logits[:, :-1].float(), "b s v -> b v s")
        losses = {"action": F.cross_entropy(logits, labels[:, 1:])}
        last = x.shape[1] - ACTION_DIM
        latents = out.hidden_states[-1][:, last - self.cfg.num_latents : last]
        counts = label_counts(batch)
        for name, decoder in self.decoders.items():
            per_frame = DECODERS[name][1](decoder(latents.float()), batch[name])
            losses[name] = masked_mean(per_frame, batch[f"has_{name}"], counts[name])
        return losses

    @torch.no_grad()
    def act(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised actions [B, 13] by transformers' own `generate`, of the action ids alone."""
        first, bins = self.cfg.llm.first_action_id, self.cfg.bins

        def only_actions(_, scores: Tensor) -> Tensor:  # [B, vocabulary]
            kept = torch.full_like(scores, -torch.inf)
            kept[:, first : first + bins] = scores[:, first : first + bins]
            return kept

        x, mask = self.prefix(batch)
        ids = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=ACTION_DIM,
            min_new_tokens=ACTION_DIM, logits_processor=[only_actions],
        )  # fmt: skip
        return bins_to_actions(ids[:, -ACTION_DIM:] - first, bins)

    def query(self, policy: Policy, obs: dict, instruction: str) -> np.ndarray:
        """The port's actions [B, 13] for what `policy` would see, in its robot units."""
        now = tuple(picture.to(policy.device) for picture in cameras(obs))
        kind = policy.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            actions = self.act(policy.batch(now, instruction))
        return policy.stats.denormalize(actions).clamp(-1, 1).cpu().numpy()
