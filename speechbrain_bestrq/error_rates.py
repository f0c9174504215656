"""Word and character error rates of recognised texts, with intervals and alignments."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from speechbrain.utils.metric_stats import ErrorRateStats

from speechbrain_bestrq.metrics import Interval, bootstrap_rate


class ErrorRates:
    """Collects recognised and spoken texts, and counts the errors in them.

    Words are what spaces separate; characters are counted with single spaces between the
    words, as jiwer does. A rate is the errors of all utterances over the length of all
    references. Intervals are 95 %, by resampling the speakers, or the utterances where no speakers are known.

    Example
    -------
    >>> rates = ErrorRates()
    >>> rates.append(["a", "b"], ["the cat", "sat"], ["the cat", "sits"])
    >>> round(rates.wer.value, 3), round(rates.cer.value, 3)
    (0.333, 0.182)
    """

    def __init__(self) -> None:
        self._words = ErrorRateStats()
        self._characters = ErrorRateStats()
        self._speakers: list[str] = []

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
        """
        words = [text.split() for text in texts]
        spoken = [text.split() for text in references]
        self._words.append(names, words, spoken)
        self._characters.append(names, [list(" ".join(one)) for one in words], [list(" ".join(one)) for one in spoken])
        self._speakers += speakers or [""] * len(names)
        for cached in ("wer", "cer"):
            self.__dict__.pop(cached, None)

    def _rate(self, stats: ErrorRateStats) -> Interval:
        errors = [score["insertions"] + score["deletions"] + score["substitutions"] for score in stats.scores]
        totals = [score["num_ref_tokens"] for score in stats.scores]
        return bootstrap_rate(errors, totals, self._speakers if all(self._speakers) else None)

    @cached_property
    def wer(self) -> Interval:
        """Word error rate."""
        return self._rate(self._words)

    @cached_property
    def cer(self) -> Interval:
        """Character error rate."""
        return self._rate(self._characters)

    def per_utterance(self) -> list[dict[str, Any]]:
        """Give the errors of each utterance.

        Returns
        -------
        list of dict
            With "ID", "group" (the speaker), "wer_errors", "wer_total", "cer_errors",
            "cer_total".
        """
        rows = []
        for words, characters, speaker in zip(self._words.scores, self._characters.scores, self._speakers, strict=True):
            row = {"ID": words["key"], "group": speaker}
            for name, score in (("wer", words), ("cer", characters)):
                row[f"{name}_errors"] = score["insertions"] + score["deletions"] + score["substitutions"]
                row[f"{name}_total"] = score["num_ref_tokens"]
            rows.append(row)
        return rows

    def write(self, path: str | Path) -> None:
        """Write the alignments of all utterances, as SpeechBrain writes them.

        Arguments
        ---------
        path : str or Path
            The file.
        """
        with open(path, "w", encoding="utf-8") as file:
            self._words.write_stats(file)
