"""report.html, also in a real browser, and the film that eval.py draws."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from tiny_run import write_untrained

from config import InputError
from data import normalize_depth
from policy import Policy
from simulation.env import SubtaskEnv
from simulation.film import INSET, PREDICTED, TRUE, VIEW, Film, outline
from storage.files import append, read_json, write_json
from storage.results import table
from tools.report import read_run, write_report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROBE = """<script>
addEventListener("load", () => {
  const widths = [420, 1200].map(width => {
    document.documentElement.style.width = width + "px";
    return document.body.scrollWidth;
  });
  const films = [...document.querySelectorAll("video")].map(video => video.videoWidth);
  document.title = [...widths, ...films].join(" ");
});
</script>"""

TEXT = """<script>alert("it's")</script> & 'so' on"""  # in every place that text comes from files
CELL = {"n": 60, "rate": 0.7333, "low": 0.6111, "high": 0.8299, "by_seed": {"0": 0.71, "1": 0.76}}
METRIC = dict(ours=5.43, low=4.9, high=5.97, trivial=98.1, unit="cm", higher_is_better=False)
ROW = {"label": f"AuxVLA {TEXT}", "seeds": [0, 1], "metrics": {"base_position_error": METRIC}}
ROW |= {"cells": {"set_table/close_drawer": CELL | {"paper": 0.91}}}
CLAIM = {"name": "a", "statement": f"it helps {TEXT}", "paper": 0.22, "ours": 0.053}
CLAIM |= {"low": -0.104, "high": 0.198, "seeds": 2, "seeds_needed": 4, "verdict": "cannot tell"}
TABLE = {
    "title": "Table 2 in miniature", "command": "python -m tools.reproduce --table 2",
    "task_columns": [["set_table", "close_drawer"], ["set_table", "close_fridge"]],
    "rows": {"auxvla-all": ROW, "auxvla": dict(label="bare", seeds=[], cells={}, metrics={})},
    "claims": [CLAIM, {"name": "b", "statement": "and that", "verdict": "not run"}],
    "differs": [f"other weights {TEXT}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with an evaluation and its film, a log, metrics, and a table."""
    run = tmp_path_factory.mktemp("run")
    (run / "eval/videos").mkdir(parents=True)
    (run / "stage2").mkdir()
    frames = [np.full((VIEW, 848, 3), grey, np.uint8) for grey in (0, 128, 255)]
    imageio.mimwrite(run / "eval/videos/pick_all_0_fail.mp4", frames, fps=20)
    (run / "eval/videos/pick_all_1.part.mp4").write_text("half of one")
    episode = {"column": "pick_all", "success_once": False, "success_at_end": False}
    manifest = {"policy": "learned", "task": "set_table", "row": "auxvla-all", "command": TEXT}
    results = {"columns": table([episode], {"pick_all": 0.13}), "manifest": manifest}
    write_json(run / "eval/results.json", results)
    for step in range(1, 30):
        append(run / "stage2/log.jsonl", {"step": step, "action": 1 / step, "val_action": 2 / step})
    grasp = {"ours": 0.5, "trivial": 0.9, "unit": "share", "higher_is_better": True, "n": 9}
    metrics = {"base_position_error": METRIC | {"n": 9}, "grasp": grasp}
    write_json(run / "stage2/validation.json", {"metrics": metrics})
    write_json(run / "table-2.json", TABLE)
    return run


def write_page(run: Path) -> str:
    write_report(run)
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def page(run) -> str:
    return write_page(run)


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def words(html: str) -> str:
    """What a reader sees of a piece of the page, without its charts."""
    html = re.sub(r"<svg.*?</svg>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def cells(page: str, name: str, number: int = 0) -> list[list[str]]:
    """The words of a section's table, by row."""
    body = section(page, name).split("<table>")[1 + number].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [[words(c) for c in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows]


def test_a_browser_shows_the_page_as_wide_as_a_phone_and_a_desk(page, tmp_path):
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    (tmp_path / "page.html").write_text(page + PROBE)
    flags = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    flags += ["--no-sandbox"] * (os.getuid() == 0)
    flags += [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/page.png"]
    command = [chromium, *flags, "--enable-logging=stderr", "--dump-dom", tmp_path / "page.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    assert re.search("<title>(.*?)</title>", shown.stdout)[1] == "420 1200 848"
    assert imageio.imread(tmp_path / "page.png").std() > 10  # something is drawn


def test_the_page_fetches_nothing_and_runs_no_text_of_files(page):
    addresses = re.findall(r"""(?:src|href)=["'](.*?)["']|url\((.*?)\)""", page)
    assert len(addresses) > 5
    assert all("".join(each).startswith(("data:", "#")) for each in addresses)
    assert "@import" not in page and "<script" not in page
    text = words(section(page, "table-2-in-miniature"))
    assert all(f"{before} {TEXT}" in text for before in ("AuxVLA", "it helps", "other weights"))
    assert json.dumps(TEXT) in words(section(page, "manifests"))


def test_the_tables_figures_are_those_of_the_file(page):
    name = "table-2-in-miniature"
    heads, ours, bare = cells(page, name)
    assert heads == ["", "set table/close drawer", "set table/close fridge", "average"]
    assert ours[1] == "0.73 [0.61, 0.83] 44/60, by seed 0.71 0.76 paper 0.91"
    assert ours[2:] == ["not run"] * 2 and bare[1:] == ["not run"] * 3
    assert cells(page, name, 1)[1][1] == "5.43 cm [4.9, 5.97] trivial 98.1"
    text = words(section(page, name))
    evidence = "Here +0.05 [-0.10, +0.20], the paper in these columns +0.22; 2 seeds, 4 would"
    assert evidence in text
    assert "cannot tell it helps" in text and "not run and that" in text
    assert "python -m tools.reproduce --table 2" in text
    charts = re.findall(r"<svg.*?</svg>", section(page, name), re.S)
    assert len(charts) == 1 and ">0.73</text>" in charts[0]


def test_the_runs_figures_are_those_of_its_results(page):
    heads, ours, *bounds, paper = cells(page, "success")
    assert heads[:3] == ["", "pick all", "place all"]
    assert paper[:2] == ["paper, AuxVLA + all", "0.13"]
    assert ours[:3] == ["ours", "0.00 [0.00, 0.79] 0/1, at the end 0.00 paper 0.13", "not run"]
    assert [row[0] for row in bounds] == ["random", "expert"]
    assert all(cell == "not run" for row in bounds for cell in row[1:])
    assert cells(page, "held-out-episodes")[1][1] == "5.43 cm [4.9, 5.97] trivial 98.1 n = 9"
    assert section(page, "losses").count("<svg") == 1
    assert words(section(page, "films")) == "Films pick all, seed 0: fail (eval)"
    assert section(page, "films").count("<video") == 1  # not of the film that was cut off


def test_the_markdown_has_the_same_figures(run, page):
    text = re.sub(" +", " ", (run / "report.md").read_text())  # columns are padded
    assert "| close_drawer | not run | not run | not run | 1.00" in text
    assert "| stage2 | 5.43 [4.9, 5.97] cm (98.1) | 0.5 (0.9) |" in text
    assert page.count("does not beat the trivial predictor") == 1  # the grasp decoder


def test_the_papers_rates_of_two_tasks_stand_side_by_side(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    results = read_json(run / "eval/results.json")
    results["manifest"]["task"] = "tidy_house"
    results["manifest"]["row"] = "auxvla-seg-obj"
    (tmp_path / "run/eval-tidy").mkdir()
    write_json(tmp_path / "run/eval-tidy/results.json", results)
    papers = read_run(tmp_path / "run")["papers"]
    assert papers["AuxVLA + all, set_table"]["pick_all"] == 0.13
    assert papers["AuxVLA + seg + obj pos, tidy_house"]["pick_all"] == 0.33


def test_a_report_of_an_evaluation_alone_is_refused_with_the_runs_command(tmp_path):
    (tmp_path / "eval").mkdir()
    with pytest.raises(InputError, match=f"python -m tools.report --run {tmp_path}"):
        write_report(tmp_path / "eval")


def test_what_is_absent_is_not_run_and_tables_alone_claim_nothing_of_a_run(tmp_path):
    (tmp_path / "run/stage1").mkdir(parents=True)
    content = write_page(tmp_path / "run")
    for name in ("films", "held-out-episodes", "losses", "manifests"):
        assert words(section(content, name)).endswith("not run")
    assert "## Manifests\n\nnot run" in (tmp_path / "run/report.md").read_text()
    write_json(tmp_path / "table-2.json", TABLE)
    content = write_page(tmp_path)
    assert 'id="table-2-in-miniature"' in content and 'id="success"' not in content


def test_a_film_shows_the_inputs_the_masks_and_the_numbers_of_a_step(assets, tmp_path):
    env = SubtaskEnv("set_table", "place", "all", obs_mode="rgb+depth+segmentation")
    write_untrained(tmp_path / "stage2", env, "place the apple")
    policy = Policy.from_checkpoint(tmp_path / "stage2", device="cpu")
    torch.manual_seed(0)
    obs = env.reset(seed=0)
    policy.act(obs, env.instruction)
    film = Film(env, policy, tmp_path, "place_all_0")
    frame = film.draw(obs, 0)
    insets = frame[:, VIEW : VIEW + INSET].reshape(4, INSET, INSET, 3)
    for i, seen in enumerate(obs["sensor_data"].values()):  # head, hand
        depth, shown = insets[2 * i : 2 * i + 2]
        rgb, near = seen["rgb"][0].numpy(), normalize_depth(seen["depth"][0]).numpy()
        around = outline(env.masks(obs)[0, i])
        tinted = (policy.predictions["seg"][0, i] > 0.5) & ~around
        assert (depth == (255 * near).astype(np.uint8)).all()
        assert around.any() and (shown[around] == TRUE).all()
        assert (shown[~around & ~tinted] == rgb[~around & ~tinted]).all()
        expected = 0.4 * rgb[tinted] + 0.6 * np.array(PREDICTED)
        assert abs(shown[tinted] - expected).max(initial=0) <= 1

    true = {"grasp": obs["extra"]["is_grasped"], "pos": env.positions[0]}
    true["obj"] = obs["extra"]["obj_pose_wrt_base"][0, :3]
    lines = [text for text, _ in film.lines(0, film.true(obs), policy.predictions)]
    assert lines[:2] == [env.instruction, "step 0"]
    for key, value in true.items():
        for which, values in (("true", value), ("predicted", policy.predictions[key][0])):
            shown = np.ravel(values)[: len(np.ravel(value))].astype(float)
            assert f"  {' '.join(f'{x:.2f}' for x in shown)}  {which}" in lines
    film.add(obs, 0)
    film.save(success=False)
    (path,) = tmp_path.glob("*.mp4")
    assert path.name == "place_all_0_fail.mp4"
    assert abs(imageio.mimread(path)[0].astype(float) - frame).mean() < 6
    env.close()
