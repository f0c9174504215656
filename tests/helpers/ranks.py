"""Several processes of one gloo group that run a function of a file and tell what it returned.

toy.py and swapped.py load this file from its path; the processes run it as a script.
"""

import multiprocessing
import os
import runpy
import time
import traceback
from pathlib import Path

import torch


def train_ranks(module, scratch, calls, count=2, timeout=240):
    """Run functions of the file ``module`` in several processes of one gloo group.

    ``calls`` is a (name, arguments) for each rank, or one for all. Returns what each rank returned; an error in
    any, or no answer in time, fails.
    """
    scratch = Path(scratch)
    scratch.mkdir(parents=True)
    calls = [calls] * count if isinstance(calls, tuple) else calls
    # processes are forked from a server that has all modules and never trained: no time is spent on imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["speechbrain_bestrq.pretraining"])
    processes = []
    for rank, call in enumerate(calls):
        task = {"module": module, "rank": rank, "count": count, "scratch": str(scratch), "call": call}
        process = context.Process(target=runpy.run_path, args=(__file__, {"task": task}, "__rank__"))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    reports = [scratch / f"rank{rank}.pt" for rank in range(count)]
    results = [torch.load(report, weights_only=False) if report.exists() else {} for report in reports]
    errors = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if result.get("error")]
    assert not errors, "\n".join(errors)
    assert not late, f"{len(late)} ranks gave no answer within {timeout} s"
    return [result["returned"] for result in results]


def run_rank(task):
    """Join the group, run the call, write down what it returned."""
    rank, count, scratch = task["rank"], task["count"], Path(task["scratch"])
    torch.set_num_threads(1)
    # as a rank of torchrun, not as the server that this one is forked from
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), GLOO_SOCKET_IFNAME="lo")
    report = {}
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{scratch / 'store'}", rank=rank, world_size=count
        )
        name, arguments = task["call"]
        report["returned"] = runpy.run_path(task["module"])[name](**arguments)
    except BaseException:
        report["error"] = traceback.format_exc()
    torch.save(report, scratch / f"rank{rank}.pt")
    # a rank whose partner failed must not wait for it
    os._exit(0)


if __name__ == "__rank__":
    run_rank(task)  # noqa: F821 - given by runpy
