"""Worker processes, one core each, that turn jobs into results.

    workers = Workers(2, "simulation.episodes", cfg)
    for job, result in workers.run(next_job): ...

Each worker imports the module, so the main process loads no simulator, and calls its function
`run_jobs(cfg, jobs)`, which yields a result for each job and can keep a simulator for the next job.
`run` calls `next_job(running)` in the main process when a worker is free and all earlier results
were yielded; None means no job until the next result.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from config import InputError

Job = tuple  # (name, seed or seeds, anything else that `run_jobs` needs)
CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)  # the other end of a pipe is gone


def work(pipe: Connection, module: str, cfg: object) -> None:
    """Send each job's result, or an InputError, until the main process closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends its workers
    with suppress(*CLOSED):
        try:
            for result in import_module(module).run_jobs(cfg, iter(pipe.recv, None)):
                pipe.send(result)
        except InputError as error:
            pipe.send(error)


class Workers:
    """At most `count` processes, each started when there is a job for it."""

    def __init__(self, count: int, module: str, cfg: object):
        # For the workers: one thread each, so that any number of them gives the same sums; one
        # hash seed, since the simulator builds objects in the order of a set (init_config_idx).
        os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1", PYTHONHASHSEED="0")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = map(str, range(torch.cuda.device_count()))
        self.gpus = [*every] if visible is None else visible.split(",")
        self.count, self.work = count, (module, cfg)
        self.processes: dict[Connection, BaseProcess] = {}

    def start(self) -> Connection:
        if self.gpus:
            # The workers take the GPUs in turn. SAPIEN's renderer and torch read this variable
            # when the worker imports them (SAPIEN's issue 101).
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[len(self.processes) % len(self.gpus)]
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self.processes[pipe] = context.Process(target=work, args=(theirs, *self.work), daemon=True)
        self.processes[pipe].start()
        theirs.close()  # only the worker has a copy, so our end sees when the worker dies
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
                with suppress(*CLOSED):  # `receive` reports a worker that died while it was idle
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
                f"{self.processes[pipe].exitcode}), see above for its error. Finished episodes are "
                "kept: the same command continues"
            ) from None
        if isinstance(result, InputError):
            raise result
        return result
