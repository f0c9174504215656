"""Whether pre-training pays: how far each encoder of a reproduction is ahead of those that were not pre-trained."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from speechbrain_bestrq.metrics import difference_over_seeds, paired_difference_over_seeds
from speechbrain_bestrq.reproduction.document import Block, Grid, Items, Paragraph, Text
from speechbrain_bestrq.reproduction.plan import ALL_LABELS, FEW_LABELS, FINE_TUNED, FROZEN, UNTRAINED
from speechbrain_bestrq.reproduction.tables import (
    Cell,
    Runs,
    Table,
    against_untrained,
    against_wav2vec2,
    is_trained,
    row_name,
)


@dataclass(frozen=True)
class Lead:
    """By how much an encoder is ahead of another in a column."""

    value: float
    """Its mean over the seeds that both have."""
    other: float
    """The other's."""
    points: float
    """Positive where it is better."""
    doubt: float
    """Half the width of the 95 % interval: of the utterances and, where there are several, of the seeds."""
    paired: bool
    """Whether the utterances' part is of the difference, on the same ones; else of two scores by themselves."""
    seeds: int
    """That both have."""
    planned: int
    """How many there are to be."""


def lead(
    cell: Cell, base: Cell, lower_is_better: bool, shared_draws: bool = False, of_utterances: float | None = None
) -> Lead | None:
    """Compare two cells of a column over the seeds that both have.

    Arguments
    ---------
    cell, base : Cell
    lower_is_better : bool
        As the column says.
    shared_draws : bool
        Whether both had the same labels to learn from with a seed, and others with another.
    of_utterances : float, optional
        Half the 95 % interval of their difference by the chance of the utterances, where it is known.

    Returns
    -------
    Lead or None
        None if they have no seed in common.

    Example
    -------
    >>> error, other = Cell({1: 20.0}, {1: (19.0, 21.0)}), Cell({1: 25.0, 2: 9.0}, {1: (24.0, 26.0)})
    >>> found = lead(error, other, lower_is_better=True)
    >>> f"{found.points:+.1f} ± {found.doubt:.1f}, {found.seeds} seed"
    '+5.0 ± 1.4, 1 seed'
    """
    cell, base = _of_common_seeds(cell, base)
    if cell.value is None or base.value is None:
        return None
    points = (base.value - cell.value) * (1 if lower_is_better else -1)
    doubt = _of_utterances(cell, base) if of_utterances is None else of_utterances
    if len(cell.values) > 1:
        difference = paired_difference_over_seeds if shared_draws else difference_over_seeds
        of_seeds = difference(list(cell.values.values()), list(base.values.values()))
        doubt = (doubt**2 + ((of_seeds.high - of_seeds.low) / 2) ** 2) ** 0.5
    return Lead(cell.value, base.value, points, doubt, of_utterances is not None, len(cell.values), cell.seeds)


def lead_in(table: Table, number: int, encoder: str, base: str) -> Lead | None:
    """Compare two rows of a table in one of its columns; see :func:`lead`.

    Arguments
    ---------
    table : Table
    number : int
        Of the column.
    encoder, base : str
        Rows: a pre-trained one, and what it is compared with.

    Returns
    -------
    Lead or None
    """
    cells = table.rows[encoder][number], table.rows[base][number]
    pair = table.pairs.get((encoder, base, number))
    return lead(*cells, table.columns[number].lower_is_better, table.few_labels, pair)


def judge(table: Table, against: str = "random", each_seed_pretrained: bool = True) -> list[str]:
    """Say of each score and each pre-trained row whether it beats the untrained encoder, or training from scratch.

    Arguments
    ---------
    table : Table
    against : str
        The row to compare with.
    each_seed_pretrained : bool
        Whether each seed has a pre-training of its own: one for all says nothing of another.

    Returns
    -------
    list of str
        Sentences; none of scores that were not run for both.
    """
    if against not in table.rows:
        return []
    other = "the untrained encoder" if table.kind == FROZEN else "training from scratch"
    sentences = []
    for number, column in enumerate(table.columns):
        for encoder in filter(is_trained, table.rows):
            found = lead_in(table, number, encoder, against)
            if found is None:
                continue
            if found.points <= 0:
                verdict = f"does not beat {other} ({found.value:.2f} against {found.other:.2f} %)"
            elif found.points <= found.doubt:
                verdict = f"is ahead of {other} by {found.points:.2f} points, which may be chance"
            elif found.seeds < 2:  # the interval knows nothing of other seeds
                verdict = f"is ahead of {other} by {found.points:.2f} points with the one seed that was tried"
            elif not each_seed_pretrained:
                verdict = f"beats {other} by {found.points:.2f} points with the one pre-training that was tried"
            else:
                verdict = f"beats {other} by {found.points:.2f} points"
            sentences.append(f"{column.title}: {row_name(encoder)} {verdict}.")
    return sentences


def _of_common_seeds(*cells: Cell) -> list[Cell]:
    """The cells with the seeds that all have."""
    seeds = set.intersection(*(set(cell.values) for cell in cells))
    return [
        replace(
            cell,
            values={seed: cell.values[seed] for seed in sorted(seeds)},
            intervals={seed: cell.intervals[seed] for seed in sorted(seeds & cell.intervals.keys())},
        )
        for cell in cells
    ]


def _of_utterances(cell: Cell, base: Cell) -> float:
    """Half the width of the 95 % interval of the difference of two scores of other utterances.

    They are the same for all seeds, so their part does not shrink with the number of these: it is a seed's, in the
    mean.
    """
    halves = [[(high - low) / 2 for low, high in one.intervals.values()] for one in (cell, base)]
    return sum(statistics.fmean(half**2 for half in own) for own in halves if own) ** 0.5


def judgements(found: Runs, tables: Mapping[str, Table]) -> list[Block]:
    """Say in a report whether pre-training pays, and how BEST-RQ stands beside wav2vec 2.0.

    Arguments
    ---------
    found : Runs
        Of the reproduction.
    tables : mapping
        Its tables, by the names of their files; "table1" needs no title.

    Returns
    -------
    list of Block
        Sentences and points for each table that has something to compare.
    """
    blocks, beside = _untrained(found, tables), _beside_wav2vec2(found, tables)
    if "random" not in found.preset["baselines"]:
        opening = Paragraph("Not asked: this preset has no untrained encoder.")
    elif not blocks:
        opening = Paragraph("Not known yet: it takes the untrained encoder and a pre-trained one on the same task.")
    else:
        words = "The untrained encoder is that of BEST-RQ with random weights, others for each seed"
        words += "; fine-tuned it is trained from scratch" if found.preset.get("fine_tune_untrained") else ""
        words += f", with {own} instead." if (own := _own_options(found.preset, tables.values())) else "."
        opening = Paragraph(words)
    return [opening, *blocks, *beside, *([Paragraph(_legend(tables))] if blocks or beside else [])]


def _untrained(found: Runs, tables: Mapping[str, Table]) -> list[Block]:
    """The pre-trained encoders, ahead of what was not trained."""
    blocks: list[Block] = []
    for name, table in tables.items():
        sentences = judge(table, each_seed_pretrained=found.preset.get("pretrain_each_seed", False))
        said = [Items(tuple(sentences))] if sentences else []
        blocks += _under_title(name, table, said, _leads(table, against_untrained(table.rows)))
    return blocks


def _beside_wav2vec2(found: Runs, tables: Mapping[str, Table]) -> list[Block]:
    """BEST-RQ, ahead of wav2vec 2.0."""
    blocks: list[Block] = []
    for name, table in tables.items():
        blocks += _under_title(name, table, [], _leads(table, against_wav2vec2(table.rows)))
    if not blocks:
        return []
    words = "BEST-RQ beside wav2vec 2.0; what each cost stands below."
    if not found.preset.get("pretrain_each_seed"):
        words += " There is one pre-training of each: of others this says nothing."
    return [Paragraph(words), *blocks]


def _under_title(name: str, table: Table, said: list[Block], leads: Grid) -> list[Block]:
    """What there is of a table; the first needs no title."""
    title: list[Block] = [Paragraph(f"{table.title}:")] if leads.rows and name != "table1" else []
    return [*title, *said, *([leads] if leads.rows else [])]


def _own_options(preset: Mapping[str, Any], tables: Iterable[Table]) -> str:
    """What training from scratch has of its own, by task, of those that were run."""
    told = []
    run = {
        (FEW_LABELS if table.few_labels else ALL_LABELS, task)
        for table in tables
        if table.kind == FINE_TUNED
        for task in _tasks_run(table, "random")
    }
    for labels in (ALL_LABELS, FEW_LABELS):
        for task, kinds in (preset.get(labels) or {}).items():
            own = (kinds.get(FINE_TUNED) or {}).get(UNTRAINED)
            if own and (labels, task) in run:
                where = f"{task}, few labels" if labels == FEW_LABELS else task
                told.append(f"{', '.join(f'{key} {value}' for key, value in own.items())} ({where})")
    return "; ".join(told)


def _tasks_run(table: Table, encoder: str | None = None) -> set[str]:
    """The tasks of which a table has figures, of an encoder or of any."""
    rows = [cells for name, cells in table.rows.items() if encoder in (None, name)]
    return {column.task for number, column in enumerate(table.columns) if any(cells[number].runs for cells in rows)}


def _legend(tables: Mapping[str, Table]) -> str:
    """What the tables of points say."""
    legend = "In these tables: points by which an encoder is ahead, positive where it is better, ± half of the 95 % "
    legend += "interval, of the utterances, which both were tested on, and of the seeds; of a single seed, of the "
    legend += "utterances alone. Where there is a *, the errors of each utterance are not at hand: the interval is as "
    legend += "if each had been tested on utterances of its own, which is mostly too wide."
    if any(table.few_labels and _tasks_run(table) for table in tables.values()):
        legend += " With few labels the seeds' part is that of their differences: a seed has one draw of labels, the "
        legend += "same for all encoders."
    return legend


def _leads(table: Table, pairs: Iterable[tuple[str, str]]) -> Grid:
    """How far the first row of each pair is ahead of the second."""
    found: dict[str, list[Lead | None]] = {}
    for encoder, base in pairs:
        leads = [lead_in(table, number, encoder, base) for number in range(len(table.columns))]
        found[f"{row_name(encoder)}, ahead of {table.row_title(base)}"] = leads
    rows = {name: leads for name, leads in found.items() if any(leads)}
    kept = [number for number in range(len(table.columns)) if any(leads[number] for leads in rows.values())]
    heads = tuple(table.columns[number].title for number in kept)
    cells = {name: [_lead_text(leads[number]) for number in kept] for name, leads in rows.items()}
    return Grid(("", *heads), tuple(((Text(name),), *((Text(one),) for one in row)) for name, row in cells.items()))


def _lead_text(one: Lead | None) -> str:
    if one is None:
        return ""
    lacking = f", {one.seeds} of {one.planned} seeds" if one.seeds < one.planned else ""
    return f"{one.points:+.2f} ± {one.doubt:.2f}{'' if one.paired else '*'}{lacking}"
