"""One pass over a store for one run, or for several that read the same batches."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from ...store.errors import StoreIncompleteError
from ..device import free_bytes
from ..processes import processes_here
from ..progress import Progress, Silent
from .checkpoints import CheckpointWriter
from .interrupts import held_back
from .ongoing import Ongoing, Watch
from .resident import LayerMemory
from .setup import Setup

AnySetup = TypeVar("AnySetup", bound=Setup)


def side_by_side(runs: Sequence[AnySetup], most: int) -> list[list[AnySetup]]:
    """Group runs that can share a pass, as many per group as half of the free memory holds.

    Args:
        runs: the runs, in the order wanted; a group takes the place of its first member.
        most: maximum number of runs per group.
    """
    groups: list[list[AnySetup]] = []
    open_groups: dict[tuple[Any, ...], list[AnySetup]] = {}
    for run in runs:
        group = open_groups.get(run.reads)
        room = free_bytes(run.device) // 2
        if group is None or len(group) == most or sum(t.n_bytes for t in (*group, run)) > room:
            group = open_groups[run.reads] = []
            groups.append(group)
        group.append(run)
    return groups


def train_together(
    runs: Sequence[Ongoing],
    progress: Progress | None = None,
    memory: LayerMemory | None = None,
    watch: Watch | None = None,
) -> None:
    """Train several runs in one pass over their store; each gets the same weights as alone.

    If they resume at different steps, reading starts at the earliest of these, and the others skip ahead.

    Args:
        runs: at least one; all have equal ``reads``.
        progress: of the tokens of all of them together.
        memory: keeps their layer decoded, if it does.
        watch: receives each line of metrics.

    Raises:
        StoreIncompleteError: the store has no token to train on.
        StoreDamagedError: a chunk is missing or not what was written.
        StoreWriteError: the disk refused.
    """
    progress = progress or Silent()
    first, team = runs[0].training, runs[0].state.team
    if any(one.training.reads != first.reads for one in runs):
        raise ValueError("runs that read different batches cannot share a pass")
    asked_size = first.settings.batch_size
    start, stop = min(one.start for one in runs), max(one.stop for one in runs)
    n_steps, n_before = sum(one.stop for one in runs), sum(one.start for one in runs)
    decoded = (memory or LayerMemory("never")).of(
        first.store, first.layer, first.n_contexts, n_tokens=(stop - start) * asked_size, device=first.device
    )
    batches = first.batches(decoded, team)
    if batches.is_empty:
        raise StoreIncompleteError(
            f"{first.store.root} has no token to train on in layer {first.layer}; harvest more contexts"
        )
    size, usual_size = asked_size, batches.usual_size
    if usual_size < asked_size // 2:
        size = usual_size
        progress.say(
            f"batches have {size:,} tokens and not {asked_size:,}: a window of "
            f"{batches.order.window_chunks * batches.order.chunk_contexts:,} contexts holds no more"
        )
    progress.begin("training", n_steps * size, "tokens", n_before * size)
    is_alone = processes_here().n_processes == 1
    with CheckpointWriter() as writer, held_back(is_alone=is_alone) as interrupt:
        for batch in batches.steps(start, stop):
            x = batch.on_device.to(torch.float32)
            taking = [one for one in runs if one.start <= batch.step < one.stop]
            for one in taking:
                progress.advance(size, one.take(batch, x, watch))
            # An interrupt that arrives during this exchange takes effect after the next step.
            asked = team.agreed(interrupt.asked)
            for one in taking:
                # A run that ends before the others is checkpointed until all are done.
                is_due = one.step == one.stop or one.step % one.training.settings.checkpoint_steps == 0
                if one.step < stop and (is_due or asked):
                    one.save_checkpoint(writer)
            if asked and batch.step + 1 < stop:
                writer.wait()
                interrupt.stop()
        progress.end()
        writer.wait()
        for one in runs:
            one.finish(batches)
        if interrupt.asked:
            interrupt.stop()
