"""The paper's tables: tasks, instructions, columns and the 16 rows with their success rates.

    python paper.py   # print the rows

collect.py, train.py and eval.py take their instructions from here: a policy is evaluated on the
sentences that it was trained on.
"""

from dataclasses import dataclass

from config import CAMERAS, SUBTASKS, TASKS

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
# What is opened and closed, in SetTable only.
ARTICULATIONS = {"fridge": "fridge", "kitchen_counter": "kitchen drawer"}


@dataclass(frozen=True)
class Column:
    """A column of Tables 1, 2 and 4: a subtask and its target; "all": every object of the task."""

    subtask: str
    target: str

    def target_in(self, task: str) -> str:
        """The target's name in MS-HAB's files; "obj" is the first object of the task."""
        return OBJECTS[task][0] if self.target == "obj" else self.target


COLUMNS = {
    "pick_all": Column("pick", "all"),
    "place_all": Column("place", "all"),
    "open_fridge": Column("open", "fridge"),
    "open_drawer": Column("open", "kitchen_counter"),
    "close_fridge": Column("close", "fridge"),
    "close_drawer": Column("close", "kitchen_counter"),
    # GAP-22 (Tables 1, 2, 4): pick and place have one figure each, under the header "All Obj.". It
    # is read as the rate over all objects. These two columns evaluate one object.
    "pick_obj": Column("pick", "obj"),
    "place_obj": Column("place", "obj"),
}
PAPER_COLUMNS = tuple(COLUMNS)[:6]
# Two more columns for each object, such as pick:013_apple and place:013_apple.
_OBJECTS = dict.fromkeys(name for names in OBJECTS.values() for name in names)
COLUMNS |= {f"{sub}:{name}": Column(sub, name) for sub in ("pick", "place") for name in _OBJECTS}

# Beyond the paper (eval.py --chain): SetTable's subtasks in one episode. An episode succeeds in a
# column when it gets as far as this subtask and does it.
_FRIDGE = ("open_fridge", "pick:013_apple", "place:013_apple", "close_fridge")
_DRAWER = ("open_drawer", "pick:024_bowl", "place:024_bowl", "close_drawer")
CHAIN = {f"chain_{i}_{name}": COLUMNS[name] for i, name in enumerate(_FRIDGE + _DRAWER, start=1)}
COLUMNS |= CHAIN


def targets(task: str, subtask: str) -> tuple[str, ...]:
    """All targets of a subtask, as MS-HAB names its files; empty if the task lacks the subtask."""
    if subtask in ("pick", "place"):
        return OBJECTS[task]
    return tuple(ARTICULATIONS) if task == "set_table" else ()


def instruction(subtask: str, target: str) -> str:
    """The sentence for one subtask: place, 024_bowl -> "place the bowl at its goal".

    GAP-19 (Sec. 4.1): the model reads "a natural language instruction", but MS-HAB's data has none.
    One template per subtask takes the target's name. No input shows the goal of `place`: MS-HAB
    hides its goal markers from the cameras.
    """
    name = ARTICULATIONS.get(target) or target.partition("_")[2].replace("_", " ")
    verb = "pick up" if subtask == "pick" else subtask
    return f"{verb} the {name}" + " at its goal" * (subtask == "place")


def sentences(task: str, column: str) -> set[str]:
    """Every instruction that episodes of a column may have."""
    subtask, target = COLUMNS[column].subtask, COLUMNS[column].target_in(task)
    names = targets(task, subtask) if target == "all" else (target,)
    return {instruction(subtask, name) for name in names}


@dataclass(frozen=True)
class Row:
    table: int
    label: str  # the paper's
    epochs: tuple[int, int, int]  # of stages 1, 2, 3; 0: the row lacks the stage
    rates: tuple[float, ...]  # success rates in the order of the table's columns
    decoders: tuple[str, ...] = ()
    cameras: tuple[str, ...] = CAMERAS
    depth: bool = True
    history: str = "none"
    openvla: bool = False  # OpenVLA (7B, Llama 2) instead of the base VLM
    tasks: tuple[str, ...] = ("set_table",)
    subtasks: tuple[str, ...] = SUBTASKS

    @property
    def paper(self) -> dict[str, dict[str, float]]:
        """The paper's success rates, task -> column -> rate."""
        tasks, columns = self.tasks, PAPER_COLUMNS
        if self.table == 3:
            tasks, columns = ("set_table", "prepare_groceries", "tidy_house"), PAPER_COLUMNS[:2]
        rates = iter(self.rates)
        return {task: {column: next(rates) for column in columns} for task in tasks}

    @property
    def training(self) -> dict:
        """Fields of TrainConfig that the row fixes."""
        return dict(tasks=self.tasks, subtasks=self.subtasks, epochs=self.epochs)

    @property
    def model(self) -> dict:
        """Fields of ModelConfig that the row fixes. Rows without decoders have no latents."""
        return dict(
            cameras=self.cameras, depth=self.depth, history=self.history, decoders=self.decoders,
            num_latents=8 if self.decoders else 0,
        )  # fmt: skip

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(stage for stage, epochs in enumerate(self.epochs, 1) if epochs)


# Epochs of stages 1, 2, 3 (Sec. 6.2, 6.3; GAP-14). Naive co-training is stage 2 from the start.
PLAIN, NAIVE, STAGED, FLOW = (10, 0, 0), (0, 10, 0), (3, 7, 0), (3, 7, 10)
ALL = ("pos", "grasp", "qpos")  # Table 2's "+ all"
# Data (Sec. 3), of 44K episodes and 8.2M transitions in all: pos, grasp and qpos train on SetTable
# (8K episodes, 1.6M), obj and seg on pick and place of all three tasks (40K episodes, 8M).
PICK_PLACE = dict(tasks=TASKS, subtasks=("pick", "place"))

ROWS = {
    # Table 1: inputs (Sec. 6.2)
    "openvla": Row(
        1, "OpenVLA", PLAIN, (0.00, 0.19, 0.02, 0.00, 0.00, 0.04), cameras=("head",), depth=False,
        openvla=True),
    "openvla-multiview": Row(
        1, "OpenVLA + multiview", PLAIN, (0.06, 0.35, 0.14, 0.38, 0.00, 0.53), depth=False,
        openvla=True),
    "openvla-depth": Row(
        1, "OpenVLA + multiview + depth", PLAIN, (0.12, 0.41, 0.43, 0.30, 0.00, 0.67),
        openvla=True),
    "base-multiview": Row(
        1, "Base VLM + multiview", PLAIN, (0.06, 0.53, 0.60, 0.30, 0.63, 0.93), depth=False),
    "base-depth": Row(
        1, "Base VLM + multiview + depth", PLAIN, (0.16, 0.56, 0.67, 0.36, 0.83, 1.00)),
    "base-history": Row(
        1, "Base VLM + multiview + depth + history", PLAIN, (0.00, 0.47, 0.57, 0.40, 0.47, 1.00),
        history="actions"),  # GAP-5
    # Table 2: auxiliary tasks and progressive training (Sec. 6.3)
    "auxvla": Row(2, "AuxVLA", PLAIN, (0.16, 0.56, 0.67, 0.36, 0.83, 1.00)),
    "auxvla-naive": Row(
        2, "AuxVLA + all, naive", NAIVE, (0.03, 0.50, 0.60, 0.23, 0.67, 1.00), ALL),
    "auxvla-grasp": Row(
        2, "AuxVLA + is grasped", STAGED, (0.30, 0.53, 0.83, 0.57, 0.80, 0.93), ("grasp",)),
    "auxvla-qpos": Row(2, "AuxVLA + qpos", STAGED, (0.23, 0.67, 0.87, 0.70, 0.90, 0.90), ("qpos",)),
    "auxvla-pos": Row(
        2, "AuxVLA + global pos", STAGED, (0.07, 0.27, 0.90, 0.70, 0.97, 1.00), ("pos",)),
    "auxvla-all": Row(2, "AuxVLA + all", STAGED, (0.13, 0.70, 0.87, 0.77, 0.90, 1.00), ALL),
    # Table 3: segmentation and object pose, on pick and place of three tasks (Sec. 6.3)
    # GAP-13: these models train for 5 epochs (Sec. 6.1) or for 6 = 2 + 4 (Sec. 6.3); 6, since
    # Sec. 6.3 says how the epochs divide.
    # SG-VLA (its Table 4) prints 0.16 and 0.56 instead of 0.20 and 0.50 in the first of these rows.
    "auxvla-pick-place": Row(
        3, "AuxVLA (pick, place)", (6, 0, 0), (0.20, 0.50, 0.10, 0.33, 0.07, 0.40), **PICK_PLACE),
    "auxvla-seg-obj": Row(
        3, "AuxVLA + seg + obj pos", (2, 4, 0), (0.26, 0.78, 0.13, 0.60, 0.33, 0.73),
        ("obj", "seg"), **PICK_PLACE),
    # Table 4: the action head (Sec. 6.4), on the model of Table 2's "+ all"
    "auxvla-tokens": Row(4, "AuxVLA (tokens)", STAGED, (0.13, 0.70, 0.87, 0.77, 0.90, 1.00), ALL),
    "auxvla-action-head": Row(
        4, "AuxVLA + action head", FLOW, (0.27, 0.80, 0.76, 0.60, 0.76, 0.97), ALL),
}  # fmt: skip
DEFAULT_ROW = "auxvla-all"  # without --row: the run's name, and the row printed beside ours


def describe(name: str) -> str:
    """A row in words, with the paper's success rates."""
    row = ROWS[name]
    inputs = f"{' + '.join(row.cameras)}, rgb{' + depth' * row.depth}, history {row.history}"
    epochs = ", ".join(f"{epochs} of stage {i}" for i, epochs in enumerate(row.epochs, 1) if epochs)
    lines = [name, f"Table {row.table}: {row.label}", f"inputs: {inputs}"]
    lines += [f"decoders: {' '.join(row.decoders) or 'none'}; epochs: {epochs}"]
    for task, rates in row.paper.items():
        figures = "  ".join(f"{column} {rate:.2f}" for column, rate in rates.items())
        lines.append(f"{task}: {figures}")
    return "\n    ".join(lines)


if __name__ == "__main__":
    from storage.terminal import user_errors

    with user_errors():
        print(*map(describe, ROWS), sep="\n")
