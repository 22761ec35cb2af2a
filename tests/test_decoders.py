"""The decoders are Table 5's and the losses are Eqs. 2 and 3."""

import math

import pytest
import torch

from config import DecoderConfig, model_config
from decoders import DECODERS, grasp_loss, obj_loss, pos_loss, qpos_loss, seg_loss

OUTPUTS = {"pos": (2,), "grasp": (), "qpos": (12,), "obj": (7,), "seg": (2, 128, 128)}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_maps_eight_latents_to_the_output_of_table_5(name):
    decoder = DECODERS[name][0](model_config("paper")).eval()
    assert decoder(torch.randn(3, 8, 896)).shape == (3, *OUTPUTS[name])


def test_the_widths_of_table_5_are_the_defaults():
    cfg = DecoderConfig()
    decoder = DECODERS["pos"][0](model_config("paper"))
    linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    widths = [(m.in_features, m.out_features) for m in linears]
    assert widths == [(896, 512), (512, 256), (256, 128), (128, 2)]
    assert (cfg.layers, cfg.heads, cfg.grid, cfg.channels[0]) == (2, 8, 8, 64)


T = torch.tensor
SURE = -math.log(1 / (1 + math.exp(-2)))  # binary cross-entropy of a right logit of 2
FORWARD, TURNED = [1, 0, 0, 0], [math.sqrt(0.5), 0, 0, math.sqrt(0.5)]  # 90 degrees about z apart
TURNED_LOSS = 1 + 4 + 1 - math.sqrt(0.5)  # the last two terms: 1 - |q_hat . q|


@pytest.mark.parametrize(
    "loss, pred, target, expected",
    [
        (pos_loss, T([[1.0, 2.0]]), T([[0.0, 4.0]]), (1 + 4) / 2),
        (qpos_loss, torch.full((1, 12), 0.5), torch.zeros(1, 12), 0.25),
        (grasp_loss, T([2.0]), T([1.0]), SURE),
        (grasp_loss, T([-2.0]), T([0.0]), SURE),
        (obj_loss, T([[1.0, 2, 3, *FORWARD]]), T([[0, 0, 3, *TURNED]]), TURNED_LOSS),
        (obj_loss, T([[1.0, 2, 3, *FORWARD]]), T([[0, 0, 3, *(-x for x in TURNED)]]), TURNED_LOSS),
        (seg_loss, torch.full((1, 2, 128, 128), 2.0), torch.ones(1, 2, 128, 128), SURE),
    ],
)
def test_losses_are_those_of_eqs_2_and_3(loss, pred, target, expected):
    """MSE; binary cross-entropy; squared distance and quaternion alignment, whatever its sign."""
    assert loss(pred, target).item() == pytest.approx(expected, rel=1e-5)


def test_object_pose_decoder_gives_a_unit_quaternion():
    decoder = DECODERS["obj"][0](model_config("tiny"))
    norms = decoder(torch.randn(5, 8, 192) * 10)[:, 3:].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(5))


@pytest.mark.parametrize("name", ["pos", "grasp", "obj"])  # test_train.py: qpos, seg
def test_descending_its_loss_brings_a_decoder_to_its_label(name):
    torch.manual_seed(0)
    decoder, loss_fn = DECODERS[name][0](model_config("tiny")), DECODERS[name][1]
    latents = torch.randn(2, 8, 192)
    target = torch.rand_like(decoder(latents)).round().detach()
    if name == "obj":
        target = torch.tensor([[0.3, -0.2, 0.5, 1, 0, 0, 0], [0.1, 0.2, 0.3, 0, 1, 0, 0]])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    first = loss_fn(decoder(latents), target).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_fn(decoder(latents), target).mean()
        loss.backward()
        optimizer.step()
    pred = decoder(latents)
    assert loss.item() < 0.5 * first
    if name == "grasp":  # the label itself, not its opposite
        assert ((pred > 0) == (target > 0.5)).float().mean() > 0.6
    else:
        assert (pred - target)[:, :2].abs().mean() < 0.15
