"""Batches brought to memory; as from a GPU, but that nothing here has a stream of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from posae.pipeline.harvest.host_copies import HostCopies

ELSEWHERE = torch.device("mps")  # a device whose memory is not the host's; tensors of the CPU stand in


def made(seed: int, n_contexts: int = 4) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_contexts, 3, 5)
    return {layer: torch.randn(shape, generator=generator).to(torch.bfloat16) for layer in (1, 4)}


def test_bits_are_those_of_each_batch_whatever_its_size() -> None:
    for device in (ELSEWHERE, torch.device("cpu")):
        copies = HostCopies(device)
        for seed, n_contexts in enumerate([4, 4, 2, 4, 6, 1, 6]):
            activations = made(seed, n_contexts)
            bits = copies.start(activations).bits()
            assert list(bits) == [1, 4]
            for layer, values in activations.items():
                assert bits[layer].dtype == np.uint16
                np.testing.assert_array_equal(bits[layer].view(np.int16), values.view(torch.int16).numpy())


def test_memory_is_used_again_only_when_all_have_read_it() -> None:
    copies = HostCopies(ELSEWHERE)
    may_read = threading.Event()
    read: list[int] = []

    def reader(bits: "np.typing.NDArray[np.uint16]") -> None:
        may_read.wait()
        read.append(int(bits.sum()))

    with ThreadPoolExecutor(1) as slow, ThreadPoolExecutor(1) as starting:
        try:
            expected: list[int] = []
            for seed in range(3):
                copy = copies.start(made(seed))
                bits = copy.bits()[4]
                expected.append(int(bits.sum()))
                copy.read_by([slow.submit(reader, bits)])
            fourth = starting.submit(copies.start, made(3))
            threading.Event().wait(0.05)
            assert not fourth.done()
            assert read == []
        finally:
            may_read.set()
        fourth.result(timeout=60)
    assert read == expected
