"""Linear probes of hidden states: what they measure is known beforehand, and is found."""

import csv
import json
import math
import re
import shutil
import statistics
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import soundfile
import torch

from speechbrain_bestrq import cli
from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.corpora import read_manifest, read_trials
from speechbrain_bestrq.corpora.synthetic import make_synthetic
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.evidence import alignment, evidence, measures
from speechbrain_bestrq.evidence.alignment import Aligner, spread
from speechbrain_bestrq.evidence.evidence import gather
from speechbrain_bestrq.evidence.hidden import PARTS, Frames, encode_frames, encode_parts, part_means
from speechbrain_bestrq.evidence.linear import Examples, effective_rank, linear_probe, within_class_whitening
from speechbrain_bestrq.evidence.measures import CORPORA, MEASURES, chosen_apart
from speechbrain_bestrq.evidence.report import best_score, write_evidence
from speechbrain_bestrq.evidence.sources import Source, find_sources
from speechbrain_bestrq.metrics import equal_error_rate
from speechbrain_bestrq.task_data import take_classes, take_examples
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.verification import SpeakerEmbeddings

CPU = torch.device("cpu")


# ---------------------------------------------------------------- probes


def clouds(number, distance, seed, dimensions=6, classes=3):
    """Gaussian clouds whose centres lie so far apart in the first dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    vectors = torch.randn(number, dimensions, generator=generator)
    vectors[torch.arange(number), labels] += distance
    return Examples(vectors, labels)


def test_a_linear_probe_finds_what_is_linear_and_nothing_where_nothing_is():
    far = linear_probe(clouds(300, 8.0, 0), clouds(300, 8.0, 1), clouds(300, 8.0, 2), 3)
    assert far.test > 0.99
    none = linear_probe(clouds(300, 0.0, 0), clouds(3000, 0.0, 1), clouds(3000, 0.0, 2), 3)
    assert none.test == pytest.approx(1 / 3, abs=0.04)


def test_the_scale_of_a_channel_changes_nothing_and_a_constant_one_does_no_harm():
    sets = [clouds(200, 1.5, seed) for seed in range(3)]
    plain = linear_probe(*sets, 3)
    scale, shift = torch.tensor([1e-3, 1.0, 1e3, 10.0, 0.1, 1.0]), torch.tensor([5.0, -300.0, 0.0, 1e3, 0.0, 1.0])
    moved = [
        Examples(torch.cat([one.vectors * scale + shift, torch.full((200, 1), 7.0)], 1), one.classes) for one in sets
    ]
    assert linear_probe(*moved, 3).test == pytest.approx(plain.test, abs=0.011)


def test_the_validation_set_chooses_the_penalty_and_the_test_set_has_no_say():
    train, valid, test = clouds(60, 1.0, 0, 50), clouds(600, 1.0, 1, 50), clouds(600, 1.0, 2, 50)
    each = [linear_probe(train, valid, test, 3, (penalty,)) for penalty in (1e-2, 10.0)]
    assert abs(each[0].valid - each[1].valid) > 0.01
    chosen = linear_probe(train, valid, test, 3, (1e-2, 10.0))
    best = max(each, key=lambda score: score.valid)
    assert tuple(chosen) == pytest.approx(tuple(best), abs=0.01)
    assert linear_probe(train, valid, Examples(test.vectors, 2 - test.classes), 3, (1e-2, 10.0)).valid == chosen.valid


def test_whitening_makes_the_scatter_within_classes_round():
    examples = clouds(4000, 5.0, 0)
    skewed = Examples(examples.vectors @ torch.tril(torch.full((6, 6), 0.7)), examples.classes)
    mapped = skewed.vectors @ within_class_whitening(skewed, shrinkage=0.0)
    for label in range(3):
        covariance = mapped[examples.classes == label].T.cov()
        torch.testing.assert_close(covariance, torch.eye(6), atol=0.15, rtol=0)


def test_the_rank_counts_directions_and_not_their_scale():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    vectors = clouds(5000, 0.0, 0).vectors[:, :3] @ basis[:3]
    assert effective_rank(vectors) == pytest.approx(3, abs=0.02)
    assert effective_rank(100 * vectors + 7) == pytest.approx(effective_rank(vectors), rel=1e-4)
    assert effective_rank(vectors[:, :1] * basis[:1]) == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------- hidden states


def test_means_of_parts_are_those_of_the_utterance_alone():
    generator = torch.Generator().manual_seed(0)
    hidden, lengths = torch.randn(2, 3, 11, 5, generator=generator), torch.tensor([11, 8, 3])
    hidden[:, 1, 8:], hidden[:, 2, 3:] = 1e3, 1e3
    found = part_means(hidden, lengths, 4)
    torch.testing.assert_close(found[:, 1], hidden[:, 1, :8].unflatten(1, (4, 2)).mean(2))
    # three frames for four parts: the first has none, and the mean of all instead
    own = hidden[:, 2, :3]
    torch.testing.assert_close(found[:, 2], torch.stack([own[:, 0], own[:, 1], own[:, 2], own.mean(1)], 1))
    for number, length in enumerate(lengths.tolist()):
        alone = part_means(hidden[:, number : number + 1, :length], torch.tensor([length]), 4)
        torch.testing.assert_close(found[:, number : number + 1], alone)


@pytest.fixture
def noise(tmp_path):
    """Rows of noise of different lengths."""
    rows = {}
    for number, seconds in enumerate((1.0, 2.5, 0.7)):
        wave = 0.1 * np.random.default_rng(number).standard_normal(round(seconds * 16000))
        soundfile.write(tmp_path / f"{number}.wav", wave, 16000)
        rows[str(number)] = {"wav": str(tmp_path / f"{number}.wav"), "duration": str(seconds)}
    return rows


def test_frames_are_those_at_the_times_given_and_centred_within_their_utterance(noise):
    encoder = TaskEncoder("fbank").eval()
    times = {name: (torch.tensor([0.02, 0.3]), torch.tensor([int(name), 7])) for name in noise}
    frames = encode_frames(encoder, noise, times, 16000, CPU)
    assert sorted(frames.classes.tolist()) == [0, 1, 2, 7, 7, 7]
    for name, row in noise.items():
        wave = torch.from_numpy(soundfile.read(row["wav"], dtype="float32")[0])[None]
        alone = encoder(wave)[0][0, 0]
        place = frames.classes.tolist().index(int(name))
        torch.testing.assert_close(frames.states[0, place : place + 2], alone[[0, 7]], atol=2e-4, rtol=1e-4)
        normal = (alone - alone.mean(0)) / alone.std(0, correction=0)
        torch.testing.assert_close(frames.centred[0, place : place + 2], normal[[0, 7]], atol=2e-3, rtol=1e-3)
    less = encode_frames(encoder, noise, times, 16000, CPU, keep_states=False)
    assert less.states is None and torch.equal(less.centred, frames.centred) and less.between == frames.between
    whole = encode_parts(encoder, noise, 16000, CPU)
    assert whole.keys() == noise.keys() and whole["1"].shape == (1, 4, 320)


def test_the_share_between_utterances_is_that_of_their_means_in_all_variance(monkeypatch):
    """Utterances about 0, 3 and 6, and with them a variance of 6; within them it is 4, or 1 in the second state."""
    lengths, batches = {"a": 4, "b": 2, "c": 6}, []
    for names, longest in (("ab", 5), ("c", 6)):
        hidden = torch.full((2, len(names), longest, 2), 99.0)  # as padding
        for row, name in enumerate(names):
            signs = torch.tensor([1.0, -1.0]).repeat(lengths[name] // 2)
            for state, deviation in enumerate((2.0, 1.0)):
                hidden[state, row, : lengths[name], 0] = 3.0 * "abc".index(name) + deviation * signs
                hidden[state, row, : lengths[name], 1] = 7.0
        batches.append((list(names), hidden, torch.tensor([lengths[name] for name in names])))
    monkeypatch.setattr("speechbrain_bestrq.evidence.hidden.encode_rows", lambda *_: batches)
    times = {name: (torch.tensor([0.1]), torch.tensor([0])) for name in lengths}
    frames = encode_frames(None, {name: {"duration": "1.0"} for name in lengths}, times, 16000, CPU)
    assert frames.between == pytest.approx([6 / (6 + 4), 6 / (6 + 1)])


# ---------------------------------------------------------------- alignment


def tones(folder, count, seed=0):
    """Utterances that say each letter by a tone of its own; of each, who says what from when to when."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    rows, truth = {}, {}
    for number in range(count):
        letters = [("ABDGO")[place] for place in generator.integers(5, size=generator.integers(4, 8))]
        pieces, marks, now = [np.zeros(2400)], [], 0.15
        for letter in letters:
            seconds = generator.uniform(0.1, 0.3)
            pitch = 250 * 1.8 ** "ABDGO".index(letter)
            pieces.append(0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 16000)) / 16000))
            marks.append((now, now + seconds, letter))
            pieces.append(np.zeros(1600))
            now += seconds + 0.1
        wave = np.concatenate(pieces) + 0.003 * generator.standard_normal(sum(map(len, pieces)))
        name = f"u{number}"
        soundfile.write(folder / f"{name}.wav", wave, 16000)
        rows[name] = {"wav": str(folder / f"{name}.wav"), "duration": str(len(wave) / 16000), "wrd": "".join(letters)}
        truth[name] = marks
    return rows, truth


def test_characters_are_found_where_they_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "EPOCHS", 15)
    monkeypatch.setattr(alignment, "BATCH_SECONDS", 10.0)
    rows, truth = tones(tmp_path / "tones", 80)
    rows["short"] = {**rows["u0"], "duration": "0.1"}  # fewer frames than letters
    aligner = Aligner(rows, 16000, CPU)
    found = aligner.align(rows)
    assert found.keys() == truth.keys()
    right = total = 0
    for name, (times, units) in found.items():
        for second, unit in zip(times.tolist(), units.tolist(), strict=True):
            letter = aligner.tokenizer.labels[unit]
            # within a frame of the tone, which a frame's centre may miss
            right += any(start - 0.06 <= second <= end + 0.06 and letter == one for start, end, one in truth[name])
            total += 1
    assert total > 8 * len(rows) and right / total > 0.9


def test_only_frames_near_a_character_have_it():
    times, units = spread(torch.tensor([0, 3, 0, 0, 0, 0, 0, 0, 4]), 0.02, reach=0.04)
    assert units.tolist() == [3, 3, 3, 3, 4, 4, 4]
    torch.testing.assert_close(times, torch.tensor([0.01, 0.03, 0.05, 0.07, 0.13, 0.15, 0.17]))


# ---------------------------------------------------------------- sources


@pytest.fixture
def run(make_speech_encoder, tmp_path):
    """A pre-training that left two encoders, the last of them under two names."""
    for name, step, seed in (("encoder@5", 5, 1), ("encoder@10", 10, 2), ("encoder", 10, 2)):
        facts = {"model": "BestRQ", "corpus": "Noise", "step": step, "audio_hours": step / 4, "device_hours": step / 50}
        model = make_speech_encoder(normalize="global", num_layers=1, seed=seed)
        save_encoder(model, tmp_path / "bestrq" / name, "# Card", **facts)
    return tmp_path / "bestrq"


def test_each_update_is_a_source_once_between_the_untrained_and_none(run):
    sources = find_sources([run], 2)
    assert [(one.run, one.updates, one.seed) for one in sources] == [
        ("fbank", 0, None),
        ("BEST-RQ", 0, 1),
        ("BEST-RQ", 0, 2),
        ("BEST-RQ", 5, None),
        ("BEST-RQ", 10, None),
    ]
    assert sources[3].audio_hours == 1.25 and sources[4].device_hours == 0.2
    assert len({one.mark for one in sources}) == 5
    with pytest.raises(InputError, match="holds no encoder yet: give the output folder of a pre-training"):
        find_sources([run.parent], 1)


def test_a_reproduction_may_have_pre_trainings_of_several_seeds(run):
    folder = run.parent / "reproduction"
    for seed in ("1", "2"):
        shutil.copytree(run, folder / "pretraining" / "bestrq" / seed)
    (folder / "plan.json").write_text("{}")
    sources = find_sources([folder], 2)
    assert {one.run for one in sources} == {"fbank", "BEST-RQ 1", "BEST-RQ 2"}
    # the same weights twice would count as two
    assert [one.seed for one in sources if one.seed is not None] == [1, 2, 3, 4]


def record(run, seed, updates, **tests):
    """A source of one hidden state; validation as the test."""
    measures = {name: [[value, value]] for name, value in tests.items()}
    return {
        "run": run,
        "seed": seed,
        "updates": updates,
        "audio_hours": updates / 100,
        "device_hours": 0.0,
        "measures": measures,
    }


def test_the_gain_of_several_pre_trainings_is_their_mean_less_that_of_the_untrained(tmp_path):
    sources = [record("fbank", None, 0, intents_5=0.2, speakers=0.15)]
    for run, intents, speakers in (("BEST-RQ 1", 0.31, 0.10), ("BEST-RQ 2", 0.33, 0.12)):
        number = int(run[-1])
        sources.append(record(run, number, 0, intents_5=0.2 + number / 100, speakers=0.13 + number / 100))
        sources.append(record(run, None, 400, intents_5=intents, speakers=speakers))
        if number == 1:  # the other is not so far yet
            sources.append(record(run, None, 800, intents_5=0.9, speakers=0.01))
    for number, intents, speakers in ((1, 0.22, 0.2), (2, 0.24, 0.22)):
        sources.append(record(f"wav2vec 2.0 {number}", None, 90, intents_5=intents, speakers=speakers))
    sources.append(record("wav2vec 2.0 1", 9, 0, intents_5=0.5, speakers=0.5))  # one says nothing
    found = {
        "sources": sources,
        "corpora": {"slurp": "Commands"},
        "hours": 0.5,
        "chances": {},
        "provenance": {"versions": {}, "device": "cpu", "commit": None},
    }
    text = write_evidence(found, tmp_path)["markdown"].read_text()
    table = text.split("## What pre-training adds")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| BEST-RQ")]
    # 32 - 21.5 and 14.5 - 11 points; Welch's degrees of freedom
    error = math.sqrt(0.02**2 / 2 / 2 + 0.01**2 / 2 / 2)
    freedom = error**4 / ((0.02**2 / 4) ** 2 + (0.01**2 / 4) ** 2)
    half = 100 * error * scipy.stats.t.ppf(0.975, freedom)
    cells = [f"{gain:+.1f} ({gain - half:+.1f} to {gain + half:+.1f})" for gain in (10.5, 3.5)]
    told = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert told[0][0] == "BEST-RQ, 4.0 h, 2 pre-trainings, 2 untrained" and set(told[0][1:]) == set(cells)
    # 32 - 23 and 21 - 11 points, deviations alike: two degrees of freedom
    half = 100 * math.sqrt(2 * (0.02**2 / 2) / 2) * scipy.stats.t.ppf(0.975, 2)
    cells = [f"{gain:+.1f} ({gain - half:+.1f} to {gain + half:+.1f})" for gain in (9, 10)]
    title = "BEST-RQ, 4.0 h, 2 pre-trainings, ahead of wav2vec 2.0, 0.9 h, 2 pre-trainings"
    assert len(told) == 2 and told[1][0] == title and set(told[1][1:]) == set(cells)
    assert "| wav2vec 2.0" not in table


def test_two_updates_of_nearly_as_many_hours_have_a_row_each(tmp_path):
    found = {
        "sources": [record("BEST-RQ", None, updates, intents_5=updates / 1e4) for updates in (7198, 7200)],
        "corpora": {},
        "hours": 0.5,
        "chances": {},
        "provenance": {"versions": {}, "device": "cpu", "commit": None},
    }
    text = write_evidence(found, tmp_path)["markdown"].read_text()
    assert "| BEST-RQ, 72.0 h | 72.0 |" in text and "| BEST-RQ, 72.0 h (update 7,200) | 72.0 |" in text


def test_what_no_example_was_drawn_of_counts_as_wrong():
    rows = {"a": {"scenario": "music"}, "b": {"scenario": "alarm"}, "c": {"scenario": "news"}}
    parts = {name: torch.eye(3)[[number]][None] for number, name in enumerate(rows)}
    examples = measures._examples(parts, rows, 0, "scenario", {"alarm": 0, "music": 1})
    assert examples.classes.tolist() == [1, 0, -1]
    trained = measures.Examples(examples.vectors[:2], examples.classes[:2])
    assert linear_probe(trained, trained, examples, 2).test == pytest.approx(2 / 3)


def test_a_score_of_no_single_state_is_in_no_table_of_states(tmp_path):
    found = {
        "sources": [record("BEST-RQ", None, 400, emotions=0.7, intents_5=0.4)],
        "corpora": {},
        "hours": 0.5,
        "version": 5,
        "chances": {"emotions": 0.4, "speakers_whitened_few": 0.5},
        "provenance": {"versions": {}, "device": "cpu", "commit": None},
    }
    files = write_evidence(found, tmp_path)
    text = files["markdown"].read_text()
    assert "## By hidden state: intents, 5 examples a class" in text and "## By hidden state: emotions" not in text
    assert "few examples of intents are drawn of all" in text
    assert "all labels: 40.0 %" in text and "whitened" not in text  # which was not measured
    with open(files["csv"], newline="") as file:
        assert {row["measure"]: row["state"] for row in csv.DictReader(file)} == {"emotions": "", "intents_5": "0"}


def test_one_pre_training_of_a_method_says_nothing_of_gains(tmp_path):
    sources = [record("BEST-RQ", 1, 0, intents_5=0.2), record("BEST-RQ", 2, 0, intents_5=0.3)]
    found = {
        "sources": [*sources, record("BEST-RQ", None, 400, intents_5=0.4)],
        "corpora": {},
        "hours": 0.5,
        "chances": {},
        "provenance": {"versions": {}, "device": "cpu", "commit": None},
    }
    assert "What pre-training adds" not in write_evidence(found, tmp_path)["markdown"].read_text()


def test_two_runs_of_one_method_are_told_apart(run):
    other = run.parent / "other" / "bestrq"
    other.parent.mkdir()
    run.rename(run.parent / "first")
    (run.parent / "first").rename(other)
    again = run.parent / "more" / "bestrq"
    again.parent.mkdir()
    again.symlink_to(other)
    names = {one.run for one in find_sources([other, again], 0)}
    assert names == {"fbank", "other/BEST-RQ", "more/BEST-RQ"}
    with pytest.raises(InputError, match="is named twice"):
        find_sources([other, other], 0)


def test_runs_of_one_name_are_told_apart_by_the_folders_above(run):
    runs = []
    for place, seeds in (("old/results", ("1", "2")), ("new/results", ("1", "3"))):
        for seed in seeds:
            runs.append(run.parent / place / "bestrq" / seed)
            runs[-1].parent.mkdir(parents=True, exist_ok=True)
            runs[-1].symlink_to(run)
    names = {one.run for one in find_sources(runs, 1)} - {"fbank"}
    # the seeds of a folder stay together, for the gains
    assert names == {
        *("old/results/BEST-RQ 1", "old/results/BEST-RQ 2"),
        *("new/results/BEST-RQ 1", "new/results/BEST-RQ 3"),
    }


def test_folders_whose_names_become_the_same_are_told_apart(run):
    other = run.parent / "other"
    other.mkdir()
    for name in ("bestrq", "BEST-RQ"):
        (other / name).symlink_to(run)
    names = {one.run for one in find_sources([other / "bestrq", other / "BEST-RQ"], 0)}
    assert names == {"fbank", str(other / "bestrq"), str(other / "BEST-RQ")}


def test_of_a_reproduction_what_was_moved_aside_or_has_no_encoder_yet_is_passed_over(run):
    reproduction = run.parent / "reproduction"
    (reproduction / "pretraining" / "wav2vec2").mkdir(parents=True)
    (reproduction / "plan.json").write_text("{}")
    for name in ("bestrq", "bestrq.before1"):
        (reproduction / "pretraining" / name).symlink_to(run)
    for name in ("encoder@5.writing", "encoder@10.replaced"):  # of a run that is saving
        shutil.copytree(run / "encoder@5", run / name)
    assert {one.name for one in find_sources([run], 0)} == {"fbank", f"{run}/encoder@5", f"{run}/encoder"}
    assert {one.run for one in find_sources([reproduction], 0)} == {"fbank", "BEST-RQ"}


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A few minutes of synthetic speech in each layout."""
    folder = tmp_path_factory.mktemp("corpora")
    for layout, hours, speakers in (("librispeech", 0.03, 9), ("voxceleb", 0.03, 16), ("slurp", 0.02, 12)):
        make_synthetic(folder / layout, layout, hours=hours, speakers=speakers)
    make_synthetic(folder / "iemocap", "iemocap", hours=0.03)
    return {layout: folder / layout for layout in CORPORA}


@pytest.mark.slow
def test_the_command_measures_everything_once(run, corpora, capsys, monkeypatch):
    monkeypatch.setattr(alignment, "EPOCHS", 2)
    monkeypatch.setattr(measures, "FEW_SPEAKERS", 3)
    words = ["report", "--evidence", str(run), "--untrained", "1", "--hours", "0.06"]
    words += [word for name, folder in corpora.items() for word in (f"--{name}", str(folder))]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    for title in ("filter banks", "BEST-RQ, untrained", "BEST-RQ, 1.2 h", "BEST-RQ, 2.5 h"):
        assert f"| {title} |" in printed
    assert "not run" not in printed
    found = json.loads((run / "evidence" / "evidence.json").read_text())
    described = {"rank", "scale", "between", "emotions_of_states"}
    assert found["chances"].keys() | described == MEASURES.keys()
    for record in found["sources"]:
        states = 1 if record["run"] == "fbank" else 2
        assert record["measures"].keys() == MEASURES.keys()
        for name, scores in record["measures"].items():
            # of the emotions one score alone: which state is read is the fold's own choice
            assert len(scores) == (1 if name in ("emotions", "emotions_few") else states)
            assert not MEASURES[name].is_share or all(0 <= value <= 1 for score in scores for value in score)
    # synthetic voices differ in pitch and room, which filter banks show
    assert best_score(found["sources"][0], "speakers") < 0.4
    with open(run / "evidence" / "evidence.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(MEASURES) * (1 + 3 * 2) - 2 * 3
    assert str(run) not in (run / "evidence" / "evidence.json").read_text()
    # nothing is encoded a second time, but what changed
    monkeypatch.setattr(evidence, "_measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(alignment, "Aligner", lambda *_: pytest.fail("aligned again"))
    assert cli.main(words) == 0
    assert capsys.readouterr().out == printed
    (aligned,) = run.rglob("alignment-*.pt")
    kept = aligned.read_bytes()
    torch.save(dict(reversed(torch.load(aligned).items())), aligned)  # as another device's would be, of other times
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        cli.main(words)
    aligned.write_bytes(kept)
    weights = run / "encoder@5" / "model.safetensors"
    weights.write_bytes((run / "encoder" / "model.safetensors").read_bytes())
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        cli.main(words)


def test_few_labels_of_speakers_and_emotions_are_draws_whose_mean_counts(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "FEW_SPEAKERS", 3)
    monkeypatch.setattr(measures, "FEW_TURNS", 2)
    encoder = TaskEncoder("fbank").eval()
    corpus = CORPORA["voxceleb"](corpora["voxceleb"], tmp_path / "speakers", 0.5, CPU)
    found = corpus.measure(encoder, CPU)
    train, test = (read_manifest(corpus.manifests[name]) for name in ("train", "test"))
    trials = next(iter(read_trials(corpus.manifests["trials"]).values()))
    means = {
        name: one[0].mean(0) for rows in (train, test) for name, one in encode_parts(encoder, rows, 16000, CPU).items()
    }
    rates = []
    train = take_examples(train, "spk_id", measures.UTTERANCES_OF_SPEAKER)
    for drawn in (train, *(take_classes(train, "spk_id", 3, seed) for seed in range(measures.DRAWS))):
        speakers = [row["spk_id"] for row in drawn.values()]
        vectors = torch.stack([means[name] for name in drawn])
        classes = torch.tensor([sorted(set(speakers)).index(one) for one in speakers])
        mapped = (torch.stack([means[name] for name in test]) - vectors.mean(0)) @ within_class_whitening(
            Examples(vectors, classes)
        )
        scores = SpeakerEmbeddings(list(test), mapped).score(trials)
        rates.append(equal_error_rate(scores, [trial[0] for trial in trials]))
    assert len(set(rates)) > 2
    assert found["speakers_whitened"][0].test == pytest.approx(rates[0])
    assert found["speakers_whitened_few"][0].test == pytest.approx(statistics.fmean(rates[1:]))

    counts = []

    def probe(train, *others):
        counts.append(torch.bincount(train.classes).tolist())
        return linear_probe(train, *others, penalties=(0.1,))

    monkeypatch.setattr(measures, "linear_probe", probe)
    corpus = CORPORA["iemocap"](corpora["iemocap"], tmp_path / "emotions", 0.5, CPU)
    found = corpus.measure(encoder, CPU)
    folds = len(measures.FOLDS["speaker"])
    assert [max(one) for one in counts[: folds * measures.DRAWS]] == folds * measures.DRAWS * [2]
    assert len(counts) == folds * (measures.DRAWS + 1) and min(map(sum, counts[-folds:])) > 8
    assert found.keys() == {"emotions_few", "emotions", "emotions_of_states"}
    assert found["emotions_of_states"] == [found["emotions"][0]]  # of filter banks, which are one state


def test_what_all_utterances_share_hides_speakers_from_plain_cosines_alone(corpora, tmp_path, monkeypatch):
    corpus = CORPORA["voxceleb"](corpora["voxceleb"], tmp_path, 0.5, CPU)
    generator = torch.Generator().manual_seed(0)

    def parts(encoder, rows, *_):
        """A dimension of noise that all but drowns the others, and one in which all are the same."""
        found = {}
        for name, row in rows.items():
            speaker = torch.randn(6, generator=torch.Generator().manual_seed(int(row["spk_id"][2:])))
            noise = torch.randn(PARTS, 2, generator=generator)
            found[name] = torch.cat([speaker.expand(PARTS, -1), 50 * noise[:, :1], 0 * noise[:, 1:] + 500], 1)[None]
        return found

    monkeypatch.setattr(measures, "encode_parts", parts)
    found = corpus.measure(SimpleNamespace(num_states=1), CPU)
    plain, standardised = (found[name][0].test for name in ("speakers", "speakers_standardised"))
    assert standardised < 0.2 < plain


def of_rows(corpus, rows, monkeypatch, hours=0.5):
    """A corpus whose training set these are."""
    monkeypatch.setattr(measures, "read_manifest", lambda _: rows)
    made = CORPORA[corpus].__new__(CORPORA[corpus])
    made.hours, made.manifests = hours, {name: None for name in ("train", "valid", "test")}
    return made


def test_speakers_to_whiten_by_have_several_utterances_each_however_many_there_are(monkeypatch):
    rows = {f"{n}": {"spk_id": f"s{n % 1000}", "duration": 5 + n % 7} for n in range(20_000)}
    drawn = of_rows("voxceleb", rows, monkeypatch)._trained_on()
    counts = Counter(row["spk_id"] for row in drawn.values())
    assert set(counts.values()) == {measures.UTTERANCES_OF_SPEAKER} and len(counts) > 2 * measures.FEW_SPEAKERS
    seconds = sum(row["duration"] for row in drawn.values())
    assert 1800 - 5 * 12 < seconds <= 1800


def test_of_one_utterance_each_no_whitening_is_measured(corpora, tmp_path, monkeypatch):
    corpus = CORPORA["voxceleb"](corpora["voxceleb"], tmp_path, 0.5, CPU)
    encoder = TaskEncoder("fbank").eval()
    trained_on = corpus._trained_on()
    alone = {row["spk_id"]: name for name, row in trained_on.items()}.values()
    always = {"speakers", "speakers_standardised"}
    for rows, measured in (
        (trained_on, {*always, "speakers_whitened"}),
        ({name: trained_on[name] for name in alone}, always),
    ):
        monkeypatch.setattr(corpus, "_trained_on", lambda rows=rows: rows)
        assert corpus.measure(encoder, CPU).keys() == measured  # not within 20 speakers, of whom there are fewer


def test_few_examples_of_a_class_are_drawn_of_all_labels(monkeypatch):
    """Of half an hour spread over speakers, rare classes have fewer."""
    rows = {f"{n}": {"scenario": "rare" if n % 100 == 0 else "common", "duration": 3.0} for n in range(5000)}
    corpus = of_rows("slurp", rows, monkeypatch)
    assert Counter(row["scenario"] for row in corpus.rows("train").values())["rare"] < 20
    parts = {name: torch.zeros(1, PARTS, 2) for name in rows}
    monkeypatch.setattr(measures, "encode_parts", lambda encoder, wanted, *_: {name: parts[name] for name in wanted})
    counts = []

    def probe(train, *_):
        counts.append(torch.bincount(train.classes, minlength=2).tolist())
        return measures.Score(0.0, 0.0)

    monkeypatch.setattr(measures, "linear_probe", probe)
    corpus.measure(TaskEncoder("fbank"), CPU)
    assert counts[: 2 * measures.DRAWS] == measures.DRAWS * [[5, 5]] + measures.DRAWS * [[20, 20]]
    assert sum(counts[-1]) == 600  # half an hour


@pytest.fixture
def probed(monkeypatch):
    """What probes are trained, validated and tested on, where utterances have their numbers as hidden states."""
    found = []

    def parts(encoder, rows, *_):
        return {name: torch.full((1, PARTS, 1), float(name)) for name in rows}

    def frames(encoder, rows, *_, **__):
        numbers = torch.tensor([float(name) for name in rows])[None, :, None]
        return Frames(numbers, numbers, torch.zeros(len(rows), dtype=torch.long), [0.5])

    def probe(*sets_and_classes):
        found.append([one.vectors[:, 0].int().tolist() for one in sets_and_classes[:3]])
        return measures.Score(0.25, 0.75)

    for name, stand_in in (("encode_parts", parts), ("encode_frames", frames), ("linear_probe", probe)):
        monkeypatch.setattr(measures, name, stand_in)
    return found


def numbered(numbers, **labels):
    """Utterances of a second."""
    return {str(number): {"spk_id": f"s{number}", "duration": 1.0, **labels} for number in numbers}


def test_probes_of_intents_and_characters_choose_on_the_validation_set_and_are_tested_on_the_test_set(
    probed, monkeypatch
):
    sets = {
        name: numbered(own, scenario="music")
        for name, own in (("train", range(4)), ("valid", range(4, 6)), ("test", range(6, 9)))
    }
    intents = of_rows("slurp", None, monkeypatch)
    intents.manifests = {name: name for name in sets}
    monkeypatch.setattr(measures, "read_manifest", sets.get)
    found = intents.measure(SimpleNamespace(num_states=1), CPU)
    assert probed == (2 * measures.DRAWS + 1) * [[[0, 1, 2, 3], [4, 5], [6, 7, 8]]]
    assert set(map(tuple, found.values())) == {((0.25, 0.75),)}

    probed.clear()
    characters = of_rows("librispeech", None, monkeypatch, hours=5 / 3600)
    characters.sets, characters.times = sets, sets
    found = characters.measure(SimpleNamespace(num_states=1), CPU)
    (few, *of_few), (every, *of_every) = probed
    assert len(few) == 2 and sorted(every) == [0, 1, 2, 3]
    assert of_few == of_every == [[4, 5], [6, 7, 8]]
    assert found["characters_few"] == found["characters_all"] == [(0.25, 0.75)]


def test_probes_of_emotions_choose_on_a_folds_validation_speaker_and_are_tested_on_its_own(probed, monkeypatch):
    folds = {"a": [[2, 3], [4], [0, 1]], "b": [[0, 1], [2, 3], [4]], "c": [[0, 1], [4], [2, 3]]}
    monkeypatch.setattr(measures, "FOLDS", {"speaker": tuple(folds)})
    sets = {"all": numbered(range(5), emo="sad")}
    for fold, sides in folds.items():
        sets |= {
            f"{fold}/{name}": numbered(own, emo="sad")
            for name, own in zip(("train", "valid", "test"), sides, strict=True)
        }
    emotions = of_rows("iemocap", None, monkeypatch)
    emotions.manifests = {name: name for name in sets}
    monkeypatch.setattr(measures, "read_manifest", sets.get)
    found = emotions.measure(SimpleNamespace(num_states=1), CPU)
    assert probed == [one for one in folds.values() for _ in range(measures.DRAWS)] + list(folds.values())
    assert set(map(tuple, found.values())) == {((0.25, 0.75),)}


def test_the_hidden_state_of_a_fold_is_chosen_on_the_validation_of_folds_that_share_no_speaker_with_it():
    """The first two validate on each other's test speaker: only the third may choose for them."""
    hits = torch.tensor(
        [
            [[8.0, 3.0], [9.0, 4.0], [1.0, 5.0]],
            [[7.0, 6.0], [6.0, 2.0], [2.0, 0.0]],
        ]
    )
    # state 1 for both, which the third has more right with in validation; for the third state 0, of 17 against 13
    assert chosen_apart(hits, [{"a", "b"}, {"b", "a"}, {"c", "d"}]).tolist() == [7 + 6 + 1, 6 + 2 + 5]


def test_corpora_that_are_not_given_are_left_out(run, corpora, tmp_path):
    sources = [Source("fbank", "fbank"), *find_sources([run], 0)[1:2]]
    found = gather(sources, {"slurp": corpora["slurp"]}, tmp_path / "out", 0.02, CPU)
    files = write_evidence(found, tmp_path / "out")
    text = files["markdown"].read_text()
    assert "intents, up to 1.2 minutes of labels" in text and "emotions" not in text
    assert files["curves"].read_bytes().startswith(b"\x89PNG")


def test_speech_too_little_to_draw_few_labels_of_is_refused_before_it_is_aligned(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "Aligner", lambda *_: pytest.fail("aligned"))
    message = r"--librispeech .* has \d+ s to train on, and 180 s are drawn .* give --hours 0\.0\d+, or more speech"
    with pytest.raises(InputError, match=message):
        measures.Characters(corpora["librispeech"], tmp_path, 0.5, CPU)


@pytest.mark.parametrize("seconds", [0.5, 1.7, 44.3, 100.0, 179.0])
def test_the_hours_that_are_advised_are_few_enough(seconds):
    rows = {"a": {"duration": seconds}}
    with pytest.raises(InputError) as refused:
        measures._check_few(rows, 0.5, "it")
    advised = re.search(r"--hours ([\d.]+),", str(refused.value))
    assert bool(advised) == (seconds > 1.8)
    if advised:
        measures._check_few(rows, float(advised[1]), "it")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "nothing to probe on: give --librispeech, --voxceleb"),
        (["--slurp", "/nowhere"], "--slurp /nowhere is no folder"),
        (["--slurp", ".", "--hours", "0"], "--hours is above 0"),
        (["--slurp", ".", "--publish", "out"], "--publish is for reproductions"),
    ],
)
def test_bad_input_is_one_line(run, capsys, words, message):
    assert cli.main(["report", "--evidence", str(run), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (run / "evidence").exists()


def test_several_folders_without_evidence_are_refused(run, capsys):
    assert cli.main(["report", str(run), str(run)]) == 2
    assert "give one, --evidence to compare" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--slurp", "."]) == 2
    assert "--slurp is for probing encoders: add --evidence, or leave it out" in capsys.readouterr().err
