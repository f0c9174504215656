"""Preparation of LibriSpeech, and of whatever has its layout."""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from speechbrain_bestrq.corpora._audio_files import AudioTree
from speechbrain_bestrq.corpora._options import (
    AUDIO_EXTENSIONS,
    AudioRules,
    absolute_path,
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
    prepare_part,
    survey_folders,
)
from speechbrain_bestrq.corpora.manifest import corpus_name, iterate_manifest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd")

_REMEDY = "give the folder that holds LibriSpeech's splits (train-clean-100, dev-clean, ...)"


def prepare_librispeech(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    train_splits: Sequence[str],
    valid_splits: Sequence[str],
    test_splits: Sequence[str] = (),
    sample_rate: int = 16000,
    resample: bool = True,
    max_unreadable: int = 0,
    workers: int | None = None,
    extra_folders: Sequence[str | os.PathLike] = (),
    transcripts: bool = False,
) -> dict[str, Path]:
    """Write the manifests of LibriSpeech.

    The layout is the official one: ``SPLIT/SPEAKER/CHAPTER/`` holds
    ``SPEAKER-CHAPTER-UTTERANCE.flac`` and ``SPEAKER-CHAPTER.trans.txt``. Each split
    has a manifest of its own, ``train.csv`` holds all train splits and the extra
    folders, ``valid.csv`` all valid splits; columns ID, duration (seconds), wav (an
    absolute path), spk_id, wrd. Rows are in the order of their paths, whatever the
    number of workers. What has no transcript has an empty ``wrd``.

    All folders are looked through before the first file is opened. Then the header
    and the end of each file are read, which takes minutes for 960 hours; memory does
    not grow with the corpus, but for the IDs.

    Called again, it does nothing if the options are the same and the data are
    unchanged, that is, if every audio file and transcript still has its name, size
    and time of modification (one ``stat`` for each). A split that is unchanged is
    not read again when other options change. A preparation that was interrupted is
    done again.

    Arguments
    ---------
    data_folder : path
        The folder with the splits.
    save_folder : path
        Where the manifests go, each with a summary (``train.csv.json``), and with a
        list of the files that cannot be read, if any (``dev-clean.csv.unreadable.txt``).
    train_splits, valid_splits, test_splits : sequence of str
        Names of splits.
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped, over all splits and extra folders.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.
    extra_folders : sequence of path
        Folders of untranscribed audio (wav, flac, ogg, opus, mp3), added to
        ``train.csv``; their IDs are paths that begin with the folder's name.
    transcripts : bool
        Whether a chapter without its file of transcripts is an error.

    Returns
    -------
    dict
        Paths of the manifests: ``train``, ``valid``, and one for each split.

    Raises
    ------
    InputError
        If the data are not there, not in this layout or not usable, if an option is
        out of range, or if a manifest in the way was not written by this function.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path")
    >>> for split, speaker in (("train-clean-100", 19), ("dev-clean", 84)):
    ...     chapter = root / "LibriSpeech" / split / f"{speaker}" / "198"
    ...     chapter.mkdir(parents=True)
    ...     soundfile.write(chapter / f"{speaker}-198-0000.flac", numpy.zeros(16000), 16000)
    >>> manifests = prepare_librispeech(root / "LibriSpeech", root / "save", ["train-clean-100"], ["dev-clean"])
    >>> sorted(manifests)
    ['dev-clean', 'train', 'train-clean-100', 'valid']
    """
    rules = AudioRules(sample_rate, resample, max_unreadable, workers)
    check_list(extra_folders, "extra_folders")
    splits = _check_splits(train_splits, valid_splits, test_splits)
    root = resolve_folder(data_folder, "data_folder", _REMEDY)
    check_splits(root, splits)
    extras = [resolve_folder(folder, "extra_folders", "give folders of audio, or none") for folder in extra_folders]
    check_apart(extras, [root / split for split in splits])

    corpus = corpus_name(root, "LibriSpeech")
    survey = _Surveyor(root, save_folder, corpus, transcripts)
    # of test splits two may share utterances, with one another and with a validation
    split_parts = {
        split: survey(split, apart_from=splits if split in (*train_splits, *valid_splits) else train_splits)
        for split in splits
    }
    extra_parts = survey_folders(extras, AUDIO_EXTENSIONS, save_folder)
    check_separate(extra_parts, list(split_parts.values()))
    save = make_save_folder(save_folder)

    prepared = [_prepare_split(part, rules) for part in split_parts.values()]
    prepared += [prepare_part(part, rules) for part in extra_parts]
    check_readable([*split_parts.values(), *extra_parts], [summary for summary, _ in prepared], rules)

    manifests = {"train": save / "train.csv", "valid": save / "valid.csv"}
    outcomes = {}
    for key, names, more in (("train", train_splits, extra_parts), ("valid", valid_splits, [])):
        chosen = [split_parts[split] for split in names]
        name = " + ".join([corpus, *(part.corpus for part in more)])
        outcomes[key] = combine(manifests[key], COLUMNS, name, [*chosen, *more], partial(_rows, chosen, more))
    log_outcome(manifests, outcomes, any(fresh for _, fresh in [*prepared, *outcomes.values()]), corpus)
    return manifests | {split: part.manifest for split, part in split_parts.items()}


def _check_splits(train: Sequence[str], valid: Sequence[str], test: Sequence[str]) -> list[str]:
    """Check the lists of splits, and return all names, each once."""
    for key, splits in (("train_splits", train), ("valid_splits", valid), ("test_splits", test)):
        check_list(splits, key)
        for split in splits:
            if split in ("train", "valid"):
                raise InputError(f"{key}: the manifest of a split '{split}' would be {split}.csv: rename its folder.")
            if split != os.path.basename(split):
                raise InputError(f"{key}: '{split}' is a path, not the name of a folder in data_folder.")
            if list(splits).count(split) > 1:
                raise InputError(f"{key} names '{split}' twice: remove one.")
            if key != "train_splits" and split in train:
                raise InputError(f"'{split}' is both in train_splits and in {key}: remove it from one of them.")
        if not splits and key != "test_splits":
            raise InputError(f"{key} is empty: name at least one split, such as train-clean-100 or dev-clean.")
    return list(dict.fromkeys([*train, *valid, *test]))


def check_splits(root: Path, splits: Sequence[str]) -> None:
    present = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    missing = [split for split in splits if split not in present]
    if not missing:
        return
    if root.name in splits:
        raise InputError(f"data_folder '{root}' is one split: give the folder that holds it, '{root.parent}'.")
    for name in present:
        if any((root / name / split).is_dir() for split in splits):
            raise InputError(f"data_folder '{root}' holds LibriSpeech in a folder of its own: give '{root / name}'.")
    held = ", ".join(present[:20]) + (f" and {len(present) - 20} more" if len(present) > 20 else "")
    raise InputError(
        f"data_folder '{root}' lacks the split(s) {', '.join(missing)}; it holds {held or 'no folders'}: download what "
        f"is missing, change train_splits, valid_splits or test_splits, or {_REMEDY}."
    )


class _Surveyor:
    """Looks through splits without opening a file, and refuses what is not in the layout."""

    def __init__(self, root: Path, save_folder: str | os.PathLike, corpus: str, transcripts: bool) -> None:
        self.root, self.corpus, self.transcripts = root, corpus, transcripts
        self.save_folder = absolute_path(save_folder)
        self._owners: dict[str, str] = {}

    def __call__(self, split: str, apart_from: Sequence[str]) -> Part:
        """Survey one split; it may share no utterance with those of ``apart_from`` that were surveyed before."""
        tree = AudioTree(self.root / split, (".flac",), (".trans.txt",))
        checked = ""

        def inspect(relative: str, path: str) -> None:
            nonlocal checked
            speaker, _, rest = relative.partition("/")
            chapter, _, name = rest.partition("/")
            prefix = f"{speaker}-{chapter}"
            if "/" in name or not name.startswith(prefix + "-"):
                raise InputError(
                    f"{path!r} is not in LibriSpeech's layout, SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac: move it "
                    "away, or prepare the audio as a folder instead."
                )
            if self.transcripts and prefix != checked:
                checked = prefix
                self._check_transcripts(_transcript_path(path, prefix))
            self._check_owner(_identifier(path), split, apart_from)

        survey = tree.survey(inspect)
        if not survey.files:
            raise InputError(
                f"split '{split}' in data_folder '{self.root}' holds no .flac file: unpack it again, or remove it from "
                "the list; what is in another format has to be converted."
            )
        return Part(tree, survey, self.save_folder / f"{split}.csv", self.corpus, split)

    def _check_transcripts(self, path: str) -> None:
        if not os.path.isfile(path):
            raise InputError(
                f"{path!r} is missing, but transcripts are needed here: unpack the split again, or remove the chapter."
            )

    def _check_owner(self, identifier: str, split: str, apart_from: Sequence[str]) -> None:
        owner = self._owners.setdefault(identifier, split)
        if owner != split and owner in apart_from:
            raise InputError(
                f"utterance {identifier!r} is both in '{owner}' and in '{split}': remove it from one of these splits."
            )


def _prepare_split(part: Part, rules: AudioRules) -> tuple[dict[str, Any], bool]:
    chapters = _Chapters()
    summary, fresh = prepare_part(part, rules, COLUMNS, chapters.row, chapters.notes)
    if fresh and summary["without_transcript"]:
        logger.info("%s: %d utterances have no transcript", part.label, summary["without_transcript"])
    return summary, fresh


def _identifier(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _transcript_path(path: str, prefix: str) -> str:
    return os.path.join(os.path.dirname(path), f"{prefix}.trans.txt")


class _Chapters:
    """Makes the rows of a split, with the transcripts of one chapter at a time in memory."""

    def __init__(self) -> None:
        self.without_transcript = 0
        self._path = ""
        self._transcripts: dict[str, str] = {}

    def row(self, relative: str, path: str, duration: float) -> dict[str, Any]:
        """Make the row of one utterance."""
        speaker, chapter, _ = relative.split("/")
        transcript_path = _transcript_path(path, f"{speaker}-{chapter}")
        if transcript_path != self._path:
            self._path, self._transcripts = transcript_path, _read_transcripts(transcript_path)
        identifier = _identifier(path)
        words = self._transcripts.get(identifier, "")
        self.without_transcript += not words
        return {"ID": identifier, "duration": duration, "wav": path, "spk_id": speaker, "wrd": words}

    def notes(self) -> dict[str, Any]:
        """Say what was counted."""
        return {"without_transcript": self.without_transcript}


def _read_transcripts(path: str) -> dict[str, str]:
    """Read lines "ID WORDS"; a file that is missing has none."""
    transcripts = {}
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a text by a mark
            for line in file:
                identifier, _, words = line.strip().partition(" ")
                transcripts[identifier] = words.strip()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"transcripts {path!r} cannot be read ({error}): unpack the split again.") from error
    return transcripts


def _rows(splits: Sequence[Part], extras: Sequence[Part]) -> Iterator[dict[str, Any]]:
    for part in splits:
        yield from iterate_manifest(part.manifest)
    for part in extras:
        for row in iterate_manifest(part.manifest):
            yield {**row, "ID": f"{part.label}/{row['ID']}", "spk_id": "", "wrd": ""}
