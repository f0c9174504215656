"""What the options of a recipe's command line become."""

import contextlib

import pytest
import torch

from speechbrain_bestrq import cli, machine, recipe
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.recipe import load_recipe, quote_paths

YAML = """
data_folder: !PLACEHOLDER
output_folder: results
save_folder: !ref <output_folder>/save
language_model: null
encoder: !new:torch.nn.Linear
    in_features: 2
    out_features: 3
"""


@pytest.fixture
def options(tmp_path):
    """Return a function that gives what a YAML's keys become."""
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML, encoding="utf-8")
    return lambda *words: load_recipe([str(path), *words])[3]


@pytest.mark.parametrize(
    "path",
    ["/data/Tape #1", "2024", "2024-05-17", "no", "/a: b", "1e5", "0o17", "/d/\U0001f600 #1", "/plain/ü", "it's"],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_path_stays_what_was_typed(options, path, joined):
    words = [f"--data_folder={path}"] if joined else ["--data_folder", path]
    assert options(*words)["data_folder"] == path
    assert options("--data_folder=a", "--output_folder", path)["save_folder"] == f"{path}/save"


def test_what_has_no_key_of_its_own_is_given_within_its_object(options):
    encoder = options("--data_folder=a", "--encoder={out_features: 5, bias: False}")["encoder"]
    assert encoder.weight.shape == (5, 2) and encoder.bias is None


def test_what_is_no_path_is_left_alone(options):
    found = options("--data_folder", "a", "--language_model", "null", "--encoder", "{out_features: 5}")
    assert found["language_model"] is None and found["encoder"].out_features == 5
    given = ["--data_folder", "--seed", "1", "--extra_folders=[/a, /b]", "--data_folder='x y'"]
    assert quote_paths(given) == given


@pytest.mark.parametrize(("path", "message"), [("/a=b", "with an equals sign"), ("(old)", r"write \./\(old\)")])
def test_paths_that_cannot_be_given_are_refused(path, message):
    with pytest.raises(InputError, match=message):
        quote_paths(["--data_folder", path])
    with pytest.raises(InputError, match=message):
        quote_paths([f"--data_folder={path}"])


def test_the_home_folder_is_meant_however_it_is_typed(options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = options("--data_folder=~/Tape #1", "--output_folder", "~/runs")
    assert found["data_folder"] == f"{tmp_path}/Tape #1" and found["save_folder"] == f"{tmp_path}/runs/save"
    assert quote_paths(["--encoder", "random:~/run", "--seed", "~/1"])[1::2] == [f"random:{tmp_path}/run", "~/1"]
    yaml = tmp_path / "recipe.yaml"
    yaml.write_text(YAML.replace("results", "~/results"))
    with pytest.raises(InputError, match="output_folder ~/results: write the path in full"):
        load_recipe([str(yaml), "--data_folder=a"])


def test_a_debugging_run_is_refused_which_would_write_over_a_real_one(options):
    with pytest.raises(InputError, match="--debug would write into the output folder"):
        options("--data_folder=a", "--debug")


def test_several_gpus_are_started_by_torchrun_alone(options):
    with pytest.raises(InputError, match="--data_parallel_backend is not for these recipes: .* by torchrun"):
        options("--data_folder=a", "--data_parallel_backend")


def test_fp16_without_a_gpu_is_refused_before_any_work(options, tmp_path):
    for words in (
        ["--precision=fp16"],
        ["--eval_precision", "fp16"],
        ["--auto_mix_prec"],
        ["--device=cpu", "--precision=fp16"],
    ):
        with pytest.raises(InputError, match="fp16 is for GPUs: give --precision bf16 or fp32"):
            options("--data_folder=a", *words)
    yaml = tmp_path / "recipe.yaml"
    yaml.write_text(f"{YAML}\nprecision: fp16\n")
    with pytest.raises(InputError, match="fp16 is for GPUs"):
        load_recipe([str(yaml), "--data_folder=a"])


def test_under_torchrun_a_rank_takes_no_gpu_of_another(options, monkeypatch):
    """SpeechBrain takes "cuda" for the first GPU, and NCCL's groups then wait for each other."""
    joined = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(recipe.sb.utils.distributed, "ddp_init_group", lambda _: joined.append(1))
    monkeypatch.setattr(recipe, "loading_for", lambda _: contextlib.nullcontext())
    options("--data_folder=a", "--device=cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    options("--data_folder=a", "--device=cuda:1")  # one rank, on the second GPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options("--data_folder=a", "--device=cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(InputError, match=f"--device {device} under torchrun would give rank 1 a GPU .*: leave"):
            options("--data_folder=a", f"--device={device}")
    assert len(joined) == 3
    options("--data_folder=a", "--device=cuda:1")
    options("--data_folder=a", "--device=cuda:0", "--distributed_backend=gloo")


def test_a_gpu_that_pytorch_cannot_use_is_not_passed_over(options, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()  # no GPU yet
    assert options("--data_folder=a")
    (tmp_path / "nvidia0").touch()
    with pytest.raises(InputError, match="there is an NVIDIA GPU here.*give --device cpu"):
        options("--data_folder=a")
    assert options("--data_folder=a", "--device=cpu")
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert options("--data_folder=a")
    for named in ("0", "1,0", "GPU-8932f937"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        with pytest.raises(InputError, match="there is an NVIDIA GPU here"):
            options("--data_folder=a")
    given = ["reproduce", "--preset=small", f"--librispeech={tmp_path}", f"--output_folder={tmp_path / 'all'}"]
    assert cli.main(given) == 2 and "or give --devices cpu." in capsys.readouterr().err
    # a scheduler shows all and allows some: a folder cannot be opened either
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "nvidia0").mkdir()
    assert options("--data_folder=a")
