"""Files that are whole or absent, wherever the process is killed and whenever the disk is full.

    with replacing(path) as temporary: ...        # written aside, fsynced, renamed over `path`
    write_sealed(path, {...}); read_sealed(path)  # JSON that ends in the sha256 of all before it
    append(path, {...}); read_lines(path)         # JSON lines, each on the disk before the next

Everything that must survive a kill goes through here: checkpoints, packs, demonstrations, episodes.
"""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config import InputError, quoted


class DamagedError(InputError):
    """A file whose content is not what was written; the message names it."""


# For an errno after which the file may still be whole: the command after which it can be read.
MENDS = dict.fromkeys((errno.EACCES, errno.EPERM), "chmod u+r {}  # its owner, or root")
MENDS |= {errno.EAGAIN: "fuser -v {}  # wait until that program has closed it"}
MENDS |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "ulimit -n 4096")
LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of a file system that has none
MENDS |= dict.fromkeys(LOCKS, "export HDF5_USE_FILE_LOCKING=FALSE")


def mend_of(path: Path, error: BaseException | None) -> str | None:
    """The command after which a file can be read; None if it is missing, or damaged.

    h5py's errors have an errno only where the system refused the content, not for damage.
    """
    number = getattr(error, "errno", None)
    if number in (None, errno.ENOENT):
        return None
    return MENDS.get(number, "dmesg | tail  # on {}").format(quoted(path))


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on the disk."""
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
    """Yield a path to write; the file replaces `path` once it is whole and on the disk."""
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


@contextmanager
def sole_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Be the only process that writes to a folder, or to what is called `name` in it.

    Raises InputError while another is at it; the lock ends with its process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / (f".{name}.lock" if name else ".lock"), "a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked loader does not inherit it
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise InputError(
                f"{folder}: another run is writing to it, process {lock.read()}. Stop that one "
                "(kill, it saves its state), or give another --out"
            ) from None
        os.truncate(lock.name, 0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


# --- JSON that knows when it is damaged ---

_SEAL = ',\n "sha256": "'


def _sealed(body: str) -> str:
    return f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def write_sealed(path: Path, content: dict) -> None:
    """Write `content`, and as its last key the sha256 of the text before that key."""
    write(path, _sealed(json.dumps(content, indent=1).removesuffix("\n}")).encode())


def read_sealed(path: Path) -> dict:
    """Read what write_sealed wrote. Raises DamagedError if a single byte of it is different."""
    try:
        text = path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path}: not there") from None
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: damaged ({error})") from None
    body, seal, _ = text.rpartition(_SEAL)
    if not seal or _sealed(body) != text:
        raise DamagedError(f"{path}: damaged, its own sha256 differs")
    return json.loads(body + "\n}")


def read_json(path: Path) -> dict:
    """A JSON object. Raises DamagedError for anything else."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{path}: damaged, expected a JSON object ({error})") from error


# --- JSON lines that grow ---


def append(path: Path, line: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, mend: bool = False) -> list[dict]:
    """The lines of a file; none if it is not there.

    A last line that a kill or a full disk has torn does not count; `mend` cuts it off the file.
    Raises DamagedError, naming the line, for any other that is no JSON object.
    """
    text = path.read_bytes() if path.exists() else b""
    whole = text.rfind(b"\n") + 1
    if mend and whole < len(text):
        print(f"warning: {path}: dropped a torn last line", file=sys.stderr)
        os.truncate(path, whole)
    lines = []
    for number, line in enumerate(text[:whole].split(b"\n")[:-1], start=1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DamagedError(
                f"{path}, line {number}: damaged, expected a JSON object ({error}). Without that "
                f"line the file is whole; this keeps it as it is in {path.name}.damaged: "
                f"sed -i.damaged {number}d {quoted(path)}"
            ) from error
    return lines


def code_commit() -> str | None:
    """The commit of this code, None outside of git; `-dirty` behind it if a program differs."""
    git = ["git", "-C", Path(__file__).parent]
    head = subprocess.run([*git, "rev-parse", "-q", "--verify", "HEAD"], capture_output=True)
    if not (commit := head.stdout.decode().strip()):
        return None
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/*.py"])
    return commit + "-dirty" * changed.returncode
