"""The benchmarks run, and say what they measured; their figures are not judged here."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark of the quantizer, which measures memory in the process of the test."""
    specification = importlib.util.spec_from_file_location("benchmark_of_quantizer", FOLDER / "quantizer.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    # a fresh process for each would take seconds to import PyTorch
    monkeypatch.setattr(module, "measure_memory", module.extra_megabytes)
    return module


SMALL = ["--frames", "40", "--codes", "64", "--repeats", "2"]


def test_the_quantizers_benchmark_prints_a_table_and_writes_only_what_it_is_told(
    benchmark, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    benchmark.main(SMALL)
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == ["SpeechBrain", "speechbrain_bestrq"]
    assert "40 frames, 64 codes; 2 repeats" in printed
    assert "Equal labels: 100.00 %" in printed
    assert list(tmp_path.iterdir()) == []
    benchmark.main([*SMALL, "--output", "table.md"])
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message", [(["--frames", "0"], "--frames must be at least 1"), (["--device", "tpu"], "invalid choice")]
)
def test_wrong_settings_are_refused(benchmark, capsys, words, message):
    with pytest.raises(SystemExit):
        benchmark.main(words)
    assert message in capsys.readouterr().err


def test_a_file_is_never_overwritten(benchmark, capsys, tmp_path):
    kept = tmp_path / "table.md"
    kept.write_text("kept")
    with pytest.raises(SystemExit):
        benchmark.main([*SMALL, "--output", str(kept)])
    assert "exists already" in capsys.readouterr().err
    assert kept.read_text() == "kept"
