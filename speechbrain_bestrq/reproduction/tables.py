"""The paper's tables, beside what the runs of a reproduction came to: every figure is read from a results.json."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import commit
from speechbrain_bestrq.reproduction.pairs import Pairs
from speechbrain_bestrq.reproduction.plan import (
    ALL_LABELS,
    FEW_LABELS,
    FINE_TUNED,
    FROZEN,
    MASKING_SPLIT,
    TASKS,
    probe_name,
    probed_encoders,
    settings_of,
)
from speechbrain_bestrq.reproduction.stages import read_record
from speechbrain_bestrq.results import read_results
from speechbrain_bestrq.writing import write_text

#: What a reproduction leaves in its folder, for the report: its preset and what was given.
PLAN_FILE = "plan.json"
#: Of a cell: no stage of the plan makes it; one does and was not begun; was, and is not done.
NOT_RUN, WAITING, BEGUN, FAILED = MISSING = "not run", "not yet run", "begun, not done", "failed"
#: What the paper pre-trained on.
PRETRAINING_CORPUS = "LibriSpeech"
#: Of its 960 hours of training speech at least so many are there once what is too short is left out.
PRETRAINING_HOURS = 900


@dataclass(frozen=True)
class Column:
    """A score in a table.

    Arguments
    ---------
    title : str
        As the paper calls it.
    task : str
    test_set : str or None
        None for the only one.
    score : str
        In the test set's results; a share of 1.
    corpus : str
        The paper's. The figures compare if the run's is the same.
    lower_is_better : bool
    """

    title: str
    task: str
    test_set: str | None
    score: str
    corpus: str
    lower_is_better: bool = True


_ASR = ("test-clean", "test-other")
RECOGNITION = tuple(
    Column(f"{name} {title}", "asr", name, score, "LibriSpeech")
    for name in _ASR
    for score, title in (("wer", "WER"), ("wer_lm", "WER + LM"), ("cer", "CER"))
)
#: Of Table 1.
FROZEN_COLUMNS = (
    *RECOGNITION,
    Column("speaker EER", "verification", None, "eer", "VoxCeleb"),
    Column("intent accuracy", "intent", "test", "accuracy", "SLURP", False),
    Column("emotion accuracy", "emotion", "test", "accuracy", "IEMOCAP", False),
)

_W2V2, _BESTRQ = "wav2vec2", "bestrq"
_FIGURES = ("test-clean WER", "test-clean WER + LM", "test-other WER", "test-other WER + LM")
_ALL = (*_FIGURES, "speaker EER", "intent accuracy", "emotion accuracy")
#: Table 1 of arXiv 2405.04296, per cent.
PAPER_FROZEN = {
    f"{_W2V2}-100000": dict(zip(_ALL, (16.26, 10.63, 40.17, 30.83, 4.56, 72.8, 60.9), strict=True)),
    f"{_W2V2}-200000": dict(zip(_ALL, (13.89, 9.45, 33.55, 25.49, 3.83, 74.5, 63.0), strict=True)),
    f"{_BESTRQ}-100000": dict(zip(_ALL, (16.79, 10.79, 38.09, 28.31, 3.84, 74.3, 61.3), strict=True)),
    f"{_BESTRQ}-200000": dict(zip(_ALL, (15.11, 9.76, 34.06, 24.74, 3.53, 74.8, 63.8), strict=True)),
}
#: Table 2, per cent.
PAPER_FINE_TUNED = {
    f"{_W2V2}-100000": dict(zip(_FIGURES, (16.42, 10.29, 36.62, 27.25), strict=True)),
    f"{_W2V2}-200000": dict(zip(_FIGURES, (13.47, 8.73, 29.64, 21.92), strict=True)),
    f"{_BESTRQ}-100000": dict(zip(_FIGURES, (14.59, 9.00, 31.49, 23.04), strict=True)),
    f"{_BESTRQ}-200000": dict(zip(_FIGURES, (12.21, 7.78, 26.81, 19.67), strict=True)),
}
#: Table 3: WER of dev-clean by the share of frames that begin a span (8192 codes; of 0.05 and 0.12 the only figure).
PAPER_MASKING = {"0.01": 36.45, "0.05": 25.24, "0.1": 20.68, "0.12": 20.11}
#: After so many updates.
PAPER_MASKING_UPDATES = 87000
MASKING_COLUMN = Column(f"{MASKING_SPLIT} WER", "asr", MASKING_SPLIT, "wer", "LibriSpeech")

METHOD_NAMES = {_BESTRQ: "BEST-RQ", _W2V2: "wav2vec 2.0", "random": "untrained", "fbank": "filter banks"}


@dataclass
class Cell:
    """A figure of ours and the paper's, per cent."""

    values: dict[int, float] = field(default_factory=dict)
    """By seed."""
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)
    """The 95 % interval of each seed's value, over utterances or speakers."""
    paper: float | None = None
    paper_corpus: str = ""
    corpora: set[str] = field(default_factory=set)
    """Of ours, by their true names."""
    comparable: bool = False
    """Whether both encoders heard all of the paper's corpus, and both figures are of one."""
    seeds: int = 1
    """Planned."""
    runs: dict[int, str] = field(default_factory=dict)
    """Folders of the runs, within the reproduction's, by seed."""
    test_set: str | None = None
    """The set of the figures, by its name in the results."""
    missing: str = NOT_RUN
    """Why there is no figure."""

    @property
    def value(self) -> float | None:
        """The mean over the seeds."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where they compare."""
        return self.value - self.paper if self.comparable and self.paper is not None and self.values else None

    @property
    def spread(self) -> str:
        """The interval of one seed, the deviation of several; with their number where some are missing."""
        lacking = f", {len(self.values)} of {self.seeds} seeds" if 0 < len(self.values) < self.seeds else ""
        if len(self.values) > 1:
            return f"± {statistics.stdev(self.values.values()):.2f}{lacking}"
        if not self.intervals:
            return lacking.lstrip(", ")
        ((low, high),) = self.intervals.values()
        return f"({low:.2f} to {high:.2f}){lacking}"


@dataclass
class Table:
    """One of the paper's tables, or one like them."""

    title: str
    columns: list[Column]
    corpora: list[str]
    """Of each column, the corpora of our figures by their true names."""
    rows: dict[str, list[Cell]]
    """By encoder."""
    kind: str = FROZEN
    few_labels: bool = False
    """Then each seed has a draw of them, the same for all encoders."""
    pairs: dict[tuple[str, str, int], float] = field(default_factory=dict)
    """Of two rows that are compared, and the number of a column: half the 95 % interval of their difference, of the
    utterances that both were tested on, where these are known."""

    def row_title(self, row: str) -> str:
        """Name a row: an untrained encoder that is fine-tuned is trained from scratch."""
        return "from scratch" if (row, self.kind) == ("random", FINE_TUNED) else row_name(row)


def write_plan(
    folder: Path, name: str, preset: Mapping[str, Any], corpora: Sequence[str], command: str, marks: Mapping[str, str]
) -> None:
    """Keep what was planned, for the report.

    Arguments
    ---------
    folder : Path
        Of the reproduction.
    name : str
        Of the preset.
    preset : mapping
        What it says.
    corpora : sequence of str
        Which were given.
    command : str
        The command line.
    marks : mapping
        Of each stage, what it is recognised by (:attr:`StageState.marks`).
    """
    plan = {"name": name, "preset": preset, "corpora": list(corpora), "command": command, "commit": commit()}
    plan["marks"] = dict(marks)
    write_text(Path(folder) / PLAN_FILE, json.dumps(plan, indent=2) + "\n")


def read_plan(folder: Path) -> dict[str, Any]:
    """Read what was planned.

    Raises
    ------
    InputError
        If the folder is none of a reproduction.
    """
    path = Path(folder) / PLAN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: give the folder of a reproduction (sb-bestrq reproduce).") from error


class Runs:
    """The finished runs of a reproduction; what another plan left in its folder is none of them.

    Arguments
    ---------
    folder : Path
        Of the reproduction.
    plan : mapping
        As :func:`read_plan` gives it.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self.folder, self.plan, self.preset = Path(folder), plan, plan["preset"]
        self.pairs = Pairs(self.folder)

    def record(self, run: str) -> dict[str, Any]:
        """What is known of a stage that was begun as planned; nothing of another."""
        record = read_record(self.folder / run)
        return record if record.get("mark") == self.plan["marks"].get(run) else {}

    def is_done(self, run: str) -> bool:
        """Whether a stage was done as planned, and so were, before, the stages that it needs."""
        record = self.record(run)
        needed = record.get("needed", {})
        return record.get("made") is not None and all(
            made == self.record(need).get("made") and self.is_done(need) for need, made in needed.items()
        )

    def errors(self, cell: "Cell", seeds: Sequence[int], task: str) -> dict[str, Path]:
        """Where the errors of a cell's runs are, by what each is recognised by, its figure among that."""
        return {
            f"{run}@{self.record(run)['made']}: {cell.values[seed]:.6f}": (
                self.folder / run / TASKS[task].results
            ).parent
            for seed, run in cell.runs.items()
            if seed in seeds
        }

    def why_missing(self, run: str) -> str:
        """Why there is nothing of a stage."""
        if run not in self.plan["marks"]:
            return NOT_RUN
        record = self.record(run)
        if "made" in record:
            return WAITING
        return FAILED if "failed" in record else BEGUN if record else WAITING

    def failures(self) -> list[str]:
        """Of the stages that failed last time, why; what was done before, by another command, did not."""
        records = (self.record(run) for run in self.plan["marks"])
        failed = (one for one in records if "failed" in one and ("made" not in one or "tested_with" in one))
        return [record["failed"] for record in failed]

    def results(self, run: str, task: str) -> dict[str, Any] | None:
        """What a run came to, None if it is not done."""
        path = self.folder / run / TASKS[task].results
        return read_results(path.parent) if self.is_done(run) and path.is_file() else None


def all_tables(runs: Runs) -> dict[str, Table]:
    """The tables of a reproduction, by the names of their files; without those that its preset has nothing for."""
    tables = {
        "table1": frozen_table(runs),
        "table2": fine_tuned_table(runs),
        "table1_few": frozen_table(runs, FEW_LABELS),
        "table2_few": fine_tuned_table(runs, FEW_LABELS),
        "table3": masking_table(runs),
    }
    return {name: table for name, table in tables.items() if table.columns}


def frozen_table(runs: Runs, labels: str = ALL_LABELS) -> Table:
    """Table 1: frozen encoders on four tasks; or the same with few labels, which the paper has not."""
    title = "Table 1: frozen encoders" if labels == ALL_LABELS else "Frozen encoders, few labels"
    return _table(title, runs, FROZEN, labels, PAPER_FROZEN)


def fine_tuned_table(runs: Runs, labels: str = ALL_LABELS) -> Table:
    """Table 2: recognition by fine-tuned encoders, and other tasks where they were run; or with few labels."""
    title = "Table 2: fine-tuned encoders" if labels == ALL_LABELS else "Fine-tuned encoders, few labels"
    return _table(title, runs, FINE_TUNED, labels, PAPER_FINE_TUNED)


def masking_table(runs: Runs) -> Table:
    """Table 3: how much is masked in pre-training."""
    shares = [str(share) for share in (runs.preset.get("masking") or {}).get("mask_prob", PAPER_MASKING)]
    rows = {}
    for share in shares:
        cell = Cell(paper=PAPER_MASKING.get(share), paper_corpus=MASKING_COLUMN.corpus)
        for seed in runs.preset["seeds"][:1]:
            run = f"masking-asr/{share}/{seed}"
            cell.missing = runs.why_missing(run)
            results = runs.results(run, "asr")
            if results is not None and MASKING_SPLIT in results["sets"]:
                _fill(cell, seed, results["sets"][MASKING_SPLIT][MASKING_COLUMN.score])
                _describe(cell, results, MASKING_COLUMN, seed, run)
                cell.comparable = cell.comparable and runs.preset["masking"]["updates"] == PAPER_MASKING_UPDATES
        rows[share] = [cell]
    title = "Table 3: share of frames that begin a masked span"
    return Table(title, [MASKING_COLUMN], [_corpora(row[0] for row in rows.values())], rows)


def _table(title: str, runs: Runs, kind: str, labels: str, paper: Mapping[str, Mapping[str, float]]) -> Table:
    names = probed_encoders(runs.preset, kind)
    if labels == FEW_LABELS:
        paper = {}
    columns = _columns(runs.preset, kind, labels)
    # the paper's rows are shown also when they were not run
    rows = {
        name: [_cell(runs, kind, labels, name, column, paper) for column in columns]
        for name in (*names, *(name for name in paper if name not in names))
    }
    corpora = [_corpora(cells[number] for cells in rows.values()) for number in range(len(columns))]
    return Table(title, columns, corpora, rows, kind, labels == FEW_LABELS, _pairs(runs, columns, rows))


def _pairs(
    runs: Runs, columns: Sequence[Column], rows: Mapping[str, Sequence[Cell]]
) -> dict[tuple[str, str, int], float]:
    """Compare encoders utterance by utterance."""
    found = {}
    for (trained, base), number in product([*against_untrained(rows), *against_wav2vec2(rows)], range(len(columns))):
        cell, other, column = rows[trained][number], rows[base][number], columns[number]
        seeds = [seed for seed in cell.runs if seed in other.runs]
        if not seeds:
            continue
        sides = [runs.errors(one, seeds, column.task) for one in (cell, other)]
        half = runs.pairs.half_width(*sides, cell.test_set or "", column.score)
        if half is not None:
            found[trained, base, number] = half
    return found


def _columns(preset: Mapping[str, Any], kind: str, labels: str) -> list[Column]:
    """The paper's, and those of other tasks that the preset has; few labels say how few."""
    settings = {task: found for task in TASKS if (found := settings_of(preset, labels, task, kind))}
    if labels == ALL_LABELS:
        return [one for one in FROZEN_COLUMNS if kind == FROZEN or one in RECOGNITION or one.task in settings]
    few = {task: TASKS[task].few_words.format(one["options"][TASKS[task].few_option]) for task, one in settings.items()}
    return [replace(one, title=f"{one.title}, {few[one.task]}") for one in FROZEN_COLUMNS if one.task in few]


def _cell(
    runs: Runs,
    kind: str,
    labels: str,
    encoder: str,
    column: Column,
    paper: Mapping[str, Mapping[str, float]],
) -> Cell:
    seeds = runs.preset["seeds"]
    cell = Cell(paper=paper.get(encoder, {}).get(column.title), paper_corpus=column.corpus, seeds=len(seeds))
    for seed in seeds:
        run = probe_name(column.task, kind, labels, encoder, seed)
        results = runs.results(run, column.task)
        if results is None:
            cell.missing = max(cell.missing, runs.why_missing(run), key=MISSING.index)
            continue
        sets = results["sets"]
        cell.test_set = next(iter(sets)) if column.test_set is None else column.test_set
        found = sets.get(cell.test_set, {})
        if column.score not in found:
            continue
        _fill(cell, seed, found[column.score])
        _describe(cell, results, column, seed, run)
    return cell


def _fill(cell: Cell, seed: int, score: Mapping[str, float]) -> None:
    cell.values[seed] = 100 * score["value"]
    cell.intervals[seed] = (100 * score["low"], 100 * score["high"])


def _describe(cell: Cell, results: Mapping[str, Any], column: Column, seed: int, run: str) -> None:
    encoder = results.get("encoder", {})
    heard_all = encoder.get("corpus") == PRETRAINING_CORPUS and (encoder.get("train_hours") or 0) >= PRETRAINING_HOURS
    all_labels = results.get("settings", {}).get(TASKS[column.task].few_option) is None
    # all of its runs have to compare: a folder's speech may be another by the next seed
    comparable = results["corpus"] == column.corpus and heard_all and all_labels
    cell.comparable = comparable and (cell.comparable or not cell.runs)
    cell.corpora |= {results["corpus"]}
    cell.runs[seed] = run


def _corpora(cells: Any) -> str:
    return "; ".join(sorted(set().union(*(cell.corpora for cell in cells))))


def is_trained(row: str) -> bool:
    """Whether a row is of a pre-trained encoder, and not of what it is compared with.

    Example
    -------
    >>> is_trained("bestrq-1000"), is_trained("random")
    (True, False)
    """
    return "-" in row


def against_untrained(rows: Iterable[str]) -> list[tuple[str, str]]:
    """Each pre-trained row, with each one that is not.

    Example
    -------
    >>> against_untrained(["fbank", "random", "bestrq-1000"])
    [('bestrq-1000', 'fbank'), ('bestrq-1000', 'random')]
    """
    rows = list(rows)
    return [(one, other) for one in rows if is_trained(one) for other in rows if not is_trained(other)]


def against_wav2vec2(rows: Iterable[str]) -> list[tuple[str, str]]:
    """Each row of BEST-RQ, with each of wav2vec 2.0: what the paper is about.

    Example
    -------
    >>> against_wav2vec2(["fbank", "wav2vec2-500", "bestrq-1000"])
    [('bestrq-1000', 'wav2vec2-500')]
    """
    rows = list(rows)
    ours, others = ([row for row in rows if row.startswith(f"{method}-")] for method in (_BESTRQ, _W2V2))
    return list(product(ours, others))


def row_name(encoder: str) -> str:
    """Name an encoder as tables do.

    Example
    -------
    >>> row_name("bestrq-1000"), row_name("random"), row_name("0.05")
    ('BEST-RQ, 1,000 updates', 'untrained', '5 %')
    """
    if encoder.replace(".", "", 1).isdecimal():
        return f"{100 * float(encoder):g} %"
    method, _, updates = encoder.partition("-")
    name = METHOD_NAMES.get(method, method)
    return f"{name}, {int(updates):,} updates" if updates else name
