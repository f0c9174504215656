"""What a run writes down of its tests."""

import json

import pytest

from speechbrain_bestrq.classification_scores import Answers
from speechbrain_bestrq.error_rates import ErrorRates
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.results import (
    check_tested_corpus,
    compare_runs,
    compare_runs_over_seeds,
    read_results,
    with_earlier_sets,
    write_errors,
    write_results,
)

#: As Python gives the name of a file whose bytes are no UTF-8.
ODD = "id1/caf\udce9/1"


def test_utterances_and_folders_may_have_names_that_are_no_utf_8(tmp_path):
    columns = ["ID", "group", "wer_errors", "wer_total"]
    for folder, errors in (("one", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        rows = [
            dict(zip(columns, (name, speaker, errors, 4), strict=True)) for name, speaker in ((ODD, "a"), ("b", "b"))
        ]
        write_errors(tmp_path / folder, "test", rows, columns)
    difference, _ = compare_runs(tmp_path / "one", tmp_path / "other", "test", "wer")
    assert difference.value == -0.25
    rates = ErrorRates()
    rates.append([ODD], ["YES"], ["NO"], ["a"])
    assert ODD.encode(errors="surrogateescape") in rates.write(tmp_path / "wer_test.txt").read_bytes()
    answers = Answers(["no", "yes"])
    answers.append([ODD, "b"], ["yes", "no"], ["yes", "yes"], ["a", "b"])
    answers.write(tmp_path, "test")
    assert Answers.read(tmp_path, "test", ["no", "yes"]).describe() == answers.describe()
    write_results(tmp_path, {"command": f"train.py {ODD} ü", "sets": {}})
    assert read_results(tmp_path)["command"] == f"train.py {ODD} ü"
    assert "ü" in (tmp_path / "results.json").read_text() and json.loads((tmp_path / "results.json").read_text())


def test_sets_of_another_corpus_are_not_kept_and_a_later_test_is_told_by_its_sets(tmp_path):
    run = {"corpus": "LibriSpeech", "seed": 1, "updates": 9, "best_epoch": 2, "encoder": {"digest": "a"}}
    write_results(tmp_path, {**run, "sets": {"test-clean": {"wer": 0.2}}})
    later = {**run, "test_command": "python train.py --test_only", "sets": {"dev-other": {"wer": 0.3}}}
    sets = with_earlier_sets(tmp_path, later)["sets"]
    assert sets["test-clean"] == {"wer": 0.2} and sets["dev-other"]["test_command"] == later["test_command"]
    assert list(sets) == ["test-clean", "dev-other"]  # the first is that of the paper's column
    changes = [{"corpus": "speechocean762"}, {"encoder": {"digest": "b"}}, {"updates": 8}]
    for change in (*changes, {"validation": {"loss": 1.5}}, {"settings": {"learning_rate": 0.1}}):
        assert list(with_earlier_sets(tmp_path, {**later, **change})["sets"]) == ["dev-other"]


def test_scores_of_an_earlier_test_stay_while_those_of_both_are_the_same(tmp_path, caplog):
    run = {"seed": 1, "settings": {"betas": (0.9, 0.98)}, "validation": {"loss": 0.1}}
    searched = {"wer": 0.2, "wer_lm": 0.1, "loss": 1.5, "evaluation_seconds": 3.0}
    write_results(tmp_path, {**run, "sets": {"test-clean": searched}})
    later = {"wer": 0.2, "evaluation_seconds": 4.0}
    assert with_earlier_sets(tmp_path, {**run, "sets": {"test-clean": later}})["sets"]["test-clean"] == searched | later
    # other batches, or another device
    rounded = {"wer": 0.2, "loss": 1.50001, "evaluation_seconds": 4.0}
    told = with_earlier_sets(tmp_path, {**run, "sets": {"test-clean": rounded}})["sets"]["test-clean"]
    assert told == searched | rounded
    other = {"wer": 0.3, "loss": 1.5, "evaluation_seconds": 4.0}
    assert with_earlier_sets(tmp_path, {**run, "sets": {"test-clean": other}})["sets"]["test-clean"] == other
    assert "test-clean: the scores were others; what it said of wer_lm is gone" in caplog.text


def test_another_corpus_is_not_tested_over_the_results_of_one(tmp_path):
    check_tested_corpus(tmp_path, "LibriSpeech")  # there are none yet
    write_results(tmp_path, {"corpus": "LibriSpeech", "sets": {}})
    check_tested_corpus(tmp_path, "LibriSpeech")
    with pytest.raises(InputError, match="has results of LibriSpeech, and this is SLURP: copy the run's folder"):
        check_tested_corpus(tmp_path, "SLURP")
    (tmp_path / "results.json").unlink()  # in a copy, as it says
    check_tested_corpus(tmp_path, "SLURP")


def test_columns_of_an_earlier_test_stay_while_the_answers_are_the_same(tmp_path, caplog):
    def write(wrong, *more):
        row = {"ID": ODD, "group": "a", "wer_errors": wrong, "wer_total": 4, "wer_lm_errors": 1, "wer_lm_total": 4}
        columns = ["ID", "group", "wer_errors", "wer_total", *more]
        path = write_errors(tmp_path, "test", [{name: row[name] for name in columns}], columns)
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()

    plain = write(2)
    searched = write(2, "wer_lm_errors", "wer_lm_total")
    assert write(2) == searched != plain and searched[1].endswith(",2,4,1,4")
    assert "gone" not in caplog.text
    assert write(3) == ["ID,group,wer_errors,wer_total", f"{ODD},a,3,4"]
    assert "what it said of wer_lm_errors, wer_lm_total is gone" in caplog.text


def test_the_mean_of_several_seeds_is_compared_on_the_same_utterances(tmp_path):
    """Of two seeds each: 1 and 3 errors against 4 and 4 of ten utterances of five speakers."""
    rows = [{"ID": str(number), "group": str(number % 5), "wer_total": 2} for number in range(10)]
    folders = []
    for name, wrong in (("a1", 1), ("a2", 3), ("b1", 4), ("b2", 4)):
        folder = tmp_path / name
        folder.mkdir()
        folders.append(folder)
        told = [{**row, "wer_errors": int(number < wrong)} for number, row in enumerate(rows)]
        write_errors(folder, "test", told, ["ID", "group", "wer_errors", "wer_total"])
    difference, not_better = compare_runs_over_seeds(folders[:2], folders[2:], "test", "wer")
    assert difference.value == pytest.approx((2 - 4) / 20) and difference.low < difference.value < difference.high
    single, _ = compare_runs(folders[0], folders[2], "test", "wer")
    assert single.value == pytest.approx(-3 / 20) and 0 <= not_better < 0.1
