"""Two policies on equal seeds: the paired difference of their success rates, with its interval.

    python eval.py --compare RUN/eval-a RUN/eval-b
    python -m tools.compare RUN/eval-a RUN/eval-b    # the same; needs no simulator

Only episodes that both folders have are counted: the same column and seed are the same apartment,
plan and start pose. What is compared is success at any step.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from config import InputError, explained, quoted
from durable import read_lines
from outcomes import IMPLIED, address, part
from tasks import COLUMNS, wilson

Z, Z_POWER = 1.959964, 0.841621  # standard normal quantiles: alpha 0.05 two-sided, power 0.8
SAME_RUN = ("task", "split", "horizon", "assets", "real_meshes", "simulation")
SAME_EPISODE = ("subtask_uid", "scene", "spawn")
Episodes = dict[tuple[str, int], dict]  # by column and seed


@dataclass(frozen=True)
class Pairs:
    """How many episodes succeeded under both policies, under one alone, under neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @classmethod
    def count(cls, outcomes: list[tuple[bool, bool]]) -> "Pairs":
        cases = ((True, True), (True, False), (False, True), (False, False))
        return cls(*(outcomes.count(case) for case in cases))

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def rates(self) -> tuple[float, float]:
        return (self.both + self.only_a) / self.n, (self.both + self.only_b) / self.n

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of rate B - rate A.

        Newcombe's for paired proportions (Statistics in Medicine 17, 1998, p. 2635, method 10): the
        two Wilson intervals, added as squares, less what the two outcomes have in common. It stays
        within [-1, 1] and is right for few episodes and for rates of 0 and 1.
        """
        a, b = self.rates
        (low_a, high_a), (low_b, high_b) = (wilson(round(r * self.n), self.n) for r in (a, b))
        phi = self.correlation()

        def width(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        return b - a - width(b - low_b, high_a - a), b - a + width(high_b - b, a - low_a)

    def correlation(self) -> float:
        """Of the two outcomes, with Newcombe's continuity correction; 0 where one never varies."""
        a, b = (round(rate * self.n) for rate in self.rates)
        spread = a * (self.n - a) * b * (self.n - b)
        if spread == 0:
            return 0.0
        product = self.both * self.neither - self.only_a * self.only_b
        if product > 0:
            product = max(0.0, product - self.n / 2)
        return product / math.sqrt(spread)

    def needed(self) -> int | None:
        """Episodes on equal seeds that would separate the two rates, if as many pairs differ.

        Connor, Biometrics 43, 1987, p. 207. None: the rates are equal.
        """
        apart, differ = (self.only_b - self.only_a) / self.n, (self.only_a + self.only_b) / self.n
        if apart == 0:
            return None
        root = Z * math.sqrt(differ) + Z_POWER * math.sqrt(differ - apart**2)
        return math.ceil(root**2 / apart**2)


def needed_apart(a: float, b: float) -> int | None:
    """Episodes of each policy, on seeds of its own, that would separate rates a and b.

    The usual normal approximation (Fleiss, Statistical Methods for Rates and Proportions, ch. 3,
    without correction). None: the rates are equal.
    """
    if a == b:
        return None
    mean = (a + b) / 2
    root = Z * math.sqrt(2 * mean * (1 - mean)) + Z_POWER * math.sqrt(a * (1 - a) + b * (1 - b))
    return math.ceil(root**2 / (a - b) ** 2)


def read(folder: Path) -> Episodes:
    """The finished episodes of an evaluation. Raises InputError when there are none."""
    path = folder / "episodes.jsonl"
    files = [path, *sorted(folder.glob(part(path, "*").name))]  # of a torchrun that was killed
    lines = [line for file in files for line in read_lines(file)]
    episodes = {address(line): IMPLIED | line for line in lines}
    if not episodes:
        raise InputError(
            f"no episodes in {path}: expected the --out of an evaluation. This makes one: "
            f"python eval.py --checkpoint RUN/stage2 --out {quoted(folder)}"
        )
    return episodes


def pair(a: Episodes, b: Episodes, names: tuple[Path, Path]) -> list[tuple[str, int]]:
    """Columns and seeds that both have. Raises InputError when their episodes are not the same."""
    first = [next(iter(episodes.values())) for episodes in (a, b)]
    shared = [key for key in a if key in b]
    checks = [(f"the run's {name}", name, *first) for name in SAME_RUN]
    for key in shared:
        checks += [(f"seed {key[1]} of {key[0]}: {n}", n, a[key], b[key]) for n in SAME_EPISODE]
    for what, name, in_a, in_b in checks:
        if in_a.get(name) != in_b.get(name):
            raise InputError(
                f"{what} is {in_a.get(name)!r} in {names[0]}, {in_b.get(name)!r} in {names[1]}: "
                "their episodes are not the same. Evaluate both with equal --task, --split, "
                "--horizon, --real-meshes and MS_ASSET_DIR, both with --envs or both without"
            )
    if not shared:
        raise InputError(
            f"{names[0]} and {names[1]} have no column and seed in common: expected equal "
            "--columns and --seed"
        )
    return shared


def row(name: str, pairs: Pairs) -> list[str]:
    a, b = pairs.rates
    low, high = pairs.interval()
    needed = [str(n or "-") for n in (pairs.needed(), needed_apart(a, b))]
    difference = f"{b - a:+.2f} [{low:+.2f}, {high:+.2f}]"
    counts = [str(n) for n in (pairs.n, pairs.only_a, pairs.only_b)]
    return [name, counts[0], f"{a:.2f}", f"{b:.2f}", difference, *counts[1:], *needed]


def comparison(a: Path, b: Path) -> list[str]:
    """The lines of the comparison of two folders. Raises InputError when they do not compare."""
    if a.resolve() == b.resolve():
        raise InputError(f"--compare {a} {b}: one and the same, expected two evaluations")
    of_a, of_b = read(a), read(b)
    shared = pair(of_a, of_b, (a, b))
    outcomes = {
        name: [
            (of_a[key]["success_once"], of_b[key]["success_once"])
            for key in shared
            if key[0] == name
        ]
        for name in COLUMNS
    }
    outcomes = {name: both for name, both in outcomes.items() if both}
    if len(outcomes) > 1:
        outcomes["overall"] = [each for both in outcomes.values() for each in both]
    head = "|n|A|B|B - A [95 %]|A alone|B alone|n needed, equal seeds|n needed, own seeds"
    cells = [head.split("|"), *(row(name, Pairs.count(each)) for name, each in outcomes.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    pad = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells]
    left_out = [len(episodes) - len(shared) for episodes in (of_a, of_b)]
    return [
        f"A: {a}, B: {b}; {len(shared)} episodes that both have, {left_out[0]} of A and "
        f"{left_out[1]} of B left out",
        *(f"| {' | '.join(line)} |" for line in pad),
        "The interval is Newcombe's for paired proportions (1998, method 10); one that contains 0",
        "does not separate A from B. n needed: episodes of each that would separate these two",
        "rates, alpha 0.05, power 0.8; on equal seeds if as many pairs differ as here (Connor",
        "1987), or on seeds of their own (Fleiss); normal approximations, rough below 20.",
    ]


def compare(a: Positional[Path], b: Positional[Path]):
    """Print B - A for two folders of evaluations."""
    print("\n".join(comparison(a, b)))


if __name__ == "__main__":
    with explained():
        tyro.cli(compare)
