"""Tests that need a process group run in processes of their own, which end without taking the group down.

gloo waits in a group's destructor for its threads, and holds Python's global lock meanwhile. A thread that frees the last
tensor of a collective waits for that lock: then neither goes on, and no timeout of Python's is ever reached.
"""

import functools
import multiprocessing
import tempfile
import traceback

import torch.distributed as dist

TIMEOUT = 120


def run_in_processes(function, *arguments, number=1):
    """Call the function in `number` forked processes of one gloo group; what goes wrong in one is raised here."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(number):
            report, given = context.Pipe(duplex=False)
            target = (given, f"file://{folder}/store", rank, number, function, arguments)
            processes.append((context.Process(target=_run, args=target, daemon=True), report))
        for process, _ in processes:
            process.start()
        try:
            for _, report in processes:
                assert report.poll(TIMEOUT), f"A process of the group said nothing for {TIMEOUT} s."
                error = report.recv()
                assert error is None, error
        finally:
            for process, _ in processes:
                process.kill()


def in_a_process_group(test):
    """A test that runs as the one process of a gloo group."""

    @functools.wraps(test)
    def run(*arguments, **named):
        run_in_processes(lambda: test(*arguments, **named))

    return run


def _run(report, store, rank, number, function, arguments):
    error = None
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=number)
        function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    report.send(error)
