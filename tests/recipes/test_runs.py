"""The scripts of runs/: what they call, what they pass over, what their tables say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = Path(__file__).parents[2] / "runs"

#: A recipe that answers more rightly the further down the alphabet its encoder is, and keeps a record of its calls.
TRAIN = """
import pathlib, sys
from speechbrain_bestrq.classification_scores import Answers
from speechbrain_bestrq.results import write_results
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as file:
    print(sys.argv[1:], file=file)
if "--fail" in options:
    sys.exit(2)
name = pathlib.Path(options["--encoder"]).name
answers = Answers(["no", "yes"])
right = {"good": 15, "random": 10}.get(options["--encoder"].split(":")[0], 12)
for number in range(20):
    answers.append([str(number)], ["yes"], ["yes" if number < right else "no"])
folder = pathlib.Path(options["--output_folder"])
folder.mkdir(parents=True)
answers.write(folder, "test")
write_results(folder, {"sets": {"test": answers.describe()}})
"""


@pytest.fixture
def recipe(tmp_path):
    """The folder of a recipe."""
    (tmp_path / "recipe" / "hparams").mkdir(parents=True)
    (tmp_path / "recipe" / "train.py").write_text(TRAIN)
    return tmp_path / "recipe"


def probe(recipe, *more, **settings):
    """Call probes.sh."""
    command = ["sh", RUNS / "probes.sh", recipe, recipe.parent / "probes", *more]
    environment = {**os.environ, "PYTHON": sys.executable, **settings}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_every_encoder_is_probed_with_every_seed_and_finished_runs_are_passed_over(recipe, tmp_path):
    encoders = "good random:/enc/some /enc/some"
    done = probe(recipe, "--data_folder", "/speech", ENCODERS=encoders, SEEDS="4")
    assert done.returncode == 0, done.stderr
    done = probe(recipe, "--data_folder", "/speech", ENCODERS=encoders, SEEDS="4 5")
    assert done.returncode == 0, done.stderr
    calls = [eval(line) for line in (recipe / "calls.txt").read_text().splitlines()]
    probes = f"{tmp_path}/probes"
    told = [(call[2], call[4], call[6].removeprefix(probes), call[8].removeprefix(probes)) for call in calls]
    assert told == [
        (encoder, seed, f"/{name}/{seed}", f"/cache/{cache}")
        for seed in ("4", "5")
        for encoder, name, cache in (
            ("good", "good", "good"),
            ("random:/enc/some", "random-some", f"random-some-{seed}"),
            ("/enc/some", "some", "some"),
        )
    ]
    assert all(call[0].endswith("recipe/hparams/probe_small.yaml") and call[-1] == "/speech" for call in calls)


def test_a_fine_tuning_gets_no_cache_a_failure_ends_the_script_and_without_encoders_it_says_how(recipe):
    assert probe(recipe, "--fail", "1", ENCODERS="a b", YAML="bestrq_finetune").returncode == 2
    (call,) = (recipe / "calls.txt").read_text().splitlines()
    assert "cache" not in call and "hparams/bestrq_finetune.yaml" in call
    done = probe(recipe, "--data_folder", "/speech")
    assert done.returncode == 2 and "runs/probes.sh recipes/SLURP/intent PROBES" in done.stderr


def test_the_table_has_scores_and_paired_differences(recipe, tmp_path):
    probe(recipe, "--data_folder", "/speech", ENCODERS="good random:/enc/some")
    command = [sys.executable, RUNS / "probe_table.py", tmp_path / "probes", "--score", "accuracy"]
    done = subprocess.run([*command, "--against", "good"], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[2] == (
        "| encoder | accuracy, seed 1 | accuracy, seed 2 | mean | errors of good less its own, seed 1 "
        "| errors of good less its own, seed 2 |"
    )
    assert lines[4].startswith("| good | 75.0 (") and lines[4].endswith(" | 75.0 |  |  |")
    assert lines[5].startswith("| random-some | 50.0 (") and "| 50.0 | -25.0 (-" in lines[5]
    for words, message in (
        (["--against", "bad"], "no run of 'bad'"),
        (["--score", "eer", "--against", "good"], "no score 'eer'"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
