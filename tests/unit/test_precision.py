"""Full precision begins and ends where it is asked for; the fast one is what the machine has."""

from contextlib import nullcontext

import pytest
import torch

from speechbrain_bestrq import precision
from speechbrain_bestrq.precision import full_precision, loading_for, native_precision
from speechbrain_bestrq.recipe import load_recipe

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def unchanged_settings():
    """Whatever a test sets ends with it, under both of PyTorch's names."""
    before = [backend.fp32_precision for backend in BACKENDS]
    before_under_old_name = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before_under_old_name)
    for backend, setting in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = setting


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


@pytest.mark.parametrize("allowed", [True, False])
def test_convolutions_on_a_gpu_are_full_inside_too_and_restored_under_both_names(allowed):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = allowed  # SpeechBrain does so
        with full_precision("cpu"):
            assert (cudnn.conv.fp32_precision, cudnn.allow_tf32) == ("ieee", False)
        assert cudnn.allow_tf32 == allowed and cudnn.conv.fp32_precision == ("tf32" if allowed else "none")
    finally:
        cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    "gpu, told, gpu_multiplies, vendor, avx512_bf16, amx, expected",
    [
        (True, None, True, "AuthenticAMD", False, False, "bf16"),
        (True, "cuda:0", True, "AuthenticAMD", False, False, "bf16"),
        (True, "cuda", False, "GenuineIntel", True, True, "fp32"),  # a V100 in a new machine
        (True, "cpu", True, "AuthenticAMD", False, False, "fp32"),
        (True, "cpu", False, "AuthenticAMD", True, False, "bf16"),
        (False, "cpu", None, "AuthenticAMD", True, False, "bf16"),
        (False, None, None, "AuthenticAMD", False, False, "fp32"),
        (False, None, None, "GenuineIntel", True, True, "bf16"),
        (False, None, None, "GenuineIntel", True, False, "fp32"),  # AMX hidden: bfloat16 at two thirds of the speed
    ],
)
def test_bfloat16_is_chosen_where_the_device_multiplies_in_it(
    monkeypatch, gpu, told, gpu_multiplies, vendor, avx512_bf16, amx, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_multiplies or including_emulation
    )
    monkeypatch.setattr(precision, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with nullcontext() if told is None else loading_for(told):
        assert native_precision() == expected


def test_a_recipe_asks_the_device_it_was_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("precision: !apply:speechbrain_bestrq.precision.native_precision\n")
    assert load_recipe([str(recipe), "--device", "cpu"])[3]["precision"] == "fp32"
    assert load_recipe([str(recipe)])[3]["precision"] == "bf16"
