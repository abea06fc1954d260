"""Train the built-in demo model: a true Gemma-2 of 2 M parameters, on Python's standard library.

    python examples/demo_model/train.py pipeline/harvest/demo_model --tokens 14000000

Two CPU cores need about an hour; a line of progress is printed every 250 steps, and each run
appends its lines to train.log beside this file. The tokenizer (byte-level BPE with BOS) and the
model see the nine tenths of the corpus that are not held out; the score is the mean loss over
every held-out window of BOS and 128 tokens, in bits per byte of the text predicted.

Matrices are trained by Muon (momentum, orthogonalised by Newton-Schulz), the embedding and the
norms by AdamW; the learning rate rises over 30 steps and falls to zero over the last half.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from posae.pipeline.harvest.text.stdlib import stdlib_files

VOCABULARY, CONTEXT, BATCH = 4096, 128, 32
PAD, EOS, BOS, UNK = range(4)
MATRIX_LR, MATRIX_DECAY, ADAM_LR = 0.02, 0.05, 4e-3


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE that puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of ids, EOS after each; int64 [tokens]."""
    rows = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate([np.array([*row, EOS]) for row in rows])


def new_model() -> Gemma2ForCausalLM:
    """Six blocks of width 128: sliding and full attention in turn, soft caps, tied embedding."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        attn_implementation="eager",
        use_cache=False,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1 / math.sqrt(config.hidden_size))
    return model


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Each matrix of [matrices, rows, columns] with its singular values near 1 (Newton-Schulz)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum whose direction is orthogonalised; matrices of one shape go together."""

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        """Group ``matrices`` by shape."""
        by_shape = itertools.groupby(sorted(matrices, key=lambda m: m.shape), lambda m: m.shape)
        self.groups = [list(group) for _, group in by_shape]
        self.momenta = [torch.zeros(len(g), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalise(gradient.lerp(momentum, 0.95))
            rows, columns = group[0].shape
            scale = max(1, rows / columns) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - lr * MATRIX_DECAY).add_(direction, alpha=-lr * scale)


def losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Loss in nats of every predicted token of BOS + CONTEXT ids; [windows, CONTEXT]."""
    logits = model(input_ids=windows[:, :-1]).logits
    targets = windows[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(
        targets.shape
    )


def held_out_windows(ids: np.ndarray) -> torch.Tensor:
    """Neighbouring windows of BOS + CONTEXT ids, the last tokens that fill none left out."""
    n = len(ids) // CONTEXT
    rows = np.full((n, CONTEXT + 1), BOS)
    rows[:, 1:] = ids[: n * CONTEXT].reshape(n, CONTEXT)
    return torch.from_numpy(rows)


def n_bytes(tokenizer: Tokenizer, windows: torch.Tensor) -> int:
    """Bytes of text that the windows' ids stand for; EOS stands for none."""
    length = np.zeros(VOCABULARY, dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        length[index] = 0 if index in (PAD, EOS, BOS, UNK) else len(token)
    return int(length[windows[:, 1:].numpy()].sum())


@torch.no_grad()
def score(
    model: torch.nn.Module, tokenizer: Tokenizer, windows: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """Mean nats per token, bits per byte, and mean nats by position [CONTEXT]."""
    model.eval()
    loss = torch.cat([losses(model, part) for part in windows.split(64)]).double()
    model.train()
    bits = loss.sum().item() / math.log(2)
    return loss.mean().item(), bits / n_bytes(tokenizer, windows), loss.mean(0)


def report(model: torch.nn.Module, tokenizer: Tokenizer, windows: torch.Tensor) -> list[str]:
    """The score of a model whose weights are rounded to bfloat16, on every held-out window."""
    nats, bits, by_position = score(model, tokenizer, windows)
    places = [0, 1, 2, 4, 8, 16, 32, 64, 127]
    return [
        f"final, bf16 weights, every held-out window: {nats:.4f} nats/token  {bits:.4f} bits/byte",
        "nats by position " + "  ".join(f"{p}: {by_position[p]:.2f}" for p in places),
    ]


def score_saved(folder: Path) -> None:
    """Print the score of the model that lies in ``folder``."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    windows = held_out_windows(encode(tokenizer, [text for _, text in stdlib_files("held_out")]))
    sys.stdout.write("\n".join(report(model, tokenizer, windows)) + "\n")


def main() -> None:
    """Train, score, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model and its tokenizer")
    parser.add_argument("--tokens", type=int, default=14_000_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", action="store_true", help="only score the model that lies in OUT")
    arguments = parser.parse_args()
    if arguments.score:
        score_saved(arguments.out)
        return
    log = (Path(__file__).parent / "train.log").open("a")

    def say(line: str) -> None:
        for stream in (sys.stdout, log):
            stream.write(line + "\n")
            stream.flush()

    torch.manual_seed(arguments.seed)
    training = [text for _, text in stdlib_files("train")]
    held = [text for _, text in stdlib_files("held_out")]
    tokenizer = train_tokenizer(training)
    ids = encode(tokenizer, training)
    windows = held_out_windows(encode(tokenizer, held))
    sample = windows[:: max(1, len(windows) // 128)]
    model = new_model()
    say(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, {len(training)} files and "
        f"{len(ids):,} tokens to train on, {len(held)} files and {windows[:, 1:].numel():,} tokens "
        f"held out, {sum(p.numel() for p in model.parameters()):,} parameters"
    )

    embedding = model.model.embed_tokens.weight
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon([p for p in model.parameters() if p.ndim == 2 and p is not embedding])
    adam = torch.optim.AdamW([embedding, *vectors], lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    generator = np.random.default_rng(arguments.seed)
    n_steps = arguments.tokens // (BATCH * CONTEXT)
    compiled = torch.compile(model)
    started = time.monotonic()
    smooth = None
    for step in range(1, n_steps + 1):
        rate = min(1, step / 30) * min(1, 2 * (1 - (step - 1) / n_steps))
        rows = np.full((BATCH, CONTEXT + 1), BOS)
        for row, start in enumerate(generator.integers(0, len(ids) - CONTEXT, BATCH)):
            rows[row, 1:] = ids[start : start + CONTEXT]
        loss = losses(compiled, torch.from_numpy(rows)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([embedding, *vectors], 1.0)
        muon.step(MATRIX_LR * rate)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * rate
        adam.step()
        model.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 250 == 0 or step == 20:
            seconds = time.monotonic() - started
            nats, bits, _ = score(model, tokenizer, sample)
            tokens = step * BATCH * CONTEXT
            say(
                f"step {step:5d}  {tokens / 1e6:6.2f} M tokens  {seconds:6.0f} s  "
                f"{tokens / seconds:6.0f} tokens/s  train {smooth:.3f}  "
                f"held-out sample {nats:.3f} nats/token  {bits:.4f} bits/byte"
            )

    model.to(torch.bfloat16).float()  # scored with the weights as they are stored
    for line in report(model, tokenizer, windows):
        say(line)
    model.config.use_cache = True
    model.to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=1024,
    ).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
