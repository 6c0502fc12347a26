"""One run as several processes of torchrun: who has which share, sums over all, and what rank 0 does for them.

Every process runs the same stages on a share of the sequences, matrices or candidates; what they find is summed or
joined, so that all go on with the same numbers. Files and output are rank 0's alone (`once`). With one process every
function here does nothing but what its name says, without torch.distributed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from jpq_export import ranks
from jpq_export.errors import JpqError, ModelError, UsageError

T = TypeVar("T")
# The others wait as long as rank 0 works alone. A process that died is noticed at once, by its closed connection.
PATIENCE = timedelta(days=7)
FAREWELL = timedelta(seconds=5)  # how long others stay after a failure, so that rank 0 can tidy up: torchrun ends it
FAILED, ENDED = "jpq/failed", "jpq/ended"


class LostPeer(JpqError):
    """Another process of the run is gone; whoever failed first says why."""


class _State:
    """The run's key-value store, and whether rank 0 works alone at present."""

    store: Any = None
    alone = False


def start() -> None:
    """Join the other processes that torchrun started; JpqError when they cannot be reached."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _State.store, rank, size = next(iter(rendezvous("env://")))
        kind = _take_gpu(rank)
        dist.init_process_group(kind, store=_State.store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise JpqError(f"torchrun: the processes cannot reach each other ({_first_line(error)})") from error


def _take_gpu(rank: int) -> str:
    """The backend to talk by; where there are GPUs, this process's is chosen. UsageError when there are too few."""
    if not torch.cuda.is_available():
        return "gloo"
    here, gpus = ranks.local_world(), torch.cuda.device_count()
    if here > gpus:
        raise UsageError(
            f"torchrun: {here} processes for {gpus} GPU(s); start one a GPU, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    torch.cuda.set_device(rank % here)
    return "cpu:gloo,cuda:nccl"


def _terminated(_number: int, _frame: object) -> None:
    """Torchrun ends the processes that are left when one has failed: in order, and if none has, with a word."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise LostPeer(
        "stopped by torchrun: another process of this run ended without a word, killed for memory perhaps, or the run "
        "was terminated; see torchrun's report. The same command goes on after the last finished stage"
    )


def stop() -> None:
    """Close the connections to the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Until every process has come so far; LostPeer when one has failed instead."""
    if dist.is_initialized():
        with _together():
            dist.barrier()


def leave(code: int) -> NoReturn:
    """End this process of a run in which all have come to their end, without torch's own tidying up.

    Nothing is left to tidy, and gloo's threads now and then abort a process that ends in the ordinary way ("terminate
    called without an active exception"), which torchrun would take for a failure of all.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_to_fail() -> bool:
    """True for the one process of a failing run that tells the user."""
    try:
        return _State.store is None or _State.store.add(FAILED, 1) == 1
    except RuntimeError:
        return True  # torchrun itself is gone, and nobody can be asked


def part_in_failure() -> None:
    """Close the connections, which ends the others' waiting, and let rank 0 be the first to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends by itself, when its line is written
    stop()
    if _State.store is None:
        return
    try:
        if ranks.rank() == 0:
            _State.store.set(ENDED, "")
        else:
            _State.store.wait([ENDED], FAREWELL)
    except RuntimeError:
        return  # the store is torchrun's and may be gone before us, or rank 0 took too long: nothing left to wait for


@contextmanager
def _together() -> Iterator[None]:
    """Around every exchange: what torch raises when a process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(
            f"another process of this run ended without a word, killed for memory perhaps ({_first_line(error)}); see "
            "torchrun's report. The same command goes on after the last finished stage"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def world() -> int:
    """How many processes work together just now."""
    return dist.get_world_size() if dist.is_initialized() and not _State.alone else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if world() > 1 else 0


def lead() -> bool:
    """True for the process that writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def check_share(count: int, what: str) -> None:
    """UsageError when not every process would get one of `count` things."""
    if world() > count:
        raise UsageError(f"torchrun: {world()} processes, but only {count} {what}; start at most {count}")


def check_same(value: str, what: str) -> None:
    """ModelError when ranks hold different values of what must be one."""
    if len(set(gathered(value))) > 1:
        raise ModelError(
            f"{what}: the processes of this run have read different weights; give all of them the same model"
        )


def share(count: int) -> slice:
    """This rank's consecutive part of `count` things; parts differ by one at most and may be empty."""
    parts = np.array_split(np.arange(count), world())
    start = sum(len(part) for part in parts[: rank()])
    return slice(start, start + len(parts[rank()]))


def spread(costs: list[float]) -> list[int]:
    """The rank that does each job, so that all have about equal work: the dearest first, each to whoever has least."""
    owners, load = [0] * len(costs), [0.0] * world()
    for job in sorted(range(len(costs)), key=lambda j: -costs[j]):
        owners[job] = load.index(min(load))
        load[owners[job]] += costs[job]
    return owners


def once(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What rank 0 gets from `function`, on every rank; a JpqError it raises is raised on all.

    Inside, rank 0 works alone: nothing it calls waits for the others.
    """
    if world() == 1:
        return function(*args, **kwargs)
    result: list[Any] = [None, None]
    if rank() == 0:
        _State.alone = True
        try:
            result[0] = function(*args, **kwargs)
        except JpqError as error:
            result[1] = error
        finally:
            _State.alone = False
    with _together():
        dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(out, value)
    return out


def add_up(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place; the same bits on all of them."""
    if world() > 1:
        with _together():
            dist.all_reduce(tensor)
    return tensor


def joined(part: Tensor) -> Tensor:
    """The ranks' parts one behind the other: [n_r, ...] of every rank r -> [sum of n_r, ...]."""
    if world() == 1:
        return part
    out = []
    for source, length in enumerate(gathered(len(part))):
        shape = (length, *part.shape[1:])
        piece = part.contiguous() if source == rank() else part.new_empty(shape)
        _broadcast(piece, source)
        out.append(piece)
    return torch.cat(out)


def from_rank(source: int, tensor: Tensor) -> Tensor:
    """What rank `source` has; the others give a tensor of the same shape, whose values do not matter."""
    if world() > 1:
        tensor = tensor.contiguous()
        _broadcast(tensor, source)
    return tensor


def _broadcast(tensor: Tensor, source: int) -> None:
    """As bytes: gloo does not know every type. `tensor` is contiguous."""
    if tensor.numel():
        with _together():
            dist.broadcast(tensor.view(torch.uint8), source)
