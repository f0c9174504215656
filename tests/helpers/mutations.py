"""Mutations: the one-line faults that tests of traps name in their docstrings, found, applied."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_ONE = re.compile(
    r"in (?P<file>[\w./]+)(?:, (?P<place>[\w.]+))?, "
    r"(?:(?P<side>before|after) )?``(?P<old>.+?)`` (?:->|add) ``(?P<new>.+?)``"
)


@dataclass(frozen=True)
class Mutation:
    """A change of one place of the code that brings a fault back.

    A docstring writes them, after "Mutation:" or "Mutations:" and apart by semicolons, as

        in FILE, PLACE, ``this`` -> ``that``
        in FILE, PLACE, before ``this`` add ``a line``
        in FILE, PLACE, after ``this`` add ``a line``

    with FILE in the package, or from the top of the checkout where it has a folder or lies there, and PLACE, which may
    be left out, a function or a method. ``this`` is there once.
    """

    file: str
    place: str | None
    side: str | None
    old: str
    new: str

    @property
    def path(self) -> Path:
        """Of the file, from the top of the checkout."""
        return Path(self.file) if (ROOT / self.file).is_file() else Path("speechbrain_bestrq") / self.file

    def apply(self, text: str) -> str:
        """Change the text of the file; raises ValueError if what is to be changed is not there, or more than once."""
        start, end = (0, len(text)) if self.place is None else _span(text, self.place)
        pattern = re.escape(self.old).replace(r"\ ", r"\s+")
        found = [match for match in re.finditer(pattern, text) if start <= match.start() and match.end() <= end]
        if len(found) != 1:
            raise ValueError(f"{self.path}, {self.place}: {self.old!r} is there {len(found)} times.")
        first, last = found[0].span()
        if self.side is None:
            return text[:first] + self.new + text[last:]
        line = text.rfind("\n", 0, first) + 1
        indentation = re.match(r" *", text[line:]).group()
        place = line if self.side == "before" else text.index("\n", last) + 1
        return f"{text[:place]}{indentation}{self.new}\n{text[place:]}"


def read_mutations(docstring: str) -> list[Mutation]:
    """Read the mutations of a docstring; raises ValueError if one cannot be made out."""
    _, word, told = " ".join(docstring.split()).partition("Mutation")
    if not word:
        raise ValueError("no mutation is named.")
    told = told.partition(":")[2].strip()
    mutations = [Mutation(**match.groupdict()) for match in _ONE.finditer(told)]
    left = _ONE.sub("", told).strip(" ;.")
    if left:
        raise ValueError(f"this is no mutation: {left!r}.")
    return mutations


def trap_docstrings() -> dict[str, str]:
    """Find the tests of traps, "tests/traps/FILE::TEST", and their docstrings."""
    found = {}
    for path in sorted((ROOT / "tests" / "traps").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"{path.relative_to(ROOT)}::{node.name}"] = ast.get_docstring(node) or ""
    return found


def _span(text: str, place: str) -> tuple[int, int]:
    """Where a function or method begins and ends in a text."""
    body = ast.parse(text).body
    for part in place.split("."):
        node = next((one for one in body if getattr(one, "name", None) == part), None)
        if node is None:
            raise ValueError(f"there is no {place}.")
        body = getattr(node, "body", [])
    lines = text.splitlines(keepends=True)
    return len("".join(lines[: node.lineno - 1])), len("".join(lines[: node.end_lineno]))
