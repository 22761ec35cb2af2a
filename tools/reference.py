"""The benchmark's reference: AuxVLA made of transformers' modules, used as they come.

    port, ours = build_pair(cfg)  # the same weights in both

The port has our decoders and losses. It also computes what our model leaves out: the last block of
each encoder, and the logits of every position over the whole vocabulary.
"""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from config import ACTION_DIM, BINS, ModelConfig
from decoders import DECODERS, label_counts, masked_mean
from model import AuxVLA, actions_to_bins, bins_to_actions
from storage.pretrained import HUB, load_pretrained

# --- The public models ---


def save_originals(originals: dict[str, nn.Module], folder: Path) -> None:
    """Save each model below `folder` under its hub name, as --pretrained reads them."""
    for part, model in originals.items():
        model.save_pretrained(folder / Path(HUB[part]).name)


def build_originals(cfg: ModelConfig, dino_image_size: int) -> dict[str, nn.Module]:
    """The public models dino, siglip (with its text model) and llm, with random weights.

    Biases and scales get noise, too: all zeros or ones would hide a wrong map of names.
    """
    dino, siglip, llm = cfg.dino, cfg.siglip, cfg.llm
    common = dict(hidden_act="gelu", patch_size=cfg.patch_size, layer_norm_eps=1e-6)
    llm_config = AutoConfig.for_model(
        "qwen2" if llm.tied else "llama", tie_word_embeddings=llm.tied, vocab_size=llm.vocab,
        hidden_size=llm.width, num_hidden_layers=llm.depth, num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads, intermediate_size=llm.mlp, rms_norm_eps=llm.norm_eps,
        initializer_range=llm.init_std,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    originals = {
        "dino": transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            hidden_size=dino.width, num_hidden_layers=dino.depth, num_attention_heads=dino.heads,
            mlp_ratio=dino.mlp // dino.width, num_register_tokens=dino.registers,
            image_size=dino_image_size, **common,
        )),
        "siglip": transformers.SiglipModel(transformers.SiglipConfig(
            vision_config=dict(
                hidden_size=siglip.width, num_hidden_layers=siglip.depth,
                num_attention_heads=siglip.heads, intermediate_size=siglip.mlp,
                image_size=cfg.image_size, **common,
            ),
            text_config=dict(hidden_size=siglip.width, num_hidden_layers=1, vocab_size=9),
        )),
        "llm": AutoModelForCausalLM.from_config(llm_config),
    }  # fmt: skip
    with torch.no_grad():
        for model in originals.values():
            for parameter in model.eval().parameters():
                shake = 0.1 if parameter.ndim == 1 else 0.02
                parameter.add_(torch.randn_like(parameter), alpha=shake)
    return originals


# --- AuxVLA made of the public models ---


def build_pair(cfg: ModelConfig) -> tuple["Port", AuxVLA]:
    """The port with random weights, and our model filled from the port's saved files."""
    originals = build_originals(cfg, cfg.image_size)
    ours = AuxVLA(cfg, meta=True)
    with TemporaryDirectory() as folder:
        save_originals(originals, Path(folder))
        load_pretrained(ours.vlm, folder)
    return Port(ours, originals), ours


class Port(nn.Module):
    flow_head = None

    def __init__(self, ours: AuxVLA, originals: dict[str, nn.Module] | None = None):
        super().__init__()
        originals = originals or build_originals(ours.cfg, ours.cfg.image_size)
        self.cfg, self.llm = ours.cfg, originals["llm"]
        self.towers = nn.ModuleList([originals["dino"], originals["siglip"].vision_model])
        self.projector, self.decoders = deepcopy(ours.vlm.projector), deepcopy(ours.decoders)
        self.latent_queries = deepcopy(ours.vlm.latent_queries)

    def features(self, images: Tensor) -> Tensor:  # [B, V, 3, H, W] -> [B, V*P, C]
        """Patches of the second-to-last block."""
        flat = rearrange(images, "b v c h w -> (b v) c h w")
        out = []
        for encoder, cfg in zip(self.towers, (self.cfg.dino, self.cfg.siglip)):
            mean, std = (flat.new_tensor(x)[:, None, None] for x in (cfg.mean, cfg.std))
            states = encoder(pixel_values=(flat - mean) / std, output_hidden_states=True)
            out.append(states.hidden_states[-2][:, cfg.prefix_tokens :])
        return rearrange(torch.cat(out, dim=-1), "(b v) p c -> b (v p) c", b=len(images))

    def prefix(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, D] and mask [B, S], in our order."""
        embed, prompt = self.llm.get_input_embeddings(), batch["prompt_ids"]
        visual = self.projector(self.features(batch["images"]))
        queries = repeat(self.latent_queries, "n d -> b n d", b=len(prompt))
        x = torch.cat([embed(prompt[:, :1]), visual, embed(prompt[:, 1:]), queries], dim=1)
        mask = batch.get("prompt_mask", torch.ones_like(prompt, dtype=torch.bool))
        ones = [mask.new_ones(part.shape[:2]) for part in (visual, queries)]
        return x, torch.cat([mask[:, :1], ones[0], mask[:, 1:], ones[1]], dim=1).long()

    def forward(self, batch: dict[str, Tensor], stage: int = 2) -> dict[str, Tensor]:
        """The losses of stage 2, named as ours."""
        bins = actions_to_bins(batch["actions"][:, 0])
        ids = self.cfg.llm.first_action_id + bins
        x, mask = self.prefix(batch)
        x = torch.cat([x, self.llm.get_input_embeddings()(ids)], dim=1)
        mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
        labels = torch.full(x.shape[:2], -100, device=x.device)
        labels[:, -ACTION_DIM:] = ids
        out = self.llm(
            inputs_embeds=x, attention_mask=mask, labels=labels, output_hidden_states=True,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `generate` counts them
        )  # fmt: skip
        losses = {"action": out.loss}
        latents = out.hidden_states[-1][:, -ACTION_DIM - self.cfg.num_latents : -ACTION_DIM]
        counts = label_counts(batch)
        for name, decoder in self.decoders.items():
            per_frame = DECODERS[name][1](decoder(latents.float()), batch[name])
            losses[name] = masked_mean(per_frame, batch[f"has_{name}"], counts[name])
        return losses

    @torch.no_grad()
    def act(self, batch: dict[str, Tensor], *_, predict: bool = False) -> tuple[Tensor, dict]:
        """As AuxVLA.act: normalised actions [B, 1, 13], by `generate` over the action ids."""
        first = self.cfg.llm.first_action_id

        def only_actions(_, scores: Tensor) -> Tensor:  # [B, vocabulary]
            kept = torch.full_like(scores, -torch.inf)
            kept[:, first : first + BINS] = scores[:, first : first + BINS]
            return kept

        x, mask = self.prefix(batch)
        ids = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=ACTION_DIM,
            logits_processor=[only_actions],
        )  # fmt: skip
        actions = bins_to_actions(ids[:, -ACTION_DIM:] - first)
        return rearrange(actions, "b a -> b 1 a"), {}
