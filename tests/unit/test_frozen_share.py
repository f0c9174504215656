"""The benchmark of frozen against fine-tuned steps runs, and says what it measured; its figures are not judged here."""

from pathlib import Path

import pytest

SMALL = ["--d_model", "16", "--layers", "2", "--batch", "1", "--seconds", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def benchmark(load_script):
    """The benchmark as a module."""
    return load_script(Path(__file__).parents[2] / "benchmarks" / "frozen_share.py")


def test_it_prints_a_row_for_each_kind_of_step_and_writes_only_what_it_is_told(
    benchmark, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    benchmark.main([*SMALL, "--output", "table.md"])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["head alone", "frozen", "1 of 2 layers frozen", "fine-tuned"]
    assert all(float(row[1]) > 0 for row in rows[2:]) and all(row[4].endswith(" %") for row in rows[3:])
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == printed


@pytest.mark.parametrize(
    "words, message",
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--seconds", "0"], "--seconds must be from 0.5 to 600"),
        (["--source", "/no/where"], "/no/where is no folder"),
    ],
)
def test_wrong_settings_are_refused(benchmark, capsys, words, message):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert message in capsys.readouterr().err
