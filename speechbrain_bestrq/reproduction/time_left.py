"""How long a plan will still take: by its estimates, and better with every stage that has ended."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speechbrain_bestrq.reproduction.stages import Stage

#: Of a stage that nothing is known of, while others are known: such make speech, or look at labels.
USUAL_SECONDS = 60.0


def left_text(
    stages: Sequence[Stage],
    spent: Mapping[str, float],
    taken: Mapping[str, float],
    expected: Mapping[str, float],
    at_once: int,
) -> str:
    """Say how long some stages will still take.

    Arguments
    ---------
    stages : sequence of Stage
        Of the plan, each after those that it needs.
    spent : mapping
        The stages that run or wait: for how many seconds each has been running.
    taken : mapping
        The seconds that stages took which are done.
    expected : mapping
        What was expected of stages before, seconds.
    at_once : int
        How many devices there are: so many stages run at a time, or fewer that take several.

    Returns
    -------
    str
        Empty as long as nothing is known.

    Example
    -------
    >>> from speechbrain_bestrq.reproduction.stages import Stage
    >>> stages = [Stage(f"train/{name}", (), ()) for name in "abc"]
    >>> left_text(stages, {"train/b": 60.0, "train/c": 0.0}, {"train/a": 600.0}, {}, 1)
    'about 19 minutes left'
    """
    brief = {stage.name for stage in stages if stage.is_brief}
    taken = {name: seconds for name, seconds in taken.items() if name not in brief}
    if not taken and not expected:
        return ""
    seconds = {name: max(whole - spent[name], 0.0) for name, whole in _whole(stages, spent, taken, expected).items()}
    shared = 0.0
    ends: dict[str, float] = {}
    for stage in stages:
        shared += seconds.get(stage.name, 0.0) * min(stage.devices, at_once) / at_once
        before = max((ends.get(name, 0.0) for name in (*stage.needs, *stage.after)), default=0.0)
        ends[stage.name] = before + seconds.get(stage.name, 0.0)
    # as if all went on to the end without a gap, or, if that is later, one after the other what has to
    minutes = max(shared, *ends.values()) / 60
    if minutes >= 90:
        return f"about {minutes / 60:.1f} hours left"
    return f"about {minutes:.0f} minutes left" if minutes >= 1.5 else "about a minute left"


def _whole(
    stages: Sequence[Stage], spent: Mapping[str, float], taken: Mapping[str, float], expected: Mapping[str, float]
) -> dict[str, float]:
    """From its beginning to its end, of each stage that is not done.

    What was expected, by as much more as the finished stages of the kind took, or else all finished
    ones; without an expectation the mean of the finished stages of the kind.
    """
    kinds = {stage.name: stage.kind for stage in stages}
    both = [name for name in taken if name in expected]
    of_kind: dict[str, list[str]] = {}
    for name in taken:
        of_kind.setdefault(kinds[name], []).append(name)
    usual = USUAL_SECONDS
    if not expected:
        usual = statistics.fmean(statistics.fmean(taken[name] for name in names) for names in of_kind.values())
    whole = {}
    for name in spent:
        done = of_kind.get(kinds[name], [])
        if name in expected:
            like = [one for one in done if one in expected] or both
            ratio = sum(taken[one] for one in like) / sum(expected[one] for one in like) if like else 1.0
            whole[name] = expected[name] * ratio
        else:
            whole[name] = statistics.fmean(taken[one] for one in done) if done else usual
    return whole
