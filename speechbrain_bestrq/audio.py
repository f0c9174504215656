"""Reading audio: what the manifest lists, stretches of its files, and batches of them."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from speechbrain_bestrq.batching import BatchPlan
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.masking import MaskedFrames
from speechbrain_bestrq.seeding import derive_seed, derived_generator
from speechbrain_bestrq.stopping import leave_stopping_to_parent

MISSING_SECONDS = 0.04
"""How much a file may be shorter than its manifest says: one encoder frame."""
MAX_RESAMPLING_WEIGHTS = 2**24
"""Weights of the largest resampling kernel: 64 MB."""


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
    """Names, files and lengths of a set of utterances, in a few arrays.

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

    Example
    -------
    >>> table = AudioTable(["a", "b"], ["/audio/a.flac", "/audio/b.flac"], [1.0, 2.5], sample_rate=16000)
    >>> len(table), table.lengths.tolist(), table.name(1), table.path(0), round(table.hours * 3600, 3)
    (2, [16000, 40000], 'b', '/audio/a.flac', 3.5)
    """

    def __init__(self, names: Iterable[str], paths: Iterable[str], seconds: Any, sample_rate: int):
        self.sample_rate = sample_rate
        self.lengths = np.rint(np.asarray(seconds, dtype=np.float64) * sample_rate).astype(np.int64)
        """Samples of each utterance at ``sample_rate``, int64, shape (U,)."""
        self.too_short = 0
        """Utterances that :meth:`from_manifest` left out as too short."""
        self.too_long = 0
        """Utterances that :meth:`from_manifest` left out as too long."""
        self.hours_left_out = 0.0
        """Hours of both."""
        self._names, self._paths = _Strings(names), _Strings(paths)

    @classmethod
    def from_manifest(
        cls,
        data: Mapping[str, Mapping[str, Any]],
        sample_rate: int = 16000,
        min_seconds: float = 0.0,
        max_seconds: float = math.inf,
    ) -> "AudioTable":
        """Take the utterances of a manifest that are neither too short nor too long.

        Arguments
        ---------
        data : mapping
            For each name a row with ``wav`` (path) and ``duration`` (seconds).
        sample_rate : int
            Samples per second after reading.
        min_seconds : float
            Shorter ones are left out and counted.
        max_seconds : float
            Longer ones are left out and counted.

        Returns
        -------
        AudioTable
            In the order of the manifest.

        Raises
        ------
        InputError
            If no utterance is left.

        Example
        -------
        >>> data = {"a": {"wav": "/a.wav", "duration": 0.5}, "b": {"wav": "/b.wav", "duration": 3.0}}
        >>> table = AudioTable.from_manifest(data, min_seconds=2.0)
        >>> len(table), table.too_short, table.too_long
        (1, 1, 0)
        """
        seconds = np.fromiter((float(row["duration"]) for row in data.values()), np.float64, len(data))
        short, long = seconds < min_seconds, seconds > max_seconds
        keep = ~(short | long)
        if not keep.any():
            raise InputError(
                f"no utterance is left of {len(data)}: {short.sum()} are shorter than min_seconds = {min_seconds:g}, "
                f"{long.sum()} longer than max_seconds = {max_seconds:g}: widen these bounds or check the manifest."
            )
        kept = [name for name, keeps in zip(data, keep, strict=True) if keeps]
        table = cls(kept, (str(data[name]["wav"]) for name in kept), seconds[keep], sample_rate)
        table.too_short, table.too_long = int(short.sum()), int(long.sum())
        table.hours_left_out = float(seconds[~keep].sum()) / 3600
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


def read_segment(path: str, start: int, samples: int, sample_rate: int = 16000) -> np.ndarray:
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
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate == sample_rate:
                audio = _read(file, start, samples)
            else:
                audio = _read_resampled(file, start, samples, sample_rate)
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): it was moved, or is damaged; restore it, or delete it and start again."
        ) from error
    missing = samples - len(audio)
    if missing > MISSING_SECONDS * sample_rate:
        raise InputError(
            f"{path} ends {missing / sample_rate:.2f} s before its manifest says: it was changed or cut short after "
            "its preparation; restore it, or delete it and start again."
        )
    return np.pad(audio, (0, missing)) if missing else audio


def _read(file: soundfile.SoundFile, start: int, frames: int) -> np.ndarray:
    """Read up to `frames` frames at the file's own rate, channels averaged."""
    file.seek(min(start, file.frames))
    audio = file.read(frames, dtype="float32", always_2d=True)
    return audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1, dtype=np.float32)


def _read_resampled(file: soundfile.SoundFile, start: int, samples: int, sample_rate: int) -> np.ndarray:
    # Frame `n * down` of the file falls on sample `n * up` of the result: whole blocks n keep the filter's phase.
    divisor = math.gcd(file.samplerate, sample_rate)
    down, up = file.samplerate // divisor, sample_rate // divisor
    if down * up > MAX_RESAMPLING_WEIGHTS:
        raise InputError(
            f"{file.name} has {file.samplerate} samples per second, which cannot be resampled to {sample_rate} with "
            "reasonable effort: convert it to a common rate, and prepare the corpus again."
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


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, sample_rate: int) -> torchaudio.transforms.Resample:
    """Give the resampler of two rates, whose filter takes longer to make than to use."""
    return torchaudio.transforms.Resample(rate, sample_rate)


@dataclass(frozen=True)
class PretrainingBatch:
    """A batch of audio with everything random that its step needs."""

    wavs: Tensor
    """float32, shape (B, N); zeros in padding."""
    wav_lens: Tensor | None
    """Lengths relative to N, float32, shape (B,); None if nothing is padded."""
    masked: MaskedFrames
    """The encoder frames to predict."""
    noise_seed: int
    """Seed of the filler noise, which is drawn on the device."""
    dropout_seed: int
    """Seed of what else the step draws."""
    number: int
    """Of the batch plan: place of the batch in its epoch."""
    seconds: float
    """Audio in the batch, without padding."""
    cut_seconds: float
    """Audio of the same utterances that was cut off."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PretrainingBatch":
        """Move the tensors.

        Arguments
        ---------
        device : torch.device or str
            Where to.
        non_blocking : bool
            Do not wait for the copy, if the batch is in pinned memory.

        Returns
        -------
        PretrainingBatch
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PretrainingBatch":
        """Copy the tensors to pinned memory.

        Returns
        -------
        PretrainingBatch
        """
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PretrainingBatch":
        return replace(
            self,
            wavs=function(self.wavs),
            wav_lens=None if self.wav_lens is None else function(self.wav_lens),
            masked=self.masked._replace(mask=function(self.masked.mask), indices=function(self.masked.indices)),
        )


class WaveformDataset(torch.utils.data.Dataset):
    """Reads the batches that a batch sampler plans, and draws their masks.

    Mask and seeds are functions of (seed, rank, epoch, number of the batch), whatever
    process prepares it.

    Arguments
    ---------
    table : AudioTable
        The utterances.
    masking : callable
        ``masking(lengths, max_length, generator) -> MaskedFrames`` in encoder frames, as
        :class:`~speechbrain_bestrq.masking.SpanMasking`.
    frame_lengths : callable
        Gives the encoder frames of so many samples: int64 (B,) -> int64 (B,).
    seed : int
        Seed of the run.
    rank : int
        This process. 0 on all ranks in validation, so that masks do not depend on the number of
        processes.

    Example
    -------
    >>> from speechbrain_bestrq.batching import PaddedBatchSampler
    >>> from speechbrain_bestrq.masking import SpanMasking
    >>> folder = getfixture("tmp_path")
    >>> for name, seconds in (("a", 1), ("b", 2)):
    ...     soundfile.write(folder / f"{name}.wav", np.zeros(seconds * 16000), 16000)
    >>> table = AudioTable("ab", [f"{folder}/a.wav", f"{folder}/b.wav"], [1.0, 2.0], sample_rate=16000)
    >>> dataset = WaveformDataset(table, SpanMasking(0.06, 10), lambda samples: (1 + samples // 160) // 4, seed=0)
    >>> plan = next(iter(PaddedBatchSampler(table.lengths, 64000)))
    >>> batch = dataset.__getitems__(plan)
    >>> batch.wavs.shape, batch.wav_lens, batch.masked.mask.shape, batch.seconds
    (torch.Size([2, 32000]), tensor([1.0000, 0.5000]), torch.Size([2, 50]), 3.0)
    """

    def __init__(
        self,
        table: AudioTable,
        masking: Callable[[Tensor, int, torch.Generator], MaskedFrames],
        frame_lengths: Callable[[Tensor], Tensor],
        seed: int = 0,
        rank: int = 0,
    ):
        self.table, self.masking, self.frame_lengths = table, masking, frame_lengths
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        """Number of utterances."""
        return len(self.table)

    def __getitems__(self, plan: BatchPlan) -> PretrainingBatch:
        """Read a batch.

        Arguments
        ---------
        plan : BatchPlan
            Utterances, where they start, and the length of the batch.

        Returns
        -------
        PretrainingBatch

        Raises
        ------
        InputError
            As :func:`read_segment`.
        """
        whole = self.table.lengths[plan.indices]
        lengths = np.minimum(whole - plan.starts, plan.samples)
        wavs = np.zeros((len(lengths), plan.samples), dtype=np.float32)
        for row, (index, start, length) in enumerate(zip(plan.indices, plan.starts, lengths, strict=True)):
            wavs[row, :length] = read_segment(
                self.table.path(int(index)), int(start), int(length), self.table.sample_rate
            )
        frames = self.frame_lengths(torch.from_numpy(lengths))
        max_frames = int(self.frame_lengths(torch.tensor([plan.samples])))
        step = (self.seed, self.rank, plan.epoch, plan.number)
        return PretrainingBatch(
            wavs=torch.from_numpy(wavs),
            # times N in float32, rounded, this gives the integers back (exact for N up to 2**21: 131 s)
            wav_lens=None if (lengths == plan.samples).all() else torch.from_numpy(lengths / plan.samples).float(),
            masked=self.masking(frames, max_frames, derived_generator(*step, 0)),
            noise_seed=derive_seed(*step, 1),
            dropout_seed=derive_seed(*step, 2),
            number=plan.number,
            seconds=float(lengths.sum()) / self.table.sample_rate,
            cut_seconds=float((whole - lengths).sum()) / self.table.sample_rate,
        )


def _identity(batch: PretrainingBatch) -> PretrainingBatch:
    return batch


def make_loader(
    dataset: WaveformDataset,
    sampler: torch.utils.data.Sampler[BatchPlan],
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
) -> torch.utils.data.DataLoader:
    """Make the loader of planned batches.

    What it gives does not depend on the number of workers. Iterating draws nothing from the
    global generator, so that a run stopped within an epoch and resumed goes on as if
    unbroken.

    Arguments
    ---------
    dataset : WaveformDataset
        Reads the batches.
    sampler : Sampler
        Plans them: a ``LadderBatchSampler`` or a ``PaddedBatchSampler``.
    num_workers : int
        Processes that read; 0 reads in this one. Each uses one thread.
    pin_memory : bool
        Give batches in pinned memory, for a GPU.
    prefetch_factor : int
        Batches each worker prepares ahead.

    Returns
    -------
    DataLoader
        Gives :class:`PretrainingBatch`.
    """
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_stopping_to_parent,
        generator=torch.Generator(),
    )
