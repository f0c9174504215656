"""N-gram language models: read and checked by KenLM, and a small one trained."""

import gzip
import io
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from speechbrain_bestrq.errors import InputError

SENTENCE_START, SENTENCE_END, UNKNOWN = "<s>", "</s>", "<unk>"
#: Words in the longest n-grams: KenLM, as it is built for Python, reads no others.
MIN_ORDER, MAX_ORDER = 2, 6
_SPECIAL = {SENTENCE_START, SENTENCE_END, UNKNOWN, UNKNOWN.upper()}
_BINARY_START = b"mmap lm http://kheafield.com/code"
_GZIP_START = b"\x1f\x8b"
_REMEDY = "give an n-gram model in ARPA format, .arpa or .arpa.gz"


# ---------------------------------------------------------------- reading


def import_kenlm() -> Any:
    """Import KenLM.

    Returns
    -------
    module

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import kenlm
    except ImportError as error:
        raise InputError("a language model needs KenLM, which is not installed: pip install camel-kenlm.") from error
    return kenlm


def read_words(path: str | os.PathLike) -> tuple[int, list[str]]:
    """Read order and words of a language model; its n-grams are left alone.

    Arguments
    ---------
    path : str or Path
        Of an n-gram model in ARPA format; may be compressed by gzip.

    Returns
    -------
    order : int
        Words in its longest n-grams.
    words : list of str
        Without sentence boundaries and the unknown word.

    Raises
    ------
    InputError
        If the file is not there, is of another kind, or ends before its words do.

    Example
    -------
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> _ = path.write_text(train_ngram(["THE CAT", "THE HAT"], order=2))
    >>> read_words(path)
    (2, ['CAT', 'HAT', 'THE'])
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_BINARY_START))
        if not start:
            raise InputError(f"{path} is empty: {_REMEDY}.")
        if start == _BINARY_START:
            raise InputError(f"{path} is a binary of KenLM, without a list of words: give the ARPA it was made from.")
        opened = gzip.open(path) if start.startswith(_GZIP_START) else open(path, "rb")
        with io.TextIOWrapper(opened, encoding="utf-8") as lines:
            return _read_unigrams(path, lines)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: {_REMEDY}, in UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file ({error}): copy it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {_REMEDY}.") from error


def _read_unigrams(path: Path, lines: Iterable[str]) -> tuple[int, list[str]]:
    stripped = (line.strip() for line in lines)
    filled = (line for line in stripped if line)
    first = next(filled, "")
    if first != "\\data\\":
        raise InputError(f"{path} is no ARPA file (it begins with {first[:40]!r}, not \\data\\): {_REMEDY}.")
    try:
        counts = _read_counts(filled)
        order = len(counts)
        if not MIN_ORDER <= order <= MAX_ORDER:
            raise InputError(f"{path} is of order {order}: give an n-gram model of order {MIN_ORDER} to {MAX_ORDER}.")
        # log-probability, word, and the weight for backing off where the word begins an n-gram
        words = [next(filled).replace("\t", " ").split(" ")[1] for _ in range(counts[0])]
        end = next(filled)
    except (StopIteration, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no whole ARPA file: copy it again, or {_REMEDY}.") from error
    if not end.startswith("\\"):
        raise InputError(f"{path} has other words than its header counts: make it again.")
    return order, [word for word in words if word not in _SPECIAL]


def _read_counts(filled: Iterator[str]) -> list[int]:
    """Read "ngram 1=200003", "ngram 2=...", up to the head of the unigrams."""
    counts = []
    for line in filled:
        if line == "\\1-grams:":
            break
        order, count = line.removeprefix("ngram ").split("=")
        if int(order) != len(counts) + 1:
            raise ValueError(line)
        counts.append(int(count))
    return counts


class NGramModel:
    """An n-gram language model, read by KenLM.

    Arguments
    ---------
    path : str or Path
        Of a model in ARPA format; may be compressed by gzip.

    Attributes
    ----------
    order : int
        Words in its longest n-grams.
    words : list of str
        What it knows, without sentence boundaries and the unknown word.

    Raises
    ------
    InputError
        If KenLM is not installed, or the file is not a whole model.

    Example
    -------
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> _ = path.write_text(train_ngram(["THE CAT", "THE HAT"], order=2))
    >>> model = NGramModel(path)
    >>> model.sentence_score("THE CAT") > model.sentence_score("CAT THE")
    True
    """

    def __init__(self, path: str | os.PathLike):
        kenlm = import_kenlm()
        self.path = Path(path)
        self.order, self.words = read_words(path)
        settings = kenlm.Config()
        settings.show_progress = False
        settings.arpa_complain = kenlm.ARPALoadComplain.NONE
        try:
            self._model = kenlm.Model(os.fspath(path), settings)
        except (OSError, RuntimeError) as error:
            # KenLM says first which file, and where in its own source
            reason = re.split(r"Exception|' \(", " ".join(str(error).split()))[-1].strip(" .)")[:200]
            raise InputError(f"{path} is no whole ARPA file ({reason}): copy it again, or {_REMEDY}.") from error
        self._new_state = kenlm.State

    def start(self) -> Any:
        """Give the state at the start of a sentence."""
        state = self._new_state()
        self._model.BeginSentenceWrite(state)
        return state

    def score(self, state: Any, word: str) -> tuple[float, Any]:
        """Score a word.

        Arguments
        ---------
        state : kenlm.State
            After the words before; it is left as it is.
        word : str
            May be unknown to the model, or "</s>".

        Returns
        -------
        log_prob : float
            To the base of 10.
        state : kenlm.State
            After the word.
        """
        after = self._new_state()
        return self._model.BaseScore(state, word, after), after

    def sentence_score(self, text: str) -> float:
        """Give the log-probability of a whole sentence, to the base of 10; words are separated by spaces."""
        total, state = 0.0, self.start()
        for word in [*text.split(), SENTENCE_END]:
            score, state = self.score(state, word)
            total += score
        return total


# ---------------------------------------------------------------- training


def train_ngram(texts: Iterable[str], order: int = 3) -> str:
    """Train an n-gram language model with interpolated Kneser-Ney smoothing, one discount for each order.

    In plain Python and in memory: for the transcripts of a corpus, not for the text of a library.
    Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), equations 25 to 27:
    below the longest n-grams, a count is that of the different words seen before the n-gram. The same texts, in any
    order, give the same model.

    Arguments
    ---------
    texts : iterable of str
        Sentences; words are separated by spaces. Empty ones are left out.
    order : int
        Words in the longest n-grams, 2 to 6.

    Returns
    -------
    str
        In ARPA format, with the unknown word.

    Raises
    ------
    InputError
        If there are no words, or a word is one of the format's own.

    Example
    -------
    >>> train_ngram(["A B", "A"], order=2).split("\\n\\n")[0].splitlines()
    ['\\\\data\\\\', 'ngram 1=5', 'ngram 2=4']
    """
    if not MIN_ORDER <= order <= MAX_ORDER:
        raise InputError(f"order is {order}: give {MIN_ORDER} to {MAX_ORDER}.")
    counts = _adjusted_counts(_raw_counts(texts, order))
    probabilities, backoffs = _interpolate(counts)
    return _arpa(probabilities, backoffs)


def _raw_counts(texts: Iterable[str], order: int) -> list[Counter]:
    """How often each n-gram occurs, by its length; the start of a sentence alone is never predicted."""
    counts: list[Counter] = [Counter() for _ in range(order)]
    for text in texts:
        words = text.split()
        if not words:
            continue
        own = _SPECIAL.intersection(words)
        if own:
            raise InputError(f"the text {text[:60]!r} has {min(own)}, which stands for something else: leave it out.")
        sentence = (SENTENCE_START, *words, SENTENCE_END)
        counts[0].update((word,) for word in sentence[1:])
        for length in range(2, order + 1):
            counts[length - 1].update(zip(*(sentence[offset:] for offset in range(length)), strict=False))
    if not counts[0]:
        raise InputError("a language model cannot be trained: there is no word in the texts.")
    return counts


def _adjusted_counts(counts: list[Counter]) -> list[Counter]:
    """Kneser-Ney counts: below the longest, how many words were seen before; nothing is before a sentence's start."""
    adjusted = []
    for own, longer in zip(counts, counts[1:], strict=False):
        before = Counter(ngram[1:] for ngram in longer)
        adjusted.append(
            Counter({ngram: count if ngram[0] == SENTENCE_START else before[ngram] for ngram, count in own.items()})
        )
    return [*adjusted, counts[-1]]


def _discount(counts: Counter) -> float:
    """Ney's estimate from how many n-grams were seen once and twice; one half where there are none to tell."""
    once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5


def _interpolate(counts: list[Counter]) -> tuple[list[dict], list[dict]]:
    """Probabilities of all n-grams, and the weights of the shorter ones after each context."""
    uniform = 1 / (len(counts[0]) + 1)  # the words, the end of a sentence and the unknown word
    probabilities: list[dict] = []
    backoffs: list[dict] = []
    for own in counts:
        discount = _discount(own)
        totals, kinds = Counter(), Counter()
        for ngram, count in own.items():
            totals[ngram[:-1]] += count
            kinds[ngram[:-1]] += 1
        weights = {context: discount * kinds[context] / total for context, total in totals.items()}
        shorter = probabilities[-1] if probabilities else {(): uniform}
        probabilities.append(
            {
                ngram: (count - discount) / totals[ngram[:-1]] + weights[ngram[:-1]] * shorter[ngram[1:]]
                for ngram, count in own.items()
            }
        )
        backoffs.append(weights)
    probabilities[0][UNKNOWN,] = backoffs[0][()] * uniform
    # the weights after a context of n words belong to its n-gram; the last one's are those of the longest
    return probabilities, [*backoffs[1:], {}]


def _arpa(probabilities: list[dict], backoffs: list[dict]) -> str:
    lines = ["\\data\\"]
    # the start of a sentence is a context, but never predicted
    logs = [{ngram: f"{math.log10(value):.7f}" for ngram, value in one.items()} for one in probabilities]
    logs[0][SENTENCE_START,] = "-99"
    lines += [f"ngram {length}={len(one)}" for length, one in enumerate(logs, start=1)]
    for length, (one, weights) in enumerate(zip(logs, backoffs, strict=True), start=1):
        lines += ["", f"\\{length}-grams:"]
        for ngram in sorted(one):
            fields = [one[ngram], " ".join(ngram)]
            if ngram in weights:
                fields.append(f"{math.log10(weights[ngram]):.7f}")
            lines.append("\t".join(fields))
    return "\n".join([*lines, "", "\\end\\", ""])
