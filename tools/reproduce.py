"""A table of the paper in miniature: every row with several seeds, by one command.

    python -m tools.reproduce --table 2    # Tables 1-4; goes on where it was stopped
    python -m tools.reproduce --table 2 --no-run    # the table from what is in --out, no training

Demonstrations are recorded once; each row trains its stages for each seed, then runs its episodes
on starts that no demonstration has. All of it are the commands of the README, `--jobs` at a time,
one core each. OUT keeps every episode, log and held-out figure, WORK what they were made from: a
cell whose episodes are all in OUT needs nothing of WORK. tools/tables.py makes the tables.

Rows that are trained alike, Table 1's `base-depth` and Table 2's `auxvla`, are trained once, and so
are the stages that Table 4's rows share.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import tyro
from tqdm import tqdm

from config import SUBTASKS, InputError, explained, quoted
from paper import COLUMNS, PAPER_COLUMNS, ROWS, Row, preset_of
from storage.files import sole_writer, write
from storage.results import read_episodes
from tools.tables import differs_text, lines_of, write_table

KEPT = ("config.json", "log.jsonl", "validation.json")  # of each stage
# Readings of GAP-23 and GAP-5 in the trainings of results/set_table.
COMMITTED = {"action_bounds": "percentiles"}
COMMITTED_HISTORY = {"model.history": "frames"}
HEAD_LR = {"tiny": {"lr": 1e-3}}  # of stage 3 by preset, else that of the other stages
EPISODE = 12  # training steps of the tiny model that take as long as one of its episodes
BOUNDS = ("random", "expert")


@dataclass(frozen=True)
class ReproduceConfig:
    table: Literal[1, 2, 3, 4]
    rows: tuple[Literal[tuple(ROWS)], ...] = ()  # default: all of the table
    seeds: int = 3  # trainings of each row
    episodes: int = 60  # of each column and seed; the same ones for every row
    # default: close_fridge close_drawer; of Table 3: pick_all place_all
    columns: tuple[Literal[PAPER_COLUMNS], ...] = ()
    demonstrations: int = 80  # of each column and task
    steps_per_epoch: int = 120  # optimizer steps for each epoch that the paper trains a stage
    preset: Literal["tiny", "paper"] = "tiny"
    jobs: int = 2  # trainings or evaluations at once; one per core, on a GPU as many as fit
    device: Literal["cpu", "cuda"] = "cpu"  # of training and of the policy
    out: Path | None = None  # results; default: results/set_table, of Table 3 results/pick_place
    work: Path | None = None  # recordings and checkpoints; default: the same under runs/
    run: bool = True  # --no-run: only the table, from what is in --out

    def __post_init__(self):
        strangers = [name for name in self.rows if ROWS[name].table != self.table]
        if strangers:
            raise InputError(f"--rows {' '.join(strangers)}: not of Table {self.table}")
        counts = self.seeds, self.episodes, self.demonstrations, self.steps_per_epoch, self.jobs
        if min(counts) < 1:
            raise InputError(
                "--seeds, --episodes, --demonstrations, --steps-per-epoch and --jobs start at 1"
            )
        lacking = {COLUMNS[name].subtask for name in self.columns} - set(self.any_row.subtasks)
        if lacking:
            raise InputError(f"Table {self.table} has no {', '.join(sorted(lacking))}: --columns")

    @property
    def names(self) -> tuple[str, ...]:
        return self.rows or tuple(name for name in ROWS if ROWS[name].table == self.table)

    @property
    def any_row(self) -> Row:
        return next(row for row in ROWS.values() if row.table == self.table)

    @property
    def evaluated(self) -> tuple[str, ...]:
        closing = ("close_fridge", "close_drawer")
        return tuple(c for c in COLUMNS if c in self.columns) or (
            closing if "close" in self.any_row.subtasks else PAPER_COLUMNS[:2]
        )

    @property
    def suite(self) -> str:
        """What tables with the same demonstrations share."""
        return "set_table" if self.any_row.subtasks == SUBTASKS else "pick_place"

    @property
    def results(self) -> Path:
        return self.out or Path("results") / self.suite

    @property
    def workshop(self) -> Path:
        return self.work or Path("runs") / self.suite

    @property
    def recipe(self) -> dict:
        """What must be one and the same for all cells of a folder."""
        recipe = {name: getattr(self, name) for name in ("demonstrations", "steps_per_epoch")}
        return recipe | {"preset": self.preset, "columns": list(self.evaluated)}


def trained_as(name: str, stage: int) -> str:
    """The first row whose training up to a stage is the same."""

    def recipe(row: Row) -> tuple:
        return row.model, row.tasks, row.subtasks, row.openvla, row.epochs[:stage]

    return next(other for other in ROWS if recipe(ROWS[other]) == recipe(ROWS[name]))


def cell(name: str) -> str:
    """The row under whose name a row's results are kept."""
    return name if name in BOUNDS else trained_as(name, ROWS[name].stages[-1])


# --- Commands ---


class Runner:
    """Runs the commands of the cells that OUT lacks, several at once."""

    def __init__(self, cfg: ReproduceConfig, bar: tqdm):
        self.cfg, self.bar = cfg, bar
        self.locks = defaultdict(Lock)  # a stage that two rows share is trained by the first
        one_core = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.environment = os.environ | one_core | {"TOKENIZERS_PARALLELISM": "false"}

    def command(self, log: Path, program: str, **flags):
        """Run a program of this repository; what it prints goes to a file.

        Raises InputError with its last line when it fails.
        """
        words = [word for name, value in flags.items() for word in flag(name, value)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            print("$", program, *words, file=file, flush=True)
            done = subprocess.run(
                [sys.executable, *program.split(), *words],
                env=self.environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
            raise InputError(
                f"`python {program} {quoted(*words)}` ended with {done.returncode}: {last}\n"
                f"All it printed is in {log}. The same command goes on from here"
            )

    def collect(self):
        """Record the demonstrations of every task and column, and pack them."""
        cfg, data = self.cfg, self.cfg.workshop / "data"
        pack = cfg.workshop / "pack"
        if (pack / "pack.json").exists():
            return
        log = cfg.workshop / "collect.log"
        for task in cfg.any_row.tasks:
            for column in map(COLUMNS.__getitem__, cfg.evaluated):
                self.command(
                    log, "collect.py", expert="scripted", task=task, split="train",
                    subtask=column.subtask, target=column.target_in(task),
                    episodes=cfg.demonstrations, workers=cfg.jobs, out=data,
                )  # fmt: skip
        self.command(log, "data.py pack", data=data, out=pack)

    def train(self, name: str, stage: int, seed: int):
        """Train a stage of a row, which others may share, and keep its logs in OUT."""
        cfg, name = self.cfg, trained_as(name, stage)
        row, where = ROWS[name], Path(name) / f"seed-{seed}"
        with self.locks[name, stage, seed]:
            before = [s for s in row.stages if s < stage]
            start = {}
            if before:
                earlier = Path(trained_as(name, before[-1])) / f"seed-{seed}/stage{before[-1]}"
                start = {"init_from": cfg.workshop / earlier}
            if stage == 3:
                start |= HEAD_LR.get(cfg.preset, {})
            if cfg.preset == "tiny":
                start |= COMMITTED | (COMMITTED_HISTORY if row.history != "none" else {})
            out = cfg.workshop / where / f"stage{stage}"
            self.command(
                cfg.workshop / where / "log.txt", "train.py", row=name,
                preset=preset_of(row, cfg.preset), stage=stage, data=cfg.workshop / "pack",
                steps=row.epochs[stage - 1] * cfg.steps_per_epoch, val_episodes=0.1, workers=1,
                seed=seed, device=cfg.device, out=out, **start,
            )  # fmt: skip
            kept = cfg.results / where / f"stage{stage}"
            # Trained again for a row that stands on it, on a machine that has not its checkpoints:
            # the logs beside finished episodes stay those of the training that acted in them.
            if kept.exists() and not any(missing(cfg, name, seed, task) for task in row.tasks):
                return
            kept.mkdir(parents=True, exist_ok=True)
            for file in KEPT:
                shutil.copyfile(out / file, kept / file)

    def evaluate(self, name: str, seed: int, task: str):
        """Run a row's episodes of a task; of a bound's when `name` is random or expert."""
        cfg = self.cfg
        if missing(cfg, name, seed, task) == 0:
            return
        where = Path(name) / f"seed-{seed}"
        who = {"policy": name, "row": cfg.names[0]}
        if name not in BOUNDS:
            stage = ROWS[name].stages[-1]
            who = {"checkpoint": cfg.workshop / where / f"stage{stage}", "device": cfg.device}
        self.command(
            cfg.workshop / where / "log.txt", "eval.py", task=task, columns=cfg.evaluated,
            episodes=cfg.episodes, out=cfg.results / where / task, stop_at_success=True, **who,
        )  # fmt: skip

    def row(self, name: str, seed: int):
        """All that one cell of the table takes."""
        tasks = self.cfg.any_row.tasks
        steps, episodes = work(self.cfg, name, seed)
        if name not in BOUNDS and episodes:
            for stage in ROWS[name].stages:
                self.train(name, stage, seed)
            self.bar.update(steps)
        for task in tasks:
            self.evaluate(name, seed, task)
        self.bar.update(episodes * EPISODE)


def flag(name: str, value) -> Iterable[str]:
    """A command's words for one setting."""
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    return [option, *map(str, value if isinstance(value, tuple) else (value,))]


def missing(cfg: ReproduceConfig, name: str, seed: int, task: str) -> int:
    """How many of a cell's episodes are not in OUT."""
    done = read_episodes(cfg.results / name / f"seed-{seed}" / task)
    wanted = [(column, i) for column in cfg.evaluated for i in range(cfg.episodes)]
    return sum(each not in done for each in wanted)


def work(cfg: ReproduceConfig, name: str, seed: int) -> tuple[int, int]:
    """Steps and episodes that a cell still takes, for the time that is left."""
    episodes = sum(missing(cfg, name, seed, task) for task in cfg.any_row.tasks)
    epochs = 0 if name in BOUNDS or not episodes else sum(ROWS[name].epochs)
    return epochs * cfg.steps_per_epoch, episodes


def check_recipe(cfg: ReproduceConfig, folder: Path):
    """Raise InputError when OUT, or WORK with its demonstrations, was made with other numbers."""
    path, ours = folder / "recipe.json", (json.dumps(cfg.recipe, indent=2) + "\n").encode()
    if path.exists() and path.read_bytes() != ours:
        theirs = " ".join(path.read_text(encoding="utf-8").split())
        raise InputError(
            f"{path} is of {theirs}, this command of {cfg.recipe}: one "
            "table cannot mix them. Give the same flags, or another --out and --work"
        )
    if cfg.run and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, ours)


def run(cfg: ReproduceConfig):
    """Run what OUT lacks, all rows of a seed before the next seed."""
    for folder in (cfg.results, cfg.workshop):
        check_recipe(cfg, folder)
    names = dict.fromkeys(map(cell, cfg.names))
    cells = [(name, 0) for name in BOUNDS]
    cells += [(name, seed) for seed in range(cfg.seeds) for name in names]
    left = {each: work(cfg, *each) for each in cells}
    total = sum(steps + EPISODE * episodes for steps, episodes in left.values())
    with (
        sole_writer(cfg.workshop),
        sole_writer(cfg.results),
        tqdm(total=total, unit="step", disable=total == 0) as bar,
        ThreadPoolExecutor(cfg.jobs) as pool,
    ):
        runner = Runner(cfg, bar)
        if total:
            runner.collect()
        running = [pool.submit(runner.row, *each) for each in cells if any(left[each])]
        try:
            for done in as_completed(running):
                done.result()
                write_table(cfg.results, cfg.table, cfg.names, cell, cfg.preset)
        finally:
            pool.shutdown(cancel_futures=True)


def main(cfg: ReproduceConfig):
    if cfg.run:
        if "MS_ASSET_DIR" not in os.environ:
            raise InputError(
                "MS_ASSET_DIR is not set: expected an apartment. This makes one: python -m "
                "household.assets --out assets && export MS_ASSET_DIR=$PWD/assets"
            )
        run(cfg)
    elif not (cfg.results / "recipe.json").exists():
        raise InputError(
            f"{cfg.results}: no results to make a table from; expected what this leaves there: "
            f"python -m tools.reproduce --table {cfg.table} --out {quoted(cfg.results)}"
        )
    else:
        check_recipe(cfg, cfg.results)
    table = write_table(cfg.results, cfg.table, cfg.names, cell, cfg.preset)
    print("\n".join([*lines_of(table), "", differs_text(table)]))


if __name__ == "__main__":
    with explained():
        try:
            main(tyro.cli(ReproduceConfig))
        except KeyboardInterrupt:
            raise SystemExit(
                "stopped: what is finished is kept, the same command goes on"
            ) from None
