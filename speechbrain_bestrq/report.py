"""A run's summary and curves.

Only what was logged is shown: another model's log may lack some fields and have more.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from speechbrain_bestrq.artefact import encoders_at_steps
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.run_log import (
    LOG_FILE,
    RUN_NUMBERS,
    RUN_TEXTS,
    VALIDATION_FIELDS,
    CurvePoint,
    RunLog,
    curve,
    last_number,
    number,
    read_run,
    validation_error,
)
from speechbrain_bestrq.writing import replacing, write_text

__all__ = [
    "CurvePoint",
    "RunLog",
    "curve",
    "draw_curves",
    "read_run",
    "summarise",
    "summary_markdown",
    "write_report",
]


def _validation(row: dict[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    values = {"step": row["step"], **{key: number(row, key) for key in VALIDATION_FIELDS}}
    accuracy, share = values["accuracy"], values["commonest_share"]
    values["accuracy_over_commonest"] = None if accuracy is None or share is None else accuracy - share
    return values


def summarise(log: RunLog) -> dict[str, Any]:
    """Sum a run up.

    Arguments
    ---------
    log : RunLog
        What :func:`read_run` returns.

    Returns
    -------
    dict
        Ready for JSON; what was not logged is None. The fields of ``run.json``;
        ``updates``, ``audio_hours``, ``device_hours``, ``audio_hours_per_device_hour``,
        ``skipped_updates`` and ``rewinds`` (of the whole run), ``peak_memory_gb``; ``best_valid`` (the
        validation of least loss, or of most of what ``chosen_by`` names) and ``last_valid``,
        each with step, loss, gain (nats), accuracy, the commonest label's share and their
        difference; ``encoder``, the folder of the pre-trained encoder, and
        ``encoders_at_steps``.

    Example
    -------
    >>> lines = [{"event": "valid", "step": step, "loss": loss} for step, loss in ((10, 6.0), (20, 6.5))]
    >>> summary = summarise(RunLog(Path("run"), {"model": "BestRQ"}, [], lines))
    >>> summary["model"], summary["updates"], summary["best_valid"]["step"], summary["last_valid"]["loss"]
    ('BestRQ', 20, 10, 6.5)
    """
    both = sorted(log.train + log.valid, key=lambda row: row["step"])
    audio_hours, device_hours = last_number(both, "audio_hours"), last_number(both, "device_hours")
    memory = [value for row in log.train if (value := number(row, "peak_memory_gb")) is not None]
    chosen_by = log.run.get("chosen_by") or "loss"  # as those of before were
    scored = [row for row in log.valid if number(row, "loss") is not None and number(row, chosen_by) is not None]
    at_steps = {step: str(folder) for step, folder in encoders_at_steps(log.folder).items()}
    encoder = log.folder / "encoder"
    return {
        "run": str(log.folder),
        **{key: log.run.get(key) for key in (*RUN_TEXTS, *RUN_NUMBERS, "versions")},
        "updates": both[-1]["step"],
        "audio_hours": audio_hours,
        "device_hours": device_hours,
        "audio_hours_per_device_hour": audio_hours / device_hours if audio_hours and device_hours else None,
        "skipped_updates": last_number(log.train, "skipped_updates"),
        "rewinds": last_number(log.train, "rewinds"),
        "peak_memory_gb": max(memory, default=None),
        "best_valid": _validation(min(scored, key=lambda row: validation_error(row, chosen_by), default=None)),
        "last_valid": _validation(log.valid[-1] if log.valid else None),
        "encoder": str(encoder) if encoder.is_dir() else None,
        "encoders_at_steps": {str(step): at_steps[step] for step in sorted(at_steps)},
    }


def _text(value: Any, form: str = "", unit: str = "") -> str:
    if value is None:
        return "not logged"
    return f"{value:{form}}{unit}" if form and isinstance(value, int | float) else f"{value}{unit}"


def _validation_text(values: dict[str, Any] | None) -> str:
    if values is None:
        return "none yet"
    parts = [f"update {values['step']:,}", f"loss {_text(values['loss'], '.3f')}"]
    if values["gain"] is not None:
        parts.append(f"gain over the unigram cross-entropy {values['gain']:.3f} nats")
    if values["information"] is not None:  # of a model that finds targets, no labels, among others
        parts += [f"information {values['information']:.3f} nats", f"accuracy {_text(values['accuracy'], '.2%')}"]
    elif values["accuracy_over_commonest"] is not None:
        parts.append(
            f"accuracy {values['accuracy']:.2%} against {values['commonest_share']:.2%} of the commonest label "
            f"({100 * values['accuracy_over_commonest']:+.2f} points)"
        )
    if values["codes_used"] is not None:
        parts.append(f"{values['codes_used']:,.0f} codes used, perplexity {_text(values['code_perplexity'], ',.0f')}")
    return ", ".join(parts)


def summary_markdown(summary: dict[str, Any]) -> str:
    """Write a summary as Markdown that reads well in a terminal too.

    Arguments
    ---------
    summary : dict
        What :func:`summarise` returns.

    Returns
    -------
    str
        A heading and a list, with a newline at the end.

    Example
    -------
    >>> row = {"event": "valid", "step": 500, "loss": 6.25, "gain": 1.875}
    >>> text = summary_markdown(summarise(RunLog(Path("run"), {"model": "BestRQ"}, [], [row])))
    >>> print([line for line in text.splitlines() if "best" in line][0])
    - best validation: update 500, loss 6.250, gain over the unigram cross-entropy 1.875 nats
    """
    of_planned = f" of {summary['updates_planned']:,}" if summary["updates_planned"] is not None else ""
    rewinds = summary["rewinds"] or 0
    lowered = f"; went back {rewinds} times, to 1/{2**rewinds} of the learning rate" if rewinds else ""
    entries = {
        "model": f"{_text(summary['model'])}, {_text(summary['parameters'], ',', ' parameters')}",
        "data": f"{_text(summary['corpus'])}, {_text(summary['train_hours'], ',.2f', ' h')} to train on "
        f"({_text(summary['train_utterances'], ',', ' utterances')}), "
        f"{_text(summary['valid_hours'], ',.2f', ' h')} to validate",
        "device": f"{_text(summary['world_size'])} x {_text(summary['device'])}, {_text(summary['precision'])}",
        "updates": f"{summary['updates']:,}{of_planned}, {_text(summary['skipped_updates'], ',')} skipped{lowered}",
        "audio seen": f"{_text(summary['audio_hours'], ',.2f', ' h')} in "
        f"{_text(summary['device_hours'], ',.2f', ' device-hours')}: "
        f"{_text(summary['audio_hours_per_device_hour'], ',.1f', ' audio-hours per device-hour')}",
        "peak memory": _text(summary["peak_memory_gb"], ".2f", " GB"),
        "best validation": _validation_text(summary["best_valid"]),
        "last validation": _validation_text(summary["last_valid"]),
        "encoder": summary["encoder"] or "not written yet",
        **{f"encoder at update {int(step):,}": path for step, path in summary["encoders_at_steps"].items()},
        "seed": _text(summary["seed"]),
        "command": f"`{summary['command']}`" if summary["command"] else "not logged",
        "versions": ", ".join(f"{name} {version}" for name, version in (summary["versions"] or {}).items())
        or "not logged",
    }
    return f"# Run {summary['run']}\n\n" + "".join(f"- {name}: {value}\n" for name, value in entries.items())


# --- the picture ---

_TRAIN, _VALID, _OTHER = "#1f77b4", "#d95f02", "#6a3d9a"


class _Line(NamedTuple):
    label: str
    rows: Sequence[dict[str, Any]]
    values: Callable[[dict[str, Any]], float | None]
    color: str
    style: str = "-"
    right: bool = False


class _Panel(NamedTuple):
    title: str
    lines: Sequence[_Line]
    log: bool = False
    percent: bool = False
    from_zero: bool = False
    right_title: str = ""
    right_log: bool = False


def _field(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: number(row, key)


def _panels(log: RunLog) -> list[_Panel]:
    def pair(key: str, name: str = "", style: str = "-") -> list[_Line]:
        """The training and the validation line of one field."""
        name = f" {name}" if name else ""
        return [
            _Line(f"train{name}", log.train, _field(key), _TRAIN, style),
            _Line(f"valid{name}", log.valid, _field(key), _VALID, style),
        ]

    train = log.train
    return [
        _Panel("loss (nats)", pair("loss") + pair("unigram_entropy", "unigram", "--")),
        _second_panel(log, pair),
        _Panel(
            "accuracy on masked frames",
            pair("accuracy") + pair("commonest_share", "commonest label", "--"),
            percent=True,
            from_zero=True,
        ),
        _Panel(
            "codes",
            pair("codes_used", "used")
            + pair("code_perplexity", "perplexity", "--")
            + pair("probability_perplexity", "perplexity of probabilities", ":"),
            log=True,
        ),
        _Panel(
            "learning rate",
            [
                _Line("learning rate", train, _field("learning_rate"), _TRAIN),
                _Line("gradient norm", train, _field("gradient_norm"), _OTHER, right=True),
            ],
            right_title="gradient norm",
            right_log=True,
        ),
        _Panel(
            "audio-seconds per second",
            [
                _Line("speed", train, _field("audio_seconds_per_second"), _TRAIN),
                _Line("waiting for data", train, _field("data_wait_share"), _OTHER, right=True),
                _Line("FLOPs utilisation", train, _field("utilisation"), _OTHER, "--", right=True),
            ],
            from_zero=True,
            right_title="share of time, of peak",
        ),
    ]


def _second_panel(log: RunLog, pair: Callable[..., list[_Line]]) -> _Panel:
    """The gain of a model that predicts labels; the terms of the loss of one that learns its codes."""
    if any("diversity_loss" in row for row in (*log.train, *log.valid)):
        terms = pair("diversity_loss", "diversity", "--") + pair("feature_penalty", "penalty", ":")
        return _Panel("information (nats), diversity, penalty", pair("information", "information") + terms)
    return _Panel("gain over unigram (nats)", pair("gain"))


def _points(line: _Line, log_scale: bool) -> tuple[list[int], list[float]]:
    points = [(row["step"], value) for row in line.rows if (value := line.values(row)) is not None]
    if log_scale:
        points = [(step, value) for step, value in points if value > 0]
    return [step for step, _ in points], [value for _, value in points]


def _scale(axes: Axes, log_scale: bool, from_zero: bool) -> None:
    """Set the vertical scale, with room above the lines for the legend."""
    if log_scale:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.3)
        # plain numbers that are read at a glance, and enough of them within one decade
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        low, high = axes.get_ylim()
        low = 0.0 if from_zero else low
        axes.set_ylim(low, high + 0.3 * (high - low))


def _draw_panel(left: Axes, panel: _Panel) -> None:
    right = None
    handles = []
    for line in panel.lines:
        steps, values = _points(line, panel.right_log if line.right else panel.log)
        if not steps:
            continue
        if line.right and right is None:
            right = left.twinx()
        # a line through one or two points is hard to see; validations are few, and each is one measurement
        marker = "o" if len(steps) < 3 or line.color == _VALID else None
        axes = right if line.right else left
        handles += axes.plot(steps, values, line.style, color=line.color, marker=marker, ms=3, lw=1.3, label=line.label)
    left.set_ylabel(panel.title)
    left.grid(alpha=0.3)
    _scale(left, panel.log, panel.from_zero)
    if panel.percent:
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
    if right is not None:
        right.set_ylabel(panel.right_title, color=_OTHER)
        right.tick_params(axis="y", colors=_OTHER)
        if panel.right_log:
            _scale(right, log_scale=True, from_zero=False)
        else:  # shares of a whole, which is shown whole: a small one must look small
            right.set_ylim(0.0, 1.35)
            right.yaxis.set_major_locator(FixedLocator([0.0, 0.25, 0.5, 0.75, 1.0]))
            right.yaxis.set_major_formatter(PercentFormatter(1.0))
    # on the upper of the two axes, so that no line crosses it
    (right or left).legend(
        handles=handles, loc="upper center", ncols=len(handles) if len(handles) < 4 else 2, fontsize=8
    )


def _piecewise(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The line through rising points, going on beyond them with its mean slope."""
    slope = (y[-1] - y[0]) / (x[-1] - x[0])

    def function(values: np.ndarray) -> np.ndarray:
        beyond = np.minimum(values - x[0], 0.0) + np.maximum(values - x[-1], 0.0)
        return np.interp(values, x, y) + slope * beyond

    return function


def _add_hours_axis(axes: Axes, log: RunLog) -> None:
    steps, hours = [0.0], [0.0]
    for row in sorted(log.train + log.valid, key=lambda row: row["step"]):
        value = number(row, "audio_hours")
        if value is not None and row["step"] > steps[-1] and value > hours[-1]:
            steps.append(row["step"])
            hours.append(value)
    if len(steps) == 1:
        return
    x, y = np.array(steps), np.array(hours)
    second = axes.secondary_xaxis("top", functions=(_piecewise(x, y), _piecewise(y, x)))
    second.set_xlabel("audio-hours")
    second.xaxis.set_major_locator(MaxNLocator(6))
    second.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def draw_curves(log: RunLog, path: str | Path) -> Path:
    """Draw a run's curves: loss, gain, accuracy, codebook use, optimisation, speed.

    The horizontal axis counts updates below and audio-hours above. A panel of
    which nothing was logged is left out.

    Arguments
    ---------
    log : RunLog
        What :func:`read_run` returns.
    path : str or Path
        PNG file to write; its folder exists. An older one is replaced.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        If the log holds nothing that can be drawn.

    Example
    -------
    >>> import tempfile
    >>> log = RunLog(Path("run"), {}, [{"event": "train", "step": 5, "loss": 6.5}], [])
    >>> draw_curves(log, Path(tempfile.mkdtemp()) / "curves.png").name
    'curves.png'
    """
    path = Path(path)
    panels = [
        p for p in _panels(log) if any(_points(line, p.right_log if line.right else p.log)[0] for line in p.lines)
    ]
    if not panels:
        raise InputError(
            f"'{log.folder / LOG_FILE}' holds nothing to draw: no line has a loss, an accuracy or a speed."
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.6 * columns, 0.9 + 3.1 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    # the columns' panels share this axis
    last = max(row["step"] for row in log.train + log.valid)
    grid[0].set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    grid[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    grid[0].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in grid[:columns]:
        _add_hours_axis(axes, log)
    for axes in grid[max(len(panels) - columns, 0) : len(panels)]:
        axes.set_xlabel("updates")
        axes.tick_params(labelbottom=True)
    title = [log.run.get("model"), log.run.get("corpus")]
    if log.run.get("parameters") is not None:
        title.insert(1, f"{log.run['parameters'] / 1e6:.1f}M parameters")
    # a corpus may be called anything: a dollar sign in it is no formula
    text = ", ".join(part for part in title if part)
    figure.suptitle("\n".join(textwrap.wrap(text, 55 * columns, break_on_hyphens=False)), fontsize=12, parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return path


def write_report(run_folder: str | Path) -> dict[str, Any]:
    """Write ``report/curves.png`` and ``report/summary.md`` into a run folder.

    An older report is replaced; nothing else in the folder is touched.

    Arguments
    ---------
    run_folder : str or Path
        Output folder of a pre-training run, finished or not.

    Returns
    -------
    dict
        The summary of :func:`summarise`, with the path of the picture as ``curves``.

    Raises
    ------
    InputError
        As :func:`read_run`; or if the folder cannot be written to.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text('{"model": "BestRQ"}')
    >>> _ = (folder / "train_log.jsonl").write_text('{"event": "train", "step": 5, "loss": 6.5}')
    >>> write_report(folder)["updates"], sorted(path.name for path in (folder / "report").iterdir())
    (5, ['curves.png', 'summary.md'])
    """
    log = read_run(run_folder)
    folder = log.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
        summary = {**summarise(log), "curves": str(draw_curves(log, folder / "curves.png"))}
        write_text(folder / "summary.md", summary_markdown(summary) + "\n![curves](curves.png)\n")
    except OSError as error:
        raise InputError(
            f"the report cannot be written to '{folder}' ({error}): make it writable, or free space."
        ) from error
    return summary
