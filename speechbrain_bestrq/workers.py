"""What a process that loads data does first."""

from speechbrain_bestrq.allocator import give_back_freed_memory
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
