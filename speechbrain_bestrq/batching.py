"""Which utterances share a batch: without padding for pre-training, padded for validation.

Lengths are in samples at the rate the model hears (16 kHz). Batches are planned
here from lengths alone; :mod:`speechbrain_bestrq.pretraining_data` reads what was planned.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ladder import LEAST_SAMPLES, Layout, expected_fall, fit_rungs, plan_layout
from speechbrain_bestrq.seeding import derived_generator

logger = logging.getLogger(__name__)


class BatchPlan(NamedTuple):
    """What one batch holds, before any audio is read."""

    epoch: int
    """The epoch it belongs to; 0 in validation."""
    number: int
    """Place among this rank's batches of the epoch; in validation among all batches."""
    samples: int
    """Length of the batch, in samples."""
    indices: np.ndarray
    """The utterances, int64, shape (B,)."""
    starts: np.ndarray
    """First sample to take of each utterance, int64, shape (B,)."""


class LadderBatchSampler(torch.utils.data.Sampler[BatchPlan]):
    """Batches of utterances cut to one of a few lengths: nothing is padded, shapes repeat.

    Algorithm. The rungs of a ladder of lengths are fitted to the corpus once
    (:func:`~speechbrain_bestrq.ladder.fit_rungs`), and every utterance stands on the
    longest rung that is not above it. In each epoch, from the top rung down, the
    utterances of a rung are shuffled and fill batches of
    ``max_batch_samples // rung`` utterances; those left over fall to the next rung
    and are batched there, or form one smaller batch if their fall would cost more
    audio than it is worth
    (:func:`~speechbrain_bestrq.ladder.plan_layout`). Each utterance is cut to the length of its
    batch at a random place. So each utterance is in exactly one batch of each epoch,
    and how many batches of which shape there are, and how much audio is cut, depends
    on the lengths alone: it is the same in every epoch, and known before the first.

    If the number of batches is not a multiple of ``world_size``, the largest batches
    are halved until it is. Batches are sorted by their seconds and dealt in groups
    of ``world_size``, one to each rank, so that the ranks work equally long at each
    step; the order of the groups is shuffled. All ranks compute the same list without
    communication; it is a function of (seed, epoch).

    Memory. Two int64 per utterance (length, rung), two more during an epoch (order,
    crop), and about ten at the peak of planning it: 23 MB for the 281,000 utterances of
    LibriSpeech, in the main process only. Planning such an epoch takes a tenth of a second.

    Arguments
    ---------
    lengths : numpy.ndarray
        Samples of each utterance, integers, shape (U,), at least 480 (one encoder frame).
    max_batch_samples : int
        Most samples in a batch (on one rank).
    seed : int
        Seed of the run.
    rank : int
        This process.
    world_size : int
        Number of processes.
    max_rungs : int
        Number of rungs that is not exceeded, unless the lengths are spread so widely
        that so few rungs cut more than ``max_cut``; then there are as many as it needs
        (:meth:`describe` says so). 37 and a few smaller batches of left-overs are at most 40
        shapes of LibriSpeech-like lengths.
    max_cut : float
        Largest share of the audio that is cut in an epoch, in (0, 1).
    sample_rate : int
        Samples per second, for messages.

    Raises
    ------
    InputError
        If there is no utterance, one is shorter than an encoder frame, one is longer
        than a batch, or there are too few utterances for as many processes.

    Example
    -------
    >>> lengths = np.array([32000, 32100, 48000, 48600, 48100, 64000])
    >>> sampler = LadderBatchSampler(lengths, max_batch_samples=100000)
    >>> sampler.describe()
    '3 rungs 2.0-4.0 s, 4 shapes, 0.3 % of the audio cut, 4 batches of <= 6.25 s an epoch'
    >>> sampler.set_epoch(1)
    >>> plans = list(sampler)
    >>> sorted((plan.samples, len(plan.indices)) for plan in plans)
    [(32000, 2), (48000, 1), (48000, 2), (64000, 1)]
    >>> sorted(np.concatenate([plan.indices for plan in plans]).tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_batch_samples: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_rungs: int = 37,
        max_cut: float = 0.02,
        sample_rate: int = 16000,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}.")
        if not 0.0 < max_cut < 1.0:
            raise InputError(f"max_cut is the largest share of the audio that may be cut, in (0, 1), not {max_cut}.")
        if max_rungs < 1:
            raise InputError(f"max_rungs must be at least 1, not {max_rungs}.")
        self.lengths = _checked_lengths(lengths, max_batch_samples, sample_rate)
        self.max_batch_samples = int(max_batch_samples)
        self.seed, self.rank, self.world_size = int(seed), rank, world_size
        self.max_rungs, self.max_cut, self.sample_rate = max_rungs, max_cut, sample_rate
        self.epoch = 0
        self.position = 0
        """Next batch of this rank in this epoch. Iterating starts here and does not advance it, since loaders
        prefetch: whoever trains adds one for each batch done."""
        self.rungs = fit_rungs(self.lengths, max_cut, max_rungs, expected_fall(self.lengths, self.max_batch_samples))
        """Lengths of the ladder, in samples, ascending, int64."""
        self._rung = np.searchsorted(self.rungs, self.lengths, side="right") - 1
        self._layout: Layout = plan_layout(
            self.lengths, self.rungs, self.max_batch_samples, max_cut, multiple_of=world_size
        )

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The different (utterances, samples) of the batches, the same in every epoch, ascending in samples."""
        found = {(int(size), int(self.rungs[rung])) for rung, size in zip(*self._layout.batches(), strict=True)}
        return sorted(found, key=lambda shape: (shape[1], shape[0]))

    @property
    def cut_share(self) -> float:
        """Share of the audio that is cut, exactly, in every epoch."""
        return self._layout.cut / int(self.lengths.sum())

    def describe(self) -> str:
        """Sum the ladder up in one line for the log.

        Returns
        -------
        str
            Rungs, shapes, audio cut and batches (of all ranks together).
        """
        first, last = self.rungs[[0, -1]] / self.sample_rate
        beyond = f" (max_rungs = {self.max_rungs} would cut more than max_cut = {100 * self.max_cut:g} %)"
        return (
            f"{len(self.rungs)} rungs{beyond if len(self.rungs) > self.max_rungs else ''} {first:.1f}-{last:.1f} s, "
            f"{len(self.shapes)} shapes, {100 * self.cut_share:.1f} % of the audio cut, "
            f"{len(self) * self.world_size} batches of <= {self.max_batch_samples / self.sample_rate:g} s an epoch"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the present starts at its first batch.

        Arguments
        ---------
        epoch : int
            At least 0.
        """
        if epoch != self.epoch:
            self.epoch, self.position = int(epoch), 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, wherever :attr:`position` is."""
        return self._layout.count // self.world_size

    def __iter__(self) -> Iterator[BatchPlan]:
        # planned here and not at the first next(), so that a later set_epoch does not reach into a started epoch
        return self._emit(self.epoch, self.position, *self._plan_epoch(self.epoch))

    def _emit(
        self, epoch: int, position: int, mine: np.ndarray, samples: np.ndarray, bounds: np.ndarray, order: np.ndarray
    ) -> Iterator[BatchPlan]:
        fractions = torch.rand(
            len(order), generator=derived_generator(self.seed, epoch, 1), dtype=torch.float64
        ).numpy()
        for number in range(position, len(mine)):
            batch = mine[number]
            indices = order[bounds[batch] : bounds[batch + 1]]
            spare = self.lengths[indices] - samples[batch]
            starts = np.floor(fractions[indices] * (spare + 1)).astype(np.int64)
            yield BatchPlan(epoch, number, int(samples[batch]), indices, starts)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Plan one epoch: this rank's batches, and of all batches the lengths, their bounds in `order`, and `order`."""
        generator = derived_generator(self.seed, epoch, 0)
        shuffled = torch.randperm(len(self.lengths), generator=generator).numpy()
        by_rung = shuffled[np.argsort(self._rung[shuffled], kind="stable")]
        edges = np.searchsorted(self._rung[by_rung], np.arange(len(self.rungs) + 1))
        pieces, fallen = [], by_rung[:0]
        for rung in range(len(self.rungs) - 1, -1, -1):
            # those fallen from above come first, so that they are not left over again
            pool = np.concatenate([fallen, by_rung[edges[rung] : edges[rung + 1]]])
            taken = self._layout.taken(rung)
            pieces.append(pool[:taken])
            fallen = pool[taken:]
        order = np.concatenate(pieces)
        rungs, sizes = self._layout.batches()
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        samples = self.rungs[rungs]
        # groups of equally long batches, one for each rank, in random order and dealt in random order
        batches = torch.randperm(len(sizes), generator=generator).numpy()
        batches = batches[np.argsort((samples * sizes)[batches], kind="stable")].reshape(-1, self.world_size)
        groups = torch.randperm(len(batches), generator=generator).numpy()
        deal = torch.rand(batches.shape, generator=generator).argsort(dim=1).numpy()
        mine = np.take_along_axis(batches, deal, axis=1)[groups, self.rank]
        return mine, samples, bounds, order

    def state_dict(self) -> dict[str, Any]:
        """Give the place in the epoch and what it depends on, as plain Python values.

        Returns
        -------
        dict
        """
        return {"epoch": self.epoch, "position": self.position, "batches": len(self), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in an epoch.

        Arguments
        ---------
        state : dict
            Of :meth:`state_dict`, on any rank.

        Raises
        ------
        InputError
            If the state lies within an epoch and the corpus, a setting or the number
            of processes is another one now: no place in the new epoch is the same.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        changed = [key for key, value in self._identity().items() if state[key] != value]
        changes = ", ".join(f"{key} ({state[key]} then, {self._identity()[key]} now)" for key in changed)
        if changed and 0 < position < state["batches"]:
            raise InputError(
                f"the checkpoint lies within epoch {epoch}, after {position} of {state['batches']} batches, and cannot "
                f"be resumed with other {changes}: restore what was, or give another output_folder."
            )
        if changed:
            logger.info("Going on after epoch %d with other %s.", epoch, changes)
        self.epoch = epoch
        # an epoch that was over is over under the new settings too
        self.position = len(self) if changed and position else position

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.lengths.tobytes()).hexdigest()[:16]
        return {
            "utterances": f"{len(self.lengths)} ({digest})",
            "max_batch_seconds": self.max_batch_samples / self.sample_rate,
            "max_rungs": self.max_rungs,
            "max_cut": self.max_cut,
            "seed": self.seed,
            "world_size": self.world_size,
        }


class PaddedBatchSampler(torch.utils.data.Sampler[BatchPlan]):
    """Batches of whole utterances of similar length, always the same, to be padded.

    Algorithm. The utterances are sorted, longest first; each batch takes as many as
    fit into ``max_batch_samples`` when padded to its longest. Rank r takes every
    ``world_size``-th batch from batch r on, so that the batches themselves do not depend
    on the number of processes; the ranks may differ by one in their number of batches, and
    a rank may have none.

    Memory: two int64 per utterance.

    Arguments
    ---------
    lengths : numpy.ndarray
        Samples of each utterance, integers, shape (U,), at least 480 (one encoder frame).
    max_batch_samples : int
        Most samples in a batch, padding included.
    rank : int
        This process.
    world_size : int
        Number of processes.
    sample_rate : int
        Samples per second, for messages.

    Raises
    ------
    InputError
        As :class:`LadderBatchSampler`, but for the number of utterances.

    Example
    -------
    >>> sampler = PaddedBatchSampler(np.array([16000, 64000, 32000, 30000]), max_batch_samples=100000)
    >>> [(plan.number, plan.samples, plan.indices.tolist()) for plan in sampler]
    [(0, 64000, [1]), (1, 32000, [2, 3, 0])]
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_batch_samples: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        sample_rate: int = 16000,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}.")
        self.lengths = _checked_lengths(lengths, max_batch_samples, sample_rate)
        self.rank, self.world_size = rank, world_size
        self._order = np.argsort(-self.lengths, kind="stable")
        bounds = [0]
        while bounds[-1] < len(self._order):
            bounds.append(bounds[-1] + max_batch_samples // int(self.lengths[self._order[bounds[-1]]]))
        self._bounds = np.minimum(bounds, len(self._order))

    @property
    def shared_batches(self) -> int:
        """Batches that every rank has, at the least."""
        return (len(self._bounds) - 1) // self.world_size

    def fingerprint(self) -> str:
        """Digest the lengths: equal for equal batches."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths).tobytes()).hexdigest()[:16]

    def content(self) -> str:
        """Digest the lengths in any order, by which other audio is told, unless it is just as long."""
        return hashlib.sha256(np.sort(self.lengths).tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(range(self.rank, len(self._bounds) - 1, self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        for number in range(self.rank, len(self._bounds) - 1, self.world_size):
            indices = self._order[self._bounds[number] : self._bounds[number + 1]]
            yield BatchPlan(0, number, int(self.lengths[indices[0]]), indices, np.zeros_like(indices))


def _checked_lengths(lengths: np.ndarray, max_batch_samples: int, sample_rate: int) -> np.ndarray:
    """Give the lengths as int64 once they are known to fit into batches and into an encoder frame."""
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise InputError("there are no utterances to make batches of: check min_seconds, max_seconds and the manifest.")
    if lengths.min() < LEAST_SAMPLES:
        raise InputError(
            f"{int((lengths < LEAST_SAMPLES).sum())} utterances are shorter than one encoder frame, "
            f"{LEAST_SAMPLES / sample_rate:g} s: set min_seconds to at least that."
        )
    if lengths.max() > max_batch_samples:
        raise InputError(
            f"max_batch_seconds is {max_batch_samples / sample_rate:g}, less than the longest utterance of "
            f"{lengths.max() / sample_rate:.2f} s: raise max_batch_seconds, or lower max_seconds, at which longer ones "
            "are cut."
        )
    return lengths
