"""A run's summary and curves, on run folders written by hand."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.report import (
    curve,
    draw_curves,
    read_run,
    summarise,
    summary_markdown,
    write_report,
)

FACTS = {
    "model": "BestRQ",
    "parameters": 6900000,
    "corpus": "LibriSpeech and some of our own",
    "train_hours": 8.2,
    "train_utterances": 2841,
    "valid_hours": 0.5,
    "device": "CPU, 2 threads",
    "precision": "fp32",
    "world_size": 1,
    "command": "python train.py hparams/bestrq_small.yaml",
    "versions": {"torch": "2.11.0"},
    "seed": 1000,
    "updates_planned": 2000,
}


def train_line(step, **fields):
    line = {
        "event": "train",
        "step": step,
        "epoch": 1,
        "loss": 9.0 - step / 1000,
        "accuracy": 0.08,
        "unigram_entropy": 8.2,
        "gain": step / 1000 - 0.8,
        "commonest_share": 0.004,
        "codes_used": 7000.0,
        "code_perplexity": 4200.0,
        "mask_ratio": 0.6,
        "gradient_norm": 1.2,
        "learning_rate": 0.0004,
        "audio_seconds_per_second": 250.0,
        "audio_hours": step / 40,
        "device_hours": step / 10000,
        "utilisation": None,
        "peak_memory_gb": 1.2,
        "data_wait_share": 0.01,
        "skipped_updates": 0,
    }
    return {**line, **fields}


def valid_line(step, **fields):
    line = {
        "event": "valid",
        "step": step,
        "epoch": 1,
        "loss": 6.25,
        "accuracy": 0.07,
        "unigram_entropy": 8.125,
        "gain": 1.875,
        "commonest_share": 0.005,
        "codes_used": 6800.0,
        "code_perplexity": 4000.0,
        "audio_hours": step / 40,
        "device_hours": step / 10000,
        "seconds": 20.1,
    }
    return {**line, **fields}


@pytest.fixture
def write_run(tmp_path):
    def write(lines, facts=FACTS, end="\n"):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "train_log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + end)
        return folder

    return write


def without(line, *fields):
    return {key: value for key, value in line.items() if key not in fields}


# --- reading ---


def test_later_lines_of_a_resumed_run_count(write_run):
    stopped = [train_line(100), valid_line(100), train_line(200), valid_line(200, loss=5.0), train_line(300)]
    resumed = [train_line(200, loss=7.5), valid_line(200, loss=5.5), train_line(300, loss=7.25)]
    log = read_run(write_run(stopped + resumed))
    assert [(line["step"], line["loss"]) for line in log.train] == [(100, 8.9), (200, 7.5), (300, 7.25)]
    assert [(line["step"], line["loss"]) for line in log.valid] == [(100, 6.25), (200, 5.5)]


def test_what_a_stopped_run_logged_after_the_checkpoint_is_void_though_the_steps_differ(write_run):
    stopped = [train_line(100), train_line(200), valid_line(250), train_line(300)]
    log = read_run(write_run([*stopped, train_line(150), train_line(180)]))
    assert [line["step"] for line in log.train] == [100, 150, 180]
    assert log.valid == []


def test_a_training_line_written_after_a_later_validation_voids_nothing(write_run):
    # device values are read back late: the line of step 190 may follow the validation at 200
    log = read_run(write_run([train_line(180), valid_line(200), train_line(190), train_line(210)]))
    assert [line["step"] for line in log.train] == [180, 190, 210]
    assert [line["step"] for line in log.valid] == [200]


def test_validation_repeated_by_itself_replaces_the_earlier_one_only(write_run):
    log = read_run(write_run([train_line(100), valid_line(100, loss=5.0), valid_line(100, loss=5.5)]))
    assert [line["loss"] for line in log.valid] == [5.5]
    assert len(log.train) == 1


def test_unfinished_last_line_is_left_out(write_run):
    folder = write_run([train_line(100), train_line(200)], end='\n{"event": "train", "st')
    assert [line["step"] for line in read_run(folder).train] == [100, 200]


def test_events_of_other_kinds_are_passed_over(write_run):
    folder = write_run([{"event": "note", "text": "resumed"}, train_line(100)])
    assert [line["step"] for line in read_run(folder).train] == [100]


def test_errors_name_the_file_and_the_remedy_in_one_line(write_run, tmp_path):
    def message(folder):
        with pytest.raises(InputError) as caught:
            read_run(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert re.search("run folder '.*nowhere' does not exist: give", message(tmp_path / "nowhere"))
    folder = write_run([train_line(100)])
    assert re.search("run folder '.*run.json' does not exist", message(folder / "run.json"))
    (folder / "run.json").unlink()
    assert re.search("run.json' is missing: .* not the output folder", message(folder))
    (folder / "run.json").write_text("")
    assert re.search("run.json' is empty: restore", message(folder))
    (folder / "run.json").write_text("{model:")
    assert re.search("run.json' is not JSON .*: restore", message(folder))
    (folder / "run.json").write_text("[]")
    assert re.search("run.json' must hold one JSON object", message(folder))
    (folder / "run.json").write_text('{"parameters": "many"}')
    assert re.search("run.json': 'parameters' is not a number", message(folder))
    (folder / "run.json").write_text('{"versions": "2.11"}')
    assert re.search("run.json': 'versions' is not an object", message(folder))
    (folder / "run.json").write_text("{}")
    log = folder / "train_log.jsonl"
    log.write_text('{"event": "train", "step": 1}\n{"event": \n{"event": "train", "step": 2}\n')
    assert re.search("train_log.jsonl' line 2 is not JSON .*: delete that line", message(folder))
    log.write_text("7\n")
    assert re.search("train_log.jsonl' line 1 is not a JSON object", message(folder))
    log.write_text('{"event": "train", "loss": 1.5}\n')
    assert re.search("train_log.jsonl' line 1 has no whole number 'step'", message(folder))
    log.write_text('{"event": "train", "step": 1, "loss": "low"}\n')
    assert re.search("train_log.jsonl' line 1: 'loss' is not a number", message(folder))
    log.write_text('{"event": "note"}\n')
    assert re.search("train_log.jsonl' holds no line of a training step yet: wait", message(folder))
    log.write_bytes(b"\xff\xfe\n")
    assert re.search("train_log.jsonl' cannot be read", message(folder))
    log.write_text("\n")
    assert re.search("train_log.jsonl' is empty", message(folder))
    log.unlink()
    assert re.search("train_log.jsonl' is missing", message(folder))


def test_curve_lists_the_validations(write_run):
    folder = write_run([valid_line(0, gain=-0.5), train_line(100), without(valid_line(100, accuracy=None), "gain")])
    first, second = curve(folder)
    assert (first.step, first.audio_hours, first.gain) == (0, 0.0, -0.5)
    assert (second.step, second.audio_hours, second.loss, second.gain, second.accuracy) == (100, 2.5, 6.25, None, None)


# --- summary ---


def test_summary_holds_the_figures_of_the_log(write_run):
    lines = [train_line(1000, peak_memory_gb=2.5), valid_line(1000), train_line(2000, skipped_updates=3)]
    folder = write_run([*lines, valid_line(2000, loss=6.5, gain=1.625)])
    summary = summarise(read_run(folder))
    assert {key: summary[key] for key in FACTS} == FACTS
    assert summary["updates"] == 2000
    assert (summary["audio_hours"], summary["device_hours"]) == (50.0, 0.2)
    assert summary["audio_hours_per_device_hour"] == pytest.approx(250.0)
    assert summary["skipped_updates"] == 3
    assert summary["peak_memory_gb"] == 2.5
    assert (summary["best_valid"]["step"], summary["best_valid"]["loss"], summary["best_valid"]["gain"]) == (
        1000,
        6.25,
        1.875,
    )
    assert (summary["last_valid"]["step"], summary["last_valid"]["loss"]) == (2000, 6.5)
    assert summary["best_valid"]["accuracy_over_commonest"] == pytest.approx(0.065)
    assert summary["best_valid"]["codes_used"] == 6800
    assert summary["encoder"] is None and summary["encoders_at_steps"] == {}


def test_summary_finds_the_encoders_by_number(write_run):
    folder = write_run([train_line(100)])
    for name in ("encoder", "encoder@100000", "encoder@20000", "encoder@best"):
        (folder / name).mkdir()
    summary = summarise(read_run(folder))
    assert summary["encoder"] == str(folder / "encoder")
    assert list(summary["encoders_at_steps"].items()) == [
        ("20000", str(folder / "encoder@20000")),
        ("100000", str(folder / "encoder@100000")),
    ]
    text = summary_markdown(summary)
    assert f"- encoder at update 20,000: {folder / 'encoder@20000'}\n" in text


def test_nulls_nan_and_missing_fields_are_not_logged_not_zero(write_run):
    bare = {"event": "train", "step": 10}
    lines = [bare, valid_line(10, loss=None), valid_line(20, loss=float("nan"), accuracy=None), valid_line(30)]
    summary = summarise(read_run(write_run([*lines, {"event": "valid", "step": 40}], facts={})))
    assert summary["best_valid"]["step"] == 30
    assert summary["last_valid"]["loss"] is None and summary["last_valid"]["accuracy_over_commonest"] is None
    assert summary["audio_hours"] == 0.75 and summary["skipped_updates"] is None and summary["model"] is None
    text = summary_markdown(summary)
    assert "- model: not logged, not logged\n" in text and "- last validation: update 40, loss not logged\n" in text
    json.dumps(summary, allow_nan=False)


def test_a_run_without_validation_says_so(write_run):
    summary = summarise(read_run(write_run([train_line(10)])))
    assert summary["best_valid"] is None
    assert "- best validation: none yet\n" in summary_markdown(summary)


def test_markdown_says_what_the_run_was(write_run):
    text = summary_markdown(summarise(read_run(write_run([train_line(2000), valid_line(2000)]))))
    for expected in (
        "- model: BestRQ, 6,900,000 parameters\n",
        "- data: LibriSpeech and some of our own, 8.20 h to train on (2,841 utterances), 0.50 h to validate\n",
        "- updates: 2,000 of 2,000, 0 skipped\n",
        "- audio seen: 50.00 h in 0.20 device-hours: 250.0 audio-hours per device-hour\n",
        "accuracy 7.00% against 0.50% of the commonest label (+6.50 points), 6,800 codes used, perplexity 4,000\n",
        "- command: `python train.py hparams/bestrq_small.yaml`\n",
        "- versions: torch 2.11.0\n",
    ):
        assert expected in text


# --- picture ---


def ink(path, left=0.0, right=1.0):
    """Share of pixels that are not white, within a part of the width."""
    pixels = imread(path)[..., :3]
    width = pixels.shape[1]
    return float((pixels[:, int(left * width) : int(right * width)].min(axis=2) < 0.9).mean())


def test_report_writes_a_picture_that_is_not_blank_and_the_summary(write_run):
    lines = [line for step in range(100, 2001, 100) for line in (train_line(step), valid_line(step))]
    folder = write_run(lines)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    summary = write_report(folder)
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["curves.png", "summary.md"]
    assert summary["curves"] == str(folder / "report" / "curves.png")
    pixels = imread(summary["curves"])
    assert pixels.shape[0] > 900 and pixels.shape[1] > 1200
    assert np.var(pixels[..., :3]) > 1e-3
    assert ink(summary["curves"], 0.0, 0.5) > 0.02 and ink(summary["curves"], 0.5, 1.0) > 0.02
    assert (folder / "report" / "summary.md").read_text().startswith(summary_markdown(summary))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_report_is_replaced_when_the_run_has_gone_on(write_run):
    write_report(write_run([train_line(100)]))
    folder = write_run([train_line(100), train_line(200)])
    old = (folder / "report" / "curves.png").read_bytes()
    assert write_report(folder)["updates"] == 200
    assert "- updates: 200 of 2,000" in (folder / "report" / "summary.md").read_text()
    assert (folder / "report" / "curves.png").read_bytes() != old


def test_curves_change_with_the_values_drawn(write_run, tmp_path):
    pictures = []
    for gain in (0.5, 1.5):
        log = read_run(write_run([train_line(100), train_line(200, gain=gain)]))
        pictures.append(imread(draw_curves(log, tmp_path / "curves.png")))
    assert pictures[0].shape == pictures[1].shape and not np.array_equal(*pictures)


def test_panels_without_values_are_left_out(write_run, tmp_path):
    codebook = ("unigram_entropy", "gain", "commonest_share", "codes_used", "code_perplexity")
    full = draw_curves(read_run(write_run([train_line(100), train_line(200)])), tmp_path / "full.png")
    other = [without(train_line(step), *codebook) for step in (100, 200)]
    fewer = draw_curves(read_run(write_run(other)), tmp_path / "fewer.png")
    assert imread(fewer).shape[0] < imread(full).shape[0]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([train_line(1)], id="one point"),
        pytest.param([valid_line(0)], id="before the first update"),
        pytest.param([without(train_line(step), "audio_hours") for step in (1, 2)], id="no hours"),
        pytest.param([train_line(step, audio_hours=1.0) for step in (1, 2)], id="hours that stand still"),
        pytest.param([train_line(step, gradient_norm=0.0, codes_used=0) for step in (1, 2)], id="zeros on a log scale"),
        pytest.param([train_line(1, loss=float("inf")), train_line(2, loss=None)], id="not finite"),
        pytest.param([{"event": "train", "step": 1, "gradient_norm": 2.0}], id="right axis only"),
    ],
)
def test_odd_logs_are_drawn(write_run, tmp_path, lines):
    path = draw_curves(read_run(write_run(lines, facts={**FACTS, "corpus": "a $x_{$ corpus"})), tmp_path / "curves.png")
    assert ink(path) > 0.002


def test_a_log_with_nothing_to_draw_is_refused_before_anything_is_written(write_run):
    folder = write_run([{"event": "train", "step": 1, "epoch": 1}])
    with pytest.raises(InputError, match="train_log.jsonl' holds nothing to draw"):
        write_report(folder)
    assert not any((folder / "report").glob("*"))


def test_a_report_that_cannot_be_written_is_the_users_to_mend(write_run):
    folder = write_run([train_line(1)])
    (folder / "report").write_text("in the way")
    with pytest.raises(InputError, match="report cannot be written to '.*report'"):
        write_report(folder)
    assert (folder / "report").read_text() == "in the way"
