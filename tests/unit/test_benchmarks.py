"""The benchmarks run, and say what they measured; their figures are not judged here."""

import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from speechbrain_bestrq.accounting import JsonLines
from speechbrain_bestrq.checkpointing import AtomicCheckpointer

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name):
    """A benchmark as a module."""
    specification = importlib.util.spec_from_file_location(f"benchmark_of_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark of the quantizer, which measures memory in the process of the test."""
    module = load("quantizer")
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


@pytest.fixture
def step_benchmark(monkeypatch):
    """The benchmark of the training step, which imports its neighbour."""
    monkeypatch.syspath_prepend(FOLDER)
    return load("pretrain_step")


TINY = "--size small --utterances 2 --steps 2 --repeats 2".split()


def test_the_steps_benchmark_compares_all_contenders_on_the_same_audio(step_benchmark, capsys, tmp_path):
    output = tmp_path / "results" / "cpu.md"
    step_benchmark.main([*TINY, "--seconds", "1.5", "--output", str(output)])
    text = capsys.readouterr().out
    assert output.read_text() == text
    rows = {cells[1].strip(): cells for line in text.splitlines() if (cells := line.split("|"))[0] == "" and cells[1:]}
    names = {"SpeechBrain", "ours, relative", "ours, rotary", "ours, wav2vec 2.0", "transformers, wav2vec 2.0"}
    assert names <= rows.keys()
    assert rows["SpeechBrain"][5].strip() == "1.00"
    measured = json.loads(output.with_suffix(".json").read_text())["measurements"]
    assert {one["contender"] for one in measured} == names
    for one in measured:
        assert one["audio_seconds"] == 2 * 2 * 1.5
        assert len(one["block_seconds"]) == 2 and min(one["block_seconds"]) > 0
        assert 0.3 < one["mask_share"] < 0.8
        assert one["operators_per_step"] > 100 and one["megabytes_per_audio_second"] > 1


def test_each_length_has_its_table(step_benchmark, capsys, monkeypatch):
    monkeypatch.setattr(step_benchmark, "transformers_is_installed", lambda: False)
    few = ["--only", "SpeechBrain", "ours, wav2vec 2.0"]
    step_benchmark.main([*TINY, "--seconds", "1.5", "2", "--repeats", "1", "--steps", "1", *few])
    text = capsys.readouterr().out
    assert text.count("| SpeechBrain |") == 2 and "| ours, rotary" not in text
    assert [line for line in text.splitlines() if line.startswith("Utterances")] == [
        "Utterances of 1.5 s:",
        "Utterances of 2 s:",
    ]
    assert text.count("| ours, wav2vec 2.0 |") == 2 and "transformers" not in text


def test_traffic_counts_what_is_read_and_written_also_backward():
    traffic = load("traffic")
    weight = torch.ones(64, 32, requires_grad=True)
    inputs = torch.ones(16, 32)

    def compute():
        (inputs @ weight.t()).view(-1).sum().backward()

    counted = traffic.count_traffic(compute)
    products = counted.by_operator["aten::mm"]
    assert products[0] == 2  # forward, and the weight's gradient
    assert products[1] == 2 * 4 * (16 * 32 + 64 * 32 + 16 * 64) - 4 * (16 * 64 - 1)  # the sum's gradient is expanded
    assert not {"aten::view", "aten::t", "aten::detach", "aten::expand"} & counted.by_operator.keys()


def test_traffic_counts_what_a_fused_optimizer_writes():
    weight = torch.ones(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(1000)
    optimizer.step()
    counted = load("traffic").count_traffic(optimizer.step)
    # reads weight, gradient and two moments, writes all but the gradient (which fused kernels may scale, and name)
    kernels, moved = counted.by_operator["aten::_fused_adamw_"]
    assert kernels == 1 and 4 * 7000 <= moved <= 4 * 8000 + 100


def test_the_mixed_lengths_are_spread_like_librispeechs_and_have_no_padding(step_benchmark):
    arguments = step_benchmark.parse(["--seconds", "mix", "--steps", "40"])
    waveforms = step_benchmark.make_waveforms(arguments, "mix", 100.0)
    seconds = [wavs.shape[1] / 16000 for wavs in waveforms]
    assert len(set(seconds)) > 5 and min(seconds) < 8 and max(seconds) > 15
    assert all(wavs.numel() <= 100 * 16000 for wavs in waveforms)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "12", "long"], "numbers and mix, not long"),
        (["--steps", "0"], "at least 1"),
        (["--device", "cuda"], "no GPU here"),
    ],
)
def test_wrong_settings_of_the_steps_benchmark_are_refused(step_benchmark, capsys, monkeypatch, words, message):
    monkeypatch.setattr(step_benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step_benchmark.main(words)
    assert message in capsys.readouterr().err


def test_the_loaders_benchmark_reads_the_same_audio_in_all_ways(tmp_path, capsys):
    module, generator = load("loader"), np.random.default_rng(0)
    for number in range(6):
        samples = generator.integers(-9000, 9000, 16000 + 1600 * number).astype(np.int16)
        soundfile.write(tmp_path / f"{number}.flac", samples, 16000)
    threads = torch.get_num_threads()
    module.main([str(tmp_path), "--blocks", "2", "--batch_seconds", "5", "--workers", "1"])
    torch.set_num_threads(threads)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = ["one process", "bare decoding", "files", "cache", "1 workers", "files", "cache"]
    assert [row[0].strip() for row in rows] == names
    rates = [float(row[1].split("(")[0].replace(",", "")) for row in rows if "audio-s" not in row[1]]
    assert min(rates) > 0


def test_a_folder_without_audio_is_refused_by_the_loaders_benchmark(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("loader").main([str(tmp_path)])
    assert "holds no audio" in capsys.readouterr().err


def test_every_micro_batch_gets_the_same_mix_of_lengths():
    """Otherwise each contender would be shown at its best audio, not at its best micro-batch."""
    module = load("pretrain_step")
    means = []
    for seconds in (100, 400, 1600):
        arguments = module.parse(["--seconds", "mix", "--steps", "4"])
        shapes = [wavs.shape for wavs in module.make_waveforms(arguments, "mix", seconds)]
        audio = [utterances * samples for utterances, samples in shapes]
        lengths = [samples / module.RATE for _, samples in shapes]
        assert sum(audio) / module.RATE == pytest.approx(4 * seconds, rel=0.15)
        means.append(sum(size * length for size, length in zip(audio, lengths, strict=True)) / sum(audio))
    assert means == pytest.approx([14.2] * 3, rel=0.05)  # of LibriSpeech's audio


def write_run(folder, ranks=2):
    """A run of two ranks: 100 s of audio an update, 10 s each; a validation of 5 s, a checkpoint of 3 s."""
    known = {"model": "BestRQ", "parameters": 1_000_000, "precision": "fp32", "device": "CPU", "world_size": ranks}
    (folder / "run.json").write_text(json.dumps(known))
    lines, clock = [], 60.0
    for step in range(1, 6):
        clock += 10.0
        hours = {"audio_hours": step * 100 / 3600, "device_hours": ranks * clock / 3600}
        train = {"event": "train", "step": step, "audio_seconds_per_second": 10.0, "data_wait_share": 0.2}
        lines.append({**train, **hours, "saving_seconds": 2.5 if step == 4 else 0.0})
        if step == 3:
            clock += 5.0
            valid = {"event": "valid", "step": step, "seconds": 5.0}
            lines.append({**valid, **hours, "device_hours": ranks * clock / 3600})
            clock += 3.0
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_time_of_a_run_is_split_into_its_parts(tmp_path, capsys):
    write_run(tmp_path)
    load("end_to_end").main([str(tmp_path)])
    text = capsys.readouterr().out
    rows = {cells[1].strip(): cells[2:4] for line in text.splitlines() if len(cells := line.split("|")) == 5}
    expected = {"updates": 40.0, "- of them waiting for audio": 8.0, "validations": 5.0, "saving": 2.5, "the rest": 0.5}
    assert {name: float(rows[name][0]) for name in expected} == expected
    assert rows["updates"][1].strip() == "83.3%"
    assert "End to end 8.3 audio-seconds a second; in the updates alone 10.0, in their median log line 10.0." in text


def test_what_saving_takes_is_neither_training_nor_waiting(toy, tmp_path, monkeypatch):
    """Of a real run, which validates and saves at the same updates, and once more before it first validates."""
    saved, pause = [], 0.3
    save = AtomicCheckpointer.save_checkpoint

    def slow(checkpointer, *arguments, meta, **named):
        saved.append(meta["step"])
        time.sleep(pause)
        return save(checkpointer, *arguments, meta=meta, **named)

    monkeypatch.setattr(AtomicCheckpointer, "save_checkpoint", slow)
    speech = toy.write_noise(tmp_path / "train", [4.0] * 12)
    intervals = {"valid_interval": 2, "checkpoint_every": 1, "log_interval": 2}
    toy.train(tmp_path / "run", speech, speech, updates=7, epochs=1, **intervals)
    assert saved == [1, 2, 2, 3, 4, 5, 6, 7]
    parts = load("end_to_end").split(JsonLines(tmp_path / "run" / "train_log.jsonl").read(), ranks=1)
    between = 5  # of them, after the first log line and before the last, which comes before its own is saved
    assert between * pause <= parts["saving"] < between * pause + 1.0
    assert parts["waiting"] <= parts["updates"] and parts["waiting"] < pause
    assert abs(parts["rest"]) < pause


def test_a_run_without_a_log_is_refused_by_the_time_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("end_to_end").main([str(tmp_path)])
    assert "has no run.json" in capsys.readouterr().err
    write_run(tmp_path)
    first = (tmp_path / "train_log.jsonl").read_text().splitlines()[0]
    (tmp_path / "train_log.jsonl").write_text(first + "\n")
    with pytest.raises(SystemExit, match="fewer than two log lines"):
        load("end_to_end").main([str(tmp_path)])


def test_the_model_of_scaling_waits_for_what_does_not_fit_into_the_backward_pass():
    model = load("scaling").model_update
    alone = model(2.0, 0.5, 1, 360e6, 10.0, 800.0, 0.01)
    assert (alone.seconds, alone.efficiency) == (4.0, 1.0)
    # 8 ranks, 0.5 s each; a ring moves 2 * 7 / 8 * 360 MB through 10 GB/s
    eight = model(2.0, 0.5, 8, 360e6, 10.0, 800.0, 0.01)
    assert eight.computing == pytest.approx(0.5) and eight.reducing == pytest.approx(0.063)
    assert eight.exposed == pytest.approx(0.063 * 25 / 360)  # the rest is hidden: the backward pass takes 0.3 s
    assert eight.seconds == pytest.approx(0.505 + 0.063 * 25 / 360)
    slow = model(2.0, 0.5, 8, 360e6, 1.0, 800.0, 0.0)
    assert slow.exposed == pytest.approx(0.63 - 2 / 3 * 800 / 3600 / 0.5)
    assert slow.efficiency == pytest.approx(0.5 / slow.seconds)


def test_batches_that_ranks_take_together_are_nearly_equally_long():
    measure = load("scaling").measure_imbalance
    assert 0 <= measure(8, 200.0, 8000) < 0.02


def test_the_table_of_scaling_has_a_row_for_each_speed_and_number(capsys):
    scaling = load("scaling")
    scaling.main(["--speed", "1", "2", "--devices", "1", "2", "--updates", "43200", "--update_hours", "2"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    assert rows[0][7].strip() == "1.00" and rows[2][8].strip() == "0.5"
    with pytest.raises(SystemExit):
        scaling.main(["--speed", "0"])
    assert "above 0" in capsys.readouterr().err
