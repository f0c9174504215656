"""Full precision begins and ends where it is asked for; the fast one is what the machine has."""

import pytest
import torch

from speechbrain_bestrq.precision import full_precision, native_precision

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def unchanged_settings():
    """Whatever a test sets ends with it, under both of PyTorch's names."""
    before = [backend.fp32_precision for backend in BACKENDS]
    before_under_old_name = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before_under_old_name)
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


def set_reduced():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def test_settings_are_full_inside_and_restored_after():
    set_reduced()
    with full_precision("cpu"):
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in BACKENDS] == ["tf32", "bf16"]


def test_settings_and_autocast_are_restored_after_an_exception():
    set_reduced()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError), full_precision("cpu"):
            assert not torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu")
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
    assert [backend.fp32_precision for backend in BACKENDS] == ["tf32", "bf16"]


def test_nesting_restores_the_outermost_settings():
    set_reduced()
    with full_precision("cpu"):
        with full_precision("cpu"):
            pass
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in BACKENDS] == ["tf32", "bf16"]


def test_products_inside_autocast_have_the_bits_of_those_outside():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    expected = a @ b
    set_reduced()
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision("cpu"):
        assert torch.equal(a @ b, expected)


def test_a_users_older_way_to_allow_reduced_products_still_reads_as_set():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision("cpu"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            # kernels that ask under the older name raise where the two disagree
            assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "gpu, gpu_multiplies, avx512_bf16, amx, expected",
    [
        (True, True, False, False, "bf16"),
        (True, False, True, True, "fp32"),  # a V100 in a new machine
        (False, None, True, False, "bf16"),
        (False, None, False, True, "bf16"),
        (False, None, False, False, "fp32"),
    ],
)
def test_bfloat16_is_chosen_where_the_machine_multiplies_in_it(
    monkeypatch, gpu, gpu_multiplies, avx512_bf16, amx, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_multiplies or including_emulation
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_precision() == expected
