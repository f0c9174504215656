"""What the parts of gpu_session.py share: their settings, where they write what they found, and commands they run."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from speechbrain_bestrq.writing import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
#: Lines of a log that are told of a failure, and their length at most.
LAST_LINES, LINE_LENGTH = 3, 160


@dataclass
class Settings:
    """What a part has to know.

    Arguments
    ---------
    device : str
        "cuda", or "cpu" for the rehearsal.
    toy : bool
        Small models and little audio.
    output : str
        Folder of what is kept.
    work : str
        Folder of what is not: corpora, runs.
    data : dict
        "train": folder to pre-train on; "corpus": librispeech or folder; "extra": further folders;
        "librispeech", "voxceleb", "iemocap", "slurp": to probe on. Those that were given.
    sizes : list of str
        Of the models whose quality is compared.
    """

    device: str
    toy: bool
    output: str
    work: str
    data: dict[str, Any] = field(default_factory=dict)
    sizes: list[str] = field(default_factory=lambda: ["base"])

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Read what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write them for another process."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")


class Findings:
    """What a part has found so far, in a file after each addition: the part may be stopped.

    Arguments
    ---------
    path : Path
        The file.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.rows: list[dict[str, Any]] = []
        self.sections: dict[str, str] = {}
        self.figures: dict[str, Any] = {}

    def row(self, what: str, outcome: str, good: bool | None = None) -> None:
        """Set a line of the short table; ``good`` is None of what is measured and not judged."""
        new = {"what": what, "outcome": outcome, "good": good}
        with self.lock:
            place = next((number for number, row in enumerate(self.rows) if row["what"] == what), len(self.rows))
            self.rows[place:] = [new, *self.rows[place + 1 :]]
        self.save()

    def section(self, title: str, text: str) -> None:
        """Set a section of the Markdown file."""
        self.sections[title] = text
        self.save()

    def save(self) -> None:
        """Write all."""
        with self.lock:
            found = {"rows": self.rows, "sections": self.sections, "figures": self.figures}
            write_text(self.path, json.dumps(found, indent=1) + "\n")


@dataclass
class Outcome:
    """How a command ended."""

    status: int | None
    """None: it was stopped when its time was over."""
    seconds: float
    log: Path

    def last_words(self) -> str:
        """The end of its log, on one line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(line.strip()[:LINE_LENGTH] for line in [one for one in lines if one.strip()][-LAST_LINES:])

    def failure(self) -> str:
        """Say in a line how it failed."""
        how = f"stopped after {self.seconds:.0f} s" if self.status is None else f"exit status {self.status}"
        return f"{how}: {self.last_words()}"


def run_command(
    words: Sequence[str],
    folder: Path,
    log: Path,
    seconds: float,
    watch: Callable[[subprocess.Popen], None] = lambda process: None,
) -> Outcome:
    """Run a command and keep what it prints.

    Arguments
    ---------
    words : sequence of str
    folder : Path
        To run it in.
    log : Path
        Gets its output, after what is there.
    seconds : float
        Then it is asked to end, and killed 5 s later.
    watch : callable
        Called several times a second with the process.

    Returns
    -------
    Outcome
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status = None
    with open(log, "ab") as file:
        process = subprocess.Popen(list(words), cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        try:
            while status is None and time.monotonic() - started < seconds:
                watch(process)
                try:
                    status = process.wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return Outcome(status, time.monotonic() - started, log)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Put rows into a Markdown table.

    Example
    -------
    >>> print(markdown_table(["a", "b"], [["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x/y |
    """
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)
