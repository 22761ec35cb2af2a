"""The policy in weights/: whole, small, of this code, and what its table says it is."""

import re

import pytest
from processes import REPOSITORY, run

from config import model_config
from paper import PAPER_COLUMNS
from storage.checkpoint import model_config_of, newest, read_manifest
from storage.files import read_json, read_lines, sha256
from storage.results import table

STAGE, LEARN = REPOSITORY / "weights/stage2", REPOSITORY / "results/learn"
PAGE = (REPOSITORY / "docs/results.md").read_text()


def test_the_weights_are_whole_small_and_of_the_tiny_preset():
    folder = newest(STAGE)
    manifest = read_manifest(folder)  # compares every file with its sha256
    assert folder.name == (STAGE / "last").read_text() and manifest["stage"] == 2
    assert model_config_of(manifest) == model_config("tiny")  # --init-from takes them
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6  # bytes


def test_results_learn_has_their_evaluation_which_lies_above_random_actions():
    results = read_json(LEARN / "eval/results.json")
    assert results["manifest"]["checkpoint"] == sha256(newest(STAGE) / "manifest.json")
    chance = table(read_lines(LEARN / "eval-random/episodes.jsonl"), {})
    columns = table(read_lines(LEARN / "eval/episodes.jsonl"), {})
    for name in PAPER_COLUMNS:
        figures, written = columns[name], results["columns"][name]
        assert written == pytest.approx(figures | {"paper": written["paper"]}, abs=1e-8)
        assert figures["n"] >= 60 and figures["success_once"] >= 0.8
        assert figures["low"] > max(0.5, chance[name]["high"])


def test_every_held_out_figure_beats_the_best_constant_and_stands_on_the_page():
    for metric in read_json(STAGE / "validation.json")["metrics"].values():
        digits = 1 if metric["unit"] in ("cm", "degrees") else 3
        ours, constant = (f"{metric[key]:.{digits}f}" for key in ("ours", "trivial"))
        assert re.search(rf"\| {ours}( cm| degrees)? \| {constant} \|", PAGE)
        assert (metric["ours"] > metric["trivial"]) == metric["higher_is_better"]


def test_the_policy_in_weights_closes_the_drawer(assets, tmp_path):
    flags = "--columns close_drawer --episodes 3 --stop-at-success --workers 2 --device cpu"
    run("eval.py", "--checkpoint", STAGE, *flags.split(), "--out", tmp_path)
    assert sum(each["success_once"] for each in read_lines(tmp_path / "episodes.jsonl")) >= 2
