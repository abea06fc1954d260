"""Train a small GPT-2, a causal model with learned absolute positions, on the standard library.

    python benchmarks/train_small_gpt2.py OUT [--steps 1800] [--threads 1]
    posae harvest STORE --model OUT --contexts 3400 --held-out 0.118

The demo model turns its queries and keys by position and adds nothing; a GPT-2 adds a learned
vector for each position to the residual stream. So this is a model to measure what position does
to autoencoders. Six blocks of width 192 and the demo model's tokenizer, 3.5 M parameters, trained
by AdamW in float32 on the corpus's training split, one linear warm-up and one cosine; windows are
BOS and the 127 tokens that follow a random place. Equal words give equal weights on one machine.
One CPU thread needs about half an hour for 1,800 steps (3.7 M tokens); memory stays below 1.5 GB.
OUT is a folder in the format of transformers. Weights are not to be kept in the repository.
"""

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from posae.pipeline.harvest.text.stdlib import stdlib_files

DEMO = Path(__file__).parents[1] / "pipeline" / "harvest" / "demo_model"
PAD, EOS, BOS = 0, 1, 2
CONTEXT, BATCH = 128, 16
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.1


def encode(tokenizer: Tokenizer, split: str) -> np.ndarray:
    """All texts of a split as one row of ids, EOS after each; int64 [tokens]."""
    texts = [text for _, text in stdlib_files(split)]
    rows = [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate([np.array([*row, EOS]) for row in rows])


def new_model(vocabulary: int) -> GPT2LMHeadModel:
    """Six blocks of width 192, four heads, no dropout; the head tied to the embedding."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=CONTEXT,
        n_embd=192,
        n_layer=6,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config)


def windows(ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
    """BOS and the CONTEXT ids from each start on; int64 [windows, CONTEXT + 1]."""
    rows = np.full((len(starts), CONTEXT + 1), BOS)
    for row, start in enumerate(starts):
        rows[row, 1:] = ids[start : start + CONTEXT]
    return torch.from_numpy(rows)


def losses(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Loss in nats of every predicted token; [windows, CONTEXT]."""
    logits = model(input_ids=rows[:, :-1]).logits
    targets = rows[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss in nats by position; [CONTEXT]."""
    model.eval()
    loss = torch.cat([losses(model, part) for part in rows.split(32)]).double().mean(0)
    model.train()
    return loss


def main() -> None:
    """Train, score, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument(
        "--steps", type=int, default=1800, help=f"updates, of {BATCH * CONTEXT:,} tokens each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids, held = encode(tokenizer, "train"), encode(tokenizer, "held_out")
    scored = windows(held, np.arange(0, len(held) - CONTEXT, CONTEXT))
    sample = scored[:: max(1, len(scored) // 64)]
    model = new_model(tokenizer.get_vocab_size())
    sys.stdout.write(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, {len(ids):,} tokens to train on, "
        f"{len(held):,} held out, {sum(p.numel() for p in model.parameters()):,} parameters\n"
    )
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = np.random.default_rng(arguments.seed)
    n_steps, started = arguments.steps, time.monotonic()
    for step in range(1, n_steps + 1):
        rate = LEARNING_RATE * min(1, step / 100) * (1 + math.cos(math.pi * (step - 1) / n_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = losses(model, windows(ids, generator.integers(0, len(ids) - CONTEXT, BATCH))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == 20:
            seconds = time.monotonic() - started
            sys.stdout.write(
                f"step {step:5d}  {step * BATCH * CONTEXT / 1e6:5.2f} M tokens  {seconds:5.0f} s  "
                f"held-out sample {held_out_loss(model, sample).mean():.3f} nats/token\n"
            )
            sys.stdout.flush()
    model.save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, arguments.out / name)
    by_position = held_out_loss(model, scored)
    places = [0, 1, 2, 4, 8, 16, 32, 64, 127]
    sys.stdout.write(
        f"final, every held-out window: {by_position.mean():.4f} nats/token\nnats by position "
        + "  ".join(f"{p}: {by_position[p]:.2f}" for p in places)
        + "\n"
    )


if __name__ == "__main__":
    main()
