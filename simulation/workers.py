"""Simulators in processes of their own, one core each: jobs in, results out as they finish.

    workers = Workers(2, serve)
    for job, result in workers.run(next_job): ...

`serve(jobs)` runs in each worker: an iterator of jobs in, an iterator of their results out, so that
it can keep a simulator from one job to the next. `next_job(running)` is asked in the main process
whenever a worker is free, and knows what is running and all results so far; None: nothing to do
until another result is in.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from config import InputError

Job = tuple  # (name, seed or seeds, whatever else `serve` needs)
Serve = Callable[[Iterator[Job]], Iterator]
HUNG_UP = (EOFError, BrokenPipeError, ConnectionResetError)  # the other end of a pipe is gone


def work(pipe: Connection, serve: Serve):
    """Send each job's result, or our own error and end, until the main process hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    with suppress(*HUNG_UP):  # done or gone, and with it the only writer of the files
        try:
            for result in serve(iter(pipe.recv, None)):
                pipe.send(result)
        except InputError as error:
            pipe.send(error)


class Workers:
    """At most `count` processes, each started when there is a job for it."""

    def __init__(self, count: int, serve: Serve):
        # Inherited: one core each, so the same sums for any number of workers; and one hash seed,
        # since the simulator builds objects in the order of a set of names (init_config_idx).
        os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1", PYTHONHASHSEED="0")
        self.count, self.serve = count, serve
        self.processes: dict[Connection, BaseProcess] = {}

    def start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self.processes[pipe] = context.Process(target=work, args=(theirs, self.serve), daemon=True)
        self.processes[pipe].start()
        theirs.close()  # the only copy is the worker's: when it dies, our end says so
        return pipe

    def run(self, next_job: Callable[[list[Job]], Job | None]) -> Iterator[tuple[Job, object]]:
        """Yield every job and its result. Ends the program when a worker dies; stderr says why."""
        idle, running = list(self.processes), {}
        while True:
            while idle or len(self.processes) < self.count:
                job = next_job([*running.values()])
                if job is None:
                    break
                pipe = idle.pop() if idle else self.start()
                running[pipe] = job
                with suppress(*HUNG_UP):  # died while it was idle: `receive` says so
                    pipe.send(job)
            if not running:
                return
            for pipe in wait([*running]):
                job = running.pop(pipe)
                yield job, self.receive(pipe, job)
                idle.append(pipe)

    def receive(self, pipe: Connection, job: Job):
        """The job's result. Raises the worker's InputError, or SystemExit when it died."""
        try:
            result = pipe.recv()
        except HUNG_UP:
            self.processes[pipe].join()
            raise SystemExit(
                f"The worker at seed {str(job[1]).strip('[]')} of {job[0]} died (exit code "
                f"{self.processes[pipe].exitcode}); if it could say why, it did so above. "
                "Finished episodes are kept: the same command goes on"
            ) from None
        if isinstance(result, InputError):
            raise result
        return result
