"""What processes that load data need, and do first."""

import logging
import os

from speechbrain_bestrq.allocator import give_back_freed_memory
from speechbrain_bestrq.stopping import leave_stopping_to_parent

logger = logging.getLogger(__name__)


def start_worker(worker: int = 0) -> None:
    """Leave it to the parent to stop, and the parent's memory alone.

    Arguments
    ---------
    worker : int
        Number of the worker, as PyTorch's ``worker_init_fn`` is given.
    """
    leave_stopping_to_parent(worker)
    give_back_freed_memory()


def warn_of_shared_memory(needed: int, folder: str = "/dev/shm") -> None:
    """Warn where loading processes may have no room to hand batches over in: they would die by SIGBUS.

    Arguments
    ---------
    needed : int
        Bytes of the batches that wait at a time, of all ranks on this machine.
    folder : str
        Where Linux keeps shared memory; where there is none, nothing is said.

    Example
    -------
    >>> warn_of_shared_memory(0)
    """
    try:
        room = os.statvfs(folder)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if free < needed:
        logger.warning(
            "%s has %.2g GB of room, and batches that wait to be trained on may take %.2g there: if a worker dies by "
            "SIGBUS, give the container more (docker's --shm-size or --ipc=host), or a lower --num_workers.",
            folder,
            free / 1e9,
            needed / 1e9,
        )
