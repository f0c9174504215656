"""The ladder of lengths that utterances are cut to: which rungs, and how many batches on each.

Everything here is a function of the utterances' lengths alone.
"""

from dataclasses import dataclass

import numpy as np

from speechbrain_bestrq.errors import InputError

FRAME_SAMPLES = 640
"""Samples from one encoder frame to the next: 40 ms at 16 kHz."""
LEAST_SAMPLES = 480
"""Samples of the shortest utterance that has an encoder frame: the front end makes 1 + n // 160 feature frames of n
samples, and an encoder frame of 4 of them. k encoder frames take 640 k - 160 samples."""


def fit_rungs(lengths: np.ndarray, max_cut: float = 0.02, max_rungs: int = 40, reserve: float = 0.0) -> np.ndarray:
    """Fit the fewest rungs that cut little of a corpus.

    The utterances are counted in bins of one encoder frame. For 1, 2, 3... rungs, dynamic
    programming over the bins finds those that cut the least when each utterance is
    cut to the longest rung not above it. It stops once they cut at most half of
    ``max_cut``; the other half is for leftovers (:func:`plan_layout`). With ``max_rungs`` rungs
    all of ``max_cut`` will do. Where even these cut more, the lengths are spread too widely for both
    bounds. That on the audio then goes first: there are as many rungs as it takes to cut at
    most ``max_cut`` less the ``reserve``, without which leftovers could not fall, and there would be
    more shapes of batches instead of fewer.

    A rung is as long as the shortest utterance of its bin: in a large corpus that is
    the least audio for its number of encoder frames. Where cutting to whole frames alone
    would take more than half of ``max_cut``, in a corpus of very short
    utterances, the bins are narrower.

    Arguments
    ---------
    lengths : numpy.ndarray
        Samples of each utterance, int64, shape (U,).
    max_cut : float
        Largest share of the audio that may be cut, in (0, 1).
    max_rungs : int
        Number of rungs that is exceeded only if so few cannot keep ``max_cut``.
    reserve : float
        Samples that leftovers are expected to cost (:func:`expected_fall`); at most half of what
        may be cut is set aside for them.

    Returns
    -------
    numpy.ndarray
        Samples of the rungs, int64, ascending; the first is the shortest utterance.

    Example
    -------
    >>> fit_rungs(np.array([32000, 32100, 48000, 48600, 48100, 64000]))
    array([32000, 48000, 64000])
    """
    ordered = np.sort(lengths)
    total = int(ordered.sum())
    width = FRAME_SAMPLES
    while True:
        firsts = np.flatnonzero(np.diff((ordered + FRAME_SAMPLES - LEAST_SAMPLES) // width, prepend=-1))
        shortest = ordered[firsts]
        counts = np.diff(firsts, append=len(ordered))
        if total - int((shortest * counts).sum()) <= max_cut / 2 * total or width == 1:
            break
        width = max(width // 2, 1)
    # sums over the utterances before each bin, and of all
    number = np.append(firsts, len(ordered))
    audio = np.concatenate([[0], np.cumsum(ordered)])[number]
    return shortest[_fewest_rungs(shortest, number, audio, max_cut * total, max_rungs, reserve)]


def expected_fall(lengths: np.ndarray, max_batch_samples: int) -> float:
    """Estimate what it costs if the leftovers of every rung fall.

    Half a batch is left over on each rung, ``max_batch_samples / 2 / rung`` utterances, and each
    loses the gap to the next rung: over the whole ladder this sums to about
    ``max_batch_samples / 2 * log(longest / shortest)``, however many rungs there are.

    Arguments
    ---------
    lengths : numpy.ndarray
        Samples of each utterance, int64, shape (U,).
    max_batch_samples : int
        Most samples in a batch.

    Returns
    -------
    float
        Samples.

    Example
    -------
    >>> round(expected_fall(np.array([32000, 320000]), max_batch_samples=1600000) / 16000)
    115
    """
    return max_batch_samples / 2 * float(np.log(lengths.max() / lengths.min()))


def _fewest_rungs(
    shortest: np.ndarray, number: np.ndarray, audio: np.ndarray, max_cut: float, max_rungs: int, reserve: float
) -> list[int]:
    """Give the bins that are rungs; `number` and `audio` have one more entry than there are bins."""
    bins = len(shortest)

    def enough(rungs: int, cut: int) -> bool:
        half = cut <= max_cut / 2
        return half or (rungs == max_rungs and cut <= max_cut) or (rungs > max_rungs and cut <= max_cut - reserve)

    def cuts(rungs: np.ndarray, end: int) -> np.ndarray:
        """Audio cut if each of `rungs` were the one of all bins from it up to `end`."""
        return audio[end] - audio[rungs] - shortest[rungs] * (number[end] - number[rungs])

    every = np.arange(bins)
    # least[end]: least audio cut of the bins below `end` with the present number of rungs
    least = np.concatenate([[0], audio[1:] - audio[0] - shortest[0] * (number[1:] - number[0])])
    last_rung = [np.zeros(bins + 1, dtype=np.int64)]
    while not enough(len(last_rung), least[-1]):
        fewer, least = least, least.copy()
        arg = last_rung[-1].copy()
        # The best last rung rises with `end`, so it lies between those of the ends solved on either side: each
        # level of halving looks at every bin about once.
        spans = [(len(last_rung) + 1, bins, len(last_rung), bins - 1)]
        while spans:
            low, high, first, last = spans.pop()
            if low > high:
                continue
            end = (low + high) // 2
            rungs = every[first : min(last, end - 1) + 1]
            cost = fewer[rungs] + cuts(rungs, end)
            best = int(cost.argmin())
            least[end], arg[end] = cost[best], rungs[best]
            spans += [(low, end - 1, first, int(rungs[best])), (end + 1, high, int(rungs[best]), last)]
        last_rung.append(arg)
    chosen, end = [], bins
    for arg in reversed(last_rung):
        end = int(arg[end])
        chosen.append(end)
    return chosen[::-1]


@dataclass(frozen=True)
class Layout:
    """How many utterances the batches of each rung hold, in every epoch."""

    sizes: list[list[int]]
    """For each rung, ascending, the utterances in each of its batches."""
    cut: int
    """Samples cut in an epoch."""

    @property
    def count(self) -> int:
        """Number of batches."""
        return sum(map(len, self.sizes))

    def taken(self, rung: int) -> int:
        """Count the utterances that are batched on a rung; the others fall.

        Arguments
        ---------
        rung : int
            Index of the rung.

        Returns
        -------
        int
        """
        return sum(self.sizes[rung])

    def batches(self) -> tuple[np.ndarray, np.ndarray]:
        """List the batches from the top rung down.

        Returns
        -------
        tuple of numpy.ndarray
            The rung and the number of utterances of each batch, int64.
        """
        rungs = np.repeat(np.arange(len(self.sizes))[::-1], [len(sizes) for sizes in self.sizes[::-1]])
        return rungs, np.array([size for sizes in self.sizes[::-1] for size in sizes], dtype=np.int64)


def plan_layout(
    lengths: np.ndarray, rungs: np.ndarray, max_batch_samples: int, max_cut: float, multiple_of: int = 1
) -> Layout:
    """Decide what the batches of every epoch look like.

    From the top rung down, utterances fill whole batches. Those left over fall to
    the next rung, where each loses the difference of the two rungs, whichever utterances they
    are. A fall saves a batch; it takes place if it costs no more than a toll (samples). Of many
    tolls, the one with the fewest batches is taken among those that keep the audio cut within
    ``max_cut``. Leftovers that do not fall, and those of the lowest rung, are a smaller batch.
    Then the largest batches are halved until their number is a multiple.

    Arguments
    ---------
    lengths : numpy.ndarray
        Samples of each utterance, int64, shape (U,).
    rungs : numpy.ndarray
        Samples of the rungs, ascending, the first not above any utterance.
    max_batch_samples : int
        Most samples in a batch, at least the top rung.
    max_cut : float
        Largest share of the audio that may be cut; the rungs alone must keep it.
    multiple_of : int
        What the number of batches must be a multiple of.

    Returns
    -------
    Layout

    Raises
    ------
    InputError
        If there are too few utterances for such a multiple.

    Example
    -------
    >>> plan_layout(np.array([1000] * 5 + [1010] * 3), np.array([1000, 1010]), 2020, max_cut=0.02)
    Layout(sizes=[[2, 2, 2], [2]], cut=10)
    """
    counts = np.bincount(np.searchsorted(rungs, lengths, side="right") - 1, minlength=len(rungs)).tolist()
    full = (max_batch_samples // rungs).tolist()
    gaps = np.diff(rungs, prepend=0).tolist()
    total = int(lengths.sum())
    ladder_cut = total - int(np.dot(counts, rungs))
    budget = max_cut * total - ladder_cut
    best = None
    for toll in [0, *np.geomspace(1, max(budget, 1), 200).tolist()]:
        sizes, cost = _fill(counts, full, gaps, toll)
        key = (sum(map(len, sizes)), cost)
        if cost <= budget and (best is None or key < best[0]):
            best = (key, sizes)
    (_, cost), sizes = best
    _halve(sizes, rungs, multiple_of)
    return Layout(sizes, ladder_cut + cost)


def _fill(counts: list[int], full: list[int], gaps: list[int], toll: float) -> tuple[list[list[int]], int]:
    """Give the batch sizes of each rung and the samples that falling costs, for one toll."""
    sizes, cost, fallen = [], 0, 0
    for rung in range(len(counts) - 1, -1, -1):
        batches, left = divmod(counts[rung] + fallen, full[rung])
        falls = rung > 0 and left * gaps[rung] <= toll
        fallen = left if falls else 0
        cost += fallen * gaps[rung]
        sizes.append([full[rung]] * batches + [left] * (left > fallen))
    return sizes[::-1], cost


def _halve(sizes: list[list[int]], rungs: np.ndarray, multiple_of: int) -> None:
    """Halve the batch with most audio, in place, until the number of batches is a multiple."""
    while sum(map(len, sizes)) % multiple_of:
        # the batches of a rung are in descending order
        divisible = [rung for rung, own in enumerate(sizes) if own and own[0] > 1]
        if not divisible:
            raise InputError(
                f"{sum(map(sum, sizes))} utterances are too few to give each of {multiple_of} processes "
                "equally many batches: use fewer processes or more audio."
            )
        rung = max(divisible, key=lambda rung: sizes[rung][0] * int(rungs[rung]))
        size = sizes[rung].pop(0)
        sizes[rung] = sorted([*sizes[rung], size - size // 2, size // 2], reverse=True)
