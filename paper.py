"""What the robot is asked to do: MS-HAB's tasks, targets, sentences; the tables' columns.

One table for collect, train and eval: the instruction a policy hears in evaluation is the one it
was trained on.
"""

import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import tyro

from config import CAMERAS, PRESETS, SUBTASKS, TASKS, InputError, TrainConfig

# MS-HAB's released demonstrations on the hub: 83, 209 and 174 GB (MS-HAB: README.md).
HUB_DATASETS = {
    "set_table": "arth-shukla/MS-HAB-SetTable",
    "tidy_house": "arth-shukla/MS-HAB-TidyHouse",
    "prepare_groceries": "arth-shukla/MS-HAB-PrepareGroceries",
}

_YCB_HARD = (
    "002_master_chef_can", "003_cracker_box", "004_sugar_box", "005_tomato_soup_can",
    "007_tuna_fish_can", "008_pudding_box", "009_gelatin_box", "010_potted_meat_can", "024_bowl",
)  # fmt: skip
OBJECTS = {  # what is picked and placed (MS-HAB: evaluate.py)
    "set_table": ("013_apple", "024_bowl"),
    "tidy_house": _YCB_HARD,
    "prepare_groceries": _YCB_HARD,
}
# Open and close, SetTable only.
ARTICULATIONS = {"fridge": "fridge", "kitchen_counter": "kitchen drawer"}


@dataclass(frozen=True)
class Column:
    """One column of Tables 1, 2 and 4: a subtask and its target; "all": each object of the task."""

    subtask: str
    target: str

    def target_in(self, task: str) -> str:
        """The target's name in MS-HAB's files; "obj" is the task's first object."""
        return OBJECTS[task][0] if self.target == "obj" else self.target


COLUMNS = {
    "pick_all": Column("pick", "all"),
    "place_all": Column("place", "all"),
    "open_fridge": Column("open", "fridge"),
    "open_drawer": Column("open", "kitchen_counter"),
    "close_fridge": Column("close", "fridge"),
    "close_drawer": Column("close", "kitchen_counter"),
    # GAP-22 (Tables 1, 2, 4): the header reads "All Obj." over one figure; read as all objects.
    # These two ask for one.
    "pick_obj": Column("pick", "obj"),
    "place_obj": Column("place", "obj"),
}
PAPER_COLUMNS = tuple(COLUMNS)[:6]
# And one for each object, pick:013_apple; pick_each asks for all of them that the task has.
_OBJECTS = dict.fromkeys(name for names in OBJECTS.values() for name in names)
COLUMNS |= {f"{sub}:{name}": Column(sub, name) for sub in ("pick", "place") for name in _OBJECTS}
EACH = {"pick_each": "pick", "place_each": "place"}


def targets(task: str, subtask: str) -> tuple[str, ...]:
    """Every target of a subtask, as MS-HAB names its files; empty if the task lacks the subtask."""
    if subtask in ("pick", "place"):
        return OBJECTS[task]
    return tuple(ARTICULATIONS) if task == "set_table" else ()


def readable(target: str) -> str:
    """`024_bowl` -> `bowl`, `kitchen_counter` -> `kitchen drawer`."""
    return ARTICULATIONS.get(target) or target.partition("_")[2].replace("_", " ")


def instruction(subtask: str, target: str) -> str:
    """The sentence for one subtask.

    GAP-19 (Sec. 4.1): the model reads "a natural language instruction", but MS-HAB's data has none.
    One template per subtask, filled with the target's name. Nothing in the input says where the
    goal of `place` is: MS-HAB hides its goal markers from the cameras.
    """
    templates = {
        "pick": "pick up the {}",
        "place": "place the {} at its goal",
        "open": "open the {}",
        "close": "close the {}",
    }
    return templates[subtask].format(readable(target))


def sentences(task: str, column: str) -> set[str]:
    """Every instruction that a column's episodes may give."""
    what = COLUMNS[column]
    target = what.target_in(task)
    names = targets(task, what.subtask) if target == "all" else (target,)
    return {instruction(what.subtask, name) for name in names}


def _set_table(*rates: float) -> dict[str, dict[str, float]]:
    return {"set_table": dict(zip(PAPER_COLUMNS, rates, strict=True))}


@dataclass(frozen=True)
class Row:
    table: int
    label: str  # the paper's
    epochs: tuple[int, int, int]  # of stages 1, 2, 3; 0: the row lacks the stage
    paper: dict[str, dict[str, float]]  # task -> column -> success rate
    decoders: tuple[str, ...] = ()
    cameras: tuple[str, ...] = CAMERAS
    depth: bool = True
    history: str = "none"
    openvla: bool = False  # 7B, Llama 2; else the base VLM
    tasks: tuple[str, ...] = ("set_table",)  # Tables 1, 2, 4 are of SetTable alone
    subtasks: tuple[str, ...] = SUBTASKS

    @property
    def model(self) -> dict:
        """Fields of ModelConfig. Rows without decoders, Table 2's first too, lack the 8 latents."""
        return dict(
            cameras=self.cameras, depth=self.depth, history=self.history, decoders=self.decoders,
            num_latents=8 if self.decoders else 0,
        )  # fmt: skip

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(stage for stage, epochs in enumerate(self.epochs, 1) if epochs)


PLAIN, NAIVE, STAGED, FLOW = (10, 0, 0), (0, 10, 0), (3, 7, 0), (3, 7, 10)  # Sec. 6.2, 6.3; GAP-14
ALL = ("pos", "grasp", "qpos")  # Table 2's "+ all"
_ALL_RATES = _set_table(0.13, 0.70, 0.87, 0.77, 0.90, 1.00)


def _table_3(label: str, decoders: tuple[str, ...], epochs: tuple, *rates: float) -> Row:
    pairs = zip(TASKS_3, rates[::2], rates[1::2], strict=True)
    paper = {task: {"pick_all": pick, "place_all": place} for task, pick, place in pairs}
    return Row(3, label, epochs, paper, decoders, tasks=TASKS, subtasks=("pick", "place"))


TASKS_3 = ("set_table", "prepare_groceries", "tidy_house")  # the order of Table 3's columns

ROWS = {
    # Table 1: inputs (Sec. 6.2)
    "openvla": Row(
        1, "OpenVLA", PLAIN, _set_table(0.00, 0.19, 0.02, 0.00, 0.00, 0.04), cameras=("head",),
        depth=False, openvla=True,
    ),
    "openvla-multiview": Row(
        1, "OpenVLA + multiview", PLAIN, _set_table(0.06, 0.35, 0.14, 0.38, 0.00, 0.53),
        depth=False, openvla=True,
    ),
    "openvla-depth": Row(
        1, "OpenVLA + multiview + depth", PLAIN, _set_table(0.12, 0.41, 0.43, 0.30, 0.00, 0.67),
        openvla=True,
    ),
    "base-multiview": Row(
        1, "Base VLM + multiview", PLAIN, _set_table(0.06, 0.53, 0.60, 0.30, 0.63, 0.93),
        depth=False,
    ),
    "base-depth": Row(
        1, "Base VLM + multiview + depth", PLAIN, _set_table(0.16, 0.56, 0.67, 0.36, 0.83, 1.00)
    ),
    "base-history": Row(
        1, "Base VLM + multiview + depth + history", PLAIN,
        _set_table(0.00, 0.47, 0.57, 0.40, 0.47, 1.00), history="actions",  # GAP-5
    ),
    # Table 2: auxiliary tasks and progressive training (Sec. 6.3)
    "auxvla": Row(2, "AuxVLA", PLAIN, _set_table(0.16, 0.56, 0.67, 0.36, 0.83, 1.00)),
    "auxvla-naive": Row(
        2, "AuxVLA + all, naive", NAIVE, _set_table(0.03, 0.50, 0.60, 0.23, 0.67, 1.00), ALL
    ),
    "auxvla-grasp": Row(
        2, "AuxVLA + is grasped", STAGED, _set_table(0.30, 0.53, 0.83, 0.57, 0.80, 0.93), ("grasp",)
    ),
    "auxvla-qpos": Row(
        2, "AuxVLA + qpos", STAGED, _set_table(0.23, 0.67, 0.87, 0.70, 0.90, 0.90), ("qpos",)
    ),
    "auxvla-pos": Row(
        2, "AuxVLA + global pos", STAGED, _set_table(0.07, 0.27, 0.90, 0.70, 0.97, 1.00), ("pos",)
    ),
    "auxvla-all": Row(2, "AuxVLA + all", STAGED, _ALL_RATES, ALL),
    # Table 3: segmentation and object pose, on pick and place of three tasks (Sec. 6.3)
    # GAP-13: such models train for 5 epochs (Sec. 6.1) or for 6 = 2 + 4 (Sec. 6.3); 6, which says
    # how they divide.
    # SG-VLA (its Table 4) prints 0.16 and 0.56, not 0.20 and 0.50, in the first of these rows.
    "auxvla-pick-place": _table_3(
        "AuxVLA (pick, place)", (), (6, 0, 0), 0.20, 0.50, 0.10, 0.33, 0.07, 0.40
    ),
    "auxvla-seg-obj": _table_3(
        "AuxVLA + seg + obj pos", ("obj", "seg"), (2, 4, 0), 0.26, 0.78, 0.13, 0.60, 0.33, 0.73
    ),
    # Table 4: the action head (Sec. 6.4), over Table 2's "+ all"
    "auxvla-tokens": Row(4, "AuxVLA (tokens)", STAGED, _ALL_RATES, ALL),
    "auxvla-action-head": Row(
        4, "AuxVLA + action head", FLOW, _set_table(0.27, 0.80, 0.76, 0.60, 0.76, 0.97), ALL
    ),
}  # fmt: skip


DEFAULT_ROW = "auxvla-all"  # whose figures stand beside a run that names none


def row_of(name: str) -> Row:
    if name not in ROWS:
        raise InputError(f"--row {name}: no such row; the rows are {', '.join(ROWS)}")
    return ROWS[name]


def preset_of(row: Row, preset: str | None) -> str:
    """The preset a row is trained with; openvla's rows need its LLM, at the size of `preset`."""
    if row.openvla:
        return "tiny-openvla" if preset and preset.startswith("tiny") else "openvla"
    if preset and preset.endswith("openvla"):
        raise InputError(f"--row {row.label!r} is of the base VLM: drop --preset {preset}")
    return preset or "paper"


def check_row(cfg: TrainConfig) -> Row:
    """Raise InputError, naming the flag, when the command line is not the row it names."""
    row = row_of(cfg.row)
    fixed = row.model | {name: getattr(row, name) for name in ("tasks", "subtasks", "epochs")}
    for name, value in fixed.items():
        in_model = name in row.model
        got = getattr(cfg.model if in_model else cfg, name)
        if name == "history" and "none" not in (got, value):
            continue  # both readings of GAP-5
        if got != value:
            flag = f"--{'model.' if in_model else ''}{name.replace('_', '-')}"
            raise InputError(
                f"--row {cfg.row} fixes {flag} at {value}, got {got}. Drop the flag, or the row"
            )
    if cfg.stage not in row.stages:
        on_it = [
            name for name, other in ROWS.items()
            if other.model == row.model and cfg.stage in other.stages
        ]  # fmt: skip
        raise InputError(
            f"--row {cfg.row} has no stage {cfg.stage}; it has {row.stages}"
            + f". With its inputs and decoders --row {' or '.join(on_it)} has one" * bool(on_it)
        )
    if cfg.stage == 2 and 1 in row.stages and not cfg.init_from:
        raise InputError(
            f"--row {cfg.row} trains stage 2 on stage 1: give --init-from RUN/stage1. From the "
            "start it would be --row auxvla-naive"
        )
    return row


# --- The command line ---


def given(args: list[str], flag: str) -> str | None:
    """The value of a flag that decides on the defaults of the others."""
    values = [b for a, b in pairwise(args) if a == flag]
    values += [a.partition("=")[2] for a in args if a.startswith(f"{flag}=")]
    return values[-1] if values else None


def parse(args: list[str] | None = None, description: str | None = None) -> TrainConfig:
    """The command line of train.py over the defaults of its --preset and --row.

    Raises InputError when a flag contradicts the row.
    """
    args = sys.argv[1:] if args is None else args
    name, preset = given(args, "--row"), given(args, "--preset")
    row = row_of(name) if name else None
    default = replace(TrainConfig(data="", out=""), data=tyro.MISSING, out=tyro.MISSING)
    if preset in (None, *PRESETS):  # otherwise tyro names the choices
        chosen = preset_of(row, preset) if row else preset or "paper"
        default = replace(default, preset=chosen, **PRESETS[chosen])
        pairs = pairwise(["", *args])  # without --preset, which is now in the default
        args = [b for a, b in pairs if "--preset" not in (a, b.partition("=")[0])]
    if row:
        default = replace(
            default, model=replace(default.model, **row.model), tasks=row.tasks,
            subtasks=row.subtasks, epochs=row.epochs,
        )  # fmt: skip
    cfg = tyro.cli(TrainConfig, default=default, args=args, description=description)
    if row:
        check_row(cfg)
    elif not cfg.epochs[cfg.stage - 1] and not cfg.steps:
        raise InputError(f"--epochs {cfg.epochs} give stage {cfg.stage} none; give --steps")
    return cfg


# --- In words ---


def summary(name: str) -> dict[str, str]:
    """What a row resolves to, in words."""
    row = ROWS[name]
    views = "rgb + depth" if row.depth else "rgb"
    history = "" if row.history == "none" else f" + history ({row.history})"
    return {
        "table": f"Table {row.table}: {row.label}",
        "inputs": f"{' + '.join(row.cameras)} {views}{history}",
        "decoders": " ".join(row.decoders) or "none",
        "data": f"{' '.join(row.tasks)}: {' '.join(row.subtasks)}",
        "epochs": ", ".join(f"stage {s}: {row.epochs[s - 1]}" for s in row.stages),
    }


def print_rows() -> None:
    """Print every row with the paper's success rates."""
    for name, row in ROWS.items():
        print(name)
        for key, text in summary(name).items():
            print(f"    {key:9} {text}")
        for task, rates in row.paper.items():
            figures = "  ".join(f"{column} {rate:.2f}" for column, rate in rates.items())
            print(f"    paper     {task}: {figures}")


if __name__ == "__main__":
    print_rows()
