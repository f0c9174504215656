"""Preparation of any folder of audio."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from speechbrain_bestrq.corpora._options import (
    AUDIO_EXTENSIONS,
    AudioRules,
    check_apart,
    check_list,
    make_save_folder,
    resolve_folder,
)
from speechbrain_bestrq.corpora._parts import (
    Part,
    check_readable,
    check_separate,
    combine,
    log_outcome,
    place,
    prepare_part,
    survey_folders,
)
from speechbrain_bestrq.corpora.manifest import REQUIRED_COLUMNS, iterate_manifest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

#: A validation set of less audio is warned of, where the corpus has more.
LEAST_VALID_SECONDS = 300.0


def prepare_folder(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    extensions: Sequence[str] = AUDIO_EXTENSIONS,
    valid_share: float = 0.02,
    max_valid_hours: float = 1.0,
    sample_rate: int = 16000,
    resample: bool = True,
    max_unreadable: int = 0,
    workers: int | None = None,
    seed: int = 0,
    extra_folders: Sequence[str | os.PathLike] = (),
) -> dict[str, Path]:
    """Write the manifests of a tree of untranscribed audio.

    Every file with one of the extensions is used, however deep it lies; names that
    start with a dot are passed over. Links are followed, no folder is read twice.
    Columns ID, duration (seconds), wav (an absolute path); the ID is the path below
    ``data_folder``, and begins with the folder's name if there are extra folders.
    Rows are in the order of their paths, whatever the number of workers.

    The validation set is made of whole first-level sub-folders, so that a speaker
    with a folder of their own is on one side; a file that lies directly in the
    folder stands for itself. Each has a place between 0 and 1, by a hash of ``seed``
    and its path, and is taken if that is below ``valid_share`` and if the set stays
    within ``max_valid_hours`` and half of all audio; if none is, the first that fits
    is taken. If all are too large, sub-folders of the second level take their place,
    and so on down to single files, which the log says; if those are too large too, the
    shortest is taken. So files that are added later
    leave the others on their side, as long as these limits do not decide.

    Called again, it does nothing if the options are the same and the data are
    unchanged, that is, if every audio file still has its name, size and time of
    modification (one ``stat`` for each). A folder that is unchanged is not read again
    when other options change. A preparation that was interrupted is done again.

    Arguments
    ---------
    data_folder : path
        The folder of audio.
    save_folder : path
        Where the manifests go, each with a summary (``train.csv.json``), and with a
        list of the files that cannot be read, if any.
    extensions : sequence of str
        Which files are audio, in any case.
    valid_share : float
        Share of the sub-folders (or files) for validation, above 0 and below 1.
    max_valid_hours : float
        Most hours in the validation set, above 0; one file may have more, where all have.
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped, over all folders.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.
    seed : int
        Another one draws another validation set.
    extra_folders : sequence of path
        Further folders, of the same kind.

    Returns
    -------
    dict
        Paths of the manifests: ``train`` and ``valid``.

    Raises
    ------
    InputError
        If there is no usable audio or too little to split, if an option is out of
        range, or if a manifest in the way was not written by this function.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path")
    >>> (root / "audio").mkdir()
    >>> for number in range(4):
    ...     soundfile.write(root / "audio" / f"{number}.wav", numpy.zeros(8000), 16000)
    >>> manifests = prepare_folder(root / "audio", root / "save")
    >>> {key: len(list(iterate_manifest(path))) for key, path in manifests.items()}
    {'train': 3, 'valid': 1}
    """
    rules = AudioRules(sample_rate, resample, max_unreadable, workers)
    if not 0.0 < valid_share < 1.0:
        raise InputError(f"valid_share is above 0 and below 1, not {valid_share}.")
    if not max_valid_hours > 0.0:
        raise InputError(f"max_valid_hours is above 0, not {max_valid_hours}.")
    check_list(extra_folders, "extra_folders")
    root = resolve_folder(data_folder, "data_folder", "give the folder of your audio")
    extras = [resolve_folder(folder, "extra_folders", "give folders of audio, or none") for folder in extra_folders]
    check_apart(extras, [root])
    parts = survey_folders([root, *extras], extensions, save_folder)
    check_separate(parts[1:], parts[:1])
    make_save_folder(save_folder)

    prepared = [prepare_part(part, rules) for part in parts]
    check_readable(parts, [summary for summary, _ in prepared], rules)

    choose = cache(lambda: _choose_validation(parts, valid_share, max_valid_hours, seed))
    options = {"valid_share": valid_share, "max_valid_hours": max_valid_hours, "seed": seed}
    corpus = " + ".join(part.corpus for part in parts)
    manifests = {key: parts[0].manifest.with_name(f"{key}.csv") for key in ("train", "valid")}
    outcomes = {
        key: combine(path, REQUIRED_COLUMNS, corpus, parts, partial(_rows, parts, choose, key == "valid"), **options)
        for key, path in manifests.items()
    }
    log_outcome(manifests, outcomes, any(fresh for _, fresh in [*prepared, *outcomes.values()]), corpus)
    return manifests


def _rows(
    parts: Sequence[Part], choose: Callable[[], tuple[int, frozenset[str]]], validation: bool
) -> Iterator[dict[str, Any]]:
    level, units = choose()
    for part in parts:
        for row in iterate_manifest(part.manifest):
            if (_unit(row["ID"], level) in units) == validation:
                yield {**row, "ID": f"{part.label}/{row['ID']}"} if len(parts) > 1 else row


def _unit(relative: str, level: int) -> str:
    """The sub-folder of a level that a file lies in, or the file if it lies higher."""
    return "/".join(relative.split("/")[:level])


def _choose_validation(parts: Sequence[Part], share: float, max_hours: float, seed: int) -> tuple[int, frozenset[str]]:
    """Choose the level of the sub-folders that are split, and those of them that are for validation.

    The paths are those below each folder, without its name: an extra folder moves no file of the others.
    """
    files = depth = 0
    level = 1
    while True:
        seconds: defaultdict[str, float] = defaultdict(float)
        for part in parts:
            for row in iterate_manifest(part.manifest):
                seconds[_unit(row["ID"], level)] += row["duration"]
                files += level == 1
                depth = max(depth, row["ID"].count("/") + 1)
        total = sum(seconds.values())
        chosen = _choose_units(seconds, share, min(3600.0 * max_hours, total / 2.0), seed)
        if chosen:
            break
        if level == depth and len(seconds) > 1:  # one recording of more than that, rather than none
            chosen = [min(seconds, key=lambda unit: (seconds[unit], place(unit, seed)))]
            logger.warning(
                "no file fits into a validation set of at most %s hours and half of all: the shortest is taken: %s",
                max_hours,
                chosen[0],
            )
            break
        if level == depth and files > 1:
            raise InputError(
                f"no validation set can be split off: all {files} readable audio files are {next(iter(seconds))!r} of "
                "their folders: give the folder that these are in, or other names."
            )
        if level == depth:
            raise InputError(
                f"no validation set can be split off '{parts[0].tree.root}', which has one readable audio file "
                f"({total / 3600.0:.2f} hours): add audio, or cut it."
            )
        level += 1
    if level > 1:
        logger.warning(
            "no sub-folder of level %d fits into a validation set of at most %s hours and half of the audio: it is "
            "drawn from level %d, so a speaker may be on both sides",
            level - 1,
            max_hours,
            level,
        )
    kept = sum(seconds[unit] for unit in chosen)
    if kept < min(LEAST_VALID_SECONDS, 0.1 * share * total):
        logger.warning(
            "the validation set, by which the best encoder is chosen, has %.0f s of audio: add recordings or "
            "sub-folders of some minutes, such as parts of longer ones",
            kept,
        )
    logger.info("validation: %d of %d sub-folders or files of level %d", len(chosen), len(seconds), level)
    return level, frozenset(chosen)


def _choose_units(seconds: dict[str, float], share: float, limit: float, seed: int) -> list[str]:
    chosen: list[str] = []
    taken = 0.0
    for where, unit in sorted((place(unit, seed), unit) for unit in seconds):
        if chosen and where >= share:
            break
        if taken + seconds[unit] <= limit:
            chosen.append(unit)
            taken += seconds[unit]
    return chosen
