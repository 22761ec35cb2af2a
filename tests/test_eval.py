"""Evaluation: numbers, files that survive a kill, one result for all worker counts, the commit."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import REPOSITORY, finish, run, start, wait_for, workers_of
from tiny_run import write_untrained

from config import InputError
from eval import EvalConfig, fill_defaults, main, settings_of
from household.expert import ScriptedExpert
from paper import CHAIN, ROWS
from policy import check_schema
from simulation.chain import ChainEnv
from simulation.episodes import run_chain
from storage.checkpoint import resolve
from storage.files import (
    append,
    code_commit,
    read_json,
    read_lines,
    sha256,
    sole_writer,
    write_json,
)
from storage.results import check_settings, read_episodes, success_table, table, wilson
from tools.report import write_report

DRAWER = ("set_table", "close", "kitchen_counter", "val")
EXPERT = "--policy expert --columns close_drawer pick_all --episodes 3 --horizon 40"


def outcomes(out: Path) -> list[tuple]:
    """All that may not depend on the run: everything but the order and the time."""
    untimed = {"seconds": 0, "policy_seconds": 0}
    return sorted((key, tuple((e | untimed).items())) for key, e in read_episodes(out).items())


def start_two_workers(out: Path, episodes: int) -> subprocess.Popen:
    """Start an evaluation, and wait until so many of its episodes are written."""
    process = start("eval.py", *EXPERT.split(), "--workers", "2", "--out", out)
    wait_for(lambda: len(read_episodes(out)) >= episodes, process)
    return process


@pytest.fixture(scope="module")
def one_worker(assets, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_worker")
    run("eval.py", *EXPERT.split(), "--out", out)
    return out


@pytest.fixture(scope="module")
def trained(simulator, tmp_path_factory) -> Path:
    """A stage folder with an untrained checkpoint of the tiny model, made for this robot."""
    stage = tmp_path_factory.mktemp("run") / "stage2"
    write_untrained(stage, simulator(*DRAWER), "close the kitchen drawer")
    return stage


def test_the_table_is_counted_from_the_file_of_episodes(tmp_path):
    path = tmp_path / "episodes.jsonl"
    for seed, (once, end) in enumerate([(True, True), (True, False), (False, False)]):
        success = {"success_once": once, "success_at_end": end}
        append(path, {"column": "open_fridge", "seed": seed} | success)
    append(path, {"column": "pick_all", "success_once": True, "success_at_end": None})  # stopped
    row = ROWS["auxvla-action-head"].paper["set_table"]
    columns = table(read_lines(path), row)
    assert list(columns) == ["pick_all", "open_fridge"]
    figures = {"n": 3, "success_once": 2 / 3, "success_at_end": 1 / 3, "paper": 0.76}
    assert columns["open_fridge"] == pytest.approx(
        figures | {"low": 0.2077, "high": 0.9385}, abs=1e-4
    )
    text = "\n".join(success_table({"ours": columns}, {"AuxVLA + action head": row}))
    text = re.sub(" +", " ", text)  # columns are padded
    assert "2/3 = 0.67 [0.21, 0.94], at the end 0.33 | 0.76" in text
    assert "1/1 = 1.00 [0.21, 1.00], at the end not run" in text
    assert text.count("| not run") == 4
    assert wilson(22, 30) == pytest.approx((0.556, 0.858), abs=1e-3)  # as published


def test_a_torn_last_line_is_dropped_and_another_damaged_line_named_with_its_mend(tmp_path, capsys):
    path = tmp_path / "episodes.jsonl"
    for seed in range(3):
        append(path, {"seed": seed})
    whole = path.read_text()
    path.write_text(whole + '{"seed": 3, "succ')
    assert read_lines(path, mend=True) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    assert "incomplete" in capsys.readouterr().err and path.read_text() == whole
    path.write_text(whole.replace('{"seed": 1}', "\0\0\0"))
    with pytest.raises(InputError, match=f"line 2: damaged.*sed -i.damaged 2d {path}") as error:
        read_lines(path)
    subprocess.run(str(error.value).rpartition(": ")[2].split(), check=True)
    assert read_lines(path) == [{"seed": 0}, {"seed": 2}]


def test_settings_stand_once_or_on_every_line_and_may_not_change(tmp_path):
    line = {"column": "place_obj", "seed": 0, "split": "train"}
    append(tmp_path / "episodes.jsonl", line, line | {"seed": 1})  # as old evaluations
    write_json(tmp_path / "config.json", {"policies": {"place_obj": "a"}})
    done = read_episodes(tmp_path)
    assert sorted(done) == [("place_obj", 0), ("place_obj", 1)]
    assert {episode["simulation"] for episode in done.values()} == {"physx_cpu"}
    assert read_episodes(REPOSITORY / "results/learn/eval")["close_drawer", 10000]["horizon"] == 200
    check_settings(tmp_path, done, {"split": "train", "policies": {"place_obj": "a"}})
    changed = {"split": "val", "device": "cuda", "compile": True, "policies": {"place_obj": "b"}}
    for name, ours in changed.items():
        with pytest.raises(InputError, match=f"with {name} = .*, this run has .*{ours}"):
            check_settings(tmp_path, done, {name: ours})


def test_compiled_blocks_are_a_setting_of_a_learned_policy(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.apartment", dict)
    checkpoint = resolve(REPOSITORY / "weights/stage2")
    for learned, compile in ((checkpoint, True), (checkpoint, False), (None, True)):
        policy = "learned" if learned else "random"
        cfg = EvalConfig(tmp_path, learned, policy=policy, compile=compile)
        assert settings_of(cfg)["compile"] == bool(learned and compile)


def test_wrong_flags_are_refused(tmp_path):
    with pytest.raises(InputError, match="--policy random takes no --checkpoint"):
        EvalConfig(out=tmp_path, checkpoint=tmp_path, policy="random")
    with pytest.raises(InputError, match="--checkpoint without --out"):
        EvalConfig(checkpoint=tmp_path)
    for task, column in (("tidy_house", "open_fridge"), ("set_table", "place:003_cracker_box")):
        with pytest.raises(InputError, match=f"{column}: {task} has none.*only set_table"):
            EvalConfig(out=tmp_path, policy="random", task=task, columns=(column,))


def test_a_kill_neither_loses_nor_repeats_an_episode(one_worker, tmp_path):
    """Also: two workers, killed and started again, give the records that one worker gives."""
    process = start_two_workers(tmp_path, episodes=1)
    orphans = workers_of(process)
    process.kill()
    process.wait()
    kept = len(outcomes(tmp_path))
    assert 1 <= kept < 6

    finish(start_two_workers(tmp_path, kept + 1))
    assert outcomes(tmp_path) == outcomes(one_worker)
    assert orphans and not any(Path(f"/proc/{worker}").exists() for worker in orphans)


def test_a_folder_has_one_writer_and_one_horizon(one_worker):
    with sole_writer(one_worker):
        refused = run("eval.py", *EXPERT.split(), "--out", one_worker, code=1)
    assert "is writing to it" in refused
    cfg = EvalConfig(one_worker, policy="expert", columns=("close_drawer",), horizon=7)
    with pytest.raises(InputError, match="episodes with horizon = 40, this run has 7"):
        main(cfg)


def test_without_flags_the_highest_stage_of_the_run_acts(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no trained stage in runs.*train.py --stage 1"):
        fill_defaults(EvalConfig())
    for stage in ("stage1", "stage2"):
        shutil.copytree(trained, tmp_path / "runs/auxvla-all" / stage)
    cfg = fill_defaults(EvalConfig())
    assert cfg.checkpoint == Path("runs/auxvla-all/stage2/step-00000001")
    assert cfg.out == Path("runs/auxvla-all/eval") and cfg.row == "auxvla-all"
    mine = EvalConfig(policy="random", run_name="mine")
    assert fill_defaults(mine).out == Path("runs/mine/eval-random")


def loaded_by(names: str, beyond: str = "sys") -> set[str]:
    """The modules that importing `names` loads beyond those of `beyond`."""
    code = f"import sys, {beyond}; before = {{*sys.modules}}; import {names}; "
    return set(run("-c", code + "print(*{*sys.modules} - before)").split())


def test_the_main_process_loads_no_simulator_and_its_workers_no_tools(assets):
    """mani_skill itself imports matplotlib and imageio, but draws nothing."""
    main_process = loaded_by("eval, collect")
    modules = "simulation.episodes, simulation.demonstrations"
    worker = loaded_by(modules, beyond="mani_skill.envs, mshab.envs")
    unwanted = ("tools", "matplotlib", "jinja2", "imageio", "transformers", "simulation.film")
    assert not [name for name in worker | main_process if name.startswith(unwanted)]
    assert "policy" in worker and not {"mani_skill", "mshab", "sapien"} & main_process


def test_the_random_policy_runs_through_the_same_code(assets, tmp_path, capsys):
    chosen = dict(columns=("open_drawer",), episodes=2, horizon=3, seed=5)
    main(EvalConfig(out=tmp_path, policy="random", **chosen))
    for seed, episode in zip((5, 6), read_lines(tmp_path / "episodes.jsonl"), strict=True):
        assert (episode["seed"], episode["length"], episode["success_once"]) == (seed, 3, False)
        assert episode["target"] == "kitchen_counter" and episode["column"] == "open_drawer"
    made = read_json(tmp_path / "results.json")
    assert (made["columns"]["open_drawer"]["n"], made["scenes"]["open_drawer"]["of"]) == (2, 3)
    assert made["manifest"]["seeds"] == [5, 6] and made["manifest"]["versions"]["mani_skill"]
    write_json(tmp_path / "results.json", made | {"manifest": "kept"})
    main(EvalConfig(out=tmp_path, policy="random", **chosen))  # no new episode: old provenance
    assert read_json(tmp_path / "results.json")["manifest"] == "kept"
    assert "of the split's 3 scenes" in capsys.readouterr().out


def test_a_checkpoint_drives_the_robot_the_same_in_two_processes_and_is_filmed(trained, tmp_path):
    cfg = EvalConfig(tmp_path / "1", trained, columns=("close_drawer",), episodes=2, horizon=5)
    main(replace(cfg, episodes=1))
    (episode,) = read_episodes(cfg.out).values()
    assert episode["checkpoint"] == sha256(trained / "step-00000001/manifest.json")
    main(replace(cfg, video=2))
    assert [path.name for path in (cfg.out / "videos").iterdir()] == ["close_drawer_1_fail.mp4"]
    main(replace(cfg, out=tmp_path / "2", workers=2))
    one, two = outcomes(cfg.out), outcomes(tmp_path / "2")
    assert one == two and len({dict(episode)["actions"] for _, episode in one}) == 2


def test_the_readmes_example_drives_a_step(trained):
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)[1]
    names = {}
    exec(code.replace("weights/stage2", str(trained)), names)
    assert names["action"].shape == (1, 13) and names["info"]["success"] is False
    assert set(names["policy"].predictions) == {"pos", "grasp", "qpos", "obj", "seg"}
    names["env"].close()


def test_default_columns_are_those_that_the_checkpoint_was_trained_on(trained, tmp_path, capsys):
    cfg = EvalConfig(out=tmp_path, checkpoint=trained)
    assert fill_defaults(cfg).names == ("close_drawer",)
    assert "open_fridge, open_drawer, close_fridge; left out" in capsys.readouterr().err
    assert fill_defaults(replace(cfg, columns=("open_fridge",))).names == ("open_fridge",)
    assert "not trained on every instruction of open_fridge; asked" in capsys.readouterr().err
    assert len(fill_defaults(replace(cfg, task="tidy_house")).names) == 2
    assert "of pick_all, place_all; run, since the policy knows no" in capsys.readouterr().err


def test_another_robots_checkpoint_is_refused_by_slot(trained, simulator, tmp_path, capfd):
    manifest_file = trained / "step-00000001/manifest.json"
    manifest, env = read_json(manifest_file), simulator(*DRAWER)
    names, schema = manifest["qpos_names"], manifest["action_schema"]
    check_schema(env, manifest)
    with pytest.raises(InputError, match=r"qpos_names, slot 11: .* trained on None"):
        check_schema(env, manifest | {"qpos_names": names[:-1]})
    with pytest.raises(InputError, match="qpos_names, slot 0"):
        check_schema(env, manifest | {"qpos_names": names[1::-1] + names[2:]})
    wider = [*schema[:8], schema[8] | {"high": 0.2}, *schema[9:]]
    write_json(manifest_file, manifest | {"action_schema": wider})
    cfg = EvalConfig(out=tmp_path, checkpoint=trained, columns=("close_drawer",), episodes=1)
    with pytest.raises(InputError, match="action_schema, slot 8: the checkpoint was trained on"):
        main(cfg)  # raised in the worker
    write_json(manifest_file, manifest)
    check_schema(env, manifest | {"action_schema": None, "qpos_names": None})
    assert "the training data had no action_schema" in capfd.readouterr().err


def test_results_name_the_commit_and_whether_a_program_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.files.__file__", str(tmp_path / "files.py"))
    assert code_commit() is None
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a"]
    for name in ("eval.py", "table.json"):
        (tmp_path / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = code_commit()
    (tmp_path / "table.json").write_text("2")  # what a run itself writes
    assert re.fullmatch("[0-9a-f]{40}", commit) and code_commit() == commit
    (tmp_path / "eval.py").write_text("2")
    assert code_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    assert code_commit() is None


class OpensTheFridge(ScriptedExpert):
    def act(self, obs: dict, instructions: list[str]) -> np.ndarray:
        self.heard = instructions
        return np.zeros((1, 13)) if self.env.index else super().act(obs, instructions)


def test_the_expert_does_a_whole_chain(assets, tmp_path):
    main(EvalConfig(tmp_path, policy="expert", chain="set_table", episodes=1, seed=10000))
    done = read_episodes(tmp_path).items()
    assert {key: each["success_once"] for key, each in done} == {(c, 10000): True for c in CHAIN}


def test_a_failure_ends_a_chain_and_counts_in_every_later_subtask(assets):
    env = ChainEnv(task="set_table", subtask="", target="", split="val", obs_mode="state_dict")
    episodes = run_chain(env, policy := OpensTheFridge(env), [0], SimpleNamespace(horizon=150))
    assert policy.heard == ["pick up the apple"]
    assert [episode["success_once"] for episode in episodes] == [True] + 7 * [False]
    assert [episode["length"] for episode in episodes[1:]] == [150] + 6 * [0]
    env.index = 1  # the robot stands where the expert drove it
    assert np.abs(env.positions[0] - env.start()["robot_pos"][:2]).max() < 0.05


def test_a_kill_repeats_a_chain_as_a_whole_and_the_report_has_its_columns(assets, tmp_path):
    cfg = EvalConfig(tmp_path / "eval", policy="random", chain="set_table", episodes=2, horizon=2)
    main(cfg)
    before, file = outcomes(cfg.out), cfg.out / "episodes.jsonl"
    file.write_text("\n".join([*file.read_text().splitlines()[:11], '{"torn']))
    main(cfg)
    assert outcomes(cfg.out) == before and len(read_lines(file)) == 11 + 8
    assert "chain_8_close_drawer" in write_report(tmp_path).read_text()
    with pytest.raises(InputError, match="episodes with chain = 'set_table', this run has None"):
        main(EvalConfig(cfg.out, policy="random", horizon=2))


def test_a_chain_refuses_columns_and_a_real_apartment(assets, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--chain set_table takes no --task, --columns"):
        EvalConfig(policy="random", chain="set_table", columns=("open_fridge",))
    monkeypatch.setattr("eval.apartment", lambda: None)
    with pytest.raises(InputError, match="is no generated apartment"):
        main(EvalConfig(tmp_path, policy="random", chain="set_table"))
