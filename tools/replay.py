"""Recorded actions in the recorded episodes: do demonstrations succeed again in this simulator?

    python -m tools.replay --data DATA --episodes 5

Each demonstration begins with its own plan and start pose, in MS_ASSET_DIR's apartment, with CPU
physics. A demonstration that succeeded and fails here was recorded with another physics, controller
or apartment. Recorded on a CPU in the same apartment, joints and success are equal (a test).
Recorded with GPU physics, as the release, they may differ.
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

    def begin(self, entry: dict) -> dict:
        uids = [plan.subtasks[0].uid for plan in self._plans]
        if entry["subtask_uid"] not in uids:
            raise DataError(
                f"MS_ASSET_DIR has no subtask {entry['subtask_uid']}; expected the apartment in "
                "which the demonstrations were recorded"
            )
        spawn = int(np.atleast_1d(entry["spawn_selection_idx"])[0])
        self.place = uids.index(entry["subtask_uid"]), spawn
        return self.reset(int(np.atleast_1d(entry["episode_seed"])[0]))

    def choose(self, seed: int) -> tuple[int, int]:
        return self.place


def main(data: Path, episodes: int = 5) -> None:
    """Replay the first demonstrations of every file, and print what became of each.

    Args:
        data: folder of demonstrations, MS-HAB's or collect.py's
        episodes: demonstrations of each file
    """
    if not (files := h5_files(data)):
        raise InputError(f"{data}: no .h5 demonstrations below it; expected --data DATA")
    found = []
    for path in files:
        for text, recorded, replayed in replay(path, episodes):
            print(f"{path.relative_to(data)}, {text}", flush=True)
            found.append((recorded, replayed))
    succeeded = [replayed for recorded, replayed in found if recorded]
    print(f"{sum(succeeded)} of {len(succeeded)} recorded successes succeed again")


def replay(path: Path, episodes: int) -> Iterator[tuple[str, bool, bool]]:
    """For each demonstration: what happened, did it succeed when recorded, does it here?"""
    entries = load_sidecar(path)["episodes"][:episodes]
    uid = str(entries[0].get("subtask_uid"))
    task, subtask, split, *_ = (*uid.split("-"), "", "")
    if task not in TASKS or subtask not in SUBTASKS:
        raise DataError(f"{path}: subtask_uid is {uid}, expected MS-HAB's TASK-SUBTASK-SPLIT-...")
    env = RecordedEnv(task, subtask, path.stem, split, obs_mode="state_dict")
    with h5py.File(path) as file:
        for entry in entries:
            group, drift, success = file[f"traj_{entry['episode_id']}"], 0.0, []
            actions = clip(read_actions(group, entry["elapsed_steps"], str(path)))
            obs = env.begin(entry)
            for recorded, action in zip(group[KEYS["qpos"]], actions):
                drift = max(drift, np.abs(recorded - obs["agent"]["qpos"][0].numpy()).max())
                obs, info = env.step(action)
                success.append(info["success"])
            before = group["success"][:].astype(bool)
            text = f"{group.name[1:]}: {told(before)} when recorded, {told(success)} here; "
            text += f"joints differ by up to {drift:.2g}"
            yield text, bool(before.any()), any(success)
    env.close()


def told(success: list[bool]) -> str:
    return f"success at step {np.argmax(success) + 1}" if any(success) else "no success"


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main, description=__doc__)
