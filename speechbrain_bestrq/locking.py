"""Who may write in a folder, where several processes would: one at a time, or one after another."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

#: What is locked, in the folder. Files: of a folder itself NFS locks nothing on other machines.
OWNER_FILE, NEXT_FILE = ".owner.lock", ".lock"


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what is locked of it.

    Arguments
    ---------
    folder : Path
        One that exists.

    Returns
    -------
    bool

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> with sole_writer(folder):
    ...     is_empty(folder)
    True
    """
    return all(path.name in (OWNER_FILE, NEXT_FILE) for path in folder.iterdir())


@contextmanager
def sole_writer(folder: Path, name: str = "output_folder") -> Iterator[None]:
    """Keep a folder for this process while the ``with`` block runs; the system lets go of it however the process ends.

    Arguments
    ---------
    folder : Path
        Is made if it is not there.
    name : str
        Of the option that gave it, for messages.

    Raises
    ------
    InputError
        If the folder cannot be written, or another process is writing to it.

    Example
    -------
    >>> with sole_writer(getfixture("tmp_path") / "out"):
    ...     pass
    """
    with _locked(folder, name, fcntl.LOCK_EX | fcntl.LOCK_NB, OWNER_FILE):
        yield


@contextmanager
def fellow_writer(folder: Path, name: str = "output_folder") -> Iterator[None]:
    """Share a folder with other fellows, each in a part of its own, while the ``with`` block runs; with no sole writer.

    Arguments
    ---------
    folder, name
        As for :func:`sole_writer`.

    Raises
    ------
    InputError
        If the folder cannot be written, or a process has it for itself.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "out"
    >>> with fellow_writer(folder), fellow_writer(folder):
    ...     pass
    """
    with _locked(folder, name, fcntl.LOCK_SH | fcntl.LOCK_NB, OWNER_FILE):
        yield


@contextmanager
def next_writer(folder: Path, name: str = "cache_folder") -> Iterator[None]:
    """Wait until no other next writer has a folder, then keep it while the ``with`` block runs.

    It is another lock than that of the others: the folder may be this process's own already.

    Arguments
    ---------
    folder, name
        As for :func:`sole_writer`.

    Raises
    ------
    InputError
        If the folder cannot be written.

    Example
    -------
    >>> with next_writer(getfixture("tmp_path") / "cache"):
    ...     pass
    """
    with _locked(folder, name, fcntl.LOCK_EX, NEXT_FILE):
        yield


@contextmanager
def _locked(folder: Path, name: str, operation: int, file: str) -> Iterator[None]:
    path = folder / file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_for_all(path)
    except OSError as error:
        raise InputError(f"{name} '{folder}' cannot be written ({error.strerror}): give another.") from error
    locked = False
    _open.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            if operation & fcntl.LOCK_NB:
                raise InputError(f"{name} '{folder}' is being written by another process: wait for it.") from error
            logger.info("Another process is writing in %s '%s': waiting for it.", name, folder)
            fcntl.flock(descriptor, operation)
            locked = True
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s '%s' cannot be locked (%s): start no second process on it.", name, folder, error.strerror
            )
        if locked and not _is_there(descriptor, path):  # its owner has taken it away since it was opened
            with _locked(folder, name, operation, file):
                yield
            return
        try:
            yield
        finally:
            # the folder is to hold what was made in it, unless it is another by now, or another user's
            owned = file == OWNER_FILE and operation & fcntl.LOCK_EX and locked and descriptor in _open
            if owned and _is_there(descriptor, path):
                with contextlib.suppress(OSError):
                    path.unlink()
    finally:
        if descriptor in _open:  # not in a forked process
            _open.remove(descriptor)
            os.close(descriptor)


def _let_go() -> None:
    """Close a forked process's copies, such as a loading worker's: a lock lasts until the last of them is closed."""
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


#: Descriptors of the locks that this process holds, or waits for.
_open: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _open_for_all(path: Path) -> int:
    """A file that other users of the folder may lock too; to write, for NFS gives no other lock for one alone."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)
