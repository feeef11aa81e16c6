"""One function for many prompts: in this process, or on the workers of a Dask cluster.

Without a choice everything is computed in this process, and Dask is not needed. The environment chooses a cluster, or
else the profile's key ``workers``:

    NEMO_DASK=tcp://scheduler:8786   a scheduler that runs, with whatever workers it has
    NEMO_DASK=local:4                four processes on this machine (also ``workers: 4`` in the profile)
    NEMO_DASK=off                    this process, whatever the profile says

A local worker has one GPU to itself, in turn if there are fewer, and one thread on a CPU. Workers of your own scheduler
are started with ``dask worker --nthreads 1``, one for each GPU (``CUDA_VISIBLE_DEVICES``).

Workers only compute: this process alone writes results, as they come, and makes tables in the order of the prompts. Each
prompt, or batch of prompts, is computed as it is here, so that tables do not depend on the number of workers. (A CPU
that adds floats with another number of threads may change their last digits: for equal bits run this process with
``OMP_NUM_THREADS=1``, as the workers do.) A prompt that raises is reported at the end, when all others are finished. A
worker that dies costs time: what it had is computed by another one.
"""

from __future__ import annotations

import os
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemolib.batching import progress_bar
from nemolib.pipeline import load_pipeline, profile_of
from nemolib.profiles import Profile, profile_from_mapping, profile_to_mapping
from nemolib.provenance import model_hash, science_hash, versions

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from distributed import Client, Future

VARIABLE = "NEMO_DASK"
"""The environment variable that chooses a cluster."""

DEATHS = 3
"""A prompt that was under way when so many workers died, one after the other, gets one more; then it has failed."""

PATIENCE = "20s"
"""How long a scheduler is waited for."""

Batch = tuple[Any, ...]
"""Jobs that are computed together: each a caption, or a tuple that begins with one."""

Task = Callable[..., Callable[[Batch], Any]]
"""Called once in each process with a pipeline and what all batches have in common; returns what computes a batch."""


class WorkersError(RuntimeError):
    """Workers that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a prompt that raised.

    Attributes:
        caption: The prompt.
        message: Type and text of the exception.
        details: Its traceback.
    """

    caption: str
    message: str
    details: str = field(default="", repr=False)


class FailedPrompts(RuntimeError):
    """Some prompts raised; all others are finished. The message has each caption with its error.

    Attributes:
        failures: What failed, in the order of the prompts.
    """

    def __init__(self, failures: Sequence[Failure], prompts: int) -> None:
        self.failures = tuple(failures)
        lines = [f"  {failure.caption!r}: {failure.message}" for failure in failures]
        super().__init__(
            f"{len(failures)} of {prompts} prompts failed after all others were finished; what is kept in a store is "
            "not computed again\n" + "\n".join(lines)
        )
        self.add_note(f"The first of them:\n{self.failures[0].details}")


def map_prompts(
    task: Task,
    batches: Sequence[Batch],
    *,
    pipe: StableDiffusionPipeline,
    common: Mapping[str, Any],
    label: str,
    finished: int = 0,
    ordered: bool = False,
    progress: bool = True,
) -> Iterator[tuple[Batch, Any]]:
    """Yield batches of prompts with what a task makes of them, as they come.

    Where a batch of several prompts raises, each of them is computed alone.

    Args:
        task: A function of a module, ``task(pipe, **common)``, that returns a function of a batch. What that returns
            must not depend on the batches before.
        batches: The batches; without any nothing is started.
        pipe: The pipeline. Workers load theirs from its profile.
        common: Plain values that all batches share.
        label: What the progress bar and the cluster call it.
        finished: How many prompts more there are, finished before.
        ordered: Whether to yield in the order of the batches.
        progress: Whether to show a progress bar.

    Raises:
        FailedPrompts: Prompts raised; after everything else was yielded.
        WorkersError: The cluster cannot be used, or a worker has another model or code.
    """
    prompts, failures = sum(map(len, batches)), {}
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(prompts + finished, label, enabled=progress and prompts > 0))
        bar.update(finished)
        client = stack.enter_context(cluster(pipe)) if batches else None
        found = (
            _here(task, batches, pipe, common) if client is None else _there(client, task, batches, pipe, common, label)
        )
        for place, outcomes in _sorted(found) if ordered else found:
            for batch, outcome in outcomes:
                bar.update(len(batch))
                if isinstance(outcome, Failure):
                    failures.setdefault(place, []).append(outcome)
                else:
                    yield batch, outcome
    if failures:
        raise FailedPrompts([item for place in sorted(failures) for item in failures[place]], prompts)


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
    profile = source if isinstance(source, Profile) else profile_of(source)
    choice = _choice(profile)
    if choice is None or _client is not None:
        yield None if choice is None else _client
        return
    with ExitStack() as stack:
        _client = _connect(choice, stack)
        try:
            yield _client
        finally:
            _client = None


_client: Client | None = None
"""The client of the outermost `cluster`."""


def _choice(profile: Profile | None) -> str | int | None:
    """Return the address of a scheduler, the number of local workers, or None for this process."""
    text = os.environ.get(VARIABLE, "").strip()
    kind, _, number = text.partition(":")
    if text == "off":
        return None
    if not text:
        return None if profile is None else profile.workers
    if kind == "local" and number.isascii() and number.isdigit() and int(number) > 0:
        choice: str | int = int(number)
    elif "://" in text:
        choice = text
    else:
        raise WorkersError(f"{VARIABLE} is {text!r}; expected tcp://host:port, local:4 or off")
    if profile is None:
        warnings.warn(
            f"{VARIABLE} is {text!r}, but the pipeline was not loaded from a profile, from which workers could load "
            "it; all is computed in this process",
            stacklevel=2,
        )
        return None
    return choice


def _connect(choice: str | int, stack: ExitStack) -> Client:
    """Return a client that is closed with the stack; with a number, of a new local cluster that ends with it."""
    try:
        import distributed
    except ImportError as error:
        raise WorkersError(
            'workers need Dask, which is not installed: pip install "nemolib[workers]" (or distributed)'
        ) from error
    if isinstance(choice, int):
        choice = stack.enter_context(_local(choice)).scheduler_address
    try:
        client = stack.enter_context(distributed.Client(choice, set_as_default=False, timeout=PATIENCE))
    except (OSError, ValueError, ImportError) as error:
        raise WorkersError(
            f"no Dask scheduler answers at {choice} ({VARIABLE}); start one with `dask scheduler` and workers with "
            f"`dask worker {choice} --nthreads 1`, or correct the address ({error})"
        ) from error
    if not client.scheduler_info(n_workers=-1)["workers"]:
        warnings.warn(f"the scheduler at {choice} has no worker yet; waiting for the first", stacklevel=2)
    return client


def _local(number: int) -> Any:
    """Return a cluster of processes on this machine: one thread each, and one GPU if there are any."""
    import logging

    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = _gpus()
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    specification = {}
    for place in range(number):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
        # Without a limit of memory: Dask's own would end a worker that loads a large model.
        options = {"nthreads": 1, "memory_limit": 0, "host": "127.0.0.1", "silence_logs": logging.CRITICAL}
        specification[place] = {"cls": Nanny, "options": options | {"env": one_thread | gpu}}
    # No prompt waits in a worker while another one is computed there, or it would be blamed if the worker dies.
    # Dask would set MALLOC_TRIM_THRESHOLD_ too: then glibc maps and unmaps memory for every large tensor, and a CPU is
    # a third slower.
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.nanny.pre-spawn-environ": one_thread,
    }
    with dask.config.set(settings):
        options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "allowed_failures": DEATHS}
        scheduler = {"cls": Scheduler, "options": options}
        try:
            return SpecCluster(workers=specification, scheduler=scheduler, silence_logs=logging.CRITICAL)
        except RuntimeError as error:
            raise WorkersError(
                f"{number} local workers could not start; a script must be a file whose work is under "
                f'if __name__ == "__main__", since every process reads it anew ({error})'
            ) from error


def _gpus() -> list[str]:
    """Return the names of the CUDA devices that this process may use."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(torch.cuda.device_count())) if given is None else given.split(",")
    return [name.strip() for name in names if name.strip()]


def _here(
    task: Task, batches: Sequence[Batch], pipe: StableDiffusionPipeline, common: Mapping[str, Any]
) -> Iterator[tuple[int, list[tuple[Batch, Any]]]]:
    """Yield the place of each batch and its outcomes, computed in this process."""
    if batches:
        function = task(pipe, **common)
        yield from ((place, _outcomes(function, batch)) for place, batch in enumerate(batches))


def _there(
    client: Client,
    task: Task,
    batches: Sequence[Batch],
    pipe: StableDiffusionPipeline,
    common: Mapping[str, Any],
    label: str,
) -> Iterator[tuple[int, list[tuple[Batch, Any]]]]:
    """Yield the place of each batch and its outcomes, as workers finish them."""
    from distributed import as_completed

    _check_untouched(pipe)
    run = _Run(uuid.uuid4().hex, profile_to_mapping(profile_of(pipe)), _identity(pipe), task, dict(common))
    name = f"{label.replace(' ', '-')}-{run.name}"
    waiting: dict[Future, int] = {}
    try:
        for place, batch in enumerate(batches):
            # What a prompt raises is a result. What is raised nonetheless is a worker's own, and another may do better.
            waiting[client.submit(_on_worker, _Work(run, batch), key=f"{name}-{place}", retries=2)] = place
        for future in as_completed(list(waiting), loop=client.loop):
            place = waiting.pop(future)
            yield place, _result(future, batches[place])
    finally:
        client.cancel(list(waiting), force=True)


def _sorted(found: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield what has places 0, 1, ... in this order; what comes early waits."""
    early: dict[int, Any] = {}
    due = 0
    for place, item in found:
        early[place] = item
        while due in early:
            yield due, early.pop(due)
            due += 1


def _result(future: Future, batch: Batch) -> list[tuple[Batch, Any]]:
    """Return the outcomes of a batch that a worker finished."""
    from concurrent.futures import CancelledError

    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        message = f"its worker died, {DEATHS + 1} times one after the other; is there enough memory? ({error})"
        return [((job,), Failure(_caption(job), message)) for job in batch]
    except WorkersError:
        raise
    except (CancelledError, FutureCancelledError) as error:
        raise WorkersError(f"the Dask scheduler is gone; run again, what is in a store is kept ({error})") from error
    except Exception as error:
        raise WorkersError(f"a worker could not begin: {type(error).__name__}: {error}") from error


def _outcomes(function: Callable[[Batch], Any], batch: Batch) -> list[tuple[Batch, Any]]:
    """Return a batch with its result; where it raises, each of its jobs alone with its result or failure."""
    try:
        return [(batch, function(batch))]
    except Exception as error:
        if len(batch) == 1:
            details = "".join(traceback.format_exception(error))
            return [(batch, Failure(_caption(batch[0]), f"{type(error).__name__}: {error}", details))]
    return [outcome for job in batch for outcome in _outcomes(function, (job,))]


def _caption(job: Any) -> str:
    return job if isinstance(job, str) else job[0]


@dataclass(frozen=True, slots=True)
class _Run:
    """What all batches of one call of `map_prompts` have in common, as plain data."""

    name: str
    profile: dict[str, Any]
    identity: dict[str, str]
    task: Task
    common: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Work:
    """One batch for a worker; one value, so that Dask does not look into it."""

    run: _Run
    batch: Batch


def _on_worker(work: _Work) -> list[tuple[Batch, Any]]:
    """Return the outcomes of a batch; one at a time in each process, since a pipeline serves one at a time."""
    with _LOCK:
        return _outcomes(_LOADED.function(work.run), work.batch)


class _Loaded:
    """What a worker keeps from batch to batch: the pipeline that was asked for last, and the function of a run."""

    def __init__(self) -> None:
        self._profile: dict[str, Any] | None = None
        self._pipe: StableDiffusionPipeline | None = None
        self._identity: dict[str, str] = {}
        self._run, self._function = "", None

    def function(self, run: _Run) -> Callable[[Batch], Any]:
        """Return the function of a run, made for the pipeline of its profile."""
        if self._run != run.name:
            self._function = None
            self._load(run.profile)
            _check_same(run.identity, self._identity)
            self._function, self._run = run.task(self._pipe, **run.common), run.name
        return self._function

    def _load(self, profile: dict[str, Any]) -> None:
        """Load the pipeline of a profile, unless it is there; the one before is given up first."""
        if self._profile != profile:
            self._run, self._pipe, self._profile = "", None, None
            self._pipe = load_pipeline(profile_from_mapping(profile, where="profile of the client"))
            self._identity = _identity(self._pipe)
            self._profile = profile


_LOCK = threading.Lock()
_LOADED = _Loaded()


def _identity(pipe: StableDiffusionPipeline) -> dict[str, str]:
    """Return what must be the same in two processes for one to compute for the other."""
    model = f"{str(pipe.unet.dtype).removeprefix('torch.')}, {model_hash(pipe)[:16]}"
    return {"model": model, "code": science_hash()[:16], "torch": versions()["torch"]}


def _check_same(here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Raise WorkersError if a worker would compute something else."""
    other = [f"{name} {there[name]} instead of {here[name]}" for name in here if here[name] != there[name]]
    if other:
        raise WorkersError(
            f"a worker has another {'; '.join(other)}. Workers load the model of the profile as it is: do not change "
            "its weights here, give all machines the same files and versions, and set dtype in the profile where some "
            "have a GPU and others have none (auto: float16 with CUDA, else float32); restart workers after a change"
        )


def _check_untouched(pipe: StableDiffusionPipeline) -> None:
    """Raise WorkersError while a context changes what the UNet computes; the workers' would not be changed."""
    hooked = any(module._forward_hooks for module in pipe.unet.modules())
    own = all(type(processor).__module__.startswith("diffusers.") for processor in pipe.unet.attn_processors.values())
    if hooked or not own:
        raise WorkersError(
            "the UNet has hooks or attention of another kind, which workers would not have; leave the context that "
            f"deactivates neurons or scales attention, or set {VARIABLE}=off"
        )
