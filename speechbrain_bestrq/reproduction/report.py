"""The report of a reproduction: report.md, report.html and the tables as CSV, out of what its runs left."""

import csv
import io
import os
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.report import summarise
from speechbrain_bestrq.reproduction.curves import draw
from speechbrain_bestrq.reproduction.document import (
    Block,
    Code,
    Grid,
    Heading,
    Items,
    Paragraph,
    Picture,
    Text,
    to_html,
    to_markdown,
    to_text,
)
from speechbrain_bestrq.reproduction.leads import judgements
from speechbrain_bestrq.reproduction.plan import (
    CODEBOOK_CHECK,
    CODEBOOK_PICTURE,
    CORPORA,
    TASKS,
    pretraining_names,
    updates_of,
)
from speechbrain_bestrq.reproduction.tables import (
    METHOD_NAMES,
    NOT_RUN,
    Cell,
    Runs,
    Table,
    all_tables,
    read_plan,
    row_name,
)
from speechbrain_bestrq.run_log import LOG_FILE, RunLog, curve, read_run
from speechbrain_bestrq.writing import write_text

TITLE = "BEST-RQ and wav2vec 2.0: the tables of arXiv 2405.04296, and ours"
#: Heading of the last part, which is long.
PROVENANCE = "Where it comes from"
#: Seconds for 500 updates of wav2vec 2.0 over those of BEST-RQ, in the logs of the paper.
PAPER_RATIO = 2.4
#: What the paper's pre-trainings came to (its Table 1): parameters, and hours of a V100 by updates.
PAPER_COSTS = {"wav2vec2": ("90.9 M", {100000: 130, 200000: 262}), "bestrq": ("83.0 M", {100000: 54, 200000: 109})}
#: What is left out in a terminal: pictures, and what is long.
_PAGE_ONLY = ("Curves", "Weights of the layers", PROVENANCE)


def write_reproduction(folder: str | os.PathLike) -> dict[str, Path]:
    """Write the report of a reproduction, finished or not.

    Arguments
    ---------
    folder : str or Path
        Of the reproduction.

    Returns
    -------
    dict
        The files: "markdown", "html", and a CSV for each table.

    Raises
    ------
    InputError
        If the folder is none of a reproduction.
    """
    folder = Path(folder)
    found = Runs(folder, read_plan(folder))
    tables = all_tables(found)
    runs = _pretrainings(found)
    files = {"markdown": folder / "report.md", "html": folder / "report.html"}
    blocks = _blocks(found, tables, runs)
    found.pairs.write(folder)
    write_text(files["markdown"], to_markdown(TITLE, blocks, folder))
    write_text(files["html"], to_html(TITLE, blocks))
    for name, table in tables.items():
        files[name] = folder / f"{name}.csv"
        write_text(files[name], _csv(table))
    for name in {"table1_few", "table2_few"} - tables.keys():  # of a preset that had few labels before
        (folder / f"{name}.csv").unlink(missing_ok=True)
    return files


def reproduction_text(folder: str | os.PathLike, width: int) -> str:
    """Tell in a terminal what the report of a reproduction says, but for pictures, layers and commands.

    Arguments
    ---------
    folder : str or Path
        Of the reproduction.
    width : int
        Characters of a line.

    Returns
    -------
    str
    """
    found = Runs(Path(folder), read_plan(Path(folder)))
    kept, shown = [], True
    for block in _blocks(found, all_tables(found), _pretrainings(found)):
        if isinstance(block, Heading):
            shown = block.words not in _PAGE_ONLY
        if shown and not isinstance(block, Picture):
            kept.append(block)
    return to_text(TITLE, kept, width)


def _pretrainings(found: Runs) -> dict[str, RunLog]:
    """The logs of the pre-trainings that have begun as planned, by what the report calls them."""
    runs = {}
    for name, (method, seed) in pretraining_names(found.preset).items():
        if not found.record(name):
            continue
        try:
            runs[_title(method, seed)] = read_run(found.folder / name)
        except InputError:
            continue
    return runs


def _masking_runs(found: Runs) -> dict[str, RunLog]:
    """Likewise of Table 3."""
    runs = {}
    for share in (found.preset.get("masking") or {}).get("mask_prob", ()):
        name = f"masking/{share}"
        if not found.record(name):
            continue
        try:
            runs[f"{METHOD_NAMES['bestrq']}, {row_name(str(share))} begin a span"] = read_run(found.folder / name)
        except InputError:
            continue
    return runs


def _title(method: str, seed: int | None) -> str:
    name = METHOD_NAMES.get(method, method)
    return name if seed is None else f"{name}, seed {seed}"


def _blocks(found: Runs, tables: dict[str, Table], runs: dict[str, RunLog]) -> list[Block]:
    folder, plan, preset = found.folder, found.plan, found.preset
    blocks: list[Block] = [
        Paragraph(
            f"Preset {plan['name']}: pre-trained for {_counts(preset)}, seeds of the tasks: "
            f"{', '.join(map(str, preset['seeds']))}. Figures are per cent. Ours stand first, with the deviation over "
            "the seeds or the 95 % interval of one; then the paper's; then the difference, where both pre-trained on "
            "LibriSpeech and both are of one corpus, with all its labels. What was not run says so."
        ),
        *_failures(found),
        *_corpora(plan, tables, runs),
        Heading("Does pre-training pay?"),
        *judgements(found, tables),
    ]
    for table in tables.values():
        grid = _grid(table)
        blocks += [Heading(table.title), grid] if len(grid.heads) > 1 else []
    every = {**runs, **_masking_runs(found)}
    blocks += [Heading("What it cost"), *_cost(found, every), Heading("Curves"), *_curves(folder, runs)]
    blocks += [Heading("Use of the codes"), *_codes(found, runs)]
    blocks += [Heading("Weights of the layers"), *_layers(found)]
    blocks += [Heading("Use an encoder"), *_usage(folder, preset)]
    return [*blocks, Heading(PROVENANCE), *_provenance(found, every)]


def _counts(preset: Mapping[str, Any]) -> str:
    """After how many updates encoders are compared."""
    told = {
        METHOD_NAMES.get(method, method): " and ".join(f"{number:,}" for number in updates_of(preset, method))
        for method in preset["pretraining"]
    }
    if len(set(told.values())) == 1:
        return f"{next(iter(told.values()))} updates"
    return ", ".join(f"{updates} updates ({name})" for name, updates in told.items())


def _failures(found: Runs) -> list[Block]:
    failures = found.failures()
    blocks: list[Block] = [Heading("What failed")] if failures else []
    for failure in failures:
        first, _, rest = failure.partition("\n")
        blocks += [Paragraph(first), *([Code(textwrap.dedent(rest))] if rest else [])]
    return blocks


def _corpora(plan: Mapping[str, Any], tables: Mapping[str, Table], runs: Mapping[str, RunLog]) -> list[Block]:
    official = dict(zip(CORPORA, ("LibriSpeech", "VoxCeleb", "IEMOCAP", "SLURP"), strict=True))
    items = []
    for task, settings in TASKS.items():
        corpus = settings.corpus
        ours = _corpora_of(task, tables)
        if not ours:
            why = "not run" if corpus in plan["corpora"] else "not run: no corpus was given"
            items.append(f"in the place of {official[corpus]}: {why}")
        elif ours != official[corpus]:
            items.append(f"in the place of {official[corpus]}: {ours}. Its figures do not compare with the paper's.")
        else:
            items.append(official[corpus])
    heard: dict[str, list[str]] = {}
    for name, log in runs.items():
        hours = log.run.get("train_hours")
        heard.setdefault(f"{log.run.get('corpus')}" + (f", {hours:.1f} h" if hours else ""), []).append(name)
    for speech, names in heard.items():
        items.append(f"{'; '.join(names)} {'was' if len(names) == 1 else 'were'} pre-trained on: {speech}")
    return [Heading("Speech"), Items(tuple(items))]


def _corpora_of(task: str, tables: Mapping[str, Table]) -> str:
    """What a task was measured on, by true names."""
    names = {
        name
        for table in tables.values()
        for cells in table.rows.values()
        for column, cell in zip(table.columns, cells, strict=True)
        if column.task == task
        for name in cell.corpora
    }
    return "; ".join(sorted(names))


def _grid(table: Table) -> Grid:
    """The columns that have a figure, of ours or the paper's, or wait for one."""
    kept = [
        number for number in range(len(table.columns)) if any(_is_shown(cells[number]) for cells in table.rows.values())
    ]
    heads, notes = [table.columns[number].title for number in kept], [table.corpora[number] for number in kept]
    rows = tuple(
        ((Text(table.row_title(name)),), *(tuple(_texts(cells[number], table.corpora[number])) for number in kept))
        for name, cells in table.rows.items()
    )
    return Grid(("", *heads), rows, ("", *notes))


def _is_shown(cell: Cell) -> bool:
    return bool(cell.values) or cell.paper is not None or cell.missing != NOT_RUN


def _texts(cell: Cell, corpus: str) -> list[Text]:
    """What a cell says, in a column of figures on a corpus."""
    if cell.value is None:
        texts = [Text(cell.missing, faint=True)]
    else:
        links = {run.rsplit("/", 1)[1]: _results_link(run) for run in cell.runs.values()}
        texts = [Text(f"{cell.value:.2f} {cell.spread}".strip(), next(iter(links.values())))]
        if len(links) > 1:
            texts += [Text(f"seed {seed}: {cell.values[int(seed)]:.2f}", link) for seed, link in links.items()]
    if cell.paper is not None:
        other = f", {cell.paper_corpus}" if corpus not in ("", cell.paper_corpus) else ""
        texts.append(Text(f"paper {cell.paper:.2f}{other}", faint=True))
    if cell.difference is not None:
        texts.append(Text(f"difference {cell.difference:+.2f}"))
    return texts


def task_of(run: str) -> str:
    """The task of a probe, of its name; something else of other stages.

    Example
    -------
    >>> task_of("asr-frozen/fbank/1"), task_of("masking-asr/0.05/1"), task_of("pretraining/bestrq") in TASKS
    ('asr', 'asr', False)
    """
    return run.split("/")[0].removeprefix("masking-").split("-")[0]


def _results_link(run: str) -> str:
    return f"{run}/{TASKS[task_of(run)].results}"


def _log_link(found: Runs, run: RunLog) -> str:
    return str((run.folder / LOG_FILE).relative_to(found.folder))


def _cost(found: Runs, runs: dict[str, RunLog]) -> list[Block]:
    rows: list[tuple[tuple[Text, ...], ...]] = []
    for name, run in runs.items():
        one = summarise(run)
        last = next((row for row in reversed(run.train) if row.get("utilisation") is not None), {})
        cells = [
            _told(one["parameters"], lambda value: f"{value / 1e6:.1f} M"),
            f"{one['updates']:,}",
            _told(one["audio_hours"], lambda value: f"{value:,.1f}"),
            _told(one["device_hours"], lambda value: f"{value:,.2f}"),
            _told(one["audio_hours_per_device_hour"], lambda value: f"{value:,.1f}"),
            _told(last.get("utilisation"), lambda value: f"{value:.0%}"),
            _told(one["peak_memory_gb"], lambda value: f"{value:.2f}"),
            _device(run.run),
        ]
        rows.append(((Text(name, _log_link(found, run)),), *((Text(cell),) for cell in cells)))
    for method, (parameters, hours) in PAPER_COSTS.items():
        for updates, spent in hours.items():
            cells = [parameters, f"{updates:,}", "", f"{spent}", "", "", "", "8 V100"]
            name = Text(f"paper: {METHOD_NAMES[method]}", faint=True)
            rows.append(((name,), *((Text(cell, faint=True),) for cell in cells)))
    heads = ("", "parameters", "updates", "audio-hours", "device-hours", "audio-hours in a device-hour")
    blocks: list[Block] = [Grid((*heads, "of the datasheet's FLOP/s", "peak GB", "device"), tuple(rows))]
    blocks += _amid_schedules(found.preset, runs)
    return [*blocks, *(_ratio(runs) if runs else [Paragraph("No pre-training has begun.")])]


def _amid_schedules(preset: Mapping[str, Any], runs: Mapping[str, RunLog]) -> list[Block]:
    """Of pre-trainings that were planned for more updates than are compared: their rates had not come down yet."""
    longest = {
        _title(method, seed): max(updates_of(preset, method)) for method, seed in pretraining_names(preset).values()
    }
    told = [
        f"{name}: {planned:,.0f} updates"
        for name, run in runs.items()
        if name in longest and (planned := run.run.get("updates_planned") or 0) > longest[name]
    ]
    if not told:
        return []
    return [Paragraph(f"Looked at amid a longer pre-training, whose rates were still to come down: {'; '.join(told)}.")]


def _device(run: Mapping[str, Any]) -> str:
    """A device-hour of a processor is one of all the threads that a run was given."""
    device = str(run.get("device") or "")
    threads = run.get("threads")
    return f"{device}, {threads} threads".replace(" 1 threads", " 1 thread") if threads and "core" in device else device


def _ratio(runs: Mapping[str, RunLog]) -> list[Block]:
    """How much more audio BEST-RQ hears in a device-hour, all pre-trainings of a method together."""
    ours, other = (METHOD_NAMES[method] for method in ("bestrq", "wav2vec2"))
    pairs = [(name, name.replace(ours, other)) for name in runs if name.startswith(ours)]
    both = [[runs[name] for name in names] for names in zip(*(pair for pair in pairs if pair[1] in runs), strict=True)]
    if not both:
        return []
    last = [
        [row for log in logs if (row := next((row for row in reversed(log.valid) if row.get("device_hours")), None))]
        for logs in both
    ]
    if not all(last):
        return [Paragraph("Not both methods have been validated yet: no ratio.")]
    speeds = [sum(row["audio_hours"] for row in rows) / sum(row["device_hours"] for row in rows) for rows in last]
    steps = " and ".join(dict.fromkeys(f"{max(row['step'] for row in rows):,}" for rows in last))
    return [
        Paragraph(
            f"After {steps} updates BEST-RQ has heard {speeds[0] / speeds[1]:.2f} times the audio of wav2vec 2.0 in a "
            f"device-hour, validations and checkpoints included; in the paper an update took {PAPER_RATIO} times less."
        )
    ]


def _codes(found: Runs, runs: Mapping[str, RunLog]) -> list[Block]:
    """How evenly the codes were used at the last validation, and the pictures of the checks before training."""
    rows = []
    for name, log in runs.items():
        if log.valid:
            last = log.valid[-1]
            cells = [f"{last['step']:,}"]
            cells.append(_told(last.get("codes_used"), lambda value: f"{value:,.0f}"))
            cells.append(_told(last.get("code_perplexity"), lambda value: f"{value:,.0f}"))
            cells.append(_told(last.get("commonest_share"), lambda value: f"{value:.1%}"))
            rows.append(((Text(name, _log_link(found, log)),), *((Text(cell),) for cell in cells)))
    if not rows:
        return [Paragraph("Nothing has been validated yet.")]
    blocks: list[Block] = [
        Paragraph("On the validation set; of BEST-RQ the labels, which training does not change."),
        Grid(("", "updates", "codes used", "perplexity", "share of the commonest"), tuple(rows)),
    ]
    for stage, (method, seed) in pretraining_names(found.preset).items():
        check = stage.replace("pretraining", CODEBOOK_CHECK, 1)
        picture = found.folder / check / CODEBOOK_PICTURE
        # also of a check that found fault
        if found.record(check) and picture.is_file():
            name = _title(method, seed)
            blocks.append(Picture(picture, f"The check before training: use of the codes by {name}."))
    return blocks


def _told(value: float | None, form: Any) -> str:
    return "not known" if value is None else form(value)


def _curves(folder: Path, runs: dict[str, RunLog]) -> list[Block]:
    points = {name: curve(run.folder) for name, run in runs.items()}
    if not any(points.values()):
        return [Paragraph("Nothing has been validated yet.")]
    return [Picture(*draw(points, {run.run.get("corpus") for run in runs.values()}, folder / "curves.png"))]


def _layers(found: Runs) -> list[Block]:
    rows, most = [], 0
    for run, results in _probes(found):
        shares = results.get("layer_weights")
        if shares and len(shares) > 1:
            most = max(most, len(shares))
            rows.append([(Text(run, _results_link(run)),), *((Text(f"{share:.2f}"),) for share in shares)])
    if not rows:
        return [Paragraph("No probe has mixed layers yet.")]
    padded = tuple(tuple([*row, *[(Text(""),)] * (most + 1 - len(row))]) for row in rows)
    return [
        Paragraph("State 0 is the input of the first layer; all begin alike."),
        Grid(("probe", *map(str, range(most))), padded),
    ]


def _probes(found: Runs) -> list[tuple[str, dict[str, Any]]]:
    """The finished probes with their results, by name."""
    probes = []
    for run in found.plan["marks"]:
        task = task_of(run)
        if task in TASKS and (results := found.results(run, task)) is not None:
            probes.append((run, results))
    return probes


def _usage(folder: Path, preset: Mapping[str, Any]) -> list[Block]:
    """Lines of Python for the longest pre-trained encoder that is there, on speech of this folder if there is some."""
    encoders = [
        f"{name}/encoder@{max(updates_of(preset, method))}" for name, (method, _) in pretraining_names(preset).items()
    ]
    encoder = next((one for one in encoders if (folder / one).is_dir()), None)
    if encoder is None:
        return [Paragraph("There is none in this folder.")]
    made = sorted((folder / "speech" / "librispeech").rglob("dev-clean/**/*.flac"))
    audio = str(made[0].relative_to(folder)) if made else "speech.flac"
    lines = (
        "from speechbrain_bestrq import PretrainedEncoder",
        f'encoder = PretrainedEncoder("{encoder}", freeze=True)',
        f'hidden = encoder.encode_file("{audio}")  # (1, frames, d_model)',
    )
    return [Paragraph("In this folder:"), Code("\n".join(lines))]


def _provenance(found: Runs, runs: dict[str, RunLog]) -> list[Block]:
    plan, probes = found.plan, _probes(found)
    records = [*(run.run for run in runs.values()), *(results for _, results in probes)]
    versions = sorted({f"{name} {value}" for one in records for name, value in (one.get("versions") or {}).items()})
    devices = sorted({str(one["device"]) for one in records if one.get("device")})
    hours = sum(results.get("device_hours") or 0.0 for _, results in probes)
    seeds = [f"{name.split(', seed')[0]} {run.run.get('seed')}" for name, run in runs.items()]
    counts = Counter(found.record(run).get("commit") or "not known" for run in plan["marks"] if found.is_done(run))
    commits = ", ".join(f"{name} ({count} stages)" for name, count in sorted(counts.items()))
    items = (
        f"versions: {', '.join(versions) or 'not known'}",
        f"devices: {'; '.join(devices) or 'not known'}",
        f"commits: {commits or 'no stage is done'}; the last start: {plan.get('commit') or 'not known'}",
        f"seeds of the pre-trainings: {', '.join(seeds) or 'none yet'}",
        f"probes: {len(probes)}, {hours:.2f} device-hours of training and validation",
    )
    commands = [str(run.run["command"]) for run in runs.values() if run.run.get("command")]
    commands += [results["command"] for _, results in probes if results.get("command")]
    blocks: list[Block] = [Items(items), Paragraph("The whole: "), Code(plan["command"])]
    return [*blocks, Paragraph("Each run: "), Code("\n".join(commands) or "none yet")]


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "score", "corpus", "ours", "deviation_or_interval", "paper", "difference", "seeds", "runs"])
    for name, cells in table.rows.items():
        for column, cell in zip(table.columns, cells, strict=True):
            writer.writerow(
                [
                    table.row_title(name),
                    column.title,
                    "; ".join(sorted(cell.corpora)),
                    _number(cell.value),
                    cell.spread,
                    _number(cell.paper),
                    _number(cell.difference),
                    " ".join(map(str, cell.values)),
                    " ".join(cell.runs.values()),
                ]
            )
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
