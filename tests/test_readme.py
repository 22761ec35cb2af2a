"""README and docs stay true: commands parse, links lead somewhere, figures are those in results."""

import ast
import re
import shlex
import sys
from functools import cache
from importlib.metadata import packages_distributions

import pytest
import tyro
from packaging.requirements import Requirement
from processes import REPOSITORY as ROOT
from processes import run

import collect
import eval
import train
from storage.files import read_json, read_lines
from storage.results import format_rate, table
from tools.claims import to_markdown

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```\w*\n(.*?)```", TEXT, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
LINES += re.findall(r"(?<!`)`([^`\n]+)`", TEXT)  # within a sentence or a table
COMMANDS = sorted({line for line in LINES if re.match(r"(python|torchrun) (?!-c)", line)})
FOLDERS = ("storage", "training", "simulation", "household", "tools")
SOURCES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))]
run_once = cache(run)
OPTIONAL = {"vla_eval", "wandb"}  # imported only for the flag that asks for them


def words(text: str) -> str:
    """Text without line breaks and without the padding of table cells."""
    return re.sub(r" ?\| ?", "|", re.sub(r"\s+", " ", text))


def test_every_gap_in_the_code_has_one_row():
    in_code = {gap for path in SOURCES for gap in re.findall(r"GAP-\d+", path.read_text())}
    rows = re.findall(r"^\| (GAP-\d+) \|", PAGES["gaps.md"], re.M)
    assert rows == [f"GAP-{n}" for n in range(1, 28)] and set(rows) == in_code


def test_every_link_leads_to_a_file_and_a_heading():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            path = folder / name if name else folder / page
            assert path.exists(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.+)", path.read_text(), re.M) if anchor else []
            names = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings]
            assert not anchor or anchor in names, f"{page}: {link}"


def test_the_table_of_files_names_every_script_and_folder():
    named = re.findall(r"^\| `([\w/.]+)` \|", README, re.M)
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert set(named) == scripts | {f"{name}/" for name in FOLDERS} and len(scripts) == 11


def test_the_readme_is_short_and_narrow_and_states_the_lines_of_code():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    sentence = re.search(r"about ([\d,]+) lines, .*? about ([\d,]+) lines", words(README))
    for stated, paths in zip(sentence.groups(), (ROOT.glob("*.py"), SOURCES)):
        counted = sum(path.read_text().count("\n") for path in paths)
        assert int(stated.replace(",", "")) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_with_its_values(command, tmp_path, monkeypatch):
    for stage in ("stage1", "stage2"):  # a later stage starts from the folder of the one before
        (tmp_path / "runs/auxvla-all" / stage / "step-00000001").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    program, *rest = words[script:]
    configs = {"eval.py": eval.EvalConfig, "collect.py": collect.CollectConfig}
    if program == "train.py":
        train.parse(rest)
    if program in configs:
        tyro.cli(configs[program], args=rest)
    if program in (*configs, "train.py") or rest[:1] == ["pytest"]:
        return
    named = program == "-m"  # the module, and the verb of a program that has several
    has_verb = program == "data.py" or rest[:1] in (["tools.bench"], ["storage.checkpoint"])
    shown = run_once(program, *rest[: named + has_verb], "--help")
    for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
        assert re.search(rf"{flag}\b", shown), f"{flag} is not a flag of {program}"
    for option in re.split(r"\n│ (?=--)", shown)[1:]:
        assert "(required)" not in option or option.split()[0] in rest, option


def test_make_has_the_targets_that_are_named():
    makefile = (ROOT / "Makefile").read_text()
    for target in {line.split()[1] for line in LINES if re.match(r"make \w", line)}:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_requirements_list_what_is_imported_and_constraints_pin_it():
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    ours = {path.stem for path in SOURCES} | {*FOLDERS}
    distributions = packages_distributions()
    foreign = imported - ours - sys.stdlib_module_names - OPTIONAL
    needed = {distributions[name][0].lower() for name in foreign}

    def read(name):
        lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        return {need.name: need for need in map(Requirement, filter(None, lines))}

    required, pinned = read("requirements.txt"), read("constraints.txt")
    assert set(required) == needed | {"pytest"} == set(pinned)
    for name, need in pinned.items():
        assert required[name].specifier.contains(str(need.specifier).removeprefix("=="))


@pytest.mark.parametrize("page", ["README.md", "results.md"])
def test_success_of_the_policy_in_weights_is_counted_from_its_episodes(page):
    folders = {"eval": 60, "eval-flow": 20, "eval-random": 60, "eval-expert": 60}
    for cell, (folder, number) in enumerate(folders.items(), start=2):
        columns = table(read_lines(ROOT / f"results/learn/{folder}/episodes.jsonl"), {})
        for name, column in columns.items():
            (row,) = re.findall(rf"^\| {name.replace('_', ' ')} \|.* [\d.]+ \|$", PAGES[page], re.M)
            rate, shown = format_rate(column).split(", at the end")[0], row.split("|")[cell].strip()
            assert column["n"] == number and shown in (rate, re.sub(r" = [\d.]+", "", rate))


def test_the_miniature_tables_their_metrics_and_verdicts_are_those_in_results():
    page = words(PAGES["results.md"])
    for path in (ROOT / "results").glob("*/table-*.json"):
        table = read_json(path)
        lines = [line for line in [*to_markdown(table), *table["differs"]] if line[:2] != "|-"]
        missing = [line for line in lines if words(line) not in page]
        assert not missing, "\n".join(missing)


def test_the_figures_of_what_a_run_survives_are_those_in_results():
    figures, section = read_json(ROOT / "results/endure.json"), PAGES["running.md"]
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
    section = PAGES["speed.md"]
    figures = {path.stem: read_json(path) for path in (ROOT / "results/bench").glob("*.json")}

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
    assert f"{exact['different']} of {exact['tokens']:,} differ" in words(section)
    for ratio in figures["redesign"]["ratios"].values():
        low, middle, high = (f"{ratio[key]:.2f}" for key in ("min", "speed of new / old", "max"))
        assert f"{middle} [{low}, {high}]" in section
    for figure in figures["h200"]["samples/s with clip and Adam"].values():
        assert f"{figure}" in section
