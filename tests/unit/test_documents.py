"""What the documents link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "recipes", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_links_to_is_there(page):
    # code is no link
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_test_that_a_page_names_is_there():
    """A name that ends in three dots is the beginning of one."""
    known = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))))
    named = {name for page in PAGES for name in re.findall(r"(?:::|`)(test_\w+(?:\.\.\.)?)", page.read_text())}
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 50
    for name in named - files:
        beginning = name.removesuffix("...")
        assert name in known or (name.endswith("...") and any(one.startswith(beginning) for one in known)), name
