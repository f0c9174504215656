"""How the pre-trainings of a reproduction went, over updates and hours, with the paper's curve where it compares."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from speechbrain_bestrq.reproduction.tables import PRETRAINING_CORPUS
from speechbrain_bestrq.run_log import CurvePoint
from speechbrain_bestrq.writing import replacing

#: Epochs and accuracy on LibriSpeech's dev-clean, from the logs of the paper.
_BY_EPOCH = ((1, 0.125), (5, 0.155), (10, 0.172), (20, 0.183), (42, 0.186))
#: Updates, audio-hours and accuracy: its 42 epochs of 960 hours were 200,000 updates.
PAPER_CURVE = tuple((round(200000 * epoch / 42), 960 * epoch, accuracy) for epoch, accuracy in _BY_EPOCH)
_PAPER = "BEST-RQ in the paper, 8192 codes"


def figure_of(points: Mapping[str, Sequence[CurvePoint]], corpora: Collection[str | None]) -> tuple[Figure, str]:
    """Draw curves.

    Arguments
    ---------
    points : mapping
        Of each pre-training, its validations.
    corpora : collection of str
        What they heard.

    Returns
    -------
    Figure
        Accuracy over updates, audio-hours and device-hours.
    str
        What it shows.
    """
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    fields = ("step", "audio_hours", "device_hours")
    for name, found in points.items():
        for axis, field in zip(axes, fields, strict=True):
            known = [one for one in found if getattr(one, field) is not None and one.accuracy is not None]
            values = [100 * one.accuracy for one in known]
            axis.plot([getattr(one, field) for one in known], values, marker=".", label=name)
    words = (
        "Accuracy of the pre-training's own task: BEST-RQ tells one of its codes, wav2vec 2.0 the true frame of 101."
    )
    longest = max((one.step for found in points.values() for one in found), default=0)
    papers = [point for point in PAPER_CURVE if point[0] <= longest]
    if set(corpora) == {PRETRAINING_CORPUS} and papers:
        for axis, places in zip(axes, list(zip(*papers, strict=True))[:2], strict=False):
            axis.plot(places, [100 * accuracy for *_, accuracy in papers], "k--", marker="x", label=_PAPER)
        words += " Dashed: the paper's BEST-RQ, of 8192 codes."
    axes[0].set(ylabel="accuracy on the validation set, %")
    for axis, title in zip(axes, ("updates", "audio-hours heard", "device-hours"), strict=True):
        axis.set(xlabel=title)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure, words


def draw(points: Mapping[str, Sequence[CurvePoint]], corpora: Collection[str | None], path: Path) -> tuple[Path, str]:
    """Draw curves into a PNG.

    Arguments
    ---------
    points, corpora
        As :func:`figure_of` takes them.
    path : Path
        The PNG.

    Returns
    -------
    Path, str
        The same, and what it shows.
    """
    figure, words = figure_of(points, corpora)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={"Software": None})
    return path, words
