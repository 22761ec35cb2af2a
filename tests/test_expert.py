"""The scripted expert: it succeeds, and its motions are such that they can be learned."""

import numpy as np
import pytest

from config import HORIZON
from household.expert import GRID, ScriptedExpert
from paper import COLUMNS, PAPER_COLUMNS
from simulation.env import SubtaskEnvs

# The longest any column takes is about 125 steps: HORIZON leaves a learner time for mistakes.
SEEDS, LONGEST = (0, 1), 140
MOVING = [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]  # arm, torso, base


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
def episodes(request, simulator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of one column, the episodes of SEEDS."""
    column = COLUMNS[request.param]
    target = column.target_in("set_table")
    env = simulator("set_table", column.subtask, target, "val")
    return [run(env, seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def drawer(simulator) -> SubtaskEnvs:
    return simulator("set_table", "close", "kitchen_counter", "val")


def test_it_succeeds_well_before_the_horizon(episodes):
    for actions, successes in episodes:
        assert successes[-1] and len(actions) <= LONGEST


def test_its_actions_are_in_range_and_leave_the_head_alone(episodes):
    for actions, _ in episodes:
        assert actions.dtype == np.float32 and actions.shape[1:] == (13,)
        assert (np.abs(actions) <= 1).all()
        assert (actions[:, 8:10] == 0).all()


def test_consecutive_actions_are_smooth(episodes):
    """Of uniform actions the mean is 0.67; what is left here are the changes of phase."""
    for actions, _ in episodes:
        assert np.abs(np.diff(actions, axis=0)).mean() < 0.04


def test_the_arm_moves_on_a_grid(episodes):
    """Finer digits would tell the phase to a learner that decodes the arm before the base."""
    for actions, _ in episodes:
        steps = actions[:, :7] / GRID
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)


def test_no_stretch_is_idle(episodes):
    """A policy that learns to wait waits for ever. The arm rests only while the fingers move."""
    for actions, _ in episodes:
        idle = np.abs(actions[:, MOVING]).max(axis=1) < 0.02
        longest = max(len(run) for run in "".join("x" if i else " " for i in idle).split(" "))
        assert longest <= 5


@pytest.mark.parametrize("episodes", ["close_drawer", "close_fridge"], indirect=True)
def test_the_arm_is_still_while_the_base_pushes_and_backs_off(episodes):
    for actions, _ in episodes:
        shut = np.argmax(actions[:, 7] > 0)  # from here on the hand is open
        push, back = actions[shut - 8 : shut], actions[shut : shut + 8]
        assert (push[:, 11] > 0).all() and (back[:, 11] < 0).all()
        assert (push[:, :7] == 0).all() and (back[:, :7] == 0).all()


def test_one_seed_is_one_motion(drawer):
    first, second = (run(drawer, seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_it_stays_at_rest_after_success(drawer):
    actions, successes = run(drawer, seed=5, to_the_end=True)
    assert successes[-1] and np.abs(actions[-1, MOVING]).max() < 0.01


def test_it_recovers_from_a_push(drawer):
    """The expert also labels states that a learner got into."""
    _, successes = run(drawer, seed=5, push=range(10, 16))  # a third of a second of anything
    assert successes[-1]
