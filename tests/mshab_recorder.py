"""What MS-HAB's own recorder writes, and whether recorded actions succeed again.

    python tests/mshab_recorder.py FOLDER STEPS DEMONSTRATIONS.h5

writes FOLDER/mshab.h5 and .json with mshab's RecordEpisode on the environment collect.py uses:
traj_0 is STEPS random steps long; traj_1 and so on are the trajectories of the h5, replayed from
their seeds, and REST steps more. FOLDER/positions.json has the base's x, y at each of their frames,
FOLDER/successes.json the steps of each trajectory of the h5 at which it succeeds.
"""

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import old_gymnasium  # noqa: F401  before mshab's wrappers
from mshab.envs.wrappers.record import RecordEpisode

from simulation.env import SubtaskEnv

REST = 4  # steps after the success, as in MS-HAB's released episodes


def replay(env: SubtaskEnv, seed: int, actions: np.ndarray) -> tuple[list[int], list]:
    """The steps of success and the base's positions."""
    env.reset(seed)
    env.mshab.last_reset_kwargs = {"seed": seed}  # the options are tensors, which are no json
    rest = np.zeros((REST, actions.shape[1]), np.float32)
    rest[:, 7] = actions[-1, 7]  # the gripper's action is a position
    positions, success = [env.positions[0].tolist()], []
    for action in [*actions, *rest]:
        success.append(env.step(action)[1]["success"])
        positions.append(env.positions[0].tolist())
    return np.flatnonzero(success[: len(actions)]).tolist(), positions


def main(folder: Path, steps: int, demonstrations: Path):
    env = SubtaskEnv("set_table", "close", "kitchen_counter", obs_mode="rgbd")
    recorder = RecordEpisode(
        env.mshab, folder, trajectory_name="mshab", save_video=False, record_env_state=False
    )
    recorder.reset(seed=0, options={})
    rng = np.random.default_rng(0)
    for _ in range(steps):
        recorder.step(rng.uniform(-0.2, 0.2, 13).astype(np.float32))
    env.mshab, successes, positions = recorder, {}, {}
    episodes = json.loads(demonstrations.with_suffix(".json").read_text())["episodes"]
    with h5py.File(demonstrations) as file:
        for episode in episodes:
            number = episode["episode_id"]
            actions = file[f"traj_{number}/actions"][:]
            successes[number], positions[number] = replay(env, episode["seed"], actions)
    recorder.flush_trajectory()  # a reset has flushed those before
    recorder._h5_file.close()
    (folder / "positions.json").write_text(json.dumps(positions))
    (folder / "successes.json").write_text(json.dumps(successes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
