"""Error rates are those of jiwer and of SpeechBrain, for any words."""

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from speechbrain.utils.edit_distance import accumulatable_wer_stats

from speechbrain_bestrq.error_rates import ErrorRates, edit_distance
from speechbrain_bestrq.metrics import bootstrap_rate

SPOKEN = st.text("ab é日", min_size=0, max_size=12)
PAIRS = st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=6).filter(
    lambda pairs: any(r.strip() for r, _ in pairs)
)


def collect(pairs, speakers=None):
    rates = ErrorRates()
    references, texts = zip(*pairs, strict=True)
    rates.append([f"u{number}" for number in range(len(pairs))], texts, references, speakers)
    return rates


@given(PAIRS)
def test_rates_are_jiwers(pairs):
    rates = collect(pairs)
    single = [[" ".join(text.split()) for text in side] for side in zip(*pairs, strict=True)]
    assert rates.wer.value == pytest.approx(jiwer.wer(*(list(side) for side in zip(*pairs, strict=True))))
    assert rates.cer.value == pytest.approx(jiwer.cer(*single))


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(0, 3), max_size=80))
def test_the_distance_is_speechbrains(reference, hypothesis):
    stats = accumulatable_wer_stats([reference], [hypothesis])
    expected = stats["insertions"] + stats["deletions"] + stats["substitutions"]
    assert edit_distance(reference, hypothesis) == edit_distance(hypothesis, reference) == expected


def test_the_distance_of_long_sequences_is_speechbrains():
    generator = np.random.default_rng(0)
    reference, hypothesis = (generator.integers(0, 28, size).tolist() for size in (300, 270))
    stats = accumulatable_wer_stats([reference], [hypothesis])
    assert edit_distance(reference, hypothesis) == sum(
        stats[key] for key in ("insertions", "deletions", "substitutions")
    )


def test_errors_of_each_utterance_add_up_to_the_rates():
    rates = collect([("the cat", "the"), ("", "oh"), ("no", "no"), ("so  it is", "so is it")])
    rows = rates.per_utterance()
    assert [row["ID"] for row in rows] == ["u0", "u1", "u2", "u3"] and len(rates) == 4
    assert [(row["wer_errors"], row["wer_total"]) for row in rows] == [(1, 2), (1, 0), (0, 1), (2, 3)]
    assert [(row["cer_errors"], row["cer_total"]) for row in rows] == [(4, 7), (2, 0), (0, 2), (2, 8)]
    for metric, rate in (("wer", rates.wer), ("cer", rates.cer)):
        errors, totals = ([row[f"{metric}_{kind}"] for row in rows] for kind in ("errors", "total"))
        assert rate == bootstrap_rate(errors, totals)


def test_intervals_resample_speakers_where_they_are_known():
    pairs = [("a", "a")] * 3 + [("a", "b")] * 3
    speakers = [f"s{number}" for number in range(6)] * 20
    known, unknown = collect(pairs * 20, speakers), collect(pairs * 20)
    assert known.by_speaker and not unknown.by_speaker
    assert known.wer == bootstrap_rate([0, 0, 0, 1, 1, 1] * 20, [1] * 120, speakers)
    assert known.wer.high - known.wer.low > 2 * (unknown.wer.high - unknown.wer.low)


@pytest.mark.parametrize("count", [1, 4])
def test_so_few_speakers_do_not_make_an_interval_narrow(count):
    pairs = [("a", "a"), ("a", "b")] * 20
    few = collect(pairs, [f"s{number % count}" for number in range(40)])
    assert not few.by_speaker and few.wer == collect(pairs).wer


def test_a_rate_counts_what_was_added_after_it_was_asked_for():
    rates = collect([("a", "a")])
    assert rates.wer.value == rates.cer.value == 0
    rates.append(["later"], ["b"], ["a"])
    assert rates.wer.value == rates.cer.value == 0.5


def test_the_file_of_alignments_has_the_same_count(tmp_path):
    rates = collect([("the cat sat", "the bat sat"), ("no", ""), ("", ""), ("", "oh")])
    text = rates.write(tmp_path / "wer.txt").read_text()
    assert "%WER 75.00 [ 3 / 4, 1 ins, 1 del, 1 sub ]" in text and rates.wer.value == 0.75
    assert "ALIGNMENTS" in text and "u0" in text and "bat" in text
    assert [path.name for path in tmp_path.iterdir()] == ["wer.txt"]


def test_an_utterance_counts_once():
    rates = collect([("a", "a")])
    with pytest.raises(ValueError, match="u0 was added before"):
        rates.append(["u0"], ["a"], ["a"])


def test_texts_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ErrorRates().append(["a", "b"], ["x", "y"], ["x"])


@pytest.mark.parametrize("rates", [ErrorRates(), collect([("", "oh")])])
def test_nothing_said_has_no_rate(rates):
    with pytest.raises(ValueError, match="there is no error rate"):
        _ = rates.wer
