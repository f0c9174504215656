"""Speaks with espeak-ng: the program that ``_espeak.py`` starts, on the standard library alone.

espeak-ng is not re-entrant and carries state from one utterance to the next (random numbers, flutter, echo). Here each
utterance is spoken by a fork of a process that has never spoken: its audio depends on the request and on nothing else.
"""

import ctypes
import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

SYNCHRONOUS, DONT_EXIT = 2, 0x8000
UTF8, END_PAUSE = 1, 0x1000
PARAMETERS = {"rate": 1, "volume": 2, "pitch": 3, "range": 4}


def load(library: str, data: str) -> ctypes.CDLL:
    """Load and initialise the library; exit with one line if that fails."""
    speech = ctypes.CDLL(library)
    # its buffers for paths are short: a long one would be cut off
    os.chdir(data)
    rate = speech.espeak_Initialize(SYNCHRONOUS, 0, b".", DONT_EXIT)
    if rate <= 0:
        sys.exit(f"espeak-ng finds no data in {data}")
    sys.stdout.buffer.write(struct.pack("<i", rate))
    sys.stdout.buffer.flush()
    return speech


def speak(speech: ctypes.CDLL, request: dict[str, Any]) -> bytes:
    """Speak one utterance: 16-bit samples, empty if the voice is not there."""
    chunks: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    # two sources of random numbers: its own, which takes 0 for the time of day, and the C library's
    speech.espeak_ng_SetRandSeed(ctypes.c_long(request["seed"] | 1))
    ctypes.CDLL(None).srand(ctypes.c_uint(request["seed"]))
    if speech.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        return b""
    for name, number in PARAMETERS.items():
        speech.espeak_SetParameter(number, request[name], 0)
    speech.espeak_SetSynthCallback(collect)
    text = request["text"].encode() + b"\0"
    speech.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 0, 0, UTF8 | END_PAUSE, None, None)
    return b"".join(chunks)


def answer(output: BinaryIO, samples: bytes) -> None:
    """Write the length in bytes, then the samples."""
    output.write(struct.pack("<i", len(samples)) + samples)
    output.flush()


def main(library: str, data: str) -> None:
    """Answer each line of the standard input, a request in JSON, until it ends."""
    # Ctrl-C reaches the whole group: whoever started this ends it by closing its input
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    speech = load(library, data)
    for line in sys.stdin.buffer:
        process = os.fork()
        if not process:
            try:
                answer(sys.stdout.buffer, speak(speech, json.loads(line)))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
        if status:
            answer(sys.stdout.buffer, b"")


if __name__ == "__main__":
    main(*sys.argv[1:])
