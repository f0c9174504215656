"""What a run writes down of its tests."""

import json

from speechbrain_bestrq.classification_scores import Answers
from speechbrain_bestrq.error_rates import ErrorRates
from speechbrain_bestrq.results import compare_runs, read_results, write_errors, write_results

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
