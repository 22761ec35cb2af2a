"""The speed of ours beside what a user would otherwise run, measured in one process.

    python -m tools.bench loader --data DATA --json FILE   # DATA: files in MS-HAB's layout
    python -m tools.bench train --preset tiny --json FILE
    python -m tools.bench act --preset tiny --json FILE    # or --checkpoint RUN/stage2 --data DATA

The contestants take turns, one round each, on one CPU thread or one GPU; a figure is the median of
its rounds, with the smallest and the largest. `train` and `act` compare with tools/reference.py.
"""

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from data import Frames, batch_shapes
from model import AuxVLA
from policy import Policy
from storage.h5 import Demonstrations, Episode
from storage.pack import Pack, open_data, pack
from storage.trajectory import RECORD
from tools.reference import Port
from training.memory import kept_for_backward
from training.order import StepOrder
from training.ranks import device_of

SENTENCE = "close the kitchen drawer"


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    figures = np.percentile(values, (50, 0, 100, 99)).tolist()
    return dict(zip(("median", "min", "max", "p99"), figures))


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """Each contestant gives one value a round; {name: spread of its values}."""
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            values[name].append(contestant())
    return {name: spread(each[1:]) for name, each in values.items()}  # the first round warms up


# --- Frames per second of the loader ---


def single_reads(source: Demonstrations, count: int) -> float:
    """The reference: one read of each dataset for one frame, as MS-HAB's own loader does it."""
    files = {name: h5py.File(source.folder / name) for name in {e.file for e in source.episodes}}
    paths = ["actions", "obs/agent/qpos", "obs/extra/is_grasped", "obs/extra/obj_pose_wrt_base"]
    paths += [f"obs/sensor_data/fetch_{c}/{kind}" for c in CAMERAS for kind in ("rgb", "depth")]
    rng = np.random.default_rng(0)

    def read(episode: Episode) -> list[np.ndarray]:
        group, t = files[episode.file][episode.trajectory], rng.integers(episode.length)
        return [group[path][t] for path in paths]

    return count / seconds(lambda: [read(e) for e in rng.choice(source.episodes, count)])


def epoch(source: Demonstrations | Pack, size: int) -> float:
    """An epoch of ours in batches of `size`."""
    frames = Frames(source, held_out=0.02, train=True)
    steps = len(frames) // size
    order = StepOrder(
        len(frames), size, seed=0, first=0, last=steps, rank=0, world=1, blocks=frames.blocks
    )
    return steps * size / seconds(lambda: [frames[rows] for rows in order])


def inflate(source: Demonstrations) -> float:
    """The limit of the files: whole trajectories, one after the other."""
    chosen = range(min(40, len(source.episodes)))
    count = sum(source.episodes[e].length for e in chosen)
    return count / seconds(lambda: [source.read_episode(e) for e in chosen])


@dataclass(frozen=True)
class Loader:
    """Frames per second of the loader, beside reading one frame at a time."""

    data: Path  # demonstrations in MS-HAB's layout
    json: Path | None = None
    rounds: int = 5
    batch: int = 64

    def run(self) -> dict:
        source = Demonstrations(self.data)
        with TemporaryDirectory() as folder:
            pack(str(self.data), folder)
            contestants = {
                "one frame, one read (MS-HAB)": lambda: single_reads(source, 200),
                # Opened anew, so that no round finds the blocks of the last one in memory.
                "ours, files": lambda: epoch(Demonstrations(self.data), self.batch),
                "ours, pack": lambda: epoch(Pack(folder), self.batch),
                "limit of files: inflate": lambda: inflate(source),
            }
            figures = in_turns(contestants, self.rounds)
        return {"unit": "frames/s", "frames": len(source), "figures": figures}


# --- Samples per second of a training step ---


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The model that `train` and `act` measure."""

    preset: Literal[tuple(PRESETS)] = "tiny"
    # blocks of each vision tower and layers of the LLM, where the whole preset does not fit
    layers: int | None = None
    device: Literal["cpu", "cuda"] | None = None  # default: what is there
    json: Path | None = None

    @property
    def cfg(self) -> ModelConfig:
        cfg = model_config(self.preset)
        for part in ("dino", "siglip", "llm") if self.layers else ():
            cfg = replace(cfg, **{part: replace(getattr(cfg, part), depth=self.layers)})
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

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def samples_per_s(self) -> float:
        return len(self.batch["images"]) / seconds(self)


def matmul_rate(device: torch.device, size: int = 2048, repeats: int = 8) -> float:
    """FLOP per second of a large matrix product in the type that training uses."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=kind)
    seconds(lambda: a @ a)  # warms up
    return repeats * 2 * size**3 / seconds(lambda: [a @ a for _ in range(repeats)])


@dataclass(frozen=True)
class Train(Measured):
    """Samples per second of a training step of stage 2, beside the port's."""

    rounds: int = 7
    batch: int = 8

    def run(self) -> dict:
        cfg, device = self.cfg, device_of(self.device)
        torch.manual_seed(0)
        batch = random_batch(cfg, self.batch, device)
        port, ours = Port(cfg).to(device).train(), AuxVLA(cfg).to(device)
        ours.train_stage(2)
        theirs, mine = Step(port, batch, fused=False), Step(ours, batch, fused=True)
        steps = {"naive port": theirs, "ours": mine}
        with FlopCounterMode(display=False) as counter:
            mine.loss().backward()
        work = counter.get_total_flops() / self.batch
        figures = in_turns({name: step.samples_per_s for name, step in steps.items()}, self.rounds)
        rate = matmul_rate(device)
        figures["limit: matrix products alone"] = spread([rate / work])
        kept = {name: kept_for_backward(step.model, step.loss) for name, step in steps.items()}
        return {
            "unit": "samples/s", "figures": figures, "FLOP per sample": work,
            "FLOP utilisation": figures["ours"]["median"] * work / rate,
            "kept for the backward pass (MB)": {name: n / 1e6 for name, n in kept.items()},
        }  # fmt: skip


# --- Latency of an action ---


def first_step(policy: Policy, obs: dict) -> np.ndarray:
    """The action [B, 13] of an episode's first step: without a draft, and without a chunk left."""
    policy.reset()
    return policy.act(obs, SENTENCE)


def latency(run: Callable[[dict], np.ndarray], seen: list[dict]) -> Callable[[], float]:
    """Milliseconds of the next query."""
    left = iter(seen)
    return lambda: 1000 * seconds(lambda: run(next(left)))


@dataclass(frozen=True)
class Act(Measured):
    """Milliseconds of a query, camera frames in and actions out, beside transformers' generate."""

    checkpoint: Path | None = None  # its weights in ours; the port keeps random ones
    data: Path | None = None  # its frames, one after the other; default: random pictures
    queries: int = 100
    batches: tuple[int, ...] = (1, 4, 16, 64)
    exact: int | None = None  # frames whose tokens are compared; default: as many as queries

    def policies(self, device: torch.device) -> tuple[Policy, Policy, Port]:
        """Ours that decodes tokens, ours that denoises a chunk, and the port."""
        torch.manual_seed(0)
        if self.checkpoint is None:
            port = Port(self.cfg)
            tokens = port.as_policy(device)
        else:
            tokens = Policy.from_checkpoint(self.checkpoint, device.type)
            port = Port(tokens.model.cfg)
        tokens.predict = False
        model = AuxVLA(tokens.model.cfg, flow_head=True)
        model.vlm, model.decoders = tokens.model.vlm, tokens.model.decoders
        flow = replace(tokens, model=model.to(device).eval(), graphs={})
        return tokens, flow, port.to(device).eval()

    def frames(self, size: int, count: int) -> Iterator[dict]:
        """What `size` environments that move in step see, `count` of MS-HAB's observations."""
        source, rng = open_data(self.data) if self.data else None, np.random.default_rng(0)
        for t in range(count):
            if source is None:
                records = np.frombuffer(rng.bytes(size * RECORD.itemsize), RECORD)
            else:  # each environment has a share of the frames, of which it sees the last ones
                rows = len(source) * np.arange(1, size + 1) // size - count + t
                records = source.read(rows % len(source))
            rgb, depth = (torch.from_numpy(np.array(records[key])) for key in ("rgb", "depth"))
            yield {
                "sensor_data": {
                    f"fetch_{camera}": {"rgb": rgb[:, c], "depth": depth[:, c, ..., None]}
                    for c, camera in enumerate(CAMERAS)
                }
            }

    def run(self) -> dict:
        tokens, flow, port = self.policies(device_of(self.device))
        without_draft = replace(tokens, graphs={})
        runs = {
            "transformers generate": lambda obs: port.query(tokens, obs, SENTENCE),
            # its last action is the draft of the next one, as in an episode
            "ours, tokens": lambda obs: tokens.act(obs, SENTENCE),
            "ours, tokens, first step": lambda obs: first_step(without_draft, obs),
            "ours, flow chunk": lambda obs: first_step(flow, obs),
        }
        figures = {}
        for size in self.batches:
            tokens.reset()
            count = max(min(5, self.queries), self.queries // size)
            seen = list(self.frames(size, count + 1))
            queries = {f"{name}, batch {size}": latency(run, seen) for name, run in runs.items()}
            figures |= in_turns(queries, count)
        return {"unit": "ms", "figures": figures, **self.compare(tokens, port)}

    def compare(self, tokens: Policy, port: Port) -> dict[str, dict]:
        """Frame after frame: the passes of ours, and its tokens that differ from `generate`'s."""
        calls: list[int] = []
        tokens.model.vlm.llm.register_forward_hook(lambda *_: calls.append(1))
        tokens.reset()
        passes, different, count = Counter(), 0, self.exact or self.queries
        for obs in self.frames(1, count):
            calls.clear()
            ours = tokens.act(obs, SENTENCE)
            passes[len(calls)] += 1
            if self.checkpoint is None:
                different += int((np.abs(ours - port.query(tokens, obs, SENTENCE)) > 1e-5).sum())
        out = {"passes of the LLM per query, batch 1": dict(sorted(passes.items()))}
        if self.checkpoint is None:
            out["exactness"] = dict(frames=count, tokens=count * ACTION_DIM, different=different)
        return out


# --- What is printed ---


def show(result: dict) -> None:
    width = max(map(len, result["figures"]))
    for name, figure in result["figures"].items():
        low, high = figure["min"], figure["max"]
        print(f"{name:{width}}  {figure['median']:10.4g} {result['unit']}  [{low:.4g}, {high:.4g}]")
    for name, value in result.items():
        if name not in ("unit", "figures"):
            print(f"{name}: {value}")


def device_name() -> str:
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if "model name" in line), "CPU")


Verb = Loader | Train | Act


def main(bench: Verb) -> None:
    if bench.json:
        bench.json.parent.mkdir(parents=True, exist_ok=True)  # fails before the run, not after
    result = bench.run()
    show(result)
    if bench.json:
        about = {
            "torch": torch.__version__, "platform": platform.platform(),
            "device": device_name(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        text = json.dumps({"about": about, **result}, indent=1) + "\n"
        bench.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # one core's figures are steady, and comparable between machines
    with user_errors():
        main(tyro.cli(Verb, description=__doc__))
