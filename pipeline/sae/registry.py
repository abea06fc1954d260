"""The architectures by name; a new one is one file and one line here."""

from typing import Any

from ...store.errors import SettingsError
from .autoencoder import Autoencoder
from .hierarchical import Hierarchical
from .jumprelu import JumpReLU
from .masked import Masked
from .separate import Separate
from .standard import Standard
from .topk import BatchTopK, TopK

DEFAULT = Hierarchical
"""What ``posae train`` trains, by its first preset, where neither architecture nor preset is given."""

ARCHITECTURES: dict[str, type[Autoencoder]] = {
    kind.architecture: kind
    for kind in (
        Hierarchical,
        Standard,
        TopK,
        BatchTopK,
        JumpReLU,
        Masked,
        Separate,
    )
}


def architecture_class(name: str) -> type[Autoencoder]:
    """The class of an architecture.

    Raises:
        SettingsError: there is no architecture of this name.
    """
    if name not in ARCHITECTURES:
        raise SettingsError(f"there is no architecture {name!r}; take one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def new_autoencoder(architecture: str, **settings: Any) -> Autoencoder:
    """A new autoencoder; ``settings`` are the keywords of its class's constructor.

    Raises:
        SettingsError: an unknown architecture, or a setting out of bounds.
    """
    return architecture_class(architecture)(**settings)
