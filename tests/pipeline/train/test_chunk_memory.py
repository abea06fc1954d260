"""Windows in the memory of a GPU, a pretended one, or of the host where it has no room: the same batches."""

import numpy as np
import pytest
import torch

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.train.batches import ShuffledBatches
from posae.pipeline.train.chunk_memory import DecodedLayer
from posae.store import ActivationStore

from ...conftest import Made
from ..pretended_gpu import GPU, pretended_gpu


@pytest.mark.parametrize("free", [2**34, 2**8], ids=["room", "no room"])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("window", [8, 16, 400])
def test_a_gpu_gets_the_batches_of_a_cpu(
    window: int, kept: bool, free: int, good_store: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ranges = ActivationStore.open(good_store.root), equal_ranges(good_store.manifest.context_length, 2)

    def batches(device: torch.device) -> ShuffledBatches:
        decoded = DecodedLayer(store, 3, store.training_contexts(3), device) if kept else None
        return ShuffledBatches(
            store, 3, ranges, batch_size=20, window_contexts=window, device=device, decoded=decoded
        )

    def memory(_: object) -> tuple[int, int]:
        return free, free

    wanted = [batch.activations.copy() for batch in batches(torch.device("cpu")).steps(0, 40)]
    with pretended_gpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        for batch, bits in zip(batches(GPU).steps(0, 40), wanted, strict=True):
            assert batch.on_device.device == GPU
            np.testing.assert_array_equal(batch.activations, bits)
