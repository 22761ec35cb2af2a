"""Record an expert's successful episodes in MS-HAB's own layout, with the paper's auxiliary labels.

    python collect.py --task set_table --subtask close --target kitchen_counter --out data

writes data/set_table/close/kitchen_counter.h5 and .json like MS-HAB's recorder (MS-HAB:
envs/wrappers/record.py): T actions, T + 1 observations, depth in int16 millimetres; and adds

    traj_i/labels/pos                     [T + 1, 2] float32      base x, y, world frame, metres
    traj_i/labels/seg/fetch_{head,hand}   [T + 1, 128, 128] bool  the target object, or the handle

The other labels are MS-HAB observations. With `--expert rl` MS-HAB's released policies act, in the
real apartments that they were trained in; with `--envs N` on a GPU, in N episodes at once.

An episode is a seed: the file has the first N seeds at which the expert succeeds, whatever the
number of workers. Each finished attempt is kept in <target>.parts; a run that was killed goes on
where it was, and asking for more adds to the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from mani_skill.utils.common import to_cpu_tensor, to_numpy
from mshab.utils.label_dataset import get_episode_label_and_events
from tqdm import tqdm

from config import HORIZON, SUBTASKS, TASKS, InputError, user_errors
from household.expert import ScriptedExpert
from paper import targets
from simulation.assets import apartment, plan_files
from simulation.env import SENSORS, SubtaskEnvs, articulations
from simulation.episodes import Job, check_envs, pad_seeds, simulation_backend
from simulation.rl_expert import RLPolicy
from simulation.workers import Workers
from storage.files import sole_writer
from storage.recording import Recording, encode
from storage.results import wilson

# MS-HAB's labels of the episodes that it released (utils/gen/gen_data.py). Its other successes
# dropped the object before, or dropped it to its goal.
RELEASED = ("straightforward_success", "placed_in_goal_success", "open_success", "closed_success")


@dataclass(frozen=True)
class CollectConfig:
    task: Literal[TASKS]
    subtask: Literal[SUBTASKS]
    target: str  # object or articulation, as MS-HAB names it; "all" of the task: one file each
    out: Path = Path("data")  # the files are OUT/<task>/<subtask>/<target>.h5 and .json
    episodes: int = 20  # successful ones to have in the end, divided evenly among the targets
    # scripted knows the generated apartment, rl are MS-HAB's policies for the real ones
    expert: Literal["scripted", "rl"] = "scripted"
    # of --expert rl: `hf download arth-shukla/mshab_checkpoints --local-dir mshab_checkpoints`
    policies: Path = Path("mshab_checkpoints")
    # attempts per target after which too few successes end the run; default: 20 + 10 per episode
    max_attempts: int | None = None
    split: Literal["train", "val"] = "train"  # of MS-HAB's scenes and episodes
    workers: int = 1  # processes, a simulator each; one per core is best
    envs: int = 1  # of --expert rl: so many episodes at once in each process, on a GPU
    seed: int = 0  # of the first episode; the others count up from it
    real_meshes: bool = False  # render Fetch's own meshes, not the light copies in the asset folder

    def __post_init__(self):
        known = targets(self.task, self.subtask)
        if not known:
            raise InputError(f"--subtask {self.subtask}: {self.task} only picks and places")
        if self.target not in (*known, "all"):
            raise InputError(
                f"--target {self.target}: the targets of {self.task} {self.subtask} are {known}"
            )
        if min(self.episodes, self.workers, self.envs, self.max_attempts or 1) < 1 or self.seed < 0:
            raise InputError(
                "--episodes, --workers, --envs, --max-attempts start at 1, --seed at 0"
            )

    @property
    def wanted(self) -> dict[str, int]:
        """Episodes for each target; the first ones take the remainder."""
        names = targets(self.task, self.subtask) if self.target == "all" else (self.target,)
        each, rest = divmod(self.episodes, len(names))
        return {name: each + (i < rest) for i, name in enumerate(names)}

    def rl_policy(self, target: str, device="cpu") -> RLPolicy | None:
        """MS-HAB's policy for a target; None when the scripted expert acts."""
        if self.expert != "rl":
            return None
        return RLPolicy.load(self.policies, self.task, self.subtask, target, device)

    def recipe(self, target: str) -> dict:
        """The settings that determine an episode; they must not change while a file grows."""
        policy = self.rl_policy(target)
        recipe = {key: getattr(self, key) for key in ("expert", "split", "seed", "real_meshes")}
        recipe["assets"] = apartment()
        if self.envs > 1:
            recipe["simulation"] = simulation_backend(self.envs)
        return recipe if policy is None else recipe | {"policy": policy.sha}


# --- In a worker ---


def run_jobs(cfg: CollectConfig, jobs: Iterator[Job]) -> Iterator[list[tuple[bool, int, bytes]]]:
    """Attempt each job's seeds; a simulator is kept while the target stays the same."""
    for target, group in groupby(jobs, attrgetter("column")):
        envs = SubtaskEnvs(
            cfg.task, cfg.subtask, target, cfg.split, real_meshes=cfg.real_meshes,
            simulation=simulation_backend(cfg.envs), num_envs=cfg.envs,
        )  # fmt: skip
        expert = cfg.rl_policy(target, envs.mshab.device) or ScriptedExpert(envs)
        for job in group:
            yield attempt(envs, expert, job.seeds)
        envs.close()


def attempt(
    envs: SubtaskEnvs, expert: ScriptedExpert | RLPolicy, seeds: list[int]
) -> list[tuple[bool, int, bytes]]:
    """Let the expert act until each episode succeeded, failed or reached the horizon.

    Returns for each seed whether to keep it, its steps, and its h5 (recording.encode). Of an RL
    policy's successes, those are kept that MS-HAB's release keeps.
    """
    obs = envs.reset(pad_seeds(seeds, envs.num_envs))
    expert.reset()
    rows, steps = [[row] for row in frames(envs, obs)], [[] for _ in seeds]
    while running := [i for i, taken in enumerate(steps) if not finished(taken)]:
        actions = expert.act(obs, envs.instructions)  # [N, 13]
        obs, info = envs.step(actions)
        info, observed = to_cpu_tensor(info), frames(envs, obs)
        for i in running:
            rows[i].append(observed[i])
            checks = {key: value[i].item() for key, value in info.items()}
            steps[i].append({"action": actions[i], **checks})
    released = isinstance(expert, RLPolicy)
    return [encode_attempt(envs, i, rows[i], steps[i], released) for i in range(len(seeds))]


def finished(steps: list[dict]) -> bool:
    return bool(steps) and (steps[-1]["success"] or steps[-1]["fail"] or len(steps) == HORIZON)


def frames(envs: SubtaskEnvs, obs: dict) -> list[dict]:
    """Return a row of the file for each environment, without segmentation images, as MS-HAB."""

    def row(tree: dict, i: int) -> dict:
        return {
            key: row(value, i) if isinstance(value, dict) else value[i]
            for key, value in tree.items()
            if key != "segmentation"
        }

    arrays, masks, pos = to_numpy(obs), envs.masks(obs), envs.positions
    return [
        {"obs": row(arrays, i), "labels": {"pos": pos[i], "seg": dict(zip(SENSORS, masks[i]))}}
        for i in range(envs.num_envs)
    ]


def encode_attempt(
    envs: SubtaskEnvs, i: int, rows: list[dict], steps: list[dict], released: bool
) -> tuple[bool, int, bytes]:
    """Return the i-th environment's episode as `attempt` does."""
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
        "success_once": success,  # an episode ends at its success
        "success_at_end": success,
        "fail": steps[-1]["fail"],
        "label": label,
        "events": events,
    }
    kept = label in RELEASED if released else success
    return kept, len(steps), encode(trajectory, header(envs), episode)


def header(envs: SubtaskEnvs) -> dict:
    """The json's entries for all episodes (MS-HAB: parse_env_info, without the file arguments)."""
    spec = envs.mshab.spec
    kwargs = {k: v for k, v in spec.kwargs.items() if k not in ("task_plans", "spawn_data_fp")}
    return {
        "env_info": {"env_id": spec.id, "env_kwargs": kwargs, "max_episode_steps": HORIZON},
        "commit_info": None,  # MS-HAB's value for a ManiSkill that is not a git checkout
        "action_schema": envs.action_schema,
        "qpos_names": envs.qpos_names,
    }


# --- In the main process ---


def next_seeds(
    recording: Recording, running: list[int], episodes: int, envs: int, articulation_of: Callable
) -> list[int]:
    """Return the lowest seeds not attempted yet, at most `envs`, all with one articulation."""
    seeds = []
    while len(seeds) < envs:
        seed = recording.next_seed(running + seeds, episodes)
        if seed is None:
            break
        seeds.append(seed)
    return [seed for seed in seeds if articulation_of(seed) == articulation_of(seeds[0])]


def collect(cfg: CollectConfig, recording: Recording, target: str, workers: Workers) -> None:
    """Attempt seeds, lowest first, until as many succeeded as are wanted, and write the file."""
    # An earlier run that wanted more may have left more successes: keep them.
    episodes = max(cfg.wanted[target], recording.successes)
    limit = cfg.max_attempts or 20 + 10 * episodes
    plan_file, _ = plan_files(cfg.task, cfg.subtask, target, cfg.split)
    articulation_of = articulations(plan_file) if cfg.envs > 1 else lambda seed: ""

    def next_job(running: list[Job]) -> Job | None:
        busy = [seed for job in running for seed in job.seeds]
        seeds = next_seeds(recording, busy, episodes, cfg.envs, articulation_of)
        return Job(target, seeds) if seeds else None

    recording.start()
    bar = tqdm(total=episodes, initial=recording.successes, desc=target, disable=None)
    for job, attempts in workers.run(next_job):
        for seed, (success, steps, part) in zip(job.seeds, attempts, strict=True):
            recording.add(seed, success, steps, part)
            bar.update(success)
        bar.set_postfix(attempts=len(recording.done))
        if len(recording.done) >= limit and recording.successes < episodes:
            raise SystemExit(
                f"{target}: given up, {recording.successes} of {len(recording.done)} attempts of "
                f"the {cfg.expert} expert succeeded, {episodes} were wanted. They stay in "
                f"{recording.parts}; a larger --max-attempts goes on"
            )
    bar.close()
    recording.merge()


def main(cfg: CollectConfig) -> None:
    check_envs(cfg.envs, cfg.expert == "scripted")
    workers, recipes = Workers(cfg.workers, partial(run_jobs, cfg)), {}
    for target in cfg.wanted:  # raise for missing files before any worker starts
        plan_files(cfg.task, cfg.subtask, target, cfg.split)
        recipes[target] = cfg.recipe(target)
    for target, episodes in cfg.wanted.items():
        folder = cfg.out / cfg.task / cfg.subtask
        with sole_writer(folder, target):
            recording = Recording(folder, target, recipes[target])
            if len(recording.episodes) >= episodes:
                print(f"{recording.h5}: already there, {len(recording.episodes)} episodes")
                continue
            collect(cfg, recording, target, workers)
        successes, attempts = recording.successes, len(recording.done)
        low, high = wilson(successes, attempts)
        print(
            f"{recording.h5}: {successes} episodes; the {cfg.expert} expert succeeded in "
            f"{successes}/{attempts} = {successes / attempts:.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(CollectConfig, description=__doc__))
