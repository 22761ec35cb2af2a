"""Ours against what a user would otherwise run, side by side in one process.

    python -m tools.bench loader --data DATA --json FILE   # DATA: files in MS-HAB's layout
    python -m tools.bench train --preset tiny --json FILE
    python -m tools.bench act --preset tiny --json FILE

The contestants take turns, a round each, on one CPU thread or one GPU; a figure is the median of
its rounds with the smallest and largest. The limit is measured in the same run: memory, inflate, or
the device's rate of matrix products. `tools/naive.py` is the reference model.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import (
    ACTION_DIM,
    CAMERAS,
    IMAGE_SIZE,
    PRESETS,
    RECORDED_ACTIONS,
    explained,
    model_config,
)
from data import ActionStats, build_tokenizer, cameras
from flow_head import draw_noise
from model import AuxVLA
from policy import Policy
from tools.bench_loader import LoaderBench, in_turns, seconds, spread
from tools.naive import NaivePort, adopt


def random_batch(cfg, size: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of data.py's schema with random content and every label."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    batch = {
        "images": rand(size, cfg.num_views, 3, cfg.image_size, cfg.image_size),
        "prompt_ids": torch.randint(2, 60, (size, cfg.llm.prompt_length), generator=generator),
        "prompt_mask": torch.ones(size, cfg.llm.prompt_length, dtype=torch.bool),
        "actions": rand(size, RECORDED_ACTIONS, ACTION_DIM) * 2 - 1,
        "action_mask": torch.ones(size, RECORDED_ACTIONS),
        "pos": rand(size, 2), "grasp": (rand(size) > 0.5).float(), "qpos": rand(size, 12),
        "obj": rand(size, 7), "seg": (rand(size, 2, IMAGE_SIZE, IMAGE_SIZE) > 0.5).float(),
    }  # fmt: skip
    batch |= {f"has_{name}": torch.ones(size, dtype=torch.bool) for name in cfg.decoders}
    batch["noise"], batch["t"] = draw_noise(size, RECORDED_ACTIONS, generator)
    return {key: value.to(device) for key, value in batch.items()}


def matmul_rate(device: torch.device, size: int = 2048, repeats: int = 8) -> float:
    """FLOP per second of a large matrix product in the type that training uses."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=kind)
    seconds(lambda: a @ a, device)
    return repeats * 2 * size**3 / seconds(lambda: [a @ a for _ in range(repeats)], device)


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def kept_for_backward(run: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, weights apart."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()  # noqa: F841  keeps the graph, and with it every storage, alive
    return sum(kept.values())


class Step:
    """A training step of stage 2 of one model: forward, backward, Adam."""

    def __init__(
        self, model: nn.Module, batch: dict[str, Tensor], device: torch.device, fused: bool
    ):
        self.model, self.batch, self.device = model.to(device), batch, device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=fused)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return sum(self.model(self.batch, 2).values())

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def samples_per_s(self) -> float:
        return len(self.batch["images"]) / seconds(self, self.device)


def parts_of(step: Step) -> Iterator[tuple[str, Callable[[], object]]]:
    """The parts of ours, each forward and backward alone."""
    model, batch = step.model, step.batch
    images = rearrange(batch["images"], "b v c h w -> (b v) c h w")
    x, mask = (each.detach() for each in model.vlm.embed_prefix(batch))
    positions, causal = (mask.cumsum(-1) - 1), torch.ones(x.shape[1], x.shape[1], device=x.device)
    visible = causal.bool().tril() & mask[:, None, :]
    latents = torch.randn(len(x), model.cfg.num_latents, x.shape[2], device=x.device)
    backward = lambda out: out.sum().backward()  # noqa: E731
    yield "vision", lambda: backward(model.vlm.projector(model.vlm.vision(images)))
    yield "LLM", lambda: backward(model.vlm.llm(x, positions, visible)[0])
    yield "decoders", lambda: backward(sum(d(latents).sum() for d in model.decoders.values()))
    step.loss().backward()
    yield "optimizer", step.optimizer.step


@dataclass(frozen=True)
class TrainBench:
    preset: Literal[tuple(PRESETS)] = "tiny"
    json: Path | None = None
    rounds: int = 7
    batch: int = 8
    # blocks of each vision tower and layers of the LLM, where the whole preset does not fit
    layers: int | None = None
    device: Literal["cpu", "cuda"] | None = None  # default: what is there

    def run(self) -> dict:
        cfg, device = model_of(self.preset, self.layers), device_of(self.device)
        torch.manual_seed(0)
        batch = random_batch(cfg, self.batch, device)
        ours = AuxVLA(cfg)
        ours.train_stage(2)
        naive = Step(NaivePort(cfg), batch, device, fused=False)
        steps = {"naive port": naive, "ours": Step(ours, batch, device, fused=True)}
        for step in steps.values():
            step()  # warm
        work = flops(lambda: steps["ours"].loss().backward()) / self.batch
        figures = in_turns({name: step.samples_per_s for name, step in steps.items()}, self.rounds)
        rate = matmul_rate(device)
        figures["limit: matrix products alone"] = spread([rate / work])
        split = {name: 1000 * seconds(run, device) for name, run in parts_of(steps["ours"])}
        return {
            "unit": "samples/s", "figures": figures, "FLOP per sample": work,
            "FLOP utilisation": figures["ours"]["median"] * work / rate,
            "kept for the backward pass (MB)": {
                name: kept_for_backward(step.loss) / 1e6 for name, step in steps.items()
            },
            "parts of ours, forward and backward (ms)": split, "data wait": "see `loader`",
        }  # fmt: skip


@dataclass(frozen=True)
class ActBench:
    preset: Literal[tuple(PRESETS)] = "tiny"
    json: Path | None = None
    queries: int = 100
    batches: tuple[int, ...] = (1, 4, 16, 64)
    layers: int | None = None  # as in `train`
    device: Literal["cpu", "cuda"] | None = None  # default: what is there

    def run(self) -> dict:
        cfg, device = model_of(self.preset, self.layers), device_of(self.device)
        torch.manual_seed(0)
        naive, ours = NaivePort(cfg).eval(), AuxVLA(cfg, flow_head=True).eval()
        adopt(ours, naive)
        tokenizer = build_tokenizer(replace(cfg.llm, tokenizer="words", first_action_id=256))
        stats = ActionStats((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
        flow = Policy(ours.to(device), stats, tokenizer, {}, device, predict=False)
        tokens = Policy(without_flow(ours), stats, tokenizer, {}, device, predict=False)
        naive.to(device)
        figures, differences = {}, 0
        for size in self.batches:
            rounds = max(5, self.queries // size)
            obs = [camera_frames(size, seed) for seed in range(rounds)]

            def reference(seen, size=size):
                return naive.act(tokens.batch(pictures(seen, device), "close the fridge"))

            runs = {"transformers generate": reference, "ours, tokens": query(tokens)}
            runs["ours, flow chunk"] = query(flow)
            for run in runs.values():
                run(obs[0])  # warm
            turns = {name: [] for name in runs}
            for seen in obs:
                for name, run in runs.items():
                    turns[name].append(1000 * seconds(lambda run=run, seen=seen: run(seen), device))
                differences += int((reference(seen).cpu() - query(tokens)(seen)).abs().max() > 1e-5)
            for name, values in turns.items():
                p50, p99 = np.percentile(values, (50, 99))
                figures[f"{name}, batch {size}"] = spread(values) | {"p50": p50, "p99": p99}
        return {"unit": "ms", "figures": figures, "queries with other actions": differences}


def camera_frames(size: int, seed: int) -> dict:
    """An observation of `size` environments, as MS-HAB gives it: random pictures."""
    generator = torch.Generator().manual_seed(seed)
    picture = (size, IMAGE_SIZE, IMAGE_SIZE)
    sensor = lambda: {  # noqa: E731
        "rgb": torch.randint(0, 256, (*picture, 3), generator=generator, dtype=torch.uint8),
        "depth": torch.randint(1, 4000, (*picture, 1), generator=generator, dtype=torch.int16),
    }
    return {"sensor_data": {f"fetch_{camera}": sensor() for camera in CAMERAS}}


def pictures(obs: dict, device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(each.to(device) for each in cameras(obs))


def query(policy: Policy) -> Callable[[dict], Tensor]:
    """Camera frames in, 13 floats an environment out."""

    def run(obs: dict) -> Tensor:
        policy.reset()
        return torch.from_numpy(policy.act(obs, "close the fridge"))

    return run


def without_flow(model: AuxVLA) -> AuxVLA:
    """The same weights as they are after stage 2."""
    tokens = AuxVLA(model.cfg).eval()
    tokens.vlm, tokens.decoders = model.vlm, model.decoders
    return tokens


def model_of(preset: str, layers: int | None):
    """A preset's model; with `layers`, that many in each tower and in the LLM."""
    cfg = model_config(preset)
    if layers is None:
        return cfg
    parts = {name: replace(getattr(cfg, name), depth=layers) for name in ("dino", "siglip", "llm")}
    return replace(cfg, **parts)


def device_of(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


# --- What is printed ---


def show(result: dict) -> None:
    width = max(map(len, result["figures"]))
    for name, figure in result["figures"].items():
        low, high = figure["min"], figure["max"]
        print(f"{name:{width}}  {figure['median']:10.4g} {result['unit']}  [{low:.4g}, {high:.4g}]")
    for name, value in result.items():
        if name not in ("unit", "figures"):
            print(f"{name}: {value}")


Verb = (
    Annotated[LoaderBench, tyro.conf.subcommand("loader")]
    | Annotated[TrainBench, tyro.conf.subcommand("train")]
    | Annotated[ActBench, tyro.conf.subcommand("act")]
)


def main(cfg: Verb) -> None:
    device = device_of(getattr(cfg, "device", "cpu"))
    if device.type == "cpu":
        torch.set_num_threads(1)  # one core's figures: steady, and comparable between machines
    result = cfg.run()
    show(result)
    if cfg.json:
        about = {"torch": torch.__version__, "platform": platform.platform()}
        about["device"] = torch.cuda.get_device_name() if device.type == "cuda" else processor()
        about["date"] = time.strftime("%Y-%m-%d")
        cfg.json.write_text(json.dumps({"about": about, **result}, indent=1, default=str) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


if __name__ == "__main__":
    with explained():
        main(tyro.cli(Verb, description=__doc__))
