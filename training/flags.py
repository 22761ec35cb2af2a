"""The command line of train.py: flags over the defaults of --preset and --row, default folders."""

import argparse
from dataclasses import replace
from pathlib import Path

from config import PRESETS, InputError, TrainConfig
from paper import DEFAULT_ROW, ROWS, Row
from storage.checkpoint import steps_in
from storage.terminal import cli
from training.ranks import check_compiler, device_of, missing_to_compile


def preset_of(row: Row, preset: str) -> str:
    """The preset that trains a row: for OpenVLA's rows, OpenVLA at the size of `preset`."""
    if row.openvla:
        return "tiny-openvla" if preset.startswith("tiny") else "openvla"
    if preset.endswith("openvla"):
        raise InputError(f"row {row.label!r} is of the base VLM: drop --preset {preset}")
    return preset


def check_row(cfg: TrainConfig, row: Row) -> None:
    """Raise InputError, naming the flag, if another flag contradicts --row."""
    for part, fields, prefix in ((cfg, row.training, ""), (cfg.model, row.model, "model.")):
        for name, value in fields.items():
            got = getattr(part, name)
            if name == "history" and "none" not in (got, value):
                continue  # both readings of GAP-5
            if got != value:
                flag = f"--{prefix}{name.replace('_', '-')}"
                raise InputError(f"--row {cfg.row} fixes {flag} at {value}: drop {flag} or --row")
    if cfg.stage not in row.stages:
        raise InputError(f"--row {cfg.row} has no stage {cfg.stage}; it has {row.stages}")


def choose_folders(cfg: TrainConfig) -> TrainConfig:
    """Fill in --out (runs/RUN/stageN) and --init-from (the stage before; InputError if missing)."""
    run = Path("runs", cfg.run_name or cfg.row or DEFAULT_ROW)
    out, init_from = Path(cfg.out or run / f"stage{cfg.stage}"), cfg.init_from
    stages = ROWS[cfg.row].stages if cfg.row else (1, 2, 3)
    before = max((stage for stage in stages if stage < cfg.stage), default=None)
    naive = "; or --row auxvla-naive for co-training from the start" if cfg.stage == 2 else ""
    if before and not init_from and not cfg.out:
        init_from = str(run / f"stage{before}")
        if not steps_in(Path(init_from)) and not steps_in(out):
            command = f"torchrun --nproc_per_node=8 train.py --stage {before}"
            for flag, value in (("row", cfg.row), ("run-name", cfg.run_name)):
                command += f" --{flag} {value}" if value else ""
            command += f" --preset {cfg.preset}" if cfg.preset != "paper" else ""
            raise InputError(f"no stage {before} in {run}: {command}{naive}")
    # Without --row, --stage 2 --out OUT is naive co-training.
    if before and not init_from and (cfg.row or cfg.stage == 3):
        start = f"stage {cfg.stage} starts from stage {before}: give --init-from RUN/stage{before}"
        raise InputError(start + naive)
    return replace(cfg, out=str(out), init_from=init_from)


def parse(args: list[str] | None = None, description: str | None = None) -> TrainConfig:
    """The command line of train.py. Raises InputError if a flag contradicts the row."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="paper")
    first.add_argument("--row")
    first.add_argument("--device", choices=("cpu", "cuda"))
    chosen, others = first.parse_known_args(args)  # they set the defaults of the other flags
    row = ROWS.get(chosen.row)
    if chosen.row and not row:
        raise InputError(f"--row {chosen.row}: no such row; the rows are {', '.join(ROWS)}")
    preset = preset_of(row, chosen.preset) if row else chosen.preset
    default = TrainConfig(**vars(chosen) | {"preset": preset}, **PRESETS[preset])
    kind = device_of(chosen.device).type
    default = replace(default, compile=kind == "cuda" and not missing_to_compile(kind))
    if row:
        default = replace(default, model=replace(default.model, **row.model), **row.training)
    cfg = cli(TrainConfig, default=default, args=others, description=description)
    if cfg.compile:
        check_compiler(kind)
    if row:
        check_row(cfg, row)
    elif not cfg.epochs[cfg.stage - 1] and not cfg.steps:
        raise InputError(f"--epochs {cfg.epochs}: 0 for stage {cfg.stage}; give --steps")
    return choose_folders(cfg)
