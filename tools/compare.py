"""Two policies on equal seeds: the paired difference of their success rates, with its interval.

    python -m tools.compare RUN/eval-a RUN/eval-b

Episodes of one column and seed have the same apartment, plan and start pose. Those that both
folders have are counted, by success at any step.
"""

import math
from pathlib import Path
from typing import NamedTuple

import tyro
from tabulate import tabulate
from tyro.conf import Positional

from config import InputError, quoted, user_errors
from paper import COLUMNS
from storage.files import read_lines
from storage.results import IMPLIED, address, part, wilson

Z, Z_POWER = 1.959964, 0.841621  # standard normal quantiles: alpha 0.05 two-sided, power 0.8
SAME = ("task", "split", "horizon", "assets", "real_meshes", "simulation")  # of the runs
SAME += ("subtask_uid", "scene", "spawn")  # of the episodes
HEAD = ("", "n", "A", "B", "B - A [95 %]", "A alone", "B alone", "n needed")
NOTE = """\
The interval is Newcombe's for paired proportions (1998, method 10); one that contains 0 does not
separate A from B. n needed: episodes on equal seeds that would separate these two rates, if as many
pairs differ (Connor 1987; alpha 0.05, power 0.8; rough below 20)."""


class Pairs(NamedTuple):
    """How many episodes succeeded under both policies, under one alone, under neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of rate B - rate A.

        Newcombe's for paired proportions (Statistics in Medicine 17, 1998, p. 2635, method 10): the
        two Wilson intervals, added as squares, less the outcomes' correlation with its continuity
        correction. It stays within [-1, 1] and is right for few episodes and rates of 0 and 1.
        """
        n, a, b = sum(self), self.both + self.only_a, self.both + self.only_b
        product = self.both * self.neither - self.only_a * self.only_b
        if product > 0:
            product = max(0.0, product - n / 2)
        spread = a * (n - a) * b * (n - b)
        phi = product / math.sqrt(spread) if spread else 0.0  # one of the two never varies

        def width(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, n)
        a, b = a / n, b / n
        return b - a - width(b - low_b, high_a - a), b - a + width(high_b - b, a - low_a)

    def needed(self) -> int | None:
        """Episodes on equal seeds that would separate the two rates, if as many pairs differ.

        Connor, Biometrics 43, 1987, p. 207. None: the rates are equal.
        """
        if self.only_a == self.only_b:
            return None
        apart = (self.only_b - self.only_a) / sum(self)
        differ = (self.only_a + self.only_b) / sum(self)
        root = Z * math.sqrt(differ) + Z_POWER * math.sqrt(differ - apart**2)
        return math.ceil(root**2 / apart**2)

    def cells(self) -> list:
        """What stands under HEAD, without the first."""
        n, (low, high) = sum(self), self.interval()
        a, b = (self.both + self.only_a) / n, (self.both + self.only_b) / n
        difference = f"{b - a:+.2f} [{low:+.2f}, {high:+.2f}]"
        counts = self.only_a, self.only_b, self.needed() or "-"
        return [n, f"{a:.2f}", f"{b:.2f}", difference, *counts]


def read(folder: Path) -> dict[tuple[str, int], dict]:
    """An evaluation's episodes by column and seed. Raises InputError when there are none."""
    path = folder / "episodes.jsonl"
    files = [path, *sorted(folder.glob(part(path, "*").name))]  # of a torchrun that was killed
    lines = [line for file in files for line in read_lines(file)]
    if not lines:
        raise InputError(
            f"no episodes in {path}: expected the --out of an evaluation. This makes one: "
            f"python eval.py --checkpoint RUN/stage2 --out {quoted(folder)}"
        )
    return {address(line): IMPLIED | line for line in lines}


def check_equal(episodes: tuple[dict, dict], folders: tuple[Path, Path]) -> None:
    """Raise InputError when two lines of one column and seed are not of the same episode."""
    for name in SAME:
        in_a, in_b = (episode.get(name) for episode in episodes)
        if in_a != in_b:
            raise InputError(
                f"seed {episodes[0]['seed']} of {episodes[0]['column']}: {name} is {in_a!r} in "
                f"{folders[0]}, {in_b!r} in {folders[1]}: not the same episode. Evaluate both with "
                "equal --task, --split, --horizon, --real-meshes and MS_ASSET_DIR, both with "
                "--envs or both without"
            )


def comparison(a: Positional[Path], b: Positional[Path]) -> str:
    """A table of B - A for two folders of evaluations.

    Raises InputError when they do not compare.
    """
    if a.resolve() == b.resolve():
        raise InputError(f"{a} and {b}: one and the same, expected two evaluations")
    of_a, of_b = read(a), read(b)
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise InputError(
            f"{a} and {b} have no column and seed in common: expected equal --columns and --seed"
        )
    outcomes = {name: [] for name in (*COLUMNS, "overall")}
    for key in shared:
        check_equal((of_a[key], of_b[key]), (a, b))
        outcome = of_a[key]["success_once"], of_b[key]["success_once"]
        outcomes[key[0]].append(outcome)
        outcomes["overall"].append(outcome)
    if len({column for column, _ in shared}) == 1:
        del outcomes["overall"]
    cases = ((True, True), (True, False), (False, True), (False, False))
    counts = {name: Pairs(*map(each.count, cases)) for name, each in outcomes.items() if each}
    rows = [[name, *pairs.cells()] for name, pairs in counts.items()]
    table = tabulate(rows, HEAD, tablefmt="github", disable_numparse=True)
    first = f"A: {a}, B: {b}; {len(shared)} episodes that both have, "
    first += f"{len(of_a) - len(shared)} of A and {len(of_b) - len(shared)} of B left out"
    return "\n".join([first, table, NOTE])


if __name__ == "__main__":
    with user_errors():
        print(tyro.cli(comparison, description=__doc__))
