"""How far apart the errors of two encoders on the same utterances may be by the chance of these.

Both are tested on the same utterances, so what makes one of them hard is held against neither: the interval is that of
the difference, by a paired bootstrap, and not of two scores by themselves.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import compare_runs_over_seeds
from speechbrain_bestrq.verification_errors import compare_scores_over_seeds
from speechbrain_bestrq.writing import write_text

logger = logging.getLogger(__name__)

#: Of a reproduction: what its pairs came to, so that its report needs the errors of the utterances once.
PAIRS_FILE = "pairs.json"
#: The errors that a score is made of, where they have another name.
_ERRORS = {"accuracy": "error"}
_EER = "eer"


class Pairs:
    """What is known of the pairs of a reproduction.

    Arguments
    ---------
    folder : Path
        Of the reproduction.
    """

    def __init__(self, folder: Path):
        try:
            known = json.loads((Path(folder) / PAIRS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self.known: dict[str, float] = known if isinstance(known, dict) else {}
        self.used: dict[str, float] = {}

    def half_width(
        self, runs: Mapping[str, Path], others: Mapping[str, Path], test_set: str, score: str
    ) -> float | None:
        """Half the width of the 95 % interval of the difference of two encoders.

        Arguments
        ---------
        runs, others : mapping
            Of both encoders, in the order of the seeds that they share: what a run is recognised by, and the folder
            of its results.
        test_set : str
            Its name in the results.
        score : str
            "wer", "accuracy", "eer"...

        Returns
        -------
        float or None
            In points, of the mean over the seeds; None if the errors of an utterance are not there, or not of the same
            utterances.
        """
        key = " ".join([*runs, "against", *others, "on", test_set, score])
        if key not in self.known:
            half = _half_width(list(runs.values()), list(others.values()), test_set, score)
            if half is None:
                return None
            self.known[key] = half
        self.used[key] = self.known[key]
        return self.known[key]

    def write(self, folder: Path) -> None:
        """Keep those that were asked for, for this folder or a copy of it."""
        if self.used:
            write_text(Path(folder) / PAIRS_FILE, json.dumps(self.used, indent=2) + "\n")


def _half_width(runs: Sequence[Path], others: Sequence[Path], test_set: str, score: str) -> float | None:
    try:
        if score == _EER:
            found, _ = compare_scores_over_seeds(runs, others, test_set)
        else:
            found, _ = compare_runs_over_seeds(runs, others, test_set, _ERRORS.get(score, score))
    except InputError as error:
        logger.info("%s and %s are not compared utterance by utterance: %s", runs[0], others[0], error)
        return None
    return round(100 * (found.high - found.low) / 2, 6)
