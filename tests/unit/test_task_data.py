"""Which labelled utterances are drawn, and in which batches."""

import numpy as np
import pytest
import soundfile

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.task_data import (
    RandomChunks,
    TaskBatchSampler,
    make_dataset,
    make_task_loader,
    make_task_loaders,
    repeat_for_chunks,
    take_classes,
    take_examples,
    take_hours,
)

SECONDS = np.random.default_rng(0).uniform(0.5, 15.0, size=157)


def sampler(training=True, **options):
    return TaskBatchSampler(SECONDS, 40.0, training, **options)


@pytest.mark.parametrize("training", [True, False])
def test_an_epoch_has_each_utterance_once(training):
    assert sorted(sum(sampler(training), [])) == list(range(len(SECONDS)))


@pytest.mark.parametrize("training", [True, False])
def test_no_batch_is_longer_than_asked_when_padded(training):
    for batch in sampler(training):
        assert len(batch) * SECONDS[batch].max() <= 40.0
    assert all(len(batch) <= 3 for batch in sampler(training, max_batch_size=3))


def test_an_utterance_longer_than_a_batch_is_a_batch_of_its_own():
    batches = list(TaskBatchSampler([50.0, 1.0, 60.0, 1.0], 40.0, training=False))
    assert batches == [[2], [0], [1, 3]]


def test_batches_waste_little_on_padding():
    padded = sum(len(batch) * SECONDS[batch].max() for batch in sampler())
    assert SECONDS.sum() / padded > 0.85


def test_epochs_differ_and_an_epoch_is_a_function_of_its_number_and_the_seed():
    one, other = sampler(), sampler()
    assert list(one) == list(other)
    one.set_epoch(3)
    assert list(one) != list(other)
    other.set_epoch(3)
    assert list(one) == list(other)
    assert {tuple(sorted(batch)) for batch in one} != {tuple(sorted(batch)) for batch in sampler()}
    assert list(sampler(seed=1)) != list(sampler())


def test_evaluation_batches_are_the_same_whatever_epoch_seed_and_rank():
    one, other = sampler(False), sampler(False, seed=5, rank=1, world_size=2)
    other.set_epoch(7)
    assert list(one) == list(other)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_have_equally_many_batches_and_all_of_them_together(world_size):
    ranks = [list(sampler(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {index for batches in ranks for batch in batches for index in batch} == set(range(len(SECONDS)))
    assert sum(map(len, ranks)) - len(sampler()) < world_size


def test_more_ranks_than_batches_have_one_each():
    ranks = [list(TaskBatchSampler([1.0], 40.0, True, rank=rank, world_size=3)) for rank in range(3)]
    assert ranks == [[[0]]] * 3


def test_no_utterances_and_senseless_limits_are_refused():
    with pytest.raises(InputError, match="no utterances"):
        TaskBatchSampler([], 10.0, training=True)
    with pytest.raises(InputError, match="max_batch_seconds"):
        TaskBatchSampler([1.0], 0.0, training=True)
    with pytest.raises(InputError, match="max_batch_size"):
        TaskBatchSampler([1.0], 10.0, training=True, max_batch_size=-1)


def test_a_loader_pads_waveforms_of_any_rate(tmp_path):
    rows = {}
    for name, (seconds, rate) in {"a": (1.0, 16000), "b": (0.5, 8000)}.items():
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, np.full(round(seconds * rate), 0.5), rate)
        rows[name] = {"wav": str(path), "duration": seconds, "label": name.upper()}
    dataset = make_dataset(rows)
    dataset.set_output_keys(["id", "sig", "label"])
    (batch,) = make_task_loader(dataset, TaskBatchSampler([1.0, 0.5], 10.0, training=False))
    assert batch.id == ["a", "b"] and batch.label == ["A", "B"]
    assert batch.sig.data.shape == (2, 16000) and batch.sig.lengths.tolist() == [1.0, 0.5]
    assert batch.sig.data[1, 8000:].eq(0).all() and batch.sig.data[1, 1000:7000].sub(0.5).abs().max() < 0.01


ROWS = {
    f"{speaker}-{n}": {"duration": 10.0 + n, "spk_id": speaker, "kind": "rare" if n == 0 else "common"}
    for speaker in "abcd"
    for n in range(20)
}


def test_hours_are_drawn_evenly_from_the_speakers_up_to_the_limit():
    taken = take_hours(ROWS, 0.1)
    total = sum(row["duration"] for row in taken.values())
    assert 330 < total <= 360
    counts = [sum(row["spk_id"] == speaker for row in taken.values()) for speaker in "abcd"]
    assert max(counts) - min(counts) <= 1
    assert list(taken) == [name for name in ROWS if name in taken]


def test_who_is_not_known_is_not_one_speaker():
    rows = {str(n): {"duration": 36.0, "spk_id": "" if n < 90 else str(n)} for n in range(100)}
    unknown = sum(not rows[name]["spk_id"] for name in take_hours(rows, 0.2))
    assert unknown > 10


def test_a_larger_draw_of_the_same_seed_holds_the_smaller():
    assert take_hours(ROWS, 0.05).keys() < take_hours(ROWS, 0.2).keys()
    assert take_hours(ROWS, 0.05).keys() != take_hours(ROWS, 0.05, seed=1).keys()
    assert take_examples(ROWS, "kind", 2).keys() < take_examples(ROWS, "kind", 5).keys()


def test_examples_are_so_many_of_each_class_or_all_there_are():
    taken = take_examples(ROWS, "kind", 7)
    kinds = [row["kind"] for row in taken.values()]
    assert kinds.count("rare") == 4 and kinds.count("common") == 7


def test_nothing_asked_is_everything():
    assert take_hours(ROWS, None) == ROWS and take_examples(ROWS, "kind", None) == ROWS


@pytest.mark.parametrize("hours", [0.0, -1.0, 100.0, 0.0001])
def test_hours_that_cannot_be_drawn_are_refused(hours):
    with pytest.raises(InputError, match="hours"):
        take_hours(ROWS, hours)


def test_a_count_of_examples_below_one_is_refused():
    with pytest.raises(InputError, match="above 0"):
        take_examples(ROWS, "kind", 0)


def test_classes_are_drawn_whole_by_the_seed_and_a_larger_draw_holds_a_smaller_one():
    rows = {str(n): {"spk_id": f"speaker{n % 10}"} for n in range(53)}
    taken = take_classes(rows, "spk_id", 4, seed=1)
    speakers = {row["spk_id"] for row in taken.values()}
    assert len(speakers) == 4
    assert taken == {name: row for name, row in rows.items() if row["spk_id"] in speakers}
    assert taken.keys() < take_classes(rows, "spk_id", 7, seed=1).keys()
    assert taken.keys() != take_classes(rows, "spk_id", 4, seed=2).keys()
    assert take_classes(rows, "spk_id", None) == rows


@pytest.mark.parametrize("count", [1, 11, 2.5, "all"])
def test_classes_that_cannot_be_drawn_are_refused(count):
    rows = {str(n): {"spk_id": f"speaker{n % 10}"} for n in range(53)}
    with pytest.raises(InputError, match="whole number from 2 to 10"):
        take_classes(rows, "spk_id", count)


@pytest.fixture
def ramps(tmp_path):
    """Rows of utterances whose samples say where they are, of 0.3 to 3 s."""
    rows = {}
    for number, seconds in enumerate((0.3, 1.0, 3.0, 3.0)):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, np.arange(round(16000 * seconds)) / 2**16, 16000, subtype="FLOAT")
        rows[str(number)] = {"wav": str(path), "duration": seconds}
    return rows


HPARAMS = {
    "sample_rate": 16000,
    "seed": 1,
    "num_workers": 0,
    "max_batch_seconds": 2.0,
    "max_batch_size": 8,
    "max_eval_batch_seconds": 9.0,
}


def starts(loader, epoch):
    """First and last sample of each utterance in an epoch, as numbers of the file."""
    loader.batch_sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        wavs, lengths = batch.sig
        for name, wav, length in zip(batch.id, wavs, lengths, strict=True):
            wav = (2**16 * wav[: round(float(length) * wavs.shape[1])]).round().int()
            assert (wav.diff() == 1).all()
            found[name] = (int(wav[0]), int(wav[-1]))
    return found


def test_training_hears_a_chunk_of_each_utterance_and_validation_the_whole(ramps):
    loaders = make_task_loaders({**HPARAMS, "chunk_seconds": 0.5}, {"train": ramps, "valid": ramps}, [], [])
    heard = starts(loaders["train"], 1)
    assert heard["0"] == (0, 4799)
    assert all(last - first == 7999 for name, (first, last) in heard.items() if name != "0")
    assert starts(loaders["valid"], 1) == {"0": (0, 4799), "1": (0, 15999), "2": (0, 47999), "3": (0, 47999)}
    for batch in loaders["train"].batch_sampler:
        assert len(batch) <= 4


def test_a_chunk_is_a_function_of_seed_epoch_and_name_whoever_reads_it(ramps):
    def heard(epoch, **options):
        settings = {**HPARAMS, "chunk_seconds": 0.5, **options}
        return starts(make_task_loaders(settings, {"train": ramps}, [], [])["train"], epoch)

    assert heard(1) == heard(1) == heard(1, max_batch_seconds=0.5)
    assert heard(1)["2"] != heard(1)["3"]
    for other in (heard(2), heard(1, seed=2)):
        assert all(other[name] != heard(1)[name] for name in "123")
    assert heard(2, num_workers=1) == heard(2)


def test_chunks_come_from_all_over_the_utterance():
    sampler = TaskBatchSampler([1.0], 9.0, True)
    chunks = RandomChunks(sampler, 3 / 16000)
    drawn = []
    for epoch in range(300):
        sampler.set_epoch(epoch)
        drawn.append(chunks("a", 10))
    assert {start for start, _ in drawn} == set(range(8)) and {samples for _, samples in drawn} == {3}
    counts = np.bincount([start for start, _ in drawn])
    assert counts.min() > 15 and counts.max() < 70


def test_an_utterance_is_listed_for_each_chunk_that_goes_into_it():
    rows = {"a": {"duration": 9.0, "wav": "a"}, "b": {"duration": 0.5, "wav": "b"}, "c": {"duration": 5.9, "wav": "c"}}
    repeated = repeat_for_chunks(rows, 3.0)
    assert [row["wav"] for row in repeated.values()] == ["a", "a", "a", "b", "c"]
    assert len(repeated) == 5


@pytest.mark.parametrize(("seconds", "hidden", "message"), [(3.0, {}, "cache_features"), (0.0, None, "above 0")])
def test_chunks_of_nothing_and_of_cached_states_are_refused(seconds, hidden, message, ramps):
    with pytest.raises(InputError, match=message):
        make_task_loaders({**HPARAMS, "chunk_seconds": seconds}, {"train": ramps}, [], [], hidden)
