"""Decoding is the same in any batch and with any number of workers; weights are tuned on errors; bad input is named."""

import gzip
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speechbrain_bestrq.ctc_decoding import BeamDecoder, check_language_model, decode_on_all_ranks, greedy_decode, tune
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ngram import NGramModel, train_ngram
from speechbrain_bestrq.text import CharacterTokenizer, SentencePieceTokenizer

TEXTS = ["THE CAT SAT", "A HAT", "IT'S HIS HAT"]


@pytest.fixture
def lm_file(tmp_path):
    """A language model of TEXTS."""
    path = tmp_path / "lm.arpa"
    path.write_text(train_ngram(TEXTS))
    return path


@pytest.fixture(scope="module")
def heard():
    """Noisy log-probabilities of TEXTS, each of another length."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = CharacterTokenizer()
    utterances = []
    for text in TEXTS:
        units = [unit for one in tokenizer.encode(text) for unit in (one, 0)]
        logits = 5.0 * torch.nn.functional.one_hot(torch.tensor(units), tokenizer.size)
        utterances.append((logits + 1.9 * torch.randn(logits.shape, generator=generator)).log_softmax(-1))
    return utterances


def batch_of(utterances, junk=9.0):
    """A padded batch and its lengths; the padding is no probability."""
    lengths = torch.tensor([len(one) for one in utterances])
    padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=junk)
    return padded, lengths


# ---------------------------------------------------------------- batches


def test_padding_changes_no_text(heard, lm_file):
    padded, lengths = batch_of(heard)
    decoder = BeamDecoder(CharacterTokenizer(), lm_file, beam_size=8)
    assert decoder(padded, lengths) == [decoder.best(one).text for one in heard]
    alone = [greedy_decode(one[None], torch.tensor([len(one)]))[0] for one in heard]
    assert greedy_decode(padded, lengths) == alone


def test_utterances_without_frames_have_no_text(lm_file):
    log_probs, lengths = torch.randn(2, 5, 29).log_softmax(-1), torch.tensor([0, 0])
    assert greedy_decode(log_probs, lengths) == [[], []]
    for lm in (None, lm_file):
        assert BeamDecoder(CharacterTokenizer(), lm)(log_probs, lengths) == ["", ""]
    assert greedy_decode(torch.zeros(1, 0, 29), torch.tensor([0])) == [[]]


def test_a_worker_that_is_killed_is_one_clear_line_and_no_wait_for_ever(heard, monkeypatch):
    decoder = BeamDecoder(CharacterTokenizer(), workers=2)
    monkeypatch.setattr(BeamDecoder, "best", lambda decoder, one: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="decoding processes was killed.*fewer --decoding_workers"):
        decoder(*batch_of(heard))


#: Decodes for a minute, and says in which processes.
SLOW = """
import os, time, torch
from speechbrain_bestrq.ctc_decoding import BeamDecoder
from speechbrain_bestrq.text import CharacterTokenizer

def best(decoder, one):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece: two processes write to this pipe
    time.sleep(60)

BeamDecoder.best = best
tokenizer = CharacterTokenizer()
BeamDecoder(tokenizer, workers=2).decode([torch.zeros(2, tokenizer.size)] * 4)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_run_that_started_them(number):
    run = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True)
    workers = [int(run.stdout.readline()) for _ in range(2)]
    run.send_signal(number)
    run.wait()
    ends = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < ends:
        time.sleep(0.1)
    assert [worker for worker in workers if is_alive(worker)] == []


def is_alive(process):
    """Whether it runs: one that nobody has waited for yet does not."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_same_texts_with_any_number_of_workers_and_again(heard, lm_file):
    texts = [
        BeamDecoder(CharacterTokenizer(), lm_file, beam_size=8, workers=workers)(*batch_of(heard))
        for workers in (1, 1, 2, 7)
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(set(texts[0])) == 3


def test_ranks_that_share_the_work_have_the_same_texts_in_their_order(heard, monkeypatch):
    decoder = BeamDecoder(CharacterTokenizer(), beam_size=8)
    utterances = [*heard, *reversed(heard), heard[1]]
    assert decode_on_all_ranks(decoder, utterances) == decoder.decode(utterances)
    shares = [decoder.decode(utterances[rank::3]) for rank in range(3)]
    decoded = []

    def gather(found, own):
        decoded.append(own)
        found[:] = shares

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    assert decode_on_all_ranks(decoder, utterances) == decoder.decode(utterances)
    assert decoded == [shares[1]]


def test_a_language_model_helps(heard, lm_file):
    tokenizer = CharacterTokenizer()
    greedy = [tokenizer.decode(units) for units in greedy_decode(*batch_of(heard))]
    assert BeamDecoder(tokenizer, lm_file, beam_size=8)(*batch_of(heard)) == TEXTS and greedy != TEXTS


def test_a_compressed_language_model_gives_the_same_scores(heard, lm_file, tmp_path):
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(lm_file.read_bytes()))
    plain, other = (BeamDecoder(CharacterTokenizer(), path, beam_size=8) for path in (lm_file, packed))
    assert [plain.best(one) for one in heard] == [other.best(one) for one in heard]


def test_bf16_and_gradients_are_taken(heard, lm_file):
    decoder = BeamDecoder(CharacterTokenizer(), lm_file, beam_size=8)
    log_probs, lengths = batch_of([heard[0]])
    assert decoder(log_probs.bfloat16(), lengths) == decoder(log_probs.requires_grad_(), lengths) == [TEXTS[0]]


@pytest.mark.parametrize("lengths", [torch.tensor([1.0, 0.5]), torch.tensor([3]), torch.tensor([[3, 3]])])
def test_relative_lengths_are_refused(lengths):
    log_probs = torch.randn(2, 5, 29).log_softmax(-1)
    for decode in (greedy_decode, BeamDecoder(CharacterTokenizer())):
        with pytest.raises(ValueError, match="whole numbers of frames"):
            decode(log_probs, lengths)


def test_what_is_no_log_probability_of_the_units_is_refused():
    decoder = BeamDecoder(CharacterTokenizer())
    with pytest.raises(ValueError, match="do not sum to 1"):
        decoder(torch.randn(1, 5, 29), torch.tensor([5]))
    with pytest.raises(ValueError, match="of 29 units"):
        decoder(torch.randn(1, 5, 30).log_softmax(-1), torch.tensor([5]))
    with pytest.raises(ValueError, match="shape"):
        greedy_decode(torch.randn(5, 29), torch.tensor([5]))


# ---------------------------------------------------------------- tuning


def test_tuning_finds_the_lowest_error_rate_of_the_grid(heard, lm_file):
    decoder = BeamDecoder(CharacterTokenizer(), lm_file, beam_size=8)
    alphas, betas = (0.0, 0.8), (-9.0, 1.2)
    tuning = tune(decoder, heard, TEXTS, alphas, betas)
    assert [(row["alpha"], row["beta"]) for row in tuning.table] == [(a, b) for a in alphas for b in betas]
    ranks = [(row["wer"], row["cer"]) for row in tuning.table]
    best = tuning.table[ranks.index(min(ranks))]
    assert (tuning.alpha, tuning.beta) == (best["alpha"], best["beta"]) and min(ranks) < max(ranks)
    for row in tuning.table:
        other = BeamDecoder(CharacterTokenizer(), lm_file, 8, row["alpha"], row["beta"])
        texts = [other.best(one).text for one in heard]
        wrong = sum(text != spoken for text, spoken in zip(texts, TEXTS, strict=True))
        assert (row["wer"] == 0) == (wrong == 0)


def test_other_weights_leave_the_decoder_as_it_was(heard, lm_file):
    decoder = BeamDecoder(CharacterTokenizer(), lm_file, beam_size=8)
    before = [decoder.best(one) for one in heard]
    other = decoder.with_weights(0.1, -3.0)
    assert other.lm is decoder.lm and (other.alpha, other.beta) == (0.1, -3.0)
    assert [other.best(one) for one in heard] != before == [decoder.best(one) for one in heard]


def test_without_a_language_model_there_is_nothing_to_tune(heard, lm_file):
    with pytest.raises(InputError, match="there is none: give lm"):
        tune(BeamDecoder(CharacterTokenizer()), heard, TEXTS, [0.5], [1.0])
    with pytest.raises(InputError, match="nothing to tune"):
        tune(BeamDecoder(CharacterTokenizer(), lm_file), heard, TEXTS, [], [1.0])


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 0},
        {"beam_size": 1.5},
        {"workers": 0},
        {"alpha": -1.0},
        {"alpha": math.nan},
        {"beta": math.inf},
        {"beam_prune_logp": 0.0},
        {"token_prune_min_logp": math.nan},
    ],
)
def test_options_that_are_none_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        BeamDecoder(CharacterTokenizer(), **options)


def test_a_language_model_of_another_case_is_refused(tmp_path):
    path = tmp_path / "lower.arpa"
    path.write_text(train_ngram([text.lower() for text in TEXTS]))
    for use in (check_language_model, lambda path, tokenizer: BeamDecoder(tokenizer, path)):
        with pytest.raises(InputError, match="only 0 % of its words can be spelt .* not 'a'"):
            use(path, CharacterTokenizer())
    check_language_model(path, CharacterTokenizer(" 'abcdefghijklmnopqrstuvwxyz"))


def test_a_language_model_needs_units_with_spaces(lm_file, tmp_path):
    with pytest.raises(InputError, match="no space between words"):
        check_language_model(lm_file, CharacterTokenizer("'ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer", 12)
    tokenizer.fit(dict(enumerate(TEXTS)))
    check_language_model(lm_file, tokenizer)


def test_a_language_model_that_is_none_is_refused_before_its_ngrams_are_read(tmp_path, monkeypatch):
    path = tmp_path / "lm.arpa"
    path.write_text("once upon a time")
    monkeypatch.setattr(NGramModel, "__init__", lambda *_: pytest.fail("the n-grams were read"))
    with pytest.raises(InputError, match="is no ARPA file"):
        BeamDecoder(CharacterTokenizer(), path)
