"""The threshold of BatchTopK set so that L0 is what was asked for, over many batches at once.

While training the threshold is a running mean of each batch's least kept activation. It lags behind the
weights, so that L0 is off by some percent when training ends. Here it is put between the two activations that
part the ``target_l0`` · rows largest from the rest, so that L0 over these rows is exact. Over other text it
is not: a held-out part that differs from the training part has an L0 of its own.

Cost: a pass through the encoder; in memory ``target_l0`` numbers to each row, and one batch.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .autoencoder import Autoencoder


@torch.no_grad()
def calibrate_threshold(
    autoencoder: Autoencoder, batches: Iterable[tuple[Tensor, Sequence[int] | Tensor, Tensor]], most_rows: int
) -> float:
    """Set the threshold from rows of the training part; returns it.

    Nothing else of the autoencoder changes, and how the rows are cut into batches does not matter.

    Args:
        autoencoder: trained; with a ``threshold`` (a scalar) and a ``target_l0``, as in BatchTopK.
        batches: activations [rows, d_model], range offsets and positions [rows], as ``forward`` takes them.
        most_rows: batches are taken while they fit into so many rows.

    Raises:
        ValueError: not one batch fits, or there is none.
    """
    was_training = autoencoder.training
    autoencoder.eval()
    threshold, target_l0 = cast(Tensor, autoencoder.threshold), cast(int, autoencoder.target_l0)
    threshold.fill_(0)  # the code is then all that is above 0
    largest = torch.zeros(0, device=threshold.device)
    n_rows = 0
    for x, offsets, positions in batches:
        if n_rows + len(x) > most_rows:
            break
        n_rows += len(x)
        code = autoencoder(x, offsets, positions).code
        largest = torch.cat([largest, code[code > 0]])
        # One more than can be kept in the end: the threshold lies between the last kept and the next.
        largest = largest.topk(min(target_l0 * most_rows + 1, len(largest)), sorted=False).values
    if not n_rows:
        raise ValueError(
            f"no batch of at most {most_rows} rows was given, so there is nothing to calibrate by"
        )
    n_kept = target_l0 * n_rows
    if len(largest) > n_kept:
        last, following = largest.sort(descending=True).values[n_kept - 1 : n_kept + 1]
        # Of neighbours in float32 the middle may be the upper one, which must be kept.
        threshold.copy_(torch.minimum((last + following) / 2, torch.nextafter(last, following)))
    autoencoder.train(was_training)
    return float(threshold)
