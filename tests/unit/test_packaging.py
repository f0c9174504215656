"""What is installed, and what the Makefile does."""

import ast
import configparser
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2

import speechbrain_bestrq

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_bestrq"


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def run_make(folder, *words, **variables):
    """Run make as from a shell of its own, also when the tests themselves were started by make."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", *words, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_what_the_makefile_installed_is_a_pair(settings):
    # this environment is what pip made of setup.cfg on a bare machine; to let pip resolve it a second time would fetch
    # gigabytes wherever a registry does not offer the wheels' metadata by itself
    torch, torchaudio = importlib.metadata.version("torch"), importlib.metadata.version("torchaudio")
    # torchaudio is built for one minor release of torch, and for one CUDA: no "+cpu" on one side only
    assert torch.split(".")[:2] == torchaudio.split(".")[:2]
    assert torch.partition("+")[2] == torchaudio.partition("+")[2]
    assert importlib.metadata.version("speechbrain").startswith("1.1.")


def test_every_import_is_a_declared_dependency(settings):
    extras = settings["options.extras_require"]["demo"] + settings["options.extras_require"]["lm"]
    packages = settings["options"]["install_requires"] + extras.replace("-", "_")
    declared = set(re.findall(r"^[a-z_]+", packages, re.M))
    assert "torch" in declared
    modules = {"pyyaml": "yaml", "camel_kenlm": "kenlm"}  # those whose module has another name
    declared |= {module for package, module in modules.items() if package in declared}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names}
            unknown = roots - declared - sys.stdlib_module_names - {PACKAGE.name}
            assert not unknown, f"{path} imports {unknown}, which setup.cfg does not require"


def test_every_folder_of_modules_is_a_package():
    # setuptools leaves a folder without __init__.py out of the installation, and says nothing
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_installed_metadata():
    metadata = importlib.metadata.metadata("speechbrain_bestrq")
    assert metadata["Version"] == speechbrain_bestrq.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sb-bestrq")
    assert script.load() is importlib.import_module("speechbrain_bestrq.cli").main


def test_pyproject_has_the_build_system_only():
    tables = re.findall(r"^\[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert tables == ["build-system"]


# --- Makefile ---


@pytest.fixture
def checkout(tmp_path):
    """A tree with the Makefile, and a .venv whose Python only notes what it is asked to do."""
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\n')
    python.chmod(0o755)
    return tmp_path


def installations(checkout):
    return (checkout / "calls").read_text().count("-m pip install")


def test_setup_installs_once_and_again_after_a_change(checkout):
    assert run_make(checkout, "setup").returncode == 0
    assert "--editable .[demo,test]" in (checkout / "calls").read_text()
    assert run_make(checkout, "setup").returncode == 0
    assert installations(checkout) == 1
    stamp = (checkout / ".venv" / ".installed").stat().st_mtime
    os.utime(checkout / "setup.cfg", (stamp + 10, stamp + 10))
    assert run_make(checkout, "setup").returncode == 0
    assert installations(checkout) == 2


def test_setup_that_failed_is_done_again(checkout):
    python = checkout / ".venv" / "bin" / "python"
    working = python.read_text()
    python.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$*" in *install*) exit 1;; esac\n')
    assert run_make(checkout, "setup").returncode != 0
    python.write_text(working)
    assert run_make(checkout, "setup").returncode == 0
    assert installations(checkout) == 2


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_setup_refuses_an_old_or_missing_python_in_one_line(checkout, python):
    shutil.rmtree(checkout / ".venv")
    done = run_make(checkout, "test", PYTHON=python)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
    assert len(lines) == 1 and lines[0].startswith(f"{python} is not Python 3.10 or newer: name one that is")
    assert not (checkout / ".venv").exists()


def test_slow_tests_run_by_test_all_only(checkout):
    calls = checkout / "calls"
    for goal, expected in [("test", ["not slow"]), ("test-all", ["not slow", "slow"])]:
        calls.unlink(missing_ok=True)
        run_make(checkout, goal)
        lines = [line for line in calls.read_text().splitlines() if "pytest" in line]
        assert lines == [f"-m pytest -m {marker}" for marker in expected]


def test_clean_deletes_what_was_made_and_nothing_else(checkout):
    for folder in ("build", "package/__pycache__", ".ruff_cache", ".venv/lib/__pycache__", "results"):
        (checkout / folder).mkdir(parents=True)
    assert run_make(checkout, "clean").returncode == 0
    left = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_dir()}
    assert left == {".venv", ".venv/bin", ".venv/lib", ".venv/lib/__pycache__", "package", "results"}


@pytest.mark.parametrize(("failing", "calls"), [("none", ["lint", "test-all"]), ("lint", ["lint"])])
def test_ci_lints_then_tests_and_stops_at_a_failure(tmp_path, failing, calls):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin" / "make"
    make.write_text(f'#!/bin/sh\npwd >> "$CALLS"\necho "$1" >> "$CALLS"\n[ "$1" != {failing} ]\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    done = subprocess.run([tmp_path / ".ci" / "run"], cwd="/", env=environment, timeout=60)
    assert (done.returncode == 0) == (failing == "none")
    lines = (tmp_path / "calls").read_text().splitlines()
    assert lines[1::2] == calls and set(lines[::2]) == {str(tmp_path)}


def test_every_public_name_can_be_imported():
    assert len(speechbrain_bestrq.__all__) > 15
    assert all(getattr(speechbrain_bestrq, name) is not None for name in speechbrain_bestrq.__all__)


def test_the_encoder_takes_what_speechbrains_lobe_takes_in_its_order_with_its_defaults():
    ours = inspect.signature(speechbrain_bestrq.PretrainedEncoder).parameters
    theirs = [one for one in inspect.signature(Wav2Vec2).parameters.values() if one.kind is not one.VAR_KEYWORD]
    assert len(theirs) == 7 and list(ours)[:7] == [one.name for one in theirs]
    for one in theirs:
        assert one.default is one.empty or ours[one.name].default == one.default, one.name
