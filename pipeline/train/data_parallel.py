"""One training in several processes: each has a part of every batch, and all have the same weights.

Started by torchrun, by ``torch.distributed``: gloo on CPUs, NCCL on GPUs. The weights are those that one
process has of the same batches, but for the order in which numbers are added. The first process keeps the
run; no other writes. Costs a step: twice the gradients' size through the network, for each process. Small
gradients go together, and on GPUs no step waits on the host for the others. Each process decodes its part of
the store alone, and reads all token ids.
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
"""Gradients of fewer numbers go through the network together."""

_PATIENCE = timedelta(minutes=30)
"""How long others are waited for: the first may be writing a checkpoint, or reading all of a store's sums."""


class Team(Share):
    """The processes that share a training: here one, which has it all.

    Attributes:
        number: which process this is, from 0.
        n_processes: how many there are.
        weight: rows of the batch that are here, as a share of all of its rows.
    """

    number: int = 0
    n_processes: int = 1
    weight: float = 1.0

    @property
    def is_first(self) -> bool:
        """Whether this process keeps the run, and talks."""
        return self.number == 0

    def begin(self, places: NDArray[np.int64], n_rows: int) -> None:
        """Say which rows of the next batch are here.

        Args:
            places: where they stand in the whole batch; int64 [rows].
            n_rows: of the whole batch.
        """

    def told(self, value: T) -> T:
        """What the first process has as ``value``."""
        return value

    def sent(self, made: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
        """What the first process makes; None to that one itself."""
        return None

    def gathered(self, value: T) -> list[T]:
        """What each process has as ``value``."""
        return [value]

    def any(self, flags: Tensor) -> Tensor:
        """Which flags are set in some process; bool, of the shape of ``flags``."""
        return flags

    def agreed(self, asked: bool) -> bool:
        """Whether some process was asked; of several, when this was called before the last time."""
        return asked

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum over all processes in place of each gradient."""

    def leave(self) -> None:
        """Nothing that needs the others follows; all call it."""


class Several(Team):
    """One of several processes.

    Whatever needs the others has to be called by all of them, in the same order.
    """

    def __init__(self) -> None:
        """Of a process group that was begun."""
        self.number, self.n_processes = dist.get_rank(), dist.get_world_size()
        self._n_rows = 0
        self._places = np.zeros(0, np.int64)
        self._agreeing: tuple[Tensor, Any] | None = None

    def begin(self, places: NDArray[np.int64], n_rows: int) -> None:
        """As ``Team.begin``; where no row is here, give the autoencoder one: it counts nothing."""
        self._n_rows, self._places = n_rows, places
        self.weight = len(places) / n_rows

    def n_rows(self, n_here: int) -> int:
        """As ``Share.n_rows``."""
        return self._n_rows

    def mean(self, of_rows: Tensor) -> Tensor:
        """As ``Share.mean``."""
        mean = of_rows.detach() * self.weight
        _add(mean)
        # What is infinite less itself is no number, and of no process's rows the mean.
        return mean + (of_rows - of_rows.detach()) if of_rows.requires_grad else mean

    def all_values(self, values: Tensor) -> Tensor:
        """As ``Share.all_values``; costs a transfer of the most that a process has, times the processes."""
        values = values.detach().float() if self.weight else values.new_zeros(0).float()
        lengths = [int(n) for n in self._all(torch.tensor([len(values)], device=values.device))]
        padded = values.new_zeros(max(lengths))
        padded[: len(values)] = values
        return torch.cat([one[:n] for one, n in zip(self._all(padded), lengths, strict=True)])

    def largest(self, values: Tensor, n: int) -> Tensor:
        """As ``Share.largest``; costs a transfer of ``n`` times the processes."""
        mine = values.new_zeros(n)  # nothing is below 0, so that 0 changes nothing
        if self.weight:
            mine[: len(values)] = values
        return torch.cat(self._all(mine)).topk(n, sorted=False).values

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """The tensor that each process has here, all of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.n_processes)]
        with _reaching_others():
            dist.all_gather(found, tensor)  # pyright: ignore[reportUnknownMemberType]
        return found

    def drawn(self, n_here: int, draw: Callable[[int], Tensor]) -> Tensor:
        """As ``Share.drawn``: every process draws for all rows, and so from the same generator."""
        drawn = draw(self._n_rows)
        places = torch.as_tensor(self._places) if self.weight else torch.zeros(n_here, dtype=torch.int64)
        return drawn[places.to(drawn.device)]

    def told(self, value: T) -> T:
        """As ``Team.told``; of what can be pickled."""
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
                # Of bytes, as not every number can be sent.
                dist.broadcast(tensors[name].reshape(-1).view(torch.uint8), 0)
        return None if self.is_first else tensors

    def gathered(self, value: T) -> list[T]:
        """As ``Team.gathered``; of what can be pickled."""
        found: list[T | None] = [None] * self.n_processes
        with _reaching_others():
            dist.all_gather_object(found, value)  # pyright: ignore[reportUnknownMemberType]
        return cast("list[T]", found)

    def any(self, flags: Tensor) -> Tensor:
        """As ``Team.any``."""
        found = flags.to(torch.uint8) if self.weight else torch.zeros_like(flags, dtype=torch.uint8)
        _keep_most(found)
        return found.bool()

    def agreed(self, asked: bool) -> bool:
        """As ``Team.agreed``: what was agreed on the last time, so that nobody waits for the others."""
        before = self._agreeing
        flag = torch.tensor([asked], dtype=torch.uint8)
        with _reaching_others():
            self._agreeing = (flag, _begin_to_reduce(flag, dist.ReduceOp.MAX))
            if before is not None:
                before[1].wait()
        return before is not None and bool(before[0])

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """As ``Team.add_gradients``.

        All processes compute the same, on rows or on one that counts nothing: so all have the same gradients.
        """
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        large = [gradient for gradient in gradients if gradient.numel() >= _TOGETHER]
        small = [gradient for gradient in gradients if gradient.numel() < _TOGETHER]
        together = torch.cat([gradient.flatten() for gradient in small]) if small else None
        with _reaching_others():
            wanted = large if together is None else [*large, together]
            for adding in [_begin_to_reduce(tensor, dist.ReduceOp.SUM) for tensor in wanted]:
                adding.wait()  # on a GPU the stream waits, not the host
        if together is not None:
            parts = torch.split(together, [gradient.numel() for gradient in small])
            for gradient, part in zip(small, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def settle(self) -> None:
        """Wait for what was begun and is not asked for any more, as long as the others are there."""
        before, self._agreeing = self._agreeing, None
        if before is not None:
            with suppress(RuntimeError):
                before[1].wait()

    def leave(self) -> None:
        """As ``Team.leave``: what is left open would have the last process wait for those that went."""
        self.settle()
        if dist.is_initialized():
            dist.destroy_process_group()


def _begin_to_reduce(tensor: Tensor, by: Any) -> Any:
    """Begin to put the sum, or the largest, of all processes in place of a tensor; gives what to wait for."""
    return cast(Any, dist.all_reduce(tensor, by, async_op=True))  # pyright: ignore[reportUnknownMemberType]


def _add(tensor: Tensor) -> None:
    """Put the sum over all processes in place of a tensor."""
    with _reaching_others():
        dist.all_reduce(tensor)  # pyright: ignore[reportUnknownMemberType]


def _keep_most(tensor: Tensor) -> None:
    """Put the largest of all processes in place of each number."""
    with _reaching_others():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def joined(device: torch.device) -> Generator[Several]:
    """This process among those that torchrun started for one training.

    Args:
        device: the one that it trains on.

    Raises:
        SettingsError: it has no way to talk to the others from this device, or two of them have one GPU.
        RunError: the others cannot be reached.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not dist.is_nccl_available()):
        raise SettingsError(
            f"several processes cannot share a training on device {device}; give --device cpu, or start one"
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
    """Refuse that two processes use the same GPU: NCCL cannot bring them together.

    Args:
        gpus: what names each process's.

    Raises:
        SettingsError: two of them are the same.
    """
    n_gpus = len(set(gpus))
    if n_gpus < len(gpus):
        raise SettingsError(
            f"{len(gpus)} processes would share a training on {n_gpus} {'GPU' if n_gpus == 1 else 'GPUs'}; "
            "start as many as there are GPUs, and leave --device out"
        )


@contextmanager
def _reaching_others() -> Generator[None]:
    """What fails here does so because another process, or the way to it, has gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0].partition(". ")[0]
        raise RunError(
            f"another process of this training cannot be reached ({why}); it may have ended: run the same "
            "command again to go on at the last checkpoint"
        ) from error
