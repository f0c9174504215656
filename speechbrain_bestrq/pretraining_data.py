"""Batches of a pre-training: read as planned, with everything random that a step needs, and moved to the device."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from speechbrain_bestrq.audio import FULL_SCALE, AudioTable, as_float, check_damaged
from speechbrain_bestrq.batching import BatchPlan
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.masking import MaskedFrames
from speechbrain_bestrq.pcm_cache import PcmCache
from speechbrain_bestrq.seeding import derive_seed, derived_generator
from speechbrain_bestrq.workers import start_worker

logger = logging.getLogger(__name__)

#: Batches that each process which loads data prepares ahead.
PREFETCH_FACTOR = 4

#: Files that are tried in place of a batch that is all damaged: those next to it may be so too.
MOST_OTHERS = 10


@dataclass(frozen=True)
class PretrainingBatch:
    """A batch of audio with everything random that its step needs."""

    wavs: Tensor
    """Shape (B, N), zeros in padding; float32, or int16 until :meth:`to` has moved half the bytes."""
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
        """Move the tensors; waveforms that are int16 become float32 there, of which 1 is full scale.

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
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.wavs.dtype != torch.int16:
            return moved
        return replace(moved, wavs=moved.wavs.float().mul_(1 / FULL_SCALE))

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
    cache : PcmCache, optional
        Holds the samples of all utterances: the files are left alone.
    max_unreadable : int
        Up to so many files, counted in each process that reads, may turn out to be damaged: in place of what cannot be
        read, a batch has the next of its utterances that can be once more, always the same one, and a warning names
        the file; where it has none, the next utterance of the corpus, again and again until it is as long. For batches
        without padding alone.

    Example
    -------
    >>> import soundfile
    >>> from speechbrain_bestrq.batching import PaddedBatchSampler
    >>> from speechbrain_bestrq.masking import SpanMasking
    >>> folder = getfixture("tmp_path")
    >>> for name, seconds in (("a", 1), ("b", 2)):
    ...     soundfile.write(folder / f"{name}.wav", np.zeros(seconds * 16000), 16000)
    >>> table = AudioTable("ab", [f"{folder}/a.wav", f"{folder}/b.wav"], [1.0, 2.0], sample_rate=16000)
    >>> dataset = WaveformDataset(table, SpanMasking(0.06, 10), lambda samples: (1 + samples // 160) // 4, seed=0)
    >>> plan = next(iter(PaddedBatchSampler(table.lengths, 64000)))
    >>> batch = dataset.__getitems__(plan).to("cpu")
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
        cache: PcmCache | None = None,
        max_unreadable: int = 0,
    ):
        self.table, self.masking, self.frame_lengths, self.cache = table, masking, frame_lengths, cache
        self.seed, self.rank, self.max_unreadable = seed, rank, max_unreadable
        self._unreadable: set[str] = set()

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
            As :func:`~speechbrain_bestrq.audio.read_segment`, if more than ``max_unreadable`` files cannot be read, or
            nothing of the batch can, nor of the utterances next to it.
        """
        available = self.table.lengths[plan.indices]
        lengths = np.minimum(available - plan.starts, plan.samples)
        stretches = zip(plan.indices.tolist(), plan.starts.tolist(), lengths.tolist(), strict=True)
        read = self._read_all(stretches)
        whole = all(audio.dtype == np.int16 for audio in read)
        padded = (lengths < plan.samples).any()
        make = np.zeros if padded else np.empty
        wavs = make((len(lengths), plan.samples), dtype=np.int16 if whole else np.float32)
        for row, audio in zip(wavs, read, strict=True):
            row[: len(audio)] = audio if whole else as_float(audio)
        frames = self.frame_lengths(torch.from_numpy(lengths))
        max_frames = int(self.frame_lengths(torch.tensor([plan.samples])))
        step = (self.seed, self.rank, plan.epoch, plan.number)
        return PretrainingBatch(
            wavs=torch.from_numpy(wavs),
            # times N in float32, rounded, this gives the integers back (exact for N up to 2**21: 131 s)
            wav_lens=torch.from_numpy(lengths / plan.samples).float() if padded else None,
            masked=self.masking(frames, max_frames, derived_generator(*step, 0)),
            noise_seed=derive_seed(*step, 1),
            dropout_seed=derive_seed(*step, 2),
            number=plan.number,
            seconds=float(lengths.sum()) / self.table.sample_rate,
            cut_seconds=float((available - lengths).sum()) / self.table.sample_rate,
        )

    def _read_all(self, stretches: Iterable[tuple[int, int, int]]) -> list[np.ndarray]:
        """The stretches of a batch; where one cannot be read, the next that can, with the first after the last."""
        read: list[np.ndarray | None] = []
        for index, start, samples in stretches:
            try:
                read.append(self._read(index, start, samples))
            except InputError as error:
                self._pass_over(self.table.path(index), error)
                read.append(None)
                last_error = error
        readable = [row for row, audio in enumerate(read) if audio is not None]
        if not readable:
            read[-1] = self._read_another(index, samples, last_error)
            readable = [len(read) - 1]
        following = np.searchsorted(readable, np.arange(len(read))) % len(readable)
        return [read[readable[place]] for place in following]

    def _read_another(self, index: int, samples: int, error: InputError) -> np.ndarray:
        """The next utterance that can be read, as often as it takes to be as long."""
        tried = {self.table.path(index)}
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if len(tried) > MOST_OTHERS:
                break
            if self.table.path(other) in tried:  # another part of a long recording
                continue
            try:
                return np.resize(self._read(other, 0, min(samples, int(self.table.lengths[other]))), samples)
            except InputError:
                tried.add(self.table.path(other))
        raise InputError(f"nothing of a batch can be read, nor what could stand for it: {error}") from error

    def _pass_over(self, path: str, error: InputError) -> None:
        """Name a file that cannot be read, once; refuse it when there are too many of them."""
        if path in self._unreadable:
            return
        self._unreadable.add(path)
        check_damaged(len(self._unreadable), self.max_unreadable, error)
        logger.warning(
            "%s Do so before the run is started again; until then another utterance is heard instead.",
            error,
        )

    def _read(self, index: int, start: int, samples: int) -> np.ndarray:
        """A stretch of an utterance, int16 or float32."""
        if self.cache is not None:
            return self.cache.read(index, start, samples)
        return self.table.read(index, start, samples)


def _identity(batch: PretrainingBatch) -> PretrainingBatch:
    return batch


def make_loader(
    dataset: WaveformDataset,
    sampler: torch.utils.data.Sampler[BatchPlan],
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int = PREFETCH_FACTOR,
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
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if num_workers else None,  # Python's default since 3.14 would pickle the model
        generator=torch.Generator(),
    )
