"""Record an expert's successful episodes in MS-HAB's own layout, with the paper's auxiliary labels.

    python collect.py --task set_table --subtask close --target kitchen_counter --out DATA

writes DATA/set_table/close/kitchen_counter.h5 and .json like MS-HAB's recorder (MS-HAB:
envs/wrappers/record.py): T actions, T + 1 observations, depth in int16 millimetres; and adds

    traj_i/labels/pos                     [T + 1, 2] float32      base x, y, world frame, metres
    traj_i/labels/seg/fetch_{head,hand}   [T + 1, 128, 128] bool  the target object, or the handle

(the other labels are MS-HAB observations).

An episode is a seed: the file has the first N seeds at which the expert succeeds, whatever the
number of workers. Finished attempts are kept at once, in <target>.parts; a run that was killed
goes on where it was, and asking for more adds to the file.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from config import explained
from env import SENSORS, SubtaskEnv, plan_files
from recording import Recording, encode
from tasks import HORIZON, SUBTASKS, TASKS, targets, wilson


@dataclass(frozen=True)
class CollectConfig:
    task: Literal[TASKS]
    subtask: Literal[SUBTASKS]
    target: str  # object or articulation, as MS-HAB names it; "all" of the task: one file each
    out: Path  # the files are OUT/<task>/<subtask>/<target>.h5 and .json
    episodes: int = 20  # successful ones to have in the end, divided evenly among the targets
    expert: Literal["scripted"] = "scripted"  # who acts
    split: Literal["train", "val"] = "train"
    workers: int = 1  # processes, a simulator each; one per core is best
    seed: int = 0  # of the first episode; the others count up from it
    real_meshes: bool = False  # render Fetch's own meshes, not the light copies in the asset folder

    def __post_init__(self):
        known = targets(self.task, self.subtask)
        if self.target not in (*known, "all") or not known:
            raise ValueError(
                f"--target {self.target}: the targets of {self.task} {self.subtask} are {known}"
            )
        if self.episodes < 1 or self.workers < 1 or self.seed < 0:
            raise ValueError("expected --episodes >= 1, --workers >= 1 and --seed >= 0")

    @property
    def wanted(self) -> dict[str, int]:
        """Episodes for each target; the first ones take what does not divide evenly."""
        names = targets(self.task, self.subtask) if self.target == "all" else (self.target,)
        each, rest = divmod(self.episodes, len(names))
        return {name: each + (i < rest) for i, name in enumerate(names)}

    @property
    def recipe(self) -> dict:
        """What decides the episode of a seed, hence must not change while a file grows."""
        return {key: getattr(self, key) for key in ("expert", "split", "seed", "real_meshes")}


# --- One attempt, in a worker ---


def scripted(env: SubtaskEnv):
    from household.expert import ScriptedExpert  # here: another expert needs no household

    return ScriptedExpert(env)


EXPERTS = {"scripted": scripted}


@dataclass(frozen=True)
class Attempt:
    success: bool
    steps: int
    part: bytes  # an h5 file: the trajectory as traj_0, its share of the json as attributes


def attempt(env: SubtaskEnv, expert, seed: int) -> Attempt:
    """Let the expert act until the episode succeeds, fails or is at its horizon."""
    obs, info = env.reset(seed), {"success": False, "fail": False}
    expert.reset()
    frames, steps = [frame(env, obs)], []
    while not (info["success"] or info["fail"] or len(steps) == HORIZON):
        action = expert.act(obs, env.instruction)[0]  # [13]
        if not (np.abs(action) <= 1).all():  # NaN compares false
            raise ValueError(f"seed {seed}: expected actions in [-1, 1], the expert gave {action}")
        obs, info = env.step(action)
        frames.append(frame(env, obs))
        steps.append({"action": action, **info})
    taken = {key: np.array([step[key] for step in steps]) for key in steps[0]}
    trajectory = {
        "obs": [each["obs"] for each in frames],
        "actions": taken["action"].astype(np.float32),
        "terminated": taken["success"] | taken["fail"],
        "truncated": np.arange(1, len(steps) + 1) >= HORIZON,
        "success": taken["success"],
        "fail": taken["fail"],
        "rewards": taken["reward"].astype(np.float32),
        "labels": [each["labels"] for each in frames],
    }
    episode = {
        **env.episode,
        "instruction": env.instruction,
        "episode_seed": [seed],
        "reset_kwargs": {"seed": seed},
        "control_mode": env.mshab.control_mode,
        "elapsed_steps": len(steps),
        "success_once": bool(taken["success"].any()),
        "success_at_end": info["success"],
        "fail": info["fail"],
    }
    part = encode(trajectory, header(env), episode)
    return Attempt(info["success"], len(steps), part)


def frame(env: SubtaskEnv, obs: dict) -> dict:
    """One row of the file, without the batch axis; MS-HAB keeps no segmentation images."""

    def rows(tree: dict) -> dict:
        return {
            key: rows(value) if isinstance(value, dict) else value[0].cpu().numpy()
            for key, value in tree.items()
            if key != "segmentation"
        }

    masks = dict(zip(SENSORS, env.target_masks(obs), strict=True))
    return {"obs": rows(obs), "labels": {"pos": env.pos, "seg": masks}}


def header(env: SubtaskEnv) -> dict:
    """What the json says of all its episodes (MS-HAB: parse_env_info, less the same arguments)."""
    spec = env.mshab.spec
    kwargs = {k: v for k, v in spec.kwargs.items() if k not in ("task_plans", "spawn_data_fp")}
    return {
        "env_info": {"env_id": spec.id, "env_kwargs": kwargs, "max_episode_steps": HORIZON},
        "commit_info": None,  # MS-HAB's value for a ManiSkill that is not a git checkout
        "action_schema": env.action_schema,
        "qpos_names": env.qpos_names,
    }


def work(connection: Connection, cfg: CollectConfig):
    """Answer each (target, seed) with its Attempt, until the main process hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    env, opened = None, None
    try:
        while True:
            target, seed = connection.recv()
            if target != opened:
                if env is not None:
                    env.close()
                env = SubtaskEnv(
                    cfg.task, cfg.subtask, target, cfg.split, real_meshes=cfg.real_meshes
                )
                opened = target
                expert = EXPERTS[cfg.expert](env)
            connection.send(attempt(env, expert, seed))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the main process is done or gone, and with it the only writer of the files


# --- The run, in the main process ---


def start_workers(cfg: CollectConfig) -> dict[Connection, BaseProcess]:
    # Inherited: one core each, and one order of MS-HAB's set of names (init_config_idx).
    os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1", PYTHONHASHSEED="0")
    context = multiprocessing.get_context("spawn")
    workers = {}
    for _ in range(min(cfg.workers, cfg.episodes)):
        ours, theirs = context.Pipe()
        workers[ours] = context.Process(target=work, args=(theirs, cfg), daemon=True)
        workers[ours].start()
        theirs.close()  # with a copy here, reading from a dead worker would wait for ever
    return workers


def attempt_seeds(
    recording: Recording, target: str, episodes: int, workers: dict[Connection, BaseProcess]
) -> Iterator[Attempt]:
    """Attempt seeds, lowest first, until `episodes` succeeded; yield what is on the disk."""
    idle, running = list(workers), {}
    while True:
        while idle and (seed := recording.next_seed([*running.values()], episodes)) is not None:
            running[idle[-1]] = seed
            idle.pop().send((target, seed))
        if not running:
            return
        for connection in wait([*running]):
            seed = running.pop(connection)
            try:
                result = connection.recv()
            except (EOFError, ConnectionResetError):
                workers[connection].join()
                raise SystemExit(
                    f"The worker at seed {seed} of {target} died (exit code "
                    f"{workers[connection].exitcode}); if it could say why, it did so above. "
                    "Finished episodes are kept: the same command goes on"
                ) from None
            idle.append(connection)
            recording.add(seed, result.success, result.steps, result.part)
            yield result


def collect(
    recording: Recording, target: str, episodes: int, workers: dict[Connection, BaseProcess]
):
    episodes = max(episodes, recording.successes)  # keep all that a run that wanted more left
    bar = tqdm(total=episodes, initial=recording.successes, desc=target, disable=None)
    for result in attempt_seeds(recording, target, episodes, workers):
        bar.update(result.success)
        bar.set_postfix(attempts=len(recording.done))
        if len(recording.done) >= 20 + 10 * episodes and recording.successes < episodes:
            raise SystemExit(
                f"{target}: given up, {recording.successes} of {len(recording.done)} attempts "
                f"succeeded. They stay in {recording.parts}"
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
    workers = None
    for target in cfg.wanted:
        plan_files(cfg.task, cfg.subtask, target, cfg.split)  # before any worker starts
    for target, episodes in cfg.wanted.items():
        recording = Recording(cfg.out / cfg.task / cfg.subtask, target, cfg.recipe)
        if len(recording.episodes) >= episodes:
            print(f"{recording.h5}: already there, {len(recording.episodes)} episodes")
            continue
        recording.start()
        workers = workers or start_workers(cfg)
        collect(recording, target, episodes, workers)
        report(cfg, recording)


if __name__ == "__main__":
    with explained():
        main(tyro.cli(CollectConfig, description=__doc__))
