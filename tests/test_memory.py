"""The memory plan counts what is there; recomputing and compiling blocks changes no step."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_model import CFG, make_batch

from config import PRESETS, InputError, TrainConfig
from model import AuxVLA
from training.flags import parse
from training.memory import describe_plan, kept_for_backward, memory_plan

CPU = torch.device("cpu")
TINY = replace(TrainConfig(data="", out="", stage=2), **PRESETS["tiny"] | {"model": CFG})


def gradients(**prepared):
    """The gradients of a step with blocks prepared, and the bytes that the forward pass keeps."""
    torch.manual_seed(0)
    model, batch = AuxVLA(CFG), make_batch(2)
    params = model.train_stage(2)
    model.prepare_blocks(**prepared)
    kept = kept_for_backward(model, lambda: model(batch, 2))
    model.zero_grad()
    sum(model(batch, 2).values()).backward()
    return [p.grad for p in params], kept


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_plan_is_what_a_real_model_holds(stage):
    cfg = replace(TINY, stage=stage, init_from="x", micro_batch=4)
    plan = memory_plan(cfg, 1, CPU)
    torch.manual_seed(0)
    model = AuxVLA(CFG, flow_head=stage == 3)
    params = model.train_stage(stage)
    batch = make_batch(4)
    model.eval()
    kept = kept_for_backward(model, lambda: model(batch, stage))
    counted = plan["bf16 copies of the weights"] + 4 * plan["activations of a frame"]
    assert plan["weights"] == sum(p.nbytes for p in model.parameters())
    assert plan["gradients"] == sum(p.nbytes for p in params)
    optimizer = torch.optim.Adam(params)
    sum(model(batch, stage).values()).backward()
    optimizer.step()
    moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in optimizer.state.values()]
    assert plan["Adam's moments"] == sum(a.nbytes + b.nbytes for a, b in moments)
    assert kept == pytest.approx(counted, rel=0.02)


def test_the_plan_of_the_papers_size_takes_no_random_number():
    before = torch.get_rng_state()
    plan = memory_plan(TrainConfig(data="", out="", stage=2), 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan["weights"] == pytest.approx(4.6 * 2**30, rel=0.01)


def test_sharding_divides_what_belongs_to_the_weights():
    alone, divided = (memory_plan(replace(TINY, shard=True), world, CPU) for world in (1, 4))
    shares = {name: divided[name] / alone[name] for name in alone if alone[name]}
    activations = shares.pop("activations of a frame"), shares.pop("bf16 copies of the weights", 1)
    assert activations == (1, 1) and set(shares.values()) == {1 / 4} and len(shares) == 3


def test_the_plan_counts_the_frames_that_a_rank_has_in_flight():
    sizes, cfg = {"weights": 0.0, "activations": 2.0**30}, replace(TINY, batch_size=32)
    for world, micro_batch, frames in ((1, 8, 8), (2, 32, 16), (8, 32, 4)):
        line = describe_plan(sizes, replace(cfg, micro_batch=micro_batch), world, CPU)
        assert f"activations of {frames} frames {frames}; in all {frames} of" in line


def test_a_gpu_that_is_too_small_is_refused_with_the_flag_that_fits(monkeypatch):
    """The plan and the sentence; the GPU is only a size here."""
    gpu, sizes = torch.device("cuda"), {"weights": 4e9, "gradients": 4e9, "activations": 1e9}
    cfg = replace(TINY, micro_batch=8, batch_size=64)

    def describe(total: float) -> str:
        properties = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", {gpu: properties}.get)
        return describe_plan(sizes, cfg, 1, gpu)

    assert describe(20e9).endswith("in all 14.9 of 18.6")
    too_small = {16e9: "--micro-batch 6", 8e9: "--shard on more GPUs, or --recompute, "}
    for total, flag in too_small.items():
        with pytest.raises(InputError, match=flag) as caught:
            describe(total)
        for given in re.findall(r"--[\w-]+(?: \d+)?", str(caught.value)):
            parse(["--data", "DATA", "--out", "OUT", *given.split()])


def test_recomputed_blocks_keep_less_and_recomputed_or_compiled_ones_give_the_same_gradients():
    plain, kept = gradients()
    recomputed, less = gradients(recompute=True)
    assert less < 0.75 * kept and all(map(torch.equal, plain, recomputed))
    compiled, _ = gradients(compile=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
