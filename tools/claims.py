"""The paper's claims, each with its size and test stated before any run, and the tables they need.

    python -m tools.claims    # every claim: what the paper found, what it takes to see it here

A claim is a difference of two rows' success rates. It is tested on a table that tools/reproduce.py
filled, and the verdict is written whichever way it falls:

    agrees        the 95 % interval of our difference lies wholly on the paper's side of 0
    disagrees     it lies wholly on the other side
    cannot tell   it contains 0, or one of the rows was trained once only, or in the columns that
                  were run the paper's own figures do not have the sign of its claim
    not run       one of the rows, or every column of the claim, is missing, or what it compares is
                  the same here

Episodes of one training are not independent trainings. So an interval is the wider of two: that
over episodes, as if all came from one policy (Wilson; for differences Newcombe), and that over the
seeds' rates (Student's t).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance

from scipy.stats import t as student

from config import InputError
from paper import COLUMNS, PAPER_COLUMNS, ROWS
from storage.results import read_episodes, wilson

ALPHA, POWER_Z, Z = 0.05, 0.841621, 1.959964  # two-sided; power 0.8
SEED_SD = 0.1  # assumed spread of a row's success rate from one training to the next
PLANNED_EPISODES = 60  # of each column and seed


@dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    a: str  # rows; the effect is b's rate less a's
    b: str
    columns: tuple[str, ...] = PAPER_COLUMNS
    of_sizes: bool = False  # of two sizes of LLM; the tiny presets have one

    @property
    def table(self) -> int:
        return max(ROWS[self.a].table, ROWS[self.b].table)

    def paper(self, keys: Sequence[str]) -> float | None:
        """The paper's difference over these task/column pairs."""
        pairs = [(paper_rate(self.a, key), paper_rate(self.b, key)) for key in keys]
        return mean(b - a for a, b in pairs) if pairs else None

    @property
    def everywhere(self) -> list[str]:
        """All task/column pairs that the claim is of."""
        pairs = [(task, column) for task, rates in ROWS[self.a].paper.items() for column in rates]
        return [f"{task}/{column}" for task, column in pairs if column in self.columns]

    def tests(self, keys: Sequence[str]) -> bool:
        """Have the paper's own figures of these columns the sign of its claim?"""
        effect = self.paper(keys)
        return effect is not None and effect * self.paper(self.everywhere) > 1e-9

    def seeds_needed(self, keys: Sequence[str]) -> int | None:
        """Trainings of each row that detect the paper's difference with power 0.8.

        From SEED_SD and the paper's own rates; None where the paper saw no difference.
        """
        effect = self.paper(keys)
        if not self.tests(keys):
            return None
        rates = [paper_rate(row, key) for row in (self.a, self.b) for key in keys]
        chance = mean(rate * (1 - rate) for rate in rates) / (PLANNED_EPISODES * len(keys))
        spread = 2 * (SEED_SD**2 + chance)
        return max(2, math.ceil((Z + POWER_Z) ** 2 * spread / effect**2) + 1)  # + 1: t, not normal


PICKING, PLACING = ("pick_all",), ("place_all",)
OPENING, DRAWERS = ("open_fridge", "open_drawer"), ("open_drawer", "close_drawer")

CLAIMS = (
    Claim("second-view-helps", "A hand camera beside the head's raises success (Sec. 6.2)",
          "openvla", "openvla-multiview"),
    Claim("views-and-depth-help", "Second view and depth raise the 7B baseline, 0.04 to 0.32 "
          "(Sec. 6.2)", "openvla", "openvla-depth"),
    Claim("views-and-depth-help-drawers", "They raise its opening and closing of drawers "
          "(Sec. 6.2)", "openvla", "openvla-depth", DRAWERS),
    Claim("depth-helps", "Depth raises success, 0.52 to 0.60 (Sec. 6.2)",
          "base-multiview", "base-depth"),
    Claim("smaller-llm-is-better", "The small VLM does better on the same inputs, 0.32 to 0.60 "
          "(Sec. 6.2)", "openvla-depth", "base-depth", of_sizes=True),
    Claim("history-hurts", "Four past steps lower success, 0.60 to 0.49 (Sec. 6.2)",
          "base-depth", "base-history"),
    Claim("naive-hurts", "Co-training from the start lowers success, 0.60 to 0.51 (Sec. 6.3)",
          "auxvla", "auxvla-naive"),
    Claim("progressive-helps", "Progressive co-training raises success, 0.60 to 0.73 (Sec. 6.3)",
          "auxvla", "auxvla-all"),
    Claim("progressive-beats-naive", "The same decoders in stages beat those from the start, 0.51 "
          "to 0.73 (Sec. 6.3)", "auxvla-naive", "auxvla-all"),
    Claim("grasp-helps", "The grasp decoder raises success, 0.60 to 0.66 (Sec. 6.3)",
          "auxvla", "auxvla-grasp"),
    Claim("grasp-helps-picking", "The grasp decoder raises picking, 0.16 to 0.30 (Sec. 6.3)",
          "auxvla", "auxvla-grasp", PICKING),
    Claim("qpos-helps", "The qpos decoder raises success, 0.60 to 0.71 (Sec. 6.3)",
          "auxvla", "auxvla-qpos"),
    Claim("qpos-helps-placing-and-drawers", "The qpos decoder raises placing and drawers "
          "(Sec. 6.3)", "auxvla", "auxvla-qpos", PLACING + DRAWERS),
    Claim("pos-helps", "The position decoder raises success, 0.60 to 0.65 (Sec. 6.3)",
          "auxvla", "auxvla-pos"),
    Claim("pos-helps-opening", "The position decoder raises opening of fridge and drawer "
          "(Sec. 6.3)", "auxvla", "auxvla-pos", OPENING),
    Claim("pos-hurts-pick-and-place", "The position decoder lowers picking and placing (Sec. 6.3)",
          "auxvla", "auxvla-pos", PICKING + PLACING),
    Claim("all-exceeds-the-best", "All three decoders exceed the paper's best one, qpos, 0.71 to "
          "0.73 (Sec. 6.3)", "auxvla-qpos", "auxvla-all"),
    Claim("seg-obj-helps", "Masks and object pose raise success, 0.27 to 0.47 (Sec. 6.3)",
          "auxvla-pick-place", "auxvla-seg-obj"),
    Claim("seg-obj-helps-picking", "Masks and object pose raise picking (Sec. 6.3)",
          "auxvla-pick-place", "auxvla-seg-obj", PICKING),
    Claim("seg-obj-helps-placing", "Masks and object pose raise placing (Sec. 6.3)",
          "auxvla-pick-place", "auxvla-seg-obj", PLACING),
    Claim("action-head-lowers-the-average", "The action head lowers the average, 0.73 to 0.69 "
          "(Sec. 6.4)", "auxvla-tokens", "auxvla-action-head"),
    Claim("action-head-helps-picking", "The action head raises picking, 0.13 to 0.27 (Sec. 6.4)",
          "auxvla-tokens", "auxvla-action-head", PICKING),
    Claim("action-head-helps-placing", "The action head raises placing, 0.70 to 0.80 (Sec. 6.4)",
          "auxvla-tokens", "auxvla-action-head", PLACING),
    Claim("action-head-hurts-opening", "It lowers opening of fridge and drawer (Sec. 6.4)",
          "auxvla-tokens", "auxvla-action-head", OPENING),
)  # fmt: skip


def paper_rate(row: str, key: str) -> float:
    """The paper's rate of a row in `task/column`."""
    task, column = key.split("/")
    return ROWS[row].paper[task][column]


# --- Intervals ---


def over_seeds(samples: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Mean and half-width of the last sample's mean, less the first's where there are two.

    Student's t; the two have a common variance. None with a single training in one of them.
    """
    freedom = sum(len(sample) - 1 for sample in samples)
    if any(len(sample) < 2 for sample in samples):
        return None
    pooled = sum(variance(sample) * (len(sample) - 1) for sample in samples) / freedom
    error = math.sqrt(pooled * sum(1 / len(sample) for sample in samples))
    centre = mean(samples[-1]) - (mean(samples[0]) if len(samples) == 2 else 0)
    return centre, float(student.ppf(1 - ALPHA / 2, freedom)) * error


def widened(low: float, high: float, seeds: tuple[float, float] | None, floor: float):
    """An interval over episodes, widened to that over seeds, within [floor, 1]."""
    if seeds is not None:
        low, high = min(low, seeds[0] - seeds[1]), max(high, seeds[0] + seeds[1])
    return max(floor, low), min(1.0, high)


def rate_of(by_seed: dict[str, tuple[int, int]]) -> dict:
    """A cell from {training seed: (successes, episodes)}."""
    successes, n = (sum(each[i] for each in by_seed.values()) for i in (0, 1))
    rates = {seed: s / m for seed, (s, m) in by_seed.items()}
    low, high = widened(*wilson(successes, n), over_seeds([[*rates.values()]]), floor=0.0)
    return {"n": n, "rate": successes / n, "low": low, "high": high, "by_seed": rates}


def difference(a: dict, b: dict) -> tuple[float, float, float]:
    """b's rate less a's, with its interval, of two cells of `rate_of`.

    Newcombe's for independent proportions (Statistics in Medicine 17, 1998, p. 873, method 10): the
    rows were run on equal episodes, but by trainings that differ, which pairing would ignore.
    """
    bounds = [
        (cell["rate"], *wilson(round(cell["rate"] * cell["n"]), cell["n"])) for cell in (a, b)
    ]
    (rate_a, low_a, high_a), (rate_b, low_b, high_b) = bounds
    low = rate_b - rate_a - math.hypot(rate_b - low_b, high_a - rate_a)
    high = rate_b - rate_a + math.hypot(high_b - rate_b, rate_a - low_a)
    seeds = over_seeds([[*a["by_seed"].values()], [*b["by_seed"].values()]])
    return rate_b - rate_a, *widened(low, high, seeds, floor=-1.0)


# --- Episodes ---


def of_seeds(folder: Path, pattern: str) -> list[Path]:
    """The files of a row's trainings, seed-0, seed-1 and so on, by number."""
    paths = [p for p in folder.glob(f"seed-*/{pattern}") if number_of(folder, p) is not None]
    return sorted(paths, key=lambda path: (number_of(folder, path), path))


def number_of(folder: Path, path: Path) -> int | None:
    number = path.relative_to(folder).parts[0].removeprefix("seed-")
    return int(number) if number.isdecimal() else None


def read_cells(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """{task/column: {training seed: (successes, episodes)}} of one row's folder."""
    cells: dict[str, dict] = {}
    for path in of_seeds(folder, "*/episodes.jsonl"):
        seed, task = path.parts[-3].removeprefix("seed-"), path.parts[-2]
        try:
            lines = read_episodes(path.parent)
            episodes = {key: line["success_once"] for key, line in lines.items()}
        except KeyError as error:
            raise InputError(f"{path}: a line lacks {error}, expected those of eval.py") from error
        for column in COLUMNS:
            outcomes = [success for (name, _), success in episodes.items() if name == column]
            if outcomes:
                cells.setdefault(f"{task}/{column}", {})[seed] = (sum(outcomes), len(outcomes))
    return cells


def average_of(cells: dict[str, dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """Successes and episodes of the seeds that have every column equally often."""
    seeds = {seed for by_seed in cells.values() for seed in by_seed}
    summed = {}
    for seed in sorted(seeds):
        of_seed = [by_seed[seed] for by_seed in cells.values() if seed in by_seed]
        if len(of_seed) == len(cells) and len({n for _, n in of_seed}) == 1:
            summed[seed] = (sum(s for s, _ in of_seed), sum(n for _, n in of_seed))
    return summed


def judge(claim: Claim, folders: dict[str, Path], preset: str) -> dict:
    """A claim's verdict, from the episodes of its two rows in the columns that both have."""
    counts = [read_cells(folders[row]) for row in (claim.a, claim.b)]
    keys = [key for key in counts[0] if key in counts[1] and key.split("/")[1] in claim.columns]
    whole = claim.everywhere
    about = {"name": claim.name, "table": claim.table, "statement": claim.statement}
    about |= {"rows": [claim.a, claim.b], "columns": keys, "paper_all_columns": claim.paper(whole)}
    summed = [average_of({key: of_row[key] for key in keys}) for of_row in counts]
    if claim.of_sizes and preset == "tiny":
        return about | {"verdict": "not run", "why": "both rows have one size here"}
    if not keys or not all(summed):
        return about | {"verdict": "not run"}
    ours, low, high = difference(*map(rate_of, summed))
    paper = claim.paper(keys)
    sign = math.copysign(1, claim.paper(whole))
    about |= {"paper": paper, "ours": ours, "low": low, "high": high}
    about |= {"seeds": min(map(len, summed)), "seeds_needed": claim.seeds_needed(keys)}
    # One training of each says nothing of how trainings differ, whatever its episodes say.
    if low <= 0 <= high or about["seeds"] < 2 or not claim.tests(keys):
        return about | {"verdict": "cannot tell"}
    return about | {"verdict": "agrees" if sign * ours > 0 else "disagrees"}


if __name__ == "__main__":
    for claim in CLAIMS:
        keys = claim.everywhere
        print(
            f"{claim.name}: {claim.statement}. {claim.a} to {claim.b}, {claim.paper(keys):+.2f} in "
            f"the paper; {claim.seeds_needed(keys)} trainings of each would detect it"
        )
