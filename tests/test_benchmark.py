"""The whole benchmark: every task, object and scene; the same episodes however they are run; and
the comparison of two policies on equal seeds."""

import json
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from processes import REPOSITORY
from test_eval import outcomes, trained  # noqa: F401  a fixture

from config import TASKS, InputError
from eval import EvalConfig, choose, conclude, main
from paper import OBJECTS, targets
from simulation.plans import count_scenes, draw_plan
from simulation.workers import Workers
from storage.files import append, read_lines
from tools.compare import Pairs, compare

LEARN = REPOSITORY / "results/learn"

# --- Tasks, objects, scenes ---


@pytest.mark.parametrize(("task", "split"), [("tidy_house", "val"), ("prepare_groceries", "train")])
def test_the_expert_picks_and_places_in_the_other_tasks(task, split, assets, tmp_path):
    columns = ("pick_all", "place:024_bowl")
    chosen = dict(task=task, split=split, columns=columns, episodes=1, stop_at_success=True)
    main(EvalConfig(out=tmp_path, policy="expert", **chosen))
    episodes = read_lines(tmp_path / "episodes.jsonl")
    assert [(each["column"], each["success_once"]) for each in episodes] == [
        (column, True) for column in columns
    ]
    assert episodes[1]["target"] == "024_bowl" and episodes[0]["target"] in OBJECTS[task]


@pytest.mark.parametrize("task", TASKS)
def test_every_object_of_a_task_is_a_column(task, assets, tmp_path):
    cfg = EvalConfig(out=tmp_path, policy="random", task=task, columns=("pick_each", "place_each"))
    subtasks = ("pick", "place")
    assert cfg.names == tuple(f"{sub}:{name}" for sub in subtasks for name in targets(task, sub))
    assert [cfg.plan_file(name).stem for name in cfg.names] == [*OBJECTS[task]] * 2
    foreign = "pick:013_apple" if task != "set_table" else "place:003_cracker_box"
    with pytest.raises(InputError, match=f"--columns {foreign}: {task} has none; it picks"):
        EvalConfig(out=tmp_path, policy="random", task=task, columns=(foreign,))


def test_so_many_seeds_reach_every_scene_and_one_less_does_not(assets, tmp_path, capsys):
    cfg = EvalConfig(tmp_path, policy="random", task="tidy_house", columns=("pick_all",))
    cfg = choose(cfg)
    plans = json.loads(cfg.plan_file("pick_all").read_text())["plans"]
    needed = count_scenes(cfg.plan_file("pick_all"), [], 0)["seeds_for_all"]
    for seed in range(needed):
        scene = plans[draw_plan(seed, len(plans))[0]]["build_config_name"]
        line = {"column": "pick_all", "seed": seed, "scene": scene}
        append(tmp_path / "episodes.jsonl", line | {"success_once": 0, "success_at_end": 0})
        conclude(cfg, {})
        printed = f"scenes; --episodes {needed} reaches all" in capsys.readouterr().out
        found = json.loads((tmp_path / "results.json").read_text())["scenes"]["pick_all"]
        assert printed == (found["reached"] < 3) == (seed < needed - 1)
        assert (found["of"], found["seeds_for_all"]) == (3, needed)


def test_thirty_seeds_reach_every_scene_of_every_task_here(assets, tmp_path):
    for task, split in product(TASKS, ("train", "val")):
        cfg = EvalConfig(out=tmp_path, policy="random", task=task, split=split)
        for name in cfg.names:
            found = count_scenes(cfg.plan_file(name), [], 0)
            assert found["of"] == 3 and 3 <= found["seeds_for_all"] <= 30, (task, name)


# --- One process, several (test_eval.py: the expert, also killed) ---


def test_a_learned_policy_takes_the_same_actions_in_one_process_and_in_two(trained, tmp_path):  # noqa: F811
    chosen = dict(columns=("close_drawer",), episodes=2, horizon=5, device="cpu")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        main(EvalConfig(out, checkpoint=trained, workers=workers, **chosen))
    one, two = (outcomes(tmp_path / name) for name in ("1", "2"))
    assert one == two and len({dict(episode)["actions"] for _, episode in one}) == 2


def visible_gpu(jobs):
    for _ in jobs:
        yield os.environ["CUDA_VISIBLE_DEVICES"]


def test_the_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    jobs = iter([("a", seed) for seed in range(3)])
    results = Workers(3, visible_gpu).run(lambda running: next(jobs, None))
    assert sorted(gpu for _, gpu in results) == ["4", "4", "6"]


# --- A against B ---


@pytest.mark.parametrize(
    ("pairs", "low", "high"),
    [  # Newcombe 1998, Table III
        (Pairs(both=36, only_a=2, only_b=12, neither=0), 0.0569, 0.3404),
        (Pairs(both=36, only_a=12, only_b=2, neither=0), -0.3404, -0.0569),
        # By hand, phi = (14 x 22 - 41/2) / sqrt(14 x 27 x 19 x 22): the outcomes go together.
        (Pairs(both=14, only_a=0, only_b=5, neither=22), 0.0115, 0.2265),
    ],
)
def test_the_interval_equals_the_published(pairs, low, high):
    assert pairs.interval() == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 4, 30])
def test_a_policy_does_not_differ_from_itself(n):
    for pairs in (Pairs(n, 0, 0, 0), Pairs(0, 0, 0, n)):
        low, high = pairs.interval()
        assert low < 0 < high


def test_thirty_episodes_seldom_separate_the_papers_rates():
    """The paper's number of episodes would find 0.60 and 0.73 apart 1 time in 5."""
    rng, shares = np.random.default_rng(0), (0.50, 0.10, 0.23, 0.17)  # 0.60 and 0.73, paired
    drawn = (Pairs(*map(int, counts)) for counts in rng.multinomial(30, shares, size=4000))
    apart = [low > 0 or high < 0 for low, high in (each.interval() for each in drawn)]
    assert np.mean(apart) < 0.3


def test_two_evaluations_are_compared_column_by_column_without_a_simulator():
    command = [sys.executable, "-X", "importtime", "-m", "tools.compare"]
    command += [LEARN / "eval-random", LEARN / "eval"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    table = {row[1]: row[2:-1] for row in rows if len(row) > 1}
    assert table["open_drawer"][:6] == ["20", "0.00", "0.35", "+0.35 [+0.12, +0.57]", "0", "7"]
    assert table["overall"][:3] == ["120", "0.00", "0.60"]
    assert not any(f" {name}\n" in done.stderr for name in ("sapien", "mani_skill", "torch"))


def test_only_what_both_have_is_counted():
    table = compare(LEARN / "eval", LEARN / "eval-flow")
    assert "20 episodes that both have, 100 of A and 0 of B left out" in table
    assert "overall" not in table and "-0.15 [-0.36, +0.04] | 3 " in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train"}, "seed 0 of close_drawer: split is 'val' in A, 'train' in B"),
        ({"horizon": 100}, "seed 0 of close_drawer: horizon is 200 in A, 100 in B"),
        ({"assets": "0" * 64}, "seed 0 of close_drawer: assets is"),
        ({"simulation": "physx_cuda"}, "simulation is 'physx_cpu' in A, 'physx_cuda' in B"),
        ({"task": "tidy_house"}, "seed 0 .*: task is 'set_table' in A, 'tidy_house' in B"),
        ({"spawn": -1}, "seed 0 of close_drawer: spawn is 20 in A, -1 in B"),
        ({"seed": 1000}, "no column and seed in common: python eval.py with equal --columns"),
    ],
)
def test_evaluations_of_other_episodes_are_not_compared(change, message, tmp_path):
    lines = read_lines(LEARN / "eval-flow/episodes.jsonl")
    (line,) = [line for line in lines if line["seed"] == 0]
    append(tmp_path / "episodes.jsonl", line | change)
    with pytest.raises(InputError, match=message):
        compare(LEARN / "eval", tmp_path)


def test_a_folder_without_episodes_is_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} 0, with no column.*python eval.py"):
        compare(LEARN / "eval", tmp_path)
