"""What fires on a text of one's own, and what the model loses without a feature; cell by cell, or whole.

    make demo && python examples/own_text.py data/runs/baseline demo "for name in sorted(names):"

Needs the language model that the run's store was made with: a hub id, a folder, or demo. Takes some seconds.
"""

# %% A run, and the language model.
import sys
from pathlib import Path

import torch

from posae.pipeline import Run, load_autoencoder
from posae.pipeline.harvest.language_model import CausalLanguageModel
from posae.pipeline.harvest.text.contexts import special_tokens
from posae.pipeline.harvest.tokenizer import load_tokenizer

folder, model, text = (
    sys.argv[1:4] if len(sys.argv) > 3 else ("data/runs/baseline", "demo", "for i in range(10):")
)
config = Run(Path(folder)).config
layer = config["settings"]["layer"]
autoencoder = load_autoencoder(Path(folder))
# Refused unless it is the model of the run's store: by its commit on the hub, or by the digest of its files.
language_model = CausalLanguageModel.load(model, config["store"].get("model_revision"))
tokenizer = load_tokenizer(model)

# %% Tokens as a harvest has them: with the model's first token before the text, and no longer than a context.
first = special_tokens(tokenizer).first
ids = [*([] if first is None else [first]), *tokenizer.encode(text, add_special_tokens=False)]
tokens = torch.tensor([ids[: config["store"]["context_length"]]])
positions = torch.arange(tokens.shape[1])

# %% The largest features of each token. Its position counts: the same token elsewhere may have another code.
with torch.no_grad():
    activations = language_model.activations(tokens, [layer])[layer]
    code = autoencoder.encode(activations, positions)[0]
for position, (token, row) in enumerate(zip(tokens[0].tolist(), code, strict=True)):
    values, features = row.topk(3)
    shown = ", ".join(
        f"{feature} ({value:.2f})" for feature, value in zip(features.tolist(), values.tolist(), strict=True)
    )
    print(f"{position:3} {tokenizer.decode([token])!r:16} {shown}")

# %% The text less one feature: what that does to the next token. Taken out is what the feature adds, no more.
feature = int(code[-1].argmax())


def without(x: torch.Tensor) -> torch.Tensor:
    """Activations [contexts, positions, d_model] less what the feature adds to them."""
    full = autoencoder.encode(x, positions)
    less = full.clone()
    less[..., feature] = 0
    return x.float() - autoencoder.decode(full, positions) + autoencoder.decode(less, positions)


before, after = (
    language_model.logits(tokens, layer, replace)[0, -1].float().softmax(-1) for replace in (None, without)
)
changed = int((after - before).abs().argmax())
print(
    f"most likely next: {tokenizer.decode([int(before.argmax())])!r}; without feature {feature}: "
    f"{tokenizer.decode([int(after.argmax())])!r}; most changed: {tokenizer.decode([changed])!r}, from "
    f"{before[changed]:.3f} to {after[changed]:.3f}"
)
