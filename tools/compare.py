"""Compare two policies on equal seeds: the paired difference of their success rates.

    python -m tools.compare RUN/eval-a RUN/eval-b

Episodes of one column and seed have the same apartment, plan and start pose. Success at any step of
an episode counts; episodes that only one folder has are left out.
"""

import math
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tyro.conf import Positional

from config import InputError
from paper import COLUMNS
from storage.results import markdown, read_episodes, wilson
from storage.terminal import cli, user_errors

# Settings of an evaluation; then, from subtask_uid, the start of an episode.
SAME = ("task", "split", "horizon", "assets", "simulation", "subtask_uid", "scene", "spawn")
HEAD = ["", "n", "A", "B", "B - A [95 %]", "A alone", "B alone"]
NOTE = "An interval that contains 0 does not separate A from B (Newcombe 1998, paired, method 10)."


def newcombe(a: int, n_a: int, b: int, n_b: int, phi: float = 0.0) -> tuple[float, float]:
    """Return the 95 % interval of b / n_b - a / n_a from the Wilson intervals of both rates.

    Newcombe, Statistics in Medicine 17, 1998, method 10: p. 873 for independent samples, p. 2635
    for pairs whose outcomes have the correlation phi. It suits few episodes and rates of 0 and 1.
    """
    (low_a, high_a), (low_b, high_b) = wilson(a, n_a), wilson(b, n_b)
    rate_a, rate_b = a / n_a, b / n_b

    def width(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    below, above = width(rate_b - low_b, high_a - rate_a), width(high_b - rate_b, rate_a - low_a)
    return rate_b - rate_a - below, rate_b - rate_a + above


class Pairs(NamedTuple):
    """How many episodes succeeded under both policies, under one alone, under neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of rate B - rate A."""
        n, a, b = sum(self), self.both + self.only_a, self.both + self.only_b
        product = self.both * self.neither - self.only_a * self.only_b
        if product > 0:  # the continuity correction
            product = max(0.0, product - n / 2)
        spread = a * (n - a) * b * (n - b)
        phi = product / math.sqrt(spread) if spread else 0.0  # 0: one policy's outcome is constant
        return newcombe(a, n, b, n, phi)


def compare(a: Positional[Path], b: Positional[Path]) -> str:
    """Return a table of B - A for two folders of evaluations."""
    all_a, all_b = read_episodes(a), read_episodes(b)
    shared = [key for key in all_a if key in all_b]
    if not shared:
        raise InputError(
            f"{a} has {len(all_a)} episodes, {b} {len(all_b)}, with no column and seed in common: "
            "python eval.py with equal --columns and --seed, --out as here"
        )
    outcomes = defaultdict(list)
    for key in sorted(shared, key=lambda key: [*COLUMNS].index(key[0])):
        episode_a, episode_b = all_a[key], all_b[key]
        for name in SAME:
            if episode_a.get(name) != episode_b.get(name):
                raise InputError(
                    f"seed {key[1]} of {key[0]}: {name} is {episode_a.get(name)!r} in A, "
                    f"{episode_b.get(name)!r} in B: not the same episode. Evaluate both with equal "
                    "--task, --split, --horizon, --envs and MS_ASSET_DIR"
                )
        outcomes[key[0]].append((episode_a["success_once"], episode_b["success_once"]))
    if len(outcomes) > 1:
        outcomes["overall"] = [*chain(*outcomes.values())]
    cases = ((True, True), (True, False), (False, True), (False, False))
    rows = []
    for name, found in outcomes.items():
        pairs = Pairs(*map(found.count, cases))
        (a_rate, b_rate), (low, high) = np.mean(found, axis=0), pairs.interval()
        row = [name, len(found), f"{a_rate:.2f}", f"{b_rate:.2f}"]
        row += [f"{b_rate - a_rate:+.2f} [{low:+.2f}, {high:+.2f}]", pairs.only_a, pairs.only_b]
        rows.append(row)
    first = f"A: {a}, B: {b}; {len(shared)} episodes that both have, "
    first += f"{len(all_a) - len(shared)} of A and {len(all_b) - len(shared)} of B left out"
    return "\n".join([first, *markdown(rows, HEAD), NOTE])


if __name__ == "__main__":
    with user_errors():
        print(cli(compare, description=__doc__))
