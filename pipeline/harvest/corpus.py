"""Counts of a store's tokens for people, made when the tokens are committed: ``stats/zarr.json``.

Costs about 100 bytes of memory and some microseconds a context.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...store.layout import Json

_COUNTED_CONTEXTS = 65536


def corpus_counts(
    tokens: NDArray[np.int32], special_token_ids: Sequence[int], *, n_documents: int, n_left_out: int
) -> Json:
    """What ``stats/zarr.json`` holds.

    Args:
        tokens: of all contexts; int32 [contexts, positions].
        special_token_ids: ids to be counted.
        n_documents: documents read from the corpus.
        n_left_out: documents among them that gave no token.
    """
    counts: Counter[int] = Counter()
    for start in range(0, len(tokens), _COUNTED_CONTEXTS):
        some = tokens[start : start + _COUNTED_CONTEXTS]
        special = some[np.isin(some, np.array(special_token_ids, np.int64))]
        counts.update(special.tolist())
    return {
        "documents": n_documents,
        "documents_left_out": n_left_out,
        "duplicate_contexts": count_duplicates(tokens),
        "special_tokens": {str(token): counts[token] for token in sorted(counts)},
    }


def count_duplicates(tokens: NDArray[np.int32]) -> int:
    """How many contexts repeat an earlier one exactly.

    Args:
        tokens: int32 [contexts, positions].
    """
    digests = digests_of(tokens)
    return int((digests[1:] == digests[:-1]).sum())


def digests_of(*rows: NDArray[np.integer]) -> NDArray[np.bytes_]:
    """What stands for each context, sorted: 16 bytes of memory in place of a copy.

    Args:
        rows: arrays [contexts, positions], all of which tell contexts apart.
    """
    digests = (
        hashlib.blake2b(b"".join(row.tobytes() for row in of_one), digest_size=16).digest()
        for of_one in zip(*rows, strict=True)
    )
    found = np.fromiter(digests, "S16", len(rows[0]))
    found.sort()
    return found
