"""Files that are there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechbrain_bestrq.errors import name_file


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file beside the one meant, which it replaces at the end of the block; an error leaves the old one.

    What a killed process left beside is overwritten by the next. One process writes a file at a time: where two may,
    a lock is the caller's (:mod:`speechbrain_bestrq.locking`).

    Arguments
    ---------
    path : str or Path
        The file; its folder is made.

    Yields
    ------
    Path
        Where to write.

    Example
    -------
    >>> path = getfixture("tmp_path") / "new" / "a.txt"
    >>> with replacing(path) as beside:
    ...     _ = beside.write_text("whole")
    ...     path.exists()
    False
    >>> path.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def unfinished(path: str | os.PathLike) -> Path:
    """Where :func:`replacing` writes a file before it is whole.

    Example
    -------
    >>> str(unfinished("cache/a.int16"))
    'cache/a.int16.writing'
    """
    path = Path(path)
    return path.with_name(f"{path.name}.writing")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Arguments
    ---------
    path : str or Path
        The file; its folder is made.
    text : str
        What it will hold.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.txt"
    >>> write_text(path, "ü")
    >>> path.read_bytes()
    b'\\xc3\\xbc'
    """
    with replacing(path) as beside:
        # a path that is no UTF-8: JSON reads the same path again
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: str | os.PathLike) -> None:
    """Make sure that a file, or the names in a folder, are on the disk before what follows.

    Arguments
    ---------
    path : str or Path
        The file, or the folder, of which only the names are meant.

    Raises
    ------
    OSError
        If the disk does not take it.

    Example
    -------
    >>> sync(getfixture("tmp_path"))
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems have no such thing for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: str | os.PathLike) -> None:
    """Make sure that a folder and all that is in it are on the disk before what follows.

    Arguments
    ---------
    folder : str or Path
        The folder.

    Raises
    ------
    OSError
        If the disk does not take it.

    Example
    -------
    >>> sync_tree(getfixture("tmp_path"))
    """
    for path in [*Path(folder).rglob("*"), folder]:
        sync(path)
