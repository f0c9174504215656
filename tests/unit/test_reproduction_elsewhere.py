"""A pre-training that was done elsewhere takes the place of a preset's own, and nothing is trained again."""

import json
import shutil
from pathlib import Path

import pytest

from speechbrain_bestrq import cli
from speechbrain_bestrq.artefact import load_encoder, save_encoder
from speechbrain_bestrq.commands import reproduce
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.reproduction import cost, elsewhere
from speechbrain_bestrq.reproduction.plan import CORPORA, RECIPES, make_plan, read_preset
from speechbrain_bestrq.reproduction.report import write_reproduction
from speechbrain_bestrq.reproduction.stages import StageState, run_stages
from speechbrain_bestrq.reproduction.tables import write_plan
from speechbrain_bestrq.reproduction.time_left import left_text

#: A preset of one pre-training for each method.
TWO_SEEDS = str(Path(__file__).parents[1] / "helpers" / "two_seeds.yaml")
MODELS = (("bestrq", "BestRQ"), ("wav2vec2", "Wav2Vec2"))


def write_run(folder, seed=1, steps=(2400, 7200), last=None, model="BestRQ"):
    """What a pre-training leaves, with an encoder at each of some steps, and that of the last."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"model": model, "seed": seed, "parameters": 5, "command": "train"}))
    line = {"event": "valid", "step": 9000, "loss": 5.0, "audio_hours": 2.0, "device_hours": 1.0}
    (folder / "train_log.jsonl").write_text(json.dumps(line) + "\n")
    places = {f"encoder@{step}": step for step in steps} | ({} if last is None else {"encoder": last})
    for name, step in places.items():
        parts = (
            LogMel(normalize="utterance"),
            ConvSubsampling(d_model=16),
            ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32),
        )
        save_encoder(SpeechEncoder(*parts), folder / name, "# Small", step=step)
    return folder


def plan_of(name, folder, words, corpora=("slurp",)):
    """The plan of a preset with runs done elsewhere."""
    given = {corpus: Path("/data") / corpus for corpus in corpora}
    return make_plan(read_preset(name), given, folder, pretrained=words)


def test_runs_take_the_places_of_their_seeds_and_without_training_no_corpus_is_needed(tmp_path):
    words = [f"bestrq={write_run(tmp_path / f'run{seed}', seed)}" for seed in (3, 1, 2)]
    stages = {stage.name: stage for stage in plan_of("fine_tuned", tmp_path / "out", words)}
    assert [name for name in stages if not name.startswith("intent")] == [f"pretraining/bestrq/{n}" for n in (1, 2, 3)]
    for seed in (1, 2, 3):
        assert str(tmp_path / f"run{seed}") in stages[f"pretraining/bestrq/{seed}"].command
        probe = stages[f"intent-fine-tuned-few/bestrq-7200/{seed}"]
        assert probe.needs == (f"pretraining/bestrq/{seed}",)
        assert f"{tmp_path}/out/pretraining/bestrq/{seed}/encoder@7200" in probe.command
    # of two seeds the third is trained, on what there is to be given
    with pytest.raises(InputError, match="give --librispeech"):
        plan_of("fine_tuned", tmp_path / "out", words[:2])
    some = [stage.name for stage in plan_of("fine_tuned", tmp_path / "out", words[:2], CORPORA)]
    assert [name for name in some if name.startswith(("pretraining", "codebook"))] == [
        "pretraining/bestrq/1",
        "codebook-check/bestrq/2",
        "pretraining/bestrq/2",
        "pretraining/bestrq/3",
    ]


def test_one_pre_training_for_all_seeds_may_be_of_any(tmp_path):
    words = [f"bestrq={write_run(tmp_path / 'run', 77, (), last=720)}"]
    stages = {stage.name: stage for stage in plan_of(TWO_SEEDS, tmp_path / "out", words, CORPORA)}
    assert "train.py" in "".join(stages["pretraining/wav2vec2"].command)
    assert stages["pretraining/bestrq"].products == ("encoder@720",)  # that of the best validation has an update, too
    assert stages["intent-frozen/bestrq-720/2"].needs == ("pretraining/bestrq",)


def test_encoders_and_the_log_are_taken_over_once(tmp_path):
    run = write_run(tmp_path / "run", 5, (2400,), last=720)
    out = tmp_path / "out"
    stages = plan_of(TWO_SEEDS, out, [f"bestrq={run}"], CORPORA)
    own = [stage for stage in stages if stage.name == "pretraining/bestrq"]
    assert run_stages(own, out, print) == {}
    taken = out / "pretraining" / "bestrq"
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (taken / "encoder@720" / name).read_bytes() == (run / "encoder" / name).read_bytes()
    assert (taken / "run.json").read_bytes() == (run / "run.json").read_bytes()
    assert {path.name for path in taken.glob("encoder*")} == {"encoder@720"}
    # the same encoder at another place is the same stage; another one is another
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    again = plan_of(TWO_SEEDS, out, [f"bestrq={moved}"], CORPORA)
    assert StageState(again, out).is_done("pretraining/bestrq")
    other = write_run(tmp_path / "other", 5, (), last=720)
    assert not StageState(plan_of(TWO_SEEDS, out, [f"bestrq={other}"], CORPORA), out).is_done("pretraining/bestrq")


def test_of_a_longer_pre_training_the_cost_is_that_of_the_encoder_and_the_report_says_so(tmp_path):
    run = write_run(tmp_path / "run", 5, (720,))
    (run / "run.json").write_text(json.dumps({"model": "BestRQ", "seed": 5, "updates_planned": 24000}))
    lines = [
        {"event": "valid", "step": step, "loss": 5.0, "audio_hours": step / 100, "device_hours": step / 1000}
        for step in (360, 720, 1440)
    ]
    (run / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, preset = tmp_path / "out", read_preset(TWO_SEEDS)
    stages = plan_of(TWO_SEEDS, out, [f"bestrq={run}"], CORPORA)
    assert run_stages([stage for stage in stages if stage.name == "pretraining/bestrq"], out, print) == {}
    write_plan(out, "small", preset, list(CORPORA), "reproduce", StageState(stages, out).marks)
    report = write_reproduction(out)["markdown"].read_text()
    assert (
        "Looked at amid a longer pre-training, whose rates were still to come down: BEST-RQ: 24,000 updates." in report
    )
    assert "| [BEST-RQ](pretraining/bestrq/train_log.jsonl) |  | 720 | 7.2 | 0.72 |" in report.replace("not known", "")


def test_an_encoder_without_weights_is_none(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "encoder@7200" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no encoder of update 7200 but of 2400"):
        plan_of("fine_tuned", tmp_path / "out", [f"bestrq={run}"])


def test_how_long_a_copy_took_tells_nothing_of_trainings(tmp_path):
    run = write_run(tmp_path / "run", 5, (720,))
    stages = plan_of(TWO_SEEDS, tmp_path / "out", [f"bestrq={run}"], CORPORA)[:3]
    names = [stage.name for stage in stages]
    assert names == ["pretraining/bestrq", "pretraining/wav2vec2", "asr-frozen/fbank/1"]
    waiting, expected = dict.fromkeys(names[1:], 0.0), {names[0]: 10.0, names[1]: 7200.0, names[2]: 3600.0}
    assert left_text(stages, waiting, {names[0]: 2.5}, expected, 1) == "about 3.0 hours left"


def test_what_was_taken_over_stays_good_when_the_run_is_gone(tmp_path):
    run, out = write_run(tmp_path / "run", 5, (720,)), tmp_path / "out"
    words = [f"bestrq={run}"]
    own = [stage for stage in plan_of(TWO_SEEDS, out, words, CORPORA) if stage.name == "pretraining/bestrq"]
    assert run_stages(own, out, print) == {}
    shutil.rmtree(run)
    stages = plan_of(TWO_SEEDS, out, words, CORPORA)
    assert StageState(stages, out).is_done("pretraining/bestrq")
    command = next(stage.command for stage in stages if stage.name == "pretraining/bestrq")
    assert elsewhere.encoder_of(command) == out / "pretraining" / "bestrq" / "encoder@720"
    with pytest.raises(InputError, match="does not exist"):
        plan_of(TWO_SEEDS, tmp_path / "other", words, CORPORA)


def test_without_its_corpus_the_sweep_of_masks_is_left_out_like_any_other_part(tmp_path):
    words = [f"{method}={write_run(tmp_path / method, 5, (100000, 200000), model=model)}" for method, model in MODELS]
    names = [stage.name for stage in plan_of("paper", tmp_path / "out", words)]
    assert names and not [name for name in names if name.startswith("masking")]


def test_what_a_killed_copy_left_is_not_taken_for_an_encoder(tmp_path):
    run = elsewhere.read_finished_run(write_run(tmp_path / "run"))
    torn = tmp_path / "out" / "encoder@7200.writing"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    elsewhere.take_over(run, tmp_path / "out", [7200])
    assert {path.name for path in (tmp_path / "out").glob("encoder*")} == {"encoder@7200"}


@pytest.mark.parametrize(
    "name, make, word, message",
    [
        ("fine_tuned", {}, "{}", "give bestrq=RUN, with the output folder"),
        ("fine_tuned", {}, "wav2vec2={}", "give bestrq=RUN, with the output folder"),
        ("fine_tuned", {"seed": 4}, "bestrq={}", "it is of seed 4, and the preset has 1, 2, 3"),
        ("fine_tuned", {"steps": (2400,), "last": 9000}, "bestrq={}", "no encoder of update 7200 but of 2400, 9000"),
        ("fine_tuned", {"steps": (), "last": 0}, "bestrq={}/nowhere", "nowhere' does not exist"),
        (TWO_SEEDS, {"steps": (720,)}, "wav2vec2={}", "that is a BestRQ, and wav2vec2 is a Wav2Vec2"),
        (TWO_SEEDS, {"steps": (720,), "model": "Wav2Vec2"}, "bestrq={}", "that is a Wav2Vec2, and bestrq is a BestRQ"),
    ],
)
def test_a_run_that_is_of_no_use_is_refused(name, make, word, message, tmp_path, capsys):
    run = write_run(tmp_path / "run", **make)
    words = ["--preset", name, "--output_folder", str(tmp_path / "out"), "--pretrained", word.format(run)]
    assert cli.main(["reproduce", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_two_runs_for_one_place_and_a_run_within_the_reproduction_are_refused(tmp_path):
    words = [f"bestrq={write_run(tmp_path / name)}" for name in ("one", "two")]
    with pytest.raises(InputError, match=r"two: \S+/one is of that method and seed already"):
        plan_of("fine_tuned", tmp_path / "out", words)
    # its folder would be moved out of its own way
    inside = write_run(tmp_path / "out" / "pretraining" / "bestrq" / "1")
    with pytest.raises(InputError, match="lies in the reproduction itself: give another --output_folder"):
        plan_of("fine_tuned", tmp_path / "out", [f"bestrq={inside}"])


def test_without_an_encoder_there_is_nothing_to_take_over(tmp_path):
    with pytest.raises(InputError, match="has no encoder yet: let its pre-training go on"):
        plan_of("fine_tuned", tmp_path / "out", [f"bestrq={write_run(tmp_path / 'run', steps=(), last=None)}"])


def test_a_dry_run_tells_what_heads_cost_by_the_speed_of_the_encoder(tmp_path, toy, capsys, monkeypatch):
    speeds = []

    def speed_of(folder):
        speeds.append(folder)
        return cost.Speed(1.0, 240.0, 80.0, 5_000_000, (10, 100))

    monkeypatch.setattr(cost, "warm_up_encoder", speed_of)
    monkeypatch.setattr(cost, "warm_up_head", lambda path, options, states, frames: 1200.0)
    monkeypatch.setattr(reproduce, "_estimate_apart", lambda stages, done, devices, tell: cost.estimate(stages, done))
    toy.write_noise(tmp_path / "slurp", [3.6e3])
    for part in ("train", "devel", "test"):
        (tmp_path / "slurp" / f"{part}.jsonl").touch()
    words = [f"bestrq={write_run(tmp_path / f'run{seed}', seed)}" for seed in (1, 2, 3)]
    words = ["--slurp", str(tmp_path / "slurp"), "--output_folder", str(tmp_path / "out"), "--pretrained", *words]
    assert cli.main(["reproduce", "--preset", "fine_tuned", "--dry_run", *words]) == 0
    printed = capsys.readouterr().out
    # one architecture, tried once; an encoder of five million numbers takes its room and no time
    assert speeds == [tmp_path / "run1" / "encoder@7200"]
    for seed in (1, 2, 3):
        assert f"        0.00     0.02  pretraining/bestrq/{seed}\n" in printed
    # 12 epochs of an hour, there and back at 80 audio-seconds a second, and the head
    assert "        0.16     0.00  intent-fine-tuned-few/bestrq-7200/1\n" in printed


def test_small_rates_are_numbers_to_the_estimate_too(tmp_path):
    """Python writes 0.00001 as 1e-05, which not every reader of YAML takes for a number."""
    path = RECIPES / "VoxCeleb" / "verification" / "hparams" / "bestrq_finetune.yaml"
    options = {"--encoder": "e", "--final_encoder_learning_rate": str(0.00001), "--channels": "8"}
    options |= {"--pooled_channels": "24", "--attention_channels": "4", "--embedding_size": "4"}
    assert cost.warm_up_head(path, options, (2, 16), 25.0) > 0


def test_an_encoder_is_tried_on_noise(tmp_path):
    folder = write_run(tmp_path / "run", steps=(5,)) / "encoder@5"
    speed = cost.warm_up_encoder(folder)
    assert speed.states == (2, 16) and speed.frames == pytest.approx(25.0, abs=0.1)
    assert speed.encoding > speed.fine_tuning > 0
    assert speed.parameters == sum(one.numel() for one in load_encoder(folder).parameters())
