"""What a reproduction will cost follows from a warm-up of what its commands train."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speechbrain_bestrq import cli
from speechbrain_bestrq.commands import reproduce
from speechbrain_bestrq.reproduction import cost
from speechbrain_bestrq.reproduction.cost import Speed
from speechbrain_bestrq.reproduction.plan import RECIPES, make_plan, read_preset
from speechbrain_bestrq.reproduction.stages import device_environment

#: A preset of one pre-training for each method.
TWO_SEEDS = str(Path(__file__).parents[1] / "helpers" / "two_seeds.yaml")
SPEED = Speed(60.0, 240.0, 80.0, 5_000_000, (10, 100))


def test_a_dry_run_prints_the_commands_and_makes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "warm_up", lambda path, options: SPEED)
    monkeypatch.setattr(cost, "warm_up_head", lambda path, options, states, frames: 1200.0)
    # in this process, where what was measured can be set
    monkeypatch.setattr(reproduce, "_estimate_apart", lambda stages, done, devices, tell: cost.estimate(stages, done))
    folder = tmp_path / "out"
    assert cli.main(["reproduce", "--preset", "demo", "--output_folder", str(folder), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "pretraining/wav2vec2\n    " in printed and printed.rstrip().endswith(f"23 of 23 stages to run in {folder}")
    assert not folder.exists()
    # 200 updates of 2 x 20 s at 60 audio-seconds a second
    assert re.search(r"^ +0\.04 +0\.22  pretraining/bestrq$", printed, re.MULTILINE)
    assert re.search(r"^ +\? +\?  speech/slurp$", printed, re.MULTILINE)
    # 6 epochs of the 0.4 hours that are to be made, at 1200 audio-seconds a second; the encoder is heard once, at 240
    assert re.search(r"^ +0\.00 +0\.00  intent-frozen/fbank/1$", printed, re.MULTILINE)
    assert re.search(r"^ +0\.00 +0\.14  intent-frozen/bestrq-200/1$", printed, re.MULTILINE)


def test_what_stages_cost_follows_from_the_warm_up_and_the_audio(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(cost, "warm_up", lambda path, options: SPEED)
    monkeypatch.setattr(cost, "warm_up_head", lambda path, options, states, frames: 1200.0)
    noise = toy.write_noise(tmp_path / "audio", [3.0, 1.0])
    preset = {**read_preset(TWO_SEEDS), "updates": [600]}
    preset["tasks"] = {"intent": {"frozen": {"yaml": "probe_small", "options": {}}}}
    preset["tasks"]["asr"] = {"frozen": {"yaml": "bestrq", "options": {"number_of_epochs": 5}}}
    preset["tasks"]["asr"]["fine-tuned"] = {"yaml": "bestrq_finetune", "options": {"number_of_epochs": 5}}
    options = {"number_of_epochs": 5, "label_hours": 2 / 3600}
    preset["few_labels"] = {"asr": {"fine-tuned": {"yaml": "bestrq_finetune", "options": options}}}
    preset["few_labels"]["intent"] = {"frozen": {"yaml": "probe_small", "options": {"examples_per_class": 3}}}
    preset["tasks"]["emotion"] = {"frozen": {"yaml": "bestrq_linear", "options": {"number_of_epochs": 5}}}
    for split, seconds in {
        "train-clean-100": 2.0,
        "dev-clean": 1.0,
        "test-other": 1.0,
        "train-other-500": 50.0,
    }.items():
        toy.write_noise(tmp_path / "LibriSpeech" / split, [seconds])
    corpora = {"librispeech": tmp_path / "LibriSpeech", "slurp": noise, "iemocap": noise}
    costs = cost.estimate(make_plan(preset, corpora, tmp_path / "out"))
    hours = cost.corpus_hours(noise)
    assert hours == pytest.approx(4 / 3600)
    cached, again = costs["intent-frozen/bestrq-600/1"], costs["intent-frozen/bestrq-600/2"]
    head = 20 * hours / 1200  # 20 epochs
    assert cached.device_hours == pytest.approx(hours / 240 + head) and cached.gigabytes == pytest.approx(4e5 / 1e9)
    assert (again.device_hours, again.gigabytes) == (pytest.approx(head), 0)  # the hidden states are there
    assert costs["intent-frozen/random/2"] == costs["intent-frozen/random/1"] == cached  # others for each seed
    assert costs["intent-frozen/fbank/1"].device_hours == pytest.approx(head)
    assert costs["asr-frozen/bestrq-600/1"].device_hours == pytest.approx(5 * hours * (1 / 240 + 1 / 1200))
    assert costs["asr-fine-tuned/bestrq-600/1"].device_hours == pytest.approx(5 * hours * (1 / 80 + 1 / 1200))
    # a half of the 4 s
    assert costs["asr-fine-tuned-few/bestrq-600/1"].device_hours == pytest.approx(5 * hours / 2 * (1 / 80 + 1 / 1200))
    # their hidden states are those of all labels
    assert costs["intent-frozen-few/bestrq-600/1"].device_hours == pytest.approx(head)
    # ten folds
    assert costs["emotion-frozen/bestrq-600/1"].device_hours == pytest.approx(10 * 5 * hours * (1 / 240 + 1 / 1200))


def test_audio_that_a_recipe_leaves_out_costs_nothing_and_what_is_decoded_takes_its_room(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(cost, "warm_up", lambda path, options: SPEED)
    monkeypatch.setattr(cost, "warm_up_head", lambda path, options, states, frames: 1200.0)
    toy.write_noise(tmp_path / "SLURP" / "audio" / "slurp_real", [3.0])
    toy.write_noise(tmp_path / "SLURP" / "audio" / "slurp_synth", [60.0])
    toy.write_noise(tmp_path / "LibriSpeech" / "train-clean-100", [20.0])
    extra = toy.write_noise(tmp_path / "extra", [10.0])
    preset = {**read_preset(TWO_SEEDS), "tasks": {"intent": {"frozen": {"yaml": "bestrq", "options": {}}}}}
    corpora = {"librispeech": tmp_path / "LibriSpeech", "slurp": tmp_path / "SLURP"}
    sizes = {}
    for cache in ("null", "memory"):
        preset["pretraining"]["bestrq"]["options"] |= {"cache": cache, "train_splits": "[train-clean-100]"}
        costs = cost.estimate(make_plan(preset, corpora, tmp_path / "out", extra_folders=[extra]))
        sizes[cache] = costs["pretraining/bestrq"].gigabytes
    assert sizes["memory"] - sizes["null"] == pytest.approx(30 * 32000 / 1e9)
    assert costs["intent-frozen/bestrq-720/1"].device_hours == pytest.approx(20 * 3 / 3600 * (1 / 240 + 1 / 1200))


def test_what_is_done_costs_nothing_and_its_encoder_is_known_still(tmp_path, toy, monkeypatch):
    warmed = []

    def warm_up(path, options):
        warmed.append(path.stem)
        return SPEED

    monkeypatch.setattr(cost, "warm_up", warm_up)
    monkeypatch.setattr(cost, "warm_up_head", lambda path, options, states, frames: 1200.0)
    noise = toy.write_noise(tmp_path / "audio", [3.0, 1.0])
    preset = {**read_preset(TWO_SEEDS), "tasks": {"intent": {"frozen": {"yaml": "probe_small", "options": {}}}}}
    stages = make_plan(preset, {"librispeech": noise, "slurp": noise}, tmp_path / "out")
    before = cost.estimate(stages)
    done = {stage.name for stage in stages if stage.kind == "pretraining" or stage.name.startswith("intent-frozen/w")}
    done |= {"intent-frozen/bestrq-720/1"}
    warmed.clear()
    after = cost.estimate(stages, done)
    assert after == {name: costs for name, costs in before.items() if name not in done}
    assert warmed == ["bestrq_small"]  # for the probes that listen with it; no one does with the other any more


def test_where_memory_ends_the_warm_up_takes_half_a_batch_and_again():
    def speed(seconds):
        if seconds > 210:
            raise torch.OutOfMemoryError("too little memory")
        return seconds

    assert cost._of_what_fits(speed, 800.0) == 200.0
    with pytest.raises(torch.OutOfMemoryError):
        cost._of_what_fits(lambda seconds: speed(1000.0), 800.0)


def test_the_estimate_sees_the_devices_of_a_stage_and_leaves_them(monkeypatch, tmp_path):
    seen, lines, before = [], [], dict(os.environ)

    class Process:
        def __init__(self, *words):
            seen.append((os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")))

        def __enter__(self):
            raise RuntimeError("no\nmemory")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Process)
    for devices in (["3", "5"], ["cpu", "cpu"], [None]):
        assert reproduce._estimate_apart([], (), devices, lines.append) == {}
    expected = [tuple(device_environment(one, 2).values()) for one in (["3"], ["cpu"])]
    own = before.get("OMP_NUM_THREADS")
    assert seen == [(*expected[0], own), expected[1], (before.get("CUDA_VISIBLE_DEVICES"), own)]
    assert dict(os.environ) == before and lines == ["what it will cost cannot be told: no memory"] * 3


@pytest.mark.slow
def test_a_killed_command_leaves_no_estimate_running(tmp_path):
    words = [sys.executable, "-m", "speechbrain_bestrq", "reproduce", "--preset", "demo", "--dry_run"]
    process = subprocess.Popen([*words, "--output_folder", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    deadline, found = time.monotonic() + 120, []
    while not found and time.monotonic() < deadline:
        found = children(process.pid)
        time.sleep(0.1)
    assert found
    process.terminate()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def children(pid):
    """Processes that one has started: not multiprocessing's tracker, which ends with its pipe."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for one in pids if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


@pytest.mark.parametrize("devices", [1, 4])
def test_a_pre_training_costs_the_same_device_hours_on_any_number_of_devices(tmp_path, monkeypatch, devices):
    monkeypatch.setattr(cost, "warm_up", lambda path, options: SPEED)
    preset = {**read_preset(TWO_SEEDS), "tasks": {}}
    stages = make_plan(preset, {"librispeech": tmp_path}, tmp_path, pretraining_devices=devices)
    found = cost.estimate(stages)
    assert found["pretraining/bestrq"].device_hours == pytest.approx(720 * 100 / 60 / 3600)
    seconds = cost.expected_seconds(stages, found)
    assert seconds == {name: pytest.approx(cost.START_SECONDS + 1200 / devices) for name in found}


def test_a_pre_training_needs_room_for_three_checkpoints_and_each_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "warm_up", lambda path, options: SPEED)
    preset = {**read_preset(TWO_SEEDS), "tasks": {}, "updates": [360, 720]}
    found = cost.estimate(make_plan(preset, {"librispeech": tmp_path}, tmp_path))
    # of 4 bytes: in a checkpoint parameters and two moments; encoders after both updates and of the best validation
    assert found["pretraining/bestrq"].gigabytes == pytest.approx(5_000_000 * 4 * (3 * 3 + 3) / 1e9)


def test_the_warm_up_trains_what_the_command_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hparams = RECIPES / "LibriSpeech" / "pretrain" / "hparams"
    small = {"--d_model": "48", "--num_heads": "4", "--num_layers": "1", "--max_batch_seconds": "2"}
    bestrq = cost.warm_up(hparams / "bestrq_small.yaml", {**small, "--codebook_size": "64"})
    wider = cost.warm_up(hparams / "bestrq_small.yaml", {**small, "--codebook_size": "128"})
    assert wider.parameters - bestrq.parameters == 2 * (64 * 48 + 64)  # two codebooks
    assert bestrq.encoding > bestrq.training > 0
    assert bestrq.state_bytes == pytest.approx(4 * 2 * 25 * 48, rel=0.1)  # two states, 25 frames of 48 a second
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["LibriSpeech/ASR", "VoxCeleb/verification", "IEMOCAP/emotion", "SLURP/intent"])
def test_a_heads_warm_up_trains_the_recipes_own_head(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RECIPES / recipe / "hparams" / "probe_small.yaml"
    options = {"--encoder": "random:/nowhere", "--max_batch_seconds": "5", "--max_batch_size": "1"}
    assert 0 < cost.warm_up_head(path, options, (3, 16), 25.0) < float("inf")
    assert not list(tmp_path.iterdir())
