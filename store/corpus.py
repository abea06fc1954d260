"""Counts of a store's tokens for people, made when the tokens are committed: ``stats/zarr.json``."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .layout import Json


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
    ids, counts = np.unique(tokens, return_counts=True)
    special = set(special_token_ids)
    return {
        "documents": n_documents,
        "documents_left_out": n_left_out,
        "duplicate_contexts": count_duplicates(tokens),
        "special_tokens": {
            str(token): int(count)
            for token, count in zip(ids.tolist(), counts.tolist(), strict=True)
            if token in special
        },
    }


def count_duplicates(tokens: NDArray[np.int32]) -> int:
    """How many contexts repeat an earlier one exactly.

    Args:
        tokens: int32 [contexts, positions].
    """
    return len(tokens) - len(digests_of(tokens))


def digests_of(*rows: NDArray[np.integer]) -> set[bytes]:
    """What stands for each context: about 100 bytes of memory instead of a sorted copy.

    Args:
        rows: arrays [contexts, positions], all of which tell contexts apart.
    """
    return {
        hashlib.blake2b(b"".join(row.tobytes() for row in of_one), digest_size=16).digest()
        for of_one in zip(*rows, strict=True)
    }
