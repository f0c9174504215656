"""Corpora of noise and tones in the layouts of the real ones, where there is neither speech nor espeak-ng."""

import json
from pathlib import Path

import numpy as np
import soundfile
from common import RATE

from speechbrain_bestrq.corpora._layouts import LAYOUTS
from speechbrain_bestrq.corpora._voices import estimate_seconds
from speechbrain_bestrq.writing import write_text


def noise(generator: np.random.Generator, samples: int) -> np.ndarray:
    """Noise of a level and a colour of its own with a tone in it, float32, shape (samples,)."""
    white = generator.standard_normal(samples)
    colour, level, pitch = generator.uniform(0, 0.9), generator.uniform(0.02, 0.1), generator.uniform(100, 2000)
    coloured = white[1:] + colour * white[:-1]
    tone = np.sin(2 * np.pi * pitch / RATE * np.arange(samples)) * (np.arange(samples) // 3200 % 2)
    return (level * (np.append(white[0], coloured) + tone)).astype(np.float32)


def write_corpus(
    folder: Path, layout: str, hours: float, speakers: int | None, seconds: float | None = None, training: str = ""
) -> Path:
    """Write a corpus whose files and labels are those of the synthetic one, and whose audio is noise.

    Arguments
    ---------
    folder : Path
        Where it goes.
    layout : str
        "librispeech", "voxceleb", "iemocap" or "slurp".
    hours : float
        Of the training part, if utterances are as long as their texts.
    speakers : int or None
        Of the training part; None for the layout's own.
    seconds : float, optional
        Of each utterance; left out, as long as its text takes.
    training : str
        What the paths of these utterances have in them; all others are as long as their texts.

    Returns
    -------
    Path
        The folder.
    """
    kind = LAYOUTS[layout]
    utterances = list(kind.plan(hours, speakers or kind.speakers, 0))
    lengths = []
    for number, one in enumerate(utterances):
        alike = seconds is not None and training in str(one.path)
        length = seconds if alike else round(estimate_seconds(one.text, one.speaker, one.delivery), 2)
        path = folder / one.path
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(np.random.default_rng(number), round(length * RATE)), RATE, "PCM_16")
        lengths.append(length)
    for path, content in kind.texts(utterances, lengths):
        write_text(folder / path, content)
    write_text(folder / "CORPUS.json", json.dumps({"name": f"noise in the layout of {kind.corpus}"}) + "\n")
    return folder
