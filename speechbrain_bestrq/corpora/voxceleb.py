"""Preparation of VoxCeleb 1 and 2 for speaker verification, and of whatever has their layout."""

import logging
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from speechbrain_bestrq.corpora._audio_files import AudioTree, walk_files
from speechbrain_bestrq.corpora._options import (
    AUDIO_EXTENSIONS,
    AudioRules,
    absolute_path,
    check_apart,
    check_list,
    make_save_folder,
    normalize_extensions,
    resolve_folder,
)
from speechbrain_bestrq.corpora._parts import (
    Part,
    check_readable,
    check_separate,
    combine,
    log_outcome,
    look_again,
    place,
    prepare_part,
)
from speechbrain_bestrq.corpora._trials import (
    TRIAL_COLUMNS,
    Trial,
    draw_trials,
    identify,
    iterate_trials,
    speaker_of,
)
from speechbrain_bestrq.corpora.manifest import corpus_name, iterate_manifest
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

COLUMNS = ("ID", "duration", "wav", "spk_id")

_REMEDY = "give the folder that holds VoxCeleb's wav/id.../VIDEO/UTTERANCE.wav"


def prepare_voxceleb(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    trials: Sequence[str | os.PathLike] = ("veri_test.txt",),
    valid_share: float = 0.05,
    valid_trials: int = 2000,
    sample_rate: int = 16000,
    resample: bool = True,
    max_unreadable: int = 0,
    workers: int | None = None,
    seed: int = 0,
    extra_folders: Sequence[str | os.PathLike] = (),
) -> dict[str, Path]:
    """Write the manifests of VoxCeleb and its trials.

    The layout is the official one: ``wav/SPEAKER/VIDEO/UTTERANCE.wav``, with ``dev/``,
    ``test/`` or other folders above ``wav`` as they come, so that VoxCeleb 1 and 2 may
    also lie in one folder. VoxCeleb 2 is distributed as ``aac/.../UTTERANCE.m4a``, which
    has to be converted first: the error gives the command.

    Five files are written. ``train.csv``, ``valid.csv`` and ``test.csv`` have the columns
    ID (``SPEAKER/VIDEO/UTTERANCE``), duration (seconds), wav (an absolute path) and
    spk_id; rows are in the order of their paths, whatever the number of workers.
    ``trials.csv`` and ``valid_trials.csv`` have the columns list, label (1: the same
    speaker, 0: different ones), first and second (IDs): see :func:`read_trials`.

    - test: the utterances that the trial lists name, each once.
    - valid: trials between speakers of whom nothing is in training. A share of the
      speakers is held out, those whose places by a hash of ``seed`` and their names come
      first. As many target as impostor trials are drawn. The target trials are shared out
      evenly among these speakers, and are of two videos if the speaker has several.
      Utterances of these speakers that no trial names are not used.
    - train: all utterances of all other speakers. A speaker in a trial list is left out
      with everything they said: lists such as VoxCeleb1-E and -H, which name speakers of
      the training part, leave little or nothing of VoxCeleb 1. The log and the summary
      of ``train.csv`` count what is lost.

    Trial lists and folders are checked before the first file is opened. Then the header
    and the end of each file are read; memory does not grow with the corpus, but for the
    IDs. Called again, it does nothing if the options are the same and the data are
    unchanged, that is, if every audio file still has its name, size and time of
    modification, and the lists their content. A preparation that was interrupted is done
    again.

    Arguments
    ---------
    data_folder : path
        The folder of the corpus.
    save_folder : path
        Where the manifests go, each with a summary (``train.csv.json``), and with a
        list of the files that cannot be read, if any.
    trials : sequence of path
        Trial lists in VoxCeleb's own format, one ``1 id1/video/00001.wav
        id2/video/00002.wav`` a line: names of files in ``data_folder/meta`` or
        ``data_folder``, or paths. A list is called by its name without ``.txt``.
    valid_share : float
        Share of the speakers for validation, above 0 and below 1; at least two.
    valid_trials : int
        Most validation trials, at least 2.
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped, over all folders; none that a trial names.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.
    seed : int
        Another one draws other validation speakers and trials.
    extra_folders : sequence of path
        Further folders in this layout, such as VoxCeleb 2.

    Returns
    -------
    dict
        Paths: ``train``, ``valid``, ``test``, ``trials``, ``valid_trials``.

    Raises
    ------
    InputError
        If the data are not there, not in this layout or not usable, if a list is in
        another format or names what is not there, if too few speakers are left, if an
        option is out of range, or if a manifest in the way was not written by this
        function.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path") / "VoxCeleb1"
    >>> for speaker in range(6):
    ...     for video in ("one", "two"):
    ...         folder = root / "wav" / f"id1000{speaker}" / video
    ...         folder.mkdir(parents=True)
    ...         soundfile.write(folder / "00001.wav", numpy.zeros(16000), 16000)
    >>> (root / "meta").mkdir()
    >>> _ = (root / "meta" / "veri_test.txt").write_text(
    ...     "1 id10000/one/00001.wav id10000/two/00001.wav\\n0 id10000/one/00001.wav id10001/two/00001.wav\\n"
    ... )
    >>> manifests = prepare_voxceleb(root, root / "save")
    >>> {key: len(list(iterate_manifest(manifests[key]))) for key in ("train", "valid", "test")}
    {'train': 4, 'valid': 4, 'test': 3}
    >>> from speechbrain_bestrq.corpora import read_trials
    >>> read_trials(manifests["trials"])["veri_test"][0]
    (1, 'id10000/one/00001', 'id10000/two/00001')
    """
    rules = AudioRules(sample_rate, resample, max_unreadable, workers)
    if not 0.0 < valid_share < 1.0:
        raise InputError(f"valid_share is above 0 and below 1, not {valid_share}.")
    if valid_trials < 2:
        raise InputError(f"valid_trials is a count of trials, at least 2, not {valid_trials}.")
    check_list(trials, "trials")
    check_list(extra_folders, "extra_folders")
    root = resolve_folder(data_folder, "data_folder", _REMEDY)
    extras = [
        resolve_folder(folder, "extra_folders", "give folders in this layout, or none") for folder in extra_folders
    ]
    check_apart(extras, [root])
    lists = find_lists(trials, root)

    corpus = corpus_name(root, "VoxCeleb")
    surveyor = _Surveyor(absolute_path(save_folder))
    parts = [surveyor(root, corpus), *(surveyor(folder, corpus_name(folder, folder.name)) for folder in extras)]
    check_separate(parts[1:], parts[:1])
    named = _check_trials(lists, surveyor.identifiers)
    trial_speakers = frozenset(map(speaker_of, named))
    _check_speakers(surveyor.identifiers, trial_speakers, root)
    save = make_save_folder(save_folder)

    prepared = [prepare_part(part, rules, COLUMNS, _row) for part in parts]
    check_readable(parts, [summary for summary, _ in prepared], rules)

    split = cache(lambda: _split(parts, trial_speakers, valid_share, valid_trials, seed))
    corpus = " + ".join(part.corpus for part in parts)
    tests = {"trials": {name: file_digest(path) for name, path in lists.items()}}
    options = {**tests, "valid_share": valid_share, "valid_trials": valid_trials, "seed": seed}
    manifests = {key: save / f"{key}.csv" for key in ("train", "valid", "test", "trials", "valid_trials")}

    # for each manifest its columns, its rows, the notes for its summary and on what it depends besides the audio
    plans: dict[str, tuple[Sequence[str], Callable, Callable, dict[str, Any]]] = {
        "test": (COLUMNS, partial(_test_rows, parts, named), dict, tests),
        "trials": (TRIAL_COLUMNS, partial(_list_rows, lists), dict, tests),
        "valid_trials": (TRIAL_COLUMNS, lambda: _drawn_rows(split().trials), dict, options),
        "valid": (COLUMNS, lambda: _select(parts, lambda row: row["ID"] in split().named), dict, options),
        "train": (
            COLUMNS,
            lambda: _select(parts, lambda row: row["spk_id"] in split().train),
            lambda: split().notes,
            options,
        ),
    }
    outcomes = {
        key: combine(manifests[key], columns, corpus, parts, rows, finish, **recipe)
        for key, (columns, rows, finish, recipe) in plans.items()
    }
    summary, fresh = outcomes["train"]
    if fresh:
        _log_split(summary, outcomes)
    with_audio = {key: outcomes[key] for key in ("train", "valid", "test")}
    log_outcome(manifests, with_audio, any(fresh for _, fresh in [*prepared, *outcomes.values()]), corpus)
    return manifests


def find_lists(trials: Sequence[str | os.PathLike], root: Path) -> dict[str, Path]:
    """Find the trial lists, and return their paths by their names."""
    if not trials:
        raise InputError("trials is empty: name at least one trial list, such as veri_test.txt.")
    lists: dict[str, Path] = {}
    for given in trials:
        candidates = (root / "meta" / given, root / given, absolute_path(given))
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            present = sorted(path.name for folder in (root / "meta", root) for path in folder.glob("*.txt"))
            raise InputError(
                f"trial list '{given}' is neither in '{root / 'meta'}' nor in '{root}' nor a path; there are "
                f"{', '.join(present) or 'no lists'}: name one of them, or download it from VoxCeleb's page."
            )
        if path.stem in lists:
            raise InputError(f"trials: '{lists[path.stem]}' and '{path}' have the same name: rename one.")
        lists[path.stem] = path
    return lists


class _Surveyor:
    """Looks through folders without opening a file, and refuses what is not in the layout."""

    def __init__(self, save_folder: Path) -> None:
        self.save_folder = save_folder
        self.identifiers: set[str] = set()
        self._folders: dict[str, Path] = {}

    def __call__(self, folder: Path, corpus: str) -> Part:
        """Survey one folder."""
        if folder.name in self._folders:
            raise InputError(
                f"'{self._folders[folder.name]}' and '{folder}' have the same name, which their manifests get: rename "
                "one, or give a link with another name."
            )
        self._folders[folder.name] = folder
        tree = AudioTree(folder, normalize_extensions(AUDIO_EXTENSIONS))
        survey = tree.survey(self._inspect)
        if survey.ignored:
            self._check_converted(folder)
        if not survey.files:
            raise InputError(
                f"'{folder}' holds no file that ends in {', '.join(tree.suffixes)} ({survey.ignored} other files): "
                f"{_REMEDY}."
            )
        return Part(tree, survey, self.save_folder / f"all-{folder.name}.csv", corpus, folder.name)

    def _inspect(self, relative: str, path: str) -> None:
        identifier = identify(relative)
        if identifier is None:
            raise InputError(
                f"{path!r} is not in VoxCeleb's layout, wav/id10001/VIDEO/UTTERANCE.wav: move it away, or give another "
                "folder."
            )
        if identifier in self.identifiers:
            raise InputError(
                f"utterance {identifier!r} is there twice, once more as {path!r}: remove one, or give only one of the "
                "folders."
            )
        self.identifiers.add(identifier)

    def _check_converted(self, folder: Path) -> None:
        count, first = 0, ""
        for relative, entry in walk_files(folder):
            if entry.name.lower().endswith(".m4a") and identify(relative) not in self.identifiers:
                first = first or entry.path
                count += 1
        if count:
            raise InputError(
                f"{count} recordings in '{folder}' are m4a, which cannot be read, first {first!r}: convert them with "
                f"find {shlex.quote(str(folder))} -name '*.m4a' -exec sh -c "
                """'ffmpeg -nostdin -v error -i "$1" -ac 1 -ar 16000 "${1%.*}.wav"' _ {} \\;"""
            )


def _check_trials(lists: dict[str, Path], identifiers: Collection[str]) -> frozenset[str]:
    """Check that each list can be scored on these utterances, and return those that it names."""
    named: set[str] = set()
    for name, path in lists.items():
        labels: Counter[int] = Counter()
        absent: set[str] = set()
        lost = contradictions = 0
        first = ""
        for line, (label, *pair) in iterate_trials(path):
            labels[label] += 1
            missing = [identifier for identifier in pair if identifier not in identifiers]
            first = first or (f"{missing[0]!r} (line {line})" if missing else "")
            lost += bool(missing)
            absent.update(missing)
            named.update(pair)
            contradictions += label != (speaker_of(pair[0]) == speaker_of(pair[1]))
        total = labels.total()
        if lost:
            raise InputError(
                f"trial list '{path}': {lost} of {total} trials name {len(absent)} utterances that are not there, "
                f"first {first}: unpack the corpus again, or give the folder or the list that belongs to the other."
            )
        if not labels[0] or not labels[1]:
            raise InputError(
                f"trial list '{path}' holds {labels[1]} target and {labels[0]} impostor trials: an error rate "
                "needs both."
            )
        if contradictions:
            logger.warning(
                "%s: the labels of %d of %d trials contradict the names of the speakers", name, contradictions, total
            )
    return frozenset(named)


def _check_speakers(identifiers: Collection[str], trial_speakers: Collection[str], root: Path) -> None:
    free = Counter(speaker for speaker in map(speaker_of, identifiers) if speaker not in trial_speakers)
    several = sum(count > 1 for count in free.values())
    if len(free) < 4 or several < 2:
        raise InputError(
            f"'{root}': {len(free)} speakers are left when the {len(trial_speakers)} of the trial lists are kept out "
            f"of training, {several} of them with more than one utterance; 2 to train on and 2 such to validate on are "
            "the least: give more data (extra_folders, such as VoxCeleb 2), or a trial list with fewer speakers."
        )


def _row(relative: str, path: str, duration: float) -> dict[str, Any]:
    identifier = identify(relative)
    return {"ID": identifier, "duration": duration, "wav": path, "spk_id": speaker_of(identifier)}


class _Split(NamedTuple):
    """Who is on which side."""

    train: frozenset[str]
    """Speakers to train on."""
    trials: list[Trial]
    """Validation trials."""
    named: frozenset[str]
    """Utterances that these name."""
    notes: dict[str, Any]
    """For the summary of the training set."""


def _split(parts: Sequence[Part], trial_speakers: Collection[str], share: float, most_trials: int, seed: int) -> _Split:
    counts: Counter[str] = Counter()
    left_out, seconds = 0, 0.0
    for row in _select(parts, lambda row: True):
        if row["spk_id"] in trial_speakers:
            left_out += 1
            seconds += row["duration"]
        else:
            counts[row["spk_id"]] += 1
    # of one utterance alone no target trial can be made
    able = sorted((speaker for speaker in counts if counts[speaker] > 1), key=lambda name: (place(name, seed), name))
    held_out = set(able[: max(2, round(share * len(counts)))])
    if len(held_out) < 2 or len(counts) - len(held_out) < 2:
        raise InputError(
            f"'{parts[0].tree.root}': of {len(counts)} speakers to train and validate on, {len(held_out)} would be for "
            f"validation (valid_share = {share}): 2 on either side are the least, set another valid_share or add data."
        )
    utterances: defaultdict[str, list[str]] = defaultdict(list)
    for row in _select(parts, lambda row: row["spk_id"] in held_out):
        utterances[row["spk_id"]].append(row["ID"])
    trials = draw_trials(utterances, most_trials, seed)
    named = frozenset(identifier for _, *pair in trials for identifier in pair)
    train = frozenset(counts) - held_out
    notes = {
        "speakers": len(train),
        "single_utterance_speakers": sum(counts[speaker] == 1 for speaker in train),
        "valid_speakers": len(held_out),
        "valid_utterances_unused": sum(map(len, utterances.values())) - len(named),
        "trial_speakers": len(trial_speakers),
        "trial_speaker_utterances": left_out,
        "trial_speaker_hours": seconds / 3600.0,
    }
    return _Split(train, trials, named, notes)


def _select(parts: Sequence[Part], wanted: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from filter(wanted, iterate_manifest(part.manifest))


def _test_rows(parts: Sequence[Part], named: frozenset[str]) -> Iterator[dict[str, Any]]:
    unread = set(named)
    for row in _select(parts, lambda row: row["ID"] in named):
        unread.discard(row["ID"])
        yield row
    if unread:
        look_again(parts)
        raise InputError(
            f"{len(unread)} utterances that trials name cannot be read, first {min(unread)!r}, see the lists "
            f"'{parts[0].manifest.parent}/*.unreadable.txt': mend them, or give a trial list without them."
        )


def _list_rows(lists: dict[str, Path]) -> Iterator[dict[str, Any]]:
    for name, path in lists.items():
        for _, trial in iterate_trials(path):
            yield dict(zip(TRIAL_COLUMNS, (name, *trial), strict=True))


def _drawn_rows(trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    for trial in trials:
        yield dict(zip(TRIAL_COLUMNS, ("valid", *trial), strict=True))


def _log_split(summary: dict[str, Any], outcomes: dict[str, tuple[dict[str, Any], bool]]) -> None:
    logger.info(
        "%d speakers to train on (%d with a single utterance), %d held out for %d validation trials (%d of their "
        "utterances unused), %d in %d test trials",
        summary["speakers"],
        summary["single_utterance_speakers"],
        summary["valid_speakers"],
        outcomes["valid_trials"][0]["rows"],
        summary["valid_utterances_unused"],
        summary["trial_speakers"],
        outcomes["trials"][0]["rows"],
    )
    unused = summary["trial_speaker_utterances"] - outcomes["test"][0]["utterances"]
    logger.info(
        "kept out of training for the trial lists: %d utterances, %.2f hours, of which the lists do not name %d",
        summary["trial_speaker_utterances"],
        summary["trial_speaker_hours"],
        unused,
    )
