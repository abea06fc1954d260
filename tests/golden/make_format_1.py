"""Made the stores of format 1 here once, with posae 0.1.0; kept to show how. Never run it over them again.

Run as: python tests/golden/make_format_1.py format-1.zarr
        python tests/golden/make_format_1.py format-1-rounded.zarr rounded
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posae.store.manifest import Manifest
from posae.store.writer import StoreWriter

N_CONTEXTS, LENGTH, D_MODEL, LAYERS = 20, 6, 16, (0, 3)
BOS, EOS = 2, 1


def scrambled(shape: tuple[int, ...], salt: int) -> NDArray[np.uint64]:
    """Numbers that look random, the same for ever: no generator that a library might change."""
    numbers = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(salt << 32)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        numbers = (numbers ^ (numbers >> np.uint64(29))) * np.uint64(factor)
    return (numbers ^ (numbers >> np.uint64(32))).reshape(shape)


def activations(layer: int) -> NDArray[np.uint16]:
    """bfloat16 bits of numbers between 2^-6 and 2^2, of either sign."""
    numbers = scrambled((N_CONTEXTS, LENGTH, D_MODEL), layer)
    exponent = np.uint64(121) + (numbers >> np.uint64(8)) % np.uint64(8)
    return ((numbers & np.uint64(0x807F)) | exponent << np.uint64(7)).astype(np.uint16)


def main(root: Path, **more: Any) -> None:
    tokens = (3 + scrambled((N_CONTEXTS, LENGTH), 100) % np.uint64(97)).astype(np.int32)
    tokens[scrambled(tokens.shape, 101) % np.uint64(9) == 0] = EOS
    tokens[:, 0] = BOS
    documents = (scrambled(tokens.shape, 102) % np.uint64(2**40)).astype(np.int64)
    special = (0, EOS, BOS)
    manifest = Manifest(
        model="golden",
        model_revision="0123456789abcdef",
        model_config_hash="0" * 64,
        model_layers=4,
        d_model=D_MODEL,
        attention="eager",
        device="cpu",
        batch_contexts=8,
        n_contexts=N_CONTEXTS,
        context_length=LENGTH,
        skip_contexts=0,
        held_out=(16, N_CONTEXTS),
        packing="pack",
        dataset="golden",
        dataset_revision=None,
        dataset_config=None,
        dataset_split="train",
        dataset_column="text",
        tokenizer_hash="1" * 64,
        first_token=BOS,
        separator_token=EOS,
        special_token_ids=special,
        vocabulary_size=100,
        seed=5,
        codec="small",
        chunk_contexts=8,
        shard_contexts=512,
        versions={name: version(name) for name in ("numpy", "numcodecs")},
        **more,
    )
    corpus = {
        "documents": 7,
        "documents_left_out": 1,
        "duplicate_contexts": 0,
        "special_tokens": {str(EOS): int((tokens == EOS).sum()), str(BOS): N_CONTEXTS},
    }
    ordinary = ~np.isin(tokens, special)
    ordinary[16:] = False
    writer = StoreWriter.begin(root, manifest)
    with writer.lock():
        writer.write_tokens(tokens, documents, corpus)
        writer.add_layers(LAYERS)
    shard = writer.lock_shard(LAYERS, 0, wait=True)
    if shard is None:
        raise SystemExit(f"{root} is finished")
    with shard, ThreadPoolExecutor(1) as pool:
        for layer in LAYERS:
            shard.append(layer, activations(layer), ordinary, pool)
        shard.commit()
    with writer.lock():
        print(writer.seal())  # noqa: T201


if __name__ == "__main__":
    rounded = {"mantissa_bits": 5, "byte_counts": True} if "rounded" in sys.argv[2:] else {}
    main(Path(sys.argv[1]), **rounded)
