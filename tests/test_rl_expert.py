"""MS-HAB's RL policies, from files of their layout and shapes, drive the household.

The released files are not at hand: the networks are MS-HAB's own with random weights.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from mshab.agents.ppo.agent import Agent as PPO
from mshab.agents.sac.agent import Agent as SAC
from mshab.envs.wrappers import FetchActionWrapper, FetchDepthObservationWrapper, FrameStack
from mshab.utils.array import to_tensor
from tiny_run import stacked

from collect import CollectConfig
from collect import main as collect
from config import InputError
from eval import EvalConfig
from eval import main as evaluate
from household.expert import ScriptedExpert
from simulation.demonstrations import attempt
from simulation.env import SubtaskEnvs
from simulation.rl_expert import RLPolicy
from storage.h5 import Demonstrations
from storage.recording import Recording
from storage.results import read_episodes

ADDRESS = ("set_table", "place", "024_bowl")  # every part of its state is in use
STEPS = 40
# The sizes of MS-HAB's train_sac.py; PPO's network has none to choose.
SAC_ALGO = dict(
    name="sac", cnn_features=[32, 64, 128, 256], cnn_filters=[3, 3, 3, 3],
    cnn_strides=[2, 2, 2, 2], cnn_padding="valid", encoder_pixels_feature_dim=50,
    encoder_state_feature_dim=50, actor_hidden_dims=[256, 256, 256],
    critic_hidden_dims=[256, 256, 256], critic_layer_norm=True, critic_dropout=None,
    actor_log_std_min=-20, actor_log_std_max=2,
)  # fmt: skip
ALGOS = {"ppo": {"name": "ppo", "gamma": 0.9}, "sac": SAC_ALGO}


@pytest.fixture(scope="module")
def env(simulator) -> SubtaskEnvs:
    return simulator(*ADDRESS, "train", obs_mode="rgb+depth+segmentation")


@pytest.fixture(scope="module")
def wrapped(env):
    """MS-HAB's wrappers in the order of its make_env, around the same simulator."""
    return FetchActionWrapper(FrameStack(FetchDepthObservationWrapper(env.mshab), num_stack=3))


@pytest.fixture(scope="module")
def agents(env, wrapped) -> dict[str, torch.nn.Module]:
    """MS-HAB's networks for what its wrappers return, made as its evaluate.py makes them."""
    torch.manual_seed(0)
    obs, _ = wrapped.reset(seed=0, options={})
    space = env.mshab.single_observation_space
    ppo = PPO(obs, (13,))
    with torch.no_grad():
        ppo.actor_mean[-1].weight.mul_(400)  # else no action leaves [-1, 1]
    boxes = {
        key: spaces.Box(0, 1, (box.shape[0] * box.shape[1], *box.shape[2:]))
        for key, box in space["pixels"].items()
    }
    sizes = {k.replace("actor_log", "log"): v for k, v in SAC_ALGO.items() if k != "name"}
    sac = SAC(spaces.Dict(boxes), space["state"].shape, (13,), device="cpu", **sizes)
    return {"ppo": ppo.eval(), "sac": sac.eval()}


@pytest.fixture(scope="module")
def roots(agents, tmp_path_factory) -> dict[str, Path]:
    """By algorithm, the folder of a policy as MS-HAB's trainers leave it."""
    roots = {name: tmp_path_factory.mktemp(name) for name in agents}
    for name, agent in agents.items():
        folder = roots[name].joinpath("rl", *ADDRESS)
        folder.mkdir(parents=True)
        text = yaml.safe_dump({"seed": 0, "env": {"frame_stack": 3}, "algo": ALGOS[name]})
        text += "path: !!python/object/apply:pathlib.PosixPath\n- mshab_exps\n"  # as OmegaConf's
        (folder / "config.yml").write_text(text)
        optimizer = torch.optim.Adam(agent.parameters()).state_dict()
        torch.save({"agent": agent.state_dict(), "optimizer": optimizer}, folder / "policy.pt")
    return roots


def episode_of_mshab(env: SubtaskEnvs, wrapped, agent, seed: int) -> list[tuple[dict, np.ndarray]]:
    """What the network sees and answers, steered through MS-HAB's wrappers."""
    env.reset([seed])
    at = env.episodes[0]
    options = {f"{key}s": [at[key]] for key in ("build_config_idx", "spawn_selection_idx")}
    options |= {"reconfigure": True, "task_plan_idxs": torch.tensor([at["task_plan_idx"]])}
    obs, steps = wrapped.reset(seed=seed, options=options)[0], []
    while len(steps) < STEPS:
        seen = to_tensor(obs, dtype="float")
        with torch.no_grad():  # as MS-HAB's evaluate.py asks for an action
            if isinstance(agent, PPO):
                action = agent.get_action(seen, deterministic=True)
            else:
                images, state = seen["pixels"], seen["state"]
                action = agent.actor(images, state, compute_pi=False, compute_log_pi=False)[0]
        steps.append((seen, action.numpy().copy()))  # the wrapper writes into it
        obs = wrapped.step(action)[0]
    return steps


@pytest.mark.parametrize("name", ALGOS)
def test_an_episode_is_the_one_that_mshab_makes(env, wrapped, agents, roots, name):
    """Its wrappers and its network."""
    theirs = episode_of_mshab(env, wrapped, agents[name], seed=3)
    loaded, inputs = RLPolicy.load(roots[name], *ADDRESS), []
    policy = RLPolicy(lambda seen: inputs.append(seen) or loaded.actor(seen), loaded.sha)
    obs = env.reset([3])
    for seen, action in theirs:
        ours = policy.act(obs, env.instructions)
        assert ours.shape == (1, 13) and ours.dtype == np.float32
        assert torch.equal(inputs[-1]["state"], seen["state"])
        for camera, pictures in seen["pixels"].items():
            assert torch.equal(inputs[-1]["pixels"][camera], pictures[:, :, 0])
        expected = action.clip(-1, 1)
        expected[:, 8:10] = 0
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        obs, _ = env.step(ours)
    answers = np.concatenate([action for _, action in theirs])
    assert (answers[:, 8:10] != 0).all()  # there was a head to hold still,
    assert name == "sac" or np.abs(answers).max() > 1  # an action to clip,
    assert (torch.cat([seen["state"] for seen, _ in theirs]) != 0).any(0).all()  # and no idle slot


@pytest.mark.parametrize("name", ALGOS)
def test_every_environment_of_a_batch_gets_its_own_action(env, roots, name):
    episodes = []
    for seed in (1, 2):
        episodes.append([env.reset([seed])])
        episodes[-1] += [env.step(np.full((1, 13), 0.5, np.float32))[0] for _ in range(4)]
    together, alone = RLPolicy.load(roots[name], *ADDRESS), RLPolicy.load(roots[name], *ADDRESS)
    both = np.stack([together.act(stacked(pair), "") for pair in zip(*episodes)])  # [5, 2, 13]
    for i, episode in enumerate(episodes):
        alone.reset()
        single = np.stack([alone.act(obs, "")[0] for obs in episode])
        np.testing.assert_allclose(both[:, i], single, atol=1e-5)
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3


def scripted(env: SubtaskEnvs, drop_at: float = 0.0) -> RLPolicy:
    """The scripted expert behind the RL interface; `drop_at` metres from the goal it lets go."""
    expert = ScriptedExpert(env)

    def actor(seen: dict) -> torch.Tensor:
        if env.elapsed == 0:
            expert.reset()
        action, state = torch.from_numpy(expert.act({}, "")), seen["state"][0]
        if (state[31:34] - state[38:41]).norm() < drop_at:  # object, goal
            action[:, 7] = 1
        return action

    return RLPolicy(actor, sha="")


def test_a_success_is_written_with_all_five_labels(env, tmp_path):
    ((kept, steps, part),) = attempt(env, scripted(env), [0])
    assert kept
    recording = Recording(tmp_path.joinpath(*ADDRESS[:2]), ADDRESS[2], {"seed": 0})
    recording.start()
    recording.add(0, kept, steps, part)
    recording.merge()
    assert recording.episodes[0]["label"] == "placed_in_goal_success"
    frames = Demonstrations(tmp_path).read_episode(0)
    assert len(frames) == steps and frames["has"].all()
    assert np.ptp(frames["pos"], axis=0).max() > 0.1  # it drove
    assert set(frames["grasp"]) == {0, 1} and frames["seg"].any(axis=(0, 2)).all()


def test_a_success_that_mshab_did_not_release_is_not_kept(env):
    ((kept, _, part),) = attempt(env, scripted(env, drop_at=0.2), [0])
    with h5py.File(io.BytesIO(part)) as file:
        about = json.loads(file.attrs["episode"])
    assert about["success_once"] and about["label"] == "dropped_to_goal_success"
    assert not kept


def test_a_policy_that_never_succeeds_ends_with_that_sentence(roots, tmp_path):
    flags = dict(out=tmp_path, expert="rl", policies=roots["sac"], episodes=1, max_attempts=1)
    with pytest.raises(SystemExit, match="stopped, 0 of 1 attempts of the rl expert"):
        collect(CollectConfig(*ADDRESS, **flags))
    parts = tmp_path.joinpath(*ADDRESS).with_suffix(".parts")
    assert [path.name for path in parts.iterdir()] == ["attempts.jsonl"]  # and no episode
    with pytest.raises(InputError, match="choose another --out"):
        collect(CollectConfig(*ADDRESS, **flags | {"policies": roots["ppo"]}))


def test_eval_runs_it_filmed_or_not(roots, tmp_path):
    policies = tmp_path / "policies"  # set_table's column place_obj is of the apple
    policy = policies / "rl/set_table/place/013_apple"
    shutil.copytree(roots["ppo"].joinpath("rl", *ADDRESS), policy)
    cfg = EvalConfig(
        tmp_path / "out", policy="rl", policies=policies, columns=("place_obj",), episodes=2,
        horizon=30, video=1,
    )  # fmt: skip
    evaluate(cfg)
    lines = [*read_episodes(tmp_path / "out").values()]
    assert [line["length"] for line in lines] == [30, 30]
    assert not any(line["success_once"] for line in lines)
    assert lines[0]["policies"] == {"place_obj": RLPolicy.load(roots["ppo"], *ADDRESS).sha}
    assert len(list(tmp_path.glob("out/videos/*.mp4"))) == 1


# --- Wrong files ---


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def write_config(folder: Path, algo: dict) -> None:
    (folder / "config.yml").write_text(yaml.safe_dump({"algo": algo}))


FAULTS = {
    "no weights": (lambda f: (f / "policy.pt").unlink(), "No such .*policy.pt"),
    "code": (lambda f: (f / "policy.pt").write_bytes(pickle.dumps(Code())), "Unpickling"),
    "cut off": (lambda f: os.truncate(f / "policy.pt", 1_000_000), "zip archive"),
    "no agent": (lambda f: torch.save({}, f / "policy.pt"), "KeyError: 'agent'"),
    "another algorithm": (lambda f: write_config(f, SAC_ALGO), "(?s)Missing key.*actor.encoder"),
    "an unknown algorithm": (lambda f: write_config(f, {"name": "bc"}), "to be ppo or sac, got bc"),
    "no sizes": (lambda f: write_config(f, {"name": "sac"}), "KeyError: 'actor_log_std_min'"),
    "no YAML": (lambda f: (f / "config.yml").write_text("a: [1"), "ParserError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_with_its_mend(roots, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(roots["ppo"], tmp_path / "policies")
    plant, reason = FAULTS[fault]
    plant(tmp_path.joinpath("policies/rl", *ADDRESS))
    command = 'hf download arth-shukla/mshab_checkpoints --include "rl/set_table/place/024_bowl'
    with pytest.raises(InputError, match=f"{reason}(?s:.*){command}"):
        RLPolicy.load(tmp_path / "policies", *ADDRESS)
    assert not Path("ran").exists()
