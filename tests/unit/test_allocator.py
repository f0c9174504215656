"""Memory that tensors gave back is kept for the next ones, in processes of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "freed_memory.py"

# page faults, in twenty rounds of what a step does: large buffers taken, written to, and given back in another order
ROUNDS = """
import ctypes
import resource
import torch

# with huge pages, where a system has them for all, there are too few faults to count
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        held = [torch.ones(megabytes * 2**18) for megabytes in (1, 40, 8, 16, 3)]
        while held:
            held.pop(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def run(code, **environment):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", ROUNDS + code]
    return subprocess.run(words, env={**own, **environment}, check=True, capture_output=True, text=True).stdout.split()


def test_pages_are_mapped_once():
    code = "from speechbrain_bestrq.allocator import keep_freed_memory as keep; print(faults(), keep(), faults())"
    without, kept, with_it = run(code)
    assert kept == "True"
    # all pages once more at most, of twenty times
    assert int(with_it) <= 1.5 * 68 * 2**20 / os.sysconf("SC_PAGE_SIZE") < int(without) / 4


@pytest.mark.parametrize("setting", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}])
def test_settings_of_the_user_stay(setting):
    assert run("from speechbrain_bestrq.allocator import keep_freed_memory as keep; print(keep())", **setting) == [
        "False"
    ]


@pytest.mark.parametrize(
    "first_lines",
    [
        "from speechbrain_bestrq.recipe import run_recipe\nrun_recipe(lambda arguments: print(faults(), faults()))",
        "import sys\nfrom speechbrain_bestrq import cli\nsys.argv = ['sb-bestrq', 'report', '/nowhere']\n"
        "cli.main()\nprint(faults(), faults())",
    ],
    ids=["a recipe", "sb-bestrq"],
)
def test_recipes_and_the_command_keep_it(first_lines):
    assert int(run(first_lines)[-1]) < 68 * 2**20 / os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_the_benchmark_takes_updates_both_ways_in_turns():
    words = [sys.executable, str(BENCHMARK), *"--yamls wav2vec2_small --rounds 3 --utterances 2 --seconds 10".split()]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # of two processes, threads would wait for each other
    printed = subprocess.run(words, env=one, check=True, capture_output=True, text=True).stdout
    cells = [cell.strip() for cell in printed.splitlines()[-1].split("|")[1:-1]]
    assert cells[0] == "wav2vec2_small" and float(cells[1]) > 0 and float(cells[2]) > 0
    assert int(cells[4]) > 10 * max(int(cells[5]), 10)


LOADERS = {
    "pre-training": "make_loader(Reader(), [[0]] * 50, num_workers=1)",
    "a task": "make_task_loader(Reader(), [[0]] * 50, num_workers=1)",
}


GROW = """
import sys, torch
from speechbrain_bestrq.allocator import give_back_now_and_then, keep_freed_memory

keep_freed_memory()
now_and_then = sys.argv[1] == "True"
kept = []  # small, between the large
for batch in range(1, 101):
    frames = 100_000 + 7_919 * batch % 60_000
    large = [torch.zeros(frames, width) for width in (16, 48, 24)]
    kept += [torch.zeros(2000), large.pop().sum()]
    del large
    if now_and_then:
        give_back_now_and_then(batch)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


def test_what_batches_of_unlike_shapes_leave_is_given_back_now_and_then():
    """Else it is cut into pieces that fit nothing any more, and grows."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", GROW]
    given_back, kept = (int(subprocess.check_output([*words, str(one)], text=True, env=own)) for one in (True, False))
    assert given_back < 0.8 * kept


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_process_that_loads_data_does_not_keep_a_copy_of_what_the_parent_gave_back(loader):
    code = f"""
from speechbrain_bestrq.allocator import keep_freed_memory
from speechbrain_bestrq.pretraining_data import make_loader
from speechbrain_bestrq.task_data import make_task_loader

class Reader(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {{"id": "a"}}

def megabytes():
    held = [torch.ones(30 * 2**18) for _ in range(20)]
    process = worker._workers[0].pid if worker is not None else "self"
    rows = open(f"/proc/{{process}}/smaps_rollup").read().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("Private_Dirty:", "Shared_Dirty:"))) // 1024

worker = None
keep_freed_memory()
megabytes()
print(megabytes())
worker = iter({loader})
next(worker)
megabytes()
print(megabytes())
"""
    parent, worker = map(int, run(code))
    assert parent - worker > 500  # of the 600 that were given back
