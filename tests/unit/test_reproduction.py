"""A preset becomes the recipes' own commands; what they leave becomes the paper's tables, and nothing else does."""

import csv
import json
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy

from speechbrain_bestrq import cli
from speechbrain_bestrq.commands import reproduce
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.reproduction.leads import judge, lead
from speechbrain_bestrq.reproduction.pairs import PAIRS_FILE
from speechbrain_bestrq.reproduction.plan import (
    CORPORA,
    PRESETS,
    RECIPES,
    encoder_names,
    make_plan,
    read_preset,
    updates_of,
    yaml_value,
)
from speechbrain_bestrq.reproduction.preflight import check_inputs
from speechbrain_bestrq.reproduction.publishing import publish
from speechbrain_bestrq.reproduction.report import write_reproduction
from speechbrain_bestrq.reproduction.stages import StageState
from speechbrain_bestrq.reproduction.tables import PAPER_FROZEN, Cell, Runs, frozen_table, read_plan, write_plan
from speechbrain_bestrq.results import write_errors
from speechbrain_bestrq.verification import write_scores

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
#: A preset of one pre-training for each method.
TWO_SEEDS = str(Path(__file__).parents[1] / "helpers" / "two_seeds.yaml")


def everything(name, folder):
    """The plan of a preset with all corpora."""
    preset = read_preset(name)
    given = {} if preset.get("synthetic") else {corpus: Path("/data") / corpus for corpus in CORPORA}
    return preset, make_plan(preset, given, folder)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_of_every_preset_is_a_command_that_its_recipe_takes(name, tmp_path):
    _, stages = everything(name, tmp_path)
    StageState(stages, tmp_path)  # in an order that can be
    for stage in stages:
        words = list(stage.command)
        if "synthesize" in words:
            cli.build_parser().parse_args(words[words.index("synthesize") :])
            continue
        if "check-codebook" in words:
            place = words.index("check-codebook")
            cli.build_parser().parse_args(words[place : place + 2])
            path, given = Path(words[place + 1]), words[place + 2 :: 2]
            assert path.is_file() and stage.needs in ((), ("speech/librispeech",))
            text = path.read_text(encoding="utf-8")
            assert all(f"\n{option.removeprefix('--')}:" in text for option in given)
            continue
        place = next(number for number, word in enumerate(words) if word.endswith("train.py"))
        assert Path(words[place]).is_file()
        # train.py refuses keys that its YAML does not have
        keys = set(re.findall(r"^(\w+):", Path(words[place + 1]).read_text(), re.MULTILINE))
        given = dict(zip(words[place + 3 :: 2], words[place + 4 :: 2], strict=True))
        assert words[place + 2] == "--noprogressbar" and {f"--{key}" for key in keys} >= given.keys()
        assert given["--output_folder"] == str(tmp_path / stage.name)


def test_a_stage_is_the_same_on_other_devices_by_another_interpreter_from_another_place(tmp_path, monkeypatch):
    def marks(name, folder, **more):
        preset = read_preset(name)
        given = {} if preset.get("synthetic") else {corpus: Path("/data") / corpus for corpus in CORPORA}
        return StageState(make_plan(preset, given, folder, **more), folder).marks

    paper, demo = marks("paper", tmp_path / "one"), marks("demo", tmp_path / "one")
    monkeypatch.setattr("sys.executable", "/elsewhere/python")
    moved = tmp_path / "checkout" / "recipes"
    shutil.copytree(RECIPES, moved)
    monkeypatch.setattr("speechbrain_bestrq.reproduction.plan.RECIPES", moved)
    assert marks("paper", tmp_path / "other", pretraining_devices=8) == paper
    assert marks("demo", tmp_path / "other") == demo
    # and not with other settings of a YAML
    yaml = moved / "LibriSpeech" / "pretrain" / "hparams" / "bestrq_paper.yaml"
    yaml.write_text(yaml.read_text().replace("max_grad_norm: ", "max_grad_norm: 1"))
    changed = {name for name, mark in marks("paper", tmp_path / "other").items() if mark != paper[name]}
    assert changed and all("bestrq" in name or name.startswith("masking") for name in changed)


def test_the_plan_of_the_paper_has_its_rows_and_seeds(tmp_path):
    preset, stages = everything("paper", tmp_path)
    names = [stage.name for stage in stages]
    assert encoder_names(preset)[2:] == list(PAPER_FROZEN)
    for encoder in encoder_names(preset):
        for seed in (1, 2, 3):
            assert {f"{task}-frozen/{encoder}/{seed}" for task in preset["tasks"]} <= set(names)
            assert (f"asr-fine-tuned/{encoder}/{seed}" in names) == (encoder in PAPER_FROZEN)
    probe = next(stage for stage in stages if stage.name == "intent-frozen/random/2")
    assert probe.needs == ("pretraining/bestrq",)
    assert f"random:{tmp_path}/pretraining/bestrq/encoder@200000" in probe.command
    assert [name for name in names if name.startswith("masking/")] == [f"masking/{s}" for s in (0.01, 0.05, 0.1, 0.12)]
    sweep = next(stage for stage in stages if stage.name == "masking/0.05")
    assert sweep.command[sweep.command.index("--mask_prob") + 1] == "0.2"
    probe = next(stage for stage in stages if stage.name == "masking-asr/0.05/1")
    assert probe.command[probe.command.index("--test_splits") + 1] == "[dev-clean]"


@pytest.mark.parametrize("name", NAMES)
def test_both_methods_hear_as_much_audio(name):
    preset, heard = read_preset(name), set()
    for method, settings in preset["pretraining"].items():
        path = RECIPES / "LibriSpeech" / "pretrain" / "hparams" / f"{settings['yaml']}.yaml"
        keys = ("optimizer_step_limit", "grad_accumulation_factor", "max_batch_seconds")
        limit, factor, seconds = (settings["options"].get(key, yaml_value(path, key)) for key in keys)
        heard.add(limit * factor * seconds)
        assert limit == max(updates_of(preset, method))
    assert len(heard) == 1


def test_training_from_scratch_may_have_options_of_its_own(tmp_path):
    options = {"encoder_learning_rate": 0.0001, "number_of_epochs": 3}
    untrained = {"encoder_learning_rate": 0.001, "encoder_rest": 0}
    settings = {"yaml": "bestrq_finetune", "options": options, "untrained": untrained}
    preset = {**read_preset(TWO_SEEDS), "tasks": {"intent": {"fine-tuned": settings}}, "fine_tune_untrained": True}
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(preset))
    corpora = {"librispeech": Path("/data/L"), "slurp": Path("/data/S")}
    stages = {stage.name: stage.command for stage in make_plan(read_preset(str(path)), corpora, tmp_path)}
    for encoder, given in (("random", {**options, **untrained}), ("bestrq-720", options), ("wav2vec2-720", options)):
        command = stages[f"intent-fine-tuned/{encoder}/1"]
        words = dict(zip(command[4::2], command[5::2], strict=True))
        assert {key: words.get(f"--{key}") for key in (*options, *untrained)} == {
            key: str(given[key]) if key in given else None for key in (*options, *untrained)
        }


def test_each_method_may_have_updates_of_its_own(tmp_path):
    preset = read_preset(TWO_SEEDS)
    preset["updates"] = {"bestrq": [4, 8], "wav2vec2": [2]}
    preset["pretraining"]["bestrq"]["options"]["optimizer_step_limit"] = 8
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(preset))
    preset = read_preset(str(path))
    assert encoder_names(preset) == ["fbank", "random", "wav2vec2-2", "bestrq-4", "bestrq-8"]
    stages = {stage.name: stage for stage in make_plan(preset, {"librispeech": Path("/data/L")}, tmp_path)}
    for method, steps in (("bestrq", "[4, 8]"), ("wav2vec2", "[2]")):
        command = stages[f"pretraining/{method}"].command
        assert command[command.index("--encoder_at_steps") + 1] == steps
    assert f"{tmp_path}/pretraining/wav2vec2/encoder@2" in stages["asr-frozen/wav2vec2-2/1"].command
    assert f"random:{tmp_path}/pretraining/bestrq/encoder@8" in stages["asr-frozen/random/1"].command
    write_plan(tmp_path, "own", preset, ["librispeech"], "reproduce", marks_of(preset, tmp_path, ["librispeech"]))
    for method, step in (("bestrq", 8), ("wav2vec2", 2)):
        (tmp_path / "pretraining" / method / f"encoder@{step}").mkdir(parents=True)
    text = write_reproduction(tmp_path)["markdown"].read_text()
    assert "pre-trained for 4 and 8 updates (BEST-RQ), 2 updates (wav2vec 2.0), seeds" in text
    assert 'PretrainedEncoder("pretraining/bestrq/encoder@8"' in text


def test_tasks_without_a_corpus_are_left_out_and_options_are_handed_on(tmp_path):
    given = {"librispeech": Path("/data/L"), "slurp": Path("/data/S")}
    swept = make_plan(read_preset("paper"), given, tmp_path, language_model="/lm.arpa")
    assert not [stage for stage in swept if stage.kind == "masking-asr" and "/lm.arpa" in stage.command]
    options = {"language_model": "/lm.arpa", "pretraining_devices": 2, "options": {"num_workers": 3}}
    options["extra_folders"] = ["/data/my radio", "/data/talks"]
    stages = make_plan(read_preset(TWO_SEEDS), given, tmp_path, **options)
    assert {stage.kind for stage in stages} == {"codebook-check", "pretraining", "asr-frozen", "intent-frozen"}
    check = stages.pop(0)
    assert check.name == "codebook-check/bestrq" and '["/data/my radio", "/data/talks"]' in check.command
    for stage in stages:
        assert ("--nproc_per_node=2" in stage.command) == (stage.kind == "pretraining")
        assert stage.devices == (2 if stage.kind == "pretraining" else 1)
        assert ('["/data/my radio", "/data/talks"]' in stage.command) == (stage.kind == "pretraining")
        assert ("/lm.arpa" in stage.command) == (stage.kind == "asr-frozen")
        assert stage.command[stage.command.index("--num_workers") + 1] == "3"


def test_an_update_is_as_long_on_any_number_of_devices(tmp_path):
    for devices, factor, of_masking in ((1, "8", "4"), (4, "2", "1"), (8, "1", "1")):
        stages = make_plan(read_preset("paper"), {"librispeech": "/data"}, tmp_path, pretraining_devices=devices)
        trained = [stage for stage in stages if stage.kind in ("pretraining", "masking")]
        assert len(trained) == 6
        for stage in trained:
            expected = of_masking if stage.kind == "masking" else factor  # the paper's Table 3 had half the GPUs
            assert stage.command[stage.command.index("--grad_accumulation_factor") + 1] == expected
            assert stage.devices == min(devices, 4 if stage.kind == "masking" else 8)
    with pytest.raises(InputError, match="--pretraining_devices 3 does not divide the 8 micro-batches"):
        make_plan(read_preset("paper"), {"librispeech": "/data"}, tmp_path, pretraining_devices=3)


def test_hidden_states_are_made_by_one_stage_for_the_others(tmp_path):
    _, stages = everything(TWO_SEEDS, tmp_path)
    by_name = {stage.name: stage for stage in stages}
    assert by_name["intent-frozen/fbank/2"].after == ("intent-frozen/fbank/1",)
    assert by_name["intent-frozen/bestrq-720/2"].needs == ("pretraining/bestrq",)
    assert by_name["intent-frozen/bestrq-720/2"].after == ("intent-frozen/bestrq-720/1",)
    assert by_name["intent-frozen/random/2"].after == ()  # others for each seed


FEW = {
    "intent": {"frozen": {"yaml": "probe_small", "options": {"examples_per_class": 20}}, "fine-tuned": None},
    "verification": {"fine-tuned": {"yaml": "bestrq_finetune", "options": {"train_speakers": 7}}},
}


def test_few_labels_are_drawn_by_the_seed_and_share_the_hidden_states(tmp_path):
    preset = {**read_preset(TWO_SEEDS), "few_labels": FEW, "fine_tune_untrained": True}
    stages = make_plan(preset, dict.fromkeys(CORPORA, Path("/data")), tmp_path)
    by_name = {stage.name: stage for stage in stages}
    expected = [("intent-frozen", name) for name in encoder_names(preset)]
    expected += [("verification-fine-tuned", name) for name in encoder_names(preset) if name != "fbank"]
    few = {name for name in by_name if "-few/" in name}
    assert few == {f"{kind}-few/{encoder}/{seed}" for kind, encoder in expected for seed in (1, 2)}
    probes = [stage for stage in stages if stage.kind.split("-")[0] in preset["tasks"]]
    options = {stage.name: dict(zip(stage.command[4::2], stage.command[5::2], strict=True)) for stage in probes}
    for seed in ("1", "2"):
        given = options[f"intent-frozen-few/bestrq-720/{seed}"]
        assert (given["--examples_per_class"], given["--label_seed"], given["--seed"]) == ("20", seed, seed)
        assert given["--cache_folder"] == options[f"intent-frozen/bestrq-720/{seed}"]["--cache_folder"]
        untrained = options[f"verification-fine-tuned-few/random/{seed}"]
        assert untrained["--encoder"] == f"random:{tmp_path}/pretraining/bestrq/encoder@720"
    assert "--label_seed" not in options["intent-frozen/bestrq-720/1"]
    # the hidden states of all are made once, and those of few are among them
    assert by_name["intent-frozen-few/bestrq-720/1"].after == ("intent-frozen/bestrq-720/1",)


@pytest.mark.parametrize("options", [None, {"examples_per_class": 50}])
def test_few_labels_keep_hidden_states_of_their_own_where_those_of_all_are_not_kept(tmp_path, options):
    preset = {**read_preset(TWO_SEEDS), "few_labels": FEW}
    of_all = None if options is None else {"yaml": "probe_small", "options": options}
    preset["tasks"] = {"intent": {"frozen": of_all}}
    stages = make_plan(preset, dict.fromkeys(CORPORA, Path("/data")), tmp_path)
    few = [stage for stage in stages if stage.kind == "intent-frozen-few"]
    folders = [stage.command[stage.command.index("--cache_folder") + 1] for stage in few]
    # two stages at once would write one folder
    assert len(set(folders)) == len(few) == 8 and not any(stage.after for stage in few)


def test_few_labels_that_were_tried_first_are_not_tried_again_when_all_are_added(tmp_path):
    preset = {**read_preset(TWO_SEEDS), "few_labels": FEW}
    corpora = dict.fromkeys(CORPORA, Path("/data"))
    marks = [
        StageState(make_plan({**preset, "tasks": tasks}, corpora, tmp_path), tmp_path).marks
        for tasks in ({}, preset["tasks"])
    ]
    few = {name for name in marks[0] if "-few/" in name}
    assert few and all(marks[0][name] == marks[1][name] for name in few)


def test_a_preset_may_say_that_it_has_no_masking(tmp_path):
    preset = {**read_preset(TWO_SEEDS), "masking": None}
    write_plan(tmp_path, "own", preset, list(CORPORA), "reproduce", marks_of(preset, tmp_path))
    assert "paper 25.24" in write_reproduction(tmp_path)["markdown"].read_text()


# ---------------------------------------------------------------- tables


def score(value):
    return {"value": value, "low": value - 0.02, "high": value + 0.02}


def write_probe(folder, run, sets, corpus="speechocean762", within="", command=None, **more):
    place = folder / run / within
    place.mkdir(parents=True)
    results = {
        "corpus": corpus,
        "sets": sets,
        "command": command or f"python train.py {run}",
        "device_hours": 0.5,
        **more,
    }
    if "encoder" not in more:
        results["encoder"] = {"corpus": "LibriSpeech", "train_hours": 959.0}
    (place / "results.json").write_text(json.dumps(results))
    (folder / run / "stage.json").write_text(json.dumps({"mark": f"mark of {run}", "made": "once"}))


def marks_of(preset, folder, corpora=CORPORA):
    """For the runs that :func:`write_probe` writes."""
    given = {corpus: Path("/data") for corpus in corpora}
    return {stage.name: f"mark of {stage.name}" for stage in make_plan(preset, given, folder)}


def write_pretraining(folder, method, speed):
    place = folder / "pretraining" / method
    place.mkdir(parents=True)
    run = {
        "model": method,
        "corpus": "speechocean762",
        "train_hours": 8.0,
        "seed": 1000,
        "parameters": 5e6,
        "device": "a CPU",
        "command": f"train {method}",
    }
    (place / "run.json").write_text(json.dumps(run))
    record = {"mark": f"mark of pretraining/{method}", "made": "once", "commit": "abc123"}
    (place / "stage.json").write_text(json.dumps(record))
    lines = [
        {"event": "valid", "step": step, "loss": 5.0, "accuracy": step / 1e5, "audio_hours": step / 100}
        | {"device_hours": step / 100 / speed, "codes_used": 200.0, "code_perplexity": 150.2, "commonest_share": 0.025}
        for step in (1000, 2000)
    ]
    (place / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def reproduction(tmp_path):
    """A reproduction of which intents, and recognition in part, are done."""
    preset = {**read_preset(TWO_SEEDS), "updates": [1000, 2000]}
    command = "sb-bestrq reproduce --preset small"
    corpora = ["librispeech", "slurp"]
    write_plan(tmp_path, "small", preset, corpora, command, marks_of(preset, tmp_path, corpora))
    accuracies = {"fbank": 0.5, "random": 0.52, "bestrq-1000": 0.51, "bestrq-2000": 0.6, "wav2vec2-2000": 0.53}
    for encoder, accuracy in accuracies.items():
        for seed in (1, 2):
            sets = {"test": {"accuracy": score(accuracy + 0.01 * seed)}}
            weights = [0.2, 0.8] if encoder == "bestrq-2000" else [1.0]
            write_probe(tmp_path, f"intent-frozen/{encoder}/{seed}", sets, "Speech Commands", layer_weights=weights)
    sets = {"test-clean": {"wer": score(0.9), "cer": score(0.3)}, "test-other": {"wer": score(0.95), "cer": score(0.4)}}
    write_probe(tmp_path, "asr-frozen/bestrq-2000/1", sets)
    write_pretraining(tmp_path, "bestrq", 30.0)
    write_pretraining(tmp_path, "wav2vec2", 10.0)
    return tmp_path


def rows_of(path, table="Table 1"):
    """The rows of a table of the Markdown report, by encoder and column."""
    part = path.read_text().split(f"## {table}")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_each_figure_is_the_mean_over_its_runs_and_links_to_them(reproduction):
    files = write_reproduction(reproduction)
    rows = rows_of(files["markdown"])
    cell = rows["BEST-RQ, 2,000 updates"]["intent accuracy (Speech Commands)"]
    assert cell == (
        "[61.50 ± 0.71](intent-frozen/bestrq-2000/1/results.json)<br>"
        "[seed 1: 61.00](intent-frozen/bestrq-2000/1/results.json)<br>"
        "[seed 2: 62.00](intent-frozen/bestrq-2000/2/results.json)"
    )
    one = rows["BEST-RQ, 2,000 updates"]["test-clean WER (speechocean762)"]
    assert one == "[90.00 (88.00 to 92.00), 1 of 2 seeds](asr-frozen/bestrq-2000/1/results.json)"
    assert rows["untrained"]["test-clean WER (speechocean762)"] == "not yet run"
    assert rows["untrained"]["speaker EER"] == "not run"
    page = files["html"].read_text()
    links = set(re.findall(r'href="([^"]+)"', page))
    assert links and all((reproduction / link).is_file() for link in links)
    assert "http" not in page.split("</style>")[1].replace("http-equiv", "") and "data:image/png;base64," in page


def test_stand_ins_are_named_and_not_compared_with_the_paper(reproduction):
    rows = rows_of(write_reproduction(reproduction)["markdown"])
    assert rows["BEST-RQ, 100,000 updates"]["intent accuracy (Speech Commands)"] == "not run<br>paper 74.30, SLURP"
    assert not [cell for row in rows.values() for cell in row.values() if "difference" in cell]
    text = (reproduction / "report.md").read_text()
    assert "in the place of SLURP: Speech Commands. Its figures do not compare with the paper's." in text
    assert "in the place of LibriSpeech: speechocean762." in text
    assert "in the place of IEMOCAP: not run: no corpus was given" in text


def test_on_the_papers_corpus_the_difference_is_given(tmp_path):
    preset = {**read_preset("paper"), "seeds": [1]}
    command = "sb-bestrq reproduce --preset paper"
    write_plan(tmp_path, "paper", preset, list(CORPORA), command, marks_of(preset, tmp_path))
    write_probe(tmp_path, "verification-frozen/bestrq-200000/1", {"vox1": {"eer": score(0.04)}}, "VoxCeleb")
    write_probe(
        tmp_path, "emotion-frozen/bestrq-200000/1", {"test": {"accuracy": score(0.63)}}, "IEMOCAP", within="all"
    )
    write_probe(tmp_path, "masking-asr/0.05/1", {"dev-clean": {"wer": score(0.25)}}, "LibriSpeech")
    rows = rows_of(write_reproduction(tmp_path)["markdown"])["BEST-RQ, 200,000 updates"]
    assert rows["speaker EER (VoxCeleb)"].endswith("<br>paper 3.53<br>difference +0.47")
    assert rows["emotion accuracy (IEMOCAP)"].endswith("<br>paper 63.80<br>difference -0.80")
    assert "(emotion-frozen/bestrq-200000/1/all/results.json)" in rows["emotion accuracy (IEMOCAP)"]
    masking = rows_of(tmp_path / "report.md", "Table 3")
    assert masking["5 %"]["dev-clean WER (LibriSpeech)"] == (
        "[25.00 (23.00 to 27.00)](masking-asr/0.05/1/results.json)<br>paper 25.24<br>difference -0.24"
    )
    assert masking["1 %"]["dev-clean WER (LibriSpeech)"] == "not yet run<br>paper 36.45"
    # not of fewer labels or updates than the paper's
    results = tmp_path / "verification-frozen" / "bestrq-200000" / "1" / "results.json"
    few = {**json.loads(results.read_text()), "settings": {"train_speakers": 20}}
    results.write_text(json.dumps(few))
    plan = read_plan(tmp_path)
    plan["preset"]["masking"]["updates"] = 500
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    rows = rows_of(write_reproduction(tmp_path)["markdown"])["BEST-RQ, 200,000 updates"]
    assert "difference" not in rows["speaker EER (VoxCeleb)"]
    assert "difference" in rows["emotion accuracy (IEMOCAP)"]
    assert "difference" not in rows_of(tmp_path / "report.md", "Table 3")["5 %"]["dev-clean WER (LibriSpeech)"]


@pytest.mark.parametrize(
    ("heard", "hours"),
    [("LibriSpeech", 959.0), ("LibriSpeech", 100.6), ("LibriSpeech + ten hours of my own", 969.0), (None, None)],
)
def test_an_encoder_that_heard_other_speech_is_not_compared_with_the_papers(tmp_path, heard, hours):
    preset = {**read_preset("paper"), "seeds": [1]}
    write_plan(tmp_path, "paper", preset, list(CORPORA), "reproduce", marks_of(preset, tmp_path))
    run = "verification-frozen/bestrq-200000/1"
    write_probe(
        tmp_path, run, {"vox1": {"eer": score(0.04)}}, "VoxCeleb", encoder={"corpus": heard, "train_hours": hours}
    )
    rows = rows_of(write_reproduction(tmp_path)["markdown"])["BEST-RQ, 200,000 updates"]
    assert ("difference" in rows["speaker EER (VoxCeleb)"]) == ((heard, hours) == ("LibriSpeech", 959.0))


def test_a_figure_of_two_corpora_names_both_and_is_not_compared(tmp_path):
    preset = {**read_preset("paper"), "seeds": [1, 2]}
    write_plan(tmp_path, "paper", preset, list(CORPORA), "reproduce", marks_of(preset, tmp_path))
    for seed, corpus in ((1, "a stand-in"), (2, "VoxCeleb")):
        run = f"verification-frozen/bestrq-200000/{seed}"
        write_probe(tmp_path, run, {"vox1": {"eer": score(0.04)}}, corpus)
    rows = rows_of(write_reproduction(tmp_path)["markdown"])["BEST-RQ, 200,000 updates"]
    assert "difference" not in rows["speaker EER (VoxCeleb; a stand-in)"]


def test_where_pre_training_does_not_pay_the_report_says_so(reproduction):
    sentences = judge(frozen_table(Runs(reproduction, read_plan(reproduction))), each_seed_pretrained=False)
    assert sentences == [
        "intent accuracy: wav2vec 2.0, 2,000 updates is ahead of the untrained encoder by 1.00 points, "
        "which may be chance.",
        "intent accuracy: BEST-RQ, 1,000 updates does not beat the untrained encoder (52.50 against 53.50 %).",
        "intent accuracy: BEST-RQ, 2,000 updates beats the untrained encoder by 8.00 points with the one "
        "pre-training that was tried.",
    ]
    assert all(sentence in (write_reproduction(reproduction)["markdown"]).read_text() for sentence in sentences)


def test_the_report_tells_how_far_each_is_ahead(reproduction):
    # accuracies of 61 and 62 against 53 and 54, each ± 2
    text = write_reproduction(reproduction)["markdown"]
    rows = rows_of(text, "Does pre-training pay?")
    untrained = [
        f"{encoder}, ahead of {base}"
        for encoder in ("wav2vec 2.0, 2,000 updates", "BEST-RQ, 1,000 updates", "BEST-RQ, 2,000 updates")
        for base in ("filter banks", "untrained")
    ]
    ours = [
        f"BEST-RQ, {updates} updates, ahead of wav2vec 2.0, {others} updates"
        for updates in ("1,000", "2,000")
        for others in ("1,000", "2,000")
    ]
    assert [row for row in rows if row.startswith(("BEST", "wav2vec"))] == untrained + ours[1::2]
    assert rows[ours[3]]["intent accuracy"].startswith("+7.00 ± ")
    told = "BEST-RQ beside wav2vec 2.0; what each cost stands below. There is one pre-training of each: of others this"
    assert told in text.read_text() and text.read_text().count("In these tables: points by which") == 1
    ahead = rows["BEST-RQ, 2,000 updates, ahead of untrained"]
    welch = 4.302653 * 0.5**0.5  # two degrees of freedom; deviations of 0.5 ** 0.5, of two seeds each
    assert ahead["intent accuracy"] == f"+8.00 ± {(welch**2 + 8) ** 0.5:.2f}*"
    assert rows["BEST-RQ, 1,000 updates, ahead of filter banks"]["intent accuracy"].startswith("+1.00 ± ")
    assert list(ahead) == ["", "intent accuracy"]  # recognition was not run on both sides


def test_a_lead_knows_nothing_of_seeds_that_one_side_lacks(reproduction):
    """The second seed of one encoder is off, with a wide interval; the other one has not got that far."""
    shutil.rmtree(reproduction / "intent-frozen" / "random" / "2")
    run = reproduction / "intent-frozen" / "bestrq-2000" / "2"
    results = json.loads((run / "results.json").read_text())
    results["sets"]["test"]["accuracy"] = {"value": 0.9, "low": 0.1, "high": 1.0}
    (run / "results.json").write_text(json.dumps(results))
    rows = rows_of(write_reproduction(reproduction)["markdown"], "Does pre-training pay?")
    ahead = rows["BEST-RQ, 2,000 updates, ahead of untrained"]["intent accuracy"]
    assert ahead.startswith(f"+8.00 ± {8**0.5:.2f}")


def test_errors_on_the_same_utterances_are_compared_utterance_by_utterance(reproduction, tmp_path_factory):
    """Ten speakers, of whom each is easy or hard for all: the encoders differ by one error in ten of each."""
    for encoder, more in (("random", 1), ("bestrq-2000", 0), ("fbank", 1)):
        for seed in (1, 2):
            rows = [
                {"ID": f"{speaker}-{number}", "group": str(speaker), "error_errors": int(number < speaker + more)}
                for speaker in range(10)
                for number in range(10)
            ]
            rows = [{**row, "error_total": 1} for row in rows]
            folder = reproduction / "intent-frozen" / encoder / str(seed)
            write_errors(folder, "test", rows[: 90 if encoder == "fbank" else 100], list(rows[0]))
    welch = 4.302653 * 0.5**0.5
    name = "BEST-RQ, 2,000 updates, ahead of "
    for folder in (reproduction, tmp_path_factory.mktemp("copy") / "published"):
        if folder != reproduction:
            publish(reproduction, folder)
            assert not list(folder.rglob("errors_*"))
        rows = rows_of(write_reproduction(folder)["markdown"], "Does pre-training pay?")
        assert rows[f"{name}untrained"]["intent accuracy"] == f"+8.00 ± {welch:.2f}"  # no chance of utterances is left
        assert rows[f"{name}filter banks"]["intent accuracy"].endswith("*")  # of other utterances
    # of a run that was made anew nothing is known before its errors are read
    run = reproduction / "intent-frozen" / "random" / "1"
    record = json.loads((run / "stage.json").read_text())
    (run / "stage.json").write_text(json.dumps({**record, "made": "anew"}))
    (run / "errors_test.csv").unlink()
    rows = rows_of(write_reproduction(reproduction)["markdown"], "Does pre-training pay?")
    assert rows[f"{name}untrained"]["intent accuracy"].endswith("*")


def test_the_report_has_half_the_interval_that_other_speakers_would_give(reproduction):
    """The encoders differ on five of ten speakers: of ten that are drawn of them, on as many as the binomial says."""
    corpora = ["librispeech", "slurp", "voxceleb"]
    preset = read_plan(reproduction)["preset"]
    write_plan(reproduction, "small", preset, corpora, "reproduce", marks_of(preset, reproduction, corpora))
    trials = [(1, f"id{speaker}/a/1", f"id{speaker}/b/1") for speaker in range(10)]
    trials += [(0, f"id{one}/a/1", f"id{other}/a/1") for one, other in combinations(range(10), 2)]
    for encoder, wrong, error in (("random", 5, 0.3), ("bestrq-2000", 0, 0.1)):
        # a speaker's target scores below all impostors, which are alike, or above them: the EER is the share of those
        scores = np.array([0.0] * wrong + [1.0] * (10 - wrong) + [0.5] * 45)
        for seed in (1, 2):
            rows = [
                {"ID": f"{speaker}-{n}", "group": str(speaker), "error_errors": int(n == 0 and speaker < wrong)}
                for speaker in range(10)
                for n in range(10)
            ]
            rows = [{**row, "error_total": 1} for row in rows]
            write_errors(reproduction / "intent-frozen" / encoder / str(seed), "test", rows, list(rows[0]))
            run = f"verification-frozen/{encoder}/{seed}"
            write_probe(reproduction, run, {"vox1": {"eer": score(error + 0.01 * seed)}}, "VoxCeleb")
            write_scores(reproduction / run, "vox1", trials, {"cosine": scores})
    text = write_reproduction(reproduction)["markdown"].read_text()
    low, high = scipy.stats.binom(10, 0.5).ppf([0.025, 0.975])
    halves = [100 * (high - low) / 10 / 2, 100 * (high - low) / 100 / 2]
    assert list(json.loads((reproduction / PAIRS_FILE).read_text()).values()) == pytest.approx(halves)
    welch = 4.302653 * 0.5**0.5
    eer, accuracy = (f"{(half**2 + welch**2) ** 0.5:.2f}" for half in halves)
    assert f"| BEST-RQ, 2,000 updates, ahead of untrained | +20.00 ± {eer} | +8.00 ± {accuracy} |" in text


def test_draws_that_are_shared_are_compared_seed_by_seed():
    cells = [Cell(dict(enumerate(values, 1)), seeds=3) for values in ((50.0, 40.0, 61.0), (45.0, 36.0, 55.0))]
    apart, shared = (lead(*cells, lower_is_better=False, shared_draws=shared) for shared in (False, True))
    assert apart.points == shared.points == pytest.approx(5.0)
    # differences of 5, 4 and 6: a deviation of 1, of three seeds
    assert shared.doubt == pytest.approx(4.302653 / 3**0.5, abs=1e-4)
    assert apart.doubt > 4 * shared.doubt


def test_options_of_training_from_scratch_alone_are_told(reproduction):
    plan = read_plan(reproduction)
    untrained = {"number_of_epochs": 18, "encoder_rest": 0}
    settings = {"yaml": "bestrq_finetune", "options": {"examples_per_class": 20}, "untrained": untrained}
    preset = {**plan["preset"], "few_labels": {"intent": {"fine-tuned": settings}}, "fine_tune_untrained": True}
    marks = marks_of(preset, reproduction, ["librispeech", "slurp"])
    write_plan(reproduction, "own", preset, ["librispeech", "slurp"], "reproduce", marks)
    text = write_reproduction(reproduction)["markdown"].read_text()
    assert "number_of_epochs 18" not in text  # what was not run has no options
    write_probe(reproduction, "intent-fine-tuned-few/random/1", {"test": {"accuracy": score(0.2)}}, "Speech Commands")
    text = write_reproduction(reproduction)["markdown"].read_text()
    assert "it is trained from scratch, with number_of_epochs 18, encoder_rest 0 (intent, few labels) instead." in text


def test_one_seed_is_not_enough_to_beat_anything(reproduction):
    plan = read_plan(reproduction)
    plan["preset"]["seeds"] = [1]
    sentences = judge(frozen_table(Runs(reproduction, plan)))
    assert sentences[-1] == (
        "intent accuracy: BEST-RQ, 2,000 updates is ahead of the untrained encoder by 8.00 points with the one seed "
        "that was tried."
    )


def test_few_labels_have_a_table_of_their_own(reproduction):
    plan = read_plan(reproduction)
    preset = {**plan["preset"], "few_labels": FEW, "fine_tune_untrained": True}
    corpora = ["librispeech", "slurp", "voxceleb"]
    write_plan(reproduction, "own", preset, corpora, "reproduce", marks_of(preset, reproduction, corpora))
    for seed in (1, 2):
        for encoder, accuracy, error in (("random", 0.2, 0.3), ("bestrq-2000", 0.4, 0.1)):
            sets = {"test": {"accuracy": score(accuracy + 0.01 * seed)}}
            write_probe(reproduction, f"intent-frozen-few/{encoder}/{seed}", sets, "Speech Commands")
            sets = {"vox1": {"eer": score(error + 0.01 * seed)}}
            write_probe(reproduction, f"verification-fine-tuned-few/{encoder}/{seed}", sets, "VoxCeleb")
    files = write_reproduction(reproduction)
    column = "intent accuracy, 20 examples a class (Speech Commands)"
    rows = rows_of(files["markdown"], "Frozen encoders, few labels")
    assert list(rows) == ["filter banks", "untrained", *(row for row in rows if "updates" in row)]
    assert rows["BEST-RQ, 2,000 updates"][column].startswith("[41.50 ± 0.71](intent-frozen-few/bestrq-2000/1/")
    assert rows["filter banks"][column] == "not yet run"
    rows = rows_of(files["markdown"], "Fine-tuned encoders, few labels")
    column = "speaker EER, 7 training speakers (VoxCeleb)"
    assert rows["from scratch"][column].startswith("[31.50 ± 0.71]") and "filter banks" not in rows
    text = files["markdown"].read_text()
    for verdict in (
        "intent accuracy, 20 examples a class: BEST-RQ, 2,000 updates beats the untrained encoder by 20.00 points "
        "with the one pre-training that was tried.",
        "speaker EER, 7 training speakers: BEST-RQ, 2,000 updates beats training from scratch by 20.00 points "
        "with the one pre-training that was tried.",
        "| BEST-RQ, 2,000 updates, ahead of from scratch | +20.00 ± ",
        "- in the place of LibriSpeech: speechocean762.",
        "- VoxCeleb",  # which few labels alone were taken of
    ):
        assert verdict in text
    with open(files["table1_few"], newline="") as file:
        ours = {row["row"]: row["ours"] for row in csv.DictReader(file)}
    assert ours["BEST-RQ, 2,000 updates"] == "41.500" and ours["BEST-RQ, 1,000 updates"] == ""
    # what is of few labels is nowhere among all labels
    assert rows_of(files["markdown"])["untrained"]["intent accuracy (Speech Commands)"].startswith("[53.50")


def test_few_labels_that_wait_or_failed_are_not_left_out(reproduction):
    plan = read_plan(reproduction)
    corpora = ["librispeech", "slurp", "voxceleb"]
    preset = {**plan["preset"], "few_labels": FEW}
    write_plan(reproduction, "own", preset, corpora, "reproduce", marks_of(preset, reproduction, corpora))
    place = reproduction / "intent-frozen-few" / "bestrq-2000" / "1"
    place.mkdir(parents=True)
    record = {"mark": "mark of intent-frozen-few/bestrq-2000/1", "failed": "intents failed"}
    (place / "stage.json").write_text(json.dumps(record))
    files = write_reproduction(reproduction)
    rows = rows_of(files["markdown"], "Frozen encoders, few labels")
    assert rows["BEST-RQ, 2,000 updates"]["intent accuracy, 20 examples a class"] == "failed"
    assert rows["untrained"]["intent accuracy, 20 examples a class"] == "not yet run"
    assert files["table1_few"].is_file() and files["table2_few"].is_file()
    write_plan(reproduction, "own", plan["preset"], corpora, "reproduce", plan["marks"])
    write_reproduction(reproduction)
    assert not files["table1_few"].exists() and files["table1"].is_file()


def test_without_an_untrained_encoder_it_is_compared_with_filter_banks(reproduction):
    plan = read_plan(reproduction)
    plan["preset"]["baselines"] = ["fbank"]
    (reproduction / "plan.json").write_text(json.dumps(plan))
    rows = rows_of(write_reproduction(reproduction)["markdown"], "Does pre-training pay?")
    assert rows["BEST-RQ, 2,000 updates, ahead of filter banks"]["intent accuracy"].startswith("+10.00 ± ")
    assert not any("untrained" in row for row in rows)
    assert "The untrained encoder is" not in (reproduction / "report.md").read_text()
    plan["preset"]["baselines"] = []
    (reproduction / "plan.json").write_text(json.dumps(plan))
    assert "this preset has no untrained encoder" in write_reproduction(reproduction)["markdown"].read_text()


def test_a_changed_result_changes_its_cell_and_nothing_else(reproduction):
    before = {name: path.read_text().splitlines() for name, path in write_reproduction(reproduction).items()}
    path = reproduction / "asr-frozen" / "bestrq-2000" / "1" / "results.json"
    path.write_text(path.read_text().replace('"value": 0.4,', '"value": 0.41,'))
    after = {name: path.read_text().splitlines() for name, path in write_reproduction(reproduction).items()}
    for name in before:
        pairs = list(zip(before[name], after[name], strict=True))
        changed = [(old, new) for old, new in pairs if old != new]
        assert len(changed) == (1 if name in ("markdown", "html", "table1") else 0), name
        for old, new in changed:
            assert old.replace("40.0", "41.0") == new


def test_what_another_plan_left_is_not_shown(reproduction):
    path = reproduction / "asr-frozen" / "bestrq-2000" / "1" / "stage.json"
    path.write_text(json.dumps({"mark": "of other data", "made": "once"}))
    rows = rows_of(write_reproduction(reproduction)["markdown"])
    assert rows["BEST-RQ, 2,000 updates"]["test-clean WER"] == "not yet run"
    path.write_text(json.dumps({"mark": "mark of asr-frozen/bestrq-2000/1"}))
    rows = rows_of(write_reproduction(reproduction)["markdown"])
    assert rows["BEST-RQ, 2,000 updates"]["test-clean WER"] == "begun, not done"
    why = "asr-frozen/bestrq-2000/1 failed (1)\n  $ train.py\n  no space"
    path.write_text(json.dumps({"mark": "mark of asr-frozen/bestrq-2000/1", "failed": why}))
    report = write_reproduction(reproduction)["markdown"]
    assert rows_of(report)["BEST-RQ, 2,000 updates"]["test-clean WER"] == "failed"
    told = "## What failed\n\nasr-frozen/bestrq-2000/1 failed (1)\n\n    $ train.py\n    no space\n"
    assert told in report.read_text()
    # another command, which could not begin, has left its complaint in the record of what was done
    path.write_text(json.dumps({"mark": "mark of asr-frozen/bestrq-2000/1", "failed": why, "made": "once"}))
    report = write_reproduction(reproduction)["markdown"]
    assert rows_of(report)["BEST-RQ, 2,000 updates"]["test-clean WER (speechocean762)"].startswith("[90.00")
    assert "What failed" not in report.read_text()


def test_a_table_that_has_no_column_is_left_out(reproduction):
    plan = read_plan(reproduction)
    plan["preset"]["few_labels"] = {"verification": FEW["verification"]}  # of which no corpus was given
    (reproduction / "plan.json").write_text(json.dumps(plan))
    text = write_reproduction(reproduction)["markdown"].read_text()
    assert "few labels" not in text and "## Table 1" in text


def test_a_probe_of_an_encoder_that_was_trained_again_is_not_shown(reproduction):
    path = reproduction / "asr-frozen" / "bestrq-2000" / "1" / "stage.json"
    for made, shown in (("once", True), ("before", False)):
        needed = {"pretraining/bestrq": made}
        path.write_text(json.dumps({"mark": "mark of asr-frozen/bestrq-2000/1", "made": "once", "needed": needed}))
        rows = rows_of(write_reproduction(reproduction)["markdown"])
        assert ("test-clean WER" not in rows["untrained"]) == shown


def test_the_report_tells_of_codes_commits_and_seeds(reproduction):
    text = write_reproduction(reproduction)["markdown"].read_text()
    assert "| [BEST-RQ](pretraining/bestrq/train_log.jsonl) | 2,000 | 200 | 150 | 2.5% |" in text
    assert "commits: abc123 (2 stages), not known (11 stages)" in text
    assert "seeds of the pre-trainings: BEST-RQ 1000, wav2vec 2.0 1000" in text
    assert "- BEST-RQ; wav2vec 2.0 were pre-trained on: speechocean762, 8.0 h\n" in text
    assert "codebook.png" not in text
    check = reproduction / "codebook-check" / "bestrq"
    check.mkdir(parents=True)
    (check / "codebook.png").write_bytes((reproduction / "curves.png").read_bytes())
    (check / "stage.json").write_text(json.dumps({"mark": "mark of codebook-check/bestrq", "made": "once"}))
    assert "(codebook-check/bestrq/codebook.png)" in write_reproduction(reproduction)["markdown"].read_text()


@pytest.mark.parametrize("given", ["[400, 100]", [400, 100]], ids=["as an option", "as a list"])
def test_a_preset_may_name_more_encoders_to_look_at(tmp_path, given):
    preset = read_preset(TWO_SEEDS)
    method = preset["pretraining"]["bestrq"]
    method["options"]["encoder_at_steps"] = given
    stages = make_plan({**preset, "tasks": {}}, {"librispeech": tmp_path}, tmp_path)
    command = next(stage.command for stage in stages if stage.name == "pretraining/bestrq")
    assert command[command.index("--encoder_at_steps") + 1] == "[100, 400, 720]"


def test_seeds_may_be_those_of_the_pre_trainings_too(tmp_path):
    preset, stages = everything("three_seeds", tmp_path)
    by_name = {stage.name: stage for stage in stages}
    for seed in preset["seeds"]:
        command = by_name[f"pretraining/bestrq/{seed}"].command
        assert command[command.index("--seed") + 1] == str(seed)
        assert command[command.index("--encoder_at_steps") + 1] == "[2400, 7200]"
        check = by_name[f"codebook-check/bestrq/{seed}"].command
        assert check[check.index("--seed") + 1] == str(seed)
        probe = by_name[f"intent-frozen/bestrq-7200/{seed}"]
        assert probe.needs == (f"pretraining/bestrq/{seed}",)
        assert f"{tmp_path}/pretraining/bestrq/{seed}/encoder@7200" in probe.command
        assert f"{tmp_path}/cache/intent/bestrq-7200-{seed}" in probe.command
    write_plan(tmp_path, "three_seeds", preset, list(CORPORA), "reproduce", marks_of(preset, tmp_path))
    write_pretraining(tmp_path, "bestrq/1", 30.0)
    write_pretraining(tmp_path, "bestrq/3", 20.0)
    text = write_reproduction(tmp_path)["markdown"].read_text()
    assert "| [BEST-RQ, seed 1](pretraining/bestrq/1/train_log.jsonl) | 5.0 M | 2,000 | 20.0 | 0.67 | 30.0 |" in text
    assert "| [BEST-RQ, seed 3](pretraining/bestrq/3/train_log.jsonl) | 5.0 M | 2,000 | 20.0 | 1.00 | 20.0 |" in text


def test_the_ratio_of_speeds_is_that_of_all_pre_trainings(tmp_path):
    preset, corpora = read_preset("small"), ["librispeech"]
    write_plan(tmp_path, "small", preset, corpora, "reproduce", marks_of(preset, tmp_path, corpora))
    for seed, speed in ((1, 30.0), (2, 15.0), (3, 30.0)):
        write_pretraining(tmp_path, f"bestrq/{seed}", speed)
        write_pretraining(tmp_path, f"wav2vec2/{seed}", 10.0)
    # 60 hours in 2.67 device-hours, and in 6
    assert "BEST-RQ has heard 2.25 times the audio" in write_reproduction(tmp_path)["markdown"].read_text()


def test_the_tables_are_the_same_bytes_elsewhere(reproduction, tmp_path_factory):
    files = write_reproduction(reproduction)
    copy = tmp_path_factory.mktemp("copy") / "reproduction"
    shutil.copytree(reproduction, copy)
    for path in files.values():
        (copy / path.name).unlink()
    again = write_reproduction(copy)
    for name in ("markdown", "table1", "table2", "table3"):
        assert again[name].read_bytes() == files[name].read_bytes()


def test_the_cost_and_its_ratio_come_from_the_logs(reproduction):
    text = write_reproduction(reproduction)["markdown"].read_text()
    told = "After 2,000 updates BEST-RQ has heard 3.00 times the audio of wav2vec 2.0 in a device-hour"
    assert told in text
    assert "in the paper an update took 2.4 times less" in text
    assert "| [BEST-RQ](pretraining/bestrq/train_log.jsonl) | 5.0 M | 2,000 | 20.0 | 0.67 | 30.0 |" in text
    assert "| paper: BEST-RQ | 83.0 M | 200,000 |  | 109 |" in text
    assert "sb-bestrq reproduce --preset small" in text and "train bestrq" in text


def test_the_csv_has_a_line_for_each_cell(reproduction):
    files = write_reproduction(reproduction)
    with open(files["table1"], newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["row"], row["score"]): row for row in rows}
    assert len(found) == len(rows) == 10 * 9
    row = found["BEST-RQ, 2,000 updates", "intent accuracy"]
    assert (row["ours"], row["seeds"], row["corpus"]) == ("61.500", "1 2", "Speech Commands")
    assert found["BEST-RQ, 100,000 updates", "speaker EER"]["paper"] == "3.840"


# ---------------------------------------------------------------- what can be shown


def test_a_published_copy_has_the_figures_and_no_folder_of_the_machine(reproduction, tmp_path_factory):
    write_probe(
        reproduction,
        "verification-frozen/fbank/1",
        {"vox1": {"eer": score(0.04)}},
        command="/opt/env/bin/python /home/a/train.py --data_folder '/data/V und Ü' "
        f"--encoder random:{reproduction}/x/encoder",
    )
    plan = read_plan(reproduction)
    plan["command"] = "/usr/bin/sb-bestrq reproduce --librispeech /data/L --voxceleb '/data/V und Ü' --slurp slurp"
    plan["marks"]["verification-frozen/fbank/1"] = "mark of verification-frozen/fbank/1"
    plan["preset"]["tasks"]["asr"]["frozen"]["options"]["cache_folder"] = "/data/caches/asr"
    (reproduction / "plan.json").write_text(json.dumps(plan))
    (reproduction / "pretraining" / "bestrq" / "encoder").mkdir()
    (reproduction / "pretraining" / "bestrq" / "encoder" / "model.safetensors").write_bytes(b"weights")
    write_reproduction(reproduction)
    target = tmp_path_factory.mktemp("shown") / "new"
    assert cli.main(["report", str(reproduction), "--publish", str(target)]) == 0
    for name in ("table1.csv", "table2.csv", "table3.csv"):
        assert (target / name).read_bytes() == (reproduction / name).read_bytes()
    assert rows_of(target / "report.md") == rows_of(reproduction / "report.md")
    files = [path for path in target.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".safetensors"]
    text = "".join(path.read_text() for path in files if path.suffix != ".png")
    assert "python train.py --data_folder 'VOXCELEB' --encoder random:./x/encoder" in text
    # given by its bare name, that of a key
    assert read_plan(target)["corpora"] == ["librispeech", "slurp"]
    assert not [one for one in ("/opt/env", "/home/a", "/data", str(reproduction)) if one in text]
    with pytest.raises(InputError, match="exists already: give a new folder"):
        publish(reproduction, target)
    with pytest.raises(InputError, match="lies in the reproduction itself"):
        publish(reproduction, reproduction / "new")


def test_reproductions_of_other_seeds_become_one(tmp_path, capsys):
    """Three seeds here and two elsewhere, of which the errors of each utterance are at hand here alone."""
    given = {**read_preset("three_seeds"), "few_labels": None}
    for name, seeds in (("here", [1, 2, 3]), ("there", [7, 8])):
        folder, preset = tmp_path / name, {**given, "seeds": seeds}
        marks = marks_of(preset, folder, ["librispeech", "slurp"])
        write_plan(folder, "three_seeds", preset, ["librispeech", "slurp"], f"reproduce {name}", marks)
        for seed in seeds:
            for encoder, accuracy in (("random", 0.2), ("bestrq-7200", 0.4)):
                run = f"intent-frozen/{encoder}/{seed}"
                write_probe(folder, run, {"test": {"accuracy": score(accuracy + 0.01 * seed)}}, "Commands")
                if name == "here":
                    rows = [
                        {"ID": f"{n}", "group": f"{n}", "error_errors": int(n < 100 * accuracy), "error_total": 1}
                        for n in range(100)
                    ]
                    write_errors(folder / run, "test", rows, list(rows[0]))
    both = [str(tmp_path / name) for name in ("here", "there")]
    assert cli.main(["report", *both]) == 2
    assert "--publish to join" in capsys.readouterr().err
    assert cli.main(["report", *both, "--publish", str(tmp_path / "shown")]) == 0
    text = (tmp_path / "shown" / "report.md").read_text()
    assert "seeds of the tasks: 1, 2, 3, 7, 8." in text and "    reproduce here\n    reproduce there" in text
    row = rows_of(tmp_path / "shown" / "report.md")["BEST-RQ, 7,200 updates"]["intent accuracy (Commands)"]
    # 41, 42, 43, 47 and 48
    assert row.startswith("[44.20 ± 3.11](intent-frozen/bestrq-7200/1/results.json)") and "seed 8: 48.00" in row
    assert re.search(r"BEST-RQ, 7,200 updates, ahead of untrained \| \+20.00 ± [\d.]+\*", text)
    assert (tmp_path / "shown" / "intent-frozen" / "random" / "8" / "results.json").is_file()
    with pytest.raises(InputError, match="both have seed 1: publish each"):
        publish([both[0], both[0]], tmp_path / "twice")
    plan = read_plan(tmp_path / "there")
    plan["preset"]["updates"] = [9]
    (tmp_path / "there" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="of presets that differ in more than seeds"):
        publish(both, tmp_path / "other")


def test_only_a_reproduction_is_published(toy, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert cli.main(["report", str(tmp_path / "run"), "--publish", str(tmp_path / "new")]) == 2
    assert "is no reproduction: --publish is for" in capsys.readouterr().err


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--preset", "small"], "give --librispeech"),
        (["--preset", "small", "--librispeech", "/nowhere"], "--librispeech /nowhere is no folder"),
        (["--preset", "demo", "--language_model", "/nowhere"], "/nowhere is no file"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.fixture
def corpora(tmp_path):
    """What is looked at before anything is run, of the corpora of preset paper: folders, lists and texts."""
    parts = {
        "librispeech": ["train-clean-100/", "train-clean-360/", "train-other-500/", "dev-clean/", "test-clean/"],
        "voxceleb": ["meta/veri_test2.txt"],
        "iemocap": [f"Session{n}/{part}/" for n in range(1, 6) for part in ("sentences/wav", "dialog/EmoEvaluation")],
        "slurp": [f"dataset/slurp/{name}.jsonl" for name in ("train", "devel", "test")],
    }
    parts["librispeech"].append("test-other/")
    for corpus, names in parts.items():
        for name in names:
            path = tmp_path / corpus / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (None, None),
        ("librispeech/test-other", "lacks the split(s) test-other"),
        ("librispeech/train-other-500", "lacks the split(s) train-other-500"),
        ("voxceleb/meta/veri_test2.txt", "trial list 'veri_test2.txt' is neither in"),
        ("iemocap/Session4", "lacks Session4"),
        ("slurp/dataset/slurp/devel.jsonl", "devel.jsonl' does not exist"),
    ],
)
def test_what_would_be_missing_after_days_is_named_before_anything_is_run(corpora, missing, message):
    if missing is not None:
        path = corpora / missing
        path.rmdir() if path.is_dir() and not any(path.iterdir()) else path.rename(corpora / "away")
    stages = make_plan(read_preset("paper"), {corpus: corpora / corpus for corpus in CORPORA}, corpora / "out")
    if missing is None:
        check_inputs(stages)
        return
    with pytest.raises(InputError) as refusal:
        check_inputs(stages)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_language_model_that_is_none_is_named_before_anything_is_run(corpora, capsys):
    (corpora / "lm.arpa").write_text("no model")
    words = ["--preset", "paper", "--librispeech", str(corpora / "librispeech"), "--dry_run"]
    assert cli.main(["reproduce", *words, "--language_model", str(corpora / "lm.arpa")]) == 2
    said = capsys.readouterr().err
    assert f"{corpora / 'lm.arpa'}" in said and said.count("\n") == 1


def test_a_corpus_behind_a_link_may_move(corpora, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "_estimate_apart", lambda *_: {})
    link = corpora / "speech"
    link.symlink_to(corpora / "slurp")
    words = ["reproduce", "--preset", "small", "--librispeech", str(corpora / "librispeech"), "--slurp", str(link)]
    assert cli.main([*words, "--output_folder", str(corpora / "out"), "--dry_run"]) == 0
    assert f"--data_folder {link} " in capsys.readouterr().out


def test_the_report_command_knows_a_reproduction(reproduction, capsys):
    assert cli.main(["report", str(reproduction)]) == 0
    assert str(reproduction / "report.html") in capsys.readouterr().out
