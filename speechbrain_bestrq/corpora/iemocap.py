"""Preparation of IEMOCAP for emotion recognition, and of whatever has its layout."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from speechbrain_bestrq.corpora._audio_files import AudioTree
from speechbrain_bestrq.corpora._options import AudioRules, absolute_path, check_list, make_save_folder, resolve_folder
from speechbrain_bestrq.corpora._parts import Part, check_readable, combine, log_outcome, prepare_part
from speechbrain_bestrq.corpora.manifest import corpus_name, iterate_manifest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

COLUMNS = ("ID", "duration", "wav", "emo", "spk_id", "session", "kind")

SESSIONS = tuple(f"Session{number}" for number in range(1, 6))
SPEAKERS = tuple(f"Ses0{number}{letter}" for number in range(1, 6) for letter in "FM")
KINDS = ("impro", "script")

EMOTIONS = ("ang", "dis", "exc", "fea", "fru", "hap", "neu", "oth", "sad", "sur", "xxx")
"""The labels of the release; ``xxx`` is a turn on which the evaluators did not agree."""

FOUR_CLASSES: Mapping[str, str] = MappingProxyType(
    {"ang": "ang", "exc": "hap", "hap": "hap", "neu": "neu", "sad": "sad"}
)
"""The four classes of the literature, excited merged into happy: 5531 turns of the release."""

FOLDS: Mapping[str, tuple[str, ...]] = MappingProxyType({"speaker": SPEAKERS, "session": SESSIONS})
"""The names of the folds, each that of its test speaker or test session."""

_REMEDY = "give the folder that holds Session1 to Session5 (IEMOCAP_full_release)"

_TURN = re.compile(r"\[\s*\d+\.\d+\s*-\s*\d+\.\d+\s*\]\s+(\S+)\s+(\S+)\s+\[[^\]]*\]")
# the votes of one evaluator, categorical or in attributes; E1 and so on, and F1 or M1 for the speaker themselves
_VOTE = re.compile(r"[CA]-\w+:")
_NAME = re.compile(r"(Ses0([1-5])[FM]_(impro|script)\w*)_([FM])\w+")


class Fold(NamedTuple):
    """One fold of a cross-validation."""

    name: str
    """The test speaker or test session."""
    train: list[str]
    """IDs."""
    valid: list[str]
    """IDs."""
    test: list[str]
    """IDs."""


def prepare_iemocap(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    classes: Mapping[str, str] = FOUR_CLASSES,
    folds: str = "speaker",
    kinds: Sequence[str] = KINDS,
    sample_rate: int = 16000,
    resample: bool = True,
    max_unreadable: int = 0,
    workers: int | None = None,
) -> dict[str, Path]:
    """Write the manifests of IEMOCAP, for all folds of a cross-validation.

    The layout is that of the release: ``SessionN/sentences/wav/DIALOG/TURN.wav``, and the
    labels in ``SessionN/dialog/EmoEvaluation/DIALOG.txt``, where a turn has a line
    ``[START - END] TURN EMOTION [V, A, D]``. The votes of the single evaluators below it
    are passed over, and so are the sub-folders of ``EmoEvaluation``. The speaker is the
    letter of the turn's last part, ``Ses01F_impro01_M000`` is said by Ses01M.

    ``all.csv`` holds the turns of the classes; each fold has ``FOLD/train.csv``,
    ``FOLD/valid.csv`` and ``FOLD/test.csv``, split as :func:`iemocap_folds` does. Columns
    ID (the name of the turn), duration (seconds), wav (an absolute path), emo (a class),
    spk_id, session, kind (impro or script); rows are in the order of their paths,
    whatever the number of workers. The summary of ``all.csv`` has the number of turns of
    each class (``classes``) and of each label that is left out (``left_out``).

    All labels are read before the first audio file is opened. Called again, it does
    nothing if the options are the same and the data are unchanged, that is, if every
    audio file still has its name, size and time of modification, and every turn its
    label. Other classes, kinds or folds do not read the audio again. A preparation that
    was interrupted is done again.

    Arguments
    ---------
    data_folder : path
        The folder with the sessions.
    save_folder : path
        Where the manifests go, each with a summary (``all.csv.json``), and with a list
        of the files that cannot be read, if any.
    classes : mapping
        For each label of the release that is used, the class that it becomes.
    folds : str
        ``speaker``: ten folds, ``session``: five.
    kinds : sequence of str
        ``impro``, ``script`` or both.
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped, over all sessions.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.

    Returns
    -------
    dict
        Paths of the manifests: ``all``, and ``FOLD/train``, ``FOLD/valid`` and
        ``FOLD/test`` for each fold; :func:`fold_manifests` gives those of one.

    Raises
    ------
    InputError
        If the data are not there, not in this layout or not usable, if a label is
        unknown, if a class or one side of a fold has no turn, if an option is out of
        range, or if a manifest in the way was not written by this function.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path") / "IEMOCAP"
    >>> for number in range(1, 6):
    ...     dialog = f"Ses0{number}F_impro01"
    ...     audio = root / f"Session{number}" / "sentences" / "wav" / dialog
    ...     labels = root / f"Session{number}" / "dialog" / "EmoEvaluation"
    ...     audio.mkdir(parents=True)
    ...     labels.mkdir(parents=True)
    ...     turns = [f"{dialog}_F000", f"{dialog}_M000"]
    ...     for turn in turns:
    ...         soundfile.write(audio / f"{turn}.wav", numpy.zeros(16000), 16000)
    ...     lines = [f"[0.0000 - 1.0000]\\t{turn}\\tneu\\t[2.5000, 2.5000, 2.5000]\\n" for turn in turns]
    ...     _ = (labels / f"{dialog}.txt").write_text("".join(lines))
    >>> manifests = prepare_iemocap(root, root / "save", classes={"neu": "neutral"})
    >>> [row["spk_id"] for row in iterate_manifest(manifests["Ses03F/valid"])]
    ['Ses03M']
    """
    rules = AudioRules(sample_rate, resample, max_unreadable, workers)
    _check_options(classes, folds, kinds)
    root = resolve_folder(data_folder, "data_folder", _REMEDY)
    check_sessions(root)

    corpus = corpus_name(root, "IEMOCAP")
    labels = [_read_labels(root / session / "dialog" / "EmoEvaluation") for session in SESSIONS]
    parts = [
        _survey(root, session, found, absolute_path(save_folder), corpus)
        for session, found in zip(SESSIONS, labels, strict=True)
    ]
    _check_classes(labels, classes, kinds, root)
    save = make_save_folder(save_folder)

    prepared = [
        prepare_part(part, rules, COLUMNS, partial(_row, part.label, found))
        for part, found in zip(parts, labels, strict=True)
    ]
    check_readable(parts, [summary for summary, _ in prepared], rules)

    options = {"classes": dict(sorted(classes.items())), "kinds": sorted(kinds)}
    selection = _Selection(parts, classes, kinds)
    manifests = {"all": save / "all.csv"}
    whole = combine(manifests["all"], COLUMNS, corpus, parts, selection.rows, selection.notes, **options)

    rows = cache(lambda: list(iterate_manifest(manifests["all"])))
    split = cache(lambda: _check_folds(iemocap_folds(rows(), folds)))
    fresh = any(fresh for _, fresh in [*prepared, whole])
    for index, fold in enumerate(FOLDS[folds]):
        for side in ("train", "valid", "test"):
            path = manifests[f"{fold}/{side}"] = save / fold / f"{side}.csv"
            chosen = partial(_side_rows, rows, split, index, side)
            fresh |= combine(path, COLUMNS, corpus, parts, chosen, folds=folds, **options)[1]
    if whole[1]:
        _log_selection(whole[0])
    log_outcome(manifests, {"all": whole}, fresh, corpus)
    return manifests


def iemocap_folds(rows: Iterable[Mapping[str, Any]], by: str) -> list[Fold]:
    """Split turns into the folds of a cross-validation, a function of the turns alone.

    By speaker: ten folds, each tests on one speaker, validates on the other speaker of
    the same session, and trains on the other four sessions, as MP3S does (Table 1's
    protocol). By session: five folds, each tests on one session, validates on the next
    one (on the first after the last), and trains on the other three. Either way no
    speaker is on two sides; by speaker, test and validation share their dialogs.

    Arguments
    ---------
    rows : iterable of mapping
        With the keys ID, spk_id and session.
    by : str
        ``speaker`` or ``session``.

    Returns
    -------
    list of Fold
        In the order of the names; within a side, in the order of the rows.

    Raises
    ------
    InputError
        If ``by`` is neither.

    Example
    -------
    >>> rows = [
    ...     {"ID": f"{speaker}_impro01_{speaker[-1]}000", "spk_id": speaker, "session": f"Session{speaker[4]}"}
    ...     for speaker in SPEAKERS
    ... ]
    >>> fold = iemocap_folds(rows, "session")[4]
    >>> fold.name, fold.valid, len(fold.train)
    ('Session5', ['Ses01F_impro01_F000', 'Ses01M_impro01_M000'], 6)
    """
    if by not in FOLDS:
        raise InputError(f"folds is 'speaker' or 'session', not {by!r}.")
    key = "spk_id" if by == "speaker" else "session"
    turns = [(row["ID"], row[key]) for row in rows]
    names = FOLDS[by]
    folds = []
    for index, name in enumerate(names):
        # SPEAKERS has the two of a session side by side
        valid = names[index ^ 1] if by == "speaker" else names[(index + 1) % len(names)]
        folds.append(
            Fold(
                name,
                [identifier for identifier, owner in turns if owner not in (name, valid)],
                [identifier for identifier, owner in turns if owner == valid],
                [identifier for identifier, owner in turns if owner == name],
            )
        )
    return folds


def fold_manifests(manifests: Mapping[str, Path], fold: str) -> dict[str, Path]:
    """Pick the manifests of one fold.

    Arguments
    ---------
    manifests : mapping
        What :func:`prepare_iemocap` returned.
    fold : str
        Its name.

    Returns
    -------
    dict
        Paths: ``train``, ``valid`` and ``test``.

    Raises
    ------
    InputError
        If there is no such fold, with the names of those there are.

    Example
    -------
    >>> sides = {f"Ses01F/{side}": Path(f"/save/Ses01F/{side}.csv") for side in ("train", "valid", "test")}
    >>> fold_manifests(sides, "Ses01F")["valid"].name
    'valid.csv'
    """
    names = dict.fromkeys(key.partition("/")[0] for key in manifests if "/" in key)
    if fold not in names:
        raise InputError(f"fold {str(fold)!r} does not exist: name one of {', '.join(names)}.")
    return {side: manifests[f"{fold}/{side}"] for side in ("train", "valid", "test")}


def _check_options(classes: Mapping[str, str], folds: str, kinds: Sequence[str]) -> None:
    if not isinstance(classes, Mapping) or not classes:
        raise InputError(f"classes maps labels to classes, such as {{ang: ang, exc: hap}}, not {classes!r}.")
    for label in classes:
        if label not in EMOTIONS:
            raise InputError(f"classes: {label!r} is no label of the release: its labels are {', '.join(EMOTIONS)}.")
    if str(folds) not in FOLDS:
        raise InputError(f"folds is 'speaker' or 'session', not {folds!r}.")
    check_list(kinds, "kinds")
    if not kinds or set(kinds) - set(KINDS):
        raise InputError(f"kinds is a list of {' and '.join(KINDS)}, or one of them, not {kinds}.")


def check_sessions(root: Path) -> None:
    missing = [session for session in SESSIONS if not (root / session).is_dir()]
    if len(missing) == len(SESSIONS):
        for folder in sorted(root.iterdir()):
            if (folder / SESSIONS[0]).is_dir():
                raise InputError(f"data_folder '{root}' holds IEMOCAP in a folder of its own: give '{folder}'.")
    if missing:
        raise InputError(f"data_folder '{root}' lacks {', '.join(missing)}: {_REMEDY}, and unpack what is missing.")
    for session in SESSIONS:
        for folder in (root / session / "sentences" / "wav", root / session / "dialog" / "EmoEvaluation"):
            if not folder.is_dir():
                raise InputError(f"'{folder}' does not exist: unpack '{session}' of the release again.")


def _read_labels(folder: Path) -> dict[str, str]:
    """Read the label of each turn of a session."""
    labels: dict[str, str] = {}
    for path in sorted(folder.glob("[!.]*.txt")):
        strange: list[int] = []
        try:
            # some comments of the release are not UTF-8; the names of turns and labels are ASCII. Not splitlines, which
            # takes some of their bytes, such as cp1252's ellipsis, for the end of a line
            lines = path.read_text(encoding="latin-1").split("\n")
        except OSError as error:
            raise InputError(f"labels '{path}' cannot be read ({error.strerror}): unpack the session again.") from error
        for number, line in enumerate(lines, 1):
            if line.startswith("["):
                turn, label = _parse_turn(line, path, number)
                if labels.setdefault(turn, label) != label:
                    raise InputError(
                        f"labels '{path}', line {number}: turn {turn!r} is {label!r} here and {labels[turn]!r} before: "
                        "remove one of the lines."
                    )
            elif line.strip() and not line.startswith("%") and not _VOTE.match(line):
                strange.append(number)
        if strange:
            logger.warning("'%s': %d lines are of no known kind, first line %d", path, len(strange), strange[0])
    if not labels:
        raise InputError(f"'{folder}' holds no label of a turn: unpack the session again.")
    return labels


def _parse_turn(line: str, path: Path, number: int) -> tuple[str, str]:
    match = _TURN.fullmatch(line.strip())
    if match is None or not _NAME.fullmatch(match[1]):
        raise InputError(
            f"labels '{path}', line {number}: {line.strip()[:100]!r} is not '[START - END] TURN EMOTION [V, A, D]' "
            "with a turn such as Ses01F_impro01_F000: unpack the session again."
        )
    if match[2] not in EMOTIONS:
        raise InputError(
            f"labels '{path}', line {number}: {match[2]!r} is no label of the release ({', '.join(EMOTIONS)}): mend it."
        )
    return match[1], match[2]


def _survey(root: Path, session: str, labels: Mapping[str, str], save_folder: Path, corpus: str) -> Part:
    tree = AudioTree(root / session / "sentences" / "wav", (".wav",))
    missing = set(labels)

    def inspect(relative: str, path: str) -> None:
        turn = _turn(path)
        match = _NAME.fullmatch(turn)
        if match is None or relative != f"{match[1]}/{os.path.basename(path)}" or f"Session{match[2]}" != session:
            raise InputError(
                f"{path!r} is not in IEMOCAP's layout, Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav: "
                "move it away."
            )
        missing.discard(turn)

    survey = tree.survey(inspect)
    if not survey.files:
        raise InputError(f"'{tree.root}' holds no .wav file: unpack '{session}' of the release again.")
    if missing:
        raise InputError(
            f"{session}: {len(missing)} of {len(labels)} turns with a label have no file, first {min(missing)!r}: "
            "unpack the session again."
        )
    content = json.dumps(sorted(labels.items())).encode()
    fingerprint = f"{survey.fingerprint} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
    return Part(tree, survey._replace(fingerprint=fingerprint), save_folder / f"{session}.csv", corpus, session)


def _check_classes(
    labels: Sequence[Mapping[str, str]], classes: Mapping[str, str], kinds: Sequence[str], root: Path
) -> None:
    present = {
        classes[label]
        for found in labels
        for turn, label in found.items()
        if label in classes and _NAME.fullmatch(turn)[3] in kinds
    }
    absent = sorted(set(classes.values()) - present)
    if absent:
        raise InputError(
            f"'{root}' holds no turn of the class(es) {', '.join(absent)} in {' and '.join(kinds)} dialogs: take them "
            "out of classes, or add kinds."
        )


def _turn(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _row(session: str, labels: Mapping[str, str], relative: str, path: str, duration: float) -> dict[str, Any]:
    """Make the row of a turn of any label; one without a label has an empty one."""
    turn = _turn(path)
    _, number, kind, letter = _NAME.fullmatch(turn).groups()
    speaker = f"Ses0{number}{letter}"
    values = (turn, duration, path, labels.get(turn, ""), speaker, session, kind)
    return dict(zip(COLUMNS, values, strict=True))


class _Selection:
    """The turns of the classes and kinds, and what is left out, counted."""

    def __init__(self, parts: Sequence[Part], classes: Mapping[str, str], kinds: Sequence[str]) -> None:
        self.parts, self.classes, self.kinds = parts, classes, kinds
        self._taken: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._other_kind = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Make the rows."""
        for part in self.parts:
            for row in iterate_manifest(part.manifest):
                if row["kind"] not in self.kinds:
                    self._other_kind += 1
                elif row["emo"] not in self.classes:
                    self._left_out[row["emo"] or "without a label"] += 1
                else:
                    row["emo"] = self.classes[row["emo"]]
                    self._taken[row["emo"]] += 1
                    yield row

    def notes(self) -> dict[str, Any]:
        """Say what was counted."""
        return {
            "classes": dict(sorted(self._taken.items())),
            "left_out": dict(sorted(self._left_out.items())),
            "other_kind": self._other_kind,
        }


def _check_folds(folds: list[Fold]) -> list[Fold]:
    for fold in folds:
        for side in ("train", "valid", "test"):
            if not getattr(fold, side):
                raise InputError(
                    f"fold '{fold.name}' has no turn in {side}: add classes or kinds, or see that no file of its "
                    "speakers is missing."
                )
    return folds


def _side_rows(
    rows: Callable[[], list[dict[str, Any]]], split: Callable[[], list[Fold]], index: int, side: str
) -> Iterator[dict[str, Any]]:
    chosen = set(getattr(split()[index], side))
    return (row for row in rows() if row["ID"] in chosen)


def _log_selection(summary: dict[str, Any]) -> None:
    def listed(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"

    logger.info(
        "turns: %s; left out: %s; of another kind: %d",
        listed(summary["classes"]),
        listed(summary["left_out"]),
        summary["other_kind"],
    )
