"""Several environments at once: each has the episode, the actions and the record it has alone.

Several in one simulator need a GPU (the last test). On a CPU, one environment is compared with
MS-HAB's own reset and step, and several simulators stand side by side.
"""

import hashlib
import io
import json
from dataclasses import replace
from functools import partial

import gymnasium
import h5py
import numpy as np
import pytest
import sapien
import torch
from files import datasets
from mshab.envs.planner import plan_data_from_file
from tiny_run import make_policy, observation, stacked

import collect
from config import InputError, model_config
from eval import EvalConfig, main
from household.expert import ScriptedExpert
from simulation import demonstrations, plans
from simulation.assets import plan_files
from simulation.env import SENSORS, SubtaskEnvs
from simulation.episodes import Outcome, RandomPolicy, run_episodes
from simulation.plans import Job, articulations, batches
from storage.results import read_episodes

IMAGES = "rgb+depth+segmentation"
GPU = torch.cuda.is_available()
DRAWER = ("set_table", "close", "kitchen_counter", "val")
ANY = ("set_table", "pick", "all", "val")  # the apple from the fridge or the bowl from the drawer
TIDY = ("tidy_house", "pick", "all", "val")  # its episodes have different objects
# A policy's weights: what it sees and hears decides what it does. More noise amplifies rounding.
TINY, NOISE = model_config("tiny"), 0.1
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


class SideBySide:
    """Simulators on the CPU behind the interface of SubtaskEnvs."""

    def __init__(self, *envs: SubtaskEnvs):
        self.envs, self.num_envs = envs, len(envs)

    def reset(self, seeds: list[int]) -> dict:
        self.obs = [env.reset([seed]) for env, seed in zip(self.envs, seeds, strict=True)]
        return stacked(self.obs)

    def step(self, actions: np.ndarray) -> tuple[dict, dict]:
        pairs = [env.step(action[None]) for env, action in zip(self.envs, actions, strict=True)]
        self.obs, info = zip(*pairs)
        return stacked(self.obs), stacked(info)

    def masks(self, obs: dict) -> np.ndarray:
        return np.concatenate([env.masks(each) for env, each in zip(self.envs, self.obs)])

    def __getattr__(self, name: str):  # what all have alike
        return getattr(self.envs[0], name)

    positions = property(lambda self: np.concatenate([env.positions for env in self.envs]))
    episodes = property(lambda self: [env.episodes[0] for env in self.envs])
    targets = property(lambda self: [env.targets[0] for env in self.envs])
    instructions = property(lambda self: [env.instructions[0] for env in self.envs])


class Experts:
    """A scripted expert for each of the simulators."""

    def __init__(self, *envs: SubtaskEnvs):
        self.experts = [ScriptedExpert(env) for env in envs]

    def reset(self) -> None:
        for expert in self.experts:
            expert.reset()

    def act(self, obs: dict, instructions: list[str]) -> np.ndarray:
        return np.concatenate([expert.act({}, "") for expert in self.experts])


def untimed(records: list[dict]) -> list[dict]:
    return [record | {"seconds": 0, "policy_seconds": 0} for record in records]


@pytest.fixture(scope="module")
def three(simulator) -> list[SubtaskEnvs]:
    return [simulator(*ANY, obs_mode=IMAGES, number=i) for i in range(3)]


@pytest.mark.parametrize(
    ("kind", "address", "seed"), [("random", ANY, 0), ("learned", TIDY, 1), ("random", DRAWER, 2)]
)
def test_an_episode_is_the_one_that_mshab_makes_of_its_whole_files_bit_for_bit(
    kind, address, seed, simulator
):
    """Indices, observations, states, successes; MS-HAB has a number, not lists, as its seed."""
    envs = simulator(*address, obs_mode=IMAGES)
    spec, (plan_file, spawn_file) = envs.mshab.spec, plan_files(*address)
    whole = dict(task_plans=plan_data_from_file(plan_file).plans, spawn_data_fp=spawn_file)
    mshab = gymnasium.make(spec.id, **spec.kwargs | whole).unwrapped
    policy = RandomPolicy(envs) if kind == "random" else make_policy(TINY, NOISE)
    (record,) = run_episodes(envs, policy, [seed], EvalConfig(horizon=4))
    options = {key: [record[key[:-1]]] for key in ("build_config_idxs", "spawn_selection_idxs")}
    options |= {"reconfigure": True, "task_plan_idxs": torch.tensor([record["task_plan_idx"]])}
    first, _ = mshab.reset(seed=seed, options=options)
    rng, digest, obs, steps = np.random.default_rng(seed), hashlib.sha256(), first, []
    policy.reset()
    for _ in range(4):
        action = rng.uniform(-1, 1, (1, 13)).astype(np.float32)
        if kind == "learned":
            action = policy.act(obs, envs.instructions)
        digest.update(action.tobytes())
        obs, _, _, _, info = mshab.step(action[0])
        steps.append((action, obs, bool(info["success"])))
    assert digest.hexdigest()[:16] == record["actions"]
    assert_equal(envs.reset([seed]), first)
    for action, theirs, success in steps:
        ours, info = envs.step(action)
        assert_equal(ours, theirs)
        assert info["success"].tolist() == [success]
    assert_equal(envs.mshab.get_state_dict(), mshab.get_state_dict())  # init_config_idxs are there
    mshab.close()


@pytest.mark.parametrize("kind", ["random", "learned"])
def test_an_episode_is_recorded_as_if_it_were_alone(kind, three):
    """Three seeds, two sentences, and an environment to spare whose episode nobody sees."""
    seeds, many = [4, 0, 1], SideBySide(*three)
    cfg, learned = EvalConfig(horizon=3), make_policy(TINY, NOISE)

    def policy(envs):
        return learned if kind == "learned" else RandomPolicy(envs)

    together = run_episodes(many, policy(many), seeds, cfg)
    assert len(set(many.instructions)) == 2
    alone = [run_episodes(three[0], policy(three[0]), [seed], cfg)[0] for seed in seeds]
    assert untimed(together) == untimed(alone)
    assert len({record["actions"] for record in together}) == 3
    fewer = run_episodes(many, policy(many), seeds[:2], cfg)
    assert [episode["seed"] for episode in many.episodes] == [4, 0, 0]
    assert untimed(fewer) == untimed(alone[:2])


def test_who_succeeds_early_keeps_the_record_while_the_others_go_on(simulator):
    envs, seeds = [simulator(*DRAWER, number=i) for i in range(2)], [0, 3]
    cfg = EvalConfig(horizon=130, stop_at_success=True)
    together = run_episodes(SideBySide(*envs), Experts(*envs), seeds, cfg)
    alone = [run_episodes(envs[0], Experts(envs[0]), [seed], cfg)[0] for seed in seeds]
    assert untimed(together) == untimed(alone)
    assert len({record["length"] for record in together}) == 2
    assert all(e["success_once"] and e["success_at_end"] is None for e in together)


def test_an_episode_goes_on_after_its_success_to_the_horizon_and_not_beyond():
    outcome, action = Outcome(horizon=3, stop_at_success=False), np.zeros(13)
    for success in (True, False, False, True):  # the last one is beyond the horizon
        outcome.add(action, success)
    record = outcome.record()
    assert record["success_once"] and record["success_at_end"] is False and record["length"] == 3


def test_a_batch_has_one_column_one_articulation_and_at_most_so_many_episodes(assets):
    assert set(map(articulations(plan_files(*ANY)[0]), range(9))) == {"fridge", "kitchen_counter"}
    drawers = [("close_drawer", seed, seed < 2, "kitchen_counter") for seed in range(6)]
    sides = ("fridge", "kitchen_counter")
    mixed = [("pick_all", seed, False, sides[seed % 2]) for seed in range(4)]
    assert batches(drawers + mixed, envs=3) == [
        Job("close_drawer", [0], True),
        Job("close_drawer", [1], True),
        Job("close_drawer", [2, 3, 4], False),
        Job("close_drawer", [5], False),
        Job("pick_all", [0, 2], False),
        Job("pick_all", [1, 3], False),
    ]
    assert [job.seeds for job in batches(drawers, envs=1)] == [[seed] for seed in range(6)]


class Lucky(SideBySide):
    """The first environment succeeds at its second step."""

    def step(self, actions: np.ndarray) -> tuple[dict, dict]:
        obs, info = super().step(actions)
        info["success"][0] = self.envs[0].elapsed == 2
        return obs, info


def contents(part: bytes) -> dict:
    with h5py.File(io.BytesIO(part)) as file:
        found = {key: json.loads(value) for key, value in file.attrs.items()}
        found["header"].pop("env_info")
        return found | datasets(file)


def test_a_recorded_episode_is_what_it_is_alone_and_ends_when_it_does(three, monkeypatch):
    monkeypatch.setattr(demonstrations, "HORIZON", 4)
    two, seeds = three[:2], [4, 1]
    together = demonstrations.attempt(Lucky(*two), Experts(*two), seeds)
    (first,) = demonstrations.attempt(Lucky(two[0]), Experts(two[0]), seeds[:1])
    (second,) = demonstrations.attempt(two[0], ScriptedExpert(two[0]), seeds[1:])
    assert [each[:2] for each in together] == [(True, 2), (False, 4)]
    for ours, alone in zip(together, (first, second), strict=True):
        np.testing.assert_equal(contents(ours[2]), contents(alone[2]))
    found = contents(together[1][2])
    masks = [found[f"traj_0/labels/seg/{camera}"] for camera in SENSORS]
    assert 0 < np.mean(masks) < 0.1  # the bowl in the drawer
    assert demonstrations.attempt(Lucky(*two), Experts(*two), seeds[:1])[0][:2] == (True, 2)


@pytest.mark.parametrize("flow_head", [False, True])
def test_a_policy_hears_each_environments_own_instruction(flow_head):
    sentences = ["pick up the apple", "close the kitchen drawer", "pick up the bowl"]
    together, alone = (make_policy(TINY, NOISE, flow_head=flow_head) for _ in range(2))
    frames = [[observation(10 * step + i) for i in range(3)] for step in range(3)]
    frames = [[step[0], step[0], step[2]] for step in frames]  # two see the same
    batched = np.stack([together.act(stacked(step), sentences) for step in frames])  # [3, B, 13]
    for i, sentence in enumerate(sentences):
        alone.reset()
        single = np.stack([alone.act(step[i], sentence)[0] for step in frames])
        np.testing.assert_allclose(batched[:, i], single, rtol=0, atol=1e-5)
    assert np.abs(batched[:, 0] - batched[:, 1]).max() > 1e-3  # they heard different things
    together.queue.clear()
    with pytest.raises(ValueError, match="2 instructions for 3 environments"):
        together.act(stacked(frames[0]), sentences[:2])


@pytest.mark.skipif(GPU, reason="here is a GPU")
def test_without_a_gpu_several_environments_are_refused_with_a_way_out(tmp_path):
    several = EvalConfig(tmp_path, policy="random", envs=4)
    recorded = collect.CollectConfig(*ANY[:3], out=tmp_path, expert="rl", envs=4)
    no_gpu, scripted = "need a GPU; on a CPU use --workers 2", "the scripted expert drives one"
    for program, cfg, message in (
        (main, several, no_gpu),
        (main, replace(several, policy="expert"), scripted),
        (collect.main, recorded, no_gpu),
        (collect.main, replace(recorded, expert="scripted"), scripted),
    ):
        with pytest.raises(InputError, match=message):
            program(cfg)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(GPU, reason="this machine has its own libraries")
def test_what_a_gpu_simulation_loads_is_looked_for_before_any_worker_starts(tmp_path, monkeypatch):
    """In a home folder of its own, without a way to GitHub."""
    cfg = EvalConfig(tmp_path / "eval", policy="random", envs=4)
    monkeypatch.setattr(plans, "device_of", lambda device: torch.device("cuda"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"libcuda.so: cannot open.*sudo ln -s .*/usr/lib/libcuda"):
        main(cfg)
    # Any library will do: SAPIEN loads it and asks it for nothing yet.
    (tmp_path / "libcuda.so").symlink_to(np._core._multiarray_umath.__file__)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"none from GitHub .*Error\).*enable_gpu.*copy ~/.sapien"):
        main(cfg)
    library = tmp_path / ".sapien/physx" / sapien.physx.version() / "libPhysXGpu_64.so"
    library.write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"libPhysXGpu_64.so: .*mv ~/.sapien/physx"):
        main(cfg)
    assert not (tmp_path / "eval").exists()


@pytest.mark.gpu
def test_on_a_gpu_a_column_is_simulated_at_once(assets, tmp_path):
    try:
        plans.check_envs(4, scripted=False)
    except InputError as error:
        pytest.skip(str(error))
    columns = ("close_drawer", "pick_all", "place_all")
    cfg = EvalConfig(tmp_path, policy="random", columns=columns, envs=4, episodes=6, horizon=3)
    main(replace(cfg, video=1))
    episodes = [*read_episodes(tmp_path).values()]
    assert sorted((each["column"], each["seed"]) for each in episodes) == sorted(
        (column, seed) for column in columns for seed in range(6)
    )
    assert {(each["simulation"], each["length"]) for each in episodes} == {("physx_cuda", 3)}
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 3
    assert len({each["actions"] for each in episodes}) == 6  # by seed, whoever stands beside it
