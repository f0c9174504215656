"""Scores of verification trials against plain loops, and intervals against what they promise."""

import csv

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from speechbrain_bestrq import verification
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.metrics import equal_error_rate, minimum_detection_cost
from speechbrain_bestrq.results import compare_runs, write_errors
from speechbrain_bestrq.verification import (
    SpeakerEmbeddings,
    normalize_scores,
    read_scores,
    speaker_means,
    write_scores,
)
from speechbrain_bestrq.verification_errors import (
    _Errors,
    compare_scores,
    compare_scores_over_seeds,
    cosine_embedding_loss,
    draw_scores,
    trial_errors,
    verification_rates,
)


def make_trials(speakers=12, count=400, seed=0):
    """Trials between so many speakers with ten utterances each, half of them targets."""
    generator = np.random.default_rng(seed)
    trials = []
    while len(trials) < count:
        label = len(trials) % 2
        one, other = generator.integers(speakers, size=2)
        if label:
            other = one
        if label == (one == other):
            first, second = generator.choice(10, 2, replace=False)
            trials.append((label, f"id{one:02d}/a/{first}", f"id{other:02d}/b/{second}"))
    return trials


def make_scores(trials, gap=1.5, spread=0.5, seed=0, decimals=None):
    """Scores of trials, with an effect of each speaker."""
    generator = np.random.default_rng(seed)
    effects = {
        name: spread * generator.standard_normal() for name in sorted({t[side][:4] for t in trials for side in (1, 2)})
    }
    scores = [
        gap * label + effects[one[:4]] + effects[other[:4]] + generator.standard_normal()
        for label, one, other in trials
    ]
    return np.array(scores) if decimals is None else np.round(scores, decimals)


def make_embeddings(trials, size=8, seed=0):
    """Random vectors of the utterances of trials, of any length."""
    names = sorted({name for _, *pair in trials for name in pair})
    generator = torch.Generator().manual_seed(seed)
    return SpeakerEmbeddings(names, 3 * torch.randn(len(names), size, generator=generator)), names


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("chunk", [7, 100000])
def test_scores_are_cosines_in_the_order_of_the_trials_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr(verification, "TRIAL_CHUNK", chunk)
    trials = make_trials()
    names = sorted({name for _, *pair in trials for name in pair})
    vectors = torch.randn(len(names), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = SpeakerEmbeddings(names, vectors).score(trials)
    for score, (_, first, second) in zip(scores, trials, strict=True):
        one, other = (vectors[names.index(name)].numpy() for name in (first, second))
        assert score == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-6)


def test_a_trial_without_an_embedding_and_a_broken_embedding_are_named():
    with pytest.raises(InputError, match="1 utterances of the trials have no embedding, first id9/a/1"):
        SpeakerEmbeddings(["id1/a/1"], torch.ones(1, 2)).score([(0, "id1/a/1", "id9/a/1")])
    with pytest.raises(InputError, match="1 of 2 embeddings are not finite, such as that of id2/a/1"):
        SpeakerEmbeddings(["id1/a/1", "id2/a/1"], torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]))


@pytest.mark.parametrize("chunk", [3, 100000])
@pytest.mark.parametrize("top", [5, 10**6])
def test_normalised_scores_are_those_of_a_plain_loop(top, chunk, monkeypatch):
    monkeypatch.setattr(verification, "COHORT_CHUNK", chunk)
    trials = make_trials(count=60)
    embeddings, names = make_embeddings(trials)
    cohort = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    scores = embeddings.score(trials)
    normalised = normalize_scores(scores, trials, embeddings, cohort, top)
    for value, score, (_, *pair) in zip(normalised, scores, trials, strict=True):
        expected = 0.0
        for name in pair:
            against = np.sort((cohort @ embeddings.vectors[names.index(name)]).double().numpy())[::-1][:top]
            expected += (score - against.mean()) / against.std() / 2
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_normalised_scores_do_not_depend_on_the_sides_or_the_other_trials():
    trials = make_trials(count=60)
    embeddings, _ = make_embeddings(trials)
    cohort = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)

    def normalised(some):
        return normalize_scores(embeddings.score(some), some, embeddings, cohort, 5)

    swapped = [(label, second, first) for label, first, second in trials]
    np.testing.assert_allclose(normalised(swapped), normalised(trials), rtol=1e-6)
    np.testing.assert_allclose(normalised(trials[10:20]), normalised(trials)[10:20], rtol=1e-6)


def test_a_cohort_all_alike_gives_finite_scores_and_one_of_a_single_speaker_is_refused():
    trials = make_trials(count=10)
    embeddings, _ = make_embeddings(trials)
    alike = torch.eye(8)[:1].repeat(4, 1)
    assert np.isfinite(normalize_scores(embeddings.score(trials), trials, embeddings, alike)).all()
    for cohort, top in ((alike[:1], 300), (alike, 1)):
        with pytest.raises(InputError, match="give at least 2"):
            normalize_scores(embeddings.score(trials), trials, embeddings, cohort, top)


def test_a_cohort_has_the_mean_direction_of_each_speaker():
    names = ["id2/a/1", "id1/a/1", "id2/b/1", "id2/b/2"]
    vectors = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    cohort = speaker_means(SpeakerEmbeddings(names, vectors), names)
    units = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(cohort[0], units[1])
    torch.testing.assert_close(cohort[1], torch.nn.functional.normalize(units[[0, 2, 3]].mean(0), dim=0))


def test_the_loss_of_trials_is_pytorchs():
    trials = make_trials()
    embeddings, _ = make_embeddings(trials)
    first, second = (embeddings.select([trial[side] for trial in trials]) for side in (1, 2))
    targets = torch.tensor([2 * label - 1 for label, _, _ in trials])
    expected = torch.nn.functional.cosine_embedding_loss(first, second, targets)
    assert cosine_embedding_loss(embeddings.score(trials), trials) == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "tied"])
@pytest.mark.parametrize("seed", range(5))
def test_a_resample_is_the_list_with_each_trial_as_often_as_its_speakers_were_drawn(seed, decimals):
    trials = make_trials(seed=seed)
    scores = make_scores(trials, seed=seed, decimals=decimals)
    errors = _Errors(scores, trials)
    drawn = errors.draws(seed, 1)[0]
    assert drawn.sum() == len(errors.speakers) == 12
    times = dict(zip(errors.speakers.tolist(), drawn.tolist(), strict=True))
    counts = [times[one[:4]] if one[:4] == other[:4] else times[one[:4]] * times[other[:4]] for _, one, other in trials]
    repeated, targets = np.repeat(scores, counts), np.repeat([label for label, _, _ in trials], counts)
    eer, mindcf = errors.resampled(drawn)
    assert eer == pytest.approx(equal_error_rate(repeated, targets), abs=1e-12)
    assert mindcf == pytest.approx(minimum_detection_cost(repeated, targets), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_of_two_speakers_the_trials_are_resampled(seed):
    """Both speakers are in each resample that has trials of both kinds: it would always be the same one."""
    trials = make_trials(speakers=2, count=60, seed=seed)
    scores = make_scores(trials, seed=seed)
    errors = _Errors(scores, trials)
    drawn = errors.draws(seed, 1)[0]
    assert len(errors.speakers) == 2 and len(drawn) == drawn.sum() == len(trials)
    repeated, targets = np.repeat(scores, drawn), np.repeat([label for label, _, _ in trials], drawn)
    assert errors.resampled(drawn)[0] == pytest.approx(equal_error_rate(repeated, targets), abs=1e-12)
    eer = verification_rates(scores, trials).eer
    assert eer.low < eer.value < eer.high


def test_rates_are_those_of_the_metrics_and_intervals_hold_them():
    trials = make_trials()
    scores = make_scores(trials)
    targets = [label for label, _, _ in trials]
    rates = verification_rates(scores, trials)
    assert rates.eer.value == equal_error_rate(scores, targets)
    assert rates.mindcf.value == minimum_detection_cost(scores, targets)
    assert 0 <= rates.eer.low < rates.eer.value < rates.eer.high <= 1
    assert 0 <= rates.mindcf.low < rates.mindcf.high <= 1
    assert rates == verification_rates(scores, trials) != verification_rates(scores, trials, seed=1)


def test_intervals_hold_95_of_100_resamples_as_many_below_as_above():
    trials = make_trials()
    scores = make_scores(trials)
    errors = _Errors(scores, trials)
    outcomes = np.array([errors.resampled(drawn) for drawn in errors.draws(0, 200)])
    rates = verification_rates(scores, trials, resamples=200)
    for number, found in enumerate((rates.eer, rates.mindcf)):
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(outcomes[:, number], [0.025, 0.975])))


def test_resamples_vary_as_much_as_other_speakers_would():
    trials = make_trials(speakers=15, count=1000)  # of all speakers many
    lists = [_Errors(make_scores(trials, gap=2.0, spread=1.0, seed=seed), trials) for seed in range(100)]
    spreads = [np.std([one.resampled(drawn)[0] for drawn in one.draws(0, 80)]) for one in lists[:8]]
    assert 0.85 < np.mean(spreads) / np.std([one.rates[0] for one in lists]) < 1.3


def test_speakers_that_differ_widen_the_interval():
    trials = make_trials(count=2000)

    def width(spread):
        eer = verification_rates(make_scores(trials, spread=spread, gap=2), trials, resamples=300).eer
        return eer.high - eer.low

    assert width(1.5) > 1.5 * width(0.0)


def test_resamples_that_lack_a_kind_of_trials_are_left_out():
    trials = [(1, "id1/a/1", "id1/b/1"), (0, "id1/a/1", "id2/a/1")]
    rates = verification_rates(np.array([1.0, 0.0]), trials)
    assert (rates.eer.value, rates.eer.low, rates.eer.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "label", "message"), [([1.0, 2.0], 1, "all trials are of one kind"), ([1.0, np.nan], 0, "not finite")]
)
def test_trials_that_cannot_be_evaluated_are_refused(scores, label, message):
    trials = [(1, "id1/a/1", "id1/b/1"), (label, "id1/a/1", "id2/b/1")]
    with pytest.raises(InputError, match=message):
        verification_rates(np.array(scores), trials)


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "tied"])
def test_at_the_threshold_both_kinds_of_errors_are_as_frequent_as_the_equal_error_rate(decimals):
    trials = make_trials()
    scores = make_scores(trials, decimals=decimals)
    errors = _Errors(scores, trials)
    missed = (scores[errors.targets] < errors.threshold).mean()
    accepted = (scores[~errors.targets] >= errors.threshold).mean()
    others = [
        abs((scores[errors.targets] < value).mean() - (scores[~errors.targets] >= value).mean()) for value in scores
    ]
    assert abs(missed - accepted) == pytest.approx(min(others))
    if decimals is None:
        assert missed == pytest.approx(errors.rates[0], abs=0.01)


# ---------------------------------------------------------------- files


@pytest.fixture
def runs(tmp_path):
    """Three runs on the same trials: one good, a copy of it, one a little worse throughout."""
    trials = make_trials(count=2000)
    good = make_scores(trials, gap=2.0)
    worse = good - 0.3 * np.array([label for label, _, _ in trials])
    for name, scores in (("good", good), ("copy", good), ("worse", worse)):
        (tmp_path / name).mkdir()
        write_scores(tmp_path / name, "veri_test", trials, {"cosine": scores, "snorm": -scores})
        rows = trial_errors({"eer": scores, "eer_snorm": -scores}, trials)
        write_errors(tmp_path / name, "veri_test", rows, list(rows[0]))
    return tmp_path, trials, good


def test_scores_come_back_from_their_file(runs):
    folder, trials, good = runs
    again, scores = read_scores(folder / "good", "veri_test")
    assert again == trials
    np.testing.assert_allclose(scores, good, rtol=1e-8)
    np.testing.assert_allclose(read_scores(folder / "good", "veri_test", "snorm")[1], -good, rtol=1e-8)
    assert {path.suffix for path in (folder / "good").iterdir()} == {".csv"}


def test_two_runs_are_compared_on_resamples_of_the_same_speakers(runs):
    folder, trials, good = runs
    difference, not_better = compare_scores(folder / "good", folder / "worse", "veri_test", resamples=300)
    assert difference.low <= difference.value <= difference.high < 0 and not_better < 0.01
    alone = verification_rates(good, trials, resamples=300).eer
    assert difference.high - difference.low < 0.7 * (alone.high - alone.low)
    same, not_better = compare_scores(folder / "good", folder / "copy", "veri_test", resamples=300)
    assert (same.value, same.low, same.high, not_better) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_of_a_difference_holds_95_of_100_resamples_as_many_below_as_above(runs):
    folder, trials, _ = runs
    good, worse = (_Errors(read_scores(folder / name, "veri_test")[1], trials) for name in ("good", "worse"))
    outcomes = [good.resampled(drawn)[0] - worse.resampled(drawn)[0] for drawn in good.draws(0, 200)]
    found, _ = compare_scores(folder / "good", folder / "worse", "veri_test", resamples=200)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(outcomes, [0.025, 0.975])))


def test_seeds_are_compared_by_their_mean_on_the_same_resamples(runs):
    folder, _, _ = runs
    good, worse, copy = (folder / name for name in ("good", "worse", "copy"))
    single, _ = compare_scores(good, worse, "veri_test", resamples=200)
    same, _ = compare_scores_over_seeds([good, copy], [worse, worse], "veri_test", resamples=200)
    assert (same.value, same.low, same.high) == pytest.approx((single.value, single.low, single.high))
    mixed, _ = compare_scores_over_seeds([good, worse], [worse, worse], "veri_test", resamples=200)
    assert mixed.value == pytest.approx(single.value / 2) and mixed.low == pytest.approx(single.low / 2)


def test_the_errors_of_trials_add_up_to_the_equal_error_rate_and_can_be_compared(runs):
    folder, trials, good = runs
    with open(folder / "good" / "errors_veri_test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == [f"{first} {second}" for _, first, second in trials]
    assert {row["group"] for row in rows} == {first[:4] for _, first, _ in trials}
    errors, total = (sum(float(row[column]) for row in rows) for column in ("eer_errors", "eer_total"))
    assert errors / total == pytest.approx(equal_error_rate(good, [label for label, _, _ in trials]), abs=0.002)
    difference, _ = compare_runs(folder / "good", folder / "worse", "veri_test", "eer")
    expected, _ = compare_scores(folder / "good", folder / "worse", "veri_test", resamples=10)
    assert difference.value == pytest.approx(expected.value, abs=0.004)


def test_kinds_of_trials_count_half_each_however_rare_one_is():
    trials = [(1, "id1/a/1", "id1/b/1"), *((0, "id1/a/1", f"id{n}/a/1") for n in range(2, 11))]
    rows = trial_errors({"eer": np.arange(10.0)}, trials)
    assert sum(row["eer_total"] for row in rows) == pytest.approx(10)
    assert rows[0]["eer_total"] == pytest.approx(5) and rows[0]["eer_errors"] in (0.0, rows[0]["eer_total"])


def test_missing_and_other_files_are_refused(runs):
    folder, trials, good = runs
    with pytest.raises(InputError, match="scores_hard.csv is missing: test the run on that list"):
        read_scores(folder / "good", "hard")
    with pytest.raises(InputError, match="has no scores 'plda'"):
        read_scores(folder / "good", "veri_test", "plda")
    write_scores(folder / "copy", "veri_test", trials[:-1], {"cosine": good[:-1]})
    with pytest.raises(InputError, match="not tested on the same trials"):
        compare_scores(folder / "good", folder / "copy", "veri_test")


def test_the_picture_shows_all_trials_and_the_threshold(tmp_path, monkeypatch):
    trials = make_trials()
    scores = make_scores(trials)
    shown = {}
    save = Figure.savefig

    def remember(figure, *arguments, **options):
        shown["figure"] = figure
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    draw_scores(scores, trials, tmp_path / "new" / "scores.png", "a $folder")
    (axes,) = shown["figure"].axes
    counts = [
        float(text.get_text().split()[-2]) for text in axes.get_legend().get_texts() if "trials" in text.get_text()
    ]
    assert counts == [200, 200]
    assert [line.get_xdata()[0] for line in axes.lines] == [_Errors(scores, trials).threshold]
    assert axes.get_title().startswith("a $folder: EER ")
    assert (tmp_path / "new" / "scores.png").read_bytes().startswith(b"\x89PNG")
