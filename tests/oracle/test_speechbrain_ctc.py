"""Our CTC decoding against SpeechBrain's greedy search, and against the enumeration of all alignments.

SpeechBrain's beam search, alone, does not score the end of a sentence, takes words that begin no n-gram for unknown,
and cuts relative lengths: the tests named so fail where ``_Searcher`` or ``_Scorer`` leaves one of these as it is.
"""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from speechbrain.decoders.ctc import ctc_greedy_decode

from speechbrain_bestrq.ctc_decoding import UNKNOWN_OFFSET, BeamDecoder, greedy_decode
from speechbrain_bestrq.ngram import NGramModel, train_ngram
from speechbrain_bestrq.text import CharacterTokenizer, SentencePieceTokenizer

#: Prunes nothing.
ALL = {"beam_size": 10**6, "beam_prune_logp": -1e9, "token_prune_min_logp": -1e9}


@pytest.fixture
def lm(tmp_path):
    """A trigram model of words of A and B."""
    path = tmp_path / "lm.arpa"
    path.write_text(train_ngram(["A B", "AB A", "A B A", "BB", "B B"]))
    return NGramModel(path)


def draw(frames, units, seed, sharpness=1.0):
    """Log-probabilities of some frames."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(frames, units, generator=generator)).log_softmax(-1)


def enumerate_texts(log_probs, tokenizer):
    """CTC's log-probability of each text, with single spaces, as the sum over all alignments."""
    scores = defaultdict(list)
    values = log_probs.double().numpy()
    for path in itertools.product(range(values.shape[1]), repeat=len(values)):
        units = [unit for unit, _ in itertools.groupby(path) if unit != tokenizer.blank]
        scores[tokenizer.decode(units)].append(sum(row[unit] for row, unit in zip(values, path, strict=True)))
    return {text: float(np.logaddexp.reduce(parts)) for text, parts in scores.items()}


# ---------------------------------------------------------------- greedy


@pytest.mark.parametrize("seed", range(5))
def test_greedy_decoding_is_speechbrains(seed):
    log_probs = torch.stack([draw(30, 4, 10 * seed + row) for row in range(6)])
    lengths = torch.tensor([30, 1, 0, 17, 29, 13])
    expected = ctc_greedy_decode(log_probs, lengths / 30, blank_id=0)
    assert greedy_decode(log_probs, lengths) == expected and any(expected)
    shifted = log_probs.roll(-1, -1)
    for ours, theirs in zip(greedy_decode(shifted, lengths, blank=3), expected, strict=True):
        assert ours == [unit - 1 for unit in theirs]


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_without_a_language_model_is_greedy(seed):
    tokenizer = CharacterTokenizer("AB ")
    log_probs = torch.stack([draw(40, 4, 10 * seed + row, sharpness=2) for row in range(4)])
    lengths = torch.tensor([40, 22, 1, 0])
    greedy = [tokenizer.decode(units) for units in greedy_decode(log_probs, lengths)]
    assert BeamDecoder(tokenizer, beam_size=1)(log_probs, lengths) == greedy and " " in greedy[0]


# ---------------------------------------------------------------- all alignments


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("frames", "characters"), [(4, "AB"), (5, "A "), (5, "AB ")])
def test_the_best_text_has_the_highest_probability_of_all_its_alignments(seed, frames, characters):
    tokenizer = CharacterTokenizer(characters)
    log_probs = draw(frames, tokenizer.size, seed)
    texts = enumerate_texts(log_probs, tokenizer)
    best = max(texts, key=texts.get)
    found = BeamDecoder(tokenizer, **ALL).best(log_probs)
    assert found.text == best
    assert found.ctc_score == pytest.approx(texts[best], abs=1e-9) and found.score == found.ctc_score


def test_the_best_text_need_not_be_the_greedy_one():
    tokenizer = CharacterTokenizer("AB ")
    differ = 0
    for seed in range(20):
        log_probs = draw(5, 4, seed)
        greedy = tokenizer.decode(greedy_decode(log_probs[None], torch.tensor([5]))[0])
        differ += BeamDecoder(tokenizer, **ALL).best(log_probs).text != greedy
    assert 3 <= differ


def total_score(ctc_score, text, lm, alpha, beta):
    """What a text is to be scored with."""
    words = text.split()
    unknown = sum(word not in lm.words for word in words)
    log_prob = (lm.sentence_score(text) + UNKNOWN_OFFSET * unknown) * math.log(10)
    return ctc_score + alpha * log_prob + beta * len(words)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 1.2), (0.2, 0.0), (0.0, 0.0), (1.5, 4.0)])
def test_with_a_language_model_the_best_text_has_the_highest_sum(lm, seed, alpha, beta):
    tokenizer = CharacterTokenizer("AB ")
    log_probs = draw(6, 4, seed, sharpness=2)
    scores = {
        text: total_score(score, text, lm, alpha, beta) for text, score in enumerate_texts(log_probs, tokenizer).items()
    }
    best = max(scores, key=scores.get)
    found = BeamDecoder(tokenizer, lm, alpha=alpha, beta=beta, **ALL).best(log_probs)
    assert found.text == best and found.score == pytest.approx(scores[best], abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_subwords_spell_words_for_the_language_model_too(lm, tmp_path, seed):
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer", 5)
    tokenizer.fit({"a": "A B AB BA", "b": "BA AB A B"})
    assert sum(label.startswith("▁") for label in tokenizer.labels) >= 1
    log_probs = draw(5, tokenizer.size, seed, sharpness=2)
    texts = enumerate_texts(log_probs, tokenizer)
    best = max(texts, key=texts.get)
    plain = BeamDecoder(tokenizer, **ALL).best(log_probs)
    assert plain.text == best and plain.score == pytest.approx(texts[best], abs=1e-9)
    scores = {text: total_score(score, text, lm, 0.8, 1.2) for text, score in texts.items()}
    best = max(scores, key=scores.get)
    found = BeamDecoder(tokenizer, lm, **ALL).best(log_probs)
    assert found.text == best and found.score == pytest.approx(scores[best], abs=1e-6)


# ---------------------------------------------------------------- what SpeechBrain leaves out


def test_the_end_of_the_sentence_is_scored(tmp_path):
    path = tmp_path / "lm.arpa"
    # A and B are as likely, but no sentence ends in A
    path.write_text(
        "\\data\\\nngram 1=5\nngram 2=2\n\n\\1-grams:\n-5\t<unk>\n-99\t<s>\t0\n-0.1\t</s>\n-0.5\tA\t0\n-0.5\tB\t0\n\n"
        "\\2-grams:\n-4\tA </s>\n-0.01\tB </s>\n\n\\end\\\n"
    )
    tokenizer = CharacterTokenizer("AB ")
    log_probs = torch.tensor([[0.05, 0.5, 0.4, 0.05]]).log()
    assert BeamDecoder(tokenizer, path).best(log_probs).text == "B"
    # a space behind the last word is no second, unknown word; all but the space is pruned from the last frame
    log_probs = torch.tensor([[0.01, 0.5, 0.48, 0.01], [0.001, 0.001, 0.001, 0.997]]).log()
    found = BeamDecoder(tokenizer, path).best(log_probs)
    assert found.text == "B" and found.ctc_score == pytest.approx(math.log(0.48 * 0.997), abs=1e-6)
    assert found.score == pytest.approx(found.ctc_score + 0.8 * (-0.5 - 0.01) * math.log(10) + 1.2, abs=1e-6)


def test_a_word_that_begins_no_ngram_is_known(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n-5\t<unk>\n-99\t<s>\t0\n-0.1\t</s>\n-2\tAA\t0\n-0.5\tAB\n\n"
        "\\2-grams:\n-0.5\tAA AB\n\n\\end\\\n"
    )
    tokenizer = CharacterTokenizer("AB ")
    log_probs = torch.tensor([[0.02, 0.94, 0.02, 0.02], [0.94, 0.02, 0.02, 0.02], [0.02, 0.48, 0.48, 0.02]]).log()
    found = BeamDecoder(tokenizer, path).best(log_probs)
    assert found.text == "AB"
    assert found.score == pytest.approx(found.ctc_score + 0.8 * (-0.5 - 0.1) * math.log(10) + 1.2, abs=1e-6)


def test_no_frame_is_lost_to_relative_lengths():
    tokenizer = CharacterTokenizer("AB")
    decoder = BeamDecoder(tokenizer, beam_size=4)
    for frames in range(1, 30):
        log_probs = torch.full((1, 30, 3), 0.01).log()
        log_probs[..., 0] = math.log(0.98)
        log_probs[0, frames - 1] = torch.tensor([0.01, 0.98, 0.01]).log()
        log_probs[0, frames:] = torch.tensor([0.01, 0.01, 0.98]).log()
        assert decoder(log_probs, torch.tensor([frames])) == ["A"]
