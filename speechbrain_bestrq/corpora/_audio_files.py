"""Audio files on disk: finding them in a tree of folders, and finding out whether they can be read."""

import hashlib
import os
import stat
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from speechbrain_bestrq.corpora._mp3 import header_falls_short
from speechbrain_bestrq.errors import InputError

SHORTEST = 0.025
"""Seconds. What is shorter than one analysis window of any front end is no recording."""

OTHER_AUDIO = (".m4a", ".aac", ".mp4", ".wma", ".amr", ".webm", ".aif", ".aiff", ".caf", ".wv", ".ape")
"""Endings of audio that nobody asked for, or that cannot be read."""

LOST_AND_FOUND = "lost+found"
"""Of the root of a disk, which the system keeps for itself."""

CHUNK = 64
"""Files that a worker takes at a time."""

# What libsndfile reports for a file whose header does not give its length.
_UNKNOWN_LENGTH = (1 << 63) - 1


def walk_files(root: Path, entered: dict[tuple[int, int], str] | None = None) -> Iterator[tuple[str, os.DirEntry]]:
    """Walk through the files below a folder, sorted by their relative paths.

    Names that start with a dot are passed over, and so are devices and sockets.
    Links are followed, but no folder is entered twice: neither a loop nor a second
    link to a folder yields anything twice. Links that lead nowhere are yielded.
    Memory is bounded by the largest folder, and the number of folders.

    Arguments
    ---------
    root : Path
        Where to start.
    entered : dict, optional
        Is filled with the folders: device and inode, and the path by which it was entered.

    Yields
    ------
    relative : str
        Path below ``root``, with ``/`` between its parts.
    entry : os.DirEntry
        The file.

    Raises
    ------
    InputError
        If a folder cannot be listed.
    """
    entered = {} if entered is None else entered
    pending = [iter(_list_folder(str(root), "", entered))]
    while pending:
        for relative, entry, is_folder in pending[-1]:
            if is_folder:
                pending.append(iter(_list_folder(entry.path, relative, entered)))
                break
            yield relative, entry
        else:
            pending.pop()


def _list_folder(path: str, prefix: str, entered: dict[tuple[int, int], str]) -> list[tuple[str, os.DirEntry, bool]]:
    """List (relative path, entry, whether a folder), so that the walk is in the order of the relative paths."""
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in entered:
            return []
        entered[status.st_dev, status.st_ino] = path
        with os.scandir(path) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        if isinstance(error, PermissionError) and os.path.basename(path) == LOST_AND_FOUND:
            return []
        raise InputError(
            f"folder {path!r} cannot be listed ({error.strerror}): give yourself the right to read it, or move it away."
        ) from error
    listed = []
    for entry in visible:
        kind = _kind(entry)
        if kind is not None:
            is_folder = kind == "folder"
            # the slash makes "a/x" come after "a b" here, as it does among whole paths
            listed.append((prefix + entry.name + ("/" if is_folder else ""), entry, is_folder))
    return sorted(listed, key=lambda item: item[0])


def _kind(entry: os.DirEntry) -> str | None:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself, or into a folder without permission
        return "file"
    return "file" if entry.is_symlink() else None  # a link that leads nowhere, or a device


class Survey(NamedTuple):
    """What is in a tree before any file is opened."""

    files: int
    """Audio files."""
    ignored: int
    """Other files."""
    fingerprint: str
    """Changes when an audio file or a companion is added, removed, renamed, or has another size or time."""
    other_audio: int = 0
    """Of the other files, those whose names say that they are audio too."""
    folders: Mapping[tuple[int, int], str] = MappingProxyType({})
    """Device and inode of each folder with audio files, and the path by which it was entered."""
    identities: np.ndarray = np.empty(0, dtype=np.int64)
    """Of each audio file, sorted: equal for links to one file, symbolic or not."""
    repeated: frozenset[str] = frozenset()
    """Relative paths of audio files that are links to others of the tree and were asked for; not counted above."""


class AudioTree(NamedTuple):
    """A folder, and which of its files count."""

    root: Path
    """Absolute path."""
    suffixes: tuple[str, ...]
    """Ends of the names of audio files, in lower case, each with its dot."""
    companions: tuple[str, ...] = ()
    """Ends of the names of files which belong to the audio."""

    def files(self) -> Iterator[tuple[str, str]]:
        """Yield the relative and the absolute path of each audio file, sorted."""
        for relative, entry in walk_files(self.root):
            if entry.name.lower().endswith(self.suffixes):
                yield relative, entry.path

    def survey(self, inspect: Callable[[str, str], None] | None = None, find_repeated: bool = False) -> Survey:
        """Count the files and take their fingerprint: one ``stat`` for each, none is opened.

        Arguments
        ---------
        inspect : callable, optional
            Called with the relative and the absolute path of each audio file.
        find_repeated : bool
            Find the files that are links to others of the tree. In a corpus whose files have labels each counts.

        Returns
        -------
        Survey
        """
        files = ignored = other_audio = 0
        digest = hashlib.blake2b(digest_size=16)
        entered: dict[tuple[int, int], str] = {}
        with_audio = set()
        identities = array("q")
        for relative, entry in walk_files(self.root, entered):
            name = entry.name.lower()
            if name.endswith(self.suffixes):
                files += 1
                with_audio.add(os.path.dirname(entry.path))
                if inspect is not None:
                    inspect(relative, entry.path)
            elif not self.companions or not name.endswith(self.companions):
                ignored += 1
                other_audio += name.endswith(OTHER_AUDIO)
                continue
            status = _status(entry)
            if name.endswith(self.suffixes):
                identities.extend(_identity(status))
            digest.update(b"%b\0%d\0%d\n" % (os.fsencode(relative), status.st_size, status.st_mtime_ns))
        folders = {one: path for one, path in entered.items() if path in with_audio}
        known, counts = np.unique(np.array(identities, dtype=np.int64), return_counts=True)
        several = self.find(known[counts > 1]).values() if find_repeated else ()
        repeated = frozenset(relative for links in several for relative, _ in links[1:])
        return Survey(files - len(repeated), ignored, digest.hexdigest(), other_audio, folders, known, repeated)

    def find(self, identities: np.ndarray) -> dict[int, list[tuple[str, str]]]:
        """Find the audio files that have one of some identities; without any, nothing is looked at.

        Arguments
        ---------
        identities : numpy.ndarray
            Some of :attr:`Survey.identities`.

        Returns
        -------
        dict
            By identity, the relative and the absolute path of each file that has it, in their order.
        """
        wanted, found = set(identities.tolist()), {}
        for relative, entry in walk_files(self.root) if wanted else ():
            if entry.name.lower().endswith(self.suffixes):
                for identity in wanted.intersection(_identity(_status(entry))):
                    found.setdefault(identity, []).append((relative, entry.path))
        return found


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What links to one file have in common, and no other file has; nothing where the disk does not number its files.

    Size and time are for network disks whose numbers may be those of other files.
    """
    if not status.st_ino:
        return ()
    return (hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)),)


def _status(entry: os.DirEntry) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link that leads nowhere
        return entry.stat(follow_symlinks=False)


class Probe(NamedTuple):
    """What a look into an audio file showed."""

    duration: float
    """Seconds; 0 if unreadable."""
    sample_rate: int
    """Hz."""
    channels: int
    problem: str = ""
    """Why the file cannot be used, in one line; empty if it can."""


def probe_audio(path: str) -> Probe:
    """Read a file's header, and its last 0.1 s to see that the body is there.

    The seek finds FLAC files that were cut off. WAV and Ogg files that were cut off
    can still be decoded, to what is left of them: that length is returned.

    Arguments
    ---------
    path : str
        The audio file.

    Returns
    -------
    Probe
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as audio:  # a name may be no UTF-8
            frames, sample_rate, channels = audio.frames, audio.samplerate, audio.channels
            if frames == _UNKNOWN_LENGTH:
                return Probe(0.0, sample_rate, channels, "its header does not say how long it is")
            if frames < SHORTEST * sample_rate:
                return Probe(0.0, sample_rate, channels, f"{frames} samples at {sample_rate} Hz are too short")
            if not audio.seekable():
                problem = f"no stretch of {audio.subtype} can be looked up: convert it, as by ffmpeg -i a.wav b.flac"
                return Probe(0.0, sample_rate, channels, problem)
            tail = min(frames, max(sample_rate // 10, 1))
            audio.seek(frames - tail)
            if len(audio.read(tail, dtype="float32")) != tail:
                return Probe(0.0, sample_rate, channels, "it ends before the length that its header gives")
            if audio.subtype.startswith("MPEG") and header_falls_short(path):
                problem = "it holds more than its header says: write that anew, as by ffmpeg -i a.mp3 -c copy b.mp3"
                return Probe(0.0, sample_rate, channels, problem)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        return Probe(0.0, 0, 0, _explain(path, error))
    return Probe(frames / sample_rate, sample_rate, channels)


def _explain(path: str, error: Exception) -> str:
    """Say in one line why a file could not be read; libsndfile calls an empty file an unknown format."""
    try:
        status = os.stat(path)
    except OSError as missing:
        return str(missing.strerror)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        return "the file is empty"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return " ".join(reason.split())


def probe_files(
    files: Iterable[tuple[str, str]], total: int, workers: int, label: str
) -> Iterator[tuple[str, str, Probe]]:
    """Probe files in parallel, in their order, with a progress bar on a terminal.

    The work is done by threads: libsndfile runs without the interpreter's lock, so
    they are as fast as processes, and they hide the latency of network disks without
    a process being forked from one that may hold a GPU. At most ``4 * workers``
    chunks of files are under way, however many there are.

    Arguments
    ---------
    files : iterable of (str, str)
        Relative and absolute paths.
    total : int
        How many there will be, for the progress bar.
    workers : int
        Threads; 1 does without.
    label : str
        Stands before the progress bar.

    Yields
    ------
    relative : str
        As given.
    path : str
        As given.
    probe : Probe
        What :func:`probe_audio` found, the same for any number of workers.
    """
    files = iter(files)
    # disable=None: off when stderr is no terminal
    with tqdm(total=total, desc=label, unit="file", disable=None, leave=False) as progress:
        if workers == 1:
            for relative, path in files:
                yield relative, path, probe_audio(path)
                progress.update()
            return
        pool = ThreadPoolExecutor(workers)
        try:
            under_way: deque = deque()
            while True:
                while len(under_way) < 4 * workers and (chunk := list(islice(files, CHUNK))):
                    under_way.append((chunk, pool.submit(_probe_chunk, chunk)))
                if not under_way:
                    return
                chunk, probes = under_way.popleft()
                for (relative, path), probe in zip(chunk, probes.result(), strict=True):
                    yield relative, path, probe
                progress.update(len(chunk))
        finally:
            # also when the one who asked for the files gave up
            pool.shutdown(cancel_futures=True)


def _probe_chunk(chunk: list[tuple[str, str]]) -> list[Probe]:
    return [probe_audio(path) for _, path in chunk]
