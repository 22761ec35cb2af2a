"""A policy in the ManiSkill-HAB environments: the paper's table, with intervals (Sec. 6.1).

    python eval.py --checkpoint RUN/stage2 --task set_table --episodes 30 --video 3 --out RUN/eval
    python eval.py --policy random --out RUN/eval-random   # or expert: bounds by the same code
    python eval.py --policy rl --policies mshab_checkpoints --out RUN/eval-rl   # MS-HAB's own
    torchrun --nproc_per_node=8 eval.py --checkpoint RUN/stage2 --out RUN/eval  # a GPU each
    python eval.py --checkpoint RUN/stage2 --envs 16 --out RUN/eval-gpu  # simulated on a GPU

A finished episode is one line of OUT/episodes.jsonl, on disk before the next one counts. A killed
run goes on with the missing episodes, and the table is always computed from that file.
OUT/results.json has the columns and what it takes to repeat them. tools/report.py puts all
evaluations of a run side by side, tools/compare.py compares two on equal seeds.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

import sapien
import torch
import tyro

from config import HORIZON, TASKS, InputError, user_errors
from household.expert import ScriptedExpert
from paper import COLUMNS, DEFAULT_ROW, EACH, OBJECTS, PAPER_COLUMNS, ROWS, sentences, targets
from policy import Policy, check_schema
from simulation.assets import assets
from simulation.env import HOUSEHOLD, SubtaskEnv, SubtaskEnvs, apartment, cupboards, plan_files
from simulation.episodes import (
    Job,
    RandomPolicy,
    batches,
    check_envs,
    run_episodes,
    scenes,
    simulation_of,
)
from simulation.film import Film
from simulation.rl_expert import RLPolicy
from simulation.workers import Workers
from storage.checkpoint import read_manifest, resolve
from storage.files import append, code_commit, read_lines, sha256, sole_writer, write
from storage.results import address, check_same_run, merge, part, success_table, table
from training.checks import disk, packages, require
from training.ranks import Ranks, device_of, join

ALIKE = ("column", "filmed")  # jobs for which a simulator is kept
LIBRARIES = ("torch", "mani_skill", "praxis-mshab", "sapien", "numpy")


@dataclass(frozen=True)
class EvalConfig:
    out: Path  # folder of the results; a run that was cut short goes on there
    checkpoint: Path | None = None  # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN
    # only learned takes a checkpoint; rl are MS-HAB's, each column by that of its target or "all"
    policy: Literal["learned", "expert", "random", "rl"] = "learned"
    # of rl: `hf download arth-shukla/mshab_checkpoints --local-dir mshab_checkpoints`
    policies: Path = Path("mshab_checkpoints")
    task: Literal[TASKS] = "set_table"  # of MS-HAB
    # default: the paper's that the task has; pick_each, place_each: one for each of its objects
    columns: tuple[Literal[(*COLUMNS, *EACH)], ...] = ()
    unseen_instructions: bool = False  # run columns whose sentences the checkpoint never saw
    episodes: int = 30  # per column (Sec. 6.1)
    split: Literal["train", "val"] = "val"  # GAP-18: the paper names none
    seed: int = 0  # of the first episode; the others count up from it
    horizon: int = HORIZON  # control steps per episode (MS-HAB: max_episode_steps)
    stop_at_success: bool = False  # faster, but success at the end is then unknown
    workers: int = 1  # processes, one core and simulator each; results do not depend on it
    envs: int = 1  # several: simulated at once on a GPU, and filmed ones alone; not the expert
    video: int = 0  # film the first so many episodes of each column
    # the paper's row beside ours (python paper.py); default: the checkpoint's, else auxvla-all
    row: Literal[tuple(ROWS)] | None = None
    real_meshes: bool = False  # render Fetch's own meshes, not the light copies in the asset folder
    device: Literal["cpu", "cuda"] | None = (
        None  # of the learned policy; default: cuda if there is one
    )

    def __post_init__(self):
        if (self.policy == "learned") != (self.checkpoint is not None):
            raise InputError(
                f"--policy {self.policy} with --checkpoint {self.checkpoint}: the learned policy "
                "needs one (--checkpoint RUN/stage2), the others take none"
            )
        counts = self.episodes, self.horizon, self.workers, self.envs
        if min(counts) < 1 or min(self.seed, self.video) < 0:
            raise InputError(
                "--episodes, --horizon, --workers, --envs start at 1, --seed and --video at 0"
            )
        for name in self.names:
            has = targets(self.task, COLUMNS[name].subtask)
            if not has or COLUMNS[name].target_in(self.task) not in ("all", *has):
                raise InputError(
                    f"--columns {name}: {self.task} has none; it picks and places "
                    f"{', '.join(OBJECTS[self.task])}, and only set_table opens and closes"
                )

    @property
    def simulation(self) -> str:
        return simulation_of(self.envs)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to run, each once."""
        has = [name for name in PAPER_COLUMNS if targets(self.task, COLUMNS[name].subtask)]
        names = []
        for name in self.columns or has:
            each = OBJECTS[self.task]
            names += [f"{EACH[name]}:{target}" for target in each] if name in EACH else [name]
        return tuple(dict.fromkeys(names))

    def plan_files(self, column: str) -> tuple[Path, Path]:
        """MS-HAB's task plan and start poses of a column. Raises InputError."""
        what = COLUMNS[column]
        return plan_files(self.task, what.subtask, what.target_in(self.task), self.split)

    def rl_policy(self, column: str, device="cpu") -> RLPolicy | None:
        """MS-HAB's policy for a column; None when another one acts."""
        if self.policy != "rl":
            return None
        subtask, target = COLUMNS[column].subtask, COLUMNS[column].target_in(self.task)
        return RLPolicy.load(self.policies, self.task, subtask, target, device)


POLICIES = {
    "learned": Policy, "expert": ScriptedExpert, "random": RandomPolicy, "rl": RLPolicy
}  # fmt: skip

# --- In a worker ---


def simulator(cfg: EvalConfig, column: str, filmed: bool) -> SubtaskEnvs:
    """Only what is read is rendered: segmentation, which a film shows, takes a third of a step."""
    what, alone = COLUMNS[column], filmed or cfg.envs == 1
    return (SubtaskEnv if alone else SubtaskEnvs)(
        cfg.task, what.subtask, what.target_in(cfg.task), cfg.split,
        obs_mode=Film.obs_mode if filmed else POLICIES[cfg.policy].obs_mode,
        real_meshes=cfg.real_meshes, simulation=cfg.simulation,
        num_envs=1 if alone else cfg.envs,
    )  # fmt: skip


def film_name(column: str, seed: int) -> str:
    return f"{column}_{seed}".replace(":", "_")  # scp reads a colon as a host


def film_of(cfg: EvalConfig, column: str, seed: int) -> list[Path]:
    """The finished film of an episode, if there is one."""
    return [*(cfg.out / "videos").glob(f"{film_name(column, seed)}_[sf]*.mp4")]


def run_jobs(cfg: EvalConfig, jobs: Iterable[Job]) -> Iterator[list[dict]]:
    """Yield each job's episodes; one simulator at a time, kept while it renders the same."""
    learned = Policy.from_checkpoint(cfg.checkpoint, cfg.device) if cfg.checkpoint else None
    for (column, filmed), same in groupby(jobs, attrgetter(*ALIKE)):
        envs = simulator(cfg, column, filmed)
        if learned is not None:
            check_schema(envs, learned.manifest)
            learned.predict = filmed  # what the decoders read is only drawn
        rl = cfg.rl_policy(column, envs.mshab.device)
        policy = learned or rl or POLICIES[cfg.policy](envs)
        for job in same:
            name = film_name(column, job.seeds[0])
            film = Film(envs, learned, cfg.out / "videos", name) if filmed else None
            records = run_episodes(envs, policy, job.seeds, cfg, film)
            yield [{"column": column, **record} for record in records]
        envs.close()


# --- Files and numbers ---


def identity_of(cfg: EvalConfig) -> dict:
    """What decides the episode of a seed: it is on every line of a file, and must not change."""
    rl = cfg.policy == "rl"
    same = ("task", "split", "policy", "horizon", "stop_at_success", "real_meshes", "simulation")
    return {key: getattr(cfg, key) for key in same} | {
        "checkpoint": sha256(cfg.checkpoint / "manifest.json") if cfg.checkpoint else None,
        "policies": {name: cfg.rl_policy(name).sha for name in cfg.names} if rl else None,
        # A GPU acts in bf16.
        "device": device_of(cfg.device).type if cfg.checkpoint else "cpu",
        "assets": apartment(),
    }


def origin(cfg: EvalConfig) -> dict:
    """Where and with what the results came about."""
    return {
        "checkpoint_path": str(cfg.checkpoint) if cfg.checkpoint else None,
        "household": json.loads(HOUSEHOLD.read_bytes()) if HOUSEHOLD.exists() else None,
        "row": cfg.row,
        "command": " ".join(sys.argv),
        "git": code_commit(),
        "platform": platform.platform(),
        "renderer": sapien.render.get_device_summary().partition("\n")[0],
        "versions": {"python": platform.python_version()} | {x: version(x) for x in LIBRARIES},
    }


def own_gpu():
    """Let this rank's simulators and policy see one GPU, their own.

    By the variable and not by a device's number: SAPIEN's renderer follows it (its issue 101).
    """
    every = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]


def run(cfg: EvalConfig, ranks: Ranks, path: Path, identity: dict):
    """Run this rank's share of the episodes that the file lacks; each is a line on disk at once."""
    done = {address(episode) for episode in read_lines(path)}
    seeds, missing = range(cfg.seed, cfg.seed + cfg.episodes), []
    for name in cfg.names:
        of = cupboards(cfg.plan_files(name)[0]) if cfg.envs > 1 else lambda seed: None
        episodes = [(name, seed, seed < cfg.seed + cfg.video, of(seed)) for seed in seeds]
        missing += [episode for episode in episodes if episode[:2] not in done]
        late = [e[1] for e in episodes if e[2] and e[:2] in done and not film_of(cfg, *e[:2])]
        if late and ranks.is_main:
            print(f"{name}, seeds {late}: run already, without a film; another --out films them")
    missing = missing[ranks.rank :: ranks.world]
    if ranks.world > 1:
        path = part(path, ranks.rank)
        own_gpu()
    waiting, workers = (
        iter(batches(missing, cfg.envs)),
        Workers(cfg.workers, partial(run_jobs, cfg)),
    )
    finished = (each for _, job in workers.run(lambda running: next(waiting, None)) for each in job)
    for i, episode in enumerate(finished, start=1):
        append(path, identity | episode)
        outcome = "success" if episode["success_once"] else "fail"
        where = f"{i}/{len(missing)}  {episode['column']}, seed {episode['seed']}"
        print(f"{where:32} {outcome:8} {episode['seconds']:6.1f} s", flush=True)


def conclude(cfg: EvalConfig, episodes: list[dict], identity: dict):
    """Write OUT/results.json and print the table."""
    row = ROWS[cfg.row]
    paper = row.paper.get(cfg.task, {})
    columns = table(episodes, paper)
    reached = {
        name: scenes(
            cfg.plan_files(name)[0], [e for e in episodes if e["column"] == name], cfg.seed
        )
        for name in columns
    }
    seeds = sorted({episode["seed"] for episode in episodes})
    manifest = identity | origin(cfg) | {"seeds": seeds}
    results = {"columns": columns, "scenes": reached, "manifest": manifest}
    write(cfg.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print("\n".join(["", *success_table({cfg.policy: columns}, {row.label: paper})]))
    for name, s in reached.items():
        if s["reached"] < s["of"]:
            print(
                f"{name}: {s['reached']} of the split's {s['of']} scenes; "
                f"--episodes {s['seeds_for_all']} reaches all of them"
            )
    print("An interval that contains the paper's figure neither confirms nor refutes it.")


def heard(cfg: EvalConfig, manifest: dict) -> tuple[str, ...]:
    """The columns whose every sentence the checkpoint was trained on, unless told otherwise.

    Of the columns that are run by default the others are left out, saying so. Raises InputError
    when they were asked for.
    """
    seen, names = set(manifest["instructions"]), cfg.names
    new = [name for name in names if sentences(cfg.task, name) - seen]
    if not new or cfg.unseen_instructions:
        return names
    unheard = sorted(set().union(*(sentences(cfg.task, name) for name in new)) - seen)
    what = f"{cfg.checkpoint} never saw {', '.join(map(repr, unheard))}; it was trained on "
    what += ", ".join(map(repr, sorted(seen)))
    if cfg.columns or len(new) == len(names):
        raise InputError(f"{what}. Leave out --columns {' '.join(new)}, or --unseen-instructions")
    print(f"{what}. Not run: {' '.join(new)} (--unseen-instructions runs them)", file=sys.stderr)
    return tuple(name for name in names if name not in new)


def prepare(cfg: EvalConfig) -> tuple[EvalConfig, dict]:
    """The checkpoint and the row that are meant, and the run's identity.

    Raises InputError when a file is missing, before any worker starts.
    """
    if cfg.checkpoint is not None:
        folder = resolve(cfg.checkpoint)  # one, even if training goes on
        manifest = read_manifest(folder, verify=False, moments=False)  # workers verify it
        row = cfg.row or manifest["config"].get("row")
        cfg = replace(cfg, checkpoint=folder, row=row, columns=heard(cfg, manifest))
    for name in cfg.names:
        cfg.plan_files(name)
    return replace(cfg, row=cfg.row or DEFAULT_ROW), identity_of(cfg)


def main(cfg: EvalConfig):
    check_envs(cfg.envs, cfg.policy == "expert", cfg.device)
    require(packages(deep=False), assets(tasks=(cfg.task,)), disk(cfg.out, 0))
    path, ranks = cfg.out / "episodes.jsonl", join("cpu")
    with ExitStack() as held:

        def begin() -> str:
            """What to run, once the folder is ours and the ranks' files are one."""
            held.enter_context(sole_writer(cfg.out))
            told, identity = prepare(cfg)
            check_same_run(path, merge(path), identity)
            said = {"checkpoint": str(told.checkpoint or ""), "columns": told.columns}
            return json.dumps(said | {"row": told.row, "identity": identity})

        said = json.loads(ranks.decided(begin))
        if not ranks.is_main:
            held.enter_context(sole_writer(cfg.out, str(ranks.rank)))
        folder = Path(said["checkpoint"]) if cfg.checkpoint else None
        cfg = replace(cfg, checkpoint=folder, columns=tuple(said["columns"]), row=said["row"])
        run(cfg, ranks, path, said["identity"])
        ranks.leave()  # all have finished
        if ranks.is_main:
            conclude(cfg, merge(path), said["identity"])


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(EvalConfig))
