"""Gemma-2-2B's true configuration at random weights through `posae harvest`, start to end.

    python benchmarks/gemma_2_2b.py FOLDER [--contexts 8] [--layers 5,12,19] [--device auto]

Makes the model in FOLDER (5.2 GB on disk, about 6 GB of memory), harvests it with the demo model's
tokenizer over the standard library, verifies the store, and prints what it took. The weights are
random, so speed, memory and sizes mean something, and the activations and their ratio do not.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2Model

DEMO = Path(__file__).parents[1] / "pipeline" / "harvest" / "demo_model"


def true_configuration() -> Gemma2Config:
    """What google/gemma-2-2b has in its config.json."""
    return Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        max_position_embeddings=8192,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def make_model(folder: Path, configuration: Gemma2Config) -> None:
    """Random weights in bfloat16, and the demo model's tokenizer; nothing, where it was made before."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Gemma2Model(configuration)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)


def main() -> None:
    """Make, harvest, verify, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--layers", default="5,12,19")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    model, store = arguments.folder / "gemma-2-2b-random", arguments.folder / "gemma.zarr"
    make_model(model, true_configuration())
    posae = [sys.executable, "-m", "posae"]
    words = ["--model", str(model), "--layers", arguments.layers, "--device", arguments.device]
    words += ["--contexts", str(arguments.contexts), "--batch-contexts", str(min(32, arguments.contexts))]
    started = time.monotonic()
    subprocess.run([*posae, "harvest", str(store), *words], check=True)
    seconds = time.monotonic() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = subprocess.run(
        [*posae, "inspect-store", str(store), "--json", "--verify"], check=True, capture_output=True
    )
    facts = json.loads(told.stdout)
    sys.stdout.write(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}\n"
        f"{facts['tokens']:,} tokens, layers {facts['layers']}, d_model {facts['d_model']}\n"
        f"whole command {seconds:.0f} s wall, {usage.ru_utime + usage.ru_stime:.0f} s CPU, "
        f"peak memory {usage.ru_maxrss / 1e6:.2f} GB\n"
        f"{facts['raw_bytes']:,} bytes raw, {facts['stored_bytes']:,} stored, ratio {facts['ratio']:.3f}, "
        f"verified: {facts['verified']}\n"
    )


if __name__ == "__main__":
    main()
