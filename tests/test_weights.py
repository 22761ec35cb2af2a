"""The policy in weights/: whole, small, of this code, and what its table says it is."""

import json
import re

import pytest
from processes import REPOSITORY, start

from config import model_config
from storage.checkpoint import model_config_of, newest, read_manifest
from storage.files import read_lines, sha256
from storage.results import format_rate, table

STAGE = REPOSITORY / "weights/stage2"
COLUMNS = ("close_fridge", "close_drawer")


def test_the_weights_are_whole_small_and_of_the_tiny_preset():
    folder = newest(STAGE)
    manifest = read_manifest(folder)  # compares every file with its sha256
    assert folder.name == (STAGE / "last").read_text() and manifest["stage"] == 2
    assert model_config_of(manifest) == model_config("tiny")  # --init-from takes them
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16e6  # bytes


def test_their_table_is_counted_from_their_episodes_and_lies_above_one_half():
    page = (REPOSITORY / "docs/results.md").read_text()
    report = (STAGE.parent / "report.md").read_text()
    results = json.loads((STAGE.parent / "eval/results.json").read_text())
    assert results["manifest"]["checkpoint"] == sha256(newest(STAGE) / "manifest.json")
    chance = table(read_lines(STAGE.parent / "eval-random/episodes.jsonl"), {})
    columns = table(read_lines(STAGE.parent / "eval/episodes.jsonl"), {})
    for name in COLUMNS:
        figures, written = columns[name], results["columns"][name]
        assert written == pytest.approx(figures | {"paper": written["paper"]}, abs=1e-8)
        assert figures["n"] >= 60 and figures["low"] > max(0.5, chance[name]["high"])
        text = format_rate(figures).split(", at the end")[0]
        (line,) = re.findall(rf"^\| {name.replace('_', ' ')}, weights/ .*", page, re.M)
        assert text in line and text in report
    metrics = json.loads((STAGE / "validation.json").read_text())["metrics"]
    known = page.split("Of held-out frames it knows")[1].split("\n\n")[0]
    for name in ("action_token_accuracy", "qpos_r2", "mask_iou_head", "mask_iou_hand"):
        assert f"{metrics[name]['ours']:.3f}" in known
    assert f"base position {metrics['base_position_error']['ours']:.1f} cm" in known


def test_they_close_the_drawer(assets, tmp_path):
    flags = "--columns close_drawer --episodes 3 --stop-at-success --workers 2 --device cpu"
    process = start("eval.py", "--checkpoint", STAGE, *flags.split(), "--out", tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    episodes = read_lines(tmp_path / "episodes.jsonl")
    assert len(episodes) == 3 and sum(episode["success_once"] for episode in episodes) >= 2
