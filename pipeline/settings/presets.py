"""Harvest settings that go together, by name; presets of a run are declared by architectures."""

from typing import Any

PILE = {"dataset": "monology/pile-uncopyrighted", "attention": "eager"}

HARVEST_PRESETS: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"model": "google/gemma-2-2b", "layers": (5, 12, 19), **PILE},
    "gemma-2b": {"model": "google/gemma-2b", "layers": (3, 8, 13), **PILE},
}
"""``gemma-2-2b`` is the paper's setting: it says "Gemma-2B", but its width and layers are Gemma-2-2B's."""
