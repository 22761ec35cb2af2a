"""Compare two policies on equal seeds: the paired difference of their success rates.

    python -m tools.compare RUN/eval-a RUN/eval-b

Episodes of one column and seed have the same apartment, plan and start pose. Only episodes that
both folders have are counted, by success at any step.
"""

import math
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import tyro
from tyro.conf import Positional

from config import InputError, quoted, user_errors
from paper import COLUMNS
from storage.results import markdown, read_episodes, wilson

# Standard normal quantiles: two-sided test at 0.05, power 0.8.
Z, Z_POWER = (NormalDist().inv_cdf(p) for p in (0.975, 0.8))
SAME = ("task", "split", "horizon", "assets", "simulation")  # of the evaluations
SAME += ("subtask_uid", "scene", "spawn")  # of the episodes
HEAD = ["", "n", "A", "B", "B - A [95 %]", "A alone", "B alone", "n needed"]
NOTE = """\
An interval that contains 0 does not separate A from B (Newcombe 1998, paired, method 10).
n needed: episodes on equal seeds that would separate these two rates if the same share of pairs
differs (Connor 1987; alpha 0.05, power 0.8; rough below 20)."""


class Pairs(NamedTuple):
    """How many episodes succeeded under both policies, under one alone, under neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of rate B - rate A.

        Newcombe's for paired proportions (Statistics in Medicine 17, 1998, p. 2635, method 10):
        the distances to the two Wilson intervals, added as squares, less their correlation phi with
        its continuity correction. The interval suits few episodes and rates of 0 and 1.
        """
        n, a, b = sum(self), self.both + self.only_a, self.both + self.only_b
        product = self.both * self.neither - self.only_a * self.only_b
        if product > 0:
            product = max(0.0, product - n / 2)
        spread = a * (n - a) * b * (n - b)
        phi = product / math.sqrt(spread) if spread else 0.0  # 0: one policy's outcome is constant

        def width(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        (low_a, high_a), (low_b, high_b) = wilson(a, n), wilson(b, n)
        a, b = a / n, b / n
        return b - a - width(b - low_b, high_a - a), b - a + width(high_b - b, a - low_a)

    def needed(self) -> int | None:
        """Return the episodes that would separate the two rates; None if the rates are equal.

        Connor, Biometrics 43, 1987, p. 207.
        """
        if self.only_a == self.only_b:
            return None
        apart = (self.only_b - self.only_a) / sum(self)
        differ = (self.only_a + self.only_b) / sum(self)
        root = Z * math.sqrt(differ) + Z_POWER * math.sqrt(differ - apart**2)
        return math.ceil(root**2 / apart**2)

    def cells(self) -> list[str]:
        """Return the cells under HEAD, without the first."""
        n, (low, high) = sum(self), self.interval()
        a, b = (self.both + self.only_a) / n, (self.both + self.only_b) / n
        difference = f"{b - a:+.2f} [{low:+.2f}, {high:+.2f}]"
        counts = self.only_a, self.only_b, self.needed() or "-"
        return [str(n), f"{a:.2f}", f"{b:.2f}", difference, *map(str, counts)]


def compare(a: Positional[Path], b: Positional[Path]) -> str:
    """Return a table of B - A for two folders of evaluations."""
    of_a, of_b = read_episodes(a), read_episodes(b)
    for folder, episodes in ((a, of_a), (b, of_b)):
        if not episodes:
            raise InputError(
                f"no episodes in {folder}: expected the --out of an evaluation. Make one with: "
                f"python eval.py --checkpoint RUN/stage2 --out {quoted(folder)}"
            )
    shared = [key for key in of_a if key in of_b]
    if not shared:
        raise InputError(f"{a} and {b} share no column and seed: use equal --columns and --seed")
    outcomes = {name: [] for name in (*COLUMNS, "overall")}
    for key in shared:
        in_a, in_b = of_a[key], of_b[key]
        for name in SAME:
            if in_a.get(name) != in_b.get(name):
                raise InputError(
                    f"seed {key[1]} of {key[0]}: {name} is {in_a.get(name)!r} in {a}, "
                    f"{in_b.get(name)!r} in {b}: not the same episode. Evaluate both with equal "
                    "--task, --split, --horizon, --envs and MS_ASSET_DIR"
                )
        outcome = in_a["success_once"], in_b["success_once"]
        outcomes[key[0]].append(outcome)
        outcomes["overall"].append(outcome)
    if len({column for column, _ in shared}) == 1:
        del outcomes["overall"]
    cases = ((True, True), (True, False), (False, True), (False, False))
    counts = {name: Pairs(*map(each.count, cases)) for name, each in outcomes.items() if each}
    first = f"A: {a}, B: {b}; {len(shared)} episodes that both have, "
    first += f"{len(of_a) - len(shared)} of A and {len(of_b) - len(shared)} of B left out"
    rows = [[name, *pairs.cells()] for name, pairs in counts.items()]
    return "\n".join([first, *markdown(rows, HEAD), NOTE])


if __name__ == "__main__":
    with user_errors():
        print(tyro.cli(compare, description=__doc__))
