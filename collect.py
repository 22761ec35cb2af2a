"""Record an expert's successful episodes in MS-HAB's own layout, with the paper's auxiliary labels.

    python collect.py --task set_table --subtask close --target kitchen_counter --out DATA

writes DATA/set_table/close/kitchen_counter.h5 and .json like MS-HAB's recorder (MS-HAB:
envs/wrappers/record.py): T actions, T + 1 observations, depth in int16 millimetres; and adds

    traj_i/labels/pos                     [T + 1, 2] float32      base x, y, world frame, metres
    traj_i/labels/seg/fetch_{head,hand}   [T + 1, 128, 128] bool  the target object, or the handle

(the other labels are MS-HAB observations). `--expert rl` lets MS-HAB's released policies act, in
the real apartments that they were trained in; with `--envs N` on a GPU, N episodes at once.

An episode is a seed: the file has the first N seeds at which the expert succeeds, whatever the
number of workers. Finished attempts are kept at once, in <target>.parts; a run that was killed
goes on where it was, and asking for more adds to the file.
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
from simulation.env import SENSORS, SubtaskEnv, SubtaskEnvs, apartment, cupboards, plan_files
from simulation.episodes import Job, check_envs, filled, simulation_of
from simulation.rl_expert import RLPolicy
from simulation.workers import Workers
from storage.files import sole_writer
from storage.recording import Recording, encode
from storage.results import wilson
from training.checks import disk, require

# MS-HAB's labels of the episodes that it released (utils/gen/gen_data.py); the others succeed after
# a dropped object, or with one that fell to its goal.
RELEASED = ("straightforward_success", "placed_in_goal_success", "open_success", "closed_success")


@dataclass(frozen=True)
class CollectConfig:
    task: Literal[TASKS]
    subtask: Literal[SUBTASKS]
    target: str  # object or articulation, as MS-HAB names it; "all" of the task: one file each
    out: Path  # the files are OUT/<task>/<subtask>/<target>.h5 and .json
    episodes: int = 20  # successful ones to have in the end, divided evenly among the targets
    # who acts: scripted knows the generated apartment, rl are MS-HAB's policies for the real ones
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
        if min(self.episodes, self.workers, self.envs) < 1 or self.seed < 0:
            raise InputError("expected --episodes, --workers, --envs >= 1 and --seed >= 0")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise InputError(f"--max-attempts {self.max_attempts}: expected at least 1")

    @property
    def wanted(self) -> dict[str, int]:
        """Episodes for each target; the first ones take what does not divide evenly."""
        names = targets(self.task, self.subtask) if self.target == "all" else (self.target,)
        each, rest = divmod(self.episodes, len(names))
        return {name: each + (i < rest) for i, name in enumerate(names)}

    def policy(self, target: str, device="cpu") -> RLPolicy | None:
        """MS-HAB's policy for a target; None when another expert acts."""
        if self.expert != "rl":
            return None
        return RLPolicy.load(self.policies, self.task, self.subtask, target, device)

    def recipe(self, target: str) -> dict:
        """What decides the episode of a seed, hence must not change while a file grows."""
        policy = self.policy(target)
        recipe = {key: getattr(self, key) for key in ("expert", "split", "seed", "real_meshes")}
        recipe["assets"] = apartment()
        if self.envs > 1:
            recipe["simulation"] = simulation_of(self.envs)
        return recipe if policy is None else recipe | {"policy": policy.sha}


# --- In a worker ---


def attempts(cfg: CollectConfig, jobs: Iterator[Job]) -> Iterator[list[tuple]]:
    """Attempt each job's seeds; one simulator, kept while the target stays the same."""
    several = SubtaskEnv if cfg.envs == 1 else SubtaskEnvs
    for target, same in groupby(jobs, attrgetter("column")):
        envs = several(
            cfg.task, cfg.subtask, target, cfg.split, real_meshes=cfg.real_meshes,
            simulation=simulation_of(cfg.envs), num_envs=cfg.envs,
        )  # fmt: skip
        expert = cfg.policy(target, envs.mshab.device) or ScriptedExpert(envs)
        for job in same:
            yield attempt(envs, expert, job.seeds)
        envs.close()


def attempt(
    envs: SubtaskEnvs, expert: ScriptedExpert | RLPolicy, seeds: list[int]
) -> list[tuple[bool, int, bytes]]:
    """Let the expert act until each episode succeeded, failed or is at its horizon.

    Returns for each seed whether to keep it, steps, and the bytes of a part of the file
    (recording.encode). Of an RL policy's successes, those are kept that MS-HAB's release keeps.
    """
    obs = envs.start(filled(seeds, envs.num_envs))
    expert.reset()
    rows, steps = [[row] for row in frames(envs, obs)], [[] for _ in seeds]
    while running := [i for i, taken in enumerate(steps) if not over(taken)]:
        actions = expert.act(obs, envs.instructions)  # [N, 13]
        for i in running:
            if not (np.abs(actions[i]) <= 1).all():  # NaN compares false
                raise ValueError(
                    f"seed {seeds[i]}: expected actions in [-1, 1], the expert gave {actions[i]}"
                )
        obs, info = envs.move(actions)
        info, seen = to_cpu_tensor(info), frames(envs, obs)
        for i in running:
            rows[i].append(seen[i])
            checks = {key: value[i].item() for key, value in info.items()}
            steps[i].append({"action": actions[i], **checks})
    release = isinstance(expert, RLPolicy)
    return [part_of(envs, i, rows[i], steps[i], release) for i in range(len(seeds))]


def over(steps: list[dict]) -> bool:
    return bool(steps) and (steps[-1]["success"] or steps[-1]["fail"] or len(steps) == HORIZON)


def part_of(
    envs: SubtaskEnvs, i: int, rows: list[dict], steps: list[dict], release: bool
) -> tuple[bool, int, bytes]:
    """The episode of the i-th environment as `attempt` returns it."""
    taken = {key: np.array([step[key] for step in steps]) for key in steps[0]}
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
    about = episode(envs, i, steps) | {"label": label, "events": events}
    kept = label in RELEASED if release else steps[-1]["success"]
    return kept, len(steps), encode(trajectory, header(envs), about)


def frames(envs: SubtaskEnvs, obs: dict) -> list[dict]:
    """A row of the file for each environment; MS-HAB keeps no segmentation images."""

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


def episode(envs: SubtaskEnvs, i: int, steps: list[dict]) -> dict:
    """What the json says of the i-th environment's episode."""
    started, last = envs.episodes[i], steps[-1]
    return {
        **started,
        "instruction": envs.instructions[i],
        "episode_seed": [started["seed"]],
        "reset_kwargs": {"seed": started["seed"]},
        "control_mode": envs.mshab.control_mode,
        "elapsed_steps": len(steps),
        "success_once": last["success"],  # it ends at its success
        "success_at_end": last["success"],
        "fail": last["fail"],
    }


def header(env: SubtaskEnvs) -> dict:
    """What the json says of all its episodes (MS-HAB: parse_env_info, less the same arguments)."""
    spec = env.mshab.spec
    kwargs = {k: v for k, v in spec.kwargs.items() if k not in ("task_plans", "spawn_data_fp")}
    return {
        "env_info": {"env_id": spec.id, "env_kwargs": kwargs, "max_episode_steps": HORIZON},
        "commit_info": None,  # MS-HAB's value for a ManiSkill that is not a git checkout
        "action_schema": env.action_schema,
        "qpos_names": env.qpos_names,
    }


# --- In the main process ---


def next_seeds(
    recording: Recording, busy: list[int], episodes: int, envs: int, cupboard_of: Callable
) -> list[int]:
    """The lowest seeds not attempted yet, at most `envs`; those with another cupboard must wait."""
    seeds = []
    while len(seeds) < envs:
        seed = recording.next_seed(busy + seeds, episodes)
        if seed is None:
            break
        seeds.append(seed)
    return [seed for seed in seeds if cupboard_of(seed) == cupboard_of(seeds[0])]


def collect(cfg: CollectConfig, recording: Recording, target: str, workers: Workers):
    """Attempt seeds, lowest first, until as many succeeded as are wanted, and write the file."""
    # keep all that a run that wanted more left
    episodes = max(cfg.wanted[target], recording.successes)
    limit = cfg.max_attempts or 20 + 10 * episodes
    plan_file = plan_files(cfg.task, cfg.subtask, target, cfg.split)[0]
    cupboard_of = cupboards(plan_file) if cfg.envs > 1 else lambda seed: None

    def next_job(running: list[Job]) -> Job | None:
        busy = [seed for job in running for seed in job.seeds]
        seeds = next_seeds(recording, busy, episodes, cfg.envs, cupboard_of)
        return Job(target, seeds) if seeds else None

    recording.start()
    bar = tqdm(total=episodes, initial=recording.successes, desc=target, disable=None)
    for job, parts in workers.run(next_job):
        for seed, (success, steps, part) in zip(job.seeds, parts, strict=True):
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


def report(cfg: CollectConfig, recording: Recording):
    successes, attempts = recording.successes, len(recording.done)
    low, high = wilson(successes, attempts)
    print(
        f"{recording.h5}: {successes} episodes; the {cfg.expert} expert succeeded in "
        f"{successes}/{attempts} = {successes / attempts:.2f} [{low:.2f}, {high:.2f}]"
    )


def main(cfg: CollectConfig):
    check_envs(cfg.envs, cfg.expert == "scripted")
    require(disk(cfg.out, 0))
    workers, recipes = Workers(cfg.workers, partial(attempts, cfg)), {}
    for target in cfg.wanted:  # whatever is missing is missed before any worker starts
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
        report(cfg, recording)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(CollectConfig, description=__doc__))
