"""Who runs what, and when: Dask's scheduler, here or at an address, one notebook a device.

A device (MPS, CUDA) is the resource "accelerator": as many notebooks use it at a time as workers
offer it. Workers that are started by hand offer it with `--resources accelerator=1`.
"""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import sdkit
from sdkit.batch.execution import DIED, FAILED, execute_run
from sdkit.batch.lock import is_held
from sdkit.validation import ValidationError

ACCELERATOR = "accelerator"
NO_PAGE = "127.0.0.1:0"  # Dask always serves one: at least nobody else can reach it
CONNECT_SECONDS = 10
MOST_JOBS = 4  # by default: notebooks with a pipeline each take 2 GB and more


def count_cores():
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@contextmanager
def connect(scheduler, *, jobs, has_device):
    """Yields a Dask client: of the scheduler at an address, or of one that lives in this process.

    Args:
        scheduler: Such as "tcp://127.0.0.1:8786", or None.
        jobs: Notebooks at a time, without a scheduler of one's own.
        has_device: Whether this machine has an accelerator.

    Raises:
        ValidationError: No scheduler answers there, or it has no worker.
    """
    from dask.distributed import Client, LocalCluster

    if scheduler is None:
        # Threads of this process: they only wait for kernels, which are processes of their own.
        cluster = LocalCluster(
            n_workers=1, threads_per_worker=jobs, processes=False, memory_limit=0,
            dashboard_address=NO_PAGE, worker_dashboard_address=NO_PAGE,
            resources={ACCELERATOR: 1} if has_device else {}, silence_logs="error",
        )  # fmt: skip
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client
        return
    # A scheduler that goes away is told in a sentence, not in the traceback of the reconnection.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    logging.getLogger("distributed.utils").setLevel(logging.CRITICAL)
    try:
        _knock(scheduler)
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls without certificates
        raise ValidationError(
            f"{scheduler}: no Dask scheduler answers there ({error}). Start one with "
            "`dask scheduler` and workers with `dask worker ADDRESS`, or leave --scheduler out."
        ) from error
    with client:
        yield client


def _knock(address):
    """Raises what is wrong with an address that cannot be connected to.

    A Client that fails to connect is left half-made: when Python ends it waits 20 s for itself and
    prints a traceback (distributed 2026.8; `test_a_bad_scheduler_is_one_line` guards it).
    """
    from distributed import connect

    async def knock():
        comm = await connect(address, timeout=CONNECT_SECONDS)
        comm.abort()

    # In a thread of its own, for a notebook's has a loop that runs already.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, knock()).result()


def check_workers(client, folder, token):
    """Returns whether the workers of a scheduler elsewhere offer an accelerator.

    Raises:
        ValidationError: There is no worker, it has another sdkit, or it does not see the folder.
    """
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise ValidationError(
            f"{client.scheduler.address}: no worker there. Start some with "
            f"`dask worker {client.scheduler.address} --nthreads 1`."
        ) from error
    for address, (version, sees_folder) in client.run(_look_around, str(folder), token).items():
        if version != sdkit.__version__:
            raise ValidationError(
                f"{address}: this worker has sdkit {version}, expected {sdkit.__version__}."
            )
        if not sees_folder:
            raise ValidationError(
                f"{address}: this worker does not see {folder}. Expected a folder that all "
                "machines share: give one with --output."
            )
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(ACCELERATOR in worker["resources"] for worker in workers)


def execute_tasks(client, tasks, needs_accelerator):
    """Yields (task, status, error or None) of each run as it ends.

    Args:
        client: Of `connect`.
        tasks: What `execute_run` takes.
        needs_accelerator: One bool each.

    Raises:
        ValidationError: The scheduler went away.
    """
    from dask.distributed import as_completed
    from distributed.client import FutureCancelledError

    futures = [
        client.submit(
            execute_run, task, key=f"sdkit-{task.run_id}-{task.token}", pure=False,
            resources={ACCELERATOR: 1} if needs else None,
        )
        for task, needs in zip(tasks, needs_accelerator, strict=True)
    ]  # fmt: skip
    task_of = {future.key: task for future, task in zip(futures, tasks, strict=True)}
    for future in as_completed(futures, loop=client.loop):
        try:
            result = _read_result(future)
        except FutureCancelledError as error:
            raise ValidationError(
                f"{client.scheduler.address}: the Dask scheduler is gone. What is done is kept; "
                "start a scheduler, and the same sweep again."
            ) from error
        yield task_of[future.key], *result


def _read_result(future):
    from distributed.scheduler import KilledWorker

    error = future.exception()
    if error is None:
        return future.result(), None
    if isinstance(error, KilledWorker):
        return DIED, "the workers that took it died, as they do when memory runs out"
    return FAILED, f"{type(error).__name__}: {error}"


def _look_around(folder, token):
    """On a worker: its sdkit, and whether it sees the folder that the sweep holds."""
    return sdkit.__version__, is_held(folder, token)
