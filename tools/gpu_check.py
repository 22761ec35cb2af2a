"""What to run first on a machine with a GPU: the tests that need one, then speed and memory.

    python -m tools.gpu_check --out FILE.json                # at most 8 minutes on an H100
    python -m tools.gpu_check --out FILE.json --preset tiny  # a CPU, too: 5 minutes

Weights and frames are random: no data, no network. Prints the table of docs/speed.md.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal

import torch
from tabulate import tabulate
from torch import nn

from config import Count, TrainConfig
from model import AuxVLA
from policy import Policy
from storage.files import write_json
from storage.terminal import cli, user_errors
from tools import bench
from tools.reference import Port
from training.memory import matmul_rate, memory_plan, sample_flop
from training.ranks import device_of, halve_frozen, missing_to_compile

TESTS = Path(__file__).parents[1] / "tests"
FRAMES = {2: (8, 16), 3: (32,)}  # of a training step, by stage
BATCHES = (1, 16)  # environments that ask for an action at once
COLUMNS = ("ours", "compiled", "transformers")
LIMIT = 360  # seconds after which no further measurement begins

Measurements = Iterator[tuple[str, str, Callable[[], dict]]]  # row, column, what measures


def build_model(cfg: TrainConfig, device: torch.device) -> AuxVLA:
    torch.compiler.reset()  # forgets the blocks of earlier models
    with device:
        return AuxVLA(cfg.model, flow_head=cfg.stage == 3).to(device)


def measure_step(model: nn.Module, cfg: TrainConfig, limit: float, rounds: int) -> dict:
    """Samples per second, their share of `limit` (mfu), the peak of memory in GiB and its plan."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = bench.build_step(model, cfg, device)
    figure = bench.in_turns({"": step}, range(rounds + 1))[""]
    *fixed, frame = memory_plan(cfg, 1, device).values()
    return figure | {
        "mfu": figure["median"] / limit,
        "peak": torch.cuda.max_memory_allocated() / 2**30,
        "plan": (sum(fixed) + cfg.batch_size * frame) / 2**30,
    }


def training(preset: str, device: torch.device, rounds: int, ways: list[str]) -> Measurements:
    rate = matmul_rate(device)
    print(f"a large matrix product: {rate / 1e12:.3g} TFLOP/s", flush=True)
    for stage, sizes in FRAMES.items():
        steps = [bench.train_config(preset, stage, size) for size in sizes]
        row = "training, stage {0.stage}, {0.batch_size} frames, samples/s"
        limit, model = rate / sample_flop(steps[0]), build_model(steps[0], device)
        halve_frozen(model, steps[0], device)
        model.train_stage(stage)
        for column in ways:
            model.prepare_blocks(compile=column == "compiled")
            for cfg in steps:
                yield row.format(cfg), column, partial(measure_step, model, cfg, limit, rounds)
        if stage == 2:
            run = partial(measure_step, Port(model).to(device).train(), steps[0], limit, rounds)
            yield row.format(steps[0]), "transformers", run


def measure_query(policy: Policy, size: int, draft: bool, rounds: int) -> dict:
    """Milliseconds from the frames of `size` environments, the same in all rounds, to actions."""
    policy.reset()
    # The action of the round before is the right draft.
    ask = policy.act if draft else partial(bench.act_first, policy)
    run = {"": lambda obs: 1000 * bench.seconds(lambda: ask(obs, bench.SENTENCE))}
    return bench.in_turns(run, [*bench.observations(None, size, 1)] * (rounds + 1))[""]


def acting(preset: str, device: torch.device, rounds: int, ways: list[str]) -> Measurements:
    tokens = {"tokens, right draft": True, "tokens, no draft": False}
    for stage, names in {2: tokens, 3: {"a chunk of the flow head": False}}.items():
        model = build_model(bench.train_config(preset, stage, 1), device)
        policies = {
            way: partial(bench.random_policy, model, device, compile=way == "compiled")
            for way in ways
        }
        if stage == 2:
            policies["transformers"] = partial(bench.naive_policy, Port(model), policies["ours"]())
        for column, build in policies.items():
            policy = build()
            for size, (name, draft) in product(BATCHES, names.items()):
                run = partial(measure_query, policy, size, draft, rounds)
                yield f"acting, {name}, batch {size}, ms", column, run


def cell(figure: dict) -> str:
    text = figure.get("missing") or (f"{figure['median']:.3g}" if figure else "")
    if "mfu" in figure:
        text += " ({mfu:.0%}; {peak:.1f} GiB, planned {plan:.1f})".format(**figure)
    return text


def main(out: Path, preset: Literal["paper", "tiny"] = "paper", rounds: Count = 10) -> None:
    """The tests marked `gpu`, then medians of `rounds`. Exits with 1 unless all tests passed."""
    began, device = time.perf_counter(), device_of("cuda" if preset == "paper" else None)
    about, figures, ways = bench.about(device), {}, ["ours", "compiled"]
    result = {"about": about, "pytest's exit code": None, "figures": figures}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)  # a folder that cannot be written to is named now
    if lacking := missing_to_compile(device.type):
        ways.remove("compiled")
        print(f"nothing will be compiled: this machine lacks {lacking}")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", TESTS])
    result["pytest's exit code"] = tests.returncode
    each = preset, device, rounds, ways
    for row, column, measure in chain(training(*each), acting(*each)):
        gc.collect()  # the model before: compiled blocks refer to themselves
        torch.cuda.empty_cache()
        figure = {"missing": "no time left"}
        try:
            if time.perf_counter() - began < LIMIT:
                figure = measure()
        except torch.cuda.OutOfMemoryError:
            figure = {"missing": "out of memory"}
        figures.setdefault(row, {})[column] = figure
        write_json(out, result)  # what was measured stands there if the next one is killed
        print(f"{row}, {column}: {cell(figure)}", flush=True)
    rows = [[row, *(cell(of.get(column, {})) for column in COLUMNS)] for row, of in figures.items()]
    print(tabulate(rows, [", ".join(map(str, about.values())), *COLUMNS], "pipe"))
    if tests.returncode:
        raise SystemExit(f"{out} is written, but pytest ended with {tests.returncode}: see above")


if __name__ == "__main__":
    with user_errors():
        cli(main, description=__doc__)
