"""The session on a GPU, rehearsed: its parts, its commands, and what becomes of a part that fails."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speechbrain_bestrq import PretrainedEncoder
from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.attention import attend
from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.batching import LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.corpora import prepare_librispeech
from speechbrain_bestrq.corpora.manifest import read_manifest
from speechbrain_bestrq.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Return a function that gives a module of the benchmarks."""
    monkeypatch.syspath_prepend(FOLDER)
    return __import__


@pytest.fixture
def toys(load, tmp_path):
    """Settings of a rehearsal, and where its parts write."""
    shared = load("gpu_findings")
    settings = shared.Settings("cpu", True, str(tmp_path / "output"), str(tmp_path / "work"))
    return settings, shared.Findings(tmp_path / "findings.json")


def rows(findings):
    """What was found, as it is on disk: whether it is good, by its name."""
    return {row["what"]: row["good"] for row in json.loads(findings.path.read_text())["rows"]}


def test_a_part_runs_in_a_process_of_its_own_and_all_is_written(load, tmp_path, capsys):
    session = load("gpu_session")
    output = tmp_path / "session"
    session.main(["--toy", "--output", str(output), "--parts", "kernels", "--minutes", "600"])
    printed = capsys.readouterr().out
    assert "| kernels | attention, rotary |" in printed and "FAILED" not in printed
    assert "| kernels | depthwise convolution in float32, forward and backward | " in printed
    (markdown,) = output.glob("*.md")
    text, known = markdown.read_text(), json.loads(markdown.with_suffix(".json").read_text())
    assert "--parts kernels" in text and "## Attention kernels" in text and "## Depthwise convolution" in text
    figures = known["parts"]["kernels"]["figures"]
    assert figures["attention"]["rotary"]["math"] > 0 and figures["attention"]["rotary"]["cudnn"] is None
    assert all(figures["convolution in float32"][name] > 0 for name in ("channel by channel", "as images"))
    with pytest.raises(SystemExit):
        session.main(["--toy", "--output", str(output)])
    assert "holds files already" in capsys.readouterr().err


def test_a_part_that_fails_or_hangs_is_told_in_a_line_and_the_others_go_on(load, toys, tmp_path, monkeypatch):
    session = load("gpu_session")
    script = tmp_path / "python"
    found = '{"rows": [{"what": "a", "outcome": "b", "good": true}], "sections": {}, "figures": {}}'
    script.write_text(
        f"""#!/bin/sh
echo beginning; echo RuntimeError: no such kernel
printf '{found}' > "$5"
case "$3" in
    steps) setsid sleep 60 & echo $! > "{tmp_path}/away"; sleep 60 & echo $! > "{tmp_path}/left"; wait;;
    cost) exit 3;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    for name in ("cost", "trace"):
        monkeypatch.setitem(session.PARTS, name, (None, 234.5))
    monkeypatch.setitem(session.PARTS, "steps", (None, 3))
    settings, _ = toys
    Path(settings.work).mkdir()
    started = time.monotonic()
    known = []
    told = session.run_session(settings, ["cost", "steps", "trace"], 480.0, lambda found: known.append(list(found)))
    assert known == [["cost"], ["cost", "steps"], ["cost", "steps", "trace"]]
    assert time.monotonic() - started < 30
    table = session.short_table(told).splitlines()
    assert "| cost | cost | exit status 3: beginning / RuntimeError: no such kernel | FAILED |" in table
    assert sum("| steps | steps | stopped after 3 s: beginning / RuntimeError" in line for line in table) == 1
    assert [f"| {name} | a | b | ok |" in table for name in ("cost", "steps", "trace")] == [True] * 3
    assert len(table) == 2 + 5
    for name in ("left", "away"):
        left = Path(f"/proc/{(tmp_path / name).read_text().strip()}/stat")
        assert not left.exists() or left.read_text().split()[2] == "Z", name


def test_parts_for_which_no_time_is_left_are_left_out(load, toys):
    session = load("gpu_session")
    settings, _ = toys
    Path(settings.work).mkdir()
    (row,) = session.run_session(settings, ["quality"], session.RESERVE)["quality"]["rows"]
    assert row["outcome"] == "left out: the time is over" and row["good"] is None


def test_what_is_compared_with_a_cpu_is_equal_there(load, toys):
    settings, findings = toys
    load("gpu_checks").equality(settings, findings, 60)
    names = ["labels as on a CPU", "attention under bf16 in training"]
    names += ["bestrq: fp32 loss as on a CPU", "wav2vec2: fp32 loss as on a CPU"]
    padded = ": a padded batch under bf16 as on a CPU"
    names += [f"{name}{padded}" for name in ("bestrq", "wav2vec2", "bestrq with relative positions")]
    assert rows(findings) == dict.fromkeys(names, True)
    assert findings.figures["labels"]["frames"] == 300


@pytest.mark.parametrize("fault", ["rounded", "no number"])
def test_attention_that_is_wrong_in_training_is_found(load, toys, monkeypatch, fault):
    """As some of cuDNN's kernels are: dropout in sixteenths, gradients that are no numbers."""
    checks = load("gpu_checks")
    settings, findings = toys

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("nan")

    def wrong(query, key, value, attn_mask=None, dropout_p=0.0):
        query = Spoilt.apply(query) if fault == "no number" and attn_mask is not None else query
        share = round(16 * dropout_p) / 16 if fault == "rounded" else dropout_p
        return attend(query, key, value, attn_mask, share)

    checks.compare_attention(settings, findings)
    assert list(rows(findings).values()) == [True]
    monkeypatch.setattr(checks, "attend", wrong)
    checks.compare_attention(settings, findings)
    assert list(rows(findings).values()) == [False]


def test_attention_that_is_right_in_bfloat16_is_taken_for_right(load, toys, monkeypatch):
    """PyTorch's own of a CPU, which rounds as those of a GPU do; the rehearsal has float32 alone."""
    checks = load("gpu_checks")
    settings, findings = toys
    settings.toy = False
    monkeypatch.setattr(checks, "attend", torch.nn.functional.scaled_dot_product_attention)
    checks.compare_attention(settings, findings)
    assert list(rows(findings).values()) == [True]


def test_no_utterance_is_too_long_for_the_batches_of_a_run(load, toys, tmp_path, monkeypatch):
    """Of the corpus that the session makes on a GPU, of one small encoder for all."""
    checks = load("gpu_checks")
    settings, _ = toys
    settings.toy, settings.device = False, "cuda"
    Path(settings.work).mkdir()
    commands = []
    monkeypatch.setattr(checks, "_tell_run", lambda title, words, *_: commands.append(words))
    monkeypatch.setattr(checks, "_stop_and_resume", lambda *_: None)
    monkeypatch.setattr(checks, "_run_all", lambda jobs, _: [job() for job in jobs.values()])
    checks.pretraining(settings, None, 60)
    assert len(commands) == 8
    for number, words in enumerate(commands):
        given = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word and word.startswith("--"))
        yaml = next(word for word in words if word.endswith(".yaml"))
        text = (checks.RECIPES / "LibriSpeech" / "pretrain" / yaml).read_text()
        limits = {
            name: float(given.get(name, re.search(rf"^{name}: ([\d.]+)", text, re.MULTILINE)[1]))
            for name in ("max_batch_seconds", "min_seconds", "max_seconds")
        }
        batch_samples = round(16000 * limits.pop("max_batch_seconds"))
        manifests = prepare_librispeech(
            Path(settings.work) / "noise", tmp_path / str(number), ["train-clean-100"], ["dev-clean"]
        )
        for name, sampler in (("train", LadderBatchSampler), ("valid", PaddedBatchSampler)):
            table = AudioTable.from_manifest(read_manifest(manifests[name]), 16000, **limits)
            assert len(sampler(table.lengths, batch_samples, sample_rate=16000)) > 0


def test_a_compiled_layer_is_compared_with_the_eager_one(load, toys, monkeypatch):
    checks = load("gpu_checks")
    settings, findings = toys
    torch._dynamo.reset()

    def wrong(graph, inputs):
        return lambda *given: [1.001 * one if i == 0 else one for i, one in enumerate(graph.forward(*given))]

    with monkeypatch.context() as patch:
        patch.setattr(checks, "compare_losses", lambda *arguments: None)
        patch.setattr(checks, "compare_padded", lambda *arguments: None)
        patch.setattr(checks, "compare_labels", lambda *arguments: None)
        patch.setattr(checks, "compare_attention", lambda *arguments: None)
        patch.setattr(checks, "compare_compiled", lambda name, model, *_: models.update({name: model}))
        models = {}
        checks.equality(settings, findings, 60)
        assert not models  # a rehearsal has no compiler
        checks.equality(checks.Settings("cpu", False, settings.output, settings.work), findings, 600)
    for name, backend in (("bestrq", "eager"), ("wav2vec2", wrong)):
        torch._dynamo.reset()
        checks.compare_compiled(name, models[name], settings, findings, backend)
    assert [row["good"] for row in json.loads(findings.path.read_text())["rows"]] == [True, False]


def test_hidden_states_that_heed_the_padding_are_found(load, toys, make_speech_encoder):
    checks = load("gpu_checks")
    settings, findings = toys

    class Heedless(torch.nn.Module):
        """Forgets the lengths in the second and third call, which are those on the device."""

        def __init__(self):
            super().__init__()
            self.encoder, self.calls = make_speech_encoder(normalize="global"), [0]

        def __deepcopy__(self, memo):
            return self

        def forward(self, wavs, lengths):
            self.calls[0] += 1
            return self.encoder(wavs, lengths if self.calls[0] == 1 else None)

    for name, encoder in (("right", make_speech_encoder(normalize="global")), ("wrong", Heedless())):
        checks.compare_padded(name, encoder, settings, findings)
    assert list(rows(findings).values()) == [True, False]


def test_labels_of_other_features_are_found(load, toys, monkeypatch):
    checks = load("gpu_checks")
    settings, findings = toys
    frames, calls = checks._frames, []

    def off(model, wavs):
        calls.append(wavs)
        return frames(model, wavs) * (1.01 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(checks, "_frames", off)
    monkeypatch.setattr(checks, "compare_padded", lambda *arguments: None)
    monkeypatch.setattr(checks, "compare_attention", lambda *arguments: None)
    monkeypatch.setattr(checks, "compare_losses", lambda *arguments: None)
    checks.equality(settings, findings, 60)
    assert len(calls) == 2 and rows(findings) == {"labels as on a CPU": False}


def test_the_part_of_cost_projects_the_papers_runs(load, toys):
    settings, findings = toys
    load("gpu_measures").cost(settings, findings, 60)
    figures = findings.figures["cost bestrq_small"]
    assert figures["projected_hours"] == pytest.approx(200_000 * 800 / figures["audio_seconds_per_second"] / 3600)
    assert "the paper's BEST-RQ took 109 V100-hours" in findings.rows[0]["outcome"]
    assert "the paper's wav2vec 2.0 took 262 V100-hours" in findings.rows[1]["outcome"]


def test_the_trace_names_what_is_the_most_expensive(load, toys):
    settings, findings = toys
    load("gpu_measures").trace(settings, findings, 60)
    kernels = findings.figures["trace wav2vec2_small"]["kernels"]
    times = [float(row[2]) for row in kernels]
    assert times == sorted(times, reverse=True) and any("mm" in row[0] for row in kernels)


def test_every_command_has_options_that_its_recipe_knows(load, toys, make_speech_encoder, monkeypatch, tmp_path):
    checks, quality = load("gpu_checks"), load("gpu_quality")
    settings, _ = toys
    data = {"train": str(tmp_path), "corpus": "librispeech", "extra": [str(tmp_path)]}
    (tmp_path / "train-clean-100").mkdir()
    for name in ("bestrq", "wav2vec2"):
        monkeypatch.chdir(checks.RECIPES / "LibriSpeech" / "pretrain")
        words = checks.pretraining_command(name, settings, tmp_path / name, "bf16", "--optimizer_step_limit=9")
        hparams = load_recipe(words[2:])[3]
        assert (hparams["optimizer_step_limit"], hparams["precision"], hparams["log_interval"]) == (9, "bf16", 1)
        options = quality.pretraining_options(name, 60, data, tmp_path / "quality" / name, settings, "memory")
        hparams = load_recipe([f"hparams/{name}.yaml", *options])[3]
        assert (hparams["train_splits"], hparams["warmup_updates"]) == (["train-clean-100"], 5)
        assert hparams["extra_folders"] == [str(tmp_path)]
    assert hparams["quantizer"].temperature_decay ** 60 == pytest.approx(0.25)  # of wav2vec 2.0
    for toy in (True, False):
        settings.toy = toy
        for recipe in checks.DOWNSTREAM:
            monkeypatch.chdir(checks.RECIPES / recipe)
            words = checks.downstream_command(recipe, settings, tmp_path, "fbank", tmp_path / "run")
            assert load_recipe(words[2:])[3]["number_of_epochs"] == 1
    encoder = str(save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card"))
    monkeypatch.chdir(checks.RECIPES / checks.FINE_TUNED)
    words = checks.downstream_command(checks.FINE_TUNED, settings, tmp_path, encoder, tmp_path / "run", True)
    hparams = load_recipe(words[2:])[3]
    assert hparams["encoder_rest"] == 0.5 and not hparams["speech_encoder"].freeze


def test_encoders_are_kept_in_half_precision(load, make_speech_encoder, tmp_path):
    encoder = save_encoder(make_speech_encoder(normalize="global"), tmp_path / "encoder", "# Card", step=1)
    load("gpu_quality").keep_half(encoder, tmp_path / "half")
    whole, half = (load_file(folder / "model.safetensors") for folder in (encoder, tmp_path / "half"))
    assert whole.keys() == half.keys() and {str(one.dtype) for one in half.values()} == {"torch.float16"}
    wavs = next(iter(whole.values())).new_zeros(1, 16000).normal_()
    a, b = (PretrainedEncoder(str(folder), freeze=True)(wavs) for folder in (encoder, tmp_path / "half"))
    assert (a - b).abs().max() < 0.01 * a.abs().max()


def test_without_a_gpu_only_a_rehearsal_is_possible(load, capsys, monkeypatch, tmp_path):
    session = load("gpu_session")
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        session.main(["--output", str(tmp_path / "new")])
    assert "--toy rehearses on a CPU" in capsys.readouterr().err and not (tmp_path / "new").exists()
