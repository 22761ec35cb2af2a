"""The command line of train.py: flags over the defaults of --preset and --row, default folders."""

import argparse
from dataclasses import replace
from pathlib import Path

import tyro

from config import PRESETS, InputError, TrainConfig
from paper import DEFAULT_ROW, ROWS, Row


def preset_of(row: Row, preset: str | None) -> str:
    """The preset that trains a row; OpenVLA's rows take its LLM at the size of `preset`."""
    if row.openvla:
        return "tiny-openvla" if preset and preset.startswith("tiny") else "openvla"
    if preset and preset.endswith("openvla"):
        raise InputError(f"--row {row.label!r} is of the base VLM: drop --preset {preset}")
    return preset or "paper"


def check_row(cfg: TrainConfig, row: Row) -> None:
    """Raise InputError, naming the flag, if the command line contradicts its --row."""
    data = {name: getattr(row, name) for name in ("tasks", "subtasks", "epochs")}
    expected = data | {f"model.{name}": value for name, value in row.model.items()}
    for name, value in expected.items():
        got = getattr(cfg if name in data else cfg.model, name.removeprefix("model."))
        if name == "model.history" and "none" not in (got, value):
            continue  # both readings of GAP-5
        if got != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"--row {cfg.row} fixes {flag} at {value}, got {got}. Drop the flag, or the row"
            )
    if cfg.stage not in row.stages:
        rows = [name for name, other in ROWS.items() if cfg.stage in other.stages]
        raise InputError(
            f"--row {cfg.row} has no stage {cfg.stage}; it has {row.stages}. Rows with this stage: "
            + ", ".join(rows)
        )


def choose_folders(cfg: TrainConfig) -> TrainConfig:
    """Fill in --out runs/RUN/stageN and --init-from, the folder of the run's stage before.

    Raises InputError if the stage before is missing.
    """
    stages = ROWS[cfg.row].stages if cfg.row else (1, 2, 3)
    before = max((stage for stage in stages if stage < cfg.stage), default=None)
    folder = Path("runs", cfg.run_name or cfg.row or DEFAULT_ROW)
    out = Path(cfg.out or folder / f"stage{cfg.stage}")
    naive = "; or --row auxvla-naive for co-training from the start" if cfg.stage == 2 else ""
    init_from = cfg.init_from
    if before and not init_from and not cfg.out:
        init_from = str(folder / f"stage{before}")
        if not Path(init_from).is_dir() and not out.is_dir():
            flags = {"row": cfg.row, "run-name": cfg.run_name, "preset": cfg.preset}
            chosen = "".join(
                f" --{name} {value}"
                for name, value in flags.items()
                if value not in (None, "", "paper")
            )
            raise InputError(
                f"no stage {before} in {folder}: torchrun --nproc_per_node=8 train.py "
                f"--stage {before}{chosen}{naive}"
            )
    # Without --row, --stage 2 --out OUT is naive co-training.
    if before and not init_from and (cfg.row or cfg.stage == 3):
        raise InputError(
            f"stage {cfg.stage} starts from stage {before}: give --init-from RUN/stage{before}"
            + naive
        )
    return replace(cfg, out=str(out), init_from=init_from)


def parse(args: list[str] | None = None, description: str | None = None) -> TrainConfig:
    """The command line of train.py. Raises InputError if a flag contradicts the row."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--row")
    chosen, others = first.parse_known_args(args)  # they set the defaults of the other flags
    row, preset = ROWS.get(chosen.row), chosen.preset or "paper"
    if chosen.row and not row:
        raise InputError(f"--row {chosen.row}: no such row; the rows are {', '.join(ROWS)}")
    if row:
        preset = preset_of(row, chosen.preset)
    default = TrainConfig(preset=preset, row=chosen.row, **PRESETS[preset])
    if row:
        model = replace(default.model, **row.model)
        data = dict(tasks=row.tasks, subtasks=row.subtasks, epochs=row.epochs)
        default = replace(default, model=model, **data)
    cfg = tyro.cli(TrainConfig, default=default, args=others, description=description)
    if row:
        check_row(cfg, row)
    elif not cfg.epochs[cfg.stage - 1] and not cfg.steps:
        raise InputError(f"--epochs {cfg.epochs}: 0 for stage {cfg.stage}; give --steps")
    return choose_folders(cfg)
