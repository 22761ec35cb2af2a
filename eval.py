"""Evaluate a policy in ManiSkill-HAB: the paper's table, with intervals (Sec. 6.1).

    python eval.py                          # the newest stage of runs/auxvla-all, paper's columns
    python eval.py --checkpoint RUN/stage2 --task set_table --episodes 30 --video 3 --out RUN/eval
    python eval.py --policy random          # or expert: the bounds, by the same code
    python eval.py --policy rl --policies mshab_checkpoints            # MS-HAB's own policies
    python eval.py --checkpoint RUN/stage2 --workers 8 --out RUN/eval  # the GPUs in turn
    python eval.py --checkpoint RUN/stage2 --envs 16 --out RUN/eval    # simulated on a GPU

A finished episode is one line of OUT/episodes.jsonl, on disk before the next one counts. A killed
run goes on with the missing episodes, and the table is always computed from that file.
OUT/results.json has the columns and their provenance. tools/report.py puts all evaluations of a run
side by side, tools/compare.py compares two on equal seeds.
"""

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import HORIZON, TASKS, InputError, user_errors
from paper import COLUMNS, DEFAULT_ROW, EACH, OBJECTS, PAPER_COLUMNS, ROWS, sentences, targets
from simulation.assets import apartment, asset_folder, check_assets, plan_files
from simulation.plans import (
    Job,
    articulations,
    batches,
    check_envs,
    count_scenes,
    film_name,
    simulation_backend,
)
from simulation.workers import Workers
from storage.checkpoint import read_manifest, resolve
from storage.files import append, code_commit, read_json, sha256, sole_writer, write_json
from storage.results import merge_settings, read_episodes, success_table, table
from training.ranks import device_of

LIBRARIES = ("torch", "mani_skill", "praxis-mshab", "sapien", "numpy")


@dataclass(frozen=True)
class EvalConfig:
    # folder of the results, where a stopped run goes on; default: runs/RUN/eval, and eval-POLICY
    # for other policies than the learned one
    out: Path | None = None
    # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN; default: the newest stage of runs/RUN
    checkpoint: Path | None = None
    # a folder in runs/; default: the row
    run_name: Annotated[str | None, tyro.conf.arg(aliases=["--run"])] = None
    # only learned takes a checkpoint; rl are MS-HAB's, for each column that of its target or "all"
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
    device: Literal["cpu", "cuda"] | None = None  # of the learned policy; default: cuda if present

    def __post_init__(self):
        if self.checkpoint and (self.policy != "learned" or self.out is None):
            raise InputError(
                f"--checkpoint {self.checkpoint}: expected --out too, and no --policy but learned"
            )
        counts = self.episodes, self.horizon, self.workers, self.envs
        if min(counts) < 1 or min(self.seed, self.video) < 0:
            raise InputError(
                "--episodes, --horizon, --workers, --envs start at 1, --seed and --video at 0"
            )
        for name in self.names:
            known = targets(self.task, COLUMNS[name].subtask)
            if not known or COLUMNS[name].target_in(self.task) not in ("all", *known):
                raise InputError(
                    f"--columns {name}: {self.task} has none; it picks and places "
                    f"{', '.join(OBJECTS[self.task])}, and only set_table opens and closes"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to run, each once."""
        known = [name for name in PAPER_COLUMNS if targets(self.task, COLUMNS[name].subtask)]
        names = []
        for name in self.columns or known:
            each = OBJECTS[self.task]
            names += [f"{EACH[name]}:{target}" for target in each] if name in EACH else [name]
        return tuple(dict.fromkeys(names))

    def address(self, column: str) -> tuple[str, str, str]:
        """MS-HAB's task, subtask and target of a column."""
        return self.task, COLUMNS[column].subtask, COLUMNS[column].target_in(self.task)

    def plan_file(self, column: str) -> Path:
        """MS-HAB's task plans of a column. Raises InputError when a file is missing."""
        return plan_files(*self.address(column), self.split)[0]


def choose(cfg: EvalConfig) -> EvalConfig:
    """Fill in the folders, the checkpoint, its row and its columns.

    Raises InputError when a file is missing, before any worker starts.
    """
    run, learned = Path("runs", cfg.run_name or cfg.row or DEFAULT_ROW), cfg.policy == "learned"
    out = cfg.out or run / ("eval" if learned else f"eval-{cfg.policy}")
    cfg = replace(cfg, out=out)
    if learned:
        folder = resolve(cfg.checkpoint or newest_stage(run))  # fixed, even if training goes on
        manifest = read_manifest(folder, verify=False, moments=False)  # workers verify it
        cfg = replace(cfg, checkpoint=folder, row=cfg.row or manifest["config"].get("row"))
        cfg = replace(cfg, columns=known_columns(cfg, manifest))
    for name in cfg.names:
        cfg.plan_file(name)
    return replace(cfg, row=cfg.row or DEFAULT_ROW)


def newest_stage(run: Path) -> Path:
    for stage in (3, 2, 1):
        if (run / f"stage{stage}/last").exists():
            return run / f"stage{stage}"
    raise InputError(
        f"no trained stage in {run}: torchrun --nproc_per_node=8 train.py --stage 1 trains the "
        "first; or give --run-name NAME, --checkpoint RUN/stageN, or --policy random"
    )


def known_columns(cfg: EvalConfig, manifest: dict) -> tuple[str, ...]:
    """Return the columns whose every sentence the checkpoint was trained on.

    Of the default columns the others are left out with a message. Raises InputError when the user
    asked for one of them without --unseen-instructions.
    """
    trained, names = set(manifest["instructions"]), cfg.names
    new = [name for name in names if sentences(cfg.task, name) - trained]
    if not new or cfg.unseen_instructions:
        return names
    unseen = sorted(set().union(*(sentences(cfg.task, name) for name in new)) - trained)
    text = f"{cfg.checkpoint} never saw {', '.join(map(repr, unseen))}; it was trained on "
    text += ", ".join(map(repr, sorted(trained)))
    if cfg.columns or len(new) == len(names):
        raise InputError(f"{text}. Leave out --columns {' '.join(new)}, or --unseen-instructions")
    print(f"{text}. Not run: {' '.join(new)} (--unseen-instructions runs them)", file=sys.stderr)
    return tuple(name for name in names if name not in new)


def settings_of(cfg: EvalConfig) -> dict:
    """The settings that determine an episode; a results folder may not mix two of them."""
    same = ("task", "split", "policy", "horizon", "stop_at_success", "real_meshes")
    policies = None
    if cfg.policy == "rl":
        from simulation.rl_expert import RLPolicy  # here: it imports the simulator

        policies = {name: RLPolicy.load(cfg.policies, *cfg.address(name)).sha for name in cfg.names}
    return {key: getattr(cfg, key) for key in same} | {
        "simulation": simulation_backend(cfg.envs),
        "checkpoint": sha256(cfg.checkpoint / "manifest.json") if cfg.checkpoint else None,
        "policies": policies,
        "device": device_of(cfg.device).type if cfg.checkpoint else "cpu",  # a GPU acts in bf16
        "assets": apartment(),
    }


def provenance(cfg: EvalConfig) -> dict:
    """Checkpoint path, command, commit, renderer and versions."""
    import sapien  # here, and the simulator in the workers: --help and mistakes in flags are fast

    marker = asset_folder() / "household.json"
    return {
        "checkpoint_path": str(cfg.checkpoint) if cfg.checkpoint else None,
        "household": read_json(marker) if marker.exists() else None,
        "row": cfg.row,
        "command": " ".join(sys.argv),
        "git": code_commit(),
        "platform": platform.platform(),
        "renderer": sapien.render.get_device_summary().partition("\n")[0],
        "versions": {"python": platform.python_version()} | {x: version(x) for x in LIBRARIES},
    }


def serve(cfg: EvalConfig, jobs: Iterator[Job]) -> Iterator[list[dict]]:
    """Run in a worker."""
    from simulation.episodes import run_jobs  # here: the main process needs no simulator

    return run_jobs(cfg, jobs)


def run(cfg: EvalConfig, done: dict[tuple[str, int], dict]) -> None:
    """Run the missing episodes; each finished one is a line on disk at once."""
    missing, last = [], cfg.seed + cfg.episodes
    for name in cfg.names:
        articulation_of = articulations(cfg.plan_file(name)) if cfg.envs > 1 else lambda seed: ""
        videos = [cfg.out / "videos" / film_name(name, seed) for seed in range(cfg.seed, last)]
        late = []
        for seed, video in zip(range(cfg.seed, last), videos):
            filmed = seed < cfg.seed + cfg.video
            if (name, seed) not in done:
                missing.append((name, seed, filmed, articulation_of(seed)))
            elif filmed and not [*video.parent.glob(f"{video.name}_[sf]*.mp4")]:
                late.append(seed)
        if late:
            print(f"{name}, seeds {late}: run already, without a film; another --out films them")
    jobs, workers = iter(batches(missing, cfg.envs)), Workers(cfg.workers, partial(serve, cfg))
    results = workers.run(lambda running: next(jobs, None))
    for i, episode in enumerate((each for _, job in results for each in job), start=1):
        append(cfg.out / "episodes.jsonl", episode)
        outcome = "success" if episode["success_once"] else "fail"
        where = f"{i}/{len(missing)}  {episode['column']}, seed {episode['seed']}"
        print(f"{where:32} {outcome:8} {episode['seconds']:6.1f} s", flush=True)


def conclude(cfg: EvalConfig, settings: dict) -> None:
    """Write OUT/results.json and print the table."""
    episodes, row = [*read_episodes(cfg.out).values()], ROWS[cfg.row]
    paper, scenes = row.paper.get(cfg.task, {}), {}
    columns = table(episodes, paper)
    for name in columns:
        of_column = [episode for episode in episodes if episode["column"] == name]
        scenes[name] = count_scenes(cfg.plan_file(name), of_column, cfg.seed)
    seeds = sorted({episode["seed"] for episode in episodes})
    manifest = settings | provenance(cfg) | {"seeds": seeds}
    results = {"columns": columns, "scenes": scenes, "manifest": manifest}
    write_json(cfg.out / "results.json", results)
    print("\n".join(["", *success_table({cfg.policy: columns}, {row.label: paper})]))
    for name, count in scenes.items():
        if count["reached"] < count["of"]:
            print(
                f"{name}: {count['reached']} of the split's {count['of']} scenes; "
                f"--episodes {count['seeds_for_all']} reaches all of them"
            )
    print("An interval that contains the paper's figure neither confirms nor refutes it.")


def main(cfg: EvalConfig) -> None:
    check_envs(cfg.envs, cfg.policy == "expert", cfg.device)
    check_assets(tasks=(cfg.task,))
    cfg = choose(cfg)
    with sole_writer(cfg.out):
        done = read_episodes(cfg.out, mend=True)
        settings = merge_settings(cfg.out, done, settings_of(cfg))
        write_json(cfg.out / "config.json", settings)
        run(cfg, done)
        conclude(cfg, settings)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(EvalConfig, description=__doc__))
