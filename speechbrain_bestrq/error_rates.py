"""Word and character error rates of recognised texts, with intervals and alignments."""

import os
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from speechbrain.utils.metric_stats import ErrorRateStats

from speechbrain_bestrq.metrics import Interval, bootstrap_rate, by_speaker
from speechbrain_bestrq.writing import replacing


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """Count the fewest insertions, deletions and substitutions that lead from one sequence to the other.

    A column of the Levenshtein table at once, as bits of two whole numbers (Myers, J. ACM 46(3), 1999;
    Hyyrö, 2003): some twenty times as fast as the table cell by cell.

    Arguments
    ---------
    reference, hypothesis : sequence
        Words, or characters.

    Returns
    -------
    int

    Example
    -------
    >>> edit_distance("kitten", "sitting")
    3
    """
    if not reference:
        return len(hypothesis)
    places: dict[Hashable, int] = {}
    for number, item in enumerate(reference):
        places[item] = places.get(item, 0) | 1 << number
    mask, last = (1 << len(reference)) - 1, 1 << (len(reference) - 1)
    # bits of the steps down the column that go up, and that go down, by one
    up, down, distance = mask, 0, len(reference)
    for item in hypothesis:
        match = places.get(item, 0)
        diagonal = ((((match & up) + up) ^ up) | match | down) & mask
        right_up = (down | ~(diagonal | up)) & mask
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = right_up << 1 | 1
        right_down <<= 1
        up = (right_down | ~(diagonal | right_up)) & mask
        down = right_up & diagonal & mask
    return distance


class ErrorRates:
    """Collects recognised and spoken texts, and counts the errors in them.

    Words are what spaces separate; characters are counted with single spaces between the
    words, as jiwer does. A rate is the errors of all utterances over the length of all
    references. Intervals are 95 %, by resampling the speakers; the utterances where a speaker is unknown or there are
    fewer than five.

    Example
    -------
    >>> rates = ErrorRates()
    >>> rates.append(["a", "b"], ["the cat", "sat"], ["the cat", "sits"])
    >>> round(rates.wer.value, 3), round(rates.cer.value, 3)
    (0.333, 0.182)
    """

    def __init__(self) -> None:
        self._texts: dict[str, tuple[list[str], list[str]]] = {}
        self._rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def append(
        self,
        names: Sequence[str],
        texts: Sequence[str],
        references: Sequence[str],
        speakers: Sequence[str] | None = None,
    ) -> None:
        """Add utterances.

        Arguments
        ---------
        names : sequence of str
            Of the utterances.
        texts : sequence of str
            What was recognised.
        references : sequence of str
            What was said.
        speakers : sequence of str, optional
            Who said it.

        Raises
        ------
        ValueError
            If the sequences differ in length, or an utterance was added before.
        """
        speakers = [""] * len(names) if speakers is None else speakers
        for name, text, reference, speaker in zip(names, texts, references, speakers, strict=True):
            if name in self._texts:
                raise ValueError(f"utterance {name} was added before: each counts once.")
            words, spoken = text.split(), reference.split()
            self._texts[name] = (words, spoken)
            letters, spoken_letters = " ".join(words), " ".join(spoken)
            self._rows.append(
                {
                    "ID": name,
                    "group": speaker,
                    "wer_errors": edit_distance(spoken, words),
                    "wer_total": len(spoken),
                    "cer_errors": edit_distance(spoken_letters, letters),
                    "cer_total": len(spoken_letters),
                }
            )
        for cached in ("wer", "cer", "by_speaker"):
            self.__dict__.pop(cached, None)

    def rate(self, metric: str) -> float:
        """Give an error rate without its interval, which takes a thousand resamples.

        Arguments
        ---------
        metric : str
            "wer" or "cer".

        Returns
        -------
        float

        Raises
        ------
        ValueError
            If nothing was added that has any words.
        """
        return sum(row[f"{metric}_errors"] for row in self._rows) / sum(self._totals(metric))

    def _totals(self, metric: str) -> list[int]:
        totals = [row[f"{metric}_total"] for row in self._rows]
        if not any(totals):
            raise ValueError("there is no error rate: no utterance was added, or nothing was said in any.")
        return totals

    def _rate(self, metric: str) -> Interval:
        totals = self._totals(metric)
        groups = [row["group"] for row in self._rows] if self.by_speaker else None
        return bootstrap_rate([row[f"{metric}_errors"] for row in self._rows], totals, groups)

    @cached_property
    def by_speaker(self) -> bool:
        """Whether intervals are by resampling speakers."""
        return by_speaker([row["group"] for row in self._rows])

    @cached_property
    def wer(self) -> Interval:
        """Word error rate; 0.1 is 10 %."""
        return self._rate("wer")

    @cached_property
    def cer(self) -> Interval:
        """Character error rate; 0.1 is 10 %."""
        return self._rate("cer")

    def per_utterance(self) -> list[dict[str, Any]]:
        """Give the errors of each utterance, in the order in which they were added.

        Returns
        -------
        list of dict
            With "ID", "group" (the speaker, or empty), "wer_errors", "wer_total", "cer_errors",
            "cer_total".
        """
        return [dict(row) for row in self._rows]

    def write(self, path: str | os.PathLike) -> Path:
        """Write the alignments of all utterances, as SpeechBrain writes them, all or nothing.

        Arguments
        ---------
        path : str or Path
            The file.

        Returns
        -------
        Path
            The file.
        """
        stats = ErrorRateStats()
        words, spoken = zip(*self._texts.values(), strict=True) if self._texts else ((), ())
        stats.append(list(self._texts), words, spoken)
        with replacing(path) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape") as file:
            stats.write_stats(file)
        return Path(path)
