"""One function for many prompts: in this process, or on the workers of a Dask cluster.

Without a choice everything is computed in this process, and Dask is not needed. The environment chooses a cluster, or
else the profile's key ``workers``:

    NEMO_DASK=tcp://scheduler:8786   a scheduler that runs, with whatever workers it has
    NEMO_DASK=local:4                four processes on this machine (also ``workers: 4`` in the profile)
    NEMO_DASK=off                    this process, whatever the profile says

A local worker has one GPU to itself, in turn if there are fewer, and one thread on a CPU. Workers of your own scheduler
are started with ``dask worker --nthreads 1``, one for each GPU (``CUDA_VISIBLE_DEVICES``).

Workers only compute: this process alone writes results, as they come, and makes tables in the order of the prompts.
Each prompt, or batch of prompts, is computed as it is here, so that tables do not depend on the number of workers. (Not
so their last digits: a CPU adds floats differently with another number of threads, and with other searches in one UNet
pass; workers have ``OMP_NUM_THREADS=1``, and search few prompts at once.) A prompt that raises is reported at the end,
when all others are finished. A worker that dies costs time: what it had is computed by another one.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nemolib.pipeline import load_pipeline
from nemolib.provenance import COMPUTING, code_hash, model_hash, versions
from nemolib.settings import Profile, profile_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from distributed import Client

VARIABLE = "NEMO_DASK"
"""The environment variable that chooses a cluster."""

DEATHS = 3
"""A prompt that was under way when so many workers died, one after the other, gets one more; then it has failed."""

PATIENCE = "20s"
"""How long a scheduler is waited for."""

_THREADS = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}

Batch = Sequence[tuple[str, Any]]
"""Items that are computed together, each with its key. An item is a caption, or a tuple that begins with one."""

Outcomes = Iterator[tuple[str, Any]]
"""Keys of items, each with its result or its `Failure`."""

Results = Sequence[Any] | Iterator[tuple[int, Any]]
"""Results of a batch in its order; or places of items with their results, or exceptions, as they come."""

Task = Callable[..., Callable[[Sequence[Any]], Results]]
"""Called once in each process with a pipeline and what all batches have in common; returns what computes some items."""


class WorkersError(RuntimeError):
    """Workers that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a prompt that raised: its caption, type and text of the exception, and the traceback."""

    caption: str
    message: str
    details: str = field(default="", repr=False)


class FailedPrompts(RuntimeError):
    """Some prompts raised; all others are finished. The message has each caption with its first error.

    Attributes:
        failures: What failed (`Failure`), in the order of the prompts.
    """

    def __init__(self, failures: Sequence[Failure]) -> None:
        first: dict[str, Failure] = {}
        for failure in failures:
            first.setdefault(failure.caption, failure)
        self.failures = tuple(first.values())
        lines = [f"  {failure.caption!r}: {failure.message}" for failure in self.failures]
        many = "1 prompt" if len(lines) == 1 else f"{len(lines)} prompts"
        super().__init__(
            f"{many} failed after all others were finished; what is kept in a store is not computed again\n"
            + "\n".join(lines)
        )
        self.add_note(f"The first of them:\n{self.failures[0].details}")


def map_prompts(
    task: Task, batches: Sequence[Batch], *, pipe: StableDiffusionPipeline, common: Mapping[str, Any]
) -> Outcomes:
    """Yield the key of each item, as they come, with what a task makes of it; with a `Failure` if it raises.

    Where a batch of several items raises, each of them is computed alone.

    Args:
        task: A function of a module, ``task(pipe, **common)``, that returns a function of some items, which returns a
            result for each. That must not depend on what was computed before.
        batches: The batches; without any nothing is started.
        pipe: The pipeline. Workers load theirs from its profile.
        common: Plain values that all batches share.

    Raises:
        WorkersError: The cluster cannot be used, or a worker has another model or code.
    """
    if not batches:
        return
    with cluster(pipe) as client:
        if client is not None:
            yield from _there(task, batches, pipe, common, client)
            return
        function = task(pipe, **common)
        for batch in batches:
            yield from _outcomes(function, batch)


_client: Client | None = None
"""The client of the outermost `cluster`."""


@contextmanager
def cluster(source: StableDiffusionPipeline | Profile) -> Iterator[Client | None]:
    """Connect to the chosen cluster inside the context; it is left, and a local one ended, whatever happens.

    Every stage does this for itself. Around several stages it makes them share one local cluster, whose workers load
    the model once.

    Args:
        source: A profile, or a pipeline that was loaded from one.

    Yields:
        A client of Dask; None if nothing was chosen: then all is computed in this process.

    Raises:
        WorkersError: `NEMO_DASK` has no meaning, Dask is not installed, or no scheduler answers.
    """
    global _client
    choice = _choice(source if isinstance(source, Profile) else profile_of(source))
    if choice is None or _client is not None:
        yield None if choice is None else _client
        return
    with ExitStack() as stack:
        _client = _connect(choice, stack)
        try:
            yield _client
        finally:
            _client = None


def distributed(profile: Profile) -> bool:
    """Return whether a cluster was chosen."""
    return _choice(profile) is not None


def _choice(profile: Profile | None) -> str | None:
    """Return the address of a scheduler, ``local:`` and a number of workers, or None for this process."""
    chosen = os.environ.get(VARIABLE, "").strip()
    if not chosen and profile is not None and profile.workers:
        chosen = f"local:{profile.workers}"
    if chosen in ("", "off"):
        return None
    if not re.fullmatch("local:[1-9][0-9]*|.*://.*", chosen):
        raise WorkersError(f"{VARIABLE} is {chosen!r}; expected tcp://host:port, local:4 or off")
    if profile is None:
        reason = "the pipeline was not loaded from a profile; all is computed in this process"
        warnings.warn(f"{VARIABLE} is {chosen!r}, but {reason}", stacklevel=2)
        return None
    return chosen


def _connect(choice: str, stack: ExitStack) -> Client:
    """Return a client that is closed with the stack; a local cluster is new, and ends with it."""
    try:
        import distributed
    except ImportError as error:
        raise WorkersError('Dask is not installed: pip install "nemolib[workers]" (or distributed)') from error
    local = choice.startswith("local:")
    if local:
        remedy = 'a script must be a file whose work is under if __name__ == "__main__": every process reads it anew'
    else:
        remedy = (
            f"start one with `dask scheduler` and workers with `dask worker {choice} --nthreads 1`, or correct the "
            "address; with encryption (tls:// or require-encryption) certificates are needed in distributed.comm.tls"
        )
    try:
        address = _local(int(choice.removeprefix("local:")), stack) if local else choice
        client = stack.enter_context(distributed.Client(address, set_as_default=False, timeout=PATIENCE))
    except (OSError, ValueError, ImportError, TypeError, RuntimeError) as error:
        raise WorkersError(f"no Dask scheduler answers at {choice} ({VARIABLE}): {error}; {remedy}") from error
    if not client.scheduler_info(n_workers=-1)["workers"]:
        warnings.warn(f"the scheduler at {choice} has no worker yet; waiting for the first", stacklevel=2)
    return client


def _local(number: int, stack: ExitStack) -> str:
    """Return the address of a new cluster of processes on this machine, with one thread each, that ends with the stack."""
    import dask
    from distributed import LocalCluster

    settings = {
        # A site may demand encryption, for which processes on one machine have no certificates.
        "distributed.comm.require-encryption": False,
        # No prompt waits in a worker while another one is computed there, or it would be blamed if the worker dies.
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.allowed-failures": DEATHS,
        # Dask would set MALLOC_TRIM_THRESHOLD_ too: then glibc maps and unmaps memory for every large tensor, and a
        # CPU is a third slower.
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(_THREADS, "1"),
    }
    stack.enter_context(dask.config.set(settings))
    # Dask puts what it gives to workers into this process too, and leaves it there.
    for name in _THREADS - os.environ.keys():
        stack.callback(os.environ.pop, name, None)
    # Without a limit of memory: Dask's own would end a worker that loads a large model.
    limits = {"n_workers": number, "threads_per_worker": 1, "memory_limit": 0}
    place = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    return stack.enter_context(LocalCluster(**limits, **place, silence_logs=logging.CRITICAL)).scheduler_address


def _there(task: Task, batches: Sequence[Batch], pipe: Any, common: Mapping[str, Any], client: Client) -> Outcomes:
    """Yield what workers compute, as they finish it; what is left when this ends is given up."""
    from distributed import as_completed

    work, name = partial(_on_worker, profile_of(pipe), _identity(pipe, task), task, dict(common)), uuid.uuid4().hex
    waiting = {}
    try:
        for place, batch in enumerate(batches):
            # What a prompt raises is a result. What is raised nonetheless is a worker's own, and another may do better.
            # The batch is a part of the function, so that Dask does not look into it.
            key = f"{task.__name__}-{name}-{place}"
            waiting[client.submit(partial(work, name, batch), key=key, retries=2)] = place
        for future in as_completed(list(waiting), loop=client.loop):
            yield from _result(future, batches[waiting.pop(future)])
    finally:
        client.cancel(list(waiting), force=True)


def _result(future: Any, batch: Batch) -> list[tuple[str, Any]]:
    """Return the outcomes of a batch that a worker finished."""
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        message = f"its worker died, {DEATHS + 1} times one after the other; is there enough memory? ({error})"
        return [(key, Failure(_caption(item), message)) for key, item in batch]
    except WorkersError:
        raise
    except CancelledError as error:
        raise WorkersError(f"the Dask scheduler is gone; run again, what is in a store is kept ({error})") from error
    except Exception as error:
        raise WorkersError(f"a worker could not begin: {type(error).__name__}: {error}") from error


def _outcomes(function: Callable[[Sequence[Any]], Results], batch: Batch) -> Outcomes:
    """Yield the keys of a batch with results, as they come; what raises in it is computed alone: result or failure."""
    left, error = dict(enumerate(batch)), None
    try:
        found = function([item for _, item in batch])
        for place, result in enumerate(found) if isinstance(found, Sequence) else found:
            if isinstance(result, Exception):
                error = result
            else:
                yield left.pop(place)[0], result
    except Exception as raised:
        error = raised
    if left and len(batch) == 1:
        ((key, item),) = batch
        details = "".join(traceback.format_exception(error))
        yield key, Failure(_caption(item), f"{type(error).__name__}: {error}", details)
        return
    # Without what holds the memory of the pass that failed.
    del error
    for pair in left.values():
        yield from _outcomes(function, (pair,))


def _caption(item: Any) -> str:
    return item if isinstance(item, str) else item[0]


_LOCK = threading.Lock()
_LOADED: dict[str, Any] = {}
"""What a worker keeps from batch to batch: the pipeline that was asked for last, and the function of a task."""


def _on_worker(
    profile: Profile, identity: str, task: Task, common: Mapping[str, Any], name: str, batch: Batch
) -> list[tuple[str, Any]]:
    """Return the outcomes of a batch of the work of a name; one at a time in each process, as a pipeline needs it."""
    with _LOCK:
        if _LOADED.get("profile") != profile:
            # The one before is given up first: two may be too large.
            _LOADED.clear()
            _LOADED.update(pipe=load_pipeline(profile, device=_device(profile)), profile=profile)
        if _LOADED.get("name") != name:
            found = _identity(_LOADED["pipe"], task)
            if found != identity:
                raise WorkersError(
                    f"a worker has {found} instead of {identity}. Workers load the model of the profile: do not change "
                    "it here, give all machines the same files and versions, restart workers after a change, and set dtype "
                    "in the profile where not all have a GPU (auto: float16 with CUDA, else float32)"
                )
            _LOADED.update(function=task(_LOADED["pipe"], **common), name=name)
        return list(_outcomes(_LOADED["function"], batch))


def _device(profile: Profile) -> str | None:
    """Return the GPU of this worker: a local one has a number for its name, and they take GPUs in turn."""
    import torch
    from distributed import get_worker

    name = get_worker().name
    if not isinstance(name, int) or profile.device not in ("auto", "cuda") or not torch.cuda.device_count():
        return None
    return f"cuda:{name % torch.cuda.device_count()}"


def _identity(pipe: StableDiffusionPipeline, task: Task) -> str:
    """Return what must be the same in two processes for one to compute for the other."""
    packages = ", ".join(f"{package} {versions()[package]}" for package in COMPUTING)
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    return f"model {dtype} {model_hash(pipe)[:16]}, code {code_hash(task)[:16]}, {packages}"
