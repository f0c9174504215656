"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    beside = path.with_name(f"{path.name}.writing")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
        beside.write_text(text, encoding="utf-8")
