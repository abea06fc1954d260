"""How many of the contexts that are scored a run was trained on: those with the same tokens.

Costs reading the tokens of both and some microseconds a context; memory for 16 bytes of each that is scored.
"""

import numpy as np
from numpy.typing import NDArray

from ....store.reader import ActivationStore
from ...harvest.corpus import digests_of

_AT_ONCE = 65536


def n_seen(scored: NDArray[np.int32], store: ActivationStore, training_contexts: int) -> int:
    """How many of the scored contexts occur among those that were trained on, token for token.

    Args:
        scored: tokens of the contexts that are scored; [contexts, positions].
        store: that the run was trained from.
        training_contexts: how many of its first contexts it read.

    Raises:
        StoreError: the store is not what was written.
    """
    digests = digests_of(scored)
    is_seen = np.zeros(len(digests), np.bool_)
    for start in range(0, training_contexts, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, training_contexts))
        is_seen |= np.isin(digests, digests_of(store.tokens(part)))
    return int(is_seen.sum())
