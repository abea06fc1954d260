from typing import Any

from . import SAE, SAEConfig

def register_sae_class(
    architecture: str, sae_class: type[SAE[Any]], sae_config_class: type[SAEConfig]
) -> None: ...
