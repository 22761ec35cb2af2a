"""An expert's episodes, recorded in one simulator process. `cfg` is a collect.CollectConfig."""

from collections.abc import Iterator
from itertools import groupby
from operator import attrgetter

import numpy as np
from einops import rearrange
from mani_skill.utils.common import index_dict_array, to_cpu_tensor, to_numpy
from mshab.utils.label_dataset import get_episode_label_and_events

from config import HORIZON
from household.expert import ScriptedExpert
from policy import Policy, check_schema
from simulation.env import SENSORS, SubtaskEnvs
from simulation.plans import Job, pad_seeds, simulation_backend
from simulation.rl_expert import RLPolicy
from storage.recording import encode

# Labels of the episodes that MS-HAB released (utils/gen/gen_data.py), less one that needs steps
# after the success. Not released: successes after a detour, or by dropping the object to its goal.
RELEASED = ("straightforward_success", "placed_in_goal_success", "open_success", "closed_success")

DRIVEN = (5, 150)  # --after's policy acts for 5 to 149 steps; `drive` may halve them


def run_jobs(cfg, jobs: Iterator[Job]) -> Iterator[list[tuple[bool, int, bytes]]]:
    """Attempt each job's seeds. Consecutive jobs of one target share a simulator."""
    policy = cfg.after and Policy.from_checkpoint(cfg.after, "cpu")
    if policy:
        policy.predict = False
    backend = simulation_backend(cfg.envs)
    for target, group in groupby(jobs, attrgetter("column")):
        address = cfg.task, cfg.subtask, target
        envs = SubtaskEnvs(*address, cfg.split, simulation=backend, num_envs=cfg.envs)
        if policy:
            check_schema(envs, policy.manifest)
        if cfg.expert == "rl":
            expert = RLPolicy.load(cfg.policies, *address, envs.mshab.device)
        else:
            expert = ScriptedExpert(envs)
        for job in group:
            yield attempt(envs, expert, job.seeds, policy)
        envs.close()


def drive(envs: SubtaskEnvs, policy: Policy, obs: dict, seed: int) -> dict:
    """Let the policy act for a number of steps that the seed draws; return the last observation.

    If the policy succeeds before, the episode starts again with half the number. Afterwards
    MS-HAB's limits of steps and force start anew.
    """
    steps = int(np.random.default_rng((seed, 1)).integers(*DRIVEN))
    while True:
        policy.reset()
        for _ in range(steps):
            obs, info = envs.step(policy.act(obs, envs.instructions))
            if info["success"].item():
                break
        else:
            envs.mshab.subtask_steps_left[:] = HORIZON
            envs.mshab.robot_cumulative_force[:] = 0
            return obs
        obs, steps = envs.reset([seed]), steps // 2


def attempt(
    envs: SubtaskEnvs, expert: ScriptedExpert | RLPolicy, seeds: list[int],
    policy: Policy | None = None,
) -> list[tuple[bool, int, bytes]]:  # fmt: skip
    """Let the expert act until each episode succeeded, failed or reached the horizon.

    Returns for each seed whether to keep the episode, its steps, and its h5 (recording.encode). An
    RL policy's success is kept if its label is one of RELEASED. A `policy` acts first; only the
    expert's part is recorded.
    """
    obs = envs.reset(pad_seeds(seeds, envs.num_envs))
    expert.reset()  # it notes the height of the surface, before a policy moves the object
    if policy:
        obs = drive(envs, policy, obs, seeds[0])
        expert.reset()
    rows, steps = [[row] for row in frames(envs, obs)], [[] for _ in seeds]
    driven, running = envs.elapsed, range(len(seeds))
    while running:
        actions = expert.act(obs, envs.instructions)  # [N, 13]
        obs, info = envs.step(actions)
        info, observed = to_cpu_tensor(info), frames(envs, obs)
        for i in running:
            rows[i].append(observed[i])
            checks = {key: value[i].item() for key, value in info.items()}
            steps[i].append({"action": actions[i], **checks})
        ended = info["success"] | info["fail"]  # [N]
        running = [i for i in running if not ended[i] and len(steps[i]) < HORIZON]
    released = isinstance(expert, RLPolicy)
    return [encode_attempt(envs, i, rows[i], steps[i], released, driven) for i in range(len(seeds))]


def frames(envs: SubtaskEnvs, obs: dict) -> list[dict]:
    """Return each environment's observation and labels, without segmentation, as MS-HAB records."""
    seg = dict(zip(SENSORS, rearrange(envs.masks(obs), "n c h w -> c n h w")))
    tree = {"obs": to_numpy(obs), "labels": {"pos": envs.positions, "seg": seg}}
    for camera in SENSORS:
        del tree["obs"]["sensor_data"][camera]["segmentation"]
    return [index_dict_array(tree, i, inplace=False) for i in range(envs.num_envs)]


def encode_attempt(
    envs: SubtaskEnvs, i: int, rows: list[dict], steps: list[dict], released: bool, driven: int
) -> tuple[bool, int, bytes]:
    """Return one element of the result of `attempt`, for environment i."""
    if len(steps) == 1:  # the policy had all but succeeded; MS-HAB's labels need two steps
        return False, 1, b""
    taken = {key: np.array([step[key] for step in steps]) for key in steps[0]}  # [T, ...] each
    trajectory = {
        "obs": [each["obs"] for each in rows],
        "actions": taken["action"].astype(np.float32),
        "terminated": taken["success"] | taken["fail"],
        "truncated": np.arange(1, len(steps) + 1) >= HORIZON,
        "success": taken["success"],
        "fail": taken["fail"],
        "rewards": taken["reward"].astype(np.float32),
        "labels": [each["labels"] for each in rows],
    }
    label, events, _ = get_episode_label_and_events(envs.mshab.task_cfgs, taken["success"], taken)
    start, success = envs.episodes[i], steps[-1]["success"]
    episode = {
        **start,
        "instruction": envs.instructions[i],
        "episode_seed": [start["seed"]],
        "reset_kwargs": {"seed": start["seed"]},
        "control_mode": envs.mshab.control_mode,
        "elapsed_steps": len(steps),
        "driven": driven,  # steps of a policy before the first frame (collect.py --after)
        "success_once": success,  # an episode ends at its success
        "success_at_end": success,
        "fail": steps[-1]["fail"],
        "label": label,
        "events": events,
    }
    kept = label in RELEASED if released else success
    return kept, len(steps), encode(trajectory, header(envs), episode)


def header(envs: SubtaskEnvs) -> dict:
    """The json's entries besides the episodes (MS-HAB: parse_env_info, without its files)."""
    spec = envs.mshab.spec
    kwargs = {k: v for k, v in spec.kwargs.items() if k not in ("task_plans", "spawn_data_fp")}
    return {
        "env_info": {"env_id": spec.id, "env_kwargs": kwargs, "max_episode_steps": HORIZON},
        "commit_info": None,  # MS-HAB's value for a ManiSkill that is not a git checkout
        "action_schema": envs.action_schema,
        "qpos_names": envs.qpos_names,
    }
