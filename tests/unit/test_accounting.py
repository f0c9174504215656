"""Properties of the counters and of the log."""

import json
import math

import pytest
import torch

from speechbrain_bestrq.accounting import JsonLines, LateReader, code_statistics, datasheet_flops, format_line
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.tally import HISTOGRAM_MEMORY


class SlowDevice:
    """Stands for a CUDA event: arrived after so many looks, or when it is waited for."""

    def __init__(self, looks):
        self.looks, self.waited = looks, False

    def query(self):
        self.looks -= 1
        return self.looks < 0

    def synchronize(self):
        self.waited = True


def submit(reader, step, event=None):
    """Submit a step's loss, as if from a device that raises the event."""
    reader.submit({"step": step}, {"loss": torch.tensor(step / 2), "correct": torch.tensor(step)})
    if event is not None:
        known, names, host, _ = reader._pending.pop()
        reader._pending.append((known, names, host, event))


def test_values_come_back_as_floats_in_order_and_once():
    reader = LateReader()
    for step in (1, 2, 3):
        submit(reader, step)
    assert list(reader.ready()) == [{"step": step, "loss": step / 2, "correct": float(step)} for step in (1, 2, 3)]
    assert list(reader.ready()) == []


def test_a_later_value_does_not_overtake_one_under_way():
    reader = LateReader()
    submit(reader, 1, SlowDevice(looks=2))
    submit(reader, 2)
    assert list(reader.ready()) == []
    assert list(reader.ready()) == []
    assert [entry["step"] for entry in reader.ready()] == [1, 2]


def test_at_the_end_all_values_are_waited_for():
    reader = LateReader()
    event = SlowDevice(looks=1000)
    submit(reader, 1)
    submit(reader, 2, event)
    assert [entry["step"] for entry in reader.ready()] == [1]
    assert not event.waited
    assert [entry["step"] for entry in reader.ready(wait=True)] == [2]
    assert event.waited


def test_a_log_gives_back_what_was_appended_also_by_another_run(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonLines(path).append({"event": "train", "step": 1, "loss": 2.5})
    JsonLines(path).append({"event": "valid", "step": 1, "gain": 1e-9, "name": "é\n"})
    assert JsonLines(path).read() == [
        {"event": "train", "step": 1, "loss": 2.5},
        {"event": "valid", "step": 1, "gain": 1e-9, "name": "é\n"},
    ]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_a_log_that_is_not_there_is_empty_and_not_made_by_looking(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    log.truncate(after_step=3)
    assert not log.path.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_as_null(tmp_path, value):
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 1, "loss": value, "count": 3})
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None, "count": 3}


def test_resuming_drops_what_will_be_logged_again(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    for step in (10, 20, 30, 40):
        log.append({"step": step})
    log.truncate(after_step=20)
    assert [entry["step"] for entry in log.read()] == [10, 20]
    log.append({"step": 30})
    assert [entry["step"] for entry in log.read()] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_resuming_drops_the_validation_that_comes_again(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    entries = [{"event": event, "step": step} for step in (10, 20) for event in ("train", "valid")]
    for entry in entries:
        log.append(entry)
    log.truncate(after_step=20)
    assert log.read() == entries
    log.truncate(after_step=20, validation_comes=True)
    assert log.read() == entries[:3]


def test_a_last_line_torn_by_a_kill_is_left_out_and_gone_after_resuming(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 1})
    log.append({"step": 2})
    whole = log.path.read_text()
    for cut in range(len('{"step": 1}\n') + 1, len(whole)):
        log.path.write_text(whole[:cut])
        assert log.read() == [{"step": 1}]
    log.truncate(after_step=5)
    log.append({"step": 2})
    assert log.read() == [{"step": 1}, {"step": 2}]


def test_a_line_that_is_damaged_is_named(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 1})
    log.path.write_text(log.path.read_text() + '{"step": \n')
    with pytest.raises(InputError, match="log.jsonl' line 2 is not JSON .*: delete that line"):
        log.truncate(after_step=1)


def test_a_code_is_in_use_no_longer_than_it_is_met():
    """All 16 codes are labels for a hundred updates, then one alone."""
    counts = torch.zeros(1, 16)
    used = []
    for update in range(3000):
        counts *= HISTOGRAM_MEMORY
        counts[0, : 16 if update < 100 else 1] += 10.0
        used.append(code_statistics(counts)["codes_used"].item())
    assert used[99] == 16 and used[600] == 16 and used[2900] == 1


def test_code_statistics_are_means_over_the_codebooks():
    statistics = code_statistics(torch.tensor([[1.0, 1.0, 1.0, 1.0], [8.0, 0.0, 0.0, 0.0]]))
    assert statistics["unigram_entropy"].item() == pytest.approx(math.log(4) / 2)
    assert statistics["code_perplexity"].item() == pytest.approx((4 + 1) / 2)
    assert statistics["codes_used"].item() == (4 + 1) / 2
    assert statistics["commonest_share"].item() == (0.25 + 1) / 2


def test_the_unigram_entropy_is_the_cross_entropy_of_the_best_blind_guess():
    counts = torch.rand(1, 50) * 100
    best = (counts / counts.sum()).log()
    expected = torch.nn.functional.cross_entropy(best, counts / counts.sum())
    assert code_statistics(counts)["unigram_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_statistics_of_no_label_are_zero_codes():
    statistics = code_statistics(torch.zeros(2, 8))
    assert statistics["codes_used"] == 0 and statistics["commonest_share"] == 0
    assert statistics["unigram_entropy"] == 0


@pytest.mark.parametrize(
    "name, precision, expected",
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200 NVL", "bf16", 835e12),
        ("NVIDIA GH200 480GB", "bf16", 990e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H200", "fp32", None),
        ("cpu", "bf16", None),
    ],
)
def test_the_most_telling_name_finds_the_rate(name, precision, expected):
    assert datasheet_flops(name, precision) == expected


@pytest.mark.parametrize("name", ["NVIDIA A100-SXM4-80GB", "NVIDIA A1000 Laptop GPU", "NVIDIA RTX A1000"])
def test_a_name_inside_another_is_not_taken_for_it(name):
    assert datasheet_flops(name, "bf16") == (312e12 if "A100-" in name else None)


def test_a_line_of_text_has_everything_known_in_order():
    entry = {"event": "valid", "step": 7, "loss": 1.23456789, "gain": None, "device": "cpu"}
    assert format_line(entry) == "valid | step 7 | loss 1.235 | device cpu"
    assert format_line({"step": 7}) == "log | step 7"
