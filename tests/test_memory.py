"""The memory plan counts what is there; recomputing and compiling blocks changes no step."""

import gc
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_model import CFG, make_batch
from tiny_run import DEVICES
from torch._dynamo.utils import counters

from config import PRESETS, InputError, LLMConfig, ModelConfig, TrainConfig
from data import batch_shapes
from model import AuxVLA
from training import memory
from training.flags import parse
from training.memory import Meter, describe_plan, memory_plan, sample_flop, settle_micro_batch
from training.ranks import autocast, halve_frozen

CPU = torch.device("cpu")
TINY = replace(TrainConfig(data="", out="", stage=2), **PRESETS["tiny"] | {"model": CFG})


def gradients(measured=True, **prepared):
    """The gradients of a step with blocks prepared; if measured, the most bytes that it holds.

    Under a Meter torch compiles nothing.
    """
    torch.manual_seed(0)
    model, batch = AuxVLA(CFG), make_batch(16)
    params = model.train_stage(2)
    model.prepare_blocks(**prepared)
    with Meter(*model.parameters()) if measured else nullcontext() as meter:
        sum(model(batch, 2).values()).backward()
    return [p.grad for p in params], meter and meter.peak


SIX_LAYERS = ModelConfig(
    dino=replace(ModelConfig().dino, depth=7), siglip=replace(ModelConfig().siglip, depth=7),
    llm=LLMConfig(depth=6),
)  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
@DEVICES
def test_the_plan_is_the_peak_of_real_steps(device, stage, recompute):
    """On a GPU six layers of the paper's size, where the plan is to be within a tenth."""
    cfg = replace(TINY, stage=stage, micro_batch=8, recompute=recompute)
    cfg = replace(cfg, model=SIX_LAYERS) if device.type == "cuda" else cfg
    *fixed, frame = memory_plan(cfg, 1, device).values()
    gc.collect()  # prepared blocks refer to themselves
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AuxVLA(cfg.model, flow_head=stage == 3).to(device)
    halve_frozen(model, cfg, device)
    optimizer = torch.optim.Adam(model.train_stage(stage), fused=True)
    model.prepare_blocks(recompute)
    batch = {name: torch.ones(s) for name, s in batch_shapes(cfg.model, 8, noise=True).items()}
    batch["prompt_ids"] = batch["prompt_ids"].long()
    batch = {name: value.to(device) for name, value in batch.items()}
    with Meter(*model.parameters()) as meter:
        for _ in range(3):  # two micro-batches after a step
            with autocast(device):
                losses = model(batch, stage)
            sum(losses.values()).backward()
            if not optimizer.state:
                optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else meter.peak
    assert peak == pytest.approx(sum(fixed) + 8 * frame, rel=0.1)


def test_sharding_divides_what_belongs_to_the_weights():
    alone, divided = (memory_plan(replace(TINY, shard=True), world, CPU) for world in (1, 4))
    shares = {name: divided[name] / alone[name] for name in alone if alone[name]}
    activations = shares.pop("activations of a frame"), shares.pop("copies of the weights", 1)
    assert activations == (1, 1) and set(shares.values()) == {1 / 4} and len(shares) == 3


def test_the_plan_counts_the_frames_that_a_rank_has_in_flight(monkeypatch):
    monkeypatch.setattr(memory, "measure", lambda cfg, frames, device: (0, 0, frames * 2**30))
    cfg = replace(TINY, batch_size=32)
    monkeypatch.setattr(memory, "memory_of", lambda device: 99e9)
    for world, micro_batch, frames in ((1, 2, 2), (2, 32, 16), (8, 32, 4)):
        line = describe_plan(replace(cfg, micro_batch=micro_batch), world, CPU)
        assert f"activations of {frames} frames {frames}; in all {frames} of" in line


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given size, on which a frame takes 1 GB, with --recompute 0.1. No GPU is used."""

    def measure(cfg, frames, device):
        return 4e9, 4e9, frames * (1e8 if cfg.recompute else 1e9)

    def make(total: float) -> torch.device:
        monkeypatch.setattr(memory, "memory_of", lambda device: total)
        return torch.device("cuda")

    monkeypatch.setattr(memory, "measure", measure)
    return make


def test_a_gpu_that_is_too_small_is_refused_with_flags_that_fit(gpu):
    cfg = replace(TINY, micro_batch=8, batch_size=64)
    assert "; in all 22.4 of 27.9" in describe_plan(cfg, 1, gpu(27e9))
    too_small = {
        22e9: "--micro-batch 6, or --recompute$", 16.5e9: "--micro-batch 5 --recompute, or .* 2",
        5e9: "--recompute --shard on 4 GPUs, or --recompute --shard on 8 GPUs", 1e7: "tiny$",
    }  # fmt: skip
    for total, flags in too_small.items():
        with pytest.raises(InputError, match=flags) as caught:
            describe_plan(cfg, 1, gpu(total))
        for given in re.findall(r"--[\w-]+(?: (?:\d+|tiny))?", str(caught.value)):
            parse(["--data", "DATA", "--out", "OUT", *given.split()])


def test_auto_takes_a_ranks_batch_in_as_few_equal_pieces_as_fit(gpu):
    cfg = replace(TINY, micro_batch="auto", batch_size=128)
    for total, world, frames in ((29e9, 2, 13), (48e9, 2, 32), (99e9, 2, 64), (1e9, 2, 1)):
        assert settle_micro_batch(cfg, world, gpu(total)).micro_batch == frames


def test_flop_are_those_of_the_products_and_no_recomputation():
    """Forward and backward: six for each weight and token, in a model of hardly any attention."""
    cfg = replace(TINY, model=replace(CFG, freeze_vision=True))
    flop, again = sample_flop(cfg), sample_flop(replace(cfg, recompute=True))
    with torch.device("meta"):
        layers = AuxVLA(CFG).vlm.llm.layers
    tokens = CFG.num_views * CFG.patches + CFG.llm.prompt_length + CFG.num_latents + 12
    products = 6 * tokens * sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    assert flop == again and 1 < flop / products < 2.5


def test_recomputed_blocks_keep_less_and_recomputed_or_compiled_ones_give_the_same_gradients(
    monkeypatch,
):
    plain, kept = gradients()
    recomputed, less = gradients(recompute=True)
    assert less < 0.8 * kept and all(map(torch.equal, plain, recomputed))
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # quick
    compiled, _ = gradients(measured=False, compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
