"""MS-HAB's own training script for behaviour cloning, on files that collect.py wrote.

    python tests/mshab_bc.py FOLDER DEMONSTRATIONS.h5

trains mshab.train_bc for two epochs, without evaluation, into FOLDER/bc. Its environment is real.
"""

import json
import sys
from types import ModuleType

import old_gymnasium  # noqa: F401  before mshab's wrappers
from mani_skill.agents.robots.fetch.fetch import Fetch

from simulation.env import LIGHT_FETCH_URDF, plan_files


class OmegaConf:
    """Its configuration file and its trackers are not used here, and not installed."""

    create = staticmethod(object)
    to_yaml = staticmethod(lambda config: json.dumps(config, default=str))


omegaconf, wandb = ModuleType("omegaconf"), ModuleType("wandb")
omegaconf.OmegaConf, omegaconf.DictConfig = OmegaConf, dict
sys.modules |= {"omegaconf": omegaconf, "wandb": wandb}

from mshab.envs.make import EnvConfig  # noqa: E402
from mshab.train_bc import BCConfig, TrainConfig, train  # noqa: E402
from mshab.utils.logger import LoggerConfig  # noqa: E402


def main(folder: str, demonstrations: str):
    Fetch.urdf_path = str(LIGHT_FETCH_URDF)
    plan, spawns = plan_files("set_table", "close", "kitchen_counter", "train")
    env = EnvConfig(
        "CloseSubtaskTrain-v0", num_envs=1, max_episode_steps=200, sim_backend="cpu",
        record_video=False, frame_stack=1, task_plan_fp=str(plan), spawn_data_fp=str(spawns),
        env_kwargs=dict(
            require_build_configs_repeated_equally_across_envs=False, reconfiguration_freq=0,
            add_event_tracker_info=True, render_backend="cpu",
        ),
    )  # fmt: skip
    algorithm = BCConfig(epochs=2, eval_freq=0, batch_size=64, data_dir_fp=demonstrations)
    logger = LoggerConfig(folder, "bc", best_stats_cfg={"losses/loss": -1})
    train(TrainConfig(seed=0, eval_env=env, algo=algorithm, logger=logger))


if __name__ == "__main__":
    main(*sys.argv[1:])
