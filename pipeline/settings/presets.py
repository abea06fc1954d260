"""Settings that go together, by name."""

from typing import Any

PILE = {"dataset": "monology/pile-uncopyrighted", "attention": "eager"}

HARVEST_PRESETS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"model": "google/gemma-2-2b", "layers": (5, 12, 19), **PILE},
    "gemma-2b": {"model": "google/gemma-2b", "layers": (3, 8, 13), **PILE},
}
"""``gemma-2-2b`` is the paper's setting: it says "Gemma-2B", but its width and layers are Gemma-2-2B's."""

PAPER = {
    "steps": 10_000,
    "batch_size": 2048,
    "learning_rate": 3e-4,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
    "l1_coefficient": 0.04,
}

TOPK = {
    "batch_size": 2048,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "learning_rate_warmup": 0.05,
    "learning_rate_decay": 0.2,
}

JUMPRELU = {**TOPK, "sparsity_warmup": 0.2}

HIERARCHICAL = {"architecture": "hierarchical", "ranges": "4", "dropout": 0.1, **PAPER}

PUBLISHED_CODE = {
    **HIERARCHICAL,
    "steps": 11_000,
    "warmup_share": 1 / 11,
    "learning_rate": 3e-5,
    "learning_rate_warmup": 1 / 11,
    "weight_decay": 0.0,
    "reconstruction_loss": "norm",
    "penalty": "base",
    "adapter_norm": "before",
    "decoder_bias": True,
    "decoder_norm": "outputs",
    "project_gradient": True,
    "activation_scale": "none",
    "special_tokens": True,
}

TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": HIERARCHICAL,
    "paper-15pct": {**HIERARCHICAL, "adapter_share": 0.15, "adapter_gain": 0.0},
    "published-code": PUBLISHED_CODE,
    "paper-baseline": {"architecture": "standard", **PAPER},
    "topk": {"architecture": "topk", **TOPK},
    "batchtopk": {"architecture": "batchtopk", **TOPK},
    "jumprelu": {"architecture": "jumprelu", **JUMPRELU},
    "hard-mask": {"architecture": "masked", "mask": "hard", **PAPER},
    "gaussian-mask": {"architecture": "masked", "mask": "gaussian", **PAPER},
    "mask-schedule": {"architecture": "masked", "mask_schedule": "curriculum", **PAPER},
    "separate-encoders": {"architecture": "separate", **PAPER},
    "posae": {"architecture": "batchtopk", "position_mean": "lowrank:16", **TOPK},
}
"""``paper``: the text, to the letter. ``paper-15pct``: adapters as narrow as the 15 % that it claims.
``published-code``: what its scripts would have trained, with true positions. ``paper-baseline``: its settings
without adapters or layer norm. ``hard-mask`` to ``separate-encoders``: what it calls its failed approaches.
``posae``: what measurement favours so far, BatchTopK on activations less their position's mean. ``topk``,
``batchtopk``, ``jumprelu``: without position, to compare with."""

BEST_PRACTICE = {
    "hierarchical": "paper",
    "standard": "paper-baseline",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "jumprelu": "jumprelu",
    "masked": "hard-mask",
    "separate": "separate-encoders",
}
"""What ``--architecture X`` alone takes its settings from."""
