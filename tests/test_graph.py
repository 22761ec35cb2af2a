"""Acting on a GPU: bf16 weights are what autocast makes of them, a graph is what it captured."""

from copy import deepcopy

import pytest
import torch
from test_model import CFG, make_batch, make_padded

from model import AuxVLA
from policy import Graphed, halve

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AuxVLA(CFG, flow_head=True).eval()


@torch.no_grad()
def test_halved_weights_act_bit_for_bit_as_autocast_does(model):
    halved, batch = deepcopy(model), make_padded(2)
    halve(halved)
    assert {p.dtype for p in halved.vlm.llm.layers.parameters()} == {torch.bfloat16, torch.float32}
    assert all(p.dtype == torch.float32 for p in halved.decoders.parameters())
    for noise in (None, batch["noise"]):
        with torch.autocast("cpu", torch.bfloat16):
            plain, half = (each.act(batch, noise) for each in (model, halved))
        torch.testing.assert_close(half, plain, rtol=0, atol=0)


@on_gpu
@torch.no_grad()
@pytest.mark.parametrize("chunk", [False, True])
def test_a_graph_gives_what_the_model_gives_for_inputs_that_it_has_not_seen(model, chunk):
    model.cuda()
    frames = [{k: v.cuda() for k, v in make_batch(2, seed=seed).items()} for seed in (0, 1)]

    graphed = Graphed(lambda inputs: model.act(inputs, inputs["noise"] if chunk else None))
    for batch in (*frames, frames[0]):
        expected = graphed.run(batch)
        torch.testing.assert_close(graphed(batch), expected, rtol=0, atol=1e-4)
    assert len(graphed.captured) == 1
