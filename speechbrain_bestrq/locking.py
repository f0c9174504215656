"""One writer at a time in a folder."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)


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
        If the folder cannot be made, or another process is writing to it.

    Example
    -------
    >>> with sole_writer(getfixture("tmp_path") / "out"):
    ...     pass
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{name} '{folder}' cannot be made ({error.strerror}): give another.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{name} '{folder}' is being written by another process: wait for it.") from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s '%s' cannot be locked (%s): start no second process on it.", name, folder, error.strerror
            )
        yield
    finally:
        os.close(descriptor)
