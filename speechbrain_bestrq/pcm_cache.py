"""Audio decoded once: the samples of a corpus in one file, which all loading workers and ranks map into memory."""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from speechbrain.utils.distributed import ddp_broadcast, run_on_main

from speechbrain_bestrq.audio import FULL_SCALE, AudioTable, check_damaged, stat_audio
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import next_writer
from speechbrain_bestrq.machine import usable_cores
from speechbrain_bestrq.writing import replacing, unfinished, write_text

logger = logging.getLogger(__name__)

_AHEAD = 64
"""Utterances that are read ahead of the one that is written, for each thread."""
_MOST_THREADS = 16
"""Unless told otherwise: what is read ahead has to be held, some 50 MB a thread of utterances of 25 s."""


class PcmCache:
    """The samples of a table's utterances, 16 bits each, in a file that is mapped into memory.

    Whatever process reads it, a machine holds it in memory once, as far as there is room.

    Arguments
    ---------
    path : str or Path
        The file, as :func:`cache_audio` makes it.
    lengths : array_like
        Samples of each utterance, int64, shape (U,).

    Raises
    ------
    InputError
        If the file is not there, or has another size.
    """

    def __init__(self, path: str | os.PathLike, lengths: Any):
        self.path, self.lengths = Path(path), np.asarray(lengths, dtype=np.int64)
        expected = 2 * int(self.lengths.sum())
        if not self.path.is_file() or self.path.stat().st_size != expected:
            raise InputError(
                f"{self.path} is not there, or not of {expected} bytes: give a cache_folder that all ranks see, or "
                "delete that file."
            )
        self.damaged = _read_damaged(self.path)
        """What is wrong with the utterances that could not be decoded, by their numbers."""
        self._starts = np.cumsum(self.lengths) - self.lengths
        # as a plain array: slices of a memmap are slow to make
        self._samples = np.asarray(np.memmap(self.path, np.int16, "r"))

    def __reduce__(self) -> tuple[type, tuple[Path, np.ndarray]]:
        # a worker that was spawned maps the file itself; the array would be sent whole
        return PcmCache, (self.path, self.lengths)

    def read(self, index: int, start: int, samples: int) -> np.ndarray:
        """Give a stretch of an utterance.

        Arguments
        ---------
        index : int
            Of the utterance, in [0, U).
        start, samples : int
            The stretch, within the utterance.

        Returns
        -------
        numpy.ndarray
            int16, shape (samples,), a view of the file.

        Raises
        ------
        InputError
            If the utterance could not be decoded.
        """
        if index in self.damaged:
            raise InputError(self.damaged[index])
        first = int(self._starts[index]) + start
        return self._samples[first : first + samples]


def cache_audio(
    table: AudioTable, folder: str | os.PathLike, threads: int | None = None, max_unreadable: int = 0
) -> PcmCache:
    """Decode a table's utterances into a file of 16-bit samples, unless that was done before.

    The file's name is a digest of the utterances, the files' sizes and dates, and the rate, so that
    runs can share a folder. It takes 115 MB an hour at 16 kHz, which is said first. Audio of 16 bits at
    that rate, in one channel, is kept exactly; other audio is rounded to 16 bits, and counted.

    Arguments
    ---------
    table : AudioTable
        The utterances.
    folder : str or Path
        Where to; it is made if need be.
    threads : int, optional
        That decode at the same time; as many as this process may use cores, 16 at most, if left out.
    max_unreadable : int
        Up to so many files may be damaged: a warning names them, and :meth:`PcmCache.read` refuses their utterances.

    Returns
    -------
    PcmCache
        The main process makes the file, and all open it.

    Raises
    ------
    InputError
        If the disk has no room for it or it cannot be written, or as :func:`speechbrain_bestrq.audio.read_segment` of
        more than ``max_unreadable`` files.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", np.array([1, -2, 3], dtype=np.int16), 16000)
    >>> cache = cache_audio(AudioTable(["a"], [f"{folder}/a.wav"], [3 / 16000], 16000), folder / "cache")
    >>> cache.read(0, start=1, samples=2)
    array([-2,  3], dtype=int16)
    """
    made: list[Path] = []
    threads = threads or min(usable_cores(), _MOST_THREADS)
    run_on_main(lambda: made.append(_make(table, Path(folder), threads, max_unreadable)))
    cache = PcmCache(ddp_broadcast(made and made[0], src=0), table.lengths)
    _check_damaged(table, cache.damaged, max_unreadable)
    return cache


def _check_damaged(table: AudioTable, damaged: Mapping[int, str], most: int) -> None:
    """Refuse more damaged files than are allowed; a file may hold several utterances."""
    if damaged:
        last = InputError(list(damaged.values())[-1])
        check_damaged(len({table.path(index) for index in damaged}), most, last)


def _damaged_path(path: Path) -> Path:
    return path.with_suffix(".damaged.json")


def _read_damaged(path: Path) -> dict[int, str]:
    """What is wrong with utterances of a file of samples; most have no such list beside them."""
    beside = _damaged_path(path)
    if not beside.is_file():
        return {}
    return {int(index): told for index, told in json.loads(beside.read_text(encoding="utf-8")).items()}


def _make(table: AudioTable, folder: Path, threads: int, max_unreadable: int) -> Path:
    """Write the file, beside at first; runs that share the folder wait for each other."""
    size = 2 * int(table.lengths.sum())
    path = folder / f"{_digest(table)}.int16"
    if not _is_made(path, size):  # one that is made is only read: it may be another user's
        with next_writer(folder):
            if not _is_made(path, size):
                _decode(table, path, size, threads, max_unreadable)
                return path
    logger.info("The audio is decoded already: %s, %.2f GB.", path, size / 1e9)
    return path


def _is_made(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _decode(table: AudioTable, path: Path, size: int, threads: int, max_unreadable: int) -> None:
    folder = path.parent
    unfinished(path).unlink(missing_ok=True)  # a killed process left it, and its room is ours
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"cache: the decoded audio takes {size / 1e9:.2f} GB, and {folder} has room for {free / 1e9:.2f} GB: name "
            "another cache_folder, or leave cache out."
        )
    logger.info("Decoding %.2f hours of audio: %.2f GB in %s.", table.hours, size / 1e9, path)
    rounded = clipped = 0
    damaged: dict[int, str] = {}
    try:
        with replacing(path) as beside, open(beside, "wb") as file:
            for index, audio in enumerate(_read_all(table, threads)):
                if isinstance(audio, InputError):
                    damaged[index] = str(audio)
                    _check_damaged(table, damaged, max_unreadable)
                    logger.warning("%s Until then another utterance is heard instead.", audio)
                    audio = np.zeros(int(table.lengths[index]), np.int16)
                if audio.dtype != np.int16:
                    rounded += 1
                    clipped += bool(np.abs(audio).max(initial=0) > 1)
                    audio = np.clip(np.rint(audio * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
                file.write(audio.data)
            file.flush()
            os.fsync(file.fileno())
            # before the samples are there
            if damaged:
                write_text(_damaged_path(path), json.dumps(damaged) + "\n")
            else:
                _damaged_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cache: {path} cannot be written ({error.strerror}): make room, or leave cache out."
        ) from error
    if rounded:
        logger.warning(
            "%d of %d utterances are not 16-bit audio of %d samples per second in one channel: they were rounded to 16 "
            "bits; %d of them are louder than full scale and were clipped.",
            rounded,
            len(table),
            table.sample_rate,
            clipped,
        )


def _read_all(table: AudioTable, threads: int) -> Iterator[np.ndarray | InputError]:
    """The utterances in order, or why one cannot be read, ahead by threads: decoding does not hold Python's lock."""

    given_up = threading.Event()

    def read(run: range) -> list[np.ndarray | InputError]:
        found: list[np.ndarray | InputError] = []
        while (left := run[len(found) :]) and not given_up.is_set():
            try:
                for audio in table.read_run(left):
                    found.append(audio)
                    if given_up.is_set():
                        break
            except InputError as error:
                found.append(error)
        return found

    block = threads * _AHEAD
    with ThreadPoolExecutor(threads) as pool:
        try:
            for first in range(0, len(table), block):
                runs = _runs(table, range(first, min(first + block, len(table))))
                yield from chain.from_iterable(pool.map(read, runs))
        finally:
            given_up.set()  # the pool waits for the threads


def _runs(table: AudioTable, block: range) -> Iterator[range]:
    """Cut a block where another file begins, and into runs that every thread gets one of."""
    first = block[0]
    for index in block[1:]:
        if index - first == _AHEAD or table.path(index) != table.path(first):
            yield range(first, index)
            first = index
    yield range(first, block[-1] + 1)


def _digest(table: AudioTable) -> str:
    """Of all that the file depends on."""
    digest = hashlib.sha256(json.dumps([2, table.sample_rate]).encode())
    digest.update(table.lengths.tobytes())
    digest.update(table.starts.tobytes())
    for index in range(len(table)):
        path = table.path(index)
        status = stat_audio(path)
        digest.update(json.dumps([path, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()[:16]
