"""MS-HAB's released demonstrations from the Hugging Face hub, in the layout that training reads.

    python data.py download --out DATA --tasks set_table --subtasks close --targets fridge

gives DATA/set_table/close/fridge.h5 and .json. What it takes is shown, and compared with the free
disk, before anything is fetched. The same command goes on after an end of any kind: a finished file
is not fetched again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # of the library it makes its requests with
    OfflineModeIsEnabled,
    XetDownloadError,
)

from config import DISK_ERRORS, SUBTASKS, TASKS, InputError
from paper import HUB_DATASETS
from storage.files import sole_writer


@dataclass(frozen=True)
class Wanted:
    """Files of one task: bytes by name, <subtask>/<target>.h5 and .json, of one commit."""

    task: str
    commit: str
    sizes: dict[str, int]

    def missing(self, out: Path) -> dict[str, int]:
        """Those that are not below OUT at their size yet."""
        paths = {name: out / self.task / name for name in self.sizes}
        there = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
        return {name: size for name, size in self.sizes.items() if there.get(name) != size}


def download(
    out: Path,
    tasks: tuple[Literal[TASKS], ...] = TASKS,
    subtasks: tuple[Literal[SUBTASKS], ...] = SUBTASKS,
    targets: tuple[str, ...] = (),
    workers: int = 4,
    dry_run: bool = False,
) -> None:
    """Fetch MS-HAB's released demonstrations, 466 GB in all; resumable, file by file.

    Args:
        out: the files are OUT/<task>/<subtask>/<target>.h5 and .json
        tasks: of these tasks
        subtasks: of these subtasks
        targets: of these objects and articulations, as MS-HAB names them; default: of all
        workers: files fetched at a time; a kill costs what is there of these
        dry_run: show the sizes and end
    """
    chosen = [listed(task, subtasks, targets) for task in tasks]
    chosen = [wanted for wanted in chosen if wanted.sizes]
    found = {PurePosixPath(name).stem for wanted in chosen for name in wanted.sizes}
    if lacking := set(targets) - found or (not found and set(subtasks)):
        raise InputError(
            f"the hub has no {sorted(lacking)} in {subtasks} of {tasks}: expected --tasks, "
            "--subtasks and --targets that go together; without --targets, --dry-run shows all"
        )
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out):
        # Of a killed run: huggingface_hub keeps whole files only.
        for partial in out.glob("*/.cache/huggingface/download/**/*.incomplete"):
            partial.unlink()
        show(chosen, out)
        if not dry_run:
            check_space(chosen, out)
            for wanted in chosen:
                fetch(wanted, out, workers)


def listed(task: str, subtasks: tuple[str, ...], targets: tuple[str, ...]) -> Wanted:
    """The files of a task that the hub has and that are asked for."""
    with reachable(HUB_DATASETS[task], GO_ON):
        info = HfApi().dataset_info(HUB_DATASETS[task], files_metadata=True)
    sizes = {
        file.rfilename: file.size
        for file in info.siblings
        for path in [PurePosixPath(file.rfilename)]
        if path.suffix in (".h5", ".json")
        and path.parent.name in subtasks
        and (not targets or path.stem in targets)
    }
    return Wanted(task, info.sha, sizes)


def show(chosen: list[Wanted], out: Path) -> None:
    for wanted in chosen:
        missing = wanted.missing(out)
        for name, size in sorted(wanted.sizes.items()):
            print(f"{gb(size)}  {wanted.task}/{name}{'' if name in missing else '  there'}")
    total, rest = (
        sum(sum(sizes.values()) for sizes in each)
        for each in ([w.sizes for w in chosen], [w.missing(out) for w in chosen])
    )
    free = shutil.disk_usage(out).free
    print(f"{gb(total)}  in all, {gb(rest).strip()} to fetch; {gb(free).strip()} free in {out}")


def check_space(chosen: list[Wanted], out: Path) -> None:
    rest = sum(sum(wanted.missing(out).values()) for wanted in chosen)
    free = shutil.disk_usage(out).free
    if rest > free:
        raise InputError(
            f"{out}: {gb(rest).strip()} are to be fetched, {gb(free).strip()} are free. Give an "
            "--out on another disk, or fewer --tasks, --subtasks or --targets"
        )


def fetch(wanted: Wanted, out: Path, workers: int) -> None:
    names = list(wanted.missing(out))
    if names:
        with reachable(HUB_DATASETS[wanted.task], GO_ON):
            snapshot_download(
                HUB_DATASETS[wanted.task], repo_type="dataset", revision=wanted.commit,
                local_dir=out / wanted.task, allow_patterns=names, max_workers=workers,
            )  # fmt: skip
    if left := wanted.missing(out):
        raise InputError(f"{out / wanted.task}: {list(left)} did not arrive. {GO_ON}")
    print(f"{out / wanted.task}: {len(wanted.sizes)} files, whole")


GO_ON = (
    "Files that are whole are kept: the same command goes on, once there is a network (HF_ENDPOINT "
    "names a mirror)"
)


@contextmanager
def reachable(name: str, mend: str) -> Iterator[None]:
    """Turn what the hub and the way to it may raise into an InputError that ends in `mend`."""
    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError, XetDownloadError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:  # the disk, not the hub
            raise
        answers = (getattr(each, "response", None) for each in (error, error.__cause__))
        status = next((answer.status_code for answer in answers if answer is not None), None)
        why = f"not to be had from the hub ({' '.join(str(error).split())})"
        if isinstance(error, OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set: the hub is not asked. Unset it where there is a network"
        elif status in (401, 403, 404):  # the hub does not say which of the two
            why += ". Look at the name; if it is right: hf auth login, with a token that may"
        raise InputError(f"{name}: {why}. {mend}") from error


def gb(size: int) -> str:
    return f"{size / 1e9:8.2f} GB" if size >= 1e7 else f"{size / 1e3:8.1f} kB"
