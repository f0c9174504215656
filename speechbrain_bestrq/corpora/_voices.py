"""Who speaks, and how: speakers for synthetic speech, and the prosody of one utterance."""

import math
from typing import NamedTuple

import numpy as np

from speechbrain_bestrq.corpora._espeak import Request
from speechbrain_bestrq.corpora._texts import choose

# By their files, which espeak-ng finds without a list of all its voices: "en" is British.
ACCENTS = (
    "en-us",
    "en-us",
    "en",
    "en",
    "en-us-nyc",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
)

# The variants that sound like a person: no robots, whispers, or voices cut off by the 16 bits.
VARIANTS = {
    "F": "Alicia Andrea Annie anika aunty belinda f1 f2 f3 f4 f5 grandma linda shelby steph".split(),
    "M": """Alex Andy Denis Diogo Gene Henrique Hugo Lee Mario Nguyen Reed adam antonio benjamin boris david ed edward
        gustave iven3 john m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo pedro quincy robert victor
        """.split(),
}

# Output samples for every 441 of espeak-ng's: 320 keep its formants, more lower them, as a longer vocal tract does.
# With small prime factors only, so that Fourier transforms of these lengths are quick.
TRACTS = {"F": (294, 300, 315, 320, 324, 336), "M": (300, 315, 320, 324, 336, 343, 350)}
NEUTRAL_TRACT = 320


class Speaker(NamedTuple):
    """One voice: what stays the same in all its utterances."""

    voice: str
    """espeak-ng's language and variant."""
    gender: str
    """F or M."""
    rate: float
    """Words a minute."""
    pitch: float
    """In espeak-ng's units."""
    range: float
    """Of the pitch, in espeak-ng's units."""
    tract: int
    """Length of the vocal tract, one of ``TRACTS``."""
    tilt: float
    """Of the spectrum, dB per octave."""


class Delivery(NamedTuple):
    """Prosody of one utterance, against the speaker's usual."""

    rate: float = 1.0
    """Factor."""
    pitch: float = 0.0
    """Added."""
    range: float = 0.0
    """Added."""
    gain: float = 0.0
    """dB."""
    tilt: float = 0.0
    """Added to the spectrum, dB per octave: loud voices have a flatter one."""


USUAL = Delivery()


def draw_speaker(gender: str, generator: np.random.Generator) -> Speaker:
    """Draw a speaker of a gender, F or M."""
    return Speaker(
        f"{choose(generator, ACCENTS)}+{choose(generator, VARIANTS[gender])}",
        gender,
        float(generator.uniform(135, 195)),
        float(generator.uniform(30, 70)),
        float(generator.uniform(35, 75)),
        int(generator.choice(TRACTS[gender])),
        float(generator.normal(0.0, 1.0)),
    )


def draw_delivery(generator: np.random.Generator, usual: Delivery = USUAL, spread: float = 1.0) -> Delivery:
    """Draw the prosody of one utterance around a usual one; nobody speaks twice in the same way."""
    noise = generator.normal(0.0, spread, 5)
    return Delivery(
        usual.rate * math.exp(0.06 * noise[0]),
        usual.pitch + 4.0 * noise[1],
        usual.range + 6.0 * noise[2],
        usual.gain + 1.5 * noise[3],
        usual.tilt + 0.5 * noise[4],
    )


def make_request(text: str, speaker: Speaker, delivery: Delivery, seed: int) -> Request:
    """Say it in espeak-ng's units, within its limits."""
    rate = speaker.rate * delivery.rate * speaker.tract / NEUTRAL_TRACT
    return Request(
        text,
        speaker.voice,
        round(min(max(rate, 80.0), 400.0)),
        round(min(max(speaker.pitch + delivery.pitch, 0.0), 99.0)),
        round(min(max(speaker.range + delivery.range, 0.0), 99.0)),
        seed,
    )


def estimate_seconds(text: str, speaker: Speaker, delivery: Delivery) -> float:
    """Guess how long a recording will be, before it is spoken; over a corpus it is within a tenth."""
    # measured: letters at the rate, and the silence around them
    return 9.2 * len(text) / (speaker.rate * delivery.rate) + 0.75
