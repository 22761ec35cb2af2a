"""The speed of our code beside what a user would otherwise run, measured in one process.

    python -m tools.bench loader --data DATA --json FILE   # DATA: files in MS-HAB's layout
    python -m tools.bench train --preset tiny --json FILE
    python -m tools.bench act --preset tiny --json FILE    # or --checkpoint RUN/stage2 --data DATA

The contestants take turns, one round each, on one CPU thread or one GPU. A figure is the median of
the rounds, with minimum and maximum. `train` and `act` compare with tools/reference.py.
"""

import json as json_module
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import h5py
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import ACTION_DIM, CAMERAS, PRESETS, ModelConfig, model_config, user_errors
from data import ActionStats, Frames, batch_shapes
from model import AuxVLA
from policy import Policy
from storage.h5 import Demonstrations, Episode
from storage.pack import Pack, open_data, pack
from storage.tokenizer import build_tokenizer
from storage.trajectory import RECORD
from tools.reference import build_pair
from training.memory import kept_for_backward
from training.order import StepOrder
from training.ranks import device_of

SENTENCE = "close the kitchen drawer"
Preset = Literal[tuple(PRESETS)]
Device = Literal["cpu", "cuda"] | None


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """Call every contestant once a round; {name: median, min, max and p99 of its values}."""
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            values[name].append(contestant())
    return {  # the first round warms up
        name: dict(zip(("median", "min", "max", "p99"), np.percentile(each[1:], (50, 0, 100, 99))))
        for name, each in values.items()
    }


def report(json: Path | None, unit: str, figures: dict[str, dict], **more) -> None:
    """Print the figures as a table; write the figures and this machine's names as JSON."""
    width = max(map(len, figures))
    for name, figure in figures.items():
        low, high = figure["min"], figure["max"]
        print(f"{name:{width}}  {figure['median']:10.4g} {unit}  [{low:.4g}, {high:.4g}]")
    for name, value in more.items():
        print(f"{name}: {value}")
    if json:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
        about = {
            "torch": torch.__version__, "platform": platform.platform(),
            "device": gpu or platform.processor() or platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        result = {"about": about, "unit": unit, "figures": figures, **more}
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(result, indent=1, default=float) + "\n", encoding="utf-8")


# --- Frames per second of the loader ---


def single_reads(source: Demonstrations, count: int) -> float:
    """Frames per second of one read per dataset and frame, as in MS-HAB's own loader."""
    files = {name: h5py.File(source.folder / name) for name in {e.file for e in source.episodes}}
    paths = ["actions", "obs/agent/qpos", "obs/extra/is_grasped", "obs/extra/obj_pose_wrt_base"]
    paths += [f"obs/sensor_data/fetch_{c}/{kind}" for c in CAMERAS for kind in ("rgb", "depth")]
    rng = np.random.default_rng(0)

    def read(episode: Episode) -> list[np.ndarray]:
        group, t = files[episode.file][episode.trajectory], rng.integers(episode.length)
        return [group[path][t] for path in paths]

    return count / seconds(lambda: [read(e) for e in rng.choice(source.episodes, count)])


def epoch(source: Demonstrations | Pack, size: int) -> float:
    """Frames per second of an epoch of ours in batches of `size`."""
    frames = Frames(source, held_out=0.02, train=True)
    steps = len(frames) // size
    order = StepOrder(
        len(frames), size, seed=0, first=0, last=steps, rank=0, world=1, blocks=frames.blocks
    )
    return steps * size / seconds(lambda: [frames[rows] for rows in order])


def loader(data: Path, json: Path | None = None, rounds: int = 5, batch: int = 64) -> None:
    """Frames per second of the loader, beside reading one frame at a time.

    Args:
        data: demonstrations in MS-HAB's layout
    """
    source = Demonstrations(data)
    with TemporaryDirectory() as folder:
        pack(str(data), folder)
        contestants = {
            "one frame, one read (MS-HAB)": lambda: single_reads(source, 200),
            # Opened anew, so that a round finds no blocks of the last round in memory
            "ours, files": lambda: epoch(Demonstrations(data), batch),
            "ours, pack": lambda: epoch(Pack(folder), batch),
        }
        report(json, "frames/s", in_turns(contestants, rounds), frames=len(source))


# --- Samples per second of a training step ---


def build_config(preset: str, layers: int | None) -> ModelConfig:
    """A preset; with `layers` its encoders and LLM have that many blocks or layers."""
    cfg = model_config(preset)
    for part in ("dino", "siglip", "llm") if layers else ():
        cfg = replace(cfg, **{part: replace(getattr(cfg, part), depth=layers)})
    return cfg


def random_batch(cfg: ModelConfig, size: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of data.py's schema with random content and every label."""
    generator = torch.Generator().manual_seed(0)
    shapes = batch_shapes(cfg, size)
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    batch["prompt_ids"] = torch.randint(2, 60, shapes["prompt_ids"], generator=generator)
    batch["actions"] = 2 * batch["actions"] - 1
    for name in shapes:
        if name.startswith("has_") or name.endswith("_mask"):
            batch[name] = torch.ones(shapes[name], dtype=torch.bool)
    return {name: value.to(device) for name, value in batch.items()}


class Step:
    """A training step of stage 2: forward, backward, Adam."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], fused: bool):
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=fused)

    def loss(self) -> Tensor:
        kind = self.batch["images"].device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return sum(self.model(self.batch, 2).values())

    def run(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def samples_per_s(self) -> float:
        return len(self.batch["images"]) / seconds(self.run)


def train(
    preset: Preset = "tiny", layers: int | None = None, device: Device = None,
    json: Path | None = None, rounds: int = 7, batch: int = 8,
) -> None:  # fmt: skip
    """Samples per second of a training step of stage 2, beside the port's.

    Args:
        layers: blocks of each encoder and layers of the LLM, if the whole preset does not fit
    """
    place = device_of(device)
    torch.manual_seed(0)
    port, ours = (model.to(place).train() for model in build_pair(build_config(preset, layers)))
    ours.train_stage(2)
    samples = random_batch(ours.cfg, batch, place)
    steps = {"naive port": Step(port, samples, False), "ours": Step(ours, samples, True)}
    with FlopCounterMode(display=False) as counter:
        steps["ours"].loss().backward()
    work = counter.get_total_flops() / batch
    figures = in_turns({name: step.samples_per_s for name, step in steps.items()}, rounds)
    kept = {name: kept_for_backward(step.model, step.loss) / 1e6 for name, step in steps.items()}
    more = {"FLOP per sample": work, "FLOP per s": work * figures["ours"]["median"]}
    report(json, "samples/s", figures, **more, **{"kept for the backward pass (MB)": kept})


# --- Latency of an action ---


class PortPolicy(Policy):
    def query(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict]:
        return self.run(inputs, False)  # a CUDA graph cannot capture `generate`


def build_policies(
    cfg: ModelConfig, checkpoint: Path | None, device: torch.device
) -> tuple[Policy, Policy, Policy]:
    """Our policy that decodes tokens, ours that denoises a chunk, the port's.

    With a checkpoint ours has its weights, the port random ones.
    """
    torch.manual_seed(0)
    if checkpoint:
        tokens = Policy.from_checkpoint(checkpoint, device.type)
        port, _ = build_pair(tokens.model.cfg)
    else:
        port, ours = build_pair(cfg)
        stats = ActionStats((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)  # normalised actions
        words = replace(cfg.llm, tokenizer="words", first_action_id=256)  # needs no file
        tokens = Policy(ours.to(device).eval(), stats, build_tokenizer(words), {}, device)
    tokens.predict = False
    flow = AuxVLA(tokens.model.cfg, flow_head=True, meta=True)
    flow.vlm, flow.decoders = tokens.model.vlm, tokens.model.decoders
    naive = PortPolicy(port.to(device).eval(), tokens.stats, tokens.tokenizer, {}, device)
    return tokens, replace(tokens, model=flow.to(device).eval(), graphs={}), naive


def observations(data: Path | None, size: int, count: int) -> Iterator[dict]:
    """`count` of MS-HAB's observations of `size` environments that step together.

    Each environment sees its own share of the frames of `data`, or random pictures.
    """
    source, rng = open_data(data) if data else None, np.random.default_rng(0)
    for t in range(count):
        if source is None:
            records = np.frombuffer(rng.bytes(size * RECORD.itemsize), RECORD)
        else:
            rows = len(source) * np.arange(1, size + 1) // size - count + t
            records = source.read(rows % len(source))
        rgb, depth = (torch.from_numpy(np.array(records[key])) for key in ("rgb", "depth"))
        yield {
            "sensor_data": {
                f"fetch_{camera}": {"rgb": rgb[:, c], "depth": depth[:, c, ..., None]}
                for c, camera in enumerate(CAMERAS)
            }
        }


def first_step(policy: Policy, obs: dict) -> np.ndarray:
    """The first action [B, 13] of an episode: no draft yet, no actions left of a chunk."""
    policy.reset()
    return policy.act(obs, SENTENCE)


def act(
    preset: Preset = "tiny", layers: int | None = None, device: Device = None,
    json: Path | None = None, checkpoint: Path | None = None, data: Path | None = None,
    queries: int = 100, batches: tuple[int, ...] = (1, 4, 16, 64), exact: int | None = None,
) -> None:  # fmt: skip
    """Milliseconds of a query, camera frames in and actions out, beside transformers' generate.

    Args:
        layers: blocks of each encoder and layers of the LLM, if the whole preset does not fit
        checkpoint: weights of ours; the port keeps random ones
        data: frames, one after the other; default: random pictures
        exact: frames whose tokens are compared with the port's; default: as many as queries
    """
    cfg = build_config(preset, layers)
    tokens, flow, naive = build_policies(cfg, checkpoint, device_of(device))
    without_draft = replace(tokens, graphs={})
    runs = {
        "transformers generate": lambda obs: first_step(naive, obs),
        # The last action is the draft of the next one, as in an episode.
        "ours, tokens": lambda obs: tokens.act(obs, SENTENCE),
        "ours, tokens, first step": lambda obs: first_step(without_draft, obs),
        "ours, flow chunk": lambda obs: first_step(flow, obs),
    }

    def latency(run: Callable[[dict], np.ndarray], seen: list[dict]) -> Callable[[], float]:
        left = iter(seen)
        return lambda: 1000 * seconds(lambda: run(next(left)))

    figures = {}
    for size in batches:
        tokens.reset()
        count = max(min(5, queries), queries // size)
        seen = list(observations(data, size, count + 1))
        timed = {f"{name}, batch {size}": latency(run, seen) for name, run in runs.items()}
        figures |= in_turns(timed, count)
    frames = observations(data, 1, exact or queries)
    report(json, "ms", figures, **compare_tokens(tokens, None if checkpoint else naive, frames))


def compare_tokens(ours: Policy, naive: Policy | None, frames: Iterator[dict]) -> dict[str, dict]:
    """Our LLM passes for each frame, and the number of our tokens that differ from generate's."""
    calls: list[int] = []
    ours.model.vlm.llm.register_forward_hook(lambda *_: calls.append(1))
    ours.reset()
    passes, different = Counter(), 0
    for obs in frames:
        calls.clear()
        actions = ours.act(obs, SENTENCE)
        passes[len(calls)] += 1
        if naive:
            different += int((np.abs(actions - first_step(naive, obs)) > 1e-5).sum())
    out = {"passes of the LLM per query, batch 1": dict(sorted(passes.items()))}
    if naive:
        count = passes.total()
        out["exactness"] = dict(frames=count, tokens=count * ACTION_DIM, different=different)
    return out


VERBS = {"loader": loader, "train": train, "act": act}

if __name__ == "__main__":
    torch.set_num_threads(1)  # figures of one core are steady, and comparable between machines
    with user_errors():
        tyro.extras.subcommand_cli_from_dict(VERBS, description=__doc__)
