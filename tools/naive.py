"""What a user would otherwise write: AuxVLA of transformers' modules, as they come.

`tools/bench.py` measures ours against it. Same sizes, same decoders, same losses; but every block,
final norm and head of the public models is there and runs, and the logits are taken at every
position over the whole vocabulary.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from backbone import Projector
from config import ACTION_DIM, ModelConfig
from decoders import DECODERS
from model import AuxVLA, actions_to_bins, bins_to_actions, label_counts, masked_mean
from weight_names import DINO_HF, LLM_HF, LLM_HF_UNTIED, SIGLIP_HF


def vision_models(cfg: ModelConfig) -> tuple[nn.Module, nn.Module]:
    """DINOv2 with registers, and SigLIP (the hub's file holds its text tower too, which idles)."""
    dino, siglip = cfg.dino, cfg.siglip
    common = dict(
        patch_size=cfg.patch_size, image_size=cfg.image_size, layer_norm_eps=1e-6, hidden_act="gelu"
    )
    return (
        transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            hidden_size=dino.width, num_hidden_layers=dino.depth, num_attention_heads=dino.heads,
            mlp_ratio=dino.mlp // dino.width, num_register_tokens=dino.registers, **common,
        )),
        transformers.SiglipModel(transformers.SiglipConfig(
            vision_config=dict(
                hidden_size=siglip.width, num_hidden_layers=siglip.depth,
                num_attention_heads=siglip.heads, intermediate_size=siglip.mlp, **common,
            ),
            text_config=dict(hidden_size=siglip.width, num_hidden_layers=1, vocab_size=9),
        )),
    )  # fmt: skip


def causal_lm(cfg: ModelConfig) -> nn.Module:
    """Qwen2, or Llama where the head is not tied."""
    llm, family = cfg.llm, "Qwen2" if cfg.llm.tied else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=llm.vocab, hidden_size=llm.width, num_hidden_layers=llm.depth,
        num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads,
        intermediate_size=llm.mlp, rms_norm_eps=llm.norm_eps, tie_word_embeddings=llm.tied,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


class NaivePort(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.dino, self.siglip = vision_models(cfg)
        self.projector = Projector(cfg)
        self.llm = causal_lm(cfg)
        self.latent_queries = nn.Parameter(torch.randn(cfg.num_queries, cfg.llm.width) * 0.02)
        self.decoders = nn.ModuleDict({name: DECODERS[name][0](cfg) for name in cfg.decoders})

    def features(self, images: Tensor) -> Tensor:  # [B, V, 3, H, W] -> [B, V*P, C]
        flat = rearrange(images, "b v c h w -> (b v) c h w")
        out = []
        towers = (self.dino, self.cfg.dino), (self.siglip.vision_model, self.cfg.siglip)
        for tower, part in towers:
            mean, std = (
                torch.tensor(x, device=flat.device)[:, None, None] for x in (part.mean, part.std)
            )
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
        """The losses of stage 2, as ours."""
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
        logits = rearrange(out.logits[:, :-1].float(), "b s v -> b v s")  # at every position
        counts = label_counts(batch)
        losses = {"action": F.cross_entropy(logits, labels[:, 1:])}
        last = x.shape[1] - ACTION_DIM
        latents = out.hidden_states[-1][:, last - self.cfg.num_latents : last]
        for name, decoder in self.decoders.items():
            per_frame = DECODERS[name][1](decoder(latents.float()), batch[name])
            losses[name] = masked_mean(per_frame, batch[f"has_{name}"], counts[name])
        return losses

    @torch.no_grad()
    def act(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised actions [B, 13] by transformers' own generate, over the action ids."""
        x, mask = self.prefix(batch)
        first, bins = self.cfg.llm.first_action_id, self.cfg.bins
        ids = self.llm.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=ACTION_DIM,
            min_new_tokens=ACTION_DIM, logits_processor=[OnlyIds(first, first + bins)],
        )  # fmt: skip
        return bins_to_actions(ids[:, -ACTION_DIM:] - first, bins)


class OnlyIds:
    """A logits processor that leaves the ids first..end - 1."""

    def __init__(self, first: int, end: int):
        self.first, self.end = first, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.first : self.end] = scores[:, self.first : self.end]
        return kept


def adopt(naive: NaivePort, ours: AuxVLA) -> None:
    """Give the port our weights, by the map of pretrained.py read backwards.

    Its last vision blocks and pooling heads, which nothing reads, stay as they are.
    """
    vlm, llm_names = ours.vlm, LLM_HF if ours.cfg.llm.tied else LLM_HF_UNTIED
    naive.dino = filled(naive.dino, vlm.vision.dino, DINO_HF)
    naive.siglip = filled(naive.siglip, vlm.vision.siglip, SIGLIP_HF)
    naive.llm = filled(naive.llm, vlm.llm, llm_names)
    naive.projector.load_state_dict(vlm.projector.state_dict())
    naive.decoders.load_state_dict(ours.decoders.state_dict())
    with torch.no_grad():
        naive.latent_queries.copy_(vlm.latent_queries)


def filled(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> nn.Module:
    """Theirs with our weights, through its file, whose names (unlike the module's) are settled."""
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        tensors = load_file(path)
        fill(tensors, ours.state_dict(), names)
        save_file(tensors, path, {"format": "pt"})
        return type(theirs).from_pretrained(folder)


def fill(theirs: dict[str, Tensor], ours: dict[str, Tensor], names: dict[str, str]) -> None:
    """Copy ours into theirs; names: name there -> name here, with "#i" its i-th part."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in theirs.items():
        to = next(
            (m.expand(to) for name, to in names.items() if (m := re.fullmatch(name, key))), ""
        )
        name, _, index = to.partition("#")
        if name in ours:  # not the last block
            parts.setdefault(name, {})[int(index or 0)] = tensor
    for name, fused in parts.items():
        whole = ours[name].flatten()
        sizes = [min(fused[i].numel(), whole.numel()) for i in sorted(fused)]
        for i, part in zip(sorted(fused), whole.split(sizes)):
            # DINOv2 has one position more, for the cls token; ours is added to the token itself.
            fused[i].zero_().flatten()[-len(part) :].copy_(part)
