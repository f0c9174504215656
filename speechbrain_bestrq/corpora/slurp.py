"""Preparation of SLURP for intent classification, and of whatever has its layout."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from speechbrain_bestrq.corpora._audio_files import AudioTree
from speechbrain_bestrq.corpora._options import (
    AUDIO_EXTENSIONS,
    AudioRules,
    absolute_path,
    check_list,
    make_save_folder,
    normalize_extensions,
    resolve_folder,
)
from speechbrain_bestrq.corpora._parts import Part, check_readable, combine, log_outcome, prepare_part
from speechbrain_bestrq.corpora.manifest import corpus_name, iterate_manifest
from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError

logger = logging.getLogger(__name__)

TARGETS = ("scenario", "action", "intent")
COLUMNS = ("ID", "duration", "wav", "spk_id", *TARGETS, "sentence")
MICROPHONES = ("headset", "distant")

_REMEDY = "give the folder that holds SLURP's dataset/slurp/*.jsonl and audio/slurp_real"

# SpeechBrain's recipe calls the recorded training part train_real
_TEXT_NAMES = {"train": ("train", "train_real"), "valid": ("devel",), "test": ("test",)}


def prepare_slurp(
    data_folder: str | os.PathLike,
    save_folder: str | os.PathLike,
    microphones: Sequence[str] = MICROPHONES,
    synthetic: bool = False,
    sample_rate: int = 16000,
    resample: bool = True,
    max_unreadable: int = 0,
    workers: int | None = None,
) -> dict[str, Path]:
    """Write the manifests of SLURP.

    The layout is that of the release, ``dataset/slurp/{train,devel,test}.jsonl`` and
    ``audio/slurp_real/*.flac``, or that of SpeechBrain's recipe, where all this lies in
    one folder (and ``train.jsonl`` may be called ``train_real.jsonl``). ``train.csv``,
    ``valid.csv`` (devel) and ``test.csv`` have a row for each recording: columns ID (the
    file's name without its ending), duration (seconds), wav (an absolute path), spk_id
    (out of ``metadata.json``, empty if unknown), scenario, action, intent, sentence. Rows
    are in the order of the jsonl files.

    A recording belongs to one part and has one intent: one that the texts list in several is kept in the test part
    before the validation part before the training part, and there as it comes first. What two microphones recorded at
    once is in one part too: of ``audio-1`` and ``audio-1-headset`` in two parts, the one in the earlier part is left
    out (ten in the validation part of the release, of the tests' words). The log counts both.

    The intent is ``SCENARIO_ACTION``. The release's own key ``intent`` says something
    else in some lines, the action alone or with another scenario; it is not used.

    The labels to be learned are those of the training part: its summary has them sorted,
    ``read_summary(train)["labels"]["scenario"]``, and those of the others count by label
    what was never seen there (``unseen``), which the log names. Such recordings stay in
    the manifests: they can only be misclassified.

    All lines are read before the first audio file is opened. Called again, it does
    nothing if the options are the same and the data are unchanged, that is, if every
    audio file still has its name, size and time of modification, and the texts their
    content. Audio that no line names is passed over. A preparation that was interrupted
    is done again.

    Arguments
    ---------
    data_folder : path
        The folder of the corpus.
    save_folder : path
        Where the manifests go, each with a summary (``train.csv.json``), and with a list
        of the files that cannot be read, if any.
    microphones : sequence of str
        ``headset`` (the file's name ends in ``-headset``), ``distant`` (all others) or
        both; for all parts.
    synthetic : bool
        Whether ``train_synthetic.jsonl`` with ``slurp_synth`` is added to the training
        part, whatever the microphones.
    sample_rate : int
        The rate that training wants, in Hz.
    resample : bool
        Whether other rates are accepted, to be resampled when loaded.
    max_unreadable : int
        So many unreadable files are skipped, over all folders, and as many that the texts name and are not there.
    workers : int, optional
        Threads; one for each core, at most 16, if left out.

    Returns
    -------
    dict
        Paths of the manifests: ``train``, ``valid``, ``test``.

    Raises
    ------
    InputError
        If the data are not there, not in one of these layouts or not usable, if a line
        cannot be read, if more files than ``max_unreadable`` are not there, if a part has no recording by
        these microphones, if an option is out of range, or if a manifest in the way was
        not written by this function.

    Example
    -------
    >>> import numpy, soundfile
    >>> root = getfixture("tmp_path") / "SLURP"
    >>> (root / "dataset" / "slurp").mkdir(parents=True)
    >>> (root / "audio" / "slurp_real").mkdir(parents=True)
    >>> for split in ("train", "devel", "test"):
    ...     soundfile.write(root / "audio" / "slurp_real" / f"audio-{split}.flac", numpy.zeros(16000), 16000)
    ...     line = {"scenario": "alarm", "action": "set", "sentence": "wake me up"}
    ...     line["recordings"] = [{"file": f"audio-{split}.flac"}]
    ...     _ = (root / "dataset" / "slurp" / f"{split}.jsonl").write_text(json.dumps(line))
    >>> manifests = prepare_slurp(root, root / "save")
    >>> [(row["ID"], row["intent"]) for row in iterate_manifest(manifests["valid"])]
    [('audio-devel', 'alarm_set')]
    """
    rules = AudioRules(sample_rate, resample, max_unreadable, workers)
    check_list(microphones, "microphones")
    if not microphones or set(microphones) - set(MICROPHONES):
        raise InputError(f"microphones is a list of {' and '.join(MICROPHONES)}, or one of them, not {microphones}.")
    root = resolve_folder(data_folder, "data_folder", _REMEDY)
    sources = find_texts(root, synthetic)
    metadata = sources["train"][0].path.with_name("metadata.json")

    corpus = corpus_name(root, "SLURP")
    found = {"slurp_real": set(), **({"slurp_synth": set()} if synthetic else {})}
    parts = {name: _survey(root, name, names, absolute_path(save_folder), corpus) for name, names in found.items()}
    wanted = {"slurp_real": frozenset(microphones), "slurp_synth": frozenset(MICROPHONES)}
    owners, missing = _assign(sources, found, wanted, max_unreadable)
    trained_on = [labels for key, labels in owners.values() if key == "train"]
    labels = {target: sorted({one[place] for one in trained_on}) for place, target in enumerate(TARGETS)}
    save = make_save_folder(save_folder)

    prepared = [prepare_part(part, rules) for part in parts.values()]
    check_readable(list(parts.values()), [summary for summary, _ in prepared], rules)

    audio = cache(lambda: {name: _read_audio(part) for name, part in parts.items()})
    speakers = cache(partial(_read_speakers, metadata))
    options = {
        "microphones": sorted(microphones),
        "texts": {key: [file_digest(source.path) for source in files] for key, files in sources.items()},
        "metadata": file_digest(metadata) if metadata.is_file() else None,
    }
    manifests = {key: save / f"{key}.csv" for key in sources}
    outcomes = {}
    for key, path in manifests.items():
        rows = _Rows(key, sources[key], wanted, owners, missing[key], audio, speakers, labels)
        outcomes[key] = combine(path, COLUMNS, corpus, list(parts.values()), rows.rows, rows.notes, **options)
        if outcomes[key][1]:
            _log_labels(key, outcomes[key][0])
    log_outcome(manifests, outcomes, any(fresh for _, fresh in [*prepared, *outcomes.values()]), corpus)
    return manifests


class _Source(NamedTuple):
    """A jsonl file, and where its recordings are."""

    path: Path
    folder: str
    """``slurp_real`` or ``slurp_synth``."""


class _Recording(NamedTuple):
    """One recording of a sentence."""

    line: int
    file: str
    scenario: str
    action: str
    sentence: str

    @property
    def identifier(self) -> str:
        """The file's name without its ending."""
        return os.path.splitext(self.file)[0]

    @property
    def microphone(self) -> str:
        """``headset`` or ``distant``."""
        return "headset" if self.identifier.endswith("-headset") else "distant"

    @property
    def labels(self) -> tuple[str, str, str]:
        """Scenario, action, intent."""
        return self.scenario, self.action, f"{self.scenario}_{self.action}"


#: The part that a recording belongs to, and its labels.
_Owner = tuple[str, tuple[str, str, str]]


def find_texts(root: Path, synthetic: bool) -> dict[str, list[_Source]]:
    """Find the jsonl files of each part."""
    folders = (root / "dataset" / "slurp", root)
    folder = next(
        (folder for folder in folders if any((folder / f"{stem}.jsonl").is_file() for stem in _TEXT_NAMES["train"])),
        None,
    )
    if folder is None:
        raise InputError(f"'{root}' holds neither dataset/slurp/train.jsonl nor train.jsonl: {_REMEDY}.")
    sources = {}
    for key, stems in _TEXT_NAMES.items():
        present = [path for path in (folder / f"{stem}.jsonl" for stem in stems) if path.is_file()]
        if len(present) > 1:
            raise InputError(f"'{present[0]}' and '{present[1]}' are both there, for the same part: remove one.")
        sources[key] = [_Source(present[0] if present else _require(folder / f"{stems[0]}.jsonl"), "slurp_real")]
    if synthetic:
        sources["train"].append(_Source(_require(folder / "train_synthetic.jsonl"), "slurp_synth"))
    return sources


def _require(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"'{path}' does not exist: download it from SLURP's repository, it belongs beside the others.")
    return path


def _survey(root: Path, name: str, names: set[str], save_folder: Path, corpus: str) -> Part:
    """Survey a folder of audio, and collect the names of its files."""
    folder = next((path for path in (root / "audio" / name, root / name) if path.is_dir()), None)
    if folder is None:
        raise InputError(
            f"'{root}' holds neither audio/{name} nor {name}: unpack {name}.tar.gz there"
            + (", or set synthetic to False." if name == "slurp_synth" else ".")
        )
    tree = AudioTree(folder, normalize_extensions(AUDIO_EXTENSIONS))
    survey = tree.survey(lambda relative, path: names.add(relative))
    if not survey.files:
        raise InputError(f"'{folder}' holds no audio ({survey.ignored} other files): unpack {name}.tar.gz again.")
    return Part(tree, survey, save_folder / f"{name}.csv", corpus, name)


def _iterate_recordings(source: _Source, wanted: Mapping[str, Collection[str]]) -> Iterator[_Recording]:
    """Read a jsonl file, one line in memory at a time."""
    with open(source.path, encoding="utf-8", errors="surrogateescape") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                for recording in _parse_line(text, source.path, number):
                    if recording.microphone in wanted[source.folder]:
                        yield recording


def _parse_line(text: str, path: Path, number: int) -> Iterator[_Recording]:
    remedy = "mend the line or download the file again."
    try:
        line = json.loads(text)
    except ValueError as error:
        raise InputError(f"'{path}', line {number} is no JSON ({error}): {remedy}") from error
    if not isinstance(line, dict):
        raise InputError(f"'{path}', line {number} is no JSON object: {remedy}")
    values = [line.get(key) for key in ("scenario", "action", "sentence")]
    for key, value in zip(("scenario", "action", "sentence"), values, strict=True):
        if not isinstance(value, str) or (not value and key != "sentence"):
            raise InputError(f"'{path}', line {number} lacks the key {key!r} with a text: {remedy}")
    recordings = line.get("recordings")
    if not isinstance(recordings, list):
        raise InputError(f"'{path}', line {number} lacks the key 'recordings' with a list: {remedy}")
    for recording in recordings:
        file = recording.get("file") if isinstance(recording, dict) else None
        if not isinstance(file, str) or not file:
            raise InputError(f"'{path}', line {number}: a recording lacks the key 'file' with a name: {remedy}")
        yield _Recording(number, file, *values)


def _assign(
    sources: Mapping[str, Sequence[_Source]],
    found: Mapping[str, Collection[str]],
    wanted: Mapping[str, Collection[str]],
    most_missing: int,
) -> tuple[dict[str, _Owner], dict[str, int]]:
    """Check all lines against the files that are there, and give each recording to one part, with its labels.

    Also count for each part the recordings that are not there.
    """
    owners: dict[str, _Owner] = {}
    listed_twice: dict[str, str] = {}
    missing = dict.fromkeys(sources, 0)
    for key, files in sources.items():  # training, validation, test: the later one keeps a recording
        for source in files:
            count = absent = 0
            first = ""
            for recording in _iterate_recordings(source, wanted):
                count += 1
                if recording.file not in found[source.folder]:
                    absent += 1
                    first = first or f"{recording.file!r} (line {recording.line})"
                    continue
                mine = (key, recording.labels)
                before = owners.setdefault(recording.identifier, mine)
                if before != mine:
                    listed_twice.setdefault(
                        recording.identifier, f"{recording.file!r} ('{source.path}', line {recording.line})"
                    )
                if before[0] != key:
                    owners[recording.identifier] = mine
            missing[key] += absent
            if sum(missing.values()) > most_missing:
                raise InputError(
                    f"'{source.path}': {absent} of {count} recordings are not in {source.folder}, first {first}: "
                    f"unpack {source.folder}.tar.gz again, or set max_unreadable to at least {sum(missing.values())}."
                )
            if absent:
                logger.warning(
                    "'%s': %d of %d recordings are not in %s, first %s: they are left out",
                    source.path,
                    absent,
                    count,
                    source.folder,
                    first,
                )
            if not count:
                raise InputError(
                    f"'{source.path}' names no recording by {' or '.join(sorted(wanted[source.folder]))}: change "
                    "microphones, or download the file again."
                )
    if listed_twice:
        logger.warning(
            "%d recordings are listed in two parts or with two intents, such as %s: each is kept once",
            len(listed_twice),
            next(iter(listed_twice.values())),
        )
    _keep_takes_together(owners, list(sources))
    return owners, missing


def _keep_takes_together(owners: dict[str, _Owner], parts: Sequence[str]) -> None:
    """Leave out what another microphone recorded for a later part: the same words, spoken once."""
    last: dict[str, int] = {}
    for identifier, (key, _) in owners.items():
        take = identifier.removesuffix("-headset")
        last[take] = max(last.get(take, 0), parts.index(key))
    apart = [one for one, (key, _) in owners.items() if parts.index(key) < last[one.removesuffix("-headset")]]
    for identifier in apart:
        del owners[identifier]
    if apart:
        logger.warning(
            "%d recordings, such as %s, are left out: what another microphone heard of them is in a later part",
            len(apart),
            apart[0],
        )


def _read_speakers(path: Path) -> dict[str, str]:
    """Read which speaker made a recording; without the file nobody is known."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            file: str(recording.get("usrid") or "")
            for entry in entries.values()
            for file, recording in entry.get("recordings", {}).items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not SLURP's metadata ({error}): download it again, or remove it, then no speaker is known."
        ) from error


def _read_audio(part: Part) -> dict[str, tuple[float, str]]:
    """Read the duration and the path of each readable file."""
    return {row["ID"]: (row["duration"], row["wav"]) for row in iterate_manifest(part.manifest)}


class _Rows:
    """Makes the rows of one manifest, each recording once, and counts what is in them."""

    def __init__(
        self,
        key: str,
        sources: Sequence[_Source],
        wanted: Mapping[str, Collection[str]],
        owners: Mapping[str, _Owner],
        missing: int,
        audio: Callable[[], Mapping[str, Mapping[str, tuple[float, str]]]],
        speakers: Callable[[], Mapping[str, str]],
        labels: Mapping[str, Sequence[str]],
    ) -> None:
        self.key, self.sources, self.wanted, self.owners, self.missing = key, sources, wanted, owners, missing
        self.audio, self.speakers, self.labels = audio, speakers, labels
        self._counts: dict[str, Counter[str]] = {target: Counter() for target in TARGETS}
        self._without_speaker = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Make the rows of the recordings that can be read."""
        done: set[str] = set()
        for source in self.sources:
            audio, speakers = self.audio()[source.folder], self.speakers()
            for recording in _iterate_recordings(source, self.wanted):
                identifier = recording.identifier
                if identifier in done or recording.file not in audio:
                    continue
                if self.owners.get(identifier) != (self.key, recording.labels):
                    continue
                done.add(identifier)
                duration, path = audio[recording.file]
                speaker = speakers.get(recording.file, "")
                self._without_speaker += not speaker
                for target, label in zip(TARGETS, recording.labels, strict=True):
                    self._counts[target][label] += 1
                values = (identifier, duration, path, speaker, *recording.labels, recording.sentence)
                yield dict(zip(COLUMNS, values, strict=True))

    def notes(self) -> dict[str, Any]:
        """Say what was counted."""
        unseen = {
            target: {label: counts[label] for label in sorted(counts.keys() - set(self.labels[target]))}
            for target, counts in self._counts.items()
        }
        counted = {"without_speaker": self._without_speaker, "missing": self.missing}
        return {"labels": self.labels, "unseen": unseen, **counted}


def _log_labels(key: str, summary: dict[str, Any]) -> None:
    if key == "train":
        logger.info("labels: %s", ", ".join(f"{len(labels)} of {name}" for name, labels in summary["labels"].items()))
    if summary["without_speaker"]:
        logger.info("%s: %d recordings of unknown speakers", key, summary["without_speaker"])
    for target, counts in summary["unseen"].items():
        if counts:
            logger.warning(
                "%s: of %d recordings the %s is not in the training part: %s",
                key,
                sum(counts.values()),
                target,
                ", ".join(counts),
            )
