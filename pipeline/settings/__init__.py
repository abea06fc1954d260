"""The settings of each stage: one declaration makes an option, a key of a TOML file and its help.

``stages`` and ``training`` declare them, ``presets`` names those that go together, ``resolving`` takes them
from where they were given, ``words`` writes a training as a command. No torch: ``posae --help`` stays quick.
"""

from .presets import HARVEST_PRESETS, TRAIN_PRESETS
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
from .words import train_words

__all__ = [
    "HARVEST_PRESETS",
    "TRAIN_PRESETS",
    "CopySettings",
    "EvaluateSettings",
    "HarvestSettings",
    "ImportSaeSettings",
    "ImportSettings",
    "MergeSettings",
    "PlantSettings",
    "Settings",
    "TrainSettings",
    "build",
    "in_plain_words",
    "nearest",
    "read_toml",
    "resolve_settings",
    "train_words",
]
