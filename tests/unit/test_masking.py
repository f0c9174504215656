"""Properties of the masks."""

import time

import pytest
import torch

from speechbrain_bestrq.masking import MaskedFrames, SpanMasking, span_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def many(length, rows, **settings):
    """Masks of so many utterances of one length."""
    return span_mask(torch.full((rows,), length), length, generator=seeded(), **settings)


@pytest.mark.parametrize("prob", [0.04, 0.20, 0.40, 0.48, 0.60])
@pytest.mark.parametrize("length", [1, 5, 50, 123, 500])
def test_grid_of_single_frames_masks_the_exact_share(prob, length):
    counts = many(length, 50, prob=prob, span=1, grid=True).sum(1)
    assert set(counts.tolist()) == {max(int(prob * length + 0.5), 1)}


@pytest.mark.parametrize("prob, span", [(0.15, 4), (0.30, 2), (0.05, 4), (0.25, 2)])
@pytest.mark.parametrize("length", [60, 100, 101, 103, 250])
def test_grid_of_spans_masks_the_share_up_to_rounding_and_the_cut_of_the_last_span(prob, span, length):
    masks = many(length, 50, prob=prob, span=span, grid=True)
    spans = int(prob * length + 0.5)
    cut = -length % span
    assert set(masks.sum(1).tolist()) <= {spans * span, spans * span - cut}
    starts = masks[:, ::span]
    assert torch.equal(masks, starts.repeat_interleave(span, dim=1)[:, :length])


def test_grid_masks_everything_once_probability_times_span_reaches_one():
    assert many(40, 3, prob=0.25, span=4, grid=True).all()
    assert many(40, 3, prob=0.8, span=4, grid=True).all()


def test_a_shape_has_one_number_of_indices_also_where_the_least_spans_mask_most():
    masking, lengths = SpanMasking(0.001, 10, min_spans=2), torch.full((8,), 49)
    counts = {len(masking(lengths, 49, torch.Generator().manual_seed(seed)).indices) for seed in range(100)}
    assert len(counts) == 1


@pytest.mark.parametrize("seconds", [5, 7, 10, 20])
@pytest.mark.parametrize("prob, span, rate", [(0.04, 10, 25), (0.205, 4, 25), (0.065, 10, 50)])
def test_overlapping_spans_mask_the_expected_share_at_every_length(seconds, prob, span, rate):
    share = many(seconds * rate, 1000, prob=prob, span=span).double().mean()
    assert abs(float(share) - (1 - (1 - prob) ** span)) <= 0.01


@pytest.mark.parametrize(
    "settings", [dict(prob=0.04, span=10), dict(prob=0.3, span=1), dict(prob=0.15, span=4, grid=True)]
)
def test_every_frame_is_masked_equally_often_at_the_edges_too(settings):
    draws = 4000
    frequency = many(60, draws, min_spans=0, **settings).double().mean(0)
    share = SpanMasking(**settings).expected_share
    assert (frequency - share).abs().max() <= 5 * (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("span", [1, 4, 10])
def test_padding_is_never_masked_and_an_utterance_never_unmasked(grid, span):
    lengths = torch.arange(40)
    for seed in range(20):
        masks = span_mask(lengths, 40, prob=0.1, span=span, grid=grid, generator=seeded(seed))
        assert not (masks & (torch.arange(40) >= lengths[:, None])).any()
        assert masks[1:].any(1).all()
        assert not masks[0].any()


@pytest.mark.parametrize("settings", [dict(prob=0.04, span=10), dict(prob=0.6, span=1, grid=True)])
def test_a_short_utterance_changes_nothing_for_the_others(settings):
    long, mixed = torch.tensor([125, 125, 125]), torch.tensor([125, 3, 125])
    for seed in range(50):
        alike = span_mask(long, 125, generator=seeded(seed), **settings)
        with_short = span_mask(mixed, 125, generator=seeded(seed), **settings)
        assert torch.equal(alike[::2], with_short[::2])


@pytest.mark.parametrize("settings", [dict(prob=0.04, span=10), dict(prob=0.15, span=4, grid=True)])
def test_the_share_of_the_long_ones_is_kept_beside_a_short_one(settings):
    lengths = torch.tensor([125] * 999 + [2])
    share = span_mask(lengths, 125, generator=seeded(), **settings)[:-1].double().mean()
    assert abs(float(share) - SpanMasking(**settings).expected_share) <= 0.015


@pytest.mark.parametrize("least", [1, 2, 5])
def test_at_least_so_many_spans(least):
    masks = many(200, 300, prob=0.0, span=1, min_spans=least)
    assert set(masks.sum(1).tolist()) == {least}
    masks = many(200, 300, prob=0.0, span=3, min_spans=least, grid=True)
    assert set(masks[:, ::3].sum(1).tolist()) == {least}
    masks = many(200, 300, prob=0.0, span=3, min_spans=least)
    assert masks.any(1).all()
    assert masks.sum(1).max() <= 3 * least


def test_more_spans_than_there_is_room_for_mask_everything():
    assert many(3, 5, prob=0.0, span=2, min_spans=50).all()
    assert many(3, 5, prob=0.0, span=2, min_spans=50, grid=True).all()


@pytest.mark.parametrize("grid", [False, True])
def test_probabilities_zero_and_one(grid):
    assert not many(30, 5, prob=0.0, span=4, min_spans=0, grid=grid).any()
    assert many(30, 5, prob=1.0, span=4, grid=grid).all()


def test_a_mask_is_a_function_of_the_generator_alone():
    torch.manual_seed(1)
    first = many(50, 4, prob=0.1, span=4)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(first, many(50, 4, prob=0.1, span=4))
    assert torch.equal(before, torch.random.get_rng_state())
    other = span_mask(torch.full((4,), 50), 50, prob=0.1, span=4, generator=seeded(1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("grid", [False, True])
def test_no_loop_over_utterances_or_frames(grid):
    lengths = torch.full((2000,), 500)
    start = time.process_time()  # not the wall's: the machine may be busy
    masks = span_mask(lengths, 500, prob=0.04, span=10, grid=grid, generator=seeded())
    assert time.process_time() - start < 1.0
    assert masks.shape == (2000, 500)


@pytest.mark.parametrize("settings", [dict(prob=1.1, span=1), dict(prob=-0.1, span=1), dict(prob=0.1, span=0)])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="prob is a share|span must be"):
        span_mask(torch.tensor([10]), 10, **settings)


@pytest.mark.parametrize("capacity", [None, 0, 3, 20])
def test_indices_are_the_masked_frames_in_order_filled_up_at_the_end(capacity):
    mask = torch.rand(4, 9, generator=seeded()) < 0.4
    masked = MaskedFrames.from_mask(mask, capacity)
    expected = [9 * row + column for row in range(4) for column in range(9) if mask[row, column]]
    assert masked.count == len(expected)
    assert masked.indices[: masked.count].tolist() == expected
    assert set(masked.indices[masked.count :].tolist()) <= {-1}
    assert len(masked.indices) == max(capacity or 0, len(expected))
    assert masked.indices.dtype == torch.int64
    assert torch.equal(masked.mask, mask)


def test_an_empty_mask_has_no_indices():
    masked = MaskedFrames.from_mask(torch.zeros(2, 5, dtype=torch.bool), capacity=2)
    assert masked.count == 0
    assert masked.indices.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "masking",
    [
        SpanMasking(0.04, 10),
        SpanMasking(0.205, 4),
        SpanMasking(0.065, 10),
        SpanMasking(0.15, 4, grid=True),
        SpanMasking(0.6, 1, grid=True),
    ],
    ids=lambda masking: f"{masking.prob}-{masking.span}-{masking.grid}",
)
def test_the_number_of_indices_depends_on_the_shape_alone(masking):
    generator = seeded()
    draws = [masking(torch.full((20,), 125), 125, generator) for _ in range(300)]
    assert len({len(masked.indices) for masked in draws}) == 1
    assert all(masked.count == int(masked.mask.sum()) for masked in draws)
    shorter = masking(torch.tensor([125] + [60] * 19), 125, generator)
    assert len(shorter.indices) == len(draws[0].indices)


@pytest.mark.parametrize("masking", [SpanMasking(0.205, 4), SpanMasking(0.15, 4, grid=True)])
def test_a_policy_draws_what_span_mask_draws(masking):
    lengths = torch.tensor([50, 31])
    masked = masking(lengths, 50, seeded(5))
    expected = span_mask(lengths, 50, masking.prob, masking.span, grid=masking.grid, generator=seeded(5))
    assert torch.equal(masked.mask, expected)
