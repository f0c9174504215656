"""The report's blocks: a page that fits a telephone, and text that fits a terminal."""

import re
from pathlib import Path

import pytest

from speechbrain_bestrq.reproduction.curves import PAPER_CURVE, figure_of
from speechbrain_bestrq.reproduction.document import (
    Grid,
    Heading,
    Items,
    Paragraph,
    Text,
    to_html,
    to_markdown,
    to_text,
)
from speechbrain_bestrq.run_log import CurvePoint

HEADS = ("", *(f"test-{name} WER" for name in "abcdefgh"))
ROWS = tuple(
    ((Text(f"{name}, 100,000 updates"),), *[(Text("12.34 (11.00 to 13.00)", "a.json"), Text("paper 9.99"))] * 8)
    for name in ("BEST-RQ", "wav2vec 2.0")
)
GRID = Grid(HEADS, ROWS, ("", *["a corpus"] * 8))


@pytest.mark.parametrize("width, parts", [(80, 4), (300, 1)])
def test_in_a_terminal_tables_come_in_parts_that_fit_with_every_figure_once(width, parts):
    text = to_text("A report", [Heading("Table"), Paragraph("words " * 40), Items(("item " * 40,)), GRID], width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("12.34 (11.00 to 13.00)") == 16 and text.count("paper 9.99") == 16
    assert all(text.count(f"{head}  ") + text.count(f"{head}\n") == 1 for head in HEADS[1:])
    assert text.count("BEST-RQ, 100,000") == parts
    assert " ".join(text.split()).endswith("test-h WER: a corpus") and "a.json" not in text


def test_on_a_page_an_interval_stays_in_one_line_and_a_corpus_stands_under_its_score():
    page = to_html("A report", [GRID])
    assert "12.34 (11.00\u00a0to\u00a013.00)" in page and "<th>test-a WER<small>a corpus</small></th>" in page
    assert "| test-a WER (a corpus) |" in to_markdown("A report", [GRID], Path("."))
    assert not re.search("white-space: nowrap", page)


def lines_of(corpora, longest):
    points = [CurvePoint(step, step / 5, step / 100, 5.0, 1.0, 0.1, 0.02) for step in (longest // 2, longest)]
    figure, words = figure_of({"BEST-RQ": points}, corpora)
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    return drawn, words


def test_curves_go_over_updates_and_hours():
    (updates, audio, device), _ = lines_of({"my own"}, 100)
    assert updates["BEST-RQ"] == [[50, 10], [100, 10]]
    assert audio["BEST-RQ"] == [[10, 10], [20, 10]] and device["BEST-RQ"] == [[0.5, 10], [1, 10]]


@pytest.mark.parametrize("corpora", [{"LibriSpeech"}, {"LibriSpeech", "other"}, {"LibriSpeech + my own"}, {None}])
def test_the_papers_curve_stands_beside_those_of_librispeech_only(corpora):
    (updates, audio, device), words = lines_of(corpora, 200000)
    paper = "BEST-RQ in the paper, 8192 codes"
    shown = corpora == {"LibriSpeech"}
    assert (paper in updates, paper in audio, paper in device, "Dashed: the paper's" in words) == (
        *[shown] * 2,
        False,
        shown,
    )
    if shown:
        assert updates[paper][0] == [4762, 12.5] and updates[paper][-1] == [200000, 18.6]
        assert audio[paper][-1] == [42 * 960, 18.6] and len(updates[paper]) == len(PAPER_CURVE)


def test_of_the_papers_curve_no_more_is_drawn_than_of_ours():
    (updates, *_), _ = lines_of({"LibriSpeech"}, 50000)
    assert [place for place, _ in updates["BEST-RQ in the paper, 8192 codes"]] == [4762, 23810, 47619]
