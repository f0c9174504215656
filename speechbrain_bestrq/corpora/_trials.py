"""Trials of speaker verification: which two utterances are compared, and whether the speaker is the same."""

import csv
import os
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from pathlib import Path

from speechbrain_bestrq.errors import InputError

TRIAL_COLUMNS = ("list", "label", "first", "second")

EXAMPLE = "1 id10270/x6uYqmx31kE/00001.wav id10270/8jEAjG6SegY/00008.wav"

Trial = tuple[int, str, str]
"""A label, 1 for the same speaker and 0 for different ones, and the IDs of two utterances."""

_SPEAKER = re.compile(r"id\d+")


def identify(path: str) -> str | None:
    """Give the ID of a recording, ``SPEAKER/VIDEO/UTTERANCE``; None if its path is not in VoxCeleb's layout."""
    parts = path.split("/")
    if len(parts) < 3 or not _SPEAKER.fullmatch(parts[-3]):
        return None
    return "/".join([*parts[-3:-1], os.path.splitext(parts[-1])[0]])


def speaker_of(identifier: str) -> str:
    """Give the speaker of an utterance out of its ID."""
    return identifier.partition("/")[0]


def _video_of(identifier: str) -> str:
    return identifier.rpartition("/")[0]


def iterate_trials(path: str | os.PathLike) -> Iterator[tuple[int, Trial]]:
    """Read a list in VoxCeleb's own format; empty lines are passed over.

    Yields
    ------
    line : int
        Its number, from 1.
    trial : tuple
        Label and two IDs.

    Raises
    ------
    InputError
        If a line is in another format, with its number.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            first, second = map(identify, fields[1:]) if len(fields) == 3 else (None, None)
            if fields[0] not in ("0", "1") or first is None or second is None:
                raise InputError(
                    f"trial list '{path}', line {number}: {line.strip()[:100]!r} is not a trial such as '{EXAMPLE}': "
                    "give a list in VoxCeleb's own format."
                )
            yield number, (int(fields[0]), first, second)


def read_trials(path: str | os.PathLike) -> dict[str, list[Trial]]:
    """Read ``trials.csv`` or ``valid_trials.csv``.

    Arguments
    ---------
    path : path
        As :func:`prepare_voxceleb` wrote it.

    Returns
    -------
    dict
        For each trial list by its name, in the order of the file, its trials: a label
        (1: the same speaker, 0: different ones) and the IDs of two utterances.

    Raises
    ------
    InputError
        If the file is missing, holds no trial, or a line that is none, with its number.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.csv"
    >>> _ = path.write_text("list,label,first,second\\nveri_test,1,id1/a/1,id1/b/1\\nveri_test,0,id1/a/1,id2/c/1\\n")
    >>> read_trials(path)
    {'veri_test': [(1, 'id1/a/1', 'id1/b/1'), (0, 'id1/a/1', 'id2/c/1')]}
    """
    if not Path(path).is_file():
        raise InputError(f"trials '{path}' do not exist: prepare the corpus first, or give the right path.")
    trials: dict[str, list[Trial]] = {}
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != TRIAL_COLUMNS:
            raise InputError(f"trials '{path}': the first line has to be {','.join(TRIAL_COLUMNS)}: prepare again.")
        for values in reader:
            if len(values) != len(TRIAL_COLUMNS) or values[1] not in ("0", "1"):
                raise InputError(
                    f"trials '{path}', line {reader.line_num}: {','.join(values)[:100]!r} is not a name, 0 or 1, and "
                    "two IDs: prepare the corpus again."
                )
            name, label, first, second = values
            trials.setdefault(name, []).append((int(label), first, second))
    if not trials:
        raise InputError(f"trials '{path}' hold no trial: prepare the corpus again.")
    return trials


def draw_trials(utterances: Mapping[str, Sequence[str]], most: int, seed: int) -> list[Trial]:
    """Draw as many target as impostor trials, none twice.

    The target trials are shared out evenly among the speakers, as far as each has
    pairs; they are of two videos, but for speakers with one video only. The impostor
    trials are drawn from all pairs of utterances of two speakers. Memory: the pairs of
    one speaker, and one number for each utterance.

    Arguments
    ---------
    utterances : mapping
        The IDs of each speaker's utterances, at least two speakers.
    most : int
        Most trials, at least 2.
    seed : int
        They are a function of it and of the utterances.

    Returns
    -------
    list
        Target trials, then impostor trials.

    Example
    -------
    >>> utterances = {"id1": ["id1/a/1", "id1/b/1"], "id2": ["id2/c/1", "id2/c/2"]}
    >>> draw_trials(utterances, 4, seed=0)[:2]
    [(1, 'id1/a/1', 'id1/b/1'), (1, 'id2/c/1', 'id2/c/2')]
    """
    generator = random.Random(seed)
    speakers = sorted(utterances)
    everyone = [identifier for speaker in speakers for identifier in utterances[speaker]]
    ends = list(accumulate(len(utterances[speaker]) for speaker in speakers))
    # an utterance's impostor pairs are those with the utterances of all later speakers
    end_of = [end for end, speaker in zip(ends, speakers, strict=True) for _ in utterances[speaker]]
    pairs_until = list(accumulate(len(everyone) - end for end in end_of))
    available = {speaker: _count_targets(utterances[speaker]) for speaker in speakers}
    count = min(most // 2, sum(available.values()), pairs_until[-1])

    trials: list[Trial] = []
    for speaker, quota in _share_out(available, count).items():
        chosen = sorted(generator.sample(_targets(utterances[speaker]), quota))
        trials += [(1, first, second) for first, second in chosen]
    for index in sorted(generator.sample(range(pairs_until[-1]), count)):
        first = bisect_right(pairs_until, index)
        second = len(everyone) - (pairs_until[first] - index)
        trials.append((0, everyone[first], everyone[second]))
    return trials


def _targets(identifiers: Sequence[str]) -> list[tuple[str, str]]:
    pairs = list(combinations(identifiers, 2))
    across = [(first, second) for first, second in pairs if _video_of(first) != _video_of(second)]
    return across or pairs


def _count_targets(identifiers: Sequence[str]) -> int:
    """Count what :func:`_targets` gives, without making it."""

    def pairs(count: int) -> int:
        return count * (count - 1) // 2

    total = pairs(len(identifiers))
    within = sum(map(pairs, Counter(map(_video_of, identifiers)).values()))
    return total - within or total


def _share_out(available: Mapping[str, int], count: int) -> dict[str, int]:
    """Share ``count`` out as evenly as what each has allows."""
    quotas = {}
    for number, speaker in enumerate(sorted(available, key=lambda name: (available[name], name))):
        # whoever has little comes first, so that the others make up for it
        quotas[speaker] = min(available[speaker], count // (len(available) - number))
        count -= quotas[speaker]
    return {speaker: quotas[speaker] for speaker in available}
