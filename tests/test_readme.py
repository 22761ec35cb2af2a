"""The README stays true: its commands parse, its files exist, its GAP rows are the code's."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import tyro

import collect
import eval
import train
from paper import PAPER_COLUMNS
from storage.files import read_lines
from storage.results import rate
from tools.claims import to_markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
BLOCKS = re.findall(r"```\w*\n(.*?)```", PAGES, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
LINES += re.findall(r"^\| \d+ \| `(.*?)`", PAGES, re.M)  # the commands of a numbered table
COMMANDS = [line for line in LINES if re.match(r"(python|torchrun) (?!-c)", line)]
FOLDERS = ("storage", "training", "simulation", "household", "tools")
SOURCES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))]


def test_every_gap_in_the_code_has_a_row_in_the_readme():
    in_code = {gap for path in SOURCES for gap in re.findall(r"GAP-\d+", path.read_text())}
    rows = re.findall(r"^\| (GAP-\d+) \|", README, re.M)
    assert set(rows) == in_code and len(rows) == len(set(rows))


def test_every_file_of_the_table_exists_and_every_top_level_file_is_in_it():
    named = {name for name in re.findall(r"`([\w/]+\.py|\w+/)`", README.split("## Quick start")[0])}
    assert all((ROOT / name).exists() for name in named)
    assert {path.name for path in ROOT.glob("*.py")} <= named


@cache
def help_of(*program: str) -> str:
    python = [sys.executable, *program, "--help"]
    return subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_with_its_values(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    program, rest = words[script], words[script + 1 :]
    parsers = {
        "train.py": train.parse,
        "eval.py": lambda args: tyro.cli(eval.EvalConfig, args=args),
        "collect.py": lambda args: tyro.cli(collect.CollectConfig, args=args),
    }
    if program in parsers:
        parsers[program](rest)
        return
    name = rest[:1] if program == "-m" else []
    verb = rest[:1] if program in ("data.py", "storage.checkpoint") else []
    verb = rest[1:2] if name == ["tools.bench"] else verb
    shown = help_of(program, *name, *verb)
    for flag in (word for word in rest if word.startswith("--")):
        assert re.search(rf"{flag}\b", shown), f"{flag} is not a flag of {program}"


def test_the_lines_of_code_are_those_that_the_readme_states():
    def lines(paths):
        return sum(path.read_text().count("\n") for path in paths)

    first, every = (
        int(n.replace(",", ""))
        for n in re.findall(r"about ([\d,]+) lines; .*? about ([\d,]+)\.", README)[0]
    )
    method = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)[:7]
    assert abs(lines(ROOT / name for name in method) - first) < 100
    assert abs(lines(SOURCES) - every) < 100


def test_no_placeholder_is_left():
    assert not re.search(r"^[A-Z]+_[A-Z]+$", README, re.M)


def test_make_has_the_targets_that_the_readme_names():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_table_of_make_learn_is_counted_from_the_episodes_in_results():
    for folder in ("eval", "eval-random", "eval-expert", "eval-flow"):
        episodes = read_lines(ROOT / "results/learn" / folder / "episodes.jsonl")
        columns = eval.table(episodes, {})
        assert all(columns[name]["n"] == 20 for name in columns)
        for name, column in columns.items():
            row = name.replace("_", " ") + (", flow head" if folder == "eval-flow" else "")
            (line,) = re.findall(rf"^\| {row} \|.*", README, re.M)
            figure = rate(column).split(", at the end")[0]
            assert figure in line or re.sub(r" = [\d.]+", "", figure) in line
        assert folder == "eval-flow" or set(columns) == set(PAPER_COLUMNS)


def test_the_miniature_tables_their_metrics_and_verdicts_are_those_in_results():
    for path in (ROOT / "results").glob("*/table-*.json"):
        table = json.loads(path.read_text())
        missing = [line for line in [*to_markdown(table), *table["differs"]] if line not in README]
        assert not missing, "\n".join(missing)


def test_the_figures_of_what_a_run_survives_are_those_in_results():
    figures = json.loads((ROOT / "results/endure.json").read_text())
    section = README.split("## What a run survives")[1].split("\n## ")[0]
    kills = [figures[f"kill -9, stage {stage}"] for stage in (1, 2, 3)]
    counts = [sum(stage["kills"] for stage in kills), figures["faults"]["a checkpoint loads"]]
    counts += [figures["flipped bytes, checkpoint"], figures["flipped bytes, pack"]]
    counts += [figures["SIGTERM"]["signals"], figures["rank deaths"]["rank deaths"]]
    assert all(f"{count:,} of {count:,}" in section for count in counts)
    assert all(stage["equal"] == stage["runs completed"] > 0 for stage in kills)
    worst = max(figures["order"]["largest relative difference of a loss"].values())
    assert worst < 1e-5 and f"{worst:.1e}" in section
    index, stall = figures["index"], figures["stall"]
    assert f"{index['seconds']} s and {index['MB']} MB" in section
    assert f"for {stall['stalled (s)']} s, takes {stall['took (s)']} s" in section


def test_the_figures_of_speed_are_those_in_results():
    section = README.split("## Speed")[1].split("\n## ")[0]
    figures = {
        path.stem: json.loads(path.read_text()) for path in (ROOT / "results/bench").glob("*.json")
    }

    def spread(name, contestant, digits):
        figure = figures[name]["figures"][contestant]
        low, high = (f"{figure[key]:.{digits}f}" for key in ("min", "max"))
        return f"{figure['median']:.{digits}f} [{low}, {high}]"

    for contestant in ("ours, files", "ours, pack", "one frame, one read (MS-HAB)"):
        assert spread("loader", contestant, 0) in section
    for name, digits in (("train", 1), ("train-paper", 4)):
        for contestant in ("ours", "naive port"):
            assert spread(name, contestant, digits) in section
    for contestant in ("transformers generate", "ours, tokens", "ours, flow chunk"):
        figure = figures["act"]["figures"][f"{contestant}, batch 1"]
        assert f"{figure['median']:.1f} ({figure['p99']:.1f})" in section
    assert spread("episode", "ours, 2 processes, per episode", 2) in section
    exact = figures["exact"]["exactness"]
    assert f"{exact['different']} of {exact['tokens']:,} differ" in section
