"""Other tasks than SetTable, and the comparison of two policies on equal seeds."""

import pytest
from processes import REPOSITORY, run

from config import InputError
from eval import EvalConfig, main
from paper import OBJECTS
from storage.files import append, read_lines
from storage.results import read_episodes
from tools.compare import Pairs, compare

LEARN = REPOSITORY / "results/learn"


@pytest.mark.parametrize(("task", "split"), [("tidy_house", "val"), ("prepare_groceries", "train")])
def test_the_expert_picks_and_places_in_the_other_tasks(task, split, assets, tmp_path):
    columns = ("pick_all", "place:024_bowl")
    chosen = dict(task=task, split=split, columns=columns, episodes=1, stop_at_success=True)
    main(EvalConfig(out=tmp_path, policy="expert", **chosen))
    episodes = read_lines(tmp_path / "episodes.jsonl")
    assert tuple(each["column"] for each in episodes) == columns
    assert all(each["success_once"] for each in episodes)
    assert episodes[1]["target"] == "024_bowl" and episodes[0]["target"] in OBJECTS[task]


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


@pytest.mark.parametrize("pairs", [Pairs(1, 0, 0, 0), Pairs(0, 0, 0, 1), Pairs(30, 0, 0, 0)])
def test_a_policy_does_not_differ_from_itself(pairs):
    low, high = pairs.interval()
    assert low < 0 < high


def test_two_evaluations_are_compared_column_by_column_without_a_simulator():
    folders = (LEARN / "eval-random", LEARN / "eval")
    shown = run("-X", "importtime", "-m", "tools.compare", *folders)
    rows = [[cell.strip() for cell in line.split("|")] for line in shown.splitlines()]
    table = {row[1]: row[2:-1] for row in rows if len(row) > 1}
    assert table["open_drawer"][:6] == ["60", "0.00", "0.92", "+0.92 [+0.80, +0.96]", "0", "55"]
    assert table["overall"][:3] == ["360", "0.00", "0.94"]
    assert not any(f" {name}\n" in shown for name in ("sapien", "mani_skill", "torch"))


def test_only_what_both_have_is_counted(tmp_path):
    append(tmp_path / "episodes.jsonl", read_episodes(LEARN / "eval-random")["pick_all", 10003])
    assert "1 episodes that both have, 359 of A and 0 of B" in compare(LEARN / "eval", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "train"}, "seed 10000 of close_drawer: split is 'val' in A, 'train' in B"),
        ({"simulation": "physx_cuda"}, "simulation is 'physx_cpu' in A, 'physx_cuda' in B"),
        ({"spawn": -1}, "seed 10000 of close_drawer: spawn is 16 in A, -1 in B"),
        ({"seed": 1000}, "no column and seed in common: python eval.py with equal --columns"),
    ],
)
def test_evaluations_of_other_episodes_are_not_compared(change, message, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} 0, with no column.*python eval.py"):
        compare(LEARN / "eval", tmp_path)
    line = read_episodes(LEARN / "eval-random")["close_drawer", 10000]
    append(tmp_path / "episodes.jsonl", line | change)
    with pytest.raises(InputError, match=message):
        compare(LEARN / "eval", tmp_path)
