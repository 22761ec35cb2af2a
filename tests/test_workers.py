"""The pool of processes, with jobs that need no simulator."""

import os
import signal
import time

import pytest
from processes import start, workers_of

from config import InputError
from simulation.workers import Workers


def run_jobs(cfg, jobs):
    """Workers import this file."""
    for name, seed in jobs:
        if name == "refuse":
            raise InputError("expected another job")
        if name == "die":
            os._exit(seed)
        if name == "sleep":
            time.sleep(seed)
        yield name * seed, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), cfg


def make_workers(count):
    return Workers(count, "test_workers", "cfg")


def one_after_another(*jobs):
    waiting = iter(jobs)
    return lambda running: next(waiting, None)


def test_every_job_has_its_result_and_two_workers_share_them_and_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    jobs = [("a", seed) for seed in range(6)] + [("sleep", 1)]
    results = list(make_workers(2).run(one_after_another(*jobs)))
    assert sorted(job for job, _ in results) == jobs
    assert all(result[0] == job[0] * job[1] and result[3] == "cfg" for job, result in results)
    assert len({pid for _, (_, pid, *_) in results}) == 2
    assert {gpu for _, (_, _, gpu, _) in results} == {"4", "6"}


def test_no_process_is_started_without_a_job_and_the_next_run_uses_those_there_are():
    workers = make_workers(8)
    assert list(workers.run(one_after_another())) == [] and not workers.processes
    ((_, first),) = workers.run(one_after_another(("a", 1)))
    ((_, second),) = workers.run(one_after_another(("b", 2)))
    assert first[1] == second[1]


def test_the_next_job_may_wait_for_what_is_running():
    done = []

    def next_job(running):
        assert running in ([], [("a", len(done))])
        return ("a", len(done)) if not running and len(done) < 3 else None

    for (_, seed), _ in make_workers(2).run(next_job):
        done.append(seed)
    assert done == [0, 1, 2]


def test_errors_and_deaths_of_workers_at_work_or_idle_reach_the_main_process():
    with pytest.raises(InputError, match="expected another job"):
        list(make_workers(1).run(one_after_another(("refuse", 0))))
    with pytest.raises(SystemExit, match=r"seed 3 of die died \(exit code 3\)"):
        list(make_workers(1).run(one_after_another(("a", 1), ("die", 3))))
    workers = make_workers(1)
    ((_, (_, pid, *_)),) = workers.run(one_after_another(("a", 1)))
    os.kill(pid, signal.SIGKILL)
    next(iter(workers.processes.values())).join()
    with pytest.raises(SystemExit, match=r"seed 2 of b died \(exit code -9\)"):
        list(workers.run(one_after_another(("b", 2))))


def test_ctrl_c_is_for_the_main_process():
    process = start(__file__)
    assert process.stdout.readline() == "running\n"
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert stderr.count("Traceback") == 1 and stderr.rstrip().endswith("KeyboardInterrupt")
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)


if __name__ == "__main__":
    jobs = one_after_another(("a", 1), ("a", 1), ("sleep", 100), ("sleep", 100))
    for number, _ in enumerate(make_workers(2).run(jobs)):
        if number == 1:
            print("running", flush=True)
