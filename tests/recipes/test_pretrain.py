"""The pre-training recipe as a user runs it: every YAML, on one device and two, and with bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.artefact import load_encoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.locking import sole_writer
from speechbrain_bestrq.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "LibriSpeech" / "pretrain"
PARAMETERS = {
    "bestrq": 90_033_888,
    "bestrq_paper": 80_447_520,
    "bestrq_small": 4_441_856,
    "bestrq_large": 390_674_400,
    "wav2vec2": 95_044_608,
    "wav2vec2_paper": 90_856_064,
    "wav2vec2_small": 5_733_888,
}
#: What makes the models of a method small.
SIZES = {
    "bestrq": "--kernel_size=3 --codebook_size=64".split(),
    "wav2vec2": "--num_features=8 --codebook_size=6 --code_dim=8 --target_dim=8 --num_negatives=5".split(),
}
#: Frames in a second alone: convolutions without padding lose some at the end.
FRAMES = dict.fromkeys(PARAMETERS, 25) | {"wav2vec2": 49, "wav2vec2_small": 49, "wav2vec2_paper": 48}
TOY = (
    "--d_model=16 --num_layers=1 --num_heads=2 --d_ffn=32 --max_batch_seconds=8 "
    "--grad_accumulation_factor=2 --min_seconds=0.5 --num_workers=0 --log_interval=1 --optimizer_step_limit=2 "
    "--encoder_at_steps=[1] --noprogressbar --device=cpu"
).split()


def write_librispeech(folder: Path, splits=("train-clean-100", "dev-clean"), utterances=6) -> Path:
    """Noise of a few seconds in LibriSpeech's layout."""
    generator = np.random.default_rng(0)
    for speaker, split in enumerate(splits, start=100):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        names = [f"{speaker}-1-{number:04d}" for number in range(utterances)]
        for number, name in enumerate(names):
            soundfile.write(chapter / f"{name}.flac", 0.1 * generator.standard_normal(16000 + 8000 * number), 16000)
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(f"{name} SO IT IS\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    return write_librispeech(tmp_path_factory.mktemp("corpus") / "LibriSpeech")


@pytest.fixture(scope="module")
def train(load_script):
    """The recipe's train.py as a module."""
    return load_script(RECIPE / "train.py")


def arguments(name, librispeech, output_folder, *more):
    given = [f"--data_folder={librispeech}", f"--output_folder={output_folder}", "--train_splits=[train-clean-100]"]
    options = (*given, *TOY, *SIZES[name.split("_")[0]], *more)
    last_wins = {option.split("=")[0]: option for option in options}
    return [str(RECIPE / "hparams" / f"{name}.yaml"), *last_wins.values()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_step_of_every_yaml_can_be_done_on_a_gpu(name, train, librispeech, tmp_path, absent_gpu):
    with absent_gpu.first_step_there(train.PretrainingBrain):
        train.main(arguments(name, librispeech, tmp_path, "--log_interval=9"))


def read_log(output_folder):
    return [json.loads(line) for line in (Path(output_folder) / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_model_has_the_stated_number_of_parameters(name, tmp_path):
    with open(RECIPE / "hparams" / f"{name}.yaml") as file, torch.device("meta"):
        hparams = load_hyperpyyaml(file, {"data_folder": "none", "output_folder": str(tmp_path)})
    assert sum(parameter.numel() for parameter in hparams["model"].parameters()) == PARAMETERS[name]
    header = file_header(name)
    assert f"hparams/{name}.yaml --data_folder" in header, "the header lacks its launch command"
    assert f"{PARAMETERS[name] / 1e6:.1f}"[:3] in header, "the header states another number of parameters"


def file_header(name):
    return (RECIPE / "hparams" / f"{name}.yaml").read_text().split("\n\n")[0]


def test_a_bar_shows_the_progress_of_who_does_not_decline_it(train, librispeech, tmp_path, capfd):
    given = arguments("bestrq_small", librispeech, tmp_path)
    given.remove("--noprogressbar")
    train.main(given)
    shown = capfd.readouterr().err
    assert "2/2" in shown and "audio=" in shown and "loss=" in shown


@pytest.mark.parametrize("name", PARAMETERS)
def test_two_steps_at_toy_size_leave_logs_checkpoint_and_encoder(name, train, librispeech, tmp_path):
    train.main(arguments(name, librispeech, tmp_path))
    log = read_log(tmp_path)
    assert [line["step"] for line in log if line["event"] == "train"] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in log)
    assert [line["event"] for line in log][-1] == "valid"
    assert len(list((tmp_path / "save").glob("CKPT+*"))) == 2  # one before the validation
    assert list((tmp_path / "tensorboard").iterdir())
    for folder in ("encoder", "encoder@1"):
        hidden, lengths = load_encoder(tmp_path / folder)(torch.randn(1, 16000))
        assert hidden.shape == (2, 1, FRAMES[name], 16)
        assert lengths.tolist() == [FRAMES[name]]
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "LibriSpeech" in card
    assert "| updates | 2 |" in card


def test_an_interval_of_checkpoints_on_the_command_line_takes_the_place_of_the_yamls(
    train, librispeech, tmp_path, monkeypatch
):
    seen = {}
    monkeypatch.setattr(train.PretrainingBrain, "fit", lambda brain, *_: seen.update(brain=brain))
    for number, (name, option, expected) in enumerate(
        (
            ("bestrq", "--ckpt_interval_steps=7", (7, 0)),
            ("bestrq", "--ckpt_interval_minutes=5", (0, 5)),
            ("bestrq_small", "--ckpt_interval_minutes=5", (0, 5)),
        )
    ):
        train.main(arguments(name, librispeech, tmp_path / str(number), option))
        assert (seen["brain"].ckpt_interval_steps, seen["brain"].ckpt_interval_minutes) == expected


def test_without_a_device_named_it_trains_on_the_one_there_is(train, librispeech, tmp_path):
    given = arguments("bestrq_small", librispeech, tmp_path)
    given.remove("--device=cpu")
    train.main(given)
    assert read_log(tmp_path)[-1]["event"] == "valid"


def test_a_run_that_is_done_says_so_and_changes_nothing(train, librispeech, tmp_path, caplog):
    train.main(arguments("bestrq_small", librispeech, tmp_path))
    before = (tmp_path / "train_log.jsonl").read_text()
    train.main(arguments("bestrq_small", librispeech, tmp_path))
    assert (tmp_path / "train_log.jsonl").read_text() == before
    assert "This run is done" in (tmp_path / "log.txt").read_text()


def test_a_run_that_goes_on_with_updates_of_another_size_says_so(train, librispeech, tmp_path):
    train.main(arguments("bestrq_small", librispeech, tmp_path))
    train.main(
        arguments("bestrq_small", librispeech, tmp_path, "--grad_accumulation_factor=1", "--optimizer_step_limit=3")
    )
    log = (tmp_path / "log.txt").read_text()
    assert "was trained with updates of up to 16 s of audio before and goes on with 8, at the same rates" in log


def test_a_folder_of_any_audio_is_a_corpus(train, tmp_path):
    generator = np.random.default_rng(0)
    for number, (name, rate) in enumerate((("a b.wav", 8000), ("c,d.flac", 44100), ("é.ogg", 16000), ("f.wav", 22050))):
        path = tmp_path / "audio" / f"speaker{number}" / name
        path.parent.mkdir(parents=True)
        soundfile.write(path, 0.1 * generator.standard_normal(3 * rate), rate)
    output = tmp_path / "run"
    given = arguments("bestrq_small", tmp_path / "audio", output, "--corpus=folder")
    with pytest.raises(InputError, match="--train_splits is of LibriSpeech: a folder has no such parts; leave it out"):
        train.main(given)
    train.main([option for option in given if not option.startswith("--train_splits")])
    assert read_log(output)[-1]["event"] == "valid"
    run = json.loads((output / "run.json").read_text())
    assert (run["train_utterances"], run["update_seconds_at_most"]) == (3, 16.0)


def test_torchrun_on_two_devices_trains_and_ends(torchrun, librispeech, tmp_path):
    torchrun(RECIPE / "train.py", arguments("bestrq_small", librispeech, tmp_path))
    log = read_log(tmp_path)
    assert [line["step"] for line in log if line["event"] == "train"] == [1, 2]
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2


BAD_INPUT = {
    "no data folder": (["--data_folder=/nowhere"], r"/nowhere"),
    "unknown corpus": (["--corpus=tedlium"], r"corpus is librispeech or folder"),
    "missing split": (["--valid_splits=[dev-other]"], r"dev-other"),
    "unknown key": (["--peak_learning_rat=1"], r"--peak_learning_rat is no key .* --peak_learning_rate"),
    "value out of range": (["--num_components=0"], r"bestrq_small.yaml: .*num_components is 1 to 320"),
    "batch bound below the longest utterance": (["--max_batch_seconds=2"], r"max_batch_seconds"),
    "all too short": (["--min_seconds=20"], r"min_seconds"),
    "a share above one": (["--mask_prob=60"], r"bestrq_small.yaml: .*prob is a share of frames"),
    "no micro-batches": (["--grad_accumulation_factor=0"], r"--grad_accumulation_factor 0: give a whole number"),
    "another cache": (["--cache=disk"], r"cache is memory, or null"),
    "other rate refused": (["--sample_rate=8000", "--resample=False"], r"resample"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line_before_anything_is_written(case, train, librispeech, tmp_path):
    more, message = BAD_INPUT[case]
    output = tmp_path / "run"
    with pytest.raises(InputError, match=message) as caught:
        train.main(arguments("bestrq_small", librispeech, output, *more))
    assert "\n" not in str(caught.value)
    assert not (output / "train_log.jsonl").exists()
    assert not (output / "hyperparams.yaml").exists()
    assert not list(output.rglob("CKPT*"))


def test_what_waits_in_shared_memory_is_reckoned_before_a_worker_dies_of_it(train, librispeech, tmp_path, monkeypatch):
    """8 s, in 32 bits or from a cache in 16, four times for each of two workers, on two ranks."""
    reckoned = []
    monkeypatch.setattr(train, "warn_of_shared_memory", reckoned.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train.PretrainingBrain, "fit", lambda *_: None)
    for name, more in (("read", []), ("cached", ["--cache=memory"])):
        train.main(arguments("bestrq_small", librispeech, tmp_path / name, "--num_workers=2", *more))
    assert reckoned == [2 * 2 * 4 * 8 * 16000 * 4, 2 * 2 * 4 * 8 * 16000 * 2]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_run_on_little_audio_has_epochs_enough_for_all_its_updates(name, tmp_path):
    with open(RECIPE / "hparams" / f"{name}.yaml") as file, torch.device("meta"):
        hparams = load_hyperpyyaml(file, {"data_folder": "none", "output_folder": str(tmp_path)})
    assert hparams["epoch_counter"].limit >= hparams["optimizer_step_limit"]


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name.startswith("bestrq")])
def test_the_quantizer_takes_the_features_there_are(name, train, librispeech, tmp_path):
    train.main(arguments(name, librispeech, tmp_path, "--num_mels=40", "--optimizer_step_limit=1"))
    assert read_log(tmp_path)[-1]["event"] == "valid"


def test_placeholder_left_open_is_one_line_on_stderr_and_exit_status_2(tmp_path):
    command = [sys.executable, str(RECIPE / "train.py"), str(RECIPE / "hparams" / "bestrq_small.yaml"), "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--data_folder" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_unreadable_and_empty_audio_is_named_and_skipped_up_to_the_limit(train, tmp_path):
    corpus = write_librispeech(tmp_path / "LibriSpeech")
    chapter = corpus / "train-clean-100" / "100" / "1"
    (chapter / "100-1-0900.flac").write_bytes(b"")
    (chapter / "100-1-0901.flac").write_text("this is no audio")
    with pytest.raises(InputError, match=r"100-1-090\d\.flac.*max_unreadable"):
        train.main(arguments("bestrq_small", corpus, tmp_path / "strict", "--max_unreadable=1"))
    train.main(arguments("bestrq_small", corpus, tmp_path / "lenient", "--max_unreadable=2"))
    assert json.loads((tmp_path / "lenient" / "run.json").read_text())["train_utterances"] == 6


def damage(path: Path) -> None:
    """Spoil what a file holds, but not its head, size and date, as a disk does."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 3 :] = bytes(len(content) - len(content) // 3)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("split", "ends"), [("train-clean-100", False), ("dev-clean", True)])
def test_audio_damaged_meanwhile_is_replaced_in_training_and_ends_validation(train, tmp_path, split, ends):
    corpus = write_librispeech(tmp_path / "LibriSpeech")
    train.main(arguments("bestrq_small", corpus, tmp_path / "run"))
    path = next(corpus.glob(f"{split}/*/1/*-0005.flac"))
    damage(path)
    more = arguments("bestrq_small", corpus, tmp_path / "run", "--max_unreadable=1", "--optimizer_step_limit=6")
    if ends:
        with pytest.raises(InputError, match=path.name):
            train.main(more)
    else:
        train.main(more)
        log = (tmp_path / "run" / "log.txt").read_text()
        assert sum(path.name in line for line in log.splitlines() if "is heard instead" in line) == 1
        assert read_log(tmp_path / "run")[-1]["step"] == 6


def test_long_recordings_are_cut_and_none_of_their_audio_is_left_out(train, librispeech, tmp_path):
    """Of six utterances of 1 to 3.5 s, 13.5 s in all: the last four, into two each."""
    train.main(arguments("bestrq_small", librispeech, tmp_path, "--max_seconds=1.9"))
    assert "4 training recordings are longer than max_seconds = 1.9: each is cut" in (tmp_path / "log.txt").read_text()
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["train_utterances"], run["recordings_cut"], run["train_hours_left_out"]) == (10, 4, 0.0)
    assert run["train_hours"] * 3600 == pytest.approx(13.5)


@pytest.mark.parametrize(("shortest", "warnings"), [(1.1, 2), (1.0, 0)])
def test_much_audio_that_is_too_short_is_said_and_recorded(train, librispeech, tmp_path, shortest, warnings):
    """Of six utterances of 1 to 3.5 s, 13.5 s in all, the first, in both sets."""
    train.main(arguments("bestrq_small", librispeech, tmp_path, f"--min_seconds={shortest}"))
    log = (tmp_path / "log.txt").read_text()
    assert log.count(f"audio, 7 % of it, are left out, as shorter than min_seconds = {shortest}:") == warnings
    run = json.loads((tmp_path / "run.json").read_text())
    left_out = [run["train_hours_left_out"] * 3600, run["valid_hours_left_out"] * 3600]
    assert left_out == pytest.approx([1.0, 1.0] if warnings else [0.0, 0.0])


def test_another_models_checkpoint_is_refused_and_left_alone(train, librispeech, tmp_path):
    train.main(arguments("bestrq_small", librispeech, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "save").rglob("*")}
    more = ("--num_layers=2", "--optimizer_step_limit=4")
    with pytest.raises(InputError, match=r"encoder\.num_layers: 1 there, 2 here"):
        train.main(arguments("bestrq_small", librispeech, tmp_path, *more))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "save").rglob("*")} == before


def test_run_options_reach_what_refers_to_them_in_the_yaml(librispeech, tmp_path):
    more = ("--optimizer_step_limit=700", "--precision=bf16")
    _, _, _, hparams = load_recipe(arguments("bestrq_small", librispeech, tmp_path, *more))
    assert hparams["lr_schedule"].total_updates == 700
    assert hparams["eval_precision"] == "bf16"


def test_an_option_without_effect_is_refused_before_anything_is_written(train, librispeech, tmp_path):
    with pytest.raises(InputError, match="--skip_nonfinite_grads has no effect"):
        train.main([*arguments("bestrq_small", librispeech, tmp_path / "run"), "--skip_nonfinite_grads"])
    assert not (tmp_path / "run" / "manifests").exists()


def test_a_key_given_twice_is_refused(librispeech, tmp_path):
    with pytest.raises(InputError, match="--seed is given more than once"):
        load_recipe([*arguments("bestrq_small", librispeech, tmp_path), "--seed=1", "--seed=2"])


@pytest.mark.parametrize("name", PARAMETERS)
def test_another_seed_is_other_batches_masks_weights_and_labels(name, train, librispeech, tmp_path):
    frames = torch.randn(1, 400, 320, generator=torch.Generator().manual_seed(0))
    plans, masks, weights, codebooks = [], [], [], []
    for seed in (3, 4):
        *_, hparams = load_recipe(arguments(name, librispeech, tmp_path, f"--seed={seed}"))
        model, quantizer = hparams["model"], hparams["model"].quantizer
        loader, *_ = train.dataio_prepare(hparams, train.prepare_corpus(hparams), 0, 1)
        plans.append(list(loader.batch_sampler))
        masks.append(loader.dataset.__getitems__(plans[0][0]).masked.mask)  # of one and the same batch
        weights.append(torch.nn.utils.parameters_to_vector(model.speech_encoder.parameters()))
        if not getattr(quantizer, "measured", True):
            quantizer.fit([quantizer.prepare(frames)])
        codebooks.append([value for key, value in quantizer.state_dict().items() if key.endswith("codebooks")])
    first, other = ([(plan.indices.tolist(), plan.starts.tolist()) for plan in epoch] for epoch in plans)
    assert first != other
    assert masks[0].shape == masks[1].shape and not torch.equal(*masks)
    assert not torch.equal(*weights)
    assert codebooks[0] and not any(map(torch.equal, *codebooks))


def test_the_codebook_is_looked_at_once_at_the_start_of_a_new_run(train, librispeech, tmp_path):
    train.main(arguments("bestrq_small", librispeech, tmp_path))
    train.main(arguments("bestrq_small", librispeech, tmp_path, "--optimizer_step_limit=3"))
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Codebook 1 of 2") == 1
    assert log.index("Measuring the statistics") < log.index("Codebook 1 of 2") < log.index("train | step 1")


def test_validation_amid_an_epoch_changes_nothing_in_training(train, librispeech, tmp_path):
    losses = {}
    for interval in (1, 100):
        output = tmp_path / str(interval)
        more = (f"--valid_interval={interval}", "--optimizer_step_limit=4", "--grad_accumulation_factor=1")
        train.main(arguments("bestrq_small", librispeech, output, *more))
        log = read_log(output)
        losses[interval] = [line["loss"] for line in log if line["event"] == "train"]
        validated = [line["step"] for line in log if line["event"] == "valid"]
        assert validated == ([1, 2, 3, 4] if interval == 1 else [4])
    assert losses[1] == losses[100]


def test_audio_that_is_decoded_once_trains_the_same_model(train, librispeech, tmp_path):
    losses = {}
    for cache in ("null", "memory"):
        train.main(arguments("bestrq_small", librispeech, tmp_path / cache, f"--cache={cache}", "--num_workers=1"))
        losses[cache] = [(line["event"], line["loss"]) for line in read_log(tmp_path / cache)]
    assert losses["memory"] == losses["null"] and len(losses["null"]) >= 3
    assert len(list((tmp_path / "memory" / "cache").glob("*.int16"))) == 2


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(train, librispeech, tmp_path):
    with sole_writer(tmp_path), pytest.raises(InputError, match="is being written by another process") as error:
        train.main(arguments("bestrq_small", librispeech, tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "manifests").exists()
    train.main(arguments("bestrq_small", librispeech, tmp_path))
