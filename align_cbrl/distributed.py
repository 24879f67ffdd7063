"""One run in several processes, one of them on each device: what they share, and who writes.

torchrun or accelerate starts the same program once for each *rank*. Every rank holds the whole leader and works on its
own rows of the batch. Small numbers a row (utilities, log-probabilities) are gathered, so that every rank knows the
whole batch's credit; gradients are summed, so that every rank takes the same step. In one process nothing here
communicates, and no function changes what it is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align_cbrl.errors import InputError, RunStopped

# How long a rank waits for another, who may be asking a slow judge. A rank that died is noticed at once: its
# connections close, and the launcher ends the others.
_PATIENCE = timedelta(minutes=30)
_COMMANDS = (
    "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 ...`, or `ACCELERATE_USE_CPU=true accelerate launch "
    "--multi_gpu --num_processes 2 ...`; on GPUs leave ACCELERATE_USE_CPU out"
)


def initialize() -> None:
    """Join the other processes of this run, if a launcher started several; called before anything is built.

    The processes talk through NCCL where there is a GPU for each, else through gloo. Calling it again does nothing.

    Raises:
        InputError: the command would silently run one process, or several that do not know of each other.
    """
    check_launch(os.environ)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or dist.is_initialized():
        if size != world_size():
            raise InputError(
                f"WORLD_SIZE={size}: expected a process group of that size, got {world_size()} processes; something "
                "made another group before align-cbrl started, so let it start the group"
            )
        return
    if size == 1:
        return
    if torch.cuda.is_available() and not _truthy(os.environ.get("ACCELERATE_USE_CPU", "")):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cuda:nccl,cpu:gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse commands that ask for several processes and do not get them.

    `accelerate launch --cpu --num_processes 2`, and the same without `--multi_gpu` or with a configuration that says
    MULTI_CPU, start ONE process: accelerate leaves that to mpirun. What gives it away (accelerate 1.x) is an address to
    meet at, MASTER_ADDR, which it sets for several processes only, without the number of those who meet, WORLD_SIZE.

    Args:
        environment: the process's environment variables.

    Raises:
        InputError: such a command, or mpirun without the variables that torch reads.

    Example:
        >>> check_launch({"ACCELERATE_MIXED_PRECISION": "no"})  # accelerate launch --num_processes 1
        >>> check_launch({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})
        Traceback (most recent call last):
        align_cbrl.errors.InputError: launch command: expected several processes, as it asks for, got one; ...
    """
    if "WORLD_SIZE" in environment:
        return
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if int(environment.get(name, "1")) > 1:
            raise InputError(
                f"launch command: {name}={environment[name]}: expected processes that know of each other, got as many "
                f"separate runs; start with {_COMMANDS}"
            )
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "launch command: expected several processes, as it asks for, got one; `accelerate launch` starts a single "
            "process with --cpu, without --multi_gpu, and with distributed_type: MULTI_CPU. Start with "
            f"{_COMMANDS}. If one process is meant, unset MASTER_ADDR and ask for --num_processes 1"
        )


def rank() -> int:
    """This process's number, from 0; 0 in a run of one process.

    Example:
        >>> rank(), world_size(), is_main()
        (0, 1, True)
    """
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes this run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only one that writes files and draws progress bars."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_(values: nn.Module | Iterable[Tensor]) -> None:
    """Give every rank the numbers of rank 0, in place: tensors, or a module's parameters and buffers.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> broadcast_(layer)  # in one process: nothing happens
    """
    if world_size() == 1:
        return
    tensors = [*values.parameters(), *values.buffers()] if isinstance(values, nn.Module) else values
    for tensor in tensors:
        moved = tensor.detach().to(_device()).contiguous()
        dist.broadcast(moved, src=0)
        with torch.no_grad():
            tensor.copy_(moved)


def gather_rows(value: Tensor) -> Tensor:
    """The rows of every rank, those of rank 0 first: [B, ...] to [sum of B, ...], detached, on the device it was on.

    Ranks may hold different numbers of rows. What lies behind the first axis is the same on all of them.

    Example:
        >>> gather_rows(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    return gather_together([value])[0]


def gather_together(values: Sequence[Tensor]) -> list[Tensor]:
    """`gather_rows` of several tensors that have the same rows, in as many messages as one takes.

    Example:
        >>> first, second = gather_together([torch.tensor([1.0, 2.0]), torch.tensor([[True], [False]])])
        >>> second.tolist()
        [[True], [False]]
    """
    if world_size() == 1 or not values:
        return list(values)
    # Each row as bytes, side by side: types and widths differ, and all of them travel at once.
    rows = [
        value.detach().to(_device()).reshape(len(value), math.prod(value.shape[1:])).contiguous().view(torch.uint8)
        for value in values
    ]
    counts = _row_counts(len(values[0]))
    mine = torch.zeros(max(counts), sum(row.shape[1] for row in rows), dtype=torch.uint8, device=_device())
    mine[: len(values[0])] = torch.cat(rows, 1)
    everyone = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(everyone, mine)
    whole = torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)])
    pieces = torch.split(whole, [row.shape[1] for row in rows], 1)
    return [
        piece.contiguous().view(value.dtype).reshape(len(whole), *value.shape[1:]).to(value.device)
        for piece, value in zip(pieces, values, strict=True)
    ]


def gather_lists(rows: list[Any]) -> list[Any]:
    """As `gather_rows`, of lists of anything that can be pickled.

    Example:
        >>> gather_lists([[1], [2, 3]])
        [[1], [2, 3]]
    """
    if world_size() == 1:
        return rows
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, rows)
    return [row for theirs in everyone for row in theirs]


def own_rows(count: int) -> slice:
    """Where this rank's `count` rows stand in what `gather_rows` returns; every rank has to ask.

    Example:
        >>> own_rows(3)
        slice(0, 3, None)
    """
    start = sum(_row_counts(count)[: rank()]) if world_size() > 1 else 0
    return slice(start, start + count)


def share(count: int) -> slice:
    """Which of `count` things that all ranks know are this rank's to do: consecutive, and nearly equally many.

    Raises:
        InputError: fewer things than ranks.

    Example:
        >>> share(5)
        slice(0, 5, None)
    """
    size, here = world_size(), rank()
    if count < size:
        raise InputError(f"expected at least one context for each of {size} processes, got {count}; draw more")
    return slice(count * here // size, count * (here + 1) // size)


def sum_gradients_(parameters: Sequence[Tensor]) -> None:
    """Replace every `.grad` by its sum over ranks; a parameter without one on any rank keeps none.

    The sum, not the mean: a rank's gradient is that of its rows' share of the whole batch's objective.

    Example:
        >>> x = torch.zeros(1, requires_grad=True)
        >>> (3 * x).sum().backward()
        >>> sum_gradients_([x])
        >>> x.grad.item()
        3.0
    """
    if world_size() == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=_device())
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    for parameter, somewhere in zip(parameters, present.tolist(), strict=True):
        if somewhere:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = grad.to(_device()).contiguous()
            dist.all_reduce(total)
            parameter.grad = total.to(grad.device)


def sum_(value: Tensor) -> Tensor:
    """The sum of a tensor that every rank has over all of them; it may be taken in place.

    Example:
        >>> sum_(torch.tensor([1.0, 2.0])).tolist()
        [1.0, 2.0]
    """
    if world_size() == 1:
        return value
    total = value.detach().to(_device()).contiguous()
    dist.all_reduce(total)
    return total.to(value.device)


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuse a run whose ranks were built from different things; every rank has to ask.

    Args:
        facts: plain values by name, such as `align_cbrl.runs.facts.settings_of` describes objects with, flat.

    Raises:
        InputError: what differs first, on which rank, and both values.

    Example:
        >>> check_same({"config.steps": 3})  # in one process: nothing happens
    """
    if world_size() == 1:
        return
    mine = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.sha256(repr(sorted(mine.items())).encode("utf-8", "surrogatepass")).digest()[:8]
    of_ranks = gather_rows(torch.tensor([int.from_bytes(digest, "big", signed=True)]))
    if bool((of_ranks == of_ranks[0]).all()):
        return
    first, *others = gather_lists([mine])
    for number, theirs in enumerate(others, start=1):
        for name in first | theirs:
            if first.get(name) != theirs.get(name):
                raise InputError(
                    f"{name}: expected the same on every process, got {first.get(name, 'nothing')} on rank 0 and "
                    f"{theirs.get(name, 'nothing')} on rank {number}; build everything alike on all of them. What may "
                    "differ, such as the name of a log file, does not belong into an argument or a closure; or give "
                    "its object an attribute `identity`"
                )


def any_rank(here: bool) -> bool:
    """Whether it is so on any rank, such as a Ctrl-C that arrived; every rank has to ask.

    Example:
        >>> any_rank(False)
        False
    """
    if world_size() == 1:
        return here
    found = torch.tensor([here], dtype=torch.int32, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Do something that may fail on one rank only; when it does, all stop, so that rank 0 can save the run.

    Without it the others would wait for a rank that has given up. The block must not communicate.

    Args:
        what: for the others' message.

    Raises:
        Exception: as the block raises here.
        RunStopped: the block raised on another rank.

    Example:
        >>> with together("asking the judge"):
        ...     answer = 42
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = gather_rows(torch.tensor([error is not None]))
    if error is not None:
        raise error
    if failed.any():
        raise RunStopped(f"{what} failed on rank {int(failed.nonzero()[0])}, whose message says why")


def _row_counts(count: int) -> list[int]:
    mine = torch.tensor([count], device=_device())
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return [int(number) for number in everyone]


def _device() -> torch.device:
    """Where tensors must lie to travel: NCCL takes those of a GPU only."""
    on_gpu = torch.cuda.is_available() and "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _truthy(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "y", "on", "t")
