"""The linear probe of the synthetic corpora: it measures what it says."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "synthetic_probe.py"
    specification = importlib.util.spec_from_file_location("synthetic_probe", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_probe_finds_what_is_linear_and_nothing_in_noise(benchmark):
    torch = benchmark.torch
    torch.manual_seed(0)
    labels = ["one", "two", "three", "four"] * 100
    folds = [number // 200 for number in range(400)]
    inputs = torch.randn(400, 8)
    chance, accuracy, tested = benchmark.probe(inputs, labels, folds)
    assert (chance, tested) == (0.25, 200) and 0.15 < accuracy < 0.35
    inputs[:, :4] += 6.0 * torch.eye(4).repeat(100, 1)
    assert benchmark.probe(inputs, labels, folds)[1] > 0.97


def test_the_mean_of_every_speaker_is_taken_off(benchmark):
    inputs = benchmark.torch.tensor([[1.0, 5.0], [3.0, 5.0], [10.0, 0.0]])
    relative = benchmark.without_speaker(inputs, ["one", "one", "two"])
    assert relative.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_the_benchmark_prints_a_row_for_each_task(benchmark, tmp_path, capsys):
    benchmark.main(["--folder", str(tmp_path), "--hours", "0.01", "--speakers", "2"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["speaker", "emotion", "intent"]
    for row in rows[2:]:
        chance, *accuracies = (float(field.removesuffix(" % ")) for field in row[3:] if field.strip())
        assert int(row[2]) >= 4 and 0.0 < chance <= 100.0 and all(0.0 <= found <= 100.0 for found in accuracies)
        assert len(accuracies) == (1 if row[0].strip() == "speaker" else 2)
