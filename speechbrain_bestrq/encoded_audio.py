"""Which audio the hidden states in a folder were made of, so that those of other audio are not taken for them."""

import json
from pathlib import Path

#: In the output folder, a line for each file of hidden states.
AUDIO_FILE = "encoded.jsonl"


class EncodedAudio:
    """The list of a folder: of each output, the name, size and time of its audio file.

    Arguments
    ---------
    folder : Path
        The output folder. What an earlier call has written there is read; a line that a kill has torn counts as none.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> with EncodedAudio(folder) as encoded:
    ...     encoded.add("a.npy", "a.wav", (32044, 1700000000000000000))
    >>> EncodedAudio(folder).is_of("a.npy", "a.wav", (32044, 1700000000000000000))
    True
    >>> EncodedAudio(folder).is_of("a.npy", "a.flac", (32044, 1700000000000000000))
    False
    """

    def __init__(self, folder: Path):
        self.path = folder / AUDIO_FILE
        self._known: dict[str, int] = {}  # a hash each: there may be millions
        self._torn = False
        try:
            with open(self.path, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    self._torn = not line.endswith("\n")
                    try:
                        output, *known = json.loads(line)
                        if known:
                            self._known[output] = hash(tuple(known))
                        else:  # was taken back
                            self._known.pop(output, None)
                    except (ValueError, TypeError):
                        continue
        except FileNotFoundError:
            pass
        self._file = None

    def has(self, output: str) -> bool:
        """Whether an output is there, of whatever audio."""
        return output in self._known

    def is_of(self, output: str, name: str, identity: tuple[int, int]) -> bool:
        """Whether an output was made of an audio file of that name, size and time."""
        return self._known.get(output) == hash((name, *identity))

    def __enter__(self) -> "EncodedAudio":
        """Begin to write."""
        self._file = open(self.path, "a", encoding="utf-8")
        if self._torn:
            self._file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._file.close()

    def begin(self, output: str) -> None:
        """Before an output is written again: from now on it is of no audio, until it is added."""
        if self._known.pop(output, None) is not None:
            self._write([output])

    def add(self, output: str, name: str, identity: tuple[int, int]) -> None:
        """After an output has been written."""
        self._known[output] = hash((name, *identity))
        self._write([output, name, *identity])

    def _write(self, line: list) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
