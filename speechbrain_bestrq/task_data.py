"""Labelled utterances for the downstream tasks: which of them, read how, in which batches."""

import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor

from speechbrain_bestrq.allocator import give_back_now_and_then
from speechbrain_bestrq.audio import read_segment
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import is_gpu
from speechbrain_bestrq.ranks import rank_and_size
from speechbrain_bestrq.seeding import derive_seed, derived_generator
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.workers import start_worker

Rows = Mapping[str, Mapping[str, Any]]

#: How much the length of an utterance is varied before sorting, so that an epoch's batches differ from the last's.
LENGTH_JITTER = 0.1


class TaskBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Batches of whole utterances of similar length.

    Algorithm, for training. Each length is multiplied by a random factor within 10 % of one,
    the utterances are sorted by the result, and consecutive ones make a batch until
    the next would take it, padded, beyond ``max_batch_seconds`` or beyond ``max_batch_size``. The
    batches are shuffled. Rank r takes every ``world_size``-th from r on; the last few
    batches are given twice where their number is no multiple of ``world_size``, so that all ranks
    have equally many. Everything is a function of (seed, epoch).

    For evaluation nothing is drawn, and each rank has all batches: SpeechBrain's Brain
    evaluates the whole set on every rank.

    Arguments
    ---------
    seconds : array_like
        Duration of each utterance, shape (U,).
    max_batch_seconds : float
        Most audio in a batch, padding included; a longer utterance is a batch of its own.
    training : bool
        Whether to draw.
    max_batch_size : int, optional
        Most utterances in a batch.
    seed : int
        Of the draws.
    rank, world_size : int
        This process, and their number.

    Example
    -------
    >>> sampler = TaskBatchSampler([1.0, 9.0, 1.1, 8.0], max_batch_seconds=18, training=False)
    >>> list(sampler)
    [[1, 3], [2, 0]]
    """

    def __init__(
        self,
        seconds: Any,
        max_batch_seconds: float,
        training: bool,
        max_batch_size: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.seconds = np.asarray(seconds, dtype=np.float64)
        if not len(self.seconds):
            raise InputError("there are no utterances to make batches of: check the manifest and what was left out.")
        if max_batch_seconds <= 0 or (max_batch_size or 1) < 1:
            raise InputError(
                f"max_batch_seconds and max_batch_size must be above 0, not {max_batch_seconds} and {max_batch_size}."
            )
        self.max_batch_seconds, self.max_batch_size = max_batch_seconds, max_batch_size or len(self.seconds)
        self.training, self.seed = training, seed
        self.rank, self.world_size = (rank, world_size) if training else (0, 1)
        self.start = 0
        """Batches of an epoch that are passed over, because they were trained on before."""
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plan an epoch.

        Arguments
        ---------
        epoch : int
            Its number.
        """
        self.epoch = epoch
        sizes = self.seconds
        if self.training:
            generator = derived_generator(self.seed, epoch)
            factors = 1 + LENGTH_JITTER * (2 * torch.rand(len(sizes), generator=generator).numpy() - 1)
            sizes = sizes * factors
        batches = self._cut(np.argsort(-sizes, kind="stable"))
        if self.training:
            batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
            missing = -len(batches) % self.world_size
            batches += [batches[place % len(batches)] for place in range(missing)]
        self._batches = batches[self.rank :: self.world_size]

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        longest = 0.0
        for index in order.tolist():
            longest = max(longest, self.seconds[index])
            size = len(batches[-1]) + 1 if batches else math.inf
            if size > self.max_batch_size or size * longest > self.max_batch_seconds:
                batches.append([])
                longest = self.seconds[index]
            batches[-1].append(index)
        return batches

    def __len__(self) -> int:
        """Batches of this rank in this epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches[self.start :]


class RandomChunks:
    """Which stretch of an utterance is heard in an epoch: a function of (seed, epoch, name), on any rank and worker.

    Arguments
    ---------
    sampler : TaskBatchSampler
        Knows the epoch.
    seconds : float
        Length of a chunk. Shorter utterances are heard whole.
    sample_rate : int
        Samples per second.

    Example
    -------
    >>> chunks = RandomChunks(TaskBatchSampler([3.0], max_batch_seconds=9, training=True), seconds=3.0)
    >>> start, samples = chunks("a", 160000)
    >>> 0 <= start <= 160000 - samples, samples
    (True, 48000)
    >>> chunks("a", 16000)
    (0, 16000)
    """

    def __init__(self, sampler: TaskBatchSampler, seconds: float, sample_rate: int = 16000):
        self.sampler, self.samples = sampler, round(seconds * sample_rate)

    def __call__(self, name: str, samples: int) -> tuple[int, int]:
        """Give the first sample of an utterance's chunk and the number of samples."""
        if samples <= self.samples:
            return 0, samples
        seed = derive_seed(self.sampler.seed, self.sampler.epoch, zlib.crc32(os.fsencode(name)))
        return seed % (samples - self.samples + 1), self.samples


def make_dataset(
    rows: Rows,
    sample_rate: int = 16000,
    hidden: Mapping[str, Tensor] | None = None,
    chunks: RandomChunks | None = None,
) -> DynamicItemDataset:
    """Make a dataset whose item ``sig`` is the waveform of an utterance, or ``hidden`` its cached hidden states.

    Arguments
    ---------
    rows : mapping
        Of a manifest, as :func:`speechbrain_bestrq.corpora.manifest.read_manifest` gives
        them.
    sample_rate : int
        Samples per second of the waveforms.
    hidden : mapping, optional
        A :class:`speechbrain_bestrq.feature_cache.FeatureCache` of these utterances: the audio
        is left alone then.
    chunks : RandomChunks, optional
        Give these stretches of the waveforms; the utterances are heard whole if left out.

    Returns
    -------
    DynamicItemDataset
        With the items ``id`` and ``sig`` (float32, shape (N,)) or ``hidden`` (float32,
        shape (T, S, D)) as output; recipes add their targets.

    Example
    -------
    >>> import numpy, soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, numpy.zeros(8000), 8000)
    >>> dataset = make_dataset({"a": {"wav": str(path), "duration": 1.0}})
    >>> dataset[0]["sig"].shape
    torch.Size([16000])
    """

    def read_audio(name: str, wav: str, duration: float) -> Tensor:
        samples = round(float(duration) * sample_rate)
        start, samples = (0, samples) if chunks is None else chunks(name, samples)
        return torch.from_numpy(read_segment(wav, start, samples, sample_rate))

    if hidden is None:
        item = {"func": read_audio, "takes": ["id", "wav", "duration"], "provides": "sig"}
    else:
        item = {"func": hidden.__getitem__, "takes": ["id"], "provides": "hidden"}
    return DynamicItemDataset(dict(rows), [item], ["id", item["provides"]])


def make_task_loader(
    dataset: DynamicItemDataset,
    sampler: TaskBatchSampler,
    num_workers: int = 0,
    device: torch.device | str | None = None,
) -> torch.utils.data.DataLoader:
    """Make the loader of a dataset's padded batches.

    Arguments
    ---------
    dataset : DynamicItemDataset
        Its outputs are padded where they are tensors.
    sampler : TaskBatchSampler
        Over the same utterances in the same order.
    num_workers : int
        Processes that read; 0 reads in this one.
    device : torch.device or str, optional
        Where the batches go: for a GPU, and for nothing else, their memory is pinned. SpeechBrain's own choice, if left
        out.

    Returns
    -------
    DataLoader
        Of SpeechBrain's ``PaddedBatch``.
    """
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=PaddedBatch,
        num_workers=num_workers,
        pin_memory=is_gpu(device),
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if num_workers else None,  # Python's default since 3.14 would pickle all of it
        generator=torch.Generator(),
    )


def encode_rows(
    encoder: TaskEncoder, rows: Rows, sample_rate: int, max_batch_seconds: float, device: torch.device | str
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Give the hidden states of utterances, batch by batch.

    Arguments
    ---------
    encoder : TaskEncoder
        On the device, in the mode that it is to run in.
    rows : mapping
        Of a manifest.
    sample_rate : int
        Of the waveforms, Hz.
    max_batch_seconds : float
        Of a batch, padding included.
    device : torch.device or str

    Yields
    ------
    names : list of str
        The longest utterances first.
    hidden : Tensor
        Shape (S, B, T, D), float32.
    lengths : Tensor
        Frames, int64, shape (B,).

    Example
    -------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "second.wav"
    >>> soundfile.write(path, np.zeros(16000), 16000)
    >>> rows = {"a": {"wav": str(path), "duration": 1.0}}
    >>> names, hidden, lengths = next(encode_rows(TaskEncoder("fbank"), rows, 16000, 60.0, "cpu"))
    >>> names, hidden.shape, lengths.tolist()
    (['a'], torch.Size([1, 1, 25, 320]), [25])
    """
    sampler = TaskBatchSampler([float(row["duration"]) for row in rows.values()], max_batch_seconds, training=False)
    for number, batch in enumerate(make_task_loader(make_dataset(rows, sample_rate), sampler, device=device), start=1):
        give_back_now_and_then(number)
        wavs, wav_lens = batch.sig
        hidden, lengths = encoder(wavs.to(device), wav_lens.to(device))
        yield batch.id, hidden.float(), lengths


def make_task_loaders(
    hparams: Mapping[str, Any],
    sets: Mapping[str, Rows],
    items: Sequence[Any],
    outputs: Sequence[str],
    hidden: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.utils.data.DataLoader]:
    """Make the loaders of a recipe: of its training set, shuffled and shared out over the ranks, and of the others.

    Arguments
    ---------
    hparams : mapping
        With "sample_rate", "seed", "num_workers", "max_batch_seconds", "max_batch_size" and
        "max_eval_batch_seconds"; with "chunk_seconds", training hears
        :class:`RandomChunks` of that length.
    sets : mapping
        The rows of "train" and of any other sets.
    items : sequence
        Dynamic items of SpeechBrain, for the targets.
    outputs : sequence of str
        What a batch has besides its waveforms or hidden states.
    hidden : mapping, optional
        As for :func:`make_dataset`.
    device : torch.device or str, optional
        As for :func:`make_task_loader`.

    Returns
    -------
    dict
        A loader for each set.

    Raises
    ------
    InputError
        If chunks are to be cut from cached hidden states.
    """
    chunk_seconds = hparams.get("chunk_seconds")
    if chunk_seconds is not None and hidden is not None:
        raise InputError(
            "chunk_seconds cuts the audio, and cached hidden states are of whole utterances: set it to null, or "
            "cache_features to False."
        )
    if chunk_seconds is not None and chunk_seconds <= 0:
        raise InputError(f"chunk_seconds must be above 0, or null for whole utterances, not {chunk_seconds}.")
    rank, world_size = rank_and_size()
    loaders = {}
    for name, rows in sets.items():
        training = name == "train"
        longest = chunk_seconds if training and chunk_seconds is not None else math.inf
        sampler = TaskBatchSampler(
            [min(float(row["duration"]), longest) for row in rows.values()],
            hparams["max_batch_seconds"] if training else hparams["max_eval_batch_seconds"],
            training,
            hparams["max_batch_size"] if training else None,
            hparams["seed"],
            rank,
            world_size,
        )
        chunks = RandomChunks(sampler, longest, hparams["sample_rate"]) if longest < math.inf else None
        dataset = make_dataset(rows, hparams["sample_rate"], hidden, chunks)
        for item in items:
            dataset.add_dynamic_item(item)
        dataset.set_output_keys(["id", "sig" if hidden is None else "hidden", *outputs])
        loaders[name] = make_task_loader(dataset, sampler, hparams["num_workers"], device)
    return loaders


def repeat_for_chunks(rows: Rows, seconds: float) -> dict[str, Mapping[str, Any]]:
    """List each utterance as often as a chunk goes into it, at least once: an epoch hears as much audio as there is.

    Arguments
    ---------
    rows : mapping
        Of a manifest, with "duration" in seconds.
    seconds : float
        Length of a chunk.

    Returns
    -------
    dict
        The rows, named "ID#0", "ID#1"...

    Example
    -------
    >>> list(repeat_for_chunks({"a": {"duration": 7.5}, "b": {"duration": 1.0}}, 3.0))
    ['a#0', 'a#1', 'b#0']
    """
    return {
        f"{name}#{number}": row
        for name, row in rows.items()
        for number in range(max(1, int(float(row["duration"]) / seconds)))
    }


def too_short(rows: Rows, encoder: TaskEncoder, sample_rate: int) -> list[str]:
    """Find the utterances that have no frame.

    Arguments
    ---------
    rows : mapping
        Of a manifest.
    encoder : TaskEncoder
        Knows how many frames an utterance has.
    sample_rate : int
        Of the waveforms, Hz.

    Returns
    -------
    list of str
        Their names.

    Example
    -------
    >>> too_short({"long": {"duration": 0.5}, "short": {"duration": 0.028}}, TaskEncoder("fbank"), 16000)
    ['short']
    """
    return [name for name, row in rows.items() if encoder.num_frames(round(float(row["duration"]) * sample_rate)) < 1]


def refuse_too_short(rows: Rows, encoder: TaskEncoder, sample_rate: int) -> None:
    """Refuse recordings that no frame is heard of, before any work.

    Arguments
    ---------
    rows, encoder, sample_rate
        As for :func:`too_short`.

    Raises
    ------
    InputError
        Naming one.
    """
    if short := too_short(rows, encoder, sample_rate):
        raise InputError(
            f"{len(short)} recordings are shorter than a frame of the encoder, such as {rows[short[0]]['wav']}: take "
            "them, and what names them, out of the corpus."
        )


def take_hours(rows: Rows, hours: float | None, seed: int = 0, group: str = "spk_id") -> dict[str, Mapping[str, Any]]:
    """Draw a training set of a given length, spread over the speakers.

    Speakers are gone through in random order, again and again, each giving a random
    utterance that it has not given yet, until the next would exceed the hours. A larger draw of
    the same seed holds a smaller one.

    Arguments
    ---------
    rows : mapping
        Of a manifest, with "duration" in seconds.
    hours : float or None
        None takes all.
    seed : int
        Of the draw.
    group : str
        The column of the speaker.

    Returns
    -------
    dict
        Some of the rows, in their order.

    Raises
    ------
    InputError
        If there is not that much, or not one utterance fits.

    Example
    -------
    >>> rows = {f"{speaker}{n}": {"duration": 36.0, "spk_id": speaker} for speaker in "abc" for n in range(5)}
    >>> taken = take_hours(rows, 0.03)
    >>> sorted(row["spk_id"] for row in taken.values())
    ['a', 'b', 'c']
    """
    if hours is None:
        return dict(rows)
    total = sum(float(row["duration"]) for row in rows.values()) / 3600
    if not 0 < hours <= total:
        raise InputError(
            f"{hours} hours of training were asked for, of {total:.2f} that there are: give fewer, or none."
        )
    taken, seconds = set(), 0.0
    for name in _dealt(rows, seed, group):
        seconds += float(rows[name]["duration"])
        if seconds > hours * 3600:
            break
        taken.add(name)
    if not taken:
        raise InputError(f"{hours} hours is less than the first utterance drawn: ask for more.")
    return {name: row for name, row in rows.items() if name in taken}


def take_examples(rows: Rows, label: str, count: int | None, seed: int = 0) -> dict[str, Mapping[str, Any]]:
    """Draw so many examples of each class.

    Arguments
    ---------
    rows : mapping
        Of a manifest.
    label : str
        The column of the class.
    count : int or None
        Of each class; of those that have fewer, all. None takes all.
    seed : int
        Of the draw. A larger draw of the same seed holds a smaller one.

    Returns
    -------
    dict
        Some of the rows, in their order.

    Raises
    ------
    InputError
        If the count is no whole number above 0.

    Example
    -------
    >>> rows = {str(n): {"emotion": "sad" if n < 2 else "happy"} for n in range(10)}
    >>> sorted(row["emotion"] for row in take_examples(rows, "emotion", 3).values())
    ['happy', 'happy', 'happy', 'sad', 'sad']
    """
    if count is None:
        return dict(rows)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"the number of examples a class is a whole number above 0, not {count!r}.")
    left: dict[Any, int] = {}
    taken = set()
    for name in _dealt(rows, seed, label):
        key = rows[name][label]
        left[key] = left.get(key, count) - 1
        if left[key] >= 0:
            taken.add(name)
    return {name: row for name, row in rows.items() if name in taken}


def take_classes(rows: Rows, label: str, count: int | None, seed: int = 0) -> dict[str, Mapping[str, Any]]:
    """Draw so many classes, as speakers, with all examples of theirs.

    Arguments
    ---------
    rows : mapping
        Of a manifest.
    label : str
        The column of the class.
    count : int or None
        Of classes. None takes all.
    seed : int
        Of the draw. A larger draw of the same seed holds a smaller one.

    Returns
    -------
    dict
        Some of the rows, in their order.

    Raises
    ------
    InputError
        If there are not so many, or fewer than two are asked for.

    Example
    -------
    >>> rows = {str(n): {"spk_id": "abc"[n % 3]} for n in range(6)}
    >>> [row["spk_id"] for row in take_classes(rows, "spk_id", 2).values()]
    ['a', 'b', 'a', 'b']
    """
    if count is None:
        return dict(rows)
    classes = sorted({row[label] for row in rows.values()})
    if not isinstance(count, int) or not 2 <= count <= len(classes):
        raise InputError(
            f"{count!r} of {len(classes)} in the column {label!r} of training were asked for: give a whole number from "
            f"2 to {len(classes)}, or null for all."
        )
    drawn = torch.randperm(len(classes), generator=derived_generator(seed, 0))[:count].tolist()
    taken = {classes[place] for place in drawn}
    return {name: row for name, row in rows.items() if row[label] in taken}


def _dealt(rows: Rows, seed: int, group: str) -> list[str]:
    """Names in random order, one of each group in turn."""
    names = list(rows)
    shuffled = [names[place] for place in torch.randperm(len(names), generator=derived_generator(seed, 0)).tolist()]
    given: dict[Any, int] = {}
    rounds = []
    for name in shuffled:
        key = rows[name].get(group) or name  # who is not known is nobody else
        given[key] = given.get(key, -1) + 1
        rounds.append(given[key])
    return [shuffled[place] for place in np.argsort(rounds, kind="stable")]
