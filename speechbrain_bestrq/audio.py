"""Reading audio: what the manifest lists, and stretches of its files."""

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio

from speechbrain_bestrq.errors import InputError

MISSING_SECONDS = 0.04
"""How much a file may be shorter than its manifest says: one encoder frame."""
MAX_RESAMPLING_WEIGHTS = 2**24
"""Weights of the largest resampling kernel: 64 MB."""
FULL_SCALE = 32768
"""The int16 step of a sample of 1."""
VORBIS_TAIL_SECONDS = 20.0
"""No seek goes closer to the end of Ogg Vorbis: within its last page, which silence makes long, libsndfile (1.2) lands
up to some 30 ms aside (its issue 885)."""
MPEG_PRIMING_FRAMES = 10 * 1152
"""A seek in MP3 goes so much before the place: libsndfile (1.2) does not always let its decoder have the frames before
the one that it lands in, and gives up to some hundred wrong samples then."""
#: Without the file, the lengths would be others, and a checkpoint amid an epoch of no use any more.
_REMEDY = "restore it, or put any readable audio of the same length in its place"


class _Unfit(Exception):  # noqa: N818 - becomes an InputError that names the file
    """What is wrong with a file that can be decoded."""


class _Strings:
    """Many strings in one array, which forked processes share: counting references writes to no page of it."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


class AudioTable:
    """Names, files, places and lengths of a set of utterances, in a few arrays.

    A manifest of 281,000 utterances is hundreds of MB of Python objects, and is
    copied page by page into each loading worker as its references are counted; this is
    about 150 bytes an utterance, once.

    Arguments
    ---------
    names : iterable of str
        Name of each utterance.
    paths : iterable of str
        File of each utterance.
    seconds : array_like
        Duration of each utterance, in seconds, shape (U,).
    sample_rate : int
        Samples per second after reading.
    starts : array_like, optional
        First sample of each utterance in its file, counted at ``sample_rate``, shape (U,); 0 if left out.

    Example
    -------
    >>> table = AudioTable(["a", "b"], ["/audio/a.flac", "/audio/b.flac"], [1.0, 2.5], sample_rate=16000)
    >>> len(table), table.lengths.tolist(), table.name(1), table.path(0), round(table.hours * 3600, 3)
    (2, [16000, 40000], 'b', '/audio/a.flac', 3.5)
    """

    def __init__(
        self, names: Iterable[str], paths: Iterable[str], seconds: Any, sample_rate: int, starts: Any | None = None
    ):
        self.sample_rate = sample_rate
        self.lengths = np.rint(np.asarray(seconds, dtype=np.float64) * sample_rate).astype(np.int64)
        """Samples of each utterance at ``sample_rate``, int64, shape (U,)."""
        self.starts = np.zeros_like(self.lengths) if starts is None else np.asarray(starts, dtype=np.int64)
        """First sample of each utterance in its file, int64, shape (U,)."""
        self.too_short = 0
        """Utterances that :meth:`from_manifest` left out as too short."""
        self.hours_left_out = 0.0
        """Hours of these."""
        self.recordings_cut = 0
        """Recordings that :meth:`from_manifest` cut into utterances, as too long."""
        self._names, self._paths = _Strings(names), _Strings(paths)

    @classmethod
    def from_manifest(
        cls,
        data: Mapping[str, Mapping[str, Any]],
        sample_rate: int = 16000,
        min_seconds: float = 0.0,
        max_seconds: float = math.inf,
    ) -> "AudioTable":
        """Take the utterances of a manifest; recordings that are too long are cut, those too short left out.

        A long recording becomes as few parts of equal length (to a sample) as there have to be. Nothing of it is
        lost, and each of its parts begins where the one before ends, be it within a word.

        Arguments
        ---------
        data : mapping
            For each name a row with ``wav`` (path) and ``duration`` (seconds).
        sample_rate : int
            Samples per second after reading.
        min_seconds : float
            Shorter ones, parts of long ones among them, are left out and counted.
        max_seconds : float
            Longer ones are cut and counted.

        Returns
        -------
        AudioTable
            In the order of the manifest. Part number n of the recording "a" is named "a#n", from 0 on.

        Raises
        ------
        InputError
            If no utterance is left, or ``max_seconds`` holds no sample.

        Example
        -------
        >>> data = {"a": {"wav": "/a.wav", "duration": 0.5}, "b": {"wav": "/b.wav", "duration": 5.0}}
        >>> table = AudioTable.from_manifest(data, min_seconds=2.0, max_seconds=3.0)
        >>> [table.name(index) for index in range(len(table))], table.starts.tolist(), table.lengths.tolist()
        (['b#0', 'b#1'], [0, 40000], [40000, 40000])
        >>> table.too_short, table.recordings_cut
        (1, 1)
        """
        longest = np.floor(max_seconds * sample_rate + 1e-6)  # 16.06 s at 16 kHz is a hair less than its samples
        if not longest >= 1:
            raise InputError(f"max_seconds = {max_seconds:g} holds no sample: raise it.")
        seconds = np.fromiter((float(row["duration"]) for row in data.values()), np.float64, len(data))
        samples = np.rint(seconds * sample_rate).astype(np.int64)
        parts = np.maximum(np.ceil(samples / longest), 1).astype(np.int64)
        # of each part: its recording, its number there, where it begins and ends
        recording = np.repeat(np.arange(len(data)), parts)
        number = np.arange(len(recording)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts, ends = (samples[recording] * at // parts[recording] for at in (number, number + 1))
        lengths = np.where(parts[recording] > 1, (ends - starts) / sample_rate, seconds[recording])
        keep = lengths >= min_seconds
        if not keep.any():
            raise InputError(
                f"no utterance is left of {len(data)}: all are shorter than min_seconds = {min_seconds:g}, or are once "
                f"they are cut to max_seconds = {max_seconds:g}: widen these bounds or check the manifest."
            )
        known = list(data)
        kept = [(known[r], n if parts[r] > 1 else None) for r, n in zip(recording[keep], number[keep], strict=True)]
        table = cls(
            (name if n is None else f"{name}#{n}" for name, n in kept),
            (str(data[name]["wav"]) for name, _ in kept),
            lengths[keep],
            sample_rate,
            starts[keep],
        )
        table.too_short, table.hours_left_out = int((~keep).sum()), float(lengths[~keep].sum()) / 3600
        table.recordings_cut = int((parts > 1).sum())
        return table

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self.lengths)

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return float(self.lengths.sum()) / self.sample_rate / 3600

    def name(self, index: int) -> str:
        """Give the name of an utterance.

        Arguments
        ---------
        index : int
            In [0, U).

        Returns
        -------
        str
        """
        return self._names[index]

    def path(self, index: int) -> str:
        """Give the file of an utterance.

        Arguments
        ---------
        index : int
            In [0, U).

        Returns
        -------
        str
        """
        return self._paths[index]

    def read(self, index: int, start: int, samples: int) -> np.ndarray:
        """Read a stretch of an utterance.

        Arguments
        ---------
        index : int
            Of the utterance, in [0, U).
        start, samples : int
            The stretch, counted from the utterance's first sample.

        Returns
        -------
        numpy.ndarray
            As :func:`read_samples`.

        Raises
        ------
        InputError
            As :func:`read_segment`.
        """
        return read_samples(self.path(index), int(self.starts[index]) + start, samples, self.sample_rate)

    def read_run(self, run: range) -> Iterator[np.ndarray]:
        """Read utterances that follow each other in the table and are parts of one file.

        Arguments
        ---------
        run : range
            Their numbers, in [0, U).

        Yields
        ------
        numpy.ndarray
            Of each, as :func:`read_samples`.

        Raises
        ------
        InputError
            As :func:`read_segment`.
        """
        stretches = [(int(self.starts[index]), int(self.lengths[index])) for index in run]
        yield from read_stretches(self.path(run[0]), stretches, self.sample_rate)


def stat_audio(path: str) -> os.stat_result:
    """Ask for size and time of an audio file, without reading it.

    Arguments
    ---------
    path : str
        The file.

    Returns
    -------
    os.stat_result

    Raises
    ------
    InputError
        If it is gone, or may not be asked.

    Example
    -------
    >>> stat_audio("/nowhere/a.wav")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: /nowhere/a.wav cannot be read (No such file or directory): restore it, or \
prepare the corpus again.
    """
    try:
        return os.stat(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): restore it, or prepare the corpus again."
        ) from error


def check_damaged(files: int, most: int, last: InputError) -> None:
    """Refuse more damaged files of the training audio than are allowed.

    Arguments
    ---------
    files : int
        So many cannot be read.
    most : int
        ``max_unreadable``.
    last : InputError
        What is wrong with one of them.

    Raises
    ------
    InputError
        That error itself where none is allowed.
    """
    if files and not most:
        raise last
    if files > most:
        raise InputError(f"more than max_unreadable = {most} files of the training audio are damaged: {last}") from last


def read_segment(path: str, start: int, samples: int, sample_rate: int = 16000, remedy: str = _REMEDY) -> np.ndarray:
    """Read a stretch of an audio file, at a given rate and in one channel.

    Only the stretch is read and decoded. A file of another rate is resampled, with so
    much audio on both sides that the result equals the same stretch of the whole resampled
    file. Channels are averaged. A file that ends up to 40 ms early is filled up
    with zeros.

    Arguments
    ---------
    path : str
        The file, of a format that libsndfile reads (wav, flac, ogg, opus, mp3...).
    start : int
        First sample, counted at ``sample_rate``.
    samples : int
        Number of samples at ``sample_rate``.
    sample_rate : int
        Samples per second of the result.
    remedy : str
        What an error says that helps.

    Returns
    -------
    numpy.ndarray
        float32, shape (samples,).

    Raises
    ------
    InputError
        If the file is gone, cannot be decoded, is shorter than that, or has a rate
        that cannot be resampled with reasonable effort.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> soundfile.write(folder / "a.wav", np.linspace(-0.5, 0.5, 8000), 8000)
    >>> read_segment(str(folder / "a.wav"), start=4000, samples=8000, sample_rate=16000).shape
    (8000,)
    """
    return as_float(read_samples(path, start, samples, sample_rate, remedy))


def as_float(audio: np.ndarray) -> np.ndarray:
    """Give samples as float32, of which 1 is full scale: exactly, in whatever form they are kept.

    Arguments
    ---------
    audio : numpy.ndarray
        int16 or float32.

    Returns
    -------
    numpy.ndarray
        float32, of the same shape.

    Example
    -------
    >>> as_float(np.array([-32768, 16384], dtype=np.int16))
    array([-1. ,  0.5], dtype=float32)
    """
    return audio.astype(np.float32) * np.float32(1 / FULL_SCALE) if audio.dtype == np.int16 else audio


def read_samples(path: str, start: int, samples: int, sample_rate: int = 16000, remedy: str = _REMEDY) -> np.ndarray:
    """Read a stretch of an audio file in the form that is quickest to hand on.

    Arguments
    ---------
    path, start, samples, sample_rate, remedy
        As for :func:`read_segment`.

    Returns
    -------
    numpy.ndarray
        Shape (samples,): int16 if the file holds one channel of 16-bit integers at that rate, as
        LibriSpeech's do, else float32.

    Raises
    ------
    InputError
        As :func:`read_segment`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.flac"
    >>> soundfile.write(path, np.array([0, 1, -2], dtype=np.int16), 16000)
    >>> read_samples(str(path), 1, 2)
    array([ 1, -2], dtype=int16)
    """
    (audio,) = read_stretches(path, [(start, samples)], sample_rate, remedy)
    return audio


def read_stretches(
    path: str, stretches: Iterable[tuple[int, int]], sample_rate: int = 16000, remedy: str = _REMEDY
) -> Iterator[np.ndarray]:
    """Read stretches of one audio file, which is opened once.

    Looking for a place in compressed audio goes through all that lies before it (mp3: two seconds for each hour),
    but only once while the file stays open.

    Arguments
    ---------
    path, sample_rate, remedy
        As for :func:`read_segment`.
    stretches : iterable of (int, int)
        First sample and number of samples of each.

    Yields
    ------
    numpy.ndarray
        Of each, as :func:`read_samples`.

    Raises
    ------
    InputError
        As :func:`read_segment`.

    Example
    -------
    >>> path = getfixture("tmp_path") / "a.flac"
    >>> soundfile.write(path, np.array([0, 1, -2], dtype=np.int16), 16000)
    >>> [stretch.tolist() for stretch in read_stretches(str(path), [(0, 1), (1, 2)])]
    [[0], [1, -2]]
    """
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # a name may be no UTF-8
            for start, samples in stretches:
                yield _read_stretch(file, start, samples, sample_rate)
    except _Unfit as error:
        raise InputError(f"{path} {error}; {remedy}.") from error
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it was moved, or is damaged; {remedy}.") from error


def _read_stretch(file: soundfile.SoundFile, start: int, samples: int, sample_rate: int) -> np.ndarray:
    if file.samplerate == sample_rate:
        whole = file.subtype == "PCM_16" and file.channels == 1
        audio = _read(file, start, samples, "int16" if whole else "float32")
    else:
        audio = _read_resampled(file, start, samples, sample_rate)
    missing = samples - len(audio)
    if missing > MISSING_SECONDS * sample_rate:
        raise _Unfit(
            f"ends {missing / sample_rate:.2f} s before the end that was found when it was looked at: it was changed "
            "or cut short"
        )
    return np.pad(audio, (0, missing)) if missing else audio


def _read(file: soundfile.SoundFile, start: int, frames: int, dtype: str = "float32") -> np.ndarray:
    """Read up to `frames` frames at the file's own rate, channels averaged."""
    start = min(start, file.frames)
    first = start
    if file.subtype == "VORBIS":
        first = min(start, max(file.frames - round(VORBIS_TAIL_SECONDS * file.samplerate), 0))
    elif file.subtype.startswith("MPEG"):
        first = max(start - MPEG_PRIMING_FRAMES, 0)
    file.seek(first)
    audio = file.read(start - first + frames, dtype=dtype, always_2d=True)[start - first :]
    if (
        file.subtype in ("FLOAT", "DOUBLE") and not np.isfinite(audio).all()
    ):  # would make losses and statistics no numbers
        raise _Unfit("has samples that are no numbers, or infinite")
    return audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1, dtype=np.float32)


def _read_resampled(file: soundfile.SoundFile, start: int, samples: int, sample_rate: int) -> np.ndarray:
    # Frame `n * down` of the file falls on sample `n * up` of the result: whole blocks n keep the filter's phase.
    divisor = math.gcd(file.samplerate, sample_rate)
    down, up = file.samplerate // divisor, sample_rate // divisor
    if not can_resample(file.samplerate, sample_rate):
        raise InputError(
            f"{os.fsdecode(file.name)} has {file.samplerate} samples per second, which cannot be resampled to "
            f"{sample_rate} with reasonable effort: convert it to a common rate, and prepare the corpus again."
        )
    resampler = _resampler(file.samplerate, sample_rate)
    margin = math.ceil(resampler.width / down)
    first = max(start // up - margin, 0)
    last = (start + samples - 1) // up + 1 + margin
    audio = _read(file, first * down, (last - first) * down)
    if not len(audio):
        return audio
    with torch.inference_mode():
        resampled = resampler(torch.from_numpy(audio)).numpy()
    return resampled[start - first * up :][:samples]


def can_resample(rate: int, sample_rate: int) -> bool:
    """Tell whether audio of a rate can be resampled to another with reasonable effort.

    Arguments
    ---------
    rate, sample_rate : int
        Samples per second.

    Returns
    -------
    bool

    Example
    -------
    >>> can_resample(44100, 16000), can_resample(22254, 16000)
    (True, False)
    """
    return rate * sample_rate // math.gcd(rate, sample_rate) ** 2 <= MAX_RESAMPLING_WEIGHTS


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    """Give the resampler of two rates, whose filter takes longer to make than to use."""
    return torchaudio.transforms.Resample(rate, sample_rate)
