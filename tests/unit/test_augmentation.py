"""Chunks that are silenced lie where the utterance is, and are as many and as long as was said."""

import pytest
import torch

from speechbrain_bestrq.augmentation import DropChunks


def test_chunks_are_as_many_and_as_long_as_said_and_within_the_utterance():
    torch.manual_seed(0)
    drop, counts = DropChunks(0, 3, 100, 200), set()
    wav_lens = torch.tensor([1.0, 0.5] * 100)
    dropped = drop(torch.ones(200, 20_000), wav_lens) == 0
    assert not dropped[1::2, 10_000:].any() and dropped[1::2, :10_000].any()
    places = torch.zeros(20_000)
    for row in dropped:
        edges = torch.nonzero(row[1:] ^ row[:-1]).flatten()
        counts.add((len(edges) + 1) // 2)
        for start, end in edges.view(-1, 2).tolist() if len(edges) % 2 == 0 else []:
            assert 100 <= end - start <= 600  # those that overlap
        places += row
    assert counts == {0, 1, 2, 3}
    assert 0.5 < float(dropped.sum(1).double().mean()) / (1.5 * 150) < 1.1
    assert places[:100].any() and places[19_800:].any()  # anywhere


def test_an_utterance_shorter_than_a_chunk_is_silenced_from_its_begin_and_the_same_draw_is_the_same():
    drop = DropChunks(1, 1, 500, 500)
    dropped = drop(torch.ones(2, 1000), torch.tensor([1.0, 0.1]))
    assert (dropped[1, :500] == 0).all() and int((dropped[0] == 0).sum()) == 500
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(DropChunks()(torch.ones(4, 30_000), torch.ones(4)))
    assert torch.equal(*draws)


@pytest.mark.parametrize("settings", [{"min_count": 6}, {"max_length": 10}, {"min_length": 0}])
def test_bounds_that_are_none_are_refused(settings):
    with pytest.raises(ValueError, match="the least must not be more than the most"):
        DropChunks(**settings)
