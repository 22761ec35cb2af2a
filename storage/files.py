"""Files that are complete or absent, even after a kill or on a full disk.

write(path, content); write_json(path, {...})  # written beside, fsynced, renamed over `path`
append(path, {...}); read_lines(path)          # JSON lines; a kill can cut off the last one only
with sole_writer(folder): ...                  # no other process writes to the folder
"""

import errno
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from config import InputError, quoted


class DamagedError(InputError):
    """A file that is missing, or not as it was written; the message names it."""


# What torch, numpy, h5py and json raise on a file that is cut off or of another kind.
READ_ERRORS = (
    OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError,
    OverflowError, BadZipFile, pickle.UnpicklingError,
)  # fmt: skip
MENDS = {  # system error: the command after which an undamaged file can be read
    errno.EACCES: "chmod u+r {}  # its owner, or root",
    errno.EAGAIN: "fuser -v {}  # wait until that program has closed it",
    errno.EMFILE: "ulimit -n 4096",
    errno.ENOLCK: "export HDF5_USE_FILE_LOCKING=FALSE",
}


def mend_of(path: Path, error: BaseException | None) -> str | None:
    """The command after which a file can be read; None if it is missing or damaged."""
    number = getattr(error, "errno", None)  # h5py's errors for damaged content have none
    if number in (None, errno.ENOENT):
        return None
    return MENDS.get(number, "dmesg | tail  # on {}").format(quoted(path))


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends without error, the file replaces `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def dumps(content: object, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(strict, indent=indent)


def write_json(path: Path, content: dict) -> None:
    write(path, (dumps(content, indent=1) + "\n").encode())


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """Raise DamagedError where a JSON file lacks the content that the block reads."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged, or another file's content ({error!r})") from error


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises DamagedError if the file is missing or holds anything else."""
    if not path.exists():
        raise DamagedError(f"{path}: not there")
    with well_formed(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("expected a JSON object")
        return content


@contextmanager
def sole_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Hold the lock of a folder, or of the file `name` in it; InputError if another process does.

    The operating system releases the lock when the process ends, even after kill -9. lockf, not
    filelock's flock: forked loader processes would inherit a flock and keep it after a kill.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / (f".{name}.lock" if name else ".lock"), "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        mend = f", or chmod u+w {quoted(folder)}" * isinstance(error, PermissionError)
        raise InputError(f"{folder}: {error.strerror}. Give another --out{mend}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise InputError(
                f"{folder}: process {lock.read()} is writing to it. Give another --out, or kill "
                "the process (it saves its state)"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            text = f"{folder}: its file system has no locks ({error.strerror}): start one program"
            print(f"warning: {text}", file=sys.stderr)
        os.truncate(lock.name, 0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def append(path: Path, *lines: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(dumps(line) + "\n" for line in lines))
    sync(path)


def read_lines(path: Path, mend: bool = False) -> list[dict]:
    """The JSON objects of a file, one a line; none if the file is missing.

    An incomplete last line, left by a kill or a full disk, is ignored; `mend` cuts it off the file.
    Raises DamagedError, naming the line, if another line is not a JSON object.
    """
    text = path.read_bytes() if path.exists() else b""
    end = text.rfind(b"\n") + 1
    if mend and end < len(text):
        print(f"warning: {path}: dropped an incomplete last line", file=sys.stderr)
        os.truncate(path, end)
    lines = []
    for number, line in enumerate(text[:end].split(b"\n")[:-1], start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DamagedError(
                f"{path}, line {number}: damaged, expected a JSON object ({error}). Delete it, "
                f"keeping a copy: sed -i.damaged {number}d {quoted(path)}"
            ) from error
    return lines


def code_commit() -> str | None:
    """The commit of this code, with "-dirty" if a .py file differs; None outside of git."""
    if not shutil.which("git"):
        return None
    git = ["git", "-C", Path(__file__).parent]
    head = subprocess.run([*git, "rev-parse", "-q", "--verify", "HEAD"], capture_output=True)
    if not (commit := head.stdout.decode().strip()):
        return None
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"])
    return commit + "-dirty" * bool(changed.returncode)
