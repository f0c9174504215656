"""The benchmarks of wav2vec 2.0 run, and say what they measured; their figures are not judged here."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

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
    assert [row[:3] for row in rows[1:]] == [["bestrq_small", "fp32", "4.4 M"], ["wav2vec2_small", "fp32", "5.7 M"]]
    assert float(rows[2][4]) > 2 * float(rows[1][4]) > 0
    assert re.search(r"^small, fp32: BEST-RQ hears [\d.]+ times .* 2.4 times in the paper\.$", printed, re.MULTILINE)


def test_precisions_are_compared_in_turns(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    cost, turns = load("pretraining_cost"), []
    speeds = {("bestrq", "fp32"): 6, ("wav2vec2", "fp32"): 2, ("bestrq", "bf16"): 12, ("wav2vec2", "bf16"): 3}

    class Timed(SimpleNamespace):
        def __init__(self, name, waveforms, device, precision, folder):
            speed = speeds[name, precision]
            super().__init__(name=name, device=device, precision=precision, speed=speed, parameters=1, memory=0.0)
            self.flops, self.audio_seconds, self.seconds = 60.0 / speed, 6.0, [6.0 / speed]

        def block(self):
            turns.append((self.name, self.precision))

    monkeypatch.setattr(cost, "Timed", Timed)
    monkeypatch.setattr(cost, "matrix_product_flops", lambda device, precision: 20.0)
    rows, lines = cost.compare("base", [], SimpleNamespace(device="cpu", precisions=["fp32", "bf16"], blocks=2))
    assert turns == 2 * list(speeds)
    told = [row.split(" | ")[3] for row in rows]
    assert told == [f"{speed:.1f} ({speed:.1f} - {speed:.1f})" for speed in speeds.values()]
    assert lines[0].startswith("base, fp32: BEST-RQ hears 3.00 times the audio")
    assert lines[1].startswith("base, bf16: BEST-RQ hears 4.00 times the audio")
    assert lines[2:] == ["base, bf16 against fp32: 2.00 times the speed for BEST-RQ, 1.50 times for wav2vec 2.0."]


@pytest.mark.parametrize("name", ["wav2vec2_loss", "pretraining_cost"])
def test_wrong_settings_are_refused(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(SystemExit):
        load(name).main(["--utterances", "0"])
    assert "at least one utterance" in capsys.readouterr().err
