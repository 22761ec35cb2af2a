"""Reproduce a table of the paper in miniature: every row with several seeds, by one command.

    python -m tools.reproduce --table 2    # Tables 1-4; continues where it was stopped
    python -m tools.reproduce --table 2 --no-run    # only the table, from the episodes in --out

All steps are the README's commands, `--jobs` at a time, one core each: demonstrations are recorded
once, each row trains its stages for each seed, then runs episodes of the val split. OUT keeps every
episode, log and held-out metric, WORK the recordings and checkpoints. A cell (row and seed) with
all episodes in OUT needs nothing of WORK. A training or a stage that two rows share (Table 1's
`base-depth`, Table 2's `auxvla`) is run once.
"""

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Literal

from tqdm import tqdm

from config import TASKS, Count, InputError, quoted
from paper import COLUMNS, PAPER_COLUMNS, ROWS, Row
from storage.files import read_json, sole_writer, write_json
from storage.results import read_episodes
from storage.terminal import cli, user_errors
from tools.claims import list_differences, make_table, to_markdown
from training.flags import preset_of

KEPT = ("config.json", "log.jsonl", "validation.json")  # of each stage
BOUNDS = ("random", "expert")


@dataclass(frozen=True)
class ReproduceConfig:
    table: Literal[1, 2, 3, 4]
    rows: tuple[Literal[tuple(ROWS)], ...] = ()  # unset: all of the table
    seeds: Count = 3  # trainings of each row
    episodes: Count = 60  # of each column and seed; the same ones for every row
    # unset: close_fridge close_drawer; of Table 3: pick_all place_all
    columns: tuple[Literal[PAPER_COLUMNS], ...] = ()
    tasks: tuple[Literal[TASKS], ...] = ()  # unset: the rows' tasks
    demonstrations: Count = 80  # of each column and task
    steps_per_epoch: Count = 120  # optimizer steps for each epoch that the paper trains a stage
    train: str = ""  # more flags of stages 1 and 2: --train="--lr 1e-3 --batch-size 64"
    preset: Literal["tiny", "paper"] = "tiny"
    jobs: Count = 2  # trainings or evaluations at once; one per core, on a GPU as many as fit
    device: Literal["cpu", "cuda"] = "cpu"  # of training and of the policy
    out: Path | None = None  # results; unset: results/set_table, of Table 3 results/pick_place
    work: Path | None = None  # recordings and checkpoints; unset: the same under runs/
    run: bool = True  # --no-run: only the table, from the episodes in --out

    @property
    def names(self) -> tuple[str, ...]:
        return self.rows or tuple(name for name in ROWS if ROWS[name].table == self.table)

    @property
    def suite(self) -> tuple[str, ...]:
        """The tasks to train on and evaluate; all rows of a table have the same ones."""
        return self.tasks or ROWS[self.names[0]].tasks

    @property
    def evaluated(self) -> tuple[str, ...]:
        closing = ("close_fridge", "close_drawer")
        default = PAPER_COLUMNS[:2] if self.table == 3 else closing
        return tuple(name for name in COLUMNS if name in (self.columns or default))

    @property
    def folders(self) -> tuple[Path, Path]:
        """OUT and WORK; tables with the same demonstrations share them."""
        suite = "pick_place" if self.table == 3 else "set_table"
        return self.out or Path("results", suite), self.work or Path("runs", suite)


def trained_as(name: str, stage: int) -> str:
    """Return the first row that has the same training up to a stage."""

    def recipe(row: Row) -> tuple:
        return row.model, row.tasks, row.subtasks, row.openvla, row.epochs[:stage]

    return next(other for other in ROWS if recipe(ROWS[other]) == recipe(ROWS[name]))


def cell(name: str) -> str:
    """Return the row under whose name a row's results are kept."""
    return trained_as(name, ROWS[name].stages[-1])


class Runner:
    """Runs the commands of the cells that OUT lacks."""

    def __init__(self, cfg: ReproduceConfig):
        self.cfg, (self.out, self.work) = cfg, cfg.folders
        self.locks = defaultdict(Lock)  # the first of two rows that share a stage trains it
        one_core = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.environment = os.environ | one_core | {"TOKENIZERS_PARALLELISM": "false"}

    def command(self, log: Path, program: str, **flags):
        """Run a program of this repository and write its output to `log`."""
        words = program.split()
        for name, value in flags.items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            print("$", *words, file=file, flush=True)
            to_log = dict(stdout=file, stderr=subprocess.STDOUT)
            done = subprocess.run([sys.executable, *words], env=self.environment, **to_log)
        if done.returncode:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
            raise InputError(f"python {quoted(*words)}: {last}. Its output is in {log}")

    def collect(self):
        """Record the demonstrations of every task and column, and pack them."""
        cfg, log, data = self.cfg, self.work / "collect.log", self.work / "data"
        if (self.work / "pack/pack.json").exists():
            return
        for task in cfg.suite:
            for column in map(COLUMNS.__getitem__, cfg.evaluated):
                self.command(
                    log, "collect.py", expert="scripted", task=task, split="train",
                    subtask=column.subtask, target=column.target_in(task),
                    episodes=cfg.demonstrations, workers=cfg.jobs, out=data,
                )  # fmt: skip
        self.command(log, "data.py pack", data=data, out=self.work / "pack")

    def train(self, name: str, stage: int, seed: int):
        """Train a stage of a row, which other rows may share, and copy its logs to OUT."""
        cfg, name = self.cfg, trained_as(name, stage)
        row, where = ROWS[name], Path(name) / f"seed-{seed}"
        flags = {}
        if before := [s for s in row.stages if s < stage]:
            earlier = Path(trained_as(name, before[-1])) / f"seed-{seed}/stage{before[-1]}"
            flags["init_from"] = self.work / earlier
        if cfg.preset == "tiny":
            flags["action_bounds"] = "percentiles"  # GAP-23, as in results/set_table
            flags |= {"lr": 1e-3} if stage == 3 else {}
        out, kept = self.work / where / f"stage{stage}", self.out / where / f"stage{stage}"
        with self.locks[name, stage, seed]:
            self.command(
                self.work / where / "log.txt", f"train.py {cfg.train * (stage < 3)}", row=name,
                preset=preset_of(row, cfg.preset), stage=stage, data=self.work / "pack",
                steps=row.epochs[stage - 1] * cfg.steps_per_epoch, val_episodes=0.1, workers=1,
                seed=seed, device=cfg.device, out=out, **flags,
            )  # fmt: skip
            kept.mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                # OUT may have logs of a training that WORK lacks; OUT's episodes belong to those.
                if (out / file).exists() and not (kept / file).exists():
                    shutil.copyfile(out / file, kept / file)

    def lacks(self, name: str, seed: int) -> list[str]:
        """Return the tasks of which OUT lacks episodes of a cell."""
        wanted = {*product(self.cfg.evaluated, range(self.cfg.episodes))}
        folder = self.out / name / f"seed-{seed}"
        return [t for t in self.cfg.suite if wanted - read_episodes(folder / t).keys()]

    def run_cell(self, name: str, seed: int):
        """Train a row, or take the random policy or the expert, and run the episodes OUT lacks."""
        cfg, where = self.cfg, Path(name) / f"seed-{seed}"
        who = {"policy": name, "row": cfg.names[0]}
        if name not in BOUNDS:
            for stage in ROWS[name].stages:
                self.train(name, stage, seed)
            who = {"checkpoint": self.work / where / f"stage{stage}", "device": cfg.device}
        for task in self.lacks(name, seed):
            self.command(
                self.work / where / "log.txt", "eval.py --stop-at-success", task=task,
                columns=cfg.evaluated, episodes=cfg.episodes, out=self.out / where / task, **who,
            )  # fmt: skip


def check_recipe(cfg: ReproduceConfig, folder: Path):
    """Write recipe.json where there is none; InputError for other settings or nothing to show."""
    ours = {n: getattr(cfg, n) for n in ("demonstrations", "steps_per_epoch", "train", "preset")}
    ours |= {"columns": list(cfg.evaluated), "tasks": list(cfg.suite)}
    path = folder / "recipe.json"
    if not path.exists():
        if not cfg.run:
            raise InputError(f"{folder}: no results to make a table from. Drop --no-run")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)
    if (theirs := read_json(path)) != ours:
        raise InputError(
            f"{path} is of {theirs}, this command of {ours}: one table cannot mix them. Give the "
            "same flags, or another --out and --work"
        )


def run(cfg: ReproduceConfig):
    """Run the cells that OUT lacks, all rows of a seed before the next seed."""
    runner, rows = Runner(cfg), dict.fromkeys(map(cell, cfg.names))
    cells = [(name, 0) for name in BOUNDS]
    cells += [(name, seed) for seed, name in product(range(cfg.seeds), rows)]
    left = [each for each in cells if runner.lacks(*each)]
    if left:
        runner.collect()
    with ThreadPoolExecutor(cfg.jobs) as pool:
        running = [pool.submit(runner.run_cell, *each) for each in left]
        try:
            for done in tqdm(as_completed(running), total=len(running), unit="cell"):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(cfg: ReproduceConfig):
    out, work = cfg.folders
    for folder in (out, work) if cfg.run else (out,):
        check_recipe(cfg, folder)
    if cfg.run:
        with sole_writer(work), sole_writer(out):
            run(cfg)
    table = make_table(out, cfg.table, cfg.names, cell, cfg.preset)
    table["command"] = quoted("python", "-m", "tools.reproduce", *sys.argv[1:])
    table["differs"] += [f"instead, stages 1 and 2 with {cfg.train}"] * bool(cfg.train)
    path = out / f"table-{cfg.table}.json"
    if not path.exists() or read_json(path)["rows"].keys() <= table["rows"].keys():
        write_json(path, table)  # some rows do not replace the whole table
    print("\n".join([*to_markdown(table), "", list_differences(table)]))


if __name__ == "__main__":
    with user_errors():
        main(cli(ReproduceConfig, description=__doc__))
