"""One run in several processes: each takes a part of every batch, and all hold the same weights.

Started by torchrun; uses ``torch.distributed`` with gloo on CPUs and NCCL on GPUs. The weights equal those of
one process up to the order of summation. Only the first process writes the run. Each step sends twice the
size of the gradients through the network, per process; small gradients are sent together, and on GPUs the
host waits for no other process. Each process decodes its own part of the store and reads all token ids.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ...store.errors import SettingsError
from ..errors import RunError
from ..sae.share import Share

T = TypeVar("T")

_TOGETHER = 2**18
"""Gradients with fewer numbers are sent in one message."""

_PATIENCE = timedelta(minutes=30)
"""Timeout for other processes: the first may be writing a checkpoint, or reading all sums of a store."""


class Team(Share):
    """The processes that share a run; here a single one, which computes everything.

    Attributes:
        number: this process's rank, from 0.
        n_processes: number of processes.
        weight: this process's share of the batch's rows.
    """

    number: int = 0
    n_processes: int = 1
    weight: float = 1.0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run and prints."""
        return self.number == 0

    def begin(self, places: NDArray[np.int64], n_rows: int) -> None:
        """Announce this process's rows of the next batch.

        Args:
            places: their indices in the whole batch; int64 [rows].
            n_rows: rows of the whole batch.
        """

    def told(self, value: T) -> T:
        """The first process's ``value``."""
        return value

    def sent(self, made: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """The tensors that the first process makes; None in that process itself."""
        return None

    def gathered(self, value: T) -> list[T]:
        """Every process's ``value``."""
        return [value]

    def any(self, flags: Tensor) -> Tensor:
        """Flags that are set in at least one process; bool, of the shape of ``flags``."""
        return flags

    def agreed(self, asked: bool) -> bool:
        """Whether any process was asked; with several processes, as of the previous call."""
        return asked

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes."""

    def leave(self) -> None:
        """Leave the process group; every rank must call this."""


class Several(Team):
    """One of several processes. Its methods are collective: every rank calls them, in the same order."""

    def __init__(self) -> None:
        """Use the initialised process group."""
        self.number, self.n_processes = dist.get_rank(), dist.get_world_size()
        self._n_rows = 0
        self._places = np.zeros(0, np.int64)
        self._agreeing: tuple[Tensor, Any] | None = None

    def begin(self, places: NDArray[np.int64], n_rows: int) -> None:
        """As ``Team.begin``; a process without rows gives the autoencoder a dummy row of weight 0."""
        self._n_rows, self._places = n_rows, places
        self.weight = len(places) / n_rows

    def n_rows(self, n_here: int) -> int:
        """As ``Share.n_rows``."""
        return self._n_rows

    def mean(self, of_rows: Tensor) -> Tensor:
        """As ``Share.mean``."""
        mean = of_rows.detach() * self.weight
        _add(mean)
        # The check keeps inf - inf, which is NaN, out of the mean.
        return mean + (of_rows - of_rows.detach()) if of_rows.requires_grad else mean

    def all_values(self, values: Tensor) -> Tensor:
        """As ``Share.all_values``; sends the largest number of values of a process, times the processes."""
        values = values.detach().float() if self.weight else values.new_zeros(0).float()
        lengths = [int(n) for n in self._all(torch.tensor([len(values)], device=values.device))]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        return torch.cat([one[:n] for one, n in zip(self._all(padded), lengths, strict=True)])

    def largest(self, values: Tensor, n: int) -> Tensor:
        """As ``Share.largest``; sends ``n`` values times the processes."""
        mine = values.new_zeros(n)  # values are at least 0, so padding with 0 changes nothing
        if self.weight:
            mine[: len(values)] = values
        return torch.cat(self._all(mine)).topk(n, sorted=False).values

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor; all have the same shape."""
        tensors = [torch.empty_like(tensor) for _ in range(self.n_processes)]
        with _reaching_others():
            dist.all_gather(tensors, tensor)  # pyright: ignore[reportUnknownMemberType]
        return tensors

    def drawn(self, n_here: int, draw: Callable[[int], Tensor]) -> Tensor:
        """As ``Share.drawn``: every process draws for all rows, from equal generators."""
        drawn = draw(self._n_rows)
        places = torch.as_tensor(self._places) if self.weight else torch.zeros(n_here, dtype=torch.int64)
        return drawn[places.to(drawn.device)]

    def told(self, value: T) -> T:
        """As ``Team.told``; the value is pickled."""
        box: list[Any] = [value]
        with _reaching_others():
            dist.broadcast_object_list(box)
        return cast(T, box[0])

    def sent(self, made: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """As ``Team.sent``; tensors on the CPU, one after another."""
        tensors = dict(made()) if self.is_first else {}
        shapes = self.told({name: (tuple(one.shape), one.dtype) for name, one in tensors.items()})
        for name, (shape, dtype) in shapes.items():
            tensor = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            tensors[name] = tensor.contiguous()
            with _reaching_others():
                # As bytes: not every dtype can be sent.
                dist.broadcast(tensors[name].reshape(-1).view(torch.uint8), 0)
        return None if self.is_first else tensors

    def gathered(self, value: T) -> list[T]:
        """As ``Team.gathered``; the values are pickled."""
        values: list[T | None] = [None] * self.n_processes
        with _reaching_others():
            dist.all_gather_object(values, value)  # pyright: ignore[reportUnknownMemberType]
        return cast("list[T]", values)

    def any(self, flags: Tensor) -> Tensor:
        """As ``Team.any``."""
        union = flags.to(torch.uint8) if self.weight else torch.zeros_like(flags, dtype=torch.uint8)
        _take_maximum(union)
        return union.bool()

    def agreed(self, asked: bool) -> bool:
        """As ``Team.agreed``: the result of the previous call, so that no process waits."""
        before = self._agreeing
        flag = torch.tensor([asked], dtype=torch.uint8)
        with _reaching_others():
            self._agreeing = (flag, _begin_to_reduce(flag, dist.ReduceOp.MAX))
            if before is not None:
                before[1].wait()
        return before is not None and bool(before[0])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """As ``Team.add_gradients``.

        Every rank has the same list of gradients, as one without rows computes on a dummy row.
        """
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        large = [gradient for gradient in gradients if gradient.numel() >= _TOGETHER]
        small = [gradient for gradient in gradients if gradient.numel() < _TOGETHER]
        together = torch.cat([gradient.flatten() for gradient in small]) if small else None
        with _reaching_others():
            messages = large if together is None else [*large, together]
            for adding in [_begin_to_reduce(tensor, dist.ReduceOp.SUM) for tensor in messages]:
                adding.wait()  # on a GPU the stream waits, not the host
        if together is not None:
            parts = torch.split(together, [gradient.numel() for gradient in small])
            for gradient, part in zip(small, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def settle(self) -> None:
        """Wait for the pending reduction, as long as the other processes exist."""
        before, self._agreeing = self._agreeing, None
        if before is not None:
            with suppress(RuntimeError):
                before[1].wait()

    def leave(self) -> None:
        """As ``Team.leave``: with an open group the last process would wait for the others."""
        self.settle()
        if dist.is_initialized():
            dist.destroy_process_group()


def _begin_to_reduce(tensor: Tensor, by: Any) -> Any:
    """Start replacing a tensor by the sum or maximum over all processes; return the handle to wait for."""
    return cast(Any, dist.all_reduce(tensor, by, async_op=True))  # pyright: ignore[reportUnknownMemberType]


def _add(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    with _reaching_others():
        dist.all_reduce(tensor)  # pyright: ignore[reportUnknownMemberType]


def _take_maximum(tensor: Tensor) -> None:
    """Replace each number by its maximum over all processes."""
    with _reaching_others():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def joined(device: torch.device) -> Generator[Several]:
    """Join the processes that torchrun started for one run.

    Args:
        device: this process trains on it.

    Raises:
        SettingsError: processes cannot communicate from this device, or two of them have the same GPU.
        RunError: another process cannot be reached.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not dist.is_nccl_available()):
        raise SettingsError(
            f"several processes cannot share a run on device {device}; give --device cpu, or start only one"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _reaching_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    several = Several()
    try:
        if device.type == "cuda":
            gpu = cast(Any, torch.cuda.get_device_properties(device))  # pyright: ignore[reportUnknownMemberType]
            refuse_shared(several.gathered(str(gpu.uuid)))
        yield several
    finally:
        several.leave()


def refuse_shared(gpus: Sequence[str]) -> None:
    """Refuse two processes on the same GPU, which NCCL does not support.

    Args:
        gpus: the identifier of each process's GPU.

    Raises:
        SettingsError: two of them are equal.
    """
    n_gpus = len(set(gpus))
    if n_gpus < len(gpus):
        raise SettingsError(
            f"{len(gpus)} processes would share {n_gpus} {'GPU' if n_gpus == 1 else 'GPUs'}; "
            "start one process per GPU, and leave out --device"
        )


@contextmanager
def _reaching_others() -> Generator[None]:
    """Report a failure in here as the loss of another process, or of the connection to it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0].partition(". ")[0]
        raise RunError(
            f"another process of this run cannot be reached ({why}); it may have ended: run the same command "
            "again to resume from the last checkpoint"
        ) from error
