"""The whole way on a laptop: synthetic speech, pre-training by the real recipe, a report."""

import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.report import write_report
from speechbrain_bestrq.run_log import curve, read_run

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "LibriSpeech" / "pretrain"

#: Hours of synthetic speech to train on, and updates: sized for two CPU cores and ten minutes in all.
HOURS, UPDATES = 1.5, 400

#: Many, for each has rooms and microphones of its own: with 32 an hour the labels of unseen ones were others
#: (docs/LOG.md).
SPEAKERS_PER_HOUR = 320

#: What the demo gives ``bestrq_small.yaml`` on the command line, beside folders and updates.
OVERRIDES = {
    "train_splits": "[train-clean-100]",
    "valid_splits": "[dev-clean]",
    "num_layers": 3,
    "codebook_size": 256,
    "max_batch_seconds": 20,
    "grad_accumulation_factor": 3,
    "statistics_hours": 0.2,
    "warmup_updates": 40,
    "peak_learning_rate": 0.001,
    "valid_interval": 100,
    "ckpt_interval_steps": 25,
}

_STEPS = 3


def training_command(folder: Path, updates: int) -> list[str]:
    """The pre-training of the demo, as one would type it in the recipe's folder.

    Arguments
    ---------
    folder : Path
        The demo's folder, absolute.
    updates : int
        Length of the run.

    Returns
    -------
    list of str
        Without the interpreter.

    Example
    -------
    >>> training_command(Path("/demo"), 600)[:6]
    ['train.py', 'hparams/bestrq_small.yaml', '--data_folder', '/demo/LibriSpeech', '--output_folder', '/demo/run']
    """
    options = {
        "data_folder": folder / "LibriSpeech",
        "output_folder": folder / "run",
        "optimizer_step_limit": updates,
        **OVERRIDES,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["train.py", "hparams/bestrq_small.yaml", *words]


def run_demo(folder: str | Path, hours: float = HOURS, updates: int = UPDATES) -> dict[str, Any]:
    """Make a corpus, pre-train on it, write the report; called again, go on or find it done.

    Arguments
    ---------
    folder : path
        Where everything goes: ``LibriSpeech/`` (synthetic) and ``run/``.
    hours : float
        Synthetic speech to train on.
    updates : int
        Length of the pre-training.

    Returns
    -------
    dict
        The report's summary (:func:`speechbrain_bestrq.report.write_report`).

    Raises
    ------
    InputError
        If the recipes are not there, the folder holds a demo of other settings, or the
        training failed.
    """
    if not (RECIPE / "train.py").is_file():
        raise InputError(f"{RECIPE} does not exist: run the demo in a checkout of the repository, as make demo does.")
    folder = Path(folder).resolve()
    from speechbrain_bestrq.corpora.synthetic import make_synthetic

    logger.info("[1/%d] Speech: %.1f hours by espeak-ng, into %s", _STEPS, hours, folder / "LibriSpeech")
    make_synthetic(folder / "LibriSpeech", "librispeech", hours, speakers=max(round(SPEAKERS_PER_HOUR * hours), 2))

    command = training_command(folder, updates)
    if _updates_done(folder / "run") >= updates and (folder / "run" / "encoder").is_dir():
        logger.info("[2/%d] Pre-training: done already. To do it again, delete %s", _STEPS, folder / "run")
    else:
        logger.info("[2/%d] Pre-training: %d updates. This is the command, to be given in %s:", _STEPS, updates, RECIPE)
        logger.info("\n    python %s\n", shlex.join(command))
        _train(command)

    logger.info("[3/%d] Report", _STEPS)
    return write_report(folder / "run")


def _updates_done(run: Path) -> int:
    """Updates of a run that its log knows of, 0 if there is none."""
    try:
        log = read_run(run)
    except InputError:
        return 0
    return max((row["step"] for row in log.train + log.valid), default=0)


def _train(command: list[str]) -> None:
    """Run the recipe in a process of its own, which writes where this one does, and ends when this one does."""
    process = subprocess.Popen([sys.executable, *command], cwd=RECIPE, stdout=sys.stderr)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # the terminal has told the training too: let it end by itself
        process.wait()
        raise
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)
    if status:
        raise InputError(f"the pre-training ended with status {status}: mend what it says above, and start again.")


def demo_text(summary: dict[str, Any]) -> str:
    """What the demo says at its end: the curve, the cost, the encoder and how to use it.

    Arguments
    ---------
    summary : dict
        As :func:`run_demo` returns it.

    Returns
    -------
    str
        Plain text of several lines; the last three are Python that runs as it stands.
    """
    run = Path(summary["run"])
    return "\n".join(
        [
            *_curve_lines(run),
            "",
            f"Curves: {summary['curves']}",
            f"Cost: {summary['audio_hours']:.1f} hours of audio in {60 * summary['device_hours']:.1f} minutes on "
            f"{summary['device']}: {summary['audio_hours_per_device_hour']:.0f} times as fast as it is spoken.",
            f"Encoder: {summary['encoder']} ({summary['parameters'] / 1e6:.1f} million parameters in pre-training)",
            "",
            "Use it:",
            "",
            *(f"    {line}" for line in python_lines(summary)),
        ]
    )


def _curve_lines(run: Path) -> Iterator[str]:
    """The validations as a table with bars."""
    points = [point for point in curve(run) if point.gain is not None]
    most = max([0.1, *(point.gain for point in points)])
    yield "Validation on unseen speakers. Gain: the unigram cross-entropy of the labels minus the loss."
    yield f"{'updates':>8} {'audio-hours':>12} {'loss':>7} {'gain, nats':>11} {'accuracy':>9}"
    for point in points:
        bar = "#" * round(30 * max(point.gain, 0.0) / most)
        numbers = f"{point.step:>8} {point.audio_hours:>12.1f} {point.loss:>7.3f} {point.gain:>11.3f}"
        yield f"{numbers} {point.accuracy:>9.1%} {bar}"


def python_lines(summary: dict[str, Any]) -> list[str]:
    """Three lines of Python that use the encoder on an utterance of the demo.

    Arguments
    ---------
    summary : dict
        As :func:`run_demo` returns it.

    Returns
    -------
    list of str
    """
    corpus = Path(summary["run"]).parent / "LibriSpeech" / "dev-clean"
    audio = min(corpus.rglob("*.flac"))
    return [
        "from speechbrain_bestrq import PretrainedEncoder",
        f"encoder = PretrainedEncoder({summary['encoder']!r}, freeze=True)",
        f"hidden = encoder.encode_file({str(audio)!r})  # (1, frames, d_model), 25 frames a second",
    ]
