"""A training step of ours and of the port; `tools.bench train`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import ACTION_DIM, IMAGE_SIZE, PRESETS, RECORDED_ACTIONS, model_config
from distributed import device_of
from flow_head import draw_noise
from memory import kept_for_backward
from model import AuxVLA
from tools.bench_loader import in_turns, seconds, spread
from tools.naive import NaivePort


def model_of(preset: str, layers: int | None):
    """A preset's model; with `layers`, that many in each tower and in the LLM."""
    cfg = model_config(preset)
    if layers is None:
        return cfg
    parts = {name: replace(getattr(cfg, name), depth=layers) for name in ("dino", "siglip", "llm")}
    return replace(cfg, **parts)


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
        "obj": rand(size, 7),
    }  # fmt: skip
    batch["seg"] = (rand(size, len(cfg.cameras), IMAGE_SIZE, IMAGE_SIZE) > 0.5).float()
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
    table = model.vlm.llm.rope(mask.cumsum(-1) - 1)
    visible = mask.new_ones(x.shape[1], x.shape[1]).tril() & mask[:, None, None, :]
    latents = torch.randn(len(x), model.cfg.num_latents, x.shape[2], device=x.device)
    backward = lambda out: out.sum().backward()  # noqa: E731
    yield "vision", lambda: backward(model.vlm.projector(model.vlm.vision(images)))
    yield "LLM", lambda: backward(model.vlm.llm(x, table, visible)[0])
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
                name: kept_for_backward(step.model, step.loss) / 1e6 for name, step in steps.items()
            },
            "parts of ours, forward and backward (ms)": split, "data wait": "see `loader`",
        }  # fmt: skip
