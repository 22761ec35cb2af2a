"""Measure the speed of our code and of what a user would otherwise run, in one process.

    python -m tools.bench loader --data DATA --json FILE   # DATA: files in MS-HAB's layout
    python -m tools.bench train --preset tiny --json FILE
    python -m tools.bench act --preset tiny --json FILE    # or --checkpoint RUN/stage2 --data DATA

The contestants take turns, one round each, on one CPU thread or one GPU. The table shows median,
minimum and maximum of the rounds. `train` and `act` compare with tools/reference.py. All figures of
a GPU at once: tools/gpu_check.py.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from config import ACTION_DIM, CAMERAS, PRESETS, Count, ModelConfig, TrainConfig, model_config
from data import ActionStats, Frames, batch_shapes
from decoders import label_counts
from model import AuxVLA
from policy import Graphs, Policy, prepare
from storage.files import code_commit, write_json
from storage.h5 import Demonstrations, Episode
from storage.pack import Pack, open_data, pack
from storage.terminal import cli, user_errors
from storage.tokenizer import build_tokenizer
from storage.trajectory import RECORD
from tools.reference import build_pair
from train import take_step
from training.order import StepOrder
from training.ranks import Ranks, autocast, device_of

SENTENCE = "close the kitchen drawer"
Preset = Literal[tuple(PRESETS)]
Device = Literal["cpu", "cuda"] | None


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(contestants: dict[str, Callable], inputs: Iterable) -> dict[str, dict]:
    """Give each input to all contestants; return median, min, max and p99 of what they return."""
    rounds = [[contestant(each) for contestant in contestants.values()] for each in inputs]
    figures = np.percentile(rounds[1:], (50, 0, 100, 99), axis=0).T  # the first round warms up
    return {
        name: dict(zip(("median", "min", "max", "p99"), figure))
        for name, figure in zip(contestants, figures)
    }


def about(device: torch.device) -> dict[str, str | None]:
    """The device's name and this code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    name, today = gpu or platform.processor() or platform.machine(), time.strftime("%Y-%m-%d")
    return dict(device=name, torch=torch.__version__, commit=code_commit(), date=today)


def report(path: Path | None, unit: str, figures: dict[str, dict], **more) -> None:
    """Print the figures as a table; write them as JSON."""
    width = max(map(len, figures))
    for name, figure in figures.items():
        low, high = figure["min"], figure["max"]
        print(f"{name:{width}}  {figure['median']:10.4g} {unit}  [{low:.4g}, {high:.4g}]")
    for name, value in more.items():
        print(f"{name}: {value}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"unit": unit, "figures": figures, **more})


# --- Frames per second of the loader ---


def read_singly(source: Demonstrations, count: int) -> float:
    """Frames per second of one read per dataset and frame, as in MS-HAB's own loader."""
    files = {name: h5py.File(source.folder / name) for name in {e.file for e in source.episodes}}
    paths = ["actions", "obs/agent/qpos", "obs/extra/is_grasped", "obs/extra/obj_pose_wrt_base"]
    paths += [f"obs/sensor_data/fetch_{c}/{kind}" for c in CAMERAS for kind in ("rgb", "depth")]
    rng = np.random.default_rng(0)

    def read(episode: Episode) -> list[np.ndarray]:
        group, t = files[episode.file][episode.trajectory], rng.integers(episode.length)
        return [group[path][t] for path in paths]

    return count / seconds(lambda: [read(e) for e in rng.choice(source.episodes, count)])


def read_epoch(source: Demonstrations | Pack, size: int) -> float:
    """Frames per second of an epoch of ours in batches of `size`."""
    frames = Frames(source, held_out=0.02, train=True)
    steps = len(frames) // size
    order = StepOrder(len(frames), size, 0, 0, steps, rank=0, world=1, blocks=frames.blocks)
    return steps * size / seconds(lambda: [frames[rows] for rows in order])


def loader(data: Path, json: Path | None = None, rounds: Count = 5, batch: Count = 64) -> None:
    """Frames per second of the loader, beside reading one frame at a time.

    Args:
        data: demonstrations in MS-HAB's layout
    """
    source = Demonstrations(data)
    with TemporaryDirectory() as folder:
        pack(str(data), folder)
        contestants = {
            "one frame, one read (MS-HAB)": lambda _: read_singly(source, 200),
            # Opened anew, so that a round finds no blocks of the last round in memory
            "ours, files": lambda _: read_epoch(Demonstrations(data), batch),
            "ours, pack": lambda _: read_epoch(Pack(folder), batch),
        }
        figures = in_turns(contestants, range(rounds + 1))
        report(json, "frames/s", figures, frames=len(source), about=about(torch.device("cpu")))


# --- Samples per second of a training step ---


def random_batch(cfg: ModelConfig, size: int, device: torch.device) -> dict[str, Tensor]:
    """A batch of data.py's schema with random content and every label."""
    generator = torch.Generator().manual_seed(0)
    shapes = batch_shapes(cfg, size, noise=True)
    batch = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    batch["prompt_ids"] = torch.randint(2, 60, shapes["prompt_ids"], generator=generator)
    batch["actions"] = 2 * batch["actions"] - 1
    for name in shapes:
        if name.startswith("has_") or name.endswith("_mask"):
            batch[name] = torch.ones(shapes[name], dtype=torch.bool)
    return {name: value.to(device) for name, value in batch.items()}


def train_config(preset: str, stage: int, batch: int) -> TrainConfig:
    settings = dict(stage=stage, batch_size=batch, micro_batch=batch)
    return replace(TrainConfig(), **PRESETS[preset] | settings)


def build_step(model: nn.Module, cfg: TrainConfig, device: torch.device) -> Callable[[int], float]:
    """train.py's step on a random batch. A call returns samples per second."""
    ours = isinstance(model, AuxVLA)
    parts = model.trained_parts() if ours else [[*model.parameters()]]
    optimizer = torch.optim.Adam([{"params": part} for part in parts], fused=ours)
    batch, ranks = random_batch(cfg.model, cfg.batch_size, device), Ranks(0, 1, device)

    def step() -> None:
        batch["counts"] = label_counts(batch)  # take_step removes them
        take_step(model, optimizer, batch, cfg.lr, cfg, ranks)

    return lambda _: cfg.batch_size / seconds(step)


def train(
    preset: Preset = "tiny", device: Device = None, json: Path | None = None, rounds: Count = 7,
    batch: Count = 8,
) -> None:  # fmt: skip
    """Samples per second of a training step of stage 2, beside the port's."""
    place, cfg = device_of(device), train_config(preset, 2, batch)
    torch.manual_seed(0)
    port, ours = (model.to(place).train() for model in build_pair(cfg.model))
    ours.train_stage(2)
    steps = {"naive port": build_step(port, cfg, place), "ours": build_step(ours, cfg, place)}
    report(json, "samples/s", in_turns(steps, range(rounds + 1)), about=about(place))


# --- Latency of an action ---


def random_policy(model: AuxVLA, device: torch.device, compile: bool = False) -> Policy:
    """A policy of a model's random weights."""
    stats = ActionStats((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)  # normalised actions
    tokenizer = build_tokenizer(replace(model.cfg.llm, tokenizer="words"))  # needs no file
    return Policy(prepare(model, device, compile), stats, tokenizer, {}, device, predict=False)


def naive_policy(port: nn.Module, policy: Policy) -> Policy:
    """The port as a policy, in autocast; CUDA graphs cannot capture its `generate`."""
    port.act = autocast(policy.device)(port.act)
    return replace(policy, model=port.to(policy.device).eval())


def observations(data: Path | None, size: int, count: int) -> Iterator[dict]:
    """`count` of MS-HAB's observations of `size` environments that step together.

    Each environment sees its own share of the frames of `data`, or random pictures.
    """
    source, rng = open_data(data) if data else None, np.random.default_rng(0)
    for t in range(count):
        if source:
            rows = len(source) * np.arange(1, size + 1) // size - count + t
            records = source.read(rows % len(source))
        else:
            records = np.frombuffer(rng.bytes(size * RECORD.itemsize), RECORD)
        rgb, depth = (torch.from_numpy(np.array(records[key])) for key in ("rgb", "depth"))
        sensors = {
            f"fetch_{camera}": {"rgb": rgb[:, c], "depth": depth[:, c, ..., None]}
            for c, camera in enumerate(CAMERAS)
        }
        yield {"sensor_data": sensors}


def act_first(policy: Policy, obs: dict, instruction: str = SENTENCE) -> np.ndarray:
    """The first action [B, 13] of an episode: no draft yet, no actions left of a chunk."""
    policy.reset()
    return policy.act(obs, instruction)


def act(
    preset: Preset = "tiny", device: Device = None, json: Path | None = None,
    checkpoint: Path | None = None, data: Path | None = None, queries: Count = 100,
    batches: tuple[Count, ...] = (1, 4, 16, 64),
) -> None:  # fmt: skip
    """Milliseconds of a query, camera frames in and actions out, beside transformers' generate.

    Args:
        checkpoint: weights of ours; the port keeps random ones
        data: frames, one after the other; unset: random pictures
    """
    place = device_of(device)
    torch.manual_seed(0)
    given = Policy.from_checkpoint(checkpoint, place.type) if checkpoint else None
    port, ours = build_pair(given.model.cfg if given else model_config(preset))
    policy = replace(given or random_policy(ours, place), predict=False)
    policy.model.flow_head = None  # a flow head would act from its queue
    naive = naive_policy(port, policy)
    without_draft, figures, more = replace(policy, graphs=Graphs()), {}, {}
    runs = {
        "transformers generate": partial(act_first, naive),
        # The last action is the draft of the next one, as in an episode.
        "ours, tokens": lambda obs: policy.act(obs, SENTENCE),
        "ours, tokens, first step": partial(act_first, without_draft),
    }
    for size in batches:
        policy.reset()
        timed = {
            f"{name}, batch {size}": lambda obs, run=run: 1000 * seconds(lambda: run(obs))
            for name, run in runs.items()
        }
        count = max(min(5, queries), queries // size)
        figures |= in_turns(timed, observations(data, size, count + 1))
    if not checkpoint:
        policy.reset()
        frames = observations(data, 1, queries)
        gaps = np.stack([policy.act(obs, SENTENCE) - act_first(naive, obs) for obs in frames])
        different = int((np.abs(gaps) > 1e-5).sum())  # of [frames, 1, 13]
        more = {"exactness": {"tokens": gaps.size, "different": different}}
    report(json, "ms", figures, **more, about=about(place))


VERBS = {"loader": loader, "train": train, "act": act}

if __name__ == "__main__":
    torch.set_num_threads(1)  # figures of one core are steady, and comparable between machines
    with user_errors():
        cli(VERBS, description=__doc__)
