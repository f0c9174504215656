"""From CTC's log-probabilities to texts: greedily, or by beam search with an n-gram language model."""

import math
import multiprocessing
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from speechbrain.decoders.ctc import CTCBeam, CTCBeamSearcher
from torch import Tensor

from speechbrain_bestrq.error_rates import ErrorRates
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.ngram import SENTENCE_END, NGramModel, import_kenlm, read_words
from speechbrain_bestrq.ranks import rank_and_size
from speechbrain_bestrq.text import WORD_START, Tokenizer

#: Added to the log-probability of an unknown word, to the base of 10, and to the score of a beginning of a word with
#: which no known word begins: as in SpeechBrain.
UNKNOWN_OFFSET = -10.0
#: Letters from which on the beginning of an unknown word costs more with its length: as in SpeechBrain.
USUAL_LETTERS = 6
#: Share of a language model's words that the units must be able to spell: fewer, and it is one of another case.
LEAST_SPELT = 0.5


# ---------------------------------------------------------------- greedy


def greedy_decode(log_probs: Tensor, lengths: Tensor, blank: int = 0) -> list[list[int]]:
    """Take the best unit of each frame, merge repetitions, drop blanks (Graves et al., ICML 2006).

    Arguments
    ---------
    log_probs : Tensor
        Shape (B, T, V); logits will do.
    lengths : Tensor
        Frames of each utterance, int64, shape (B,), on any device.
    blank : int
        The blank.

    Returns
    -------
    list of list of int
        Units of each utterance.

    Example
    -------
    >>> scores = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2]]), 3).float()
    >>> greedy_decode(scores, torch.tensor([4]))
    [[1, 1]]
    """
    _check_batch(log_probs, lengths)
    best = log_probs.argmax(-1)
    counts = (best != blank) & valid_frames(lengths.to(best.device), best.shape[1])
    counts[:, 1:] &= best[:, 1:] != best[:, :-1]
    # one transfer to the host for both
    rows = best.masked_fill(~counts, -1).cpu().numpy()
    return [row[row >= 0].tolist() for row in rows]


def _check_batch(log_probs: Tensor, lengths: Tensor) -> None:
    if log_probs.ndim != 3:
        raise ValueError(f"log_probs have the shape (batch, frames, units), not {tuple(log_probs.shape)}.")
    if lengths.is_floating_point() or lengths.shape != log_probs.shape[:1]:
        raise ValueError("lengths are whole numbers of frames, one for each utterance: not relative ones.")


# ---------------------------------------------------------------- beam search


class _Scorer:
    """What SpeechBrain's beam search asks of a language model, as its ``KenlmScorer``, but for

    - a word that ends an utterance with a space behind it, which is no second, unknown word;
    - the words, which come from the ARPA, compressed or not, and include those that begin no n-gram.

    A state is KenLM's.
    """

    def __init__(self, lm: NGramModel, alpha: float, beta: float):
        self.order = lm.order
        self._lm = lm
        self._alpha, self._beta = alpha, beta
        self._sorted = sorted(lm.words)
        self._known = set(lm.words)

    def get_start_state(self) -> Any:
        return self._lm.start()

    def score(self, state: Any, word: str, is_last_word: bool = False) -> tuple[float, Any]:
        total, bonus, after = 0.0, 0.0, state
        if word:
            total, after = self._lm.score(state, word)
            bonus = self._beta
            if word not in self._known:
                total += UNKNOWN_OFFSET
        if is_last_word:
            total += self._lm.score(after, SENTENCE_END)[0]
        return self._alpha * total * math.log(10) + bonus, after

    def score_partial_token(self, beginning: str) -> float:
        place = bisect_left(self._sorted, beginning)
        if place < len(self._sorted) and self._sorted[place].startswith(beginning):
            return 0.0
        return UNKNOWN_OFFSET * max(len(beginning), USUAL_LETTERS) / USUAL_LETTERS


class _Searcher(CTCBeamSearcher):
    """SpeechBrain's beam search, which does score the end of the sentence."""

    def finalize_decoding(
        self,
        beams: list[CTCBeam],
        cached_lm_scores: dict,
        cached_p_lm_scores: dict,
        force_next_word: bool = False,
        is_end: bool = False,
    ) -> list[CTCBeam]:
        # as the parent's, which leaves out is_eos
        closed = [
            CTCBeam(
                text=beam.text,
                full_text=beam.full_text,
                next_word=beam.partial_word,
                partial_word="",
                last_token=None,
                last_token_index=None,
                text_frames=[],
                partial_frames=(-1, -1),
                score=beam.score,
            )
            for beam in beams
        ]
        scored = self.get_lm_beams(self.merge_beams(closed), cached_lm_scores, cached_p_lm_scores, is_eos=is_end)
        return self.sort_beams(scored)


@dataclass(frozen=True)
class Hypothesis:
    """A text and its scores, natural logarithms."""

    text: str
    ctc_score: float
    """CTC's probability of the text: of all alignments that were not pruned."""
    score: float
    """With the language model."""


class BeamDecoder:
    """CTC beam search over texts, by SpeechBrain's ``CTCBeamSearcher``, with or without an n-gram language model.

    A text's score is its CTC log-probability + alpha * its log-probability in the language model, with the sentence's
    end + beta * its words. Scores are in float64. The same input gives the same text, with any
    number of workers.

    Arguments
    ---------
    tokenizer : Tokenizer
        Trained. Words are separated by its space, or begin with SentencePiece's mark.
    lm : str, Path or NGramModel, optional
        An n-gram model of words in ARPA format, compressed by gzip or not; without one alpha and
        beta mean nothing.
    beam_size : int
        Texts kept after each frame. 143, alpha and beta are those of MP3S (arXiv 2308.14456).
    alpha, beta : float
        See above: weight of the language model, bonus of a word.
    beam_prune_logp : float
        Texts whose score is so much lower than the best one's are dropped.
    token_prune_min_logp : float
        Units with a lower log-probability in a frame are not tried there, unless they are the best.
    workers : int
        Processes that share the utterances of a batch, each forked from this one; 1 forks none.

    Raises
    ------
    InputError
        If an option is none, KenLM is missing, or the language model cannot be used: see :func:`check_language_model`.

    Example
    -------
    >>> from speechbrain_bestrq.text import CharacterTokenizer
    >>> decoder = BeamDecoder(CharacterTokenizer("AB "))
    >>> log_probs = torch.tensor([[[0.5, 0.4, 0.05, 0.05], [0.5, 0.4, 0.05, 0.05]]]).log()
    >>> decoder(log_probs, torch.tensor([2])), greedy_decode(log_probs, torch.tensor([2]))
    (['A'], [[]])
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lm: str | os.PathLike | NGramModel | None = None,
        beam_size: int = 143,
        alpha: float = 0.8,
        beta: float = 1.2,
        beam_prune_logp: float = -10.0,
        token_prune_min_logp: float = -5.0,
        workers: int = 1,
    ):
        for name, value in (("beam_size", beam_size), ("workers", workers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}: give a whole number, 1 at least.")
        for name, value in (("beam_prune_logp", beam_prune_logp), ("token_prune_min_logp", token_prune_min_logp)):
            if not value < 0:
                raise InputError(f"{name} is {value!r}: give a negative number.")
        if lm is not None and not isinstance(lm, NGramModel):
            check_language_model(lm, tokenizer)
            lm = NGramModel(lm)
        self.tokenizer, self.lm, self.workers = tokenizer, lm, workers
        self._settings = {
            "beam_size": beam_size,
            "beam_prune_logp": beam_prune_logp,
            "token_prune_min_logp": token_prune_min_logp,
        }
        # pruning by history drops texts whose alignments only differ, and saves no time
        self._searcher = _Searcher(tokenizer.blank, tokenizer.labels, prune_history=False, **self._settings)
        self._set_weights(alpha, beta)

    def _set_weights(self, alpha: float, beta: float) -> None:
        if not (math.isfinite(alpha) and alpha >= 0 and math.isfinite(beta)):
            raise InputError(f"alpha is {alpha!r}, beta is {beta!r}: give numbers, alpha not below 0.")
        self.alpha, self.beta = alpha, beta
        if self.lm is not None:
            self._searcher.lm = _Scorer(self.lm, alpha, beta)

    def with_weights(self, alpha: float, beta: float) -> "BeamDecoder":
        """Give the same decoder, of the same language model, with other weights.

        Arguments
        ---------
        alpha, beta : float
            The weights.

        Returns
        -------
        BeamDecoder
        """
        return BeamDecoder(self.tokenizer, self.lm, alpha=alpha, beta=beta, workers=self.workers, **self._settings)

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """Decode a batch.

        Arguments
        ---------
        log_probs : Tensor
            Log-probabilities of the units, shape (B, T, V).
        lengths : Tensor
            Frames of each utterance, int64, shape (B,).

        Returns
        -------
        list of str
            The best text of each.

        Raises
        ------
        ValueError
            If these are no log-probabilities of the tokenizer's units.
        """
        _check_batch(log_probs, lengths)
        batch = log_probs.detach().cpu()
        return self.decode([one[:frames] for one, frames in zip(batch, lengths.tolist(), strict=True)])

    def decode(self, utterances: Sequence[Tensor | NDArray]) -> list[str]:
        """Decode utterances.

        Arguments
        ---------
        utterances : sequence of Tensor or array
            Log-probabilities of the units, each of shape (T, V), on the host.

        Returns
        -------
        list of str
            The best text of each.

        Raises
        ------
        InputError
            If a process was killed.
        """
        if min(self.workers, len(utterances)) < 2:
            return [self.best(one).text for one in utterances]
        # forked: the language model and what is to be decoded are shared, not copied to each
        processes = min(self.workers, len(utterances))
        context = multiprocessing.get_context("fork")
        try:
            with ProcessPoolExecutor(processes, context, _adopt, (self, utterances)) as pool:
                return list(pool.map(_decode_adopted, range(len(utterances))))
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {processes} decoding processes was killed, mostly for want of memory: give fewer "
                "--decoding_workers, or a smaller language model, and --test_only."
            ) from error

    def best(self, log_probs: Tensor | NDArray) -> Hypothesis:
        """Find the best text of an utterance.

        Arguments
        ---------
        log_probs : Tensor or array
            Log-probabilities of the units, shape (T, V), on the host.

        Returns
        -------
        Hypothesis
        """
        scores = _to_array(log_probs)
        if scores.ndim != 2 or scores.shape[1] != self.tokenizer.size:
            raise ValueError(f"log_probs are of {self.tokenizer.size} units, not of the shape {scores.shape}.")
        if len(scores) and not np.allclose(np.logaddexp.reduce(scores, 1), 0.0, atol=0.05):  # bf16's are that near
            raise ValueError("log_probs do not sum to 1 in each frame: give log_softmax of the logits.")
        found = self._searcher.decode_log_probs(scores, len(scores))[0]
        return Hypothesis(found.text, float(found.score), float(found.lm_score))


def decode_on_all_ranks(decoder: BeamDecoder, utterances: Sequence[Tensor | NDArray]) -> list[str]:
    """Decode utterances that all ranks hold, each rank its share; a collective of all ranks.

    Arguments
    ---------
    decoder : BeamDecoder
        The same on all.
    utterances : sequence of Tensor or array
        As :meth:`BeamDecoder.decode` takes them, the same on all.

    Returns
    -------
    list of str
        The best text of each utterance, on all ranks.
    """
    rank, ranks = rank_and_size()
    if ranks == 1:
        return decoder.decode(utterances)
    shares: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(shares, decoder.decode(utterances[rank::ranks]))
    return [shares[place % ranks][place // ranks] for place in range(len(utterances))]


def _to_array(log_probs: Tensor | NDArray) -> NDArray:
    """Sums of hundreds of frames want float64; NumPy knows no bf16."""
    if isinstance(log_probs, Tensor):
        return log_probs.detach().double().numpy()
    return np.asarray(log_probs, dtype=np.float64)


#: The decoder of a forked worker, and what it is to decode some of.
_adopted: tuple[BeamDecoder, Sequence[Tensor | NDArray]] | None = None


def _adopt(decoder: BeamDecoder, utterances: Sequence[Tensor | NDArray]) -> None:
    global _adopted
    _adopted = decoder, utterances
    torch.set_num_threads(1)  # the parent's threads are not there
    # a parent that is killed tells its executor's workers nothing, and they would keep the language model in memory
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _decode_adopted(place: int) -> str:
    decoder, utterances = _adopted
    return decoder.best(utterances[place]).text


def check_language_model(path: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """See whether a language model can be used, without reading its n-grams: for the start of a run.

    Arguments
    ---------
    path : str or Path
        Of the model.
    tokenizer : Tokenizer
        Trained.

    Raises
    ------
    InputError
        If KenLM is not installed, or the file is not an n-gram model in ARPA format, or
        most of its words cannot be spelt with the tokenizer's units.

    Example
    -------
    >>> from speechbrain_bestrq.ngram import train_ngram
    >>> from speechbrain_bestrq.text import CharacterTokenizer
    >>> path = getfixture("tmp_path") / "lm.arpa"
    >>> _ = path.write_text(train_ngram(["the cat"], order=2))
    >>> check_language_model(path, CharacterTokenizer())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: ...lm.arpa: only 0 % of its words can be spelt with the tokenizer's units, \
not 'cat': give a language model of words as in the transcripts, in the same case.
    """
    import_kenlm()
    _, words = read_words(path)
    letters = {letter for unit, label in enumerate(tokenizer.labels) if unit != tokenizer.blank for letter in label}
    if not letters & {" ", WORD_START}:
        raise InputError(f"{path} is of words, but the tokenizer's units have no space between words: leave it out.")
    foreign = [word for word in words if not letters.issuperset(word)]
    share = 1 - len(foreign) / max(len(words), 1)
    if share < LEAST_SPELT:
        raise InputError(
            f"{path}: only {100 * share:.0f} % of its words can be spelt with the tokenizer's units, not "
            f"{foreign[0]!r}: give a language model of words as in the transcripts, in the same case."
        )


# ---------------------------------------------------------------- tuning


@dataclass(frozen=True)
class Tuning:
    """What a grid of weights came to."""

    alpha: float
    beta: float
    table: list[dict[str, float]]
    """"alpha", "beta", "wer" and "cer" of each point, in the order in which they were tried."""


def tune(
    decoder: BeamDecoder,
    log_probs: Sequence[Tensor | NDArray],
    references: Sequence[str],
    alphas: Sequence[float],
    betas: Sequence[float],
    decode: Callable[[BeamDecoder, Sequence[Tensor | NDArray]], list[str]] = BeamDecoder.decode,
) -> Tuning:
    """Find the weights of the language model with the lowest word error rate, on a validation set.

    For a validation set only: on a test set, its rate would be one that was chosen, not measured.

    Arguments
    ---------
    decoder : BeamDecoder
        With a language model.
    log_probs : sequence of Tensor or array
        Log-probabilities of the units, each of shape (T, V), on the host.
    references : sequence of str
        What was said.
    alphas, betas : sequence of float
        The weights to try, each with each.
    decode : callable
        Decodes with each: :func:`decode_on_all_ranks`, where several hold the same.

    Returns
    -------
    Tuning
        Of equal word error rates the lower character error rate is better, then the point tried first.

    Raises
    ------
    InputError
        If there is no language model, or nothing to try.
    """
    if decoder.lm is None:
        raise InputError("alpha and beta weigh a language model, but there is none: give lm.")
    if not alphas or not betas:
        raise InputError("there is nothing to tune: give one alpha and one beta at least.")
    names = [str(number) for number in range(len(references))]
    table, errors = [], []
    for alpha in alphas:
        for beta in betas:
            rates = ErrorRates()
            rates.append(names, decode(decoder.with_weights(alpha, beta), log_probs), references)
            rows = rates.per_utterance()
            errors.append(tuple(sum(row[f"{metric}_errors"] for row in rows) for metric in ("wer", "cer")))
            table.append({"alpha": alpha, "beta": beta, "wer": rates.wer.value, "cer": rates.cer.value})
    best = table[errors.index(min(errors))]
    return Tuning(best["alpha"], best["beta"], table)
