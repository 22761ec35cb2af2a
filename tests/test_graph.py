"""Acting on a GPU: bf16 weights are what autocast makes of them, a graph is what it captured.

Compiled blocks, on a CPU too, act as plain ones.
"""

import operator

import pytest
import torch
from test_model import CFG, make_batch, make_padded
from tiny_run import DEVICES

from backbone import KeyValues, append_keys, halve, repeat_heads
from model import AuxVLA
from policy import Graphs, prepare

ZEROS = torch.zeros(4, 13)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AuxVLA(CFG, flow_head=True).eval()


class Spy(list):
    """Calls the parts; lists the tokens at which passes begin."""

    def __call__(self, function, inputs, *state):
        self += state[1:]
        return function(inputs, *state)


@torch.no_grad()
def test_bf16_weights_give_one_answer_with_drafts_right_wrong_and_absent(model):
    halve(model)
    assert {p.dtype for p in model.vlm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.decoders.parameters()} == {torch.float32}
    batch, passes = make_padded(4), []
    plain, predictions = model.act(batch)
    for draft in (plain[:, 0], None, -plain[:, 0]):
        spy = Spy()
        tokens, predicted = model.act(batch, draft=draft, run=spy)
        assert torch.equal(tokens, plain)
        torch.testing.assert_close(predicted, predictions, rtol=0.02, atol=0.02)
        passes.append(len(spy))
    assert passes[0] == 0 < min(passes[1:])
    chunk = model.act(batch, batch["noise"])[0]
    assert chunk.isfinite().all() and chunk.shape == (4, 8, 13)


def test_new_keys_enter_a_cache_of_repeated_heads():
    new, past = KeyValues(*torch.rand(2, 1, 2, 3, 4)), KeyValues(*torch.zeros(2, 1, 6, 5, 4))
    for whole, fresh in zip(append_keys(past, new, 5), repeat_heads(new, 6)):
        assert torch.equal(whole[:, :, 2:], fresh) and not whole[:, :, :2].any()


@torch.no_grad()
def test_bf16_acts_as_fp32_does_up_to_rounding(model):
    batch = make_padded(4)
    chunk, (prefix, _) = model.act(batch, batch["noise"])[0], model.decode_actions(batch, ZEROS)
    halve(model)
    close = dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.act(batch, batch["noise"])[0], chunk, **close)
    rounded = model.decode_actions(batch, ZEROS)[0].hidden.float()
    torch.testing.assert_close(rounded[:, :8], prefix.hidden[:, :8], **close)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("size", [1, 16])
def test_graphs_give_what_the_model_gives_for_inputs_that_they_have_not_seen(model, chunk, size):
    halve(model.cuda())
    frames = [{k: v.cuda() for k, v in make_batch(size, seed=seed).items()} for seed in (0, 1)]
    graphs = Graphs()
    for batch in (*frames, frames[0]):
        noise = batch["noise"] if chunk else None
        expected = model.act(batch, noise)
        for draft in (expected[0][:, 0], None, -expected[0][:, 0]):
            got = model.act(batch, noise, draft, run=graphs)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-2)
    assert len(graphs.captured) == 3  # encode or read_draft, predict, denoise or read_tokens


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_of_compiled_blocks_have_one_shape(model, compiled):
    model.compiled, spy = compiled, Spy()
    model.act(make_batch(4), run=spy)
    assert spy and ({*spy} == {0}) == compiled


@pytest.mark.slow
@torch.no_grad()
@DEVICES
def test_compiled_blocks_act_as_plain_ones_whatever_the_draft(model, device):
    close = 0.05 if device.type == "cuda" else 1e-5
    batch = {name: value.to(device) for name, value in make_batch(2).items()}

    def act() -> tuple:
        tokens, _ = model.act(batch)
        return tokens, model.teacher_forced(batch)[0], model.act(batch, batch["noise"])[0]

    prepare(model, device, compile=False)
    plain, logits, chunk = act()
    prepare(model, device, compile=True)
    tokens, *others = act()
    torch.testing.assert_close(others, [logits, chunk], rtol=close, atol=close)
    run = Graphs() if device.type == "cuda" else operator.call
    for draft in (tokens[:, 0], None, -tokens[:, 0]):
        assert torch.equal(model.act(batch, draft=draft, run=run)[0], tokens)
    assert device.type == "cuda" or torch.equal(tokens, plain)  # bf16 may round a token over
