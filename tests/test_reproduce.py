"""The paper's tables in miniature: their intervals, the claims' verdicts, and a run of one row."""

import os
import re
import shutil
import signal
from math import copysign
from pathlib import Path

import numpy as np
import pytest
from processes import REPOSITORY as ROOT
from processes import run, start, wait_for

from config import InputError
from paper import ROWS
from storage.files import append, read_json, write_json
from storage.results import wilson
from tools.claims import (
    CLAIMS,
    difference,
    format_claim,
    judge,
    make_table,
    rate_of,
    to_markdown,
)  # fmt: skip
from tools.reproduce import KEPT, ReproduceConfig, Runner, cell, check_recipe, main, trained_as

CLAIM = {claim.name: claim for claim in CLAIMS}


def write_row(folder: Path, rates: dict[str, list[float]], n: int = 60):
    """Write a row's episodes from {column: success rate of each training seed}."""
    for column, by_seed in rates.items():
        for seed, rate in enumerate(by_seed):
            path = folder / f"seed-{seed}/set_table/episodes.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                append(path, {"column": column, "seed": i, "success_once": i < round(rate * n)})


def judge_in(folder: Path, name: str, preset: str = "tiny", **rows: dict) -> dict:
    """Judge a claim from its rows' episodes: {row: rates of write_row}."""
    for row, rates in rows.items():
        write_row(folder / row.replace("_", "-"), rates)
    return judge(CLAIM[name], {row: folder / cell(row) for row in ROWS}, preset)


def make_row(folder: Path, row: str = "auxvla-all") -> dict:
    return make_table(folder, 2, (row,), cell, "tiny")["rows"][row]


def test_rows_that_are_trained_alike_are_trained_once():
    assert cell("auxvla") == cell("base-depth") == "base-depth"
    assert cell("auxvla-tokens") == cell("auxvla-all") == "auxvla-all"
    assert trained_as("auxvla-action-head", 2) == "auxvla-all"
    assert cell("auxvla-action-head") == "auxvla-action-head"
    apart = [name for name in ROWS if ROWS[name].table == 2]
    assert len(set(map(cell, apart))) == len(apart)


def test_a_folder_of_other_numbers_or_without_results_is_refused(tmp_path):
    cfg = ReproduceConfig(table=2, out=tmp_path / "out", work=tmp_path / "work")
    for folder in cfg.folders * 2:
        check_recipe(cfg, folder)
    for folder in cfg.folders:  # results, and demonstrations
        with pytest.raises(InputError, match=r"this command of .*'steps_per_epoch': 7"):
            check_recipe(ReproduceConfig(table=2, steps_per_epoch=7), folder)
    with pytest.raises(InputError, match=r"this command of .*pick_all"):  # not Table 3's columns
        main(ReproduceConfig(table=3, out=cfg.out, run=False))
    assert not (cfg.out / "table-3.json").exists()
    with pytest.raises(InputError, match="no results to make a table from"):
        main(ReproduceConfig(table=2, out=tmp_path / "none", run=False))


def test_seeds_that_differ_widen_wilsons_interval_and_equal_ones_do_not_narrow_it():
    one, alike = rate_of({0: (45, 60)}), rate_of({s: (30, 60) for s in range(3)})
    assert (one["low"], one["high"]) == wilson(45, 60)
    assert (alike["low"], alike["high"]) == wilson(90, 180)
    apart = rate_of({0: (10, 60), 1: (30, 60), 2: (50, 60)})
    assert apart["rate"] == alike["rate"]
    assert apart["low"] < alike["low"] and apart["high"] > alike["high"]


def test_intervals_of_noisy_trainings_cover_the_true_difference():
    """95 % are promised; over episodes alone, as if all came from one policy, it would be 70 %."""
    rng, covered, narrow = np.random.default_rng(0), 0, 0
    for _ in range(400):
        rows = []
        for rate in (0.4, 0.6):
            rates = np.clip(rng.normal(rate, 0.1, 3), 0, 1)
            counts = {s: (int(rng.binomial(120, p)), 120) for s, p in enumerate(rates)}
            rows.append(rate_of(counts))
        pooled = [rate_of({0: (round(row["rate"] * 360), 360)}) for row in rows]
        (_, low, high), (_, low_pooled, high_pooled) = difference(*rows), difference(*pooled)
        covered += low <= 0.2 <= high
        narrow += low_pooled <= 0.2 <= high_pooled
    assert covered / 400 > 0.93 and narrow / 400 < 0.75, (covered, narrow)


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
    rows = {"auxvla-naive": {"close_fridge": naive}, "auxvla-all": {"close_fridge": staged}}
    judged = judge_in(tmp_path, "progressive-beats-naive", **rows)
    assert judged["verdict"] == verdict
    if staged:
        assert judged["paper"] == pytest.approx(0.90 - 0.67)  # of the one column that was run
        claim = CLAIM["progressive-beats-naive"]
        assert claim.paper_effect(claim.keys) == pytest.approx(0.728 - 0.505, abs=0.001)


def test_two_rows_of_one_size_do_not_judge_a_claim_of_sizes(tmp_path):
    rows = {"openvla-depth": [0.1, 0.1], "base-depth": [0.9, 0.9]}
    rows = {name: {"close_fridge": rates} for name, rates in rows.items()}
    judged = judge_in(tmp_path, "smaller-llm-is-better", "tiny", **rows)
    assert judged["verdict"] == "not run" and "one size" in format_claim(judged)
    assert judge_in(tmp_path, "smaller-llm-is-better", "paper")["verdict"] == "agrees"


def test_a_claim_is_not_told_where_the_papers_own_figures_have_another_sign(tmp_path):
    rows = {"base-depth": [0.5, 0.5, 0.45], "auxvla-grasp": [0.9, 0.95, 0.9]}
    rows = {n: {"close_fridge": rates, "close_drawer": [1, 1, 1]} for n, rates in rows.items()}
    judged = judge_in(tmp_path, "grasp-helps", **rows)
    assert judged["paper"] < 0 < judged["low"]
    assert (judged["verdict"], judged["seeds_needed"]) == ("cannot tell", None)


def test_held_out_figures_are_of_the_last_stage_alone_and_an_episode_counts_once(tmp_path):
    folder = tmp_path / "auxvla-all"
    write_row(folder, {"close_fridge": [0.5, 0.5]})
    about = {"trivial": 90.0, "unit": "cm", "higher_is_better": False}
    for seed, stage in ((0, 1), (0, 2), (1, 1)):  # the second training was stopped
        path = folder / f"seed-{seed}/stage{stage}/validation.json"
        path.parent.mkdir()
        write_json(path, {"metrics": {"error": about | {"ours": 10.0 / stage}}})
    again = {"column": "close_fridge", "seed": 0, "success_once": True}
    append(folder / "seed-0/set_table/episodes.jsonl", again)
    row = make_row(tmp_path)
    assert row["metrics"]["error"]["ours"] == 5.0 and "low" not in row["metrics"]["error"]
    assert row["cells"]["set_table/close_fridge"]["n"] == 120


def test_an_average_counts_only_trainings_that_have_every_column(tmp_path):
    write_row(tmp_path / "auxvla-all", {"close_fridge": [0.5, 1.0], "close_drawer": [1.0]})
    table = make_table(tmp_path, 2, ("auxvla-all", "auxvla-naive"), cell, "tiny")
    average = table["rows"]["auxvla-all"]["cells"]["average"]
    assert (average["n"], average["rate"], average["paper"]) == (120, 0.75, 0.95)
    lines = [re.sub(" +", " ", line) for line in to_markdown(table)]  # columns are padded
    assert "| AuxVLA + all, naive | 0 | not run | not run | not run |" in lines


def test_the_tables_in_results_are_made_again_from_their_episodes(tmp_path):
    """To the last printed digit: the rest is the rounding of the library's Wilson interval."""
    for path in sorted(shutil.copytree(ROOT / "results", tmp_path / "all").glob("*/table-*.json")):
        committed, recipe = read_json(path), read_json(path.parent / "recipe.json")
        recipe |= {name: tuple(recipe[name]) for name in ("columns", "tasks")}
        write_json(path, committed | {"claims": []})
        for rows in (full := tuple(committed["rows"])[:-2], full[:1]):  # one row replaces no table
            main(ReproduceConfig(int(path.stem[-1]), rows, out=path.parent, run=False, **recipe))
        assert to_markdown(made := read_json(path)) == to_markdown(committed)
        assert made["differs"] == committed["differs"]


def test_logs_in_out_stay_those_of_the_training_that_ran_the_episodes(tmp_path):
    def command(log: Path, program: str, *, out: Path, **flags):
        out.mkdir(parents=True)
        for name in KEPT:
            (out / name).write_text("trained again")

    runner = Runner(ReproduceConfig(4, out=tmp_path / "out", work=tmp_path / "work"))
    runner.command = command
    log = tmp_path / "out/auxvla-all/seed-0/stage1/log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("of the training that acted")
    for stage in (1, 3):  # the action head's stage 1 is that of auxvla-all
        runner.train("auxvla-action-head", stage, seed=0)
    assert log.read_text() == "of the training that acted"
    assert (tmp_path / "out/auxvla-action-head/seed-0/stage3/log.jsonl").exists()


def test_a_stopped_run_goes_on_and_repeats_nothing(assets, tmp_path):
    flags = "--table 2 --rows auxvla-all --columns close_drawer --seeds 1 --episodes 1"
    flags += f" --demonstrations 2 --steps-per-epoch 1 --out {tmp_path}/out --work {tmp_path}/work"
    command = ["-m", "tools.reproduce", *flags.split(), "--train=--lr 5e-4"]
    first = start(*command)
    wait_for((tmp_path / "out/auxvla-all/seed-0/stage1/validation.json").exists, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    run(*command)
    rows = (made := read_json(tmp_path / "out/table-2.json"))["rows"]
    assert [row["cells"]["set_table/close_drawer"]["n"] for row in rows.values()] == [1, 1, 1]
    assert "base_position_error" in rows["auxvla-all"]["metrics"]
    assert "with --lr 5e-4" in made["differs"][-1] and "--lr 5e-4" in made["command"]
    assert read_json(tmp_path / "out/auxvla-all/seed-0/stage2/config.json")["lr"] == 5e-4
    before = {path: path.read_text() for path in (tmp_path / "work").rglob("log.txt")}
    run(*command)
    assert before == {path: path.read_text() for path in (tmp_path / "work").rglob("log.txt")}
    commands = before[tmp_path / "work/auxvla-all/seed-0/log.txt"].count
    assert (commands("--stage 1"), commands("$ eval.py")) == (2, 1)  # 2: killed after its stage 1
