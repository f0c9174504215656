"""What was measured along pre-trainings, as tables and curves."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speechbrain_bestrq.evidence.measures import ALIGNER_HOURS, MEASURES
from speechbrain_bestrq.metrics import difference_over_seeds
from speechbrain_bestrq.reproduction.document import Block, Grid, Heading, Items, Paragraph, Picture, Text, to_markdown
from speechbrain_bestrq.reproduction.tables import METHOD_NAMES
from speechbrain_bestrq.task_encoders import FILTERBANK
from speechbrain_bestrq.writing import replacing, write_text

TITLE = "What the hidden states are good for"
SCORES = [name for name, measure in MEASURES.items() if measure.is_score]
ALIGNED = (
    f"When a character is said is found by an aligner that was trained on up to {ALIGNER_HOURS:g} hours of "
    "transcripts. "
)
DESCRIPTIONS = [name for name, measure in MEASURES.items() if not measure.is_score]
Record = Mapping[str, Any]


def best_state(record: Record, name: str) -> int:
    """The hidden state that is best on the validation set.

    Example
    -------
    >>> best_state({"measures": {"speakers": [[0.2, 0.1], [0.1, 0.3]]}}, "speakers")
    1
    """
    values = [valid for valid, _ in record["measures"][name]]
    return values.index(min(values) if MEASURES[name].lower_is_better else max(values))


def best_score(record: Record, name: str) -> float | None:
    """What the hidden state that is best on the validation set comes to on the test set; None if not measured.

    Example
    -------
    >>> best_score({"measures": {"speakers": [[0.2, 0.1], [0.1, 0.3]]}}, "speakers")
    0.3
    """
    if name not in record["measures"]:
        return None
    return record["measures"][name][best_state(record, name)][1]


def write_evidence(found: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write the report of what was measured.

    Arguments
    ---------
    found : mapping
        As :func:`speechbrain_bestrq.evidence.evidence.gather` gives it.
    folder : Path

    Returns
    -------
    dict
        The files: "markdown", "curves", "csv" and "json".
    """
    files = {
        name: folder / f"evidence.{ending}"
        for name, ending in {"markdown": "md", "curves": "png", "csv": "csv", "json": "json"}.items()
    }
    write_text(files["json"], json.dumps(found, indent=1) + "\n")
    write_text(files["csv"], _csv(found))
    _draw(found, files["curves"])
    write_text(files["markdown"], to_markdown(TITLE, _blocks(found, files["curves"]), folder))
    return files


def _measured(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in record["measures"] for record in found["sources"])]


def row_title(record: Record) -> str:
    """Name a source in a row.

    Example
    -------
    >>> row_title({"run": "BEST-RQ", "updates": 720, "audio_hours": 17.31, "seed": None})
    'BEST-RQ, 17.3 h'
    """
    if record["run"] == FILTERBANK:
        return METHOD_NAMES[FILTERBANK]
    state = "untrained" if record["seed"] is not None else f"{record['audio_hours']:.1f} h"
    return f"{record['run']}, {state}"


def _rows(found: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Sources by row: several untrained ones of a run share theirs."""
    rows: dict[str, list[Record]] = {}
    for record in found["sources"]:
        title = row_title(record)
        if record["seed"] is None and title in rows:  # of nearly as many hours
            title += f" (update {record['updates']:,})"
        rows.setdefault(title, []).append(record)
    return rows


def _shown(values: Sequence[float], name: str) -> str:
    factor, form = (100, ".1f") if MEASURES[name].is_share else (1, ".3g")
    text = f"{factor * statistics.fmean(values):{form}}"
    if len(values) > 1:
        text += f" ({factor * min(values):{form}} to {factor * max(values):{form}})"
    return text


def _blocks(found: Mapping[str, Any], curves: Path) -> list[Block]:
    rows, scores = _rows(found), _measured(found, SCORES)
    corpora = "; ".join(sorted(set(found["corpora"].values())))
    titles = {name: measure.title_with(found["hours"]) for name, measure in MEASURES.items()}
    heads = ("", *(titles[name] for name in scores))
    chances = (f"{titles[name]}: {100 * value:.1f} %" for name, value in found["chances"].items() if name in scores)
    blocks: list[Block] = [
        Paragraph(
            f"Linear probes on frozen hidden states, per cent on the test sets of {corpora}; at most "
            f"{found['hours']:g} hours of a set are used, to train on too, and all of one with trials or folds"
            f"{'; few examples of intents are drawn of all' if found.get('version', 0) > 4 else ''}. "
            "Hidden state and penalty of a probe are chosen on the validation set, whose labels are not among the few. "
            "Hours in rows are of audio heard in pre-training, repeats counted. "
            f"{ALIGNED if 'characters_few' in scores else ''}"
            "In brackets: least and most over untrained encoders of different weights."
        ),
        Heading("By the hidden state that is best on the validation set"),
    ]
    blocks.append(Grid(heads, tuple(_row(*row, scores) for row in rows.items())))
    blocks += [Paragraph("A guess comes to:"), Items(tuple(chances))]
    gains = _gains(found, scores)
    if gains:
        blocks += [
            Heading("What pre-training adds"),
            Paragraph(
                "Points by which the mean of several pre-trainings is ahead of that of untrained encoders of their "
                "architecture, or of another method, positive where it is better; in brackets 95 % intervals over "
                "seeds (Welch's t), which hold for these test sets."
            ),
            Grid(heads, gains),
        ]
    blocks += [Heading("Along the pre-training"), Picture(curves, "Against hours of audio, and of the device.")]
    for name in (*scores, *_measured(found, DESCRIPTIONS)):
        if not MEASURES[name].is_of_states:
            continue
        blocks += [Heading(f"By hidden state: {titles[name]}"), _layers(rows, name)]
    known = found["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    where = (known["device"], f"commit {known['commit'] or 'not known'}", versions)
    return [*blocks, Heading("Where it comes from"), Items(where)]


def _row(title: str, records: Sequence[Record], names: Sequence[str]) -> tuple:
    cells = []
    for name in names:
        values = [value for record in records if (value := best_score(record, name)) is not None]
        cells.append((Text(_shown(values, name) if values else "not run", faint=not values),))
    return ((Text(title),), *cells)


def _gains(found: Mapping[str, Any], names: Sequence[str]) -> tuple:
    """Rows of methods that were pre-trained more than once, one for each update that several runs reached."""
    groups: dict[tuple[str, int | None], list[Record]] = {}
    for record in found["sources"]:
        method, _, number = record["run"].rpartition(" ")
        if number.isdecimal():  # one of several seeds
            untrained = record["seed"] is not None
            groups.setdefault((method, None if untrained else record["updates"]), []).append(record)
    trained = {key: records for key, records in groups.items() if key[1] is not None and len(records) > 1}
    rows = []
    for (method, _), records in trained.items():
        untrained = groups.get((method, None), [])
        if len(untrained) > 1:
            title = f"{_of_group(method, records)}, {len(untrained)} untrained"
            rows.append(((Text(title),), *_leads(records, untrained, names)))
    ours, theirs = (METHOD_NAMES[method] for method in ("bestrq", "wav2vec2"))
    for ((method, _), records), ((other, _), others) in product(trained.items(), trained.items()):
        if (method, other) == (ours, theirs):
            title = f"{_of_group(method, records)}, ahead of {_of_group(other, others)}"
            rows.append(((Text(title),), *_leads(records, others, names)))
    return tuple(rows)


def _of_group(method: str, records: Sequence[Record]) -> str:
    hours = statistics.fmean(record["audio_hours"] for record in records)
    return f"{method}, {hours:.1f} h, {len(records)} pre-trainings"


def _leads(records: Sequence[Record], others: Sequence[Record], names: Sequence[str]) -> list[tuple[Text]]:
    """By how much the mean of some encoders is ahead of that of others, by measure."""
    cells = []
    for name in names:
        sides = [
            [score for record in side if (score := best_score(record, name)) is not None] for side in (records, others)
        ]
        if min(map(len, sides)) < 2:
            cells.append((Text("not run", faint=True),))
            continue
        gain = difference_over_seeds(*(reversed(sides) if MEASURES[name].lower_is_better else sides))
        value, low, high = (f"{100 * one:+.1f}" for one in (gain.value, gain.low, gain.high))
        cells.append((Text(f"{value} ({low} to {high})"),))
    return cells


def _layers(rows: Mapping[str, Sequence[Record]], name: str) -> Grid:
    lines, most = [], 0
    for title, records in rows.items():
        states = list(zip(*(record["measures"][name] for record in records if name in record["measures"]), strict=True))
        most = max(most, len(states))
        lines.append((title, [_shown([test for _, test in several], name) for several in states]))
    cells = tuple(
        ((Text(title),), *((Text(text),) for text in texts + [""] * (most - len(texts)))) for title, texts in lines
    )
    return Grid(("", *map(str, range(most))), cells)


def _draw(found: Mapping[str, Any], path: Path) -> None:
    names = _measured(found, SCORES)
    figure = Figure(figsize=(11, 2.6 * len(names) + 0.6), dpi=100, layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False, sharey="row", sharex="col")
    for row, name in zip(grid, names, strict=True):
        for axes, hours in zip(row, ("audio_hours", "device_hours"), strict=True):
            _draw_measure(axes, found, name, hours)
        better = "lower" if MEASURES[name].lower_is_better else "higher"
        row[0].set_title(
            f"{MEASURES[name].title_with(found['hours'])}, % ({better} is better)", fontsize=10, loc="left"
        )
    grid[-1][0].set_xlabel("audio-hours heard")
    grid[-1][1].set_xlabel("device-hours")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={"Software": None})


def _draw_measure(axes: Axes, found: Mapping[str, Any], name: str, hours: str) -> None:
    runs = list(dict.fromkeys(record["run"] for record in found["sources"]))
    for number, run in enumerate(runs):
        color = f"C{number}"
        records = [one for one in found["sources"] if one["run"] == run and name in one["measures"]]
        values = [(one, 100 * best_score(one, name)) for one in records]
        if run == FILTERBANK:
            for _, value in values:
                axes.axhline(value, color="0.4", linestyle=":", label=METHOD_NAMES[FILTERBANK])
            continue
        untrained = [value for one, value in values if one["seed"] is not None]
        if untrained:
            start = statistics.fmean(untrained)
            axes.axhline(start, color=color, linestyle="--", linewidth=1, label=f"{run}, untrained")
        points = [(one[hours], value) for one, value in values if one["seed"] is None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=run)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _csv(found: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "seed", "updates", "audio_hours", "device_hours", "measure", "state", "valid", "test"])
    for record in found["sources"]:
        facts = [record[key] for key in ("run", "seed", "updates", "audio_hours", "device_hours")]
        for name, states in record["measures"].items():
            for state, (valid, test) in enumerate(states):
                number = state if MEASURES[name].is_of_states else None
                writer.writerow([*facts, name, number, valid, test])  # None leaves a cell empty
    return file.getvalue()
