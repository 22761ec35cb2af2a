"""The scripted expert succeeds, and a learner can learn its motions from images."""

from itertools import groupby

import numpy as np
import pytest

from config import HORIZON
from household.expert import GRID, OPEN, ScriptedExpert
from paper import COLUMNS, PAPER_COLUMNS
from simulation.env import SubtaskEnvs

LONGEST = 140  # no column takes much over 125 steps: HORIZON leaves a learner time for mistakes
MOVING = [0, 1, 2, 3, 4, 5, 6, 11, 12]  # arm, base; the torso always presses against its stop


def run(env: SubtaskEnvs, seed: int, to_the_end=False, push=()) -> tuple[np.ndarray, np.ndarray]:
    """Play an episode to its success, or to the horizon; at the steps of `push` act at random.

    Returns the actions [T, 13] and the successes [T].
    """
    expert, obs, rng = ScriptedExpert(env), env.reset([seed]), np.random.default_rng(0)
    expert.reset()
    actions, successes = [], []
    while len(actions) < HORIZON and (to_the_end or not any(successes)):
        action = expert.act(obs, env.instructions)
        if len(actions) in push:
            action = rng.uniform(-1, 1, (1, 13))
        obs, info = env.step(action)
        actions.append(action[0])
        successes.append(info["success"].item())
    return np.array(actions), np.array(successes)


@pytest.fixture(scope="module", params=PAPER_COLUMNS)
def episodes(request, simulator) -> list[np.ndarray]:
    """The actions [T, 13] of one column's episodes, which succeed at step T."""
    column = COLUMNS[request.param]
    env = simulator("set_table", column.subtask, column.target_in("set_table"), "val")
    episodes = [run(env, seed) for seed in (0, 1, 0)]
    assert all(done[-1] for _, done in episodes) and np.array_equal(episodes[0][0], episodes[2][0])
    return [actions for actions, _ in episodes]


@pytest.fixture(scope="module")
def drawer(simulator) -> SubtaskEnvs:
    return simulator("set_table", "close", "kitchen_counter", "val")


def test_it_succeeds_soon_with_actions_in_range_and_leaves_the_head_alone(episodes):
    for actions in episodes:
        assert actions.dtype == np.float32 and actions.shape[1:] == (13,)
        assert len(actions) <= LONGEST and (np.abs(actions) <= 1).all()
        assert (actions[:, 8:10] == 0).all()


def test_its_actions_are_smooth_on_a_grid_and_never_idle(episodes):
    for actions in episodes:
        # Uniform actions differ by 0.67 on average. Here only a change of phase differs much.
        assert np.abs(np.diff(actions, axis=0)).mean() < 0.04
        # A learner decodes the arm before the base: finer digits would tell it the phase.
        steps = actions[:, :7] / GRID
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
        # A policy that learns to wait waits for ever. The arm rests only while the fingers move.
        idle = np.abs(actions[:, MOVING]).max(axis=1) < 0.02
        assert all(len(list(stretch)) <= 5 for is_idle, stretch in groupby(idle) if is_idle)


@pytest.mark.parametrize("episodes", ["close_drawer", "close_fridge"], indirect=True)
def test_the_arm_is_still_while_the_base_pushes_and_backs_off(episodes):
    for actions in episodes:
        shut = np.argmax(actions[:, 7] > 0)  # from here on the hand is open
        push, back = actions[shut - 8 : shut], actions[shut : shut + 8]
        assert (push[:, 11] > 0).all() and (back[:, 11] < 0).all()
        assert (push[:, :7] == 0).all() and (back[:, :7] == 0).all()


@pytest.mark.parametrize("target", ["fridge", "kitchen_counter"])
def test_it_acts_to_the_horizon_if_the_handle_is_never_in_its_grip(target, simulator, monkeypatch):
    monkeypatch.setattr(ScriptedExpert, "in_hand", lambda *_: False)
    _, successes = run(simulator("set_table", "open", target, "val"), seed=0)
    assert len(successes) == HORIZON  # an action at every step


def test_the_hand_arrives_on_every_side_of_the_bowl_and_grasps_it_centred(simulator):
    env, arrivals, grasps = simulator("set_table", "pick", "024_bowl", "val"), [], []
    for seed in range(12):
        expert, obs, over = ScriptedExpert(env), env.reset([seed]), []
        expert.reset()
        while (action := expert.act(obs, env.instructions))[0, 7] == OPEN:
            beyond = expert.beyond(expert.object.pose.sp.p)  # [forward, left] metres
            over += [beyond] if np.abs(action[0, :7]).max() < 0.1 else []  # the arm is still
            obs, _ = env.step(action)
        arrivals.append(over[0])
        grasps.append(beyond)
    assert (np.min(arrivals, 0) < -0.03).all() and (np.max(arrivals, 0) > 0.03).all()
    assert np.abs(grasps).max() < 0.015


@pytest.mark.parametrize("push", [(), range(10, 16)])  # 0.3 s: states that a learner got into
def test_it_succeeds_after_a_push_and_then_stays_at_rest(push, drawer):
    actions, successes = run(drawer, seed=5, to_the_end=True, push=push)
    assert successes[-1] and np.abs(actions[-1, MOVING]).max() < 0.01
