"""The time left of a plan follows its estimates, and the stages that have ended."""

import pytest

from speechbrain_bestrq.reproduction.stages import Stage
from speechbrain_bestrq.reproduction.time_left import left_text


def stages_of(*names, needs=()):
    return [Stage(name, (), (), dict(needs).get(name, ())) for name in names]


def minutes(text):
    return int(text.split()[1])


def test_nothing_is_said_where_nothing_is_known():
    assert left_text(stages_of("train/a"), {"train/a": 0.0}, {}, {}, 1) == ""


def test_without_estimates_the_finished_stages_of_the_kind_tell_it_and_else_all_kinds():
    stages = stages_of("train/a", "train/b", "train/c", "probe/a", "probe/b")
    taken = {"train/a": 600.0, "probe/a": 120.0}
    assert minutes(left_text(stages, {"train/b": 240.0, "train/c": 0.0, "probe/b": 0.0}, taken, {}, 1)) == 18
    assert minutes(left_text([*stages, *stages_of("else/a")], {"else/a": 0.0}, taken, {}, 1)) == 6
    assert left_text(stages, {"train/b": 900.0}, taken, {}, 1) == "about a minute left"


def test_estimates_are_corrected_by_the_finished_stages_of_the_kind_and_else_by_all():
    stages = stages_of("train/a", "train/b", "probe/a", "probe/b", "other/a")
    expected = {"train/a": 300.0, "train/b": 600.0, "probe/a": 60.0, "probe/b": 120.0, "other/a": 120.0}
    spent = dict.fromkeys(expected, 0.0)
    assert minutes(left_text(stages, spent, {}, expected, 1)) == 20
    assert minutes(left_text(stages, {"train/b": 0.0}, {"train/a": 600.0}, expected, 1)) == 20
    taken = {"train/a": 600.0, "probe/a": 60.0}
    assert minutes(left_text(stages, {"probe/b": 0.0}, taken, expected, 1)) == 2
    # 660 s instead of 360
    assert minutes(left_text(stages, {"other/a": 0.0, "train/b": 1200.0}, taken, expected, 1)) == 4


def test_where_others_have_an_estimate_a_stage_without_takes_its_kinds_time_or_a_minute():
    stages = stages_of("speech/a", "speech/b", "train/a")
    spent, expected = {"speech/b": 0.0, "train/a": 0.0}, {"train/a": 120.0}
    assert minutes(left_text(stages, spent, {}, expected, 1)) == 3
    assert minutes(left_text(stages, spent, {"speech/a": 240.0}, expected, 1)) == 6


@pytest.mark.parametrize("needs, left", [((), 10), ((("probe/a", ("train/a",)),), 15)])
def test_stages_at_once_share_the_time_but_not_what_has_to_come_one_after_another(needs, left):
    stages = stages_of("train/a", "probe/a", "train/b", needs=needs)
    expected = {"train/a": 600.0, "probe/a": 300.0, "train/b": 240.0}
    assert minutes(left_text(stages, dict.fromkeys(expected, 0.0), {}, expected, 2)) == left


def test_what_takes_several_devices_leaves_fewer_for_others():
    stages = [Stage(f"train/{name}", (), (), devices=4) for name in "ab"]
    expected = {"train/a": 36000.0, "train/b": 36000.0}
    assert left_text(stages, dict.fromkeys(expected, 0.0), {}, expected, 4) == "about 20.0 hours left"
    assert left_text(stages, {"train/b": 0.0}, {}, expected, 1) == "about 10.0 hours left"


def test_long_times_are_told_in_hours():
    assert left_text(stages_of("train/a"), {"train/a": 0.0}, {}, {"train/a": 9000.0}, 1) == "about 2.5 hours left"
