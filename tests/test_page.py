"""report.html in a real browser: what it shows, by keyboard alone, with nothing from outside."""

import base64
import io
import json
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from PIL import Image
from tiny_run import write_untrained

from env import SubtaskEnv
from eval import EvalConfig
from eval import main as evaluate
from policy import Policy
from tools import page as page_module
from tools.film import outline
from tools.report import write_report

TEXT = """<script>alert("it's")</script> & 'so' on"""  # in every place that text comes from files
STEPS = 6
CELL = {"n": 60, "rate": 0.7333, "low": 0.6111, "high": 0.8299, "by_seed": {"0": 0.71, "1": 0.76}}
METRIC = {"ours": 5.43, "low": 4.9, "high": 5.97, "trivial": 98.1, "unit": "cm"}
ROW = {
    "label": f"AuxVLA {TEXT}",
    "seeds": [0, 1],
    "cells": {"set_table/close_drawer": CELL | {"paper": 0.91}},
    "metrics": {"base_position_error": METRIC | {"higher_is_better": False}},
}
CLAIM = {"name": "a", "table": 2, "statement": f"it helps {TEXT}", "paper": 0.22, "ours": 0.053}
CLAIM |= {"low": -0.104, "high": 0.198, "seeds": 2, "seeds_needed": 4, "verdict": "cannot tell"}
TABLE = {
    "table": 2, "title": "Table 2 in miniature", "command": "python -m tools.reproduce --table 2",
    "task_columns": [["set_table", "close_drawer"], ["set_table", "close_fridge"]],
    "rows": {"auxvla-all": ROW, "auxvla": dict(label="bare", seeds=[], cells={}, metrics={})},
    "claims": [CLAIM, {"name": "b", "table": 2, "statement": "and that", "verdict": "not run"}],
    "differs": [f"other weights {TEXT}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory) -> Path:
    """A run with a film of an untrained policy that has all decoders, a log, metrics, a table."""
    run = tmp_path_factory.mktemp("run")
    env = SubtaskEnv("set_table", "pick", "all", obs_mode="state_dict")
    stage = run / "stage2"
    write_untrained(stage, env, "pick up the apple")
    env.close()
    chosen = dict(columns=("pick_all",), episodes=1, horizon=STEPS, video=1)
    told = dict(unseen_instructions=True, device="cpu")
    evaluate(EvalConfig(out=run / "eval", checkpoint=stage, **chosen, **told))
    lines = [{"step": s, "action": 1 / s, "val_action": 2 / s} for s in range(1, 30)]
    (stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"base_position_error": METRIC | {"higher_is_better": False, "n": 9}}
    (stage / "validation.json").write_text(json.dumps({"metrics": metrics}))
    (run / "table-2.json").write_text(json.dumps(TABLE))
    (steps,) = (run / "eval/videos").glob("*.json")
    film = json.loads(steps.read_text())
    steps.write_text(json.dumps(film | {"instruction": TEXT}))
    write_report(run)
    return run


@pytest.fixture(scope="module")
def film(run) -> dict:
    return json.loads((run / "eval/videos/pick_all_0_fail.json").read_text())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("no Chromium here; as root: bash tools/setup.sh browser")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(params=[390, 1280])
def opened(chromium, run, request) -> Browser:
    chromium.open(run / "report.html", width=request.param)
    return chromium


def picture(step: dict, name: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(step["pictures"][name]))))


def shown(browser: Browser) -> dict[str, str]:
    """{"predicted/pos/0": "0.12", ...} at the slider's step, and what its pictures are."""
    return browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-of]')].map(x => [x.dataset.of,"
        "x.textContent]).concat([...document.querySelectorAll('[data-picture]')].map(x =>"
        "[x.dataset.picture, x.src.split(',')[1]])))"
    )


def cells(browser: Browser, table: str) -> list[list[str]]:
    rows = f"[...document.querySelector('{table}').rows]"
    return browser.evaluate(f"{rows}.map(row => [...row.cells].map(cell => cell.innerText))")


def expected(step: dict) -> dict[str, str]:
    numbers = {
        f"{which}/{key}/{i}": f"{value:.2f}"
        for which in ("true", "predicted")
        for key, values in step[which].items()
        for i, value in enumerate(values)
    }
    return numbers | step["pictures"]


def close(ours: dict[str, str], theirs: dict[str, str]) -> bool:
    """Equal texts; of numbers, but for the sign of zero and how a tie is rounded."""
    return set(ours) == set(theirs) and all(
        abs(float(ours[key]) - float(theirs[key])) < 0.011 if "/" in key[:12] else ours[key] == each
        for key, each in theirs.items()
    )


def test_a_film_records_what_was_seen_and_predicted_at_every_step(run, film):
    """Against the same episode, run again."""
    policy = Policy.from_checkpoint(run / "stage2", device="cpu")
    env = SubtaskEnv("set_table", "pick", "all", "val")
    torch.manual_seed(0)
    obs = env.reset(seed=0)
    assert [step["step"] for step in film["steps"]] == list(range(STEPS))
    for step in film["steps"]:
        action = policy.act(obs, env.instruction)
        predicted = {key: value[0] for key, value in policy.predictions.items()}
        predicted["obj"] = predicted["obj"][:3]
        true = {"grasp": obs["extra"]["is_grasped"], "pos": env.pos, "qpos": obs["agent"]["qpos"]}
        true["obj"] = obs["extra"]["obj_pose_wrt_base"][0, :3]
        for key, value in true.items():
            assert step["true"][key] == pytest.approx(np.ravel(value).astype(float), abs=1e-4)
            assert step["predicted"][key] == pytest.approx(np.ravel(predicted[key]), abs=1e-3)
        for i, camera in enumerate(("head", "hand")):
            mask = env.target_masks(obs)[i]
            assert (picture(step, f"{camera}_true") == outline(mask)).all()
            differ = picture(step, f"{camera}_predicted") != (predicted["seg"][i] > 0.5)
            assert differ.mean() < 0.01
            seen = obs["sensor_data"][f"fetch_{camera}"]["rgb"][0].numpy().astype(float)
            assert abs(picture(step, f"{camera}_rgb") - seen).mean() < 6
        obs, _ = env.step(action[0])
    assert film["success"] is False and film["qpos_names"] == env.qpos_names
    env.close()


def test_nothing_fails_nothing_is_fetched_and_nothing_overflows(opened):
    opened.evaluate("new Promise(done => setTimeout(done, 300))")
    assert opened.of("Runtime.exceptionThrown") == [] and opened.of("Log.entryAdded") == []
    assert opened.of("Runtime.consoleAPICalled") == []
    urls = [event["request"]["url"] for event in opened.of("Network.requestWillBeSent")]
    files = [url for url in urls if not url.startswith("data:")]
    assert len(files) == 1 and files[0].endswith("/report.html")
    width = opened.evaluate("document.documentElement.scrollWidth")
    assert width == opened.evaluate("innerWidth")
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    assert opened.evaluate(broken) == 0
    assert opened.evaluate("document.querySelector('.stack img').naturalWidth") == 128


def test_arrow_keys_move_pictures_and_numbers_to_the_files_own(opened, film):
    opened.evaluate("document.querySelector('input[type=range]').focus()")
    for key, step in (("", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 5)):
        if key:
            opened.press(key)
        assert close(shown(opened), expected(film["steps"][step]))
        spoken = opened.evaluate("document.activeElement.getAttribute('aria-valuetext')")
        grasp = float(film["steps"][step]["predicted"]["grasp"][0])
        assert spoken.startswith(f"{step}: holds the target predicted {grasp:.2f}")
    moved = opened.evaluate("document.querySelector('.cursor').getAttribute('transform')")
    assert moved == "translate(200)"


def test_play_is_a_key_away_and_a_mask_can_be_hidden(opened):
    opened.evaluate("document.querySelector('.walk button').focus()")
    opened.press("Enter")
    assert opened.evaluate("document.activeElement.textContent") == "Pause"
    done = "new Promise(done => setInterval(() => button.textContent === 'Play' && done(), 20))"
    opened.evaluate(f"button = document.querySelector('.walk button'), {done}")
    assert opened.evaluate("document.querySelector('input[type=range]').value") == str(STEPS - 1)
    mask = "getComputedStyle(document.querySelector('[data-picture=head_predicted]')).visibility"
    assert opened.evaluate(mask) == "visible"
    opened.evaluate("document.querySelector('input[value=predicted]').focus()")
    opened.press(" ")
    assert opened.evaluate(mask) == "hidden"


def test_tab_reaches_all_that_a_mouse_could(opened):
    every = "a, button, input, video, summary, .scroll"
    opened.evaluate(f"wanted = new Set(document.querySelectorAll('{every}')), wanted.size")
    kinds = opened.evaluate("[...new Set([...wanted].map(each => each.localName))]")
    assert {"a", "button", "input", "video", "summary", "div", "pre"} == set(kinds)
    for _ in range(80):
        opened.press("Tab")
        if opened.evaluate("wanted.delete(document.activeElement), wanted.size") == 0:
            break
    assert opened.evaluate("[...wanted].map(each => each.outerHTML.slice(0, 80))") == []


def test_what_can_be_moved_has_a_name_for_those_who_hear_it(opened):
    named = "each.labels?.length || each.getAttribute('aria-label') || each.localName == 'button'"
    controls = "[...document.querySelectorAll('input, button, video, .scroll')]"
    assert opened.evaluate(f"{controls}.filter(each => !({named})).length") == 0


def test_the_tables_figures_are_those_of_the_file(run, opened):
    rows = cells(opened, "table")
    assert rows[0] == ["", "set table/close drawer", "set table/close fridge", "average"]
    assert rows[1][1].split("\n") == [
        "0.73", "[0.61, 0.83]", "60 episodes, by seed 0.71 0.76", "paper 0.91",
    ]  # fmt: skip
    assert rows[1][2:] == rows[2][2:] == ["not run"] * 2 and rows[2][1] == "not run"
    bar = "document.querySelector('.bar .fill').getBoundingClientRect()"
    track = "document.querySelector('.bar .track').getBoundingClientRect()"
    assert opened.evaluate(f"{bar}.width / {track}.width") == pytest.approx(0.7333, abs=2e-3)
    claims = opened.evaluate("document.querySelector('.claims').innerText")
    assert "paper +0.22, here +0.05 [-0.10, +0.20], 2 seeds (4 would detect" in claims
    assert claims.splitlines()[0] == "cannot tell" and "not run" in claims
    text = opened.evaluate("document.querySelector('main').innerText")
    assert "5.43 cm" in text and "[4.9, 5.97]" in text and "trivial 98.1" in text
    assert "python -m tools.reproduce --table 2" in text


def test_the_runs_figures_are_those_of_its_results(run, opened):
    results = json.loads((run / "eval/results.json").read_text())["columns"]["pick_all"]
    rows = cells(opened, "#success table")
    assert rows[0][:4] == ["", "ours", "random", "expert"] and rows[1][0] == "pick all"
    low, high = (f"{results[key]:.2f}" for key in ("low", "high"))
    assert rows[1][1].split("\n") == ["0.00", f"[{low}, {high}]", "0/1", "at the end 0.00"]
    assert rows[1][2:4] == ["not run"] * 2 and rows[2][1:4] == ["not run"] * 3
    lines = opened.evaluate("document.querySelectorAll('#losses polyline').length")
    assert lines == 2
    assert "5.43 cm" in opened.evaluate("document.querySelector('#held-out-episodes').innerText")


def test_text_from_files_is_shown_and_never_run(run, opened):
    headings = opened.evaluate("document.querySelector('#step-by-step').innerText")
    assert TEXT in headings
    text = opened.evaluate("document.querySelector('#table-2-in-miniature').innerText")
    assert all(f"{before} {TEXT}" in text for before in ("AuxVLA", "it helps", "other weights"))
    content = (run / "report.html").read_text()
    assert "<script>alert" not in content and escape(TEXT) in content


def test_what_is_absent_is_not_run(tmp_path):
    (tmp_path / "stage1").mkdir()
    write_report(tmp_path)
    content = (tmp_path / "report.html").read_text()
    for name in ("step-by-step", "films", "held-out-episodes", "losses", "manifests"):
        part = content.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert part.endswith("<p>not run</p>")


def test_a_folder_of_tables_alone_claims_nothing_of_a_run(tmp_path):
    (tmp_path / "table-2.json").write_text(json.dumps(TABLE))
    write_report(tmp_path)
    content = (tmp_path / "report.html").read_text()
    assert 'id="table-2-in-miniature"' in content and 'id="success"' not in content


def test_films_beyond_the_pages_size_are_left_out_by_name(run, tmp_path, monkeypatch):
    shutil.copytree(run / "eval", tmp_path / "eval")
    video = (tmp_path / "eval/videos/pick_all_0_fail.mp4").stat().st_size
    steps = (tmp_path / "eval/videos/pick_all_0_fail.json").stat().st_size
    monkeypatch.setattr(page_module, "LIMIT", steps + video)  # base64 takes a third more
    write_report(tmp_path)
    content = (tmp_path / "report.html").read_text()
    assert "<video" not in content and 'type="range"' in content
    assert "Left out, for the size of this page: eval/videos/pick_all_0_fail.mp4 (" in content
