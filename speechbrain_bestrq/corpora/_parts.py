"""What becomes of trees of audio: a manifest for each, and manifests combined out of those."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_bestrq.audio import can_resample
from speechbrain_bestrq.corpora._audio_files import OTHER_AUDIO, AudioTree, Survey, probe_files
from speechbrain_bestrq.corpora._options import AudioRules, absolute_path, normalize_extensions
from speechbrain_bestrq.corpora.manifest import (
    REQUIRED_COLUMNS,
    build_manifest,
    corpus_name,
    forget_summary,
    read_summary,
)
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

NAMED_UNREADABLE = 20
"""So many unreadable files are named in the log; all of them are in the list beside the manifest."""


@dataclass(frozen=True)
class Part:
    """A surveyed tree and the manifest it becomes.

    Arguments
    ---------
    tree : AudioTree
        The folder.
    survey : Survey
        Its survey.
    manifest : Path
        Where the manifest goes.
    corpus : str
        What the recordings are.
    label : str
        Its name in the log.
    """

    tree: AudioTree
    survey: Survey
    manifest: Path
    corpus: str
    label: str

    @property
    def unreadable_list(self) -> Path:
        """The text file that names what could not be read."""
        return self.manifest.with_name(self.manifest.name + ".unreadable.txt")


def check_separate(extra_parts: Sequence[Part], parts: Sequence[Part]) -> None:
    """Refuse extra folders in which a link, to a folder or a file, leads to what is read anyway.

    The audio would be used twice, or be trained on and validated on.

    Arguments
    ---------
    extra_parts : sequence of Part
        Of the extra folders.
    parts : sequence of Part
        What is read besides.

    Raises
    ------
    InputError
        Naming a folder or a file that belongs to two.
    """
    others = list(parts)
    for extra in extra_parts:
        for other in others:
            if shared := extra.survey.folders.keys() & other.survey.folders.keys():
                twice = min(shared, key=extra.survey.folders.__getitem__)
                raise InputError(
                    f"extra_folders: '{extra.survey.folders[twice]}' is '{other.survey.folders[twice]}', so audio "
                    "would be used twice: remove the link, or give only what is not in the other."
                )
            both = np.intersect1d(extra.survey.identities, other.survey.identities, assume_unique=True)
            found = [list(part.tree.find(both[:1]).values()) for part in (extra, other)]
            if all(found):  # not changed meanwhile
                (_, link), (_, target) = (one[0][0] for one in found)
                raise InputError(
                    f"extra_folders: {len(both)} of the files in '{extra.tree.root}' are those of '{other.tree.root}', "
                    f"such as {link!r}, which is {target!r}, so audio would be used twice: remove the links."
                )
        others.append(extra)


RowMaker = Callable[[str, str, float], dict[str, Any]]
"""Makes the row of a manifest out of relative path, absolute path and duration in seconds."""


def plain_row(relative: str, path: str, duration: float) -> dict[str, Any]:
    """Make the row of a file of which only the audio is known; its ID is its relative path."""
    return {"ID": relative, "duration": duration, "wav": path}


def prepare_part(
    part: Part,
    rules: AudioRules,
    columns: Sequence[str] = REQUIRED_COLUMNS,
    make_row: RowMaker = plain_row,
    finish: Callable[[], dict[str, Any]] = dict,
) -> tuple[dict[str, Any], bool]:
    """Make the manifest of one tree, unless it is already there and the tree unchanged.

    Arguments
    ---------
    part : Part
        The tree.
    rules : AudioRules
        What audio is accepted.
    columns : sequence of str
        Columns of the manifest.
    make_row : callable
        Makes a row for each readable file.
    finish : callable
        Gives further notes for the summary, after the last row.

    Returns
    -------
    summary : dict
        The summary of the manifest, with ``unreadable`` (a count),
        ``first_unreadable`` (path and problem) and ``sample_rates`` (for each rate a
        count and its first file).
    fresh : bool
        Whether anything had to be done.

    Raises
    ------
    InputError
        If a file has another sample rate and ``rules.resample`` is off, or a rate that cannot be resampled.
    """

    def rows(notes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from _readable_rows(part, rules, make_row, notes)
        notes.update(finish())

    recipe = {"folder": str(part.tree.root), "suffixes": part.tree.suffixes, "fingerprint": part.survey.fingerprint}
    if part.survey.repeated:
        recipe["repeated"] = len(part.survey.repeated)
    summary, fresh = build_manifest(part.manifest, columns, part.corpus, recipe, rows)
    for sample_rate, (_, first) in summary["sample_rates"].items():
        _check_rate(int(sample_rate), first, rules)
    if fresh:
        _log_findings(part, summary, rules)
    return summary, fresh


def _readable_rows(
    part: Part, rules: AudioRules, make_row: RowMaker, notes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    unreadable = 0
    named: list[tuple[str, str]] = []
    sample_rates: dict[str, tuple[int, str]] = {}
    channels: Counter[str] = Counter()
    part.unreadable_list.unlink(missing_ok=True)
    files = (one for one in part.tree.files() if one[0] not in part.survey.repeated)
    for relative, path, probe in probe_files(files, part.survey.files, rules.threads, part.label):
        if probe.problem:
            unreadable += 1
            if len(named) < NAMED_UNREADABLE:
                named.append((path, probe.problem))
            with open(part.unreadable_list, "a", encoding="utf-8") as file:
                # repr: a name may hold line breaks, and need not be UTF-8
                file.write(f"{path!r}\t{probe.problem}\n")
            continue
        _check_rate(probe.sample_rate, path, rules)
        _check_can_resample(probe.sample_rate, path, rules)
        count, first = sample_rates.get(str(probe.sample_rate), (0, path))
        sample_rates[str(probe.sample_rate)] = (count + 1, first)
        channels[str(probe.channels)] += 1
        yield make_row(relative, path, round(probe.duration, 6))

    for path, problem in named:
        logger.warning("cannot read %r: %s", path, problem)
    if unreadable > len(named):
        logger.warning("cannot read %d more files, listed in '%s'", unreadable - len(named), part.unreadable_list)
    notes.update(
        unreadable=unreadable,
        first_unreadable=named[0] if named else None,
        sample_rates=sample_rates,
        channels=channels,
    )


def _check_rate(sample_rate: int, path: str, rules: AudioRules) -> None:
    if sample_rate != rules.sample_rate and not rules.resample:
        raise InputError(
            f"{path!r} has a sample rate of {sample_rate} Hz, not {rules.sample_rate} Hz: set resample to True to "
            "have such files resampled when they are loaded, or convert them."
        )


def _check_can_resample(sample_rate: int, path: str, rules: AudioRules) -> None:
    """Refuse a rate before training would take its files for damaged ones; runs that have begun with some go on."""
    if not can_resample(sample_rate, rules.sample_rate):
        raise InputError(
            f"{path!r} has a sample rate of {sample_rate} Hz, which cannot be resampled to {rules.sample_rate} Hz with "
            "reasonable effort: convert it to a common rate."
        )


def _log_findings(part: Part, summary: dict[str, Any], rules: AudioRules) -> None:
    logger.info(
        "%s: %d utterances, %.2f hours; %d unreadable files skipped, %d files ignored that are no audio",
        part.label,
        summary["utterances"],
        summary["hours"],
        summary["unreadable"],
        part.survey.ignored,
    )
    if part.survey.repeated:
        logger.warning(
            "%s: %d files are links to others of the folder, and left out, such as %s",
            part.label,
            len(part.survey.repeated),
            min(part.survey.repeated),
        )
    if part.survey.other_audio:
        logger.warning(
            "%s: %d of the files ignored are audio of another kind, such as %s: convert them, for example with "
            "ffmpeg -i one.m4a -ac 1 -ar %d one.wav",
            part.label,
            part.survey.other_audio,
            ", ".join(OTHER_AUDIO[:4]),
            rules.sample_rate,
        )
    others = {rate: count for rate, (count, _) in summary["sample_rates"].items() if int(rate) != rules.sample_rate}
    if others:
        rates = ", ".join(
            f"{rate} Hz: {count}" for rate, count in sorted(others.items(), key=lambda item: int(item[0]))
        )
        logger.info(
            "%s: %d files have other sample rates (%s), to be resampled to %d Hz when they are loaded",
            part.label,
            sum(others.values()),
            rates,
            rules.sample_rate,
        )
    several = sum(count for channels, count in summary["channels"].items() if channels != "1")
    if several:
        logger.info("%s: %d files have more than one channel", part.label, several)


def check_readable(parts: Sequence[Part], summaries: Sequence[dict[str, Any]], rules: AudioRules) -> None:
    """Refuse a corpus with too many unreadable files, or a part without a readable one.

    Refused, its parts with such files are to be looked at again: new permissions, or a library that knows their
    format, change nothing in the tree. Accepted, they stay as they are, for a run may have begun with them.

    Arguments
    ---------
    parts : sequence of Part
        All parts of the corpus.
    summaries : sequence of dict
        Their summaries.
    rules : AudioRules
        With the limit.

    Raises
    ------
    InputError
        Naming the first such file, its problem, the count and the key of the limit.
    """
    total = sum(summary["unreadable"] for summary in summaries)
    for part, summary in zip(parts, summaries, strict=True):
        if not summary["unreadable"] or (total <= rules.max_unreadable and summary["utterances"]):
            continue
        look_again(parts)
        path, problem = summary["first_unreadable"]
        if not summary["utterances"]:
            raise InputError(
                f"none of the {part.survey.files} audio files in '{part.tree.root}' can be read, first {path!r} "
                f"({problem}): replace them."
            )
        files = sum(part.survey.files for part in parts)
        raise InputError(
            f"{total} of {files} audio files cannot be read, first {path!r} ({problem}), see "
            f"'{part.unreadable_list}': mend or remove them, or set max_unreadable to at least {total}."
        )


def look_again(parts: Sequence[Part]) -> None:
    """Have parts with unreadable files prepared anew the next time: new permissions change nothing in a tree."""
    for part in parts:
        if read_summary(part.manifest)["unreadable"]:
            forget_summary(part.manifest)


def combine(
    path: Path,
    columns: Sequence[str],
    corpus: str,
    parts: Sequence[Part],
    rows: Callable[[], Iterable[dict[str, Any]]],
    finish: Callable[[], dict[str, Any]] = dict,
    **options: Any,
) -> tuple[dict[str, Any], bool]:
    """Make a manifest out of those of some parts, unless it is there already.

    Arguments
    ---------
    path : Path
        The manifest to make.
    columns : sequence of str
        Its columns.
    corpus : str
        What the recordings are.
    parts : sequence of Part
        What it is made of.
    rows : callable
        Makes the rows; called only if need be.
    finish : callable
        Gives further notes for the summary, after the last row.
    **options : Any
        On what it depends besides.

    Returns
    -------
    summary : dict
        Its summary, with ``unreadable``: how many files of the parts could not be read, and are in no manifest.
    fresh : bool
        Whether anything had to be done.
    """

    def noted(notes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from rows()
        notes.update(finish(), unreadable=sum(read_summary(part.manifest)["unreadable"] for part in parts))

    recipe = {
        "parts": [
            [str(part.tree.root), *part.tree.suffixes, part.survey.fingerprint, file_digest(part.manifest)]
            for part in parts
        ],
        **options,
    }
    return build_manifest(path, columns, corpus, recipe, noted)


def survey_folders(folders: Sequence[Path], extensions: Sequence[str], save_folder: str | os.PathLike) -> list[Part]:
    """Survey folders of untranscribed audio.

    Arguments
    ---------
    folders : sequence of Path
        Absolute paths.
    extensions : sequence of str
        Which files are audio.
    save_folder : path
        Where the manifests go.

    Returns
    -------
    list of Part
        One for each folder; its manifest is ``folder-NAME.csv``.

    Raises
    ------
    InputError
        If a folder has no audio, or two have the same name.
    """
    suffixes = normalize_extensions(extensions)
    names: dict[str, Path] = {}
    parts = []
    for folder in folders:
        if folder.name in names:
            raise InputError(
                f"'{names[folder.name]}' and '{folder}' have the same name, which begins the IDs of their "
                "utterances: rename one, or give a link with another name."
            )
        names[folder.name] = folder
        tree = AudioTree(folder, suffixes)
        survey = tree.survey(find_repeated=True)
        if not survey.files:
            raise InputError(
                f"folder '{folder}' holds no file that ends in {', '.join(suffixes)} ({survey.ignored} other files): "
                "give the folder of your audio, "
                + ("convert it, such as with ffmpeg, " if survey.other_audio else "")
                + "or name its extensions."
            )
        manifest = absolute_path(save_folder) / f"folder-{folder.name}.csv"
        parts.append(Part(tree, survey, manifest, corpus_name(folder, folder.name), folder.name))
    return parts


def place(unit: str, seed: int) -> float:
    """Give a name a place in [0, 1) that depends on nothing but the name and the seed.

    Arguments
    ---------
    unit : str
        The name.
    seed : int
        Another one gives another place.

    Returns
    -------
    float
    """
    digest = hashlib.blake2b(os.fsencode(f"{seed}\0{unit}"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def log_outcome(
    manifests: dict[str, Path], outcomes: dict[str, tuple[dict[str, Any], bool]], fresh: bool, corpus: str
) -> None:
    """Say in one line what the corpus holds, and whether it was there already.

    Arguments
    ---------
    manifests : dict
        Paths by key, the first of them in the folder of all.
    outcomes : dict
        Summaries by key.
    fresh : bool
        Whether anything had to be done.
    corpus : str
        What the recordings are.
    """
    counts = "; ".join(
        f"{key} {summary['utterances']} utterances, {summary['hours']:.2f} hours"
        for key, (summary, _) in outcomes.items()
    )
    state = "prepared" if fresh else "already prepared"
    logger.info("%s: %s in '%s': %s", corpus, state, next(iter(manifests.values())).parent, counts)
