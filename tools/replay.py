"""Replay recorded actions in the recorded episodes: do demonstrations succeed in this simulator?

    python -m tools.replay --data DATA --episodes 5

Each demonstration starts with its own plan and start pose, in MS_ASSET_DIR's apartment, on CPU
physics. A recorded success that fails here was recorded with another physics backend, controller or
apartment. What collect.py recorded on a CPU in the same apartment repeats exactly (a test); the
release was recorded on GPU physics and may differ.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import tyro

from config import SUBTASKS, TASKS, InputError, user_errors
from simulation.env import SubtaskEnv
from storage.h5 import h5_files, load_sidecar
from storage.trajectory import KEYS, DataError, clip, read_actions


class RecordedEnv(SubtaskEnv):
    """Starts each episode with the plan and the start pose of a demonstration's .json entry."""

    def reset_to(self, entry: dict) -> dict:
        uids = [plan.subtasks[0].uid for plan in self._plans]
        if entry["subtask_uid"] not in uids:
            raise DataError(
                f"MS_ASSET_DIR has no subtask {entry['subtask_uid']}: another apartment"
            )
        spawn = int(np.atleast_1d(entry["spawn_selection_idx"])[0])
        self.choice = uids.index(entry["subtask_uid"]), spawn
        return self.reset(int(np.atleast_1d(entry["episode_seed"])[0]))

    def choose(self, seed: int) -> tuple[int, int]:
        return self.choice


def replay(path: Path, episodes: int) -> Iterator[tuple[str, bool, bool]]:
    """Yield for each demonstration its name and drift, its recorded success, its success here."""
    entries = load_sidecar(path)["episodes"][:episodes]
    uid = str(entries[0].get("subtask_uid"))
    task, subtask, split, *_ = (*uid.split("-"), "", "")
    if task not in TASKS or subtask not in SUBTASKS:
        raise DataError(f"{path}: subtask_uid is {uid}, expected MS-HAB's TASK-SUBTASK-SPLIT-...")
    env = RecordedEnv(task, subtask, path.stem, split, obs_mode="state_dict")
    with h5py.File(path) as file:
        for entry in entries:
            group, drift, succeeded = file[f"traj_{entry['episode_id']}"], 0.0, False
            actions = clip(read_actions(group, entry["elapsed_steps"], str(path)))  # [T, 13]
            obs = env.reset_to(entry)
            for qpos, action in zip(group[KEYS["qpos"]], actions):
                drift = max(drift, np.abs(qpos - obs["agent"]["qpos"][0].numpy()).max())
                obs, info = env.step(action)
                succeeded |= bool(info["success"])
            name = f"{path}, {group.name[1:]}: joints differ by up to {drift:.2g}"
            yield name, bool(group["success"][:].any()), succeeded
    env.close()


def main(data: Path = Path("data"), episodes: int = 5) -> None:
    """Replay the first demonstrations of every file, and print the outcome of each.

    Args:
        data: folder of demonstrations, MS-HAB's or collect.py's
        episodes: demonstrations of each file
    """
    if not (files := h5_files(data)):
        raise InputError(f"{data}: no .h5 demonstrations below it; expected --data DATA")
    succeeded = []
    for path in files:
        for name, recorded, replayed in replay(path, episodes):
            words = ["success" if outcome else "failure" for outcome in (recorded, replayed)]
            print(f"{name}; recorded: {words[0]}, here: {words[1]}", flush=True)
            succeeded += [replayed] * recorded
    print(f"{sum(succeeded)} of {len(succeeded)} recorded successes succeed again")


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main, description=__doc__)
