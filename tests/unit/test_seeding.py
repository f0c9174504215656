"""Properties of derived seeds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_bestrq.seeding import derive_seed, derived_generator

parts = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


@given(parts)
def test_a_seed_is_a_function_of_its_parts_and_fits_a_generator(values):
    seed = derive_seed(*values)
    assert seed == derive_seed(*values)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed


def test_every_part_counts_and_so_does_their_order():
    seeds = [
        derive_seed(run, rank, step, micro)
        for run in range(3)
        for rank in range(4)
        for step in range(50)
        for micro in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(7, 1) != derive_seed(7)


def test_seeds_are_well_distributed():
    ones = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in map(derive_seed, range(2000))])
    assert (ones.double().mean(0) - 0.5).abs().max() <= 0.06  # five standard deviations


def test_a_derived_generator_ignores_the_global_one_and_leaves_it_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = torch.randn(5, generator=derived_generator(3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(5, generator=derived_generator(3, 4)))
    assert not torch.equal(first, torch.randn(5, generator=derived_generator(3, 5)))
