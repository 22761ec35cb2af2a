"""What the robot is asked to do: MS-HAB's tasks, targets, sentences; the tables' columns.

One table for collect, train and eval: the instruction a policy hears in evaluation is the one it
was trained on.
"""

import math
from dataclasses import dataclass

import numpy as np

TASKS = ("set_table", "tidy_house", "prepare_groceries")
# MS-HAB's released demonstrations on the hub: 83, 209 and 174 GB (MS-HAB: README.md).
HUB_DATASETS = {
    "set_table": "arth-shukla/MS-HAB-SetTable",
    "tidy_house": "arth-shukla/MS-HAB-TidyHouse",
    "prepare_groceries": "arth-shukla/MS-HAB-PrepareGroceries",
}
SUBTASKS = ("pick", "place", "open", "close")
HORIZON = 200  # control steps per episode, 20 Hz (MS-HAB: max_episode_steps of all four subtasks)

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


def draw_plan(seed: int, plans: int) -> tuple[int, np.random.Generator]:
    """Which of so many plans an episode's seed names, and the generator that draws its start."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(plans)), rng


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of successes / n; z is the two-sided 95 % quantile."""
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
