"""What the C library does with memory that tensors on the CPU have given back."""

import ctypes
import os
import platform
from functools import cache

# parameters of glibc's mallopt (malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

#: Of unlike shapes, whose memory is kept together.
BATCHES_KEPT = 8


def keep_freed_memory() -> bool:
    """Let the C library keep what it is given back, for the next tensors on the CPU, instead of asking the system anew.

    By its own rules glibc returns the largest blocks to the system as soon as they are freed, and the system maps and
    clears every page of them anew for the next step: 500 MB an update of ``wav2vec2_small.yaml``, a fifth of its time
    (``benchmarks/freed_memory.py``; ``bestrq_small.yaml`` has none so large). The process holds on to its peak instead.
    That is so for the whole process, in other threads of blocks up to 64 MB: it is for a program's first lines, not for
    a library's.

    Returns
    -------
    bool
        Whether it is so now: not with another C library than glibc, nor where the user has settings of its allocator
        in the environment (``MALLOC_...``, ``glibc.malloc`` in ``GLIBC_TUNABLES``), which are left as they are.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if own or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # no block by itself, which would go back as soon as it is freed, and the heap is never cut
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Give back to the system what tensors on the CPU have left, where it will not be needed again.

    So in a process that has just been forked: it has its parent's kept memory too, and as soon as the parent writes to
    its pages again, they are there twice, 3 GB a worker of ``wav2vec2_small.yaml``. With another C library than glibc
    nothing is done.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def give_back_now_and_then(batch: int) -> None:
    """Give back what tensors on the CPU have left, once in :data:`BATCHES_KEPT` batches whose shapes are ever others.

    Those of other shapes cut the kept memory into pieces that fit nothing any more, and it grows: from 0.9 to 3.4 GB
    over 30 batches that ``wav2vec2_small.yaml``'s encoder heard, of no more than 60 s each (docs/LOG.md). The rungs of
    pre-training are few, and come again.

    Arguments
    ---------
    batch : int
        Its number.

    Example
    -------
    >>> give_back_now_and_then(BATCHES_KEPT)
    """
    if batch % BATCHES_KEPT == 0:
        give_back_freed_memory()


@cache
def _is_glibc() -> bool:
    """Found in Python's own file, which a process that is forked need not read again."""
    return platform.libc_ver()[0] == "glibc"
