"""From a voice to a recording: the room, the microphone, the noise and the level of synthetic speech."""

import math
from typing import NamedTuple

import numpy as np

from speechbrain_bestrq.corpora import _espeak
from speechbrain_bestrq.corpora._voices import NEUTRAL_TRACT, Delivery, Speaker

SAMPLE_RATE = 16000
"""Hz. Of all recordings."""

# 441 samples of espeak-ng's last as long as 320 at 16 kHz.
_ESPEAK_BLOCK = _espeak.SAMPLE_RATE * NEUTRAL_TRACT // SAMPLE_RATE

# Smooth responses are drawn up on this grid, Hz, and interpolated: a recording has a hundred times as many bins.
_GRID = np.linspace(0.0, SAMPLE_RATE / 2, 801)
_OCTAVES = np.log2(np.maximum(_GRID, 80.0) / 1000.0)

# Cosines over the logarithm of frequency, which make up a microphone's response, (6, points).
_PLACES = (_OCTAVES - _OCTAVES[0]) / (_OCTAVES[-1] - _OCTAVES[0])
_COSINES = np.cos(np.pi * np.arange(1, 7)[:, None] * _PLACES)

# 60 to 7,400 Hz go through, with soft edges, so that nothing rings.
_BAND_LIMIT = np.sin(0.5 * np.pi * np.clip((_GRID - 30.0) / 30.0, 0.0, 1.0)) * np.sin(
    0.5 * np.pi * np.clip((0.5 * SAMPLE_RATE - _GRID) / 600.0, 0.0, 1.0)
)


class Room(NamedTuple):
    """Where a session is recorded, and with what: the same for all its utterances."""

    seed: int
    """Of the echo."""
    reverberation: float
    """Seconds until the echo is 60 dB down."""
    direct: float
    """The direct sound over the echo, dB."""
    snr: float
    """Speech over noise, dB."""
    slope: float
    """Of the noise's spectrum, dB per octave, at most 0."""
    level: float
    """Of the speech, dB below full scale."""
    response: tuple[float, ...]
    """The microphone's: weights of cosines, dB."""


def draw_room(generator: np.random.Generator, colour: float = 1.5, close: bool = False) -> Room:
    """Draw a room.

    Arguments
    ---------
    generator : numpy.random.Generator
        Where chance comes from.
    colour : float
        Standard deviation of the weights of a microphone's response, dB.
    close : bool
        Whether the microphone is at the mouth: little echo and noise.

    Returns
    -------
    Room
    """
    direct, snr = ((12.0, 22.0), (25.0, 40.0)) if close else ((0.0, 14.0), (10.0, 35.0))
    return Room(
        int(generator.integers(2**31)),
        float(generator.uniform(0.15, 0.6)),
        float(generator.uniform(*direct)),
        float(generator.uniform(*snr)),
        float(generator.uniform(-6.0, 0.0)),
        float(generator.normal(-26.0, 3.0)),
        tuple(generator.normal(0.0, colour, len(_COSINES)).tolist()),
    )


def record(
    speech: np.ndarray, speaker: Speaker, delivery: Delivery, room: Room, generator: np.random.Generator
) -> np.ndarray:
    """Turn what espeak-ng said into a recording.

    Everything linear is one product of spectra: the change of the sample rate, the
    vocal tract's length, the spectral tilt, the echo, the microphone. Noise runs
    through the whole recording, also the 0.1 to 0.5 s before and after the speech.

    Arguments
    ---------
    speech : numpy.ndarray
        int16 (samples,), at 22,050 Hz.
    speaker : Speaker
        Whose vocal tract and tilt it gets.
    delivery : Delivery
        Gain and tilt of the utterance.
    room : Room
        Where it is recorded.
    generator : numpy.random.Generator
        For the noise and the silences.

    Returns
    -------
    numpy.ndarray
        int16 (samples,), at 16,000 Hz, never clipped.
    """
    before, after = generator.uniform(0.1, 0.5, 2)
    echo = _echo(room)
    lead = round(before * _espeak.SAMPLE_RATE)
    spoken = math.ceil((lead + len(speech)) * speaker.tract / _ESPEAK_BLOCK)
    samples = spoken + round(after * SAMPLE_RATE)
    # so long that the echo does not wrap round
    blocks = _quick_length(math.ceil((samples + len(echo)) / speaker.tract))

    padded = np.zeros(blocks * _ESPEAK_BLOCK)
    padded[lead : lead + len(speech)] = speech
    length = blocks * speaker.tract
    bins = np.arange(length // 2 + 1) * (SAMPLE_RATE / length)
    timbre = (speaker.tilt + delivery.tilt) * _OCTAVES + np.asarray(room.response) @ _COSINES
    spectrum = np.fft.rfft(padded)[: len(bins)] * np.fft.rfft(echo, length) * _gains(timbre, bins)
    voice = np.fft.irfft(spectrum, length)[:samples]

    hiss = np.fft.rfft(generator.standard_normal(length)) * _gains(room.slope * _OCTAVES, bins)
    noise = np.fft.irfft(hiss, length)[:samples]

    reference = _rms(voice[round(lead * speaker.tract / _ESPEAK_BLOCK) : spoken])
    level = 10.0 ** ((room.level + delivery.gain) / 20.0)
    noise *= 10.0 ** ((room.level - room.snr) / 20.0) / _rms(noise)
    recording = voice * (level / reference) + noise
    recording *= min(1.0, 0.9 / np.abs(recording).max())
    return np.round(recording * 32767.0).astype(np.int16)


def _echo(room: Room) -> np.ndarray:
    """The impulse response: the direct sound, then noise that dies away from some milliseconds after it."""
    generator = np.random.default_rng(room.seed)
    length = round(room.reverberation * SAMPLE_RATE)
    response = generator.standard_normal(length) * 10.0 ** (-3.0 * np.arange(length) / length)
    response[: round(generator.uniform(0.002, 0.008) * SAMPLE_RATE)] = 0.0
    response *= 10.0 ** (-room.direct / 20.0) / np.linalg.norm(response)
    response[0] = 1.0
    return response


def _gains(decibels: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Factors at some frequencies, for a response in dB on the grid."""
    return np.interp(bins, _GRID, 10.0 ** (decibels / 20.0) * _BAND_LIMIT)


def _rms(signal: np.ndarray) -> float:
    return max(float(np.sqrt(np.mean(signal * signal))), 1e-9)


def _quick_length(least: int) -> int:
    """The least number from there on whose prime factors are 2, 3 and 5."""
    while True:
        rest = least
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return least
        least += 1
