"""The stage rule, the sequence and the action tokens, on the real model at tiny size."""

from dataclasses import replace

import pytest
import torch

from backbone import LLM
from config import LABELS, model_config
from decoders import DECODERS
from model import AuxVLA, actions_to_bins, bins_to_actions, init_llm

TINY = model_config("tiny")
CFG = replace(TINY, llm=replace(TINY.llm, kv_heads=2))  # heads share keys, as in Qwen2.5


def make_batch(b=2, seed=0):
    """A batch as data.py documents it."""
    g = torch.Generator().manual_seed(seed)
    length = CFG.llm.prompt_length
    batch = {
        "images": torch.rand(b, CFG.num_views, 3, CFG.image_size, CFG.image_size, generator=g),
        "prompt_ids": torch.randint(2, 60, (b, length), generator=g),
        "prompt_mask": torch.ones(b, length, dtype=torch.bool),
        "actions": torch.rand(b, 8, 13, generator=g) * 2 - 1,
        "action_mask": torch.ones(b, 8),
        "pos": torch.randn(b, 2, generator=g),
        "grasp": torch.randint(0, 2, (b,), generator=g).float(),
        "qpos": torch.randn(b, 12, generator=g),
        "obj": torch.randn(b, 7, generator=g),
        "seg": torch.randint(0, 2, (b, 2, 128, 128), generator=g).float(),
        "noise": torch.randn(b, 8, 13, generator=g),
        "t": torch.rand(b, generator=g),
    }
    return batch | {f"has_{name}": torch.ones(b, dtype=torch.bool) for name in LABELS}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AuxVLA(CFG, flow_head=True)


def gradient_on_vlm(model, loss):
    model.zero_grad()
    loss.backward()
    return sum(p.grad.abs().sum().item() for p in model.vlm.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", LABELS)
def test_stage_1_sends_no_decoder_gradient_into_the_vlm_and_stage_2_does(model, name):
    for stage in (1, 2):
        model.train_stage(stage)
        reached = gradient_on_vlm(model, model(make_batch(), stage)[name])
        assert reached == 0 if stage == 1 else reached > 0
        assert (
            sum(
                p.grad.abs().sum().item()
                for p in model.decoders[name].parameters()
                if p.grad is not None
            )
            > 0
        )


def test_the_action_loss_trains_the_vlm_in_both_stages(model):
    for stage in (1, 2):
        model.train_stage(stage)
        assert gradient_on_vlm(model, model(make_batch(), stage)["action"]) > 0


def test_stage_3_trains_only_the_flow_head_and_leaves_every_other_byte(model):
    params = model.train_stage(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.Adam(params, lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        model(make_batch(seed=step), 3)["flow"].backward()
        optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(key.startswith("flow_head.") for key in changed)
    assert {f"flow_head.{name}" for name, _ in model.flow_head.named_parameters()} == changed


def test_every_trained_parameter_gets_a_gradient_and_what_is_frozen_is_in_eval_mode(model):
    for stage in (1, 2, 3):
        model.eval()  # as validation leaves it
        params = model.train_stage(stage)
        for part in model.children():
            assert {module.training for module in part.modules()} == {
                next(iter(part.parameters())).requires_grad
            }
        model.zero_grad()
        sum(model(make_batch(), stage).values()).backward()
        assert all(p.grad is not None for p in params)


def test_every_loss_is_positive_and_training_on_one_batch_lowers_it():
    torch.manual_seed(0)
    model = AuxVLA(CFG, flow_head=True)
    for stage in (2, 3):
        optimizer = torch.optim.Adam(model.train_stage(stage), lr=1e-3)
        history = []
        for _ in range(12):
            losses = model(make_batch(), stage)
            history.append({name: loss.item() for name, loss in losses.items()})
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        for name, first in history[0].items():
            assert 0 < history[-1][name] < first, name


def test_without_latents_and_decoders_it_is_the_bare_vlm_and_still_acts():
    bare = AuxVLA(replace(CFG, num_latents=0, decoders=()))
    batch = make_batch()
    params = bare.train_stage(1)
    losses = bare(batch, 1)
    losses["action"].backward()
    assert losses.keys() == {"action"} and all(p.grad is not None for p in params)
    prefix = bare.vlm.encode(batch)
    length = CFG.llm.prompt_length + CFG.num_views * CFG.patches
    assert prefix.mask.shape == (2, length) and bare.latents(prefix.hidden).shape[1] == 0
    actions, predictions = bare.act(batch)
    assert actions.shape == (2, 1, 13) and predictions == {}
    with pytest.raises(ValueError, match="num_latents 0"):
        replace(CFG, num_latents=0)


def test_frames_without_a_mask_do_not_change_the_seg_gradient(model):
    model.train_stage(2)
    batch = make_batch()
    batch["has_seg"][1] = False
    gradients = []
    for garbage in (0.0, 1.0):
        batch["seg"][1] = garbage
        model.zero_grad()
        model(batch, 2)["seg"].backward()
        gradients.append(model.vlm.latent_queries.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_batch_without_any_label_still_reaches_every_decoder(model):
    params = model.train_stage(2)
    batch = make_batch() | {f"has_{name}": torch.zeros(2, dtype=torch.bool) for name in LABELS}
    model.zero_grad()
    losses = model(batch, 2)
    sum(losses.values()).backward()
    assert all(losses[name].item() == 0 for name in LABELS) and all(
        p.grad is not None for p in params
    )


def test_black_and_white_images_give_different_action_logits(model):
    model.eval()
    logits = []
    for level in (0.0, 1.0):
        batch = make_batch() | {"images": torch.full_like(make_batch()["images"], level)}
        with torch.no_grad():
            logits.append(model.vlm.llm.logits(model.vlm.encode(batch).hidden[:, -1]))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_every_view_and_the_instruction_reach_the_action(model):
    model.eval()
    hidden = lambda batch: model.vlm.encode(batch).hidden[:, -1].detach()  # noqa: E731
    reference = hidden(make_batch())
    for view in range(CFG.num_views):
        batch = make_batch()
        batch["images"][:, view] = 0.5
        assert (hidden(batch) - reference).abs().max() > 1e-5
    other = make_batch()
    other["prompt_ids"][:, 5] = 7
    assert (hidden(other) - reference).abs().max() > 1e-5


def test_a_padded_prompt_gives_what_the_unpadded_one_gives(model):
    model.double().eval()
    batch = make_batch()
    batch["images"] = batch["images"].double()
    padding = torch.zeros(2, 5, dtype=torch.long)
    padded = dict(batch)
    padded["prompt_ids"] = torch.cat(
        [batch["prompt_ids"][:, :1], padding, batch["prompt_ids"][:, 1:]], dim=1
    )
    mask = batch["prompt_mask"]
    padded["prompt_mask"] = torch.cat([mask[:, :1], padding.bool(), mask[:, 1:]], dim=1)
    plain, wide = (model.latents(model.vlm.encode(b).hidden) for b in (batch, padded))
    model.float()
    torch.testing.assert_close(plain, wide, rtol=0, atol=1e-6)  # RoPE's tables are float32


def test_cached_decoding_equals_one_pass_over_all_tokens(model):
    model.eval()
    batch = make_batch(b=3)
    with torch.no_grad():
        bins, _ = model.decode_bins(model.vlm.encode(batch))
        batch["actions"][:, 0] = bins_to_actions(bins, CFG.bins)
        again, _ = model.teacher_forced(batch)
    assert torch.equal(bins, again)


def test_frames_act_alike_alone_and_in_a_batch(model):
    model.eval()
    batch = make_batch(b=3)
    together, _ = model.act(batch)
    for i in range(3):
        alone, _ = model.act({k: v[i : i + 1] for k, v in batch.items()})
        assert torch.equal(alone[0], together[i])


def test_the_decoders_see_no_ground_truth_action(model):
    model.eval()
    one, other = make_batch(), make_batch() | {"actions": -make_batch()["actions"]}
    for a, b in zip(model.teacher_forced(one)[1].values(), model.teacher_forced(other)[1].values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_action_bins_round_trip_within_half_a_bin():
    actions = torch.linspace(-1, 1, 1001)
    back = bins_to_actions(actions_to_bins(actions, 256), 256)
    assert (back - actions).abs().max() <= 1 / 256 + 1e-6
    assert actions_to_bins(torch.tensor([-5.0, 5.0]), 256).tolist() == [0, 255]
    assert (actions_to_bins(actions, 256).diff() >= 0).all()


def test_the_paper_preset_has_the_parameters_that_the_paper_and_its_parts_state():
    with torch.device("meta"):
        paper = AuxVLA(model_config("paper"), flow_head=True)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    queries = paper.vlm.latent_queries.numel()
    # Prismatic's 1,252,496,448 (the paper's 1.3B) less the 43,080,480 of last blocks, final norms
    # and pooling head.
    assert count(paper.vlm) - queries == 1_252_496_448 - 43_080_480
    assert count(paper.flow_head) == 101_517_325
    assert set(paper.decoders) == set(DECODERS)


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_the_llm_equals_transformers(family):
    """Qwen2.5: tied head, biases, grouped heads; Llama 2 (OpenVLA): neither of them."""
    import transformers

    cfg = CFG.llm if family == "Qwen2" else replace(TINY.llm, tied=False, qkv_bias=False)
    torch.manual_seed(0)
    llm = LLM(cfg).eval()
    init_llm(llm, 0.02)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=cfg.vocab, hidden_size=cfg.width, num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.mlp, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tied,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
    )  # fmt: skip
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    names |= {
        f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}"
        for i in range(cfg.depth)
        for ours, theirs in {
            "input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
            "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
            "down": "mlp.down_proj",
        }.items()
    }  # fmt: skip
    weights = {
        f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v
        for k, v in llm.state_dict().items()
    }
    reference.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights)
    ids = torch.randint(0, cfg.vocab, (2, 17))
    causal = torch.ones(2, 17, 17, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden, _ = llm(llm.embed(ids), torch.arange(17).expand(2, 17), causal)
        torch.testing.assert_close(llm.logits(hidden), reference(ids).logits, rtol=0, atol=1e-5)
