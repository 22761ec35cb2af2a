"""The action expert: its time convention, its sampler, and what it may see."""

import math

import pytest
import torch
from test_model import CFG, make_batch, make_padded
from torch.nn import functional as F

from backbone import KeyValues
from flow_head import draw_noise, time_embedding
from model import AuxVLA


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AuxVLA(CFG, flow_head=True)
    model.train_stage(3)
    return model


def velocity_at(head, x_t, t, cache, prefix_mask):
    time = time_embedding(t, head.cfg.width)
    return head.velocity(x_t, time, cache, *head.chunk_context(prefix_mask, x_t.shape[1]))


def test_ten_euler_steps_from_noise_land_on_the_chunk_it_was_trained_on(model):
    batch = make_batch(b=2)
    optimizer = torch.optim.Adam(model.flow_head.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        prefix = model.vlm.encode(batch)
    cache = [KeyValues(*(part.repeat(16, 1, 1, 1) for part in layer)) for layer in prefix.cache]
    mask, actions = prefix.mask.repeat(16, 1), batch["actions"].repeat(16, 1, 1)
    for _ in range(250):
        noise, t = draw_noise(32, 8, generator)
        optimizer.zero_grad()
        model.flow_head.loss(actions, noise, t, cache, mask).mean().backward()
        optimizer.step()
    sampled, _ = model.act(batch, torch.randn(2, 8, 13, generator=generator))
    other_frame = (sampled - batch["actions"].flip(0)).abs().mean()
    assert (sampled - batch["actions"]).abs().mean() < 0.15 < 0.4 < other_frame


def test_noise_is_at_time_one_and_times_follow_pi0():
    noise, t = draw_noise(200_000, 1, torch.Generator().manual_seed(0))
    assert t.min() >= 0.001 and t.max() <= 1
    assert abs(t.mean() - 0.6004) < 0.005 and abs((t > 0.5).float().mean() - 0.647) < 0.005
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_the_loss_is_the_squared_distance_to_noise_minus_actions(model):
    batch = make_batch()
    prefix = model.vlm.encode(batch)
    t = torch.tensor([0.25, 0.75])
    x_t = t[:, None, None] * batch["noise"] + (1 - t[:, None, None]) * batch["actions"]
    velocity = velocity_at(model.flow_head, x_t, t, prefix.cache, prefix.mask)
    expected = (velocity - (batch["noise"] - batch["actions"])).square().mean(-1)
    got = model.flow_head.loss(batch["actions"], batch["noise"], t, prefix.cache, prefix.mask)
    torch.testing.assert_close(got, expected)


def test_actions_behind_the_end_of_an_episode_are_not_trained_on(model):
    batch = make_batch()
    batch["action_mask"][0, 3:] = 0
    batch["t"] = torch.ones(2)  # all noise, so that the other actions do not see the padded ones
    gradients = []
    for padding in (0.0, 0.9):
        batch["actions"][0, 3:] = padding
        model.zero_grad()
        model(batch, 3)["flow"].backward()
        gradients.append(model.flow_head.action_out.weight.grad.clone())
    assert torch.equal(*gradients)


def turn(x, positions, cfg):
    """RoPE on [B, T, heads, head_dim], as a rotation of complex numbers."""
    half = cfg.head_dim // 2
    frequency = cfg.rope_theta ** (-torch.arange(half) / half)
    angle = (positions[..., None] * frequency)[:, :, None]  # [B, T, 1, head_dim / 2]
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def attend(layers, streams, positions, visible, cfg):
    """One softmax over both streams, each with its own projections: [B, T, heads * head_dim]."""
    inputs = [layer.input_norm(x) for layer, x in zip(layers, streams)]
    qkv = torch.cat([layer.qkv(x) for layer, x in zip(layers, inputs)], dim=1)
    sizes = [cfg.heads, cfg.kv_heads, cfg.kv_heads]
    q, k, v = qkv.unflatten(-1, (-1, cfg.head_dim)).split(sizes, dim=2)
    groups = cfg.heads // cfg.kv_heads
    q, k = turn(q, positions, cfg), turn(k, positions, cfg).repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(cfg.head_dim)
    weights = scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(groups, 2)).flatten(2)


@torch.no_grad()
def compare_with_joint_pass(model, batch, tolerance):
    """The expert on cached keys and values is one pass over prefix and chunk together (pi0)."""
    head, cfg, x_t, t = model.flow_head, model.cfg.llm, batch["noise"], batch["t"]
    prefix, exists = model.vlm.embed_prefix(batch)
    time = time_embedding(t, model.cfg.flow.width)[:, None].expand(-1, x_t.shape[1], -1)
    chunk = head.action_time_in(torch.cat([head.action_in(x_t), time], dim=-1))
    streams = [prefix, head.action_time_out(F.silu(chunk))]
    lengths = [prefix.shape[1], x_t.shape[1]]
    exists = torch.cat([exists, torch.ones(x_t.shape[:2], dtype=torch.bool)], dim=1)
    causal = torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).tril()
    causal[lengths[0] :] = True  # actions see each other; the prefix never sees them
    for layers in zip(model.vlm.llm.layers, head.layers):
        mixed = attend(layers, streams, exists.cumsum(-1) - 1, causal & exists[:, None], cfg)
        for i, (layer, part) in enumerate(zip(layers, mixed.split(lengths, dim=1))):
            x = streams[i] + layer.o(part)
            y = layer.mlp_norm(x)
            gate, up = layer.gate_up(y).chunk(2, dim=-1)
            streams[i] = x + layer.down(F.silu(gate) * up)
    joint = head.action_out(head.norm(streams[1]))
    read = model.vlm.encode(batch)
    cached = velocity_at(head, x_t, t, read.cache, read.mask)
    assert joint.abs().max() > 0.1
    torch.testing.assert_close(cached, joint, rtol=0, atol=tolerance)


def test_the_expert_on_cached_keys_and_values_equals_the_joint_forward_pass(model):
    compare_with_joint_pass(model.eval(), make_padded(), tolerance=1e-5)


def test_under_autocast_the_residual_stream_of_vlm_and_head_is_fp32(model):
    seen = set()
    for layer in (*model.vlm.llm.layers, *model.flow_head.layers):
        layer.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(make_batch(), 3)
    assert seen == {torch.float32}
