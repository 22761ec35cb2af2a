"""What MS-HAB's own recorder writes, and whether recorded actions succeed again.

    python tests/mshab_recorder.py FOLDER STEPS DEMONSTRATIONS.h5

writes FOLDER/mshab.h5 and .json, STEPS random steps long, with mshab's RecordEpisode on the
environment collect.py uses; then replays each trajectory of the h5 from its seed, and prints the
steps at which it succeeds, as json.
"""

import json
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np


def forward_attributes(self, name):
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(self.env, name)


# mshab's wrappers were written for gymnasium 0.29, which had this name and forwarded attributes.
gymnasium.vector.VectorEnvWrapper = gymnasium.vector.VectorWrapper
gymnasium.Wrapper.__getattr__ = forward_attributes

from mshab.envs.wrappers.record import RecordEpisode  # noqa: E402

from env import SubtaskEnv  # noqa: E402

folder, steps, demonstrations = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
env = SubtaskEnv("set_table", "close", "kitchen_counter", obs_mode="rgbd")
recorder = RecordEpisode(
    env.mshab, folder, trajectory_name="mshab", save_video=False, record_env_state=False
)
recorder.reset(seed=0, options={})
rng = np.random.default_rng(0)
for _ in range(steps):
    recorder.step(rng.uniform(-0.2, 0.2, 13).astype(np.float32))
recorder.flush_trajectory()
recorder._h5_file.close()

successes = {}
episodes = json.loads(demonstrations.with_suffix(".json").read_text())["episodes"]
with h5py.File(demonstrations) as file:
    for episode in episodes:
        env.reset(episode["seed"])
        infos = [env.step(action)[1] for action in file[f"traj_{episode['episode_id']}/actions"]]
        successes[episode["episode_id"]] = [i for i, info in enumerate(infos) if info["success"]]
print(json.dumps(successes))
