"""Manifests: CSV files in SpeechBrain's form, with a summary beside each that says what it was made of."""

import csv
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from speechbrain_bestrq.digests import file_digest
from speechbrain_bestrq.errors import InputError, name_file

logger = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("ID", "duration", "wav")

# Raised when the same recipe gives other manifests than before: then nothing old is taken for prepared.
FORMAT = 2


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a new file that takes the place of ``path`` only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, for two jobs may prepare the same folder at once.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # surrogateescape: file names on Linux need not be UTF-8, and come back as they were.
        with open(temporary, "x", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(
    rows: Iterable[dict[str, Any]], path: str | os.PathLike, columns: Sequence[str] = REQUIRED_COLUMNS
) -> int:
    """Write rows to a CSV manifest, one at a time, all or nothing.

    The rows go to a temporary file beside ``path``, which takes its place at the
    end: whoever reads ``path`` sees the old manifest or the new one, never a part.

    Arguments
    ---------
    rows : iterable of dict
        One for each utterance, with exactly the keys ``columns``. It is read
        lazily: memory does not grow with its length.
    path : path
        The manifest; its folder is made if need be.
    columns : sequence of str
        Names of the columns, in order.

    Returns
    -------
    int
        Number of rows written.

    Raises
    ------
    ValueError
        If the keys of a row are not the columns.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> write_manifest([{"ID": "one", "duration": 1.5, "wav": "/audio/one.flac"}], path)
    1
    >>> print(path.read_text())
    ID,duration,wav
    one,1.5,/audio/one.flac
    <BLANKLINE>
    """
    count = 0
    with _replacing(Path(path)) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            if row.keys() != set(columns):
                raise ValueError(f"a row has the keys {sorted(row)}, the manifest has the columns {sorted(columns)}.")
            writer.writerow([row[column] for column in columns])
            count += 1
    return count


def iterate_manifest(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Read a manifest row by row.

    Arguments
    ---------
    path : path
        A CSV file with at least the columns ID, duration and wav.

    Yields
    ------
    dict
        The columns of one row, as text; ``duration`` is a float, in seconds.

    Raises
    ------
    InputError
        If the file is missing or is no such manifest, with the line at fault.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> _ = write_manifest([{"ID": "one", "duration": 1.5, "wav": "/audio/one.flac"}], path)
    >>> next(iterate_manifest(path))
    {'ID': 'one', 'duration': 1.5, 'wav': '/audio/one.flac'}
    """
    if not Path(path).is_file():
        raise InputError(f"manifest '{path}' does not exist: prepare the corpus first, or give the right path.")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        try:
            columns = next(reader, [])
            missing = [column for column in REQUIRED_COLUMNS if column not in columns]
            if missing:
                raise InputError(
                    f"manifest '{path}' lacks the column(s) {', '.join(missing)}: its first line has to name "
                    "ID,duration,wav and any others."
                )
            for values in reader:
                if not values:  # an empty line
                    continue
                line = reader.line_num
                if len(values) != len(columns):
                    raise InputError(
                        f"manifest '{path}', line {line}: {len(values)} fields, but the first line names "
                        f"{len(columns)}: mend the line or prepare the corpus again."
                    )
                row: dict[str, Any] = dict(zip(columns, values, strict=True))
                row["duration"] = _parse_duration(row["duration"], path, line)
                yield row
        except csv.Error as error:
            raise InputError(
                f"manifest '{path}', line {reader.line_num}: {error}: mend the line or prepare the corpus again."
            ) from error


def _parse_duration(text: str, path: str | os.PathLike, line: int) -> float:
    try:
        duration = float(text)
    except ValueError:
        duration = math.nan
    if not 0.0 < duration < math.inf:
        raise InputError(f"manifest '{path}', line {line}: duration {text!r} is not a number of seconds above 0.")
    return duration


def read_manifest(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Read a whole manifest, for SpeechBrain's ``DynamicItemDataset``.

    Nothing is replaced in it: a ``$`` in a file name is a ``$``.

    Arguments
    ---------
    path : path
        A CSV file with at least the columns ID, duration and wav.

    Returns
    -------
    dict
        For each ID, in the order of the file, the other columns of its row, as
        text; ``duration`` is a float, in seconds.

    Raises
    ------
    InputError
        If the file is missing, lacks a column, holds no rows, an ID twice, a line
        with too few or too many fields, or a duration that is no number above 0.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> _ = write_manifest([{"ID": "one", "duration": 1.5, "wav": "/audio/$1.flac"}], path)
    >>> read_manifest(path)
    {'one': {'duration': 1.5, 'wav': '/audio/$1.flac'}}
    """
    data: dict[str, dict[str, Any]] = {}
    for row in iterate_manifest(path):
        identifier = row.pop("ID")
        if identifier in data:
            raise InputError(f"manifest '{path}' has the ID {identifier!r} twice: IDs have to be unique.")
        data[identifier] = row
    if not data:
        raise InputError(f"manifest '{path}' holds no utterances: prepare the corpus again.")
    return data


def corpus_name(data_folder: str | os.PathLike, default: str) -> str:
    """Say what a folder's recordings are.

    A folder in the layout of a corpus may hold other recordings. It says so in a
    file ``CORPUS.json``, an object with the key ``name`` or ``recordings``.

    Arguments
    ---------
    data_folder : path
        Folder of the corpus.
    default : str
        The name if there is no such file or neither key.

    Returns
    -------
    str
        The name, for logs and model cards.

    Raises
    ------
    InputError
        If ``CORPUS.json`` cannot be read or is no JSON object.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> corpus_name(folder, "LibriSpeech")
    'LibriSpeech'
    >>> _ = (folder / "CORPUS.json").write_text('{"layout": "LibriSpeech", "recordings": "speechocean762"}')
    >>> corpus_name(folder, "LibriSpeech")
    'speechocean762'
    """
    path = Path(data_folder).expanduser() / "CORPUS.json"
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read as JSON ({error}): mend it or remove it.") from error
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is no JSON object with a key 'name' or 'recordings': mend it or remove it.")
    return str(content.get("name") or content.get("recordings") or default)


def summary_path(path: str | os.PathLike) -> Path:
    """Name the summary of a manifest: ``train.csv`` has ``train.csv.json``."""
    path = Path(path)
    return path.with_name(path.name + ".json")


def read_summary(path: str | os.PathLike) -> dict[str, Any]:
    """Read what was counted when a manifest was prepared.

    Arguments
    ---------
    path : path
        The manifest; its summary lies beside it, with ``.json`` after its name.

    Returns
    -------
    dict
        Among others ``corpus`` (a name), ``utterances``, ``hours`` and ``recipe``.

    Raises
    ------
    InputError
        If there is no summary of a finished preparation.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> rows = [{"ID": "one", "duration": 1800.0, "wav": "/audio/one.flac"}]
    >>> _ = build_manifest(path, ("ID", "duration", "wav"), "My corpus", {"seed": 1}, lambda notes: rows)
    >>> summary = read_summary(path)
    >>> summary["corpus"], summary["utterances"], summary["hours"]
    ('My corpus', 1, 0.5)
    """
    summary = _load_summary(path)
    if summary is None or not summary["complete"]:
        raise InputError(f"manifest '{path}' has no summary of a finished preparation: prepare the corpus (again).")
    return summary


def count_unreadable(path: str | os.PathLike, name: str) -> int:
    """Tell how many files a test set may lack because they were not there or not readable; say so in the log.

    Arguments
    ---------
    path : path
        Its manifest.
    name : str
        Of the set, for the log.

    Returns
    -------
    int
        Of all the audio that its rows were chosen from.

    Example
    -------
    >>> path = getfixture("tmp_path") / "test.csv"
    >>> rows = lambda notes: notes.update(unreadable=2) or []
    >>> _ = build_manifest(path, ("ID", "duration", "wav"), "My corpus", {}, rows)
    >>> count_unreadable(path, "test")
    2
    """
    summary = read_summary(path)
    count = summary.get("unreadable", 0) + summary.get("missing", 0)
    if count:
        logger.warning(
            "%d audio files were not there or could not be read, and '%s' may lack some of them: a score of fewer "
            "utterances does not compare with one of all. A new output_folder looks at them again",
            count,
            name,
        )
    return count


def forget_summary(path: str | os.PathLike) -> None:
    """Have a manifest that this preparation wrote made again at the next.

    Arguments
    ---------
    path : path
        The manifest.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> recipe = ("ID", "duration", "wav"), "My corpus", {"seed": 1}, lambda notes: []
    >>> _ = build_manifest(path, *recipe)
    >>> forget_summary(path)
    >>> build_manifest(path, *recipe)[1]
    True
    """
    summary = _load_summary(path)
    if summary is not None:
        _write_summary(path, {**summary, "complete": False})


def _load_summary(path: str | os.PathLike) -> dict[str, Any] | None:
    """Read the summary of a manifest; None if there is none."""
    try:
        summary = json.loads(summary_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"'{summary_path(path)}' cannot be read ({error}): remove it and prepare again.") from error
    if not isinstance(summary, dict) or "complete" not in summary:
        raise InputError(
            f"'{summary_path(path)}' is in the way, it is not the summary of a manifest: rename or remove it, or give "
            "another save_folder."
        )
    return summary


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    with _replacing(summary_path(path)) as file:
        json.dump(summary, file, indent=1)
        file.write("\n")


def build_manifest(
    path: Path,
    columns: Sequence[str],
    corpus: str,
    recipe: dict[str, Any],
    rows: Callable[[dict[str, Any]], Iterable[dict[str, Any]]],
) -> tuple[dict[str, Any], bool]:
    """Write a manifest and its summary, unless that is already done.

    The summary is marked as incomplete before the first row is made and written
    whole after the manifest is in place: a preparation that was interrupted, at
    whatever point, is done again.

    Arguments
    ---------
    path : Path
        The manifest.
    columns : sequence of str
        Its columns.
    corpus : str
        What the recordings are.
    recipe : dict
        Whatever the manifest is a function of, JSON values only. The manifest is
        left alone if it was made by this same recipe.
    rows : callable
        Makes the rows. Called only if need be, with a dict: what stands in there
        after the last row goes into the summary.

    Returns
    -------
    summary : dict
        As :func:`read_summary`; a table without durations, such as a list of trials,
        has ``rows`` (a count) in place of ``utterances`` and ``hours``.
    fresh : bool
        Whether anything had to be done.

    Raises
    ------
    InputError
        If there is a manifest that was not made by this function, or that was
        changed since: it is not overwritten.

    Example
    -------
    >>> path = getfixture("tmp_path") / "train.csv"
    >>> rows = [{"ID": "one", "duration": 1800.0, "wav": "/audio/one.flac"}]
    >>> summary, fresh = build_manifest(path, ("ID", "duration", "wav"), "My corpus", {"seed": 1}, lambda notes: rows)
    >>> summary, again = build_manifest(path, ("ID", "duration", "wav"), "My corpus", {"seed": 1}, lambda notes: rows)
    >>> fresh, again
    (True, False)
    """
    # to JSON and back, for that is how an old recipe is read
    recipe = json.loads(json.dumps({"format": FORMAT, "corpus": corpus, "columns": list(columns), **recipe}))
    previous = _load_summary(path)
    if path.exists():
        if previous is None:
            raise InputError(
                f"'{path}' is in the way, it was not written by this preparation: rename or remove it, or give "
                "another save_folder."
            )
        if previous["complete"]:
            if file_digest(path) != previous["digest"]:
                raise InputError(
                    f"'{path}' was changed since it was prepared: rename it to keep the changes, or remove it to "
                    "prepare it again."
                )
            if previous["recipe"] == recipe:
                return previous, False

    _write_summary(path, {"complete": False, "corpus": corpus, "recipe": recipe})
    seconds = 0.0

    def counted(made: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal seconds
        for row in made:
            seconds += row.get("duration", 0.0)
            yield row

    notes: dict[str, Any] = {}
    count = write_manifest(counted(rows(notes)), path, columns)
    counts = {"utterances": count, "hours": seconds / 3600.0} if "duration" in columns else {"rows": count}
    summary = {
        "complete": True,
        "corpus": corpus,
        **counts,
        **notes,
        "digest": file_digest(path),
        "recipe": recipe,
    }
    _write_summary(path, summary)
    return summary, True
