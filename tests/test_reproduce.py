"""The paper's tables in miniature: their intervals, the claims' verdicts, and a run of one row."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from math import copysign
from pathlib import Path

import numpy as np
import pytest
from processes import REPOSITORY as ROOT

from config import InputError
from paper import ROWS
from storage.files import append
from storage.results import wilson
from tools.claims import (
    CLAIMS,
    difference,
    format_claim,
    judge,
    list_differences,
    rate_of,
    to_markdown,
    write_table,
)  # fmt: skip
from tools.reproduce import ReproduceConfig, cell, check_recipe, main, trained_as


def write_row(folder: Path, rates: dict[str, list[float]], n: int = 60):
    """A row's episodes: {column: success rate of each training seed}."""
    for column, by_seed in rates.items():
        for seed, rate in enumerate(by_seed):
            path = folder / f"seed-{seed}/set_table/episodes.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                append(path, {"column": column, "seed": i, "success_once": i < round(rate * n)})


# --- Which trainings there are ---


def test_rows_that_are_trained_alike_are_trained_once():
    assert cell("auxvla") == cell("base-depth") == "base-depth"
    assert cell("auxvla-tokens") == cell("auxvla-all") == "auxvla-all"
    assert trained_as("auxvla-action-head", 2) == "auxvla-all"
    assert cell("auxvla-action-head") == "auxvla-action-head"
    apart = [name for name in ROWS if ROWS[name].table == 2]
    assert len(set(map(cell, apart))) == len(apart)


def test_a_folder_of_other_numbers_is_refused(tmp_path):
    cfg = ReproduceConfig(table=2, out=tmp_path / "out", work=tmp_path / "work")
    for folder in cfg.folders * 2:
        check_recipe(cfg, folder)
    for kept in ({"out": cfg.out}, {"work": cfg.work}):  # results, or demonstrations
        other = {"out": tmp_path / "new", "work": tmp_path / "new"} | kept
        changed = ReproduceConfig(table=2, steps_per_epoch=7, **other)
        with pytest.raises(InputError, match=r"this command of .*'steps_per_epoch': 7"):
            for folder in changed.folders:
                check_recipe(changed, folder)
    third = ReproduceConfig(table=3, out=cfg.out, run=False)  # not its columns
    with pytest.raises(InputError, match=r"this command of .*pick_all"):
        main(third)
    assert not (cfg.out / "table-3.json").exists()


def test_a_table_of_no_results_says_what_makes_them(tmp_path):
    with pytest.raises(InputError, match="no results to make a table from"):
        main(ReproduceConfig(table=2, out=tmp_path / "none", run=False))


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(table=2, rows=("openvla",)), "--rows openvla: not of Table 2"),
        (dict(table=3, columns=("close_drawer",)), "Table 3 has no close"),
    ],
)
def test_what_a_table_lacks_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        ReproduceConfig(**flags)


# --- Intervals ---


def test_the_interval_of_one_training_is_wilsons():
    cell = rate_of({"0": (45, 60)})
    assert (cell["low"], cell["high"]) == wilson(45, 60)


def test_seeds_that_differ_widen_the_interval_and_equal_ones_do_not_narrow_it():
    alike, apart = rate_of({str(s): (30, 60) for s in range(3)}), None
    assert (alike["low"], alike["high"]) == wilson(90, 180)
    apart = rate_of({"0": (10, 60), "1": (30, 60), "2": (50, 60)})
    assert apart["rate"] == alike["rate"]
    assert apart["low"] < alike["low"] and apart["high"] > alike["high"]


def test_intervals_of_noisy_trainings_cover_the_true_difference():
    """95 % are promised; over episodes alone, as if all came from one policy, it would be 70 %."""
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(400):
        rows = []
        for rate in (0.4, 0.6):
            rates = np.clip(rng.normal(rate, 0.1, 3), 0, 1)
            rows.append(
                rate_of({str(s): (int(rng.binomial(120, p)), 120) for s, p in enumerate(rates)})
            )
        _, low, high = difference(*rows)
        covered += low <= 0.2 <= high
        pooled = [rate_of({"0": (round(row["rate"] * 360), 360)}) for row in rows]
        _, low, high = difference(*pooled)
        narrow += low <= 0.2 <= high
    assert covered / 400 > 0.93 and narrow / 400 < 0.75, (covered, narrow)


# --- Claims ---


def test_every_claim_has_the_papers_sign_in_its_statement():
    for claim in CLAIMS:
        falls = any(word in claim.statement for word in ("lower", "hurt"))
        assert copysign(1, claim.paper_effect(claim.keys)) == (-1 if falls else 1), claim.name


@pytest.mark.parametrize(
    "naive, staged, verdict",
    [
        ([0.2, 0.3, 0.2], [0.8, 0.9, 0.8], "agrees"),
        ([0.8, 0.9, 0.8], [0.2, 0.3, 0.2], "disagrees"),
        ([0.1, 0.5, 0.9], [0.2, 0.6, 1.0], "cannot tell"),
        ([0.1], [0.9], "cannot tell"),  # one training each
        ([0.5], [], "not run"),
    ],
)
def test_a_verdict_follows_the_interval(tmp_path, naive, staged, verdict):
    claim = next(each for each in CLAIMS if each.name == "progressive-beats-naive")
    write_row(tmp_path / "auxvla-naive", {"close_fridge": naive})
    write_row(tmp_path / "auxvla-all", {"close_fridge": staged})
    judged = judge(claim, {name: tmp_path / cell(name) for name in ROWS}, "tiny")
    assert judged["verdict"] == verdict
    if staged:
        assert judged["paper"] == pytest.approx(0.90 - 0.67)  # of the one column that was run
        assert judged["paper_all_columns"] == pytest.approx(0.728 - 0.505, abs=0.001)


def test_two_rows_of_one_size_do_not_judge_a_claim_of_sizes(tmp_path):
    for row in ("openvla-depth", "base-depth"):
        write_row(tmp_path / row, {"close_fridge": [0.1, 0.1] if "vla" in row else [0.9, 0.9]})
    claim = next(each for each in CLAIMS if each.name == "smaller-llm-is-better")
    folders = {name: tmp_path / cell(name) for name in ROWS}
    assert judge(claim, folders, "paper")["verdict"] == "agrees"
    judged = judge(claim, folders, "tiny")
    assert judged["verdict"] == "not run" and "one size" in format_claim(judged)


def test_what_differs_from_the_paper_is_said_of_the_preset_that_ran(tmp_path):
    write_row(tmp_path / "base-depth", {"close_fridge": [0.5]})
    tiny, paper = (write_table(tmp_path, 1, ("base-depth",), cell, p) for p in ("tiny", "paper"))
    assert "4.6 M parameters" in list_differences(tiny) and "OpenVLA" in list_differences(tiny)
    assert "4.6 M parameters" not in list_differences(paper) and "scripted" in list_differences(
        paper
    )


def test_a_claim_is_not_told_where_the_papers_own_figures_have_another_sign(tmp_path):
    write_row(
        tmp_path / "base-depth", {"close_fridge": [0.5, 0.5, 0.45], "close_drawer": [1, 1, 1]}
    )
    write_row(
        tmp_path / "auxvla-grasp", {"close_fridge": [0.9, 0.95, 0.9], "close_drawer": [1, 1, 1]}
    )
    claim = next(each for each in CLAIMS if each.name == "grasp-helps")
    judged = judge(claim, {name: tmp_path / cell(name) for name in ROWS}, "tiny")
    assert judged["paper_all_columns"] > 0 > judged["paper"] and judged["low"] > 0
    assert (judged["verdict"], judged["seeds_needed"]) == ("cannot tell", None)


def test_held_out_figures_are_of_the_last_stage_alone_and_an_episode_counts_once(tmp_path):
    seeds = tmp_path / "auxvla-all/seed-0", tmp_path / "auxvla-all/seed-1"
    about = {"trivial": 90.0, "unit": "cm", "higher_is_better": False}
    for folder, stages in zip(seeds, ((1, 2), (1,)), strict=True):  # the second was stopped
        for stage in stages:
            path = folder / f"stage{stage}/validation.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"metrics": {"error": about | {"ours": 10.0 / stage}}}))
    write_row(tmp_path / "auxvla-all", {"close_fridge": [0.5, 0.5]})
    append(
        seeds[0] / "set_table/episodes.jsonl",
        {"column": "close_fridge", "seed": 0, "success_once": True},
    )
    row = write_table(tmp_path, 2, ("auxvla-all",), cell, "tiny")["rows"]["auxvla-all"]
    assert row["metrics"]["error"]["ours"] == 5.0 and "low" not in row["metrics"]["error"]
    assert row["cells"]["set_table/close_fridge"]["n"] == 120


def test_every_training_counts_also_beyond_the_tenth_and_no_other_folder_does(tmp_path):
    write_row(tmp_path / "auxvla-all", {"close_fridge": [0.5] * 12}, n=2)
    episodes = tmp_path / "auxvla-all/seed-0/set_table/episodes.jsonl"
    copy = tmp_path / "auxvla-all/seed-0-old/set_table/episodes.jsonl"
    copy.parent.mkdir(parents=True)
    shutil.copyfile(episodes, copy)
    row = write_table(tmp_path, 2, ("auxvla-all",), cell, "tiny")["rows"]["auxvla-all"]
    assert row["seeds"] == [*range(12)] and row["cells"]["set_table/close_fridge"]["n"] == 24


def test_an_average_counts_only_trainings_that_have_every_column(tmp_path):
    write_row(tmp_path / "auxvla-all", {"close_fridge": [0.5, 1.0], "close_drawer": [1.0]})
    table = write_table(tmp_path, 2, ("auxvla-all", "auxvla-naive"), cell, "tiny")
    average = table["rows"]["auxvla-all"]["cells"]["average"]
    assert (average["n"], average["rate"], average["paper"]) == (120, 0.75, 0.95)
    assert "| AuxVLA + all, naive | 0 | not run | not run | not run |" in to_markdown(table)


def test_the_tables_in_results_are_made_again_from_their_episodes(tmp_path):
    """To the last printed digit: the rest is the rounding of the library's Wilson interval."""
    shutil.copytree(ROOT / "results/set_table", tmp_path / "results")
    for number in (1, 2, 4):
        committed = json.loads((tmp_path / f"results/table-{number}.json").read_text())
        main(ReproduceConfig(number, out=tmp_path / "results", run=False))
        made = json.loads((tmp_path / f"results/table-{number}.json").read_text())
        assert to_markdown(made) == to_markdown(committed)
        assert made["differs"] == committed["differs"]


# --- A run ---


def test_a_stopped_run_goes_on_and_repeats_nothing(assets, tmp_path):
    flags = "--table 2 --rows auxvla-all --columns close_drawer --seeds 1 --episodes 1"
    flags += f" --demonstrations 2 --steps-per-epoch 1 --out {tmp_path}/out --work {tmp_path}/work"
    command = [sys.executable, "-m", "tools.reproduce", *flags.split()]
    staged = tmp_path / "out/auxvla-all/seed-0"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, process_group=0)
    while not (staged / "stage1/validation.json").exists():
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out/table-2.json").read_text())
    for row in ("auxvla-all", "random", "expert"):
        assert table["rows"][row]["cells"]["set_table/close_drawer"]["n"] == 1
    assert "base_position_error" in table["rows"]["auxvla-all"]["metrics"]
    logs = [*(tmp_path / "work").rglob("log.txt")]
    before = {path: path.read_text() for path in logs}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert before == {path: path.read_text() for path in logs}
    commands = before[tmp_path / "work/auxvla-all/seed-0/log.txt"].count
    assert (commands("--stage 1"), commands("$ eval.py")) == (2, 1)  # 2: it was killed behind it

    # On another machine, a row that stands on its training: its logs stay.
    shutil.rmtree(tmp_path / "work/auxvla-all")
    (staged / "stage1/log.jsonl").write_text("of the training that acted\n")
    fourth = [word.replace("auxvla-all", "auxvla-action-head") for word in command]
    fourth[fourth.index("2")] = "4"
    subprocess.run(fourth, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "out/auxvla-action-head/seed-0/stage3/log.jsonl").exists()
    assert (staged / "stage1/log.jsonl").read_text() == "of the training that acted\n"
