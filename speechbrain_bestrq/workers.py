"""What processes that load data need, and do first."""

import os

from speechbrain_bestrq.allocator import give_back_freed_memory
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.stopping import leave_stopping_to_parent


def start_worker(worker: int = 0) -> None:
    """Leave it to the parent to stop, and the parent's memory alone.

    Arguments
    ---------
    worker : int
        Number of the worker, as PyTorch's ``worker_init_fn`` is given.
    """
    leave_stopping_to_parent(worker)
    give_back_freed_memory()


def check_shared_memory(needed: int, folder: str = "/dev/shm") -> None:
    """Refuse loading processes that this machine has no room to hand batches over from: they would die by SIGBUS.

    Arguments
    ---------
    needed : int
        Bytes of the batches that wait at a time, of all ranks on this machine.
    folder : str
        Where Linux keeps shared memory; where there is none, nothing is refused.

    Raises
    ------
    InputError
        If there is less room.

    Example
    -------
    >>> check_shared_memory(0)
    """
    try:
        room = os.statvfs(folder)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if free < needed:
        raise InputError(
            f"{folder} has {free / 1e9:.2g} GB of room, and batches that wait to be trained on take {needed / 1e9:.2g} "
            "there: give a container more (docker's --shm-size or --ipc=host), or a lower --num_workers."
        )
