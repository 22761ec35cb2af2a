"""Record an expert's successful episodes in MS-HAB's own layout, with the paper's auxiliary labels.

    python collect.py --task set_table --subtask close --target kitchen_counter --out data

writes data/set_table/close/kitchen_counter.h5 and .json in the layout of MS-HAB's recorder
(envs/wrappers/record.py): T actions, T + 1 observations, depth in int16 millimetres; and adds

    traj_i/labels/pos                     [T + 1, 2] float32      base x, y, world frame, metres
    traj_i/labels/seg/fetch_{head,hand}   [T + 1, 128, 128] bool  the object, door or drawer

The other labels are MS-HAB observations. `--expert rl` records MS-HAB's released policies in the
real apartments, N episodes at once on a GPU by `--envs N`. With `--after CHECKPOINT` a policy acts
first; each episode begins where the expert takes over.

A seed determines an episode (with `--after`, seed and checkpoint do). The file has the lowest seeds
at which the expert succeeds, for any number of workers. Each finished attempt is kept in
<target>.parts: after a kill the same command continues, and a larger --episodes adds to the file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from config import SUBTASKS, TASKS, Count, InputError, Seed
from paper import targets
from simulation.assets import apartment, plan_files
from simulation.plans import Job, articulations, check_envs, simulation_backend
from simulation.workers import Workers
from storage.checkpoint import resolve
from storage.files import sha256, sole_writer
from storage.recording import Recording
from storage.results import wilson
from storage.terminal import cli, user_errors


@dataclass(frozen=True)
class CollectConfig:
    task: Literal[TASKS]
    subtask: Literal[SUBTASKS]
    target: str  # object or articulation, as MS-HAB names it; all: one file per target
    out: Path = Path("data")  # the files are OUT/<task>/<subtask>/<target>.h5 and .json
    episodes: Count = 20  # successful episodes in all files together, divided evenly
    # scripted knows the generated apartment, rl are MS-HAB's policies for the real ones
    expert: Literal["scripted", "rl"] = "scripted"
    # for rl: `hf download arth-shukla/mshab_checkpoints --local-dir mshab_checkpoints`
    policies: Path = Path("mshab_checkpoints")
    # a checkpoint that acts first, for up to 149 steps, on the CPU; then the scripted expert acts
    # and is recorded (DAgger, https://arxiv.org/abs/1011.0686). Give unused seeds with --seed
    after: Path | None = None
    # attempts at a target, after which the run gives up; unset: 20 + 10 per episode
    max_attempts: Count | None = None
    split: Literal["train", "val"] = "train"  # of MS-HAB's scenes and episodes
    workers: Count = 1  # processes, a simulator each; one per core is best
    envs: Count = 1  # environments that each worker simulates at once on a GPU; for rl only
    seed: Seed = 0  # of the first attempt; the next ones have seed + 1, seed + 2, ...

    def __post_init__(self):
        if self.after and self.expert != "scripted":
            raise InputError(f"--expert {self.expert} takes no --after: drop one of them")
        known = targets(self.task, self.subtask)
        if not known:
            raise InputError(f"--subtask {self.subtask}: {self.task} only picks and places")
        if self.target not in (*known, "all"):
            raise InputError(
                f"--target {self.target}: the targets of {self.task} {self.subtask} are {known}"
            )

    @property
    def episodes_per_target(self) -> dict[str, int]:
        """Episodes for each target; the first ones take the remainder."""
        names = targets(self.task, self.subtask) if self.target == "all" else (self.target,)
        each, rest = divmod(self.episodes, len(names))
        return {name: each + (i < rest) for i, name in enumerate(names)}

    def recipe(self, target: str) -> dict:
        """Settings that determine an episode, equal for all episodes of a file."""
        recipe = dict(expert=self.expert, split=self.split, seed=self.seed, assets=apartment())
        if self.after:
            recipe["after"] = sha256(self.after / "manifest.json")
        if self.envs > 1:
            recipe["simulation"] = simulation_backend(self.envs)
        if self.expert == "rl":
            from simulation.rl_expert import RLPolicy  # here: it imports the simulator

            recipe["policy"] = RLPolicy.load(self.policies, self.task, self.subtask, target).sha
        return recipe


def collect(cfg: CollectConfig, recording: Recording, target: str, workers: Workers) -> None:
    """Attempt seeds in ascending order until enough episodes succeed; then write the file."""
    # Keep the additional successes of an earlier run with a larger --episodes.
    episodes = max(cfg.episodes_per_target[target], recording.successes)
    limit = cfg.max_attempts or 20 + 10 * episodes
    articulation_of = articulations(plan_files(cfg.task, cfg.subtask, target, cfg.split)[0])

    def next_job(running: list[Job]) -> Job | None:
        busy = [seed for job in running for seed in job.seeds]
        seeds = recording.next_seeds(busy, episodes, cfg.envs)
        same = [seed for seed in seeds if articulation_of(seed) == articulation_of(seeds[0])]
        return Job(target, same) if same else None

    recording.start()
    bar = tqdm(total=episodes, initial=recording.successes, desc=target, disable=None)
    for job, attempts in workers.run(next_job):
        for seed, (success, steps, part) in zip(job.seeds, attempts, strict=True):
            recording.add(seed, success, steps, part)
            bar.update(success)
        bar.set_postfix(attempts=len(recording.done))
        if len(recording.done) >= limit and recording.successes < episodes:
            raise SystemExit(
                f"{target}: stopped, {recording.successes} of {len(recording.done)} attempts of "
                f"the {cfg.expert} expert succeeded, {episodes} were wanted. Attempts are kept in "
                f"{recording.parts}; a larger --max-attempts continues"
            )
    bar.close()
    recording.merge()


def main(cfg: CollectConfig) -> None:
    check_envs(cfg.envs, cfg.expert == "scripted")
    cfg = replace(cfg, after=cfg.after and resolve(cfg.after))  # fixed, even if training goes on
    folder = cfg.out / cfg.task / cfg.subtask
    workers = Workers(cfg.workers, "simulation.demonstrations", cfg)
    # All recipes first: a missing file is refused before a worker starts.
    recipes = {target: cfg.recipe(target) for target in cfg.episodes_per_target}
    for target, episodes in cfg.episodes_per_target.items():
        if not episodes:
            print(f"{target}: no episode, since --episodes {cfg.episodes} are divided evenly")
            continue
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
        main(cli(CollectConfig, description=__doc__))
