"""The stage rule, the sequence and the action tokens, on the real model at tiny size."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from config import BINS, LABELS, InputError, model_config
from decoders import DECODERS
from model import AuxVLA, actions_to_bins, bins_to_actions, print_parameters

TINY = model_config("tiny")
CFG = replace(TINY, llm=replace(TINY.llm, kv_heads=2))  # heads share keys, as in Qwen2.5


def make_batch(b=2, seed=0, cfg=CFG):
    """A batch as data.py documents it."""
    g = torch.Generator().manual_seed(seed)
    length = cfg.llm.prompt_length
    batch = {
        "images": torch.rand(b, cfg.num_views, 3, cfg.image_size, cfg.image_size, generator=g),
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


def reaches(part):
    """Did the backward pass reach a parameter of the part?"""
    return any(p.grad is not None and p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("name", ["action", *LABELS])
def test_stage_1_sends_no_decoder_gradient_into_the_vlm_and_stage_2_does(model, name):
    for stage in (1, 2):
        model.train_stage(stage)
        model.zero_grad()
        model(make_batch(), stage)[name].backward()
        assert reaches(model.vlm) == (stage == 2 or name == "action")
        assert name == "action" or reaches(model.decoders[name])


def test_stage_3_trains_only_the_flow_head_and_leaves_every_other_byte(model):
    optimizer = torch.optim.Adam(model.train_stage(3), lr=1e-2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    model(make_batch(), 3)["flow"].backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {f"flow_head.{name}" for name, _ in model.flow_head.named_parameters()} == changed


def test_every_trained_parameter_gets_a_gradient_and_what_is_frozen_is_in_eval_mode(model):
    for stage in (1, 2, 3):
        model.eval()  # as validation leaves it
        params = model.train_stage(stage)
        for part in model.children():
            trained = next(part.parameters()).requires_grad
            assert {module.training for module in part.modules()} == {trained}
        model.zero_grad()
        sum(model(make_batch(), stage).values()).backward()
        assert all(p.grad is not None for p in params)


def test_without_latents_and_decoders_it_is_the_bare_vlm_and_still_acts():
    bare = AuxVLA(replace(CFG, num_latents=0, decoders=()))
    batch = make_batch()
    params = bare.train_stage(1)
    losses = bare(batch, 1)
    losses["action"].backward()
    assert losses.keys() == {"action"} and all(p.grad is not None for p in params)
    length = CFG.llm.prompt_length + CFG.num_views * CFG.patches
    assert bare.vlm.encode(batch).mask.shape == (2, length)
    actions, predictions = bare.act(batch)
    assert actions.shape == (2, 1, 13) and predictions == {}
    with pytest.raises(InputError, match="num_latents 0"):
        replace(CFG, num_latents=0)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_frame_without_labels_does_not_count_and_a_batch_still_reaches_every_decoder(
    model, labelled
):
    params, losses = model.train_stage(2), []
    for garbage in (0.0, 1.0):
        batch = make_batch()
        for name in LABELS:
            batch[name][1] = garbage
            batch[f"has_{name}"] = torch.tensor([labelled, False])
        losses.append(model(batch, 2))
    model.zero_grad()
    sum(losses[1].values()).backward()
    assert losses[0] == losses[1] and all((losses[1][name] > 0) == labelled for name in LABELS)
    assert all(p.grad is not None for p in params)


@torch.no_grad()
def test_every_view_and_the_instruction_reach_the_action(model):
    model.eval()
    reference = model.vlm.encode(make_batch()).hidden[:, -1]
    for key, index in [*(("images", view) for view in range(CFG.num_views)), ("prompt_ids", 5)]:
        batch = make_batch()
        batch[key][:, index] = 7 if key == "prompt_ids" else 0.5
        assert (model.vlm.encode(batch).hidden[:, -1] - reference).abs().max() > 1e-5


def make_padded(b=3, cfg=CFG):
    """A batch whose prompts are of other lengths: 0, 3, 6 ... padding behind the first token."""
    batch = make_batch(b, cfg=cfg)
    for row, mask in enumerate(batch["prompt_mask"]):
        mask[1 : 1 + 3 * row] = False
    return batch


@torch.no_grad()
def compare_cached_decoding(model, batch, tolerance):
    """Each token is the best of the action ids, given those before it, in one pass over all 13."""
    first = model.cfg.llm.first_action_id
    decoded, bins = model.decode_actions(batch, torch.zeros(len(batch["images"]), 13))
    cached = decoded.hidden[:, -13:]  # [B, 13, D]
    whole = model.vlm.encode(batch, first + bins[:, :-1]).hidden[:, -13:]
    torch.testing.assert_close(cached, whole, rtol=0, atol=tolerance)
    assert torch.equal(model.vlm.llm.logits(whole, first, BINS).argmax(-1), bins)
    assert len(bins.unique()) > 1


@pytest.mark.parametrize("wrong", [[], [0], [5], [3, 7], [11, 12], list(range(13))])
@torch.no_grad()
def test_a_draft_changes_the_passes_that_decoding_takes_and_not_its_tokens(model, wrong):
    model.eval()
    batch = make_padded(3)
    plain = model.decode_actions(batch, torch.zeros(3, 13))[1]
    guess, passes = bins_to_actions(plain), []
    guess[1, wrong] = -guess[1, wrong] + 0.1
    hook = model.vlm.llm.register_forward_hook(lambda *_: passes.append(1))
    _, bins = model.decode_actions(batch, guess)
    hook.remove()
    assert torch.equal(bins, plain)
    # The prefix's own pass reads the guess too; the last token's is never read.
    assert len(passes) == 1 if not set(wrong) - {12} else 1 < len(passes) <= 13


def everything_read(model, batch):
    """All that the model says of a batch: tokens, chunk, the decoders' predictions."""
    prefix, tokens = model.decode_actions(batch, torch.zeros(len(batch["images"]), 13))
    chunk = model.flow_head.sample(prefix.cache, prefix.mask, batch["noise"])
    return {"tokens": tokens, "chunk": chunk} | model.predict({"hidden": prefix.hidden})


@torch.no_grad()
def compare_alone_and_together(model, batch, tolerance):
    """A frame of a padded batch is what it is alone, its prompt without padding."""
    together = everything_read(model, batch)
    for i, real in enumerate(batch["prompt_mask"]):
        frame = {key: value[i : i + 1] for key, value in batch.items()}
        frame["prompt_ids"] = frame["prompt_ids"][:, real]
        del frame["prompt_mask"]
        for name, alone in everything_read(model, frame).items():
            torch.testing.assert_close(alone[0], together[name][i], rtol=0, atol=tolerance)


def test_cached_decoding_equals_one_pass_over_all_tokens(model):
    compare_cached_decoding(model.eval(), make_padded(), tolerance=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_batch_without_padding_needs_no_mask(stage, model, monkeypatch):
    attention, masks = F.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, *args, **options):
        masks.append(attn_mask)
        return attention(q, k, v, attn_mask, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model.train_stage(stage)
    model.eval()
    batch, losses = make_batch(), []
    for _ in range(2):
        model.zero_grad()
        losses.append(model(batch, stage))
        sum(losses[-1].values()).backward()
        losses[-1]["gradient"] = next(p.grad for p in model.parameters() if p.requires_grad)
        batch.pop("prompt_mask", None)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    without = masks[len(masks) // 2 :]
    assert sum(mask is not None for mask in without) == (1 if stage == 1 else 1 + CFG.llm.depth)


def test_left_padded_frames_act_alike_alone_and_in_a_batch(model):
    compare_alone_and_together(model.eval(), make_padded(), tolerance=1e-5)


def test_the_action_loss_is_over_the_13_label_positions_and_the_whole_vocabulary(model):
    model.eval()
    batch = make_padded()
    ids = 256 + ((batch["actions"][:, 0] + 1) * 128).long()  # 256 bins on the ids 256 to 511
    with torch.no_grad():
        hidden = model.vlm.encode(batch, ids[:, :-1]).hidden
        logits = hidden @ model.vlm.llm.embed.weight.T  # [B, S + 12, vocabulary]
        expected = F.cross_entropy(logits[:, -13:].flatten(0, 1), ids.flatten())
        torch.testing.assert_close(model(batch, 2)["action"], expected)


def test_the_decoders_see_no_ground_truth_action(model):
    model.eval()
    one, other = make_batch(), make_batch() | {"actions": -make_batch()["actions"]}
    predictions = [model.teacher_forced(batch)[1] for batch in (one, other)]
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-6)


def test_action_bins_round_trip_within_half_a_bin():
    actions = torch.linspace(-1, 1, 1001)
    bins = actions_to_bins(actions)
    assert (bins_to_actions(bins) - actions).abs().max() <= 1 / 256 + 1e-6
    assert (bins.diff() >= 0).all()
    assert actions_to_bins(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


def test_prompts_and_action_ids_are_those_of_the_public_models():
    qwen, llama = model_config("paper").llm, model_config("openvla").llm
    system = "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    user = "user\nWhat action should the robot take to {}?"
    turns = [f"<|im_start|>{turn}<|im_end|>\n" for turn in (system, user)]
    assert qwen.prompt == "".join(turns) + "<|im_start|>assistant\n"
    assert llama.prompt == "In: What action should the robot take to {}?\nOut:"
    # <|extra_0|> to <|extra_255|> behind the 151,665 tokens of Qwen2.5; Llama's last 256 of 32,000.
    for llm, last in ((qwen, 151_920), (llama, 31_999)):
        assert llm.first_action_id + BINS - 1 == last
    assert qwen.prompt_end == () and llama.prompt_end == (29871,)


@pytest.mark.parametrize(
    "preset, everything, vlm, flow_head",
    [  # the VLM: Prismatic's (the paper's 1.3B) and openvla-7b's parameters, counted in their files
        ("paper", 1_337_637_018, 1_252_496_448, 101_517_325),
        ("openvla", 7_868_090_029, 7_541_237_184, 369_933_325),
    ],
)
def test_the_table_of_parameters_has_the_public_models_numbers(
    preset, everything, vlm, flow_head, capsys
):
    print_parameters(preset)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {name: int(count.replace(",", "")) for name, count in lines}
    assert table.pop("all") == sum(table.values()) == everything
    # Less the last blocks, final norms and pooling head, which nothing reads.
    parts = ("vision.dino", "vision.siglip", "projector", "llm")
    assert sum(table[part] for part in parts) == vlm - 43_080_480
    assert table["flow_head"] == flow_head
    decoders = {f"decoders.{name}" for name in DECODERS} if preset == "paper" else set()
    assert set(table) == {*parts, *decoders, "flow_head", "latent_queries"}
