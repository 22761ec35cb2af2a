"""Replay recorded actions in the recorded episodes: do demonstrations succeed in this simulator?

    python -m tools.replay --data DATA --episodes 5

Each demonstration starts with its own plan and start pose, in MS_ASSET_DIR's apartment, on CPU
physics. A recorded success that fails here was recorded with another physics backend, controller or
apartment. What collect.py recorded on a CPU in the same apartment repeats exactly (a test); the
release was recorded on GPU physics and may differ.
"""

from pathlib import Path

import h5py
import numpy as np

from config import SUBTASKS, TASKS, Count, InputError
from simulation.env import SubtaskEnv
from storage.h5 import h5_files, load_sidecar
from storage.terminal import cli, user_errors
from storage.trajectory import KEYS, Trajectory, clip


def replay(path: Path, episodes: int) -> list[bool]:
    """Replay and print each demonstration; return whether each recorded success succeeds here."""
    entries = [each for each in load_sidecar(path)["episodes"] if not each.get("driven")]
    if not entries:
        print(f"{path}: not replayed, it has only corrections (collect.py --after)")
        return []
    entries, succeeded = entries[:episodes], []
    uid = str(entries[0].get("subtask_uid"))
    task, subtask, split, *_ = (*uid.split("-"), "", "")
    if task not in TASKS or subtask not in SUBTASKS:
        raise InputError(f"{path}: subtask_uid is {uid}, expected MS-HAB's TASK-SUBTASK-SPLIT-...")
    env = SubtaskEnv(task, subtask, path.stem, split, obs_mode="state_dict")
    plans = {plan.subtasks[0].uid: i for i, plan in enumerate(env._plans)}
    with h5py.File(path) as file:
        for entry in entries:
            uid, group = entry["subtask_uid"], file[f"traj_{entry['episode_id']}"]
            if uid not in plans:
                raise InputError(f"{path}: MS_ASSET_DIR has no subtask {uid}: another apartment")
            seed, spawn = (
                int(np.ravel(entry[k])[0]) for k in ("episode_seed", "spawn_selection_idx")
            )
            env.choose = lambda seed, choice=(plans[uid], spawn): choice
            obs, drift, success = env.reset(seed), 0.0, False
            steps = entry["elapsed_steps"]
            actions = clip(Trajectory(group, steps, str(path)).read("actions", 0, steps))  # [T, 13]
            for qpos, action in zip(group[KEYS["qpos"]], actions):
                drift = max(drift, np.abs(qpos - obs["agent"]["qpos"][0].numpy()).max())
                obs, info = env.step(action)
                success |= bool(info["success"])
            recorded = bool(group["success"][:].any())
            outcomes = ["success" if each else "failure" for each in (recorded, success)]
            print(
                f"{path}, {group.name[1:]}: recorded: {outcomes[0]}, here: {outcomes[1]}; joints "
                f"differ by up to {drift:.2g}", flush=True,
            )  # fmt: skip
            succeeded += [success] * recorded
    env.close()
    return succeeded


def main(data: Path = Path("data"), episodes: Count = 5) -> None:
    """Replay the first demonstrations of every file, and print the outcome of each.

    Args:
        data: folder of demonstrations, MS-HAB's or collect.py's
        episodes: demonstrations of each file
    """
    if not (files := h5_files(data)):
        raise InputError(f"{data}: no .h5 demonstrations below it; expected --data DATA")
    succeeded = [success for path in files for success in replay(path, episodes)]
    print(f"{sum(succeeded)} of {len(succeeded)} recorded successes succeed again")


if __name__ == "__main__":
    with user_errors():
        cli(main, description=__doc__)
