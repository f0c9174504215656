"""The mutations that tests of traps name are there, and each makes its test fail."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What the tests of traps take of a checkout.
NEEDED = ("speechbrain_bestrq", "recipes", "tests", "setup.cfg", "pyproject.toml")

_spec = importlib.util.spec_from_file_location("mutations", ROOT / "tests" / "helpers" / "mutations.py")
mutations = importlib.util.module_from_spec(_spec)
sys.modules["mutations"] = mutations  # dataclasses look their module up
_spec.loader.exec_module(mutations)

#: How a test fails whose assertion does not hold; or, a checkpoint's meta being no plain YAML, how it is not read.
FAILURES = r"^E +(AssertionError|assert |Failed|yaml.constructor.ConstructorError)"
#: Tests of traps that test the tests' own means.
WITHOUT = {"tests/traps/test_trap_17_stalls.py::test_what_reads_back_is_noted"}
TRAPS = {name: docstring for name, docstring in mutations.trap_docstrings().items() if name not in WITHOUT}


@pytest.mark.parametrize("name", TRAPS, ids=[name.rpartition(":")[2] for name in TRAPS])
def test_what_a_trap_says_brings_it_back_can_be_done(name):
    found = mutations.read_mutations(TRAPS[name])
    assert found
    for mutation in found:
        text = (ROOT / mutation.path).read_text(encoding="utf-8")
        changed = mutation.apply(text)
        assert changed != text
        if mutation.path.suffix == ".py":
            ast.parse(changed)


def run_pytest(folder, *words):
    """Run tests of a copy by themselves."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    # a .pyc goes by size and whole seconds: of the text before it might pass for that of this one
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy to change, whose tests pass as it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, folder / name)
    run = run_pytest(folder, "tests/traps")
    assert run.returncode == 0, run.stdout[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("name", TRAPS, ids=[name.rpartition(":")[2] for name in TRAPS])
def test_a_trap_that_comes_back_fails_its_test(name, checkout):
    for mutation in mutations.read_mutations(TRAPS[name]):
        path = checkout / mutation.path
        text = path.read_text(encoding="utf-8")
        path.write_text(mutation.apply(text), encoding="utf-8")
        try:
            run = run_pytest(checkout, name)
        finally:
            path.write_text(text, encoding="utf-8")
        assert run.returncode == pytest.ExitCode.TESTS_FAILED, f"{mutation}: {run.stdout[-3000:]}{run.stderr[-1000:]}"
        # by what the test asks, and not because the change makes no sense
        assert re.search(FAILURES, run.stdout, re.M), f"{mutation}: {run.stdout[-3000:]}"


def test_a_mutation_is_found_in_its_place_alone():
    text = "def f(x):\n    y = x\n    return y\n\n\nclass A:\n    def f(self, x):\n        y = x\n        return y\n"
    (one,) = mutations.read_mutations("Mutation: in a.py, A.f, ``y = x`` ->\n    ``y = 2 * x``.")
    assert one.apply(text) == text[:55] + text[55:].replace("y = x", "y = 2 * x")
    first, second = mutations.read_mutations(
        "Mutations: in a.py, f, before ``y = x`` add ``x = 1``; in a.py, A.f, after ``y = x`` add ``y += 1``."
    )
    assert first.apply(text).startswith("def f(x):\n    x = 1\n    y = x\n")
    assert second.apply(text).endswith("        y = x\n        y += 1\n        return y\n")


@pytest.mark.parametrize(
    ("docstring", "message"),
    [
        ("A trap.", "no mutation is named"),
        ("Mutation: in a.py, f, delete the line with ``y``.", "this is no mutation"),
        ("Mutation: in a.py, f, ``y`` -> ``z``; and so on.", "this is no mutation: 'and so on'"),
    ],
)
def test_what_cannot_be_made_out_is_no_mutation(docstring, message):
    with pytest.raises(ValueError, match=message):
        mutations.read_mutations(docstring)


@pytest.mark.parametrize(
    ("place", "old", "message"), [("f", "y", "is there 2 times"), ("f", "z", "is there 0 times"), ("g", "y", "no g")]
)
def test_what_is_not_there_once_cannot_be_changed(place, old, message):
    mutation = mutations.Mutation("a.py", place, None, old, "w")
    with pytest.raises(ValueError, match=message):
        mutation.apply("def f(x):\n    y = x\n    return y\n")
