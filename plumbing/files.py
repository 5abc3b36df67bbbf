"""Files that are whole at any moment: written beside and renamed; what a run wrote is set aside; one writer a folder.

Not here: what is written (checkpoints.py, metrics.py, and whoever writes a result).
"""

import contextlib
import itertools
import shutil

from filelock import FileLock, Timeout

from plumbing.commandline import UserError


def locked(folder):
    """A lock that keeps others out of a folder until it is released. Raises UserError where another run is in."""
    try:
        lock = FileLock(folder / ".lock")
        lock.acquire(blocking=False)
        return lock
    except Timeout:
        raise UserError(f"another run writes to {folder}: wait for its end, or name another --output.") from None


def write_text(path, text):
    """Writes a file beside and renames it: whoever reads it finds the old one or the new one, whole."""
    beside = path.with_name(path.name + ".unfinished")
    beside.write_text(text)
    beside.replace(path)


def set_aside(path):
    """Renames what is there, so that nothing is overwritten: metrics.jsonl to metrics.1.jsonl, step-20 to step-20.1."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def remove(path):
    """Removes a folder, or a file of its name, if there is one and if it can be removed."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()
