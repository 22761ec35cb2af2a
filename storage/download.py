"""MS-HAB's released demonstrations from the Hugging Face hub, in the layout that training reads.

    python data.py download --tasks set_table --subtasks close --targets fridge

writes data/set_table/close/fridge.h5 and .json. The same command resumes: complete files are kept.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, XetDownloadError

from config import SUBTASKS, TASKS, Count, InputError
from paper import HUB_DATASETS
from storage.files import sole_writer
from storage.terminal import DISK_ERRORS

RESUME = "The same command resumes; HF_ENDPOINT names a mirror of the hub"


def download(
    out: Path = Path("data"),
    tasks: tuple[Literal[TASKS], ...] = TASKS,
    subtasks: tuple[Literal[SUBTASKS], ...] = SUBTASKS,
    targets: tuple[str, ...] = (),
    workers: Count = 4,
    dry_run: bool = False,
) -> None:
    """Fetch MS-HAB's released demonstrations, 466 GB in all; resumable, file by file.

    Args:
        out: the files are OUT/<task>/<subtask>/<target>.h5 and .json
        targets: objects and articulations, as MS-HAB names them; unset: all
        workers: files fetched at a time; a kill loses only those
        dry_run: show the sizes and end
    """
    patterns = [f"{subtask}/{target}.*" for subtask in subtasks for target in targets or ("*",)]
    fetch = partial(
        snapshot_download, repo_type="dataset", allow_patterns=patterns, max_workers=workers
    )
    files = {}  # <task>/<subtask>/<target>.*: huggingface_hub's DryRunFileInfo
    with sole_writer(out), reachable("MS-HAB's demonstrations", RESUME):
        for incomplete in out.glob("*/.cache/huggingface/download/**/*.incomplete"):
            incomplete.unlink()  # huggingface_hub never resumes inside a file
        for task in tasks:
            found = fetch(HUB_DATASETS[task], local_dir=out / task, dry_run=True)
            files |= {f"{task}/{file.filename}": file for file in found}
        show_sizes(files, targets, out)
        for task in () if dry_run else tasks:
            fetch(HUB_DATASETS[task], local_dir=out / task)


def show_sizes(files: dict, targets: tuple[str, ...], out: Path) -> None:
    """Print what there is to fetch. Raises InputError if the hub lacks one of the targets."""
    if lacking := sorted(set(targets) - {Path(name).stem for name in files}):
        raise InputError(
            f"the hub has no {lacking} of these tasks and subtasks; --dry-run without --targets "
            "lists all"
        )
    for name, file in sorted(files.items()):
        print(f"{file.file_size / 1e6:12.1f} MB  {name}{'' if file.will_download else '  there'}")
    size = sum(file.file_size for file in files.values() if file.will_download)
    free = shutil.disk_usage(out).free
    print(f"{size / 1e6:12.1f} MB  to fetch; {free / 1e6:.1f} MB free in {out}")


@contextmanager
def reachable(name: str, remedy: str) -> Iterator[None]:
    """Turn an error of the hub or of the network into an InputError that ends in `remedy`."""
    try:
        yield
    except (HTTPError, HFValidationError, OSError, RuntimeError, XetDownloadError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        why = " ".join(f"{error} {error.__cause__ or ''}".split())
        answers = (getattr(each, "response", None) for each in (error, error.__cause__))
        if {answer.status_code for answer in answers if answer is not None} & {401, 403, 404}:
            why += ". Is the name right? A private or gated repository needs: hf auth login"
        raise InputError(f"{name}: not available from the hub ({why}). {remedy}") from error
