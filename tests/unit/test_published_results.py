"""What is published under docs/results is what its results.json files say, and nothing of a machine."""

import json
import re
import shutil
from pathlib import Path

import pytest

from speechbrain_bestrq.evidence.report import write_evidence
from speechbrain_bestrq.reproduction.pairs import PAIRS_FILE
from speechbrain_bestrq.reproduction.report import write_reproduction
from speechbrain_bestrq.reproduction.tables import PLAN_FILE

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{PLAN_FILE}"))


def test_all_are_there():
    published = "fine_tuned fine_tuned_tasks fourth_long_seed one_kind same_updates small small_few three_long_seeds "
    published += "three_seeds_few"
    assert [folder.name for folder in FOLDERS] == published.split()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_come_out_of_the_results_byte_for_byte(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    kept = (PLAN_FILE, PAIRS_FILE)
    reports = [path.name for path in copy.iterdir() if path.is_file() and path.name not in kept]
    for name in reports:
        (copy / name).unlink()
    files = write_reproduction(copy)
    assert {path.name for path in files.values()} | {"curves.png"} == set(reports)
    for name in (path.name for path in files.values() if path.suffix != ".html"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    # the picture within the page depends on the version of matplotlib
    without_picture = [re.sub("base64,[^\"']+", "", (one / "report.html").read_text()) for one in (copy, folder)]
    assert without_picture[0] == without_picture[1]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_folder_holds_figures_and_no_place_of_a_machine(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".md", ".html", ".csv", ".png"}
    assert sum(path.stat().st_size for path in files) < 5e6
    for path in files:
        if path.suffix in (".json", ".jsonl", ".md", ".csv"):
            found = re.findall(
                r"(?<![\w.)\]~<-])/(?:home|tmp|work|root|data|mnt|opt|usr|Users)\b[^\s\"']*", path.read_text()
            )
            assert not found, f"{path}: {found[0]}"


EVIDENCE = sorted(path.parent for path in RESULTS.glob("*/evidence.json"))


def test_all_evidence_is_there():
    assert [folder.name for folder in EVIDENCE] == [
        "long_run_evidence",
        "long_seeds_evidence",
        "one_kind_evidence",
        "small_evidence",
        "three_long_seeds_evidence",
        "three_seeds_evidence",
        "two_kinds_evidence",
        "wav2vec2_evidence",
    ]


@pytest.mark.parametrize("folder", EVIDENCE, ids=lambda folder: folder.name)
def test_evidence_comes_out_of_its_figures_byte_for_byte(folder, tmp_path):
    files = write_evidence(json.loads((folder / "evidence.json").read_text()), tmp_path)
    for name in ("markdown", "csv", "json"):
        assert files[name].read_bytes() == (folder / files[name].name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in files.values()}
