"""The command line: what it prints where, and its exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq import __version__, cli, report
from speechbrain_bestrq.cli import COMMANDS, main
from speechbrain_bestrq.commands import reproduce


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"model": "BestRQ", "corpus": "ours"}')
    lines = ({"event": event, "step": 5, "loss": 6.5} for event in ("train", "valid"))
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def audio_folder(tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    noise = np.random.default_rng(0).normal(0, 0.1, 8000)
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", noise, 16000)
    return folder


def exit_status(*words):
    """The exit status of the command, whichever way it ends."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def test_help_lists_every_subcommand(capsys):
    assert exit_status("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^\s+{command.name}\s+{re.escape(command.summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_subcommand_shows_examples_that_parse(capsys, command):
    assert exit_status(command.name, "--help") == 0
    assert command.examples in capsys.readouterr().out
    examples = re.findall(r"^  sb-bestrq (.*)$", command.examples.replace("\\\n", ""), re.MULTILINE)
    assert examples
    for example in examples:
        assert cli.build_parser().parse_args(example.split(" > ")[0].split()).subcommand == command.name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_subcommand_can_speak_json(capsys, command):
    assert exit_status(command.name, "--help") == 0
    assert "--json" in capsys.readouterr().out


def test_keys_of_a_yaml_are_kept_in_order_by_a_subcommand_that_takes_them_and_by_no_other():
    words = ["check-codebook", "a.yaml", "--seed", "-1", "--json", "--train_splits=[a]", "--whiten", "16"]
    arguments = cli.build_parser().parse_args(words)
    assert arguments.overrides == ["--seed", "-1", "--train_splits=[a]", "--whiten", "16"]
    assert (arguments.hparams, arguments.json) == ("a.yaml", True)
    assert exit_status("report", "run", "--seed", "1") == 2


def test_version(capsys):
    assert exit_status("--version") == 0
    assert capsys.readouterr().out == f"sb-bestrq {__version__}\n"


@pytest.mark.parametrize(
    "words", [[], ["reprot"], ["report"], ["report", "run", "--jsno"], ["prepare", "--corpus", "x"]]
)
def test_wrong_usage_is_one_line_and_status_2(capsys, words):
    assert exit_status(*words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sb-bestrq: error: .* \(see sb-bestrq.* --help\)\n", output.err)


def test_report_prints_the_summary(capsys, run_folder):
    assert exit_status("report", run_folder) == 0
    output = capsys.readouterr().out
    assert "- model: BestRQ" in output and f"- curves: {run_folder / 'report' / 'curves.png'}\n" in output
    assert (run_folder / "report" / "curves.png").exists()


def test_report_as_json_is_json_and_nothing_else(capsys, run_folder):
    assert exit_status("report", run_folder, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["corpus"], summary["updates"], summary["last_valid"]["loss"]) == ("ours", 5, 6.5)


def test_bad_input_is_one_line_and_status_2(capsys, tmp_path):
    assert exit_status("report", tmp_path / "nowhere") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"sb-bestrq: error: run folder '.*nowhere' does not exist: .*\n", output.err)


def test_other_errors_keep_their_traceback(monkeypatch, run_folder):
    def broken(_folder):
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(report, "write_report", broken)
    with pytest.raises(KeyError):
        main(["report", str(run_folder)])


def test_what_the_file_system_refuses_is_one_line(monkeypatch, capsys, run_folder):
    def full(_folder):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(report, "write_report", full)
    assert exit_status("report", run_folder) == 2
    assert capsys.readouterr().err == "sb-bestrq: error: 'report.html': No space left on device: make room.\n"


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, run_folder):
    def interrupted(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)
    assert exit_status("report", run_folder) == 130
    assert capsys.readouterr().err == "sb-bestrq: interrupted\n"


def test_prepare_folder_prints_the_manifests(capsys, audio_folder, tmp_path):
    save_folder = tmp_path / "save"
    words = ["prepare", "--corpus", "folder", "--data_folder", audio_folder, "--save_folder", save_folder]
    assert exit_status(*words, "--valid_share", 0.3, "--workers", 1, "--no-resample") == 0
    paths = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert paths == {"train": str(save_folder / "train.csv"), "valid": str(save_folder / "valid.csv")}
    rows = sum(len(Path(path).read_text().splitlines()) - 1 for path in paths.values())
    assert rows == 6
    assert exit_status(*words, "--valid_share", 0.3, "--workers", 1, "--no-resample", "--json") == 0
    assert json.loads(capsys.readouterr().out) == paths


def test_prepare_librispeech_hands_its_options_on(capsys, audio_folder, tmp_path):
    for split, speaker in (("train-clean-100", "19"), ("dev-other", "84")):
        chapter = tmp_path / "LibriSpeech" / split / speaker / "1"
        chapter.mkdir(parents=True)
        soundfile.write(chapter / f"{speaker}-1-0000.flac", np.zeros(16000), 16000)
    words = ["prepare", "--corpus", "librispeech", "--data_folder", tmp_path / "LibriSpeech"]
    words += ["--save_folder", tmp_path / "save", "--train_splits", "train-clean-100", "--valid_splits", "dev-other"]
    assert exit_status(*words, "--extra_folders", audio_folder) == 0
    paths = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert set(paths) >= {"train", "valid", "train-clean-100", "dev-other"}
    assert len(Path(paths["train"]).read_text().splitlines()) == 1 + 1 + 6
    assert exit_status(*words, "--transcripts") == 2
    assert "trans.txt" in capsys.readouterr().err


def test_prepare_refuses_the_other_corpus_options_before_it_reads(capsys, tmp_path):
    words = ["prepare", "--data_folder", tmp_path / "nowhere", "--save_folder", tmp_path / "save", "--corpus"]
    assert exit_status(*words, "folder", "--transcripts") == 2
    assert "--transcripts is for --corpus librispeech: leave it out" in capsys.readouterr().err
    assert exit_status(*words, "librispeech", "--seed", 3) == 2
    assert "--seed is for --corpus folder or voxceleb: leave it out" in capsys.readouterr().err
    assert exit_status(*words, "folder") == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "save").exists()


def test_installed_command_runs_and_its_exit_status_is_that_of_main(tmp_path):
    command = Path(sys.executable).with_name("sb-bestrq")
    done = subprocess.run([command, "report", tmp_path / "nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("sb-bestrq: error: run folder")


def test_the_demo_is_the_reproduction_of_its_preset(monkeypatch):
    found = []
    monkeypatch.setattr(reproduce, "_reproduce", lambda arguments: found.append(vars(arguments)) or 0)
    assert main(["demo", "--devices", "cpu,cpu", "--dry_run"]) == 0
    words = ["reproduce", "--preset", "demo", "--output_folder", "demo", "--devices", "cpu,cpu", "--dry_run"]
    expected = vars(cli.build_parser().parse_args(words))
    assert found == [{**expected, "subcommand": "demo"}]
