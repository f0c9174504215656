"""A report as blocks, which become Markdown or one page of HTML that needs nothing else."""

import base64
import html
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Text:
    """Words, with a link to a file beside the report if one is given; faint ones are no figures of ours."""

    words: str
    link: str | None = None
    faint: bool = False


@dataclass(frozen=True)
class Heading:
    """The beginning of a section."""

    words: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Sentences."""

    words: str


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table; a cell is a line of texts. Notes, where there are some, stand with the heads."""

    heads: tuple[str, ...]
    rows: tuple[tuple[tuple[Text, ...], ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG, and what it shows."""

    path: Path
    words: str


@dataclass(frozen=True)
class Code:
    """Lines as they are."""

    words: str


Block = Heading | Paragraph | Items | Grid | Picture | Code

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --link: #0b6bcb; }
@media (prefers-color-scheme: dark) { :root { --link: #7cb8ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .35rem .45rem; text-align: left; vertical-align: top; }
th { background: var(--soft); font-weight: 600; }
td span { display: block; }
td a, td .faint { display: block; min-width: 6.3rem; }
p, li { overflow-wrap: anywhere; }
th small { display: block; font-weight: 400; }
tbody th { position: sticky; left: 0; background: Canvas; min-width: 7rem; }
.faint { opacity: .6; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .85rem; }
figure { margin: 1.5rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; background: #fff; }
@media (max-width: 48rem) { img { max-width: none; width: 48rem; } figcaption { position: sticky; left: 0; } }
figcaption { font-size: .9rem; opacity: .8; }
"""


def to_markdown(title: str, blocks: list[Block], folder: Path) -> str:
    """Write blocks as Markdown.

    Arguments
    ---------
    title : str
    blocks : list of Block
    folder : Path
        Where the file is to lie: links and pictures are given relative to it.

    Returns
    -------
    str

    Example
    -------
    >>> print(to_markdown("A report", [Paragraph("1 < 2.")], Path(".")), end="")
    # A report
    <BLANKLINE>
    1 < 2.
    """
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(words, level):
                parts.append(f"{'#' * level} {words}")
            case Paragraph(words):
                parts.append(words)
            case Items(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Grid(heads, rows, notes):
                noted = [f"{head} ({note})" if note else head for head, note in _noted(heads, notes)]
                lines = [f"| {' | '.join(map(_bar, noted))} |", f"|{'---|' * len(heads)}"]
                for row in rows:
                    cells = ("<br>".join(_markdown_text(text) for text in cell) for cell in row)
                    lines.append(f"| {' | '.join(cells)} |")
                parts.append("\n".join(lines))
            case Picture(path, words):
                parts.append(f"![{words}]({path.relative_to(folder)})")
            case Code(words):
                parts.append("\n".join(f"    {line}" for line in words.splitlines()))
    return "\n\n".join(parts) + "\n"


def _noted(heads: tuple[str, ...], notes: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(heads, notes or [""] * len(heads), strict=True))


def _bar(words: str) -> str:
    return words.replace("|", "\\|")


def _markdown_text(text: Text) -> str:
    return _bar(text.words) if text.link is None else f"[{_bar(text.words)}]({text.link})"


def to_html(title: str, blocks: list[Block]) -> str:
    """Write blocks as one page of HTML, with its style and its pictures in it.

    Arguments
    ---------
    title : str
    blocks : list of Block

    Returns
    -------
    str

    Example
    -------
    >>> page = to_html("A report", [Paragraph("1 < 2."), Heading("More")])
    >>> "<p>1 &lt; 2.</p>" in page, "<h2>More</h2>" in page, "http" in page
    (True, True, False)
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for block in blocks:
        match block:
            case Heading(words, level):
                parts.append(f"<h{level}>{html.escape(words)}</h{level}>")
            case Paragraph(words):
                parts.append(f"<p>{html.escape(words)}</p>")
            case Items(items):
                parts.append(f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>")
            case Grid(heads, rows, notes):
                parts.append(_html_table(_noted(heads, notes), rows))
            case Picture(path, words):
                data = base64.b64encode(path.read_bytes()).decode()
                said = html.escape(words)
                picture = f'<img src="data:image/png;base64,{data}" alt="{said}">'
                parts.append(f"<figure>{picture}<figcaption>{said}</figcaption></figure>")
            case Code(words):
                parts.append(f"<pre>{html.escape(words)}</pre>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_table(heads: list[tuple[str, str]], rows: tuple[tuple[tuple[Text, ...], ...], ...]) -> str:
    head = "".join(
        f"<th>{html.escape(words)}{f'<small>{html.escape(note)}</small>' if note else ''}</th>" for words, note in heads
    )
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{_html_texts(cell)}</td>" for cell in others)
        lines.append(f"<tr><th>{_html_texts(first)}</th>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _html_texts(texts: tuple[Text, ...]) -> str:
    return "".join(f"<span{' class=faint' if text.faint else ''}>{_html_text(text)}</span>" for text in texts)


def _html_text(text: Text) -> str:
    # an interval stays in one line
    words = html.escape(re.sub(r"\([^)]*\)", lambda found: found[0].replace(" ", "\u00a0"), text.words))
    return words if text.link is None else f'<a href="{html.escape(text.link, quote=True)}">{words}</a>'


#: Characters of a column of :func:`to_text`, at most.
_COLUMN = 22


def to_text(title: str, blocks: list[Block], width: int) -> str:
    """Write blocks for a terminal: tables in parts that fit, no links.

    Arguments
    ---------
    title : str
    blocks : list of Block
    width : int
        Characters of a line.

    Returns
    -------
    str

    Example
    -------
    >>> rows = tuple(((Text(name),), (Text("1.00", "a.json"),), (Text("2.00"),)) for name in ("one", "another"))
    >>> print(to_text("A report", [Grid(("", "WER", "EER"), rows, ("", "LibriSpeech", ""))], 20), end="")
    A report
    ========
    <BLANKLINE>
             WER   EER
    one      1.00  2.00
    another  1.00  2.00
    WER: LibriSpeech
    """
    parts = [f"{title}\n{'=' * len(title)}"]
    for block in blocks:
        match block:
            case Heading(words):
                parts.append(f"{words}\n{'-' * len(words)}")
            case Paragraph(words):
                parts.append(textwrap.fill(words, width))
            case Items(items):
                parts.append("\n".join(textwrap.fill(f"- {item}", width, subsequent_indent="  ") for item in items))
            case Grid(heads, rows, notes):
                parts.append(_text_tables(_noted(heads, notes), rows, width))
            case Picture(path, words):
                parts.append(textwrap.fill(f"{words} {path.name}", width))
            case Code(words):
                parts.append(textwrap.indent(words, "    "))
    return "\n\n".join(parts) + "\n"


def _text_tables(heads: list[tuple[str, str]], rows: tuple[tuple[tuple[Text, ...], ...], ...], width: int) -> str:
    cells = [[textwrap.wrap(words, _COLUMN) for words, _ in heads]]
    cells += [[[line for text in cell for line in textwrap.wrap(text.words, _COLUMN)] for cell in row] for row in rows]
    widths = [max((len(line) for row in cells for line in row[place]), default=0) for place in range(len(heads))]
    tables, rest = [], list(range(1, len(heads)))
    while rest or not tables:
        shown = [0, *rest[:1]]
        while (
            len(shown) <= len(rest) and sum(widths[place] + 2 for place in [*shown, rest[len(shown) - 1]]) - 2 <= width
        ):
            shown.append(rest[len(shown) - 1])
        rest = rest[len(shown) - 1 :]
        lines = []
        for row in cells:
            for number in range(max(len(row[place]) for place in shown)):
                line = (row[place][number] if number < len(row[place]) else "" for place in shown)
                lines.append(
                    "  ".join(f"{words:{widths[place]}}" for words, place in zip(line, shown, strict=True)).rstrip()
                )
        tables.append("\n".join(lines))
    notes: dict[str, list[str]] = {}
    for words, note in heads:
        if note:
            notes.setdefault(note, []).append(words)
    told = [textwrap.fill(f"{', '.join(words)}: {note}", width) for note, words in notes.items()]
    return "\n".join(["\n\n".join(tables), *told])
