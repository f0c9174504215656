"""Properties of the learning rate schedules."""

import math

import pytest

from speechbrain_bestrq.schedules import WarmupCosine, WarmupLinear, WarmupNoam

PEAK, WARMUP, TOTAL = 8e-4, 250, 2000
SCHEDULES = {
    "noam": WarmupNoam(PEAK, WARMUP),
    "cosine": WarmupCosine(PEAK, WARMUP, TOTAL, final_share=0.05),
    "linear": WarmupLinear(PEAK, WARMUP, TOTAL),
}
BOTH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@BOTH
def test_the_first_update_is_a_step_of_the_warm_up_and_not_the_peak(schedule):
    assert schedule(1) == pytest.approx(PEAK / WARMUP)


@BOTH
def test_the_warm_up_is_linear_and_ends_at_the_peak(schedule):
    for update in range(1, WARMUP + 1):
        assert schedule(update) == pytest.approx(PEAK * update / WARMUP)
    assert schedule(WARMUP) == max(schedule(update) for update in range(1, TOTAL + 1))


@BOTH
def test_the_rate_falls_after_the_warm_up_without_a_jump(schedule):
    rates = [schedule(update) for update in range(WARMUP, TOTAL + 1)]
    steps = [before - after for before, after in zip(rates[:-1], rates[1:], strict=True)]
    assert min(steps) > 0
    assert max(steps) < 2 * PEAK / WARMUP


def test_noam_falls_with_the_inverse_square_root():
    for update in (300, 1000, 200_000):
        assert SCHEDULES["noam"](update) == pytest.approx(PEAK * math.sqrt(WARMUP / update))


def test_cosine_is_half_way_in_the_middle_and_ends_at_its_share():
    cosine = SCHEDULES["cosine"]
    assert cosine((WARMUP + TOTAL) // 2) == pytest.approx(PEAK * (1 + 0.05) / 2)
    assert cosine(TOTAL) == pytest.approx(0.05 * PEAK)
    assert cosine(2 * TOTAL) == cosine(TOTAL)
    assert WarmupCosine(PEAK, WARMUP, TOTAL)(TOTAL) == pytest.approx(0.0, abs=1e-12)


def test_linear_falls_by_the_same_step_to_zero_behind_the_last_update():
    linear = SCHEDULES["linear"]
    steps = [linear(update) - linear(update + 1) for update in range(WARMUP, TOTAL + 1)]
    assert steps == pytest.approx([PEAK / (TOTAL + 1 - WARMUP)] * len(steps))
    assert linear(TOTAL) == pytest.approx(steps[0]) and linear(TOTAL + 1) == linear(TOTAL + 50) == 0.0


@pytest.mark.parametrize(
    "schedule",
    [WarmupNoam(PEAK, 0), WarmupCosine(PEAK, 0, TOTAL), WarmupLinear(PEAK, 0, TOTAL)],
    ids=["noam", "cosine", "linear"],
)
def test_without_warm_up_the_first_update_is_at_the_peak(schedule):
    assert schedule(1) == PEAK
    assert schedule(2) < PEAK


def test_a_run_shorter_than_its_warm_up_has_a_rate_for_every_update():
    cosine = WarmupCosine(PEAK, warmup_updates=100, total_updates=10)
    assert [cosine(update) for update in (1, 10, 100)] == pytest.approx([PEAK / 100, PEAK / 10, PEAK])
