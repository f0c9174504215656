"""Properties of the ladder, of the batches on it, and of the padded batches."""

import itertools
import re
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechbrain_bestrq.batching import LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ladder import expected_fall, fit_rungs, plan_layout

RATE = 16000


def librispeech_like(count, seed=0):
    """Lengths in samples, 2 to 35 s, most of them near 15 s."""
    generator = np.random.default_rng(seed)
    broad = generator.uniform(2, 17, count)
    peak = np.clip(generator.normal(14.8, 0.9, count), 2, 17.3)
    tail = np.minimum(15 + generator.exponential(1, count), 35)
    draw = generator.random(count)
    seconds = np.where(draw < 0.4, broad, np.where(draw < 0.99, peak, tail))
    return np.rint(seconds * RATE).astype(np.int64)


def uniform(low, high, count, seed=0):
    """Lengths in samples, equally distributed between two durations."""
    return np.rint(np.random.default_rng(seed).uniform(low, high, count) * RATE).astype(np.int64)


corpora = st.one_of(
    st.builds(lambda n, seed: uniform(0.1, 20, n, seed), st.integers(1, 60), st.integers(0, 9)),
    st.builds(lambda n, seed: uniform(1, 20, n, seed), st.integers(100, 2000), st.integers(0, 9)),
    st.builds(lambda n, seed: uniform(0.6, 1.0, n, seed), st.integers(1, 2000), st.integers(0, 9)),
    st.builds(librispeech_like, st.integers(1, 3000), st.integers(0, 9)),
    st.builds(lambda n, length: np.full(n, length), st.integers(1, 300), st.integers(480, 320000)),
    st.lists(st.integers(480, 320000), min_size=1, max_size=30).map(np.array),
)
batch_seconds = st.sampled_from([35, 60, 100, 400])


def all_ranks(lengths, seconds, world_size, epoch=1, **options):
    """The plans of each rank in an epoch."""
    plans = []
    for rank in range(world_size):
        sampler = LadderBatchSampler(lengths, seconds * RATE, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        plans.append(list(sampler))
    return plans


def same(first, second):
    """Whether two lists of plans are equal in all they hold."""
    return len(first) == len(second) and all(
        all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(first, second, strict=True)
    )


# ---- the ladder


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_rungs_cut_as_little_as_the_best_of_all_ladders_of_that_size(count):
    lengths = 640 * np.random.default_rng(count).integers(10, 22, count) - 160
    values = np.unique(lengths)

    def cut(rungs):
        rungs = np.array(rungs)
        return int((lengths - rungs[np.searchsorted(rungs, lengths, side="right") - 1]).sum())

    for max_cut in (0.02, 0.1, 0.3):
        rungs = fit_rungs(lengths, max_cut=max_cut)
        best = min(cut((values[0], *others)) for others in itertools.combinations(values[1:].tolist(), len(rungs) - 1))
        assert cut(rungs) == best <= max_cut / 2 * lengths.sum()
        if len(rungs) > 1:  # and no smaller ladder would have done
            fewer = min(
                cut((values[0], *others)) for others in itertools.combinations(values[1:].tolist(), len(rungs) - 2)
            )
            assert fewer > max_cut / 2 * lengths.sum()


@settings(max_examples=40)
@given(corpora, st.sampled_from([0.005, 0.02, 0.1]))
def test_rungs_ascend_from_the_shortest_utterance_and_keep_the_cut(lengths, max_cut):
    rungs = fit_rungs(lengths, max_cut=max_cut)
    assert rungs[0] == lengths.min() and (np.diff(rungs) > 0).all() and np.isin(rungs, lengths).all()
    cut = (lengths - rungs[np.searchsorted(rungs, lengths, side="right") - 1]).sum()
    assert cut <= max_cut * lengths.sum()


def test_rungs_are_the_least_audio_of_their_encoder_frames_in_a_large_corpus():
    rungs = fit_rungs(librispeech_like(30000))
    assert np.median((rungs + 160) % 640) < 16  # 1 ms


def test_ladder_of_librispeech_has_at_most_forty_shapes_and_half_the_cut_to_spare():
    lengths = librispeech_like(281_000)
    started = time.process_time()  # not the wall's: the machine may be busy
    sampler = LadderBatchSampler(lengths, 100 * RATE)
    sampler.set_epoch(1)
    plans = list(sampler)
    assert time.process_time() - started < 4  # 0.6 s is usual
    shapes = Counter((len(plan.indices), plan.samples) for plan in plans)
    assert len(sampler.rungs) <= 37 and len(shapes) <= 40
    assert sum(count for (size, samples), count in shapes.items() if size == 1_600_000 // samples) >= len(plans) - 3
    assert sampler.cut_share < 0.0135


def test_more_rungs_than_asked_for_only_where_the_cut_needs_them_and_then_it_says_so():
    wide = LadderBatchSampler(uniform(1, 20, 5000), 100 * RATE)
    assert len(wide.rungs) > 37 and "(max_rungs = 37 would cut more than max_cut = 2 %)" in wide.describe()
    enough = LadderBatchSampler(uniform(1, 20, 5000), 100 * RATE, max_cut=0.03)
    assert len(enough.rungs) <= 37 and "max_rungs" not in enough.describe()


def test_reserve_lets_leftovers_fall_so_that_there_are_fewer_shapes():
    lengths = uniform(1, 20, 5000)

    def shapes(reserve):
        layout = plan_layout(lengths, fit_rungs(lengths, reserve=reserve), 100 * RATE, 0.02)
        return len(set(zip(*layout.batches(), strict=True)))

    assert shapes(expected_fall(lengths, 100 * RATE)) < 0.8 * shapes(0.0)


def test_leftovers_fall_while_their_fall_is_worth_it():
    lengths = np.array([1000] * 7 + [1010] * 3 + [1500] * 3)
    layout = plan_layout(lengths, np.array([1000, 1010, 1500]), 3000, max_cut=0.02)
    # one utterance of 1010 falls; that of 1500 would lose 490 and forms a smaller batch
    assert layout.sizes == [[3, 3, 2], [2], [2, 1]] and layout.cut == 10


# ---- batches of an epoch


@settings(max_examples=40)
@given(corpora, batch_seconds, st.integers(0, 3))
def test_every_utterance_is_in_exactly_one_batch_and_the_cut_is_as_stated(lengths, seconds, epoch):
    (plans,) = all_ranks(lengths, seconds, 1, epoch)
    sampler = LadderBatchSampler(lengths, seconds * RATE)
    assert len(plans) == len(sampler)
    indices = np.concatenate([plan.indices for plan in plans])
    assert np.array_equal(np.sort(indices), np.arange(len(lengths)))
    used = sum(plan.samples * len(plan.indices) for plan in plans)
    assert 1 - used / lengths.sum() == pytest.approx(sampler.cut_share, abs=1e-12)
    assert sampler.cut_share <= 0.02
    for number, plan in enumerate(plans):
        assert (plan.epoch, plan.number) == (epoch, number)
        assert plan.samples in sampler.rungs and plan.samples * len(plan.indices) <= seconds * RATE
        # nothing is padded and crops stay within the utterance
        assert (plan.starts >= 0).all() and (plan.starts + plan.samples <= lengths[plan.indices]).all()


@settings(max_examples=25)
@given(corpora, batch_seconds, st.sampled_from([2, 3, 8]))
def test_ranks_take_equal_steps_and_share_the_utterances_out(lengths, seconds, world_size):
    try:
        ranks = all_ranks(lengths, seconds, world_size)
    except InputError as error:
        # no batch can be halved any more, and there are still too few
        assert f"{len(lengths)} utterances are too few" in str(error)
        assert len(lengths) < world_size * (-(-len(LadderBatchSampler(lengths, seconds * RATE)) // world_size))
        return
    assert {len(plans) for plans in ranks} == {len(ranks[0])}
    indices = np.concatenate([plan.indices for plans in ranks for plan in plans])
    assert np.array_equal(np.sort(indices), np.arange(len(lengths)))
    assert all(len(plan.indices) for plans in ranks for plan in plans)
    single = LadderBatchSampler(lengths, seconds * RATE)
    assert 0 <= world_size * len(ranks[0]) - len(single) < world_size
    used = sum(plan.samples * len(plan.indices) for plans in ranks for plan in plans)
    assert used == round((1 - single.cut_share) * lengths.sum())


def test_ranks_work_equally_long_at_each_step():
    lengths = librispeech_like(3000)
    samplers = [LadderBatchSampler(lengths, 100 * RATE, rank=rank, world_size=8) for rank in range(8)]
    totals = np.zeros(8)
    for epoch in range(1, 9):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        seconds = np.array([[plan.samples * len(plan.indices) for plan in sampler] for sampler in samplers]) / RATE
        spread = np.ptp(seconds, axis=0)
        assert np.median(spread) < 1 and spread.mean() < 0.02 * seconds.mean()
        totals += seconds.sum(axis=1)
    # and no rank is always the one with more
    assert np.ptp(totals) < 0.01 * totals.mean()


def test_every_epoch_has_other_batches_of_the_same_shapes():
    lengths = librispeech_like(3000)
    sampler = LadderBatchSampler(lengths, 100 * RATE)
    epochs = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    first, second = epochs
    assert Counter((len(plan.indices), plan.samples) for plan in first) == Counter(
        (len(plan.indices), plan.samples) for plan in second
    )
    assert set(sampler.shapes) == {(len(plan.indices), plan.samples) for plan in first}
    company = [
        {frozenset(pair) for plan in plans for pair in itertools.combinations(plan.indices.tolist(), 2)}
        for plans in epochs
    ]
    assert len(company[0] & company[1]) < 0.5 * len(company[0])
    # not in the same order of lengths either
    assert [plan.samples for plan in first] != [plan.samples for plan in second]


def test_an_epoch_is_a_function_of_seed_and_epoch():
    lengths = librispeech_like(300)
    torch.manual_seed(1)
    (first,) = all_ranks(lengths, 100, 1, epoch=3, seed=5)
    torch.manual_seed(2)
    (again,) = all_ranks(lengths, 100, 1, epoch=3, seed=5)
    (other,) = all_ranks(lengths, 100, 1, epoch=3, seed=6)
    assert same(first, again) and not same(first, other)


def test_crops_are_drawn_anew_each_epoch_from_the_whole_utterance():
    lengths = np.array([32000, *[32000 + 600] * 40])  # one rung at 2 s, 600 samples to spare
    sampler = LadderBatchSampler(lengths, 100 * RATE, max_cut=0.05)
    assert sampler.rungs.tolist() == [32000]
    starts = []
    for epoch in range(50):
        sampler.set_epoch(epoch)
        found = np.zeros(41, dtype=np.int64)
        for plan in sampler:
            found[plan.indices] = plan.starts
        starts.append(found)
    starts = np.stack(starts)
    assert (starts[:, 0] == 0).all()
    assert starts[:, 1:].min() < 10 and starts[:, 1:].max() > 590 and abs(starts[:, 1:].mean() - 300) < 15


def test_a_planned_epoch_is_not_reached_by_a_later_set_epoch():
    sampler = LadderBatchSampler(librispeech_like(100), 100 * RATE)
    sampler.set_epoch(1)
    expected = list(sampler)
    started = iter(sampler)
    sampler.set_epoch(2)
    assert same(list(started), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_tiny_corpora_work(count):
    sampler = LadderBatchSampler(uniform(2, 17, count), 100 * RATE)
    assert sampler.cut_share <= 0.02 and sum(len(plan.indices) for plan in sampler) == count


# ---- resuming


@pytest.mark.parametrize("done", [0, 1, 5])
def test_first_k_and_rest_are_all(done):
    lengths = librispeech_like(200)
    for rank in range(2):
        sampler = LadderBatchSampler(lengths, 60 * RATE, rank=rank, world_size=2)
        sampler.set_epoch(4)
        every = list(sampler)
        sampler.position = done
        state = sampler.state_dict()
        resumed = LadderBatchSampler(lengths, 60 * RATE, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        resumed.set_epoch(4)  # the trainer's call at the start of an epoch keeps the place
        assert len(resumed) == len(every)
        assert same(every[:done] + list(resumed), every)
        resumed.set_epoch(5)
        assert len(list(resumed)) == len(every)


def test_iterating_does_not_advance_the_position():
    sampler = LadderBatchSampler(librispeech_like(50), 60 * RATE)
    assert same(list(sampler), list(sampler)) and sampler.position == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_batch_samples": 50 * RATE}, "max_batch_seconds (60.0 then, 50.0 now)"),
        ({"seed": 1}, "seed (0 then, 1 now)"),
        ({"world_size": 2}, "world_size (1 then, 2 now)"),
        ({"max_cut": 0.05}, "max_cut (0.02 then, 0.05 now)"),
        ({"max_rungs": 30}, "max_rungs (37 then, 30 now)"),
        ({"lengths": librispeech_like(80)[:-1]}, "utterances (80"),
    ],
)
def test_resuming_within_an_epoch_with_other_batches_is_refused_by_name(change, named):
    settings_ = {"lengths": librispeech_like(80), "max_batch_samples": 60 * RATE}
    sampler = LadderBatchSampler(**settings_)
    sampler.set_epoch(2)
    sampler.position = 3
    other = LadderBatchSampler(**{**settings_, **change})
    with pytest.raises(InputError, match=re.escape(named)) as raised:
        other.load_state_dict(sampler.state_dict())
    assert "\n" not in str(raised.value) and (other.epoch, other.position) == (0, 0)
    # between epochs nothing is lost
    sampler.position = 0
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, other.position) == (2, 0)
    sampler.position = len(sampler)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, other.position) == (2, len(other)) and not list(other)


def test_state_is_plain_python():
    state = LadderBatchSampler(librispeech_like(30), 60 * RATE).state_dict()
    assert all(type(value) in (int, float, str) for value in state.values())


# ---- bad input


@pytest.mark.parametrize("sampler", [LadderBatchSampler, PaddedBatchSampler])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "no utterances"),
        ([32000, 479], "1 utterances are shorter than one encoder frame, 0.03 s: set min_seconds"),
        ([32000, 1_600_001 + 16000], "max_batch_seconds is 100, less than the longest utterance of 101.00 s"),
    ],
)
def test_impossible_lengths_are_refused_with_the_key(sampler, lengths, message):
    with pytest.raises(InputError, match=message) as raised:
        sampler(np.array(lengths, dtype=np.int64), 100 * RATE)
    assert "\n" not in str(raised.value)


def test_fewer_utterances_than_processes_are_refused():
    with pytest.raises(InputError, match="3 utterances are too few to give each of 4 processes"):
        LadderBatchSampler(np.array([32000, 48000, 64000]), 100 * RATE, world_size=4)


@pytest.mark.parametrize("options", [{"max_cut": 0.0}, {"max_cut": 1.0}, {"max_rungs": 0}])
def test_settings_out_of_range_are_refused_by_name(options):
    with pytest.raises(InputError, match=next(iter(options))):
        LadderBatchSampler(np.array([32000]), 100 * RATE, **options)


# ---- padded batches


@settings(max_examples=25)
@given(corpora, batch_seconds, st.sampled_from([1, 2, 3, 8]))
def test_padded_batches_cover_all_once_and_do_not_depend_on_the_number_of_ranks(lengths, seconds, world_size):
    samplers = [
        PaddedBatchSampler(lengths, seconds * RATE, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    plans = sorted((plan for sampler in samplers for plan in sampler), key=lambda plan: plan.number)
    assert same(plans, list(PaddedBatchSampler(lengths, seconds * RATE)))
    assert [plan.number for plan in plans] == list(range(len(plans)))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    indices = np.concatenate([plan.indices for plan in plans])
    assert np.array_equal(np.sort(indices), np.arange(len(lengths)))
    for plan in plans:
        assert plan.samples == lengths[plan.indices].max()
        assert plan.samples * len(plan.indices) <= seconds * RATE
        assert plan.epoch == 0 and not plan.starts.any()


def test_padded_batches_hold_little_padding():
    lengths = librispeech_like(2000)
    padded = sum(plan.samples * len(plan.indices) for plan in PaddedBatchSampler(lengths, 100 * RATE))
    assert padded < 1.01 * lengths.sum()
