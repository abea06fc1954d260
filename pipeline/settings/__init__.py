"""The settings of each stage: one declaration makes an option, a key of a TOML file and its help.

``stages`` and ``training`` declare them with ``declared``, ``presets`` names those that go together,
``resolving`` merges them from their sources. What only one architecture has is declared in its file in
``pipeline/sae/``. No torch here: ``posae --help`` stays quick.
"""

from .declared import Group, Preset, setting
from .presets import HARVEST_PRESETS
from .resolving import build, in_plain_words, nearest, read_toml, resolve_settings
from .stages import (
    CopySettings,
    EvaluateSettings,
    HarvestSettings,
    ImportSaeSettings,
    ImportSettings,
    MergeSettings,
    PlantSettings,
    Settings,
)
from .training import TrainSettings

__all__ = [
    "HARVEST_PRESETS",
    "CopySettings",
    "EvaluateSettings",
    "Group",
    "HarvestSettings",
    "ImportSaeSettings",
    "ImportSettings",
    "MergeSettings",
    "PlantSettings",
    "Preset",
    "Settings",
    "TrainSettings",
    "build",
    "in_plain_words",
    "nearest",
    "read_toml",
    "resolve_settings",
    "setting",
]
