"""Simulators in processes of their own, one core each: jobs in, results out as they finish.

    workers = Workers(2, serve)
    for job, result in workers.run(next_job): ...

`serve(jobs)` runs in each worker. It turns an iterator of jobs into an iterator of their results,
so it can keep a simulator from one job to the next. `next_job(running)` is called in the main
process when a worker is free, after all earlier results were yielded; None means that there is no
job until the next result.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from config import InputError

Job = tuple  # (name, seed or seeds, anything else that `serve` needs)
Serve = Callable[[Iterator[Job]], Iterator]
CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)  # the other end of a pipe is gone


def work(pipe: Connection, serve: Serve) -> None:
    """Send each job's result until the main process closes the pipe; on InputError send that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    with suppress(*CLOSED):
        try:
            for result in serve(iter(pipe.recv, None)):
                pipe.send(result)
        except InputError as error:
            pipe.send(error)


class Workers:
    """At most `count` processes, each started when there is a job for it."""

    def __init__(self, count: int, serve: Serve):
        # The workers inherit one core each, so the sums are the same for any number of workers, and
        # one hash seed: the simulator builds objects in the order of a set (init_config_idx).
        os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1", PYTHONHASHSEED="0")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = map(str, range(torch.cuda.device_count()))
        self.gpus = [*every] if visible is None else visible.split(",")
        self.count, self.serve = count, serve
        self.processes: dict[Connection, BaseProcess] = {}

    def start(self) -> Connection:
        if self.gpus:
            # A GPU for each worker in turn. SAPIEN's renderer reads this variable (its issue 101),
            # which must be set before the worker imports torch.
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[len(self.processes) % len(self.gpus)]
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self.processes[pipe] = context.Process(target=work, args=(theirs, self.serve), daemon=True)
        self.processes[pipe].start()
        theirs.close()  # the worker has the only copy: when it dies, our end is closed
        return pipe

    def run(self, next_job: Callable[[list[Job]], Job | None]) -> Iterator[tuple[Job, object]]:
        """Yield every job and its result. Ends the program when a worker dies."""
        idle, running = list(self.processes), {}
        while True:
            while idle or len(self.processes) < self.count:
                job = next_job([*running.values()])
                if job is None:
                    break
                pipe = idle.pop() if idle else self.start()
                running[pipe] = job
                with suppress(*CLOSED):  # it died while it was idle: `receive` reports that
                    pipe.send(job)
            if not running:
                return
            for pipe in wait([*running]):
                job = running.pop(pipe)
                yield job, self.receive(pipe, job)
                idle.append(pipe)

    def receive(self, pipe: Connection, job: Job) -> object:
        """Return the job's result. Raises the worker's InputError, or SystemExit when it died."""
        try:
            result = pipe.recv()
        except CLOSED:
            self.processes[pipe].join()
            raise SystemExit(
                f"The worker at seed {str(job[1]).strip('[]')} of {job[0]} died (exit code "
                f"{self.processes[pipe].exitcode}); an error message may stand above. Finished "
                "episodes are kept: the same command goes on"
            ) from None
        if isinstance(result, InputError):
            raise result
        return result
