"""Speech by espeak-ng: one process beside this one that speaks what it is asked to."""

import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speechbrain_bestrq.errors import InputError

SAMPLE_RATE = 22050
"""Hz. What espeak-ng gives."""

# Above this, the louder voices are cut off at 16 bits.
_VOLUME = 60

_SERVER = Path(__file__).with_name("_espeak_server.py")


class Request(NamedTuple):
    """One utterance, in espeak-ng's own units."""

    text: str
    """What is said."""
    voice: str
    """Language and variant, such as ``en-us+f2``."""
    rate: int
    """Words a minute, 80 to 450."""
    pitch: int
    """0 to 99; 50 is the variant's own."""
    range: int
    """Of the pitch, 0 (monotonous) to 99; 50 is usual."""
    seed: int
    """For breath and roughness, below 2**31."""


def find_library() -> tuple[str, str]:
    """Find espeak-ng.

    Returns
    -------
    library : str
        Path of the shared library.
    data : str
        Path of the folder with its voices.

    Raises
    ------
    InputError
        If the package that carries it is not installed.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise InputError(
            "synthetic speech needs espeak-ng, a package of its own for its licence (GPL): pip install espeakng-loader."
        ) from error
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


class Espeak:
    """A speaker of English, in a process of its own; to be used in a ``with`` statement, by one thread at a time.

    What it says depends on the request alone, not on what it said before: see
    ``_espeak_server.py``.

    Raises
    ------
    InputError
        If espeak-ng is not installed, or cannot be loaded on this machine.
    """

    def __init__(self) -> None:
        # -I -S: nothing of the user's environment, and a start within 0.1 s
        command = [sys.executable, "-I", "-S", str(_SERVER), *find_library()]
        # complaints go to a file: nobody reads a pipe, which would fill up in the end
        with tempfile.TemporaryFile() as complaints:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints)
            greeting = self._process.stdout.read(4)
            if greeting == struct.pack("<i", SAMPLE_RATE):
                return
            self._process.kill()
            self._process.communicate()
            complaints.seek(0)
            reason = complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise InputError(
                f"espeak-ng does not start ({''.join(reason) or 'without a reason'}): install espeakng-loader anew."
            )

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *exception: object) -> None:
        # it ends at the end of its input
        self._process.communicate()

    def speak(self, request: Request) -> np.ndarray:
        """Say one utterance.

        Arguments
        ---------
        request : Request
            What and how.

        Returns
        -------
        numpy.ndarray
            int16 (samples,), at 22,050 Hz.

        Raises
        ------
        RuntimeError
            If espeak-ng has no such voice, or fails.
        """
        line = json.dumps({**request._asdict(), "volume": _VOLUME}).encode() + b"\n"
        self._process.stdin.write(line)
        self._process.stdin.flush()
        header = self._process.stdout.read(4)
        count = struct.unpack("<i", header)[0] if len(header) == 4 else 0
        samples = self._process.stdout.read(count)
        if not samples or len(samples) != count:
            raise RuntimeError(f"espeak-ng could not say {request.text!r} with the voice {request.voice!r}.")
        return np.frombuffer(samples, dtype="<i2")
