"""The picture of how codebooks are used."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from speechbrain_bestrq.codebook_use import MOST_OF_ONE_CODE, CodebookUse
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.writing import replacing

#: More codebooks than this share one entry of the legend.
_MOST_NAMED = 8


def draw_codebook_use(use: CodebookUse, path: str | Path, title: str) -> Path:
    """Draw the codes' shares from the commonest down, and what they add up to.

    Arguments
    ---------
    use : CodebookUse
        The counts; those of speech are drawn, for the first codebook those with silence
        too.
    path : str or Path
        PNG file to write; its folder is made. An older one is replaced.
    title : str
        Stands above.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        If it cannot be written.

    Example
    -------
    >>> import torch
    >>> counts = torch.arange(1.0, 65.0, dtype=torch.float64)[None]
    >>> draw_codebook_use(CodebookUse(counts, counts, 0.0), getfixture("tmp_path") / "use.png", "64 codes").name
    'use.png'
    """
    path = Path(path)
    codes = use.speech.shape[1]
    ranks = np.arange(1, codes + 1)
    figure = Figure(figsize=(12.0, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(use.speech)))
    lines = []
    for book, (counts, color) in enumerate(zip(use.speech.numpy(), colors, strict=True), start=1):
        named = len(use.speech) <= _MOST_NAMED or book == 1
        name = "speech" if len(use.speech) == 1 else f"codebook {book}" if len(use.speech) <= _MOST_NAMED else "each"
        lines.append((counts, {"color": color, "label": name if named else None, "lw": 1.6}))
    label = "with silence" if len(use.speech) == 1 else "codebook 1, with silence"
    lines.append((use.everything[0].numpy(), {"color": "tab:orange", "label": label, "lw": 1.2, "ls": "--"}))
    for counts, style in lines:
        shares = np.sort(counts)[::-1] / max(counts.sum(), 1.0)
        left.plot(ranks, np.where(shares > 0, shares, np.nan), **style)
        right.plot(ranks, np.cumsum(shares), **style)
    left.axhline(1.0 / codes, color="grey", lw=1.0, ls=":", label="all codes alike")
    left.axhline(MOST_OF_ONE_CODE, color="tab:red", lw=1.0, ls=":", label=f"limit of one code, {MOST_OF_ONE_CODE:.0%}")
    right.plot(ranks, ranks / codes, color="grey", lw=1.0, ls=":", label="all codes alike")
    left.set_yscale("log")
    left.set_ylabel("share of the frames")
    right.set_ylabel("share of the frames of all codes up to here")
    right.set_ylim(0.0, 1.03)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, place in ((left, "lower left"), (right, "upper left")):
        axes.set_xscale("log")
        axes.set_xlim(0.9, 1.1 * codes)
        axes.set_xlabel("codes, the commonest first")
        axes.grid(alpha=0.3)
        axes.legend(loc=place, fontsize=8)
    # a folder may be called anything: a dollar sign in it is no formula
    figure.suptitle("\n".join(textwrap.wrap(title, 110, break_on_hyphens=False)), fontsize=11, parse_math=False)
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error.strerror}): give another output folder.") from error
    return path
