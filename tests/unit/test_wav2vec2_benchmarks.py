"""The benchmarks of wav2vec 2.0 run, and say what they measured; their figures are not judged here."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A benchmark as a module."""
    specification = importlib.util.spec_from_file_location(f"benchmark_of_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_quantizer_and_loss_are_compared_part_by_part(monkeypatch, capsys):
    benchmark = load("wav2vec2_loss")
    # a fresh process for each would take seconds to import PyTorch
    monkeypatch.setattr(benchmark, "measure_memory", benchmark.extra_megabytes)
    benchmark.main(["--frames", "40", "--utterances", "2", "--repeats", "1"])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:3] for line in printed.splitlines() if line.startswith("| ")][1:]
    parts = [("quantizer", "SpeechBrain"), ("quantizer", "speechbrain_bestrq"), ("loss", "SpeechBrain")]
    assert [tuple(cell.strip() for cell in row) for row in rows] == [*parts, ("loss", "speechbrain_bestrq")]
    assert re.search(r"^both: [\d.]+ times the speed, [\d.-]+ times less memory\.$", printed, re.MULTILINE)


def test_our_loss_in_the_benchmark_is_of_as_many_frames_as_theirs():
    masked = load("wav2vec2_loss").mask_half(4, 1600)
    assert masked.count == 1600 and masked.mask.sum(1).tolist() == [400] * 4


def test_the_two_methods_are_compared_on_the_same_audio(capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    generator = torch.get_rng_state()
    words = ["--sizes", "small", "--seconds", "1", "--utterances", "1", "--blocks", "1"]
    load("pretraining_cost").main(words)
    torch.set_rng_state(generator)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["bestrq_small", "wav2vec2_small"]
    assert [row[1] for row in rows[1:]] == ["4.4 M", "5.7 M"]
    assert float(rows[2][3]) > 2 * float(rows[1][3]) > 0
    assert re.search(r"^small: BEST-RQ hears [\d.]+ times .* 2.4 times in the paper\.$", printed, re.MULTILINE)


@pytest.mark.parametrize("name", ["wav2vec2_loss", "pretraining_cost"])
def test_wrong_settings_are_refused(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(SystemExit):
        load(name).main(["--utterances", "0"])
    assert "at least one utterance" in capsys.readouterr().err
