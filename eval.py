"""Evaluate a policy in ManiSkill-HAB: the paper's table, with intervals (Sec. 6.1).

    python eval.py                          # the highest stage of runs/auxvla-all, paper's columns
    python eval.py --checkpoint RUN/stage2 --task set_table --episodes 30 --video 3 --out RUN/eval
    python eval.py --policy random          # or expert: the bounds, by the same code
    python eval.py --policy rl --policies mshab_checkpoints            # MS-HAB's own policies
    python eval.py --checkpoint RUN/stage2 --workers 8 --out RUN/eval  # the GPUs in turn
    python eval.py --checkpoint RUN/stage2 --envs 16 --out RUN/eval    # simulated on a GPU
    python eval.py --checkpoint RUN/stage2 --chain set_table --out RUN/eval-chain

Each finished episode is one line of OUT/episodes.jsonl; the table is computed from this file. After
a kill, the same command runs the missing episodes. OUT/results.json has the columns and their
provenance. tools/report.py puts all evaluations of a run side by side, tools/compare.py compares
two on equal seeds.
"""

import platform
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import HORIZON, TASKS, Count, InputError, Seed, Whole
from paper import CHAIN, COLUMNS, DEFAULT_ROW, OBJECTS, PAPER_COLUMNS, ROWS, sentences, targets
from simulation.assets import apartment, asset_folder, plan_files
from simulation.plans import articulations, batches, check_envs, simulation_backend
from simulation.workers import Workers
from storage.checkpoint import read_manifest, resolve
from storage.files import append, code_commit, read_json, sha256, sole_writer, write_json
from storage.results import check_settings, read_episodes, success_table, table
from storage.terminal import cli, user_errors
from training.ranks import device_of

LIBRARIES = ("torch", "mani_skill", "praxis-mshab", "sapien", "numpy")


@dataclass(frozen=True)
class EvalConfig:
    # folder of the results; unset: runs/RUN/eval, or runs/RUN/eval-POLICY if not learned
    out: Path | None = None
    # RUN/stageN (its newest) or RUN/stageN/step-NNNNNNNN; unset: the highest stage of runs/RUN
    checkpoint: Path | None = None
    # a folder in runs/; unset: the row
    run_name: Annotated[str | None, tyro.conf.arg(aliases=["--run"])] = None
    # only learned takes a checkpoint; rl: MS-HAB's policy for each column's target
    policy: Literal["learned", "expert", "random", "rl"] = "learned"
    # for rl: `hf download arth-shukla/mshab_checkpoints --local-dir mshab_checkpoints`
    policies: Path = Path("mshab_checkpoints")
    task: Literal[TASKS] = "set_table"
    # unset: the paper's columns that the task has and the checkpoint was trained on
    columns: tuple[Literal[tuple(name for name in COLUMNS if name not in CHAIN)], ...] = ()
    # instead of columns: all its subtasks in one episode, until one fails; the scripted expert
    # drives the robot in between, in a generated apartment (beyond the paper)
    chain: Literal["set_table"] | None = None
    episodes: Count = 30  # per column (Sec. 6.1)
    split: Literal["train", "val"] = "val"  # GAP-18: the paper names none
    seed: Seed = 0  # of the first episode; the next ones have seed + 1, seed + 2, ...
    horizon: Count = HORIZON  # control steps per episode (MS-HAB: max_episode_steps)
    stop_at_success: bool = False  # faster, but success at the end is then unknown
    workers: Count = 1  # processes, one core and simulator each; the number does not change results
    envs: Count = 1  # environments that each worker simulates at once on a GPU; not for the expert
    video: Whole = 0  # film the first N episodes of each column, if they are not finished yet
    # the paper's row to print beside the results; unset: the checkpoint's, else auxvla-all
    row: Literal[tuple(ROWS)] | None = None
    device: Literal["cpu", "cuda"] | None = None  # for the learned policy; unset: cuda if present
    # compile the learned policy's blocks: a minute for each worker and sentence, then faster
    compile: bool = False

    def __post_init__(self):
        if self.checkpoint and self.policy != "learned":
            raise InputError(f"--policy {self.policy} takes no --checkpoint: drop one of them")
        if self.checkpoint and self.out is None:
            raise InputError("--checkpoint without --out: name the folder of the results")
        if self.chain and (self.task != self.chain or self.columns or self.policy == "rl"):
            raise InputError("--chain set_table takes no --task, --columns or --policy rl")
        for name in self.names:
            known = targets(self.task, COLUMNS[name].subtask)
            if not known or COLUMNS[name].target_in(self.task) not in ("all", *known):
                raise InputError(
                    f"--columns {name}: {self.task} has none; it picks and places "
                    f"{', '.join(OBJECTS[self.task])}, and only set_table opens and closes"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to run, each once, or a chain's."""
        if self.chain:
            return tuple(CHAIN)
        known = [name for name in PAPER_COLUMNS if targets(self.task, COLUMNS[name].subtask)]
        return tuple(dict.fromkeys(self.columns or known))

    def address(self, column: str) -> tuple[str, str, str]:
        """MS-HAB's task, subtask and target of a column."""
        return self.task, COLUMNS[column].subtask, COLUMNS[column].target_in(self.task)

    def plan_file(self, column: str) -> Path:
        return plan_files(*self.address(column), self.split)[0]


def fill_defaults(cfg: EvalConfig) -> EvalConfig:
    """Fill in the default folders, checkpoint, row and columns."""
    run, chain = Path("runs", cfg.run_name or cfg.row or DEFAULT_ROW), "-chain" * bool(cfg.chain)
    if cfg.policy != "learned":
        out = cfg.out or run / f"eval-{cfg.policy}{chain}"
        return replace(cfg, out=out, row=cfg.row or DEFAULT_ROW)
    folder = resolve(cfg.checkpoint or highest_stage(run))  # fixed, even if training goes on
    manifest = read_manifest(folder, verify=False, moments=False)  # the workers verify it
    row = cfg.row or manifest["config"].get("row") or DEFAULT_ROW
    cfg = replace(cfg, out=cfg.out or run / f"eval{chain}", checkpoint=folder, row=row)
    trained = set(manifest["instructions"])
    known = tuple(name for name in cfg.names if sentences(cfg.task, name) <= trained)
    if unseen := [name for name in cfg.names if name not in known]:
        fate = "left out without --columns" if known else "run, since the policy knows no column"
        print(
            f"warning: {folder} was not trained on every instruction of {', '.join(unseen)}; "
            f"{'asked for' if cfg.columns or chain else fate}",
            file=sys.stderr,
        )
    return cfg if cfg.chain else replace(cfg, columns=cfg.columns or known or cfg.names)


def highest_stage(run: Path) -> Path:
    if stages := sorted(run.glob("stage[123]/last")):
        return stages[-1].parent
    raise InputError(
        f"no trained stage in {run}: torchrun --nproc_per_node=8 train.py --stage 1 trains the "
        "first; or give --run-name NAME, --checkpoint RUN/stageN, or --policy random"
    )


def settings_of(cfg: EvalConfig) -> dict:
    """Settings that determine an episode, equal for all episodes of a results folder."""
    copied = ("task", "chain", "split", "policy", "horizon", "stop_at_success")
    policies = None
    if cfg.policy == "rl":
        from simulation.rl_expert import RLPolicy  # here: it imports the simulator

        policies = {name: RLPolicy.load(cfg.policies, *cfg.address(name)).sha for name in cfg.names}
    return {key: getattr(cfg, key) for key in copied} | {
        "simulation": simulation_backend(cfg.envs),
        "checkpoint": sha256(cfg.checkpoint / "manifest.json") if cfg.checkpoint else None,
        "policies": policies,
        "device": device_of(cfg.device).type if cfg.checkpoint else "cpu",  # a GPU acts in bf16
        "compile": cfg.compile and cfg.checkpoint is not None,  # rounds differently
        "assets": apartment(),
    }


def provenance(cfg: EvalConfig) -> dict:
    """Checkpoint path, command, commit, renderer and versions."""
    import sapien  # here: --help and wrong flags answer without it

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


def run(cfg: EvalConfig, done: dict[tuple[str, int], dict]) -> None:
    """Run the episodes that are not in `done`; append each to OUT/episodes.jsonl as it finishes."""
    missing = []
    for name in cfg.names[-1:] if cfg.chain else cfg.names:  # a chain gives all its columns
        articulation_of = articulations(cfg.plan_file(name))
        for seed in range(cfg.seed, cfg.seed + cfg.episodes):
            if (name, seed) not in done:
                filmed = seed < cfg.seed + cfg.video
                missing.append((name, seed, filmed, articulation_of(seed)))
    waiting, count = iter(batches(missing, cfg.envs)), 0
    total = len(missing) * (len(CHAIN) if cfg.chain else 1)
    workers = Workers(cfg.workers, "simulation.episodes", cfg)
    for _, episodes in workers.run(lambda running: next(waiting, None)):
        append(cfg.out / "episodes.jsonl", *episodes)
        for episode in episodes:
            count += 1
            outcome = "success" if episode["success_once"] else "fail"
            name = f"{count}/{total}  {episode['column']}, seed {episode['seed']}"
            print(f"{name:32} {outcome:8} {episode['seconds']:6.1f} s", flush=True)


def write_results(cfg: EvalConfig, settings: dict) -> None:
    """Write OUT/results.json and print the table."""
    episodes, row = [*read_episodes(cfg.out).values()], ROWS[cfg.row]
    paper, scenes = row.paper.get(cfg.task, {}), {}
    columns = table(episodes, paper)
    for name in columns:
        reached = {episode["scene"] for episode in episodes if episode["column"] == name}
        every = {plan["build_config_name"] for plan in read_json(cfg.plan_file(name))["plans"]}
        scenes[name] = {"reached": len(reached), "of": len(every)}
    seeds = sorted({episode["seed"] for episode in episodes})
    manifest = settings | provenance(cfg) | {"seeds": seeds}
    results = {"columns": columns, "scenes": scenes, "manifest": manifest}
    path = cfg.out / "results.json"
    if not path.exists() or read_json(path)["columns"] != columns:
        write_json(path, results)  # without new episodes the manifest stays that of the old ones
    print("\n".join(["", *success_table({cfg.policy: columns}, {row.label: paper})]))
    for name, count in scenes.items():
        print(f"{name}: {count['reached']} of the split's {count['of']} scenes")


def main(cfg: EvalConfig) -> None:
    check_envs(cfg.envs, cfg.policy == "expert" or bool(cfg.chain), cfg.device)
    if cfg.chain and not apartment():
        raise InputError(
            f"--chain: {asset_folder()} is no generated apartment. Make one: python -m "
            "household.assets --out assets && export MS_ASSET_DIR=$PWD/assets"
        )
    cfg = fill_defaults(cfg)
    with sole_writer(cfg.out):
        done = read_episodes(cfg.out, mend=True)
        check_settings(cfg.out, done, settings := settings_of(cfg))
        write_json(cfg.out / "config.json", settings)
        run(cfg, done)
        write_results(cfg, settings)


if __name__ == "__main__":
    with user_errors():
        main(cli(EvalConfig, description=__doc__))
