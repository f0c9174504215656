"""What a downstream run came to: ``results.json``, and the errors of each utterance for comparing two runs."""

import csv
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import device_name, package_versions
from speechbrain_bestrq.metrics import Interval, by_speaker, paired_bootstrap
from speechbrain_bestrq.writing import replacing, write_text

logger = logging.getLogger(__name__)

#: What of a run's records is the same where its weights are, beside the digest of its encoder.
_SAME_WEIGHTS = ("corpus", "seed", "settings", "updates", "best_epoch", "validation")

RESULTS_FILE = "results.json"
#: Of the errors of each utterance of a test set.
ERRORS_FILE = "errors_{}.csv"


def interval(value: Interval) -> dict[str, float]:
    """Give an interval as JSON.

    Example
    -------
    >>> interval(Interval(0.5, 0.4, 0.6))
    {'value': 0.5, 'low': 0.4, 'high': 0.6}
    """
    return {"value": value.value, "low": value.low, "high": value.high}


def machine(device: str | torch.device) -> dict[str, Any]:
    """Say on what a run ran: the device, by its name, threads and versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def write_results(folder: str | os.PathLike, results: Mapping[str, Any]) -> Path:
    """Write ``results.json``, all or nothing.

    Arguments
    ---------
    folder : str or Path
        The run's output folder.
    results : mapping
        Plain JSON values.

    Returns
    -------
    Path
        The file.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = write_results(folder, {"task": "ASR", "sets": {"test-clean": {"wer": {"value": 0.2}}}})
    >>> read_results(folder)["sets"]["test-clean"]["wer"]["value"]
    0.2
    """
    path = Path(folder) / RESULTS_FILE
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a run's ``results.json``.

    Arguments
    ---------
    folder : str or Path
        A downstream run's output folder.

    Returns
    -------
    dict

    Raises
    ------
    InputError
        If it is not there or not what :func:`write_results` wrote.
    """
    path = Path(folder) / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: this is no downstream run, or it has not been evaluated yet.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): run the evaluation again, with --test_only.") from error
    if not isinstance(results, dict) or not isinstance(results.get("sets"), dict):
        raise InputError(f"{path} holds no results: run the evaluation again, with --test_only.")
    return results


def describe_data(corpus: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Say what a head is trained on, for ``results.json``.

    Arguments
    ---------
    corpus : str
        Its name.
    rows : mapping
        Those of training, with their "duration".

    Returns
    -------
    dict

    Example
    -------
    >>> describe_data("SLURP", {"a": {"duration": 36.0}})
    {'trained_corpus': 'SLURP', 'label_hours': 0.01}
    """
    return {"trained_corpus": corpus, "label_hours": sum(float(row["duration"]) for row in rows.values()) / 3600}


def check_tested_corpus(folder: str | os.PathLike, corpus: str) -> None:
    """Refuse to test on another corpus where the results of one are: they would be lost.

    Arguments
    ---------
    folder : str or Path
        The run's output folder.
    corpus : str
        Which is to be tested on.

    Raises
    ------
    InputError
        If there are results of another.
    """
    try:
        earlier = read_results(folder)
    except InputError:
        return
    if earlier.get("corpus") != corpus:
        raise InputError(
            f"{folder} has results of {earlier.get('corpus')}, and this is {corpus}: copy the run's folder, delete "
            "each results.json in the copy, and test there (--output_folder)."
        )


def with_earlier_sets(folder: str | os.PathLike, results: Mapping[str, Any]) -> dict[str, Any]:
    """Add to what a test came to what the same weights were found to do before: other sets, and other scores.

    Arguments
    ---------
    folder : str or Path
        The run's output folder.
    results : mapping
        Of this test.

    Returns
    -------
    dict
        The sets that there were come first; those that are tested later tell by which command. Of a set that was
        tested before, other scores stay while those of both tests are the same.

    Example
    -------
    >>> folder, run = getfixture("tmp_path"), {"seed": 1, "updates": 9, "best_epoch": 2}
    >>> _ = write_results(folder, {**run, "sets": {"test-clean": {"wer": 0.2}}})
    >>> with_earlier_sets(folder, {**run, "sets": {"dev-other": {"wer": 0.3}}})["sets"]
    {'test-clean': {'wer': 0.2}, 'dev-other': {'wer': 0.3}}
    >>> with_earlier_sets(folder, {**run, "updates": 12, "sets": {"dev-other": {"wer": 0.3}}})["sets"]
    {'dev-other': {'wer': 0.3}}
    """
    try:
        earlier = read_results(folder)
    except InputError:  # none, or none that can be read
        return dict(results)
    now = json.loads(json.dumps(results))  # as it will be read: a pair is a list
    same = all(earlier.get(name) == now.get(name) for name in _SAME_WEIGHTS)
    digests = [(one.get("encoder") or {}).get("digest") for one in (earlier, results)]
    before = earlier["sets"] if same and digests[0] == digests[1] else {}
    told = {"test_command": results["test_command"]} if "test_command" in results else {}
    own = {}
    for name, scores in results["sets"].items():
        known = before.get(name, {})
        # other batches round a loss otherwise
        compared = (key for key in known.keys() & scores.keys() if key != "loss" and not key.endswith("seconds"))
        kept = known if all(known[key] == now["sets"][name][key] for key in compared) else {}
        if lost := sorted(known.keys() - scores.keys() - kept.keys() - {"test_command"}):
            logger.warning("%s: the scores were others; what it said of %s is gone.", name, ", ".join(lost))
        own[name] = {**kept, **scores, **told}
    return {**results, "sets": {**before, **own}}


def write_errors(
    folder: str | os.PathLike, name: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> Path:
    """Write the errors of each utterance of a test set, all or nothing.

    Columns of an earlier test, such as those of a language model, stay where the file has the same utterances and, in
    the columns that both have, the same errors.

    Arguments
    ---------
    folder : str or Path
        The run's output folder.
    name : str
        Of the test set.
    rows : iterable of mapping
        One for each utterance, with the columns.
    columns : sequence of str
        "ID", "group" (the speaker, or empty), then pairs such as "wer_errors", "wer_total".

    Returns
    -------
    Path
        The file.
    """
    path = Path(folder) / ERRORS_FILE.format(name)
    rows, columns = _with_earlier_columns(path, list(rows), columns)
    # utterances may have names that are no UTF-8, as their files may
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _with_earlier_columns(
    path: Path, rows: list[Mapping[str, Any]], columns: Sequence[str]
) -> tuple[list[Mapping[str, Any]], list[str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            earlier = list(csv.DictReader(file))
    except OSError:  # there was no test
        return rows, list(columns)
    known = earlier[0].keys() if earlier else ()
    more = [name for name in known if name not in columns]
    if not more:
        return rows, list(columns)
    shared = [name for name in columns if name in known]
    if [[row[name] for name in shared] for row in earlier] != [[str(row[name]) for name in shared] for row in rows]:
        logger.warning("%s: the answers were others; what it said of %s is gone.", path, ", ".join(more))
        return rows, list(columns)
    kept = [{**row, **{name: old[name] for name in more}} for row, old in zip(rows, earlier, strict=True)]
    return kept, [*columns, *more]


def compare_runs(folder: str | os.PathLike, other: str | os.PathLike, name: str, metric: str) -> tuple[Interval, float]:
    """Compare two runs on the same test set by a paired bootstrap over its speakers.

    Over its utterances where a speaker is unknown or there are fewer than five.

    Arguments
    ---------
    folder, other : str or Path
        Output folders of two runs.
    name : str
        Of the test set.
    metric : str
        "wer", "cer"...: of the columns in ``errors_<name>.csv``.

    Returns
    -------
    difference : Interval
        The first's rate minus the other's.
    not_better : float
        As :func:`speechbrain_bestrq.metrics.paired_bootstrap` gives it.

    Raises
    ------
    InputError
        If a file is missing, or the utterances are not the same.
    """
    return compare_runs_over_seeds([folder], [other], name, metric)


def compare_runs_over_seeds(
    folders: Sequence[str | os.PathLike], others: Sequence[str | os.PathLike], name: str, metric: str
) -> tuple[Interval, float]:
    """Compare two systems, each with a run of every seed, on one test set: :func:`compare_runs` of their means.

    The utterances are resampled and the seeds are not: the interval tells what other utterances would give,
    not other seeds.

    Arguments
    ---------
    folders, others : sequence of str or Path
        Output folders of the runs of both.
    name, metric : str
        As for :func:`compare_runs`.

    Returns
    -------
    difference : Interval
        The mean rate of the first's runs minus that of the other's.
    not_better : float
        As :func:`speechbrain_bestrq.metrics.paired_bootstrap` gives it.

    Raises
    ------
    InputError
        If a file is missing, or the utterances are not the same.
    """
    paths = [Path(one) / ERRORS_FILE.format(name) for one in (*folders, *others)]
    read = [_read_errors(path, metric) for path in paths]
    first = read[0]
    for path, found in zip(paths, read, strict=True):
        if found.keys() != first.keys():
            both = f"{paths[0].parent} and {path.parent}"
            raise InputError(f"{both} were not tested on the same utterances of {name}: test both again.")
    ours, theirs = read[: len(folders)], read[len(folders) :]
    errors, other_errors = (
        [sum(found[key][0] for found in side) / len(side) for key in first] for side in (ours, theirs)
    )
    groups = [first[key][2] for key in first]
    totals = [first[key][1] for key in first]
    return paired_bootstrap(errors, other_errors, totals, groups if by_speaker(groups) else None)


def _read_errors(path: Path, metric: str) -> dict[str, tuple[float, float, str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return {
                row["ID"]: (float(row[f"{metric}_errors"]), float(row[f"{metric}_total"]), row["group"])
                for row in csv.DictReader(file)
            }
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: test the run on that set, with --test_only.") from error
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} has no errors of {metric} ({error}): test the run again.") from error
