"""Latency of an action: camera frames in, 13 floats out; `tools.bench act`."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from config import ACTION_DIM, CAMERAS, IMAGE_SIZE, PRESETS
from data import ActionStats, build_tokenizer, cameras
from distributed import device_of
from model import AuxVLA
from policy import Policy
from samples import open_data
from tools.bench_loader import seconds, spread
from tools.bench_train import model_of
from tools.naive import NaivePort, adopt
from trajectory import RECORD

SENTENCE = "close the kitchen drawer"


def as_seen(records: np.ndarray) -> dict:
    """Recorded frames [B] of RECORD as MS-HAB's observation of B environments."""
    rgb, depth = (torch.from_numpy(np.array(records[name])) for name in ("rgb", "depth"))
    return {
        "sensor_data": {
            f"fetch_{camera}": {"rgb": rgb[:, c], "depth": depth[:, c, ..., None]}
            for c, camera in enumerate(CAMERAS)
        }
    }


def random_frames(size: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        records = np.zeros(size, RECORD)
        records["rgb"] = rng.integers(0, 256, (size, len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE, 3))
        records["depth"] = rng.integers(1, 4000, (size, len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE))
        yield records


def recorded_frames(data: Path, size: int, count: int) -> Iterator[np.ndarray]:
    """`size` environments that move in step through recorded episodes, the last ones first."""
    source = open_data(data)
    starts, lengths = source.starts[:-1][::-1], np.diff(source.starts)[::-1]
    first = 0
    while count > 0:
        rows = (first + np.arange(size)) % len(lengths)
        steps = min(count, int(lengths[rows].min()))
        for t in range(steps):
            yield source.read(starts[rows] + t)
        first, count = first + size, count - steps


@dataclass
class Contestants:
    """The same weights in our policy, as tokens and as flow, and in the port."""

    tokens: Policy
    flow: Policy
    naive: NaivePort

    @classmethod
    def build(cls, preset: str, layers: int | None, checkpoint: Path | None, device: torch.device):
        torch.manual_seed(0)
        if checkpoint is not None:
            tokens = Policy.from_checkpoint(checkpoint, device.type)
            tokens.predict = False
        else:
            cfg = model_of(preset, layers)
            stats = ActionStats((-1.0,) * ACTION_DIM, (1.0,) * ACTION_DIM)
            tokenizer = build_tokenizer(replace(cfg.llm, tokenizer="words", first_action_id=256))
            model = AuxVLA(cfg).to(device).eval()
            tokens = Policy(model, stats, tokenizer, {}, device, predict=False)
        model = AuxVLA(tokens.model.cfg, flow_head=True)
        model.vlm, model.decoders = tokens.model.vlm, tokens.model.decoders
        flow = replace(tokens, model=model.to(device).eval(), graphs={})
        naive = NaivePort(tokens.model.cfg).to(device)
        adopt(naive, tokens.model)
        return cls(tokens, flow, naive.to(device).eval())

    def reference(self, obs: dict) -> Tensor:
        """By transformers' `generate`, from the same pictures: [B, 13] in robot units."""
        now = tuple(x.to(self.tokens.device) for x in cameras(obs))
        kind, on_gpu = self.tokens.device.type, self.tokens.device.type == "cuda"
        with torch.autocast(kind, torch.bfloat16, enabled=on_gpu):
            actions = self.naive.act(self.tokens.batch(now, SENTENCE))
        return self.tokens.stats.denormalize(actions).clamp(-1, 1).cpu()

    def runs(self) -> dict[str, Callable[[dict], Tensor]]:
        """Each looks at one observation; ours keeps its last action, as in an episode."""

        def query(policy: Policy, forget: bool) -> Callable[[dict], Tensor]:
            def run(obs: dict) -> Tensor:
                policy.queue.clear()  # look again: a chunk would be executed first
                if forget:
                    policy.reset()
                return torch.from_numpy(policy.act(obs, SENTENCE))

            policy.reset()
            return run

        return {
            "transformers generate": self.reference,
            "ours, tokens": query(self.tokens, forget=False),
            "ours, tokens, first step": query(replace(self.tokens, graphs={}), forget=True),
            "ours, flow chunk": query(self.flow, forget=False),
        }


@dataclass(frozen=True)
class ActBench:
    preset: Literal[tuple(PRESETS)] = "tiny"
    checkpoint: Path | None = None  # its weights, not random ones
    data: Path | None = None  # its frames, one after the other; default: random pictures
    json: Path | None = None
    queries: int = 100
    batches: tuple[int, ...] = (1, 4, 16, 64)
    layers: int | None = None  # as in `train`
    exact: int = 0  # also compare the tokens of so many frames
    device: Literal["cpu", "cuda"] | None = None  # default: what is there

    def frames(self, size: int, count: int) -> Iterator[np.ndarray]:
        return recorded_frames(self.data, size, count) if self.data else random_frames(size, count)

    def run(self) -> dict:
        device = device_of(self.device)
        all_ = Contestants.build(self.preset, self.layers, self.checkpoint, device)
        passes: list[int] = []
        all_.tokens.model.vlm.llm.register_forward_hook(lambda *_: passes.append(1))
        figures, spent, different = {}, Counter(), 0
        for size in self.batches:
            runs, turns = all_.runs(), {}
            count = max(min(5, self.queries), self.queries // size)
            for i, records in enumerate(self.frames(size, count + 1)):
                seen, said = as_seen(records), {}
                for name, run in runs.items():
                    passes.clear()
                    took = seconds(lambda: said.update({name: run(seen)}), device)  # noqa: B023
                    if i:  # the first warms up
                        turns.setdefault(name, []).append(1000 * took)
                    if i and size == 1 and name == "ours, tokens":
                        spent[len(passes)] += 1
                gap = said["transformers generate"] - said["ours, tokens"]
                different += int(gap.abs().max() > 1e-5)
            for name, values in turns.items():
                p50, p99 = np.percentile(values, (50, 99))
                figures[f"{name}, batch {size}"] = spread(values) | {"p50": p50, "p99": p99}
        out = {"unit": "ms", "figures": figures, "queries with other actions": different}
        out["passes of the LLM per query, batch 1"] = dict(sorted(spent.items()))
        return out | ({"exactness": self.compare(all_)} if self.exact else {})

    def compare(self, all_: Contestants, together: int = 64) -> dict[str, int]:
        """Tokens that differ from `generate`'s, ours one frame at a time with its draft."""
        ours, left, frames, other = all_.runs()["ours, tokens"], self.frames(1, self.exact), 0, 0
        while batch := [records for _, records in zip(range(together), left)]:
            mine = torch.cat([ours(as_seen(records)) for records in batch])  # [n, 13]
            theirs = all_.reference(as_seen(np.concatenate(batch)))
            other += int(((mine - theirs).abs() > 1e-5).sum())
            frames += len(batch)
        return {"frames": frames, "tokens": frames * ACTION_DIM, "different": other}
