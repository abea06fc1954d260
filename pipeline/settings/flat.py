"""Settings as posae 0.1.0 first kept them: flat, those of all architectures in every ``config.json``.

What an architecture did not have stood there at its default, or as it was filled in, and had no effect. The
names here are those of that time; settings declared since never stood in the file of another architecture.
"""

from collections.abc import Mapping
from typing import Any

_L1 = {"hierarchical", "standard", "masked", "separate"}
_TOPK = {"topk", "batchtopk"}
_HIERARCHICAL = (
    *("adapter_width", "adapter_share", "adapter_gain", "adapter_norm", "dropout"),
    *("layer_norm", "layer_norm_affine", "residual", "rectify", "penalty"),
    *("base_loss_coefficient", "decoder_bias"),
)
_ARCHITECTURES_WITH: dict[str, set[str]] = {
    "l1_coefficient": _L1,
    "sparsity_warmup": _L1 | {"jumprelu"},
    "target_l0": _TOPK | {"jumprelu"},
    "auxiliary_coefficient": _TOPK | {"jumprelu"},
    "l0_coefficient": {"jumprelu"},
    "bandwidth": {"jumprelu"},
    **{name: {"hierarchical"} for name in _HIERARCHICAL},
    "mask": {"masked"},
    "mask_schedule": {"masked"},
}
_ALL = _L1 | _TOPK | {"jumprelu"}


def without_foreign(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without those that only other architectures had.

    Args:
        settings: as its ``config.json`` has them, of any version.

    >>> without_foreign({"architecture": "topk", "target_l0": 8, "adapter_width": 64})
    {'architecture': 'topk', 'target_l0': 8}
    """
    architecture = settings.get("architecture", "hierarchical")
    if architecture not in _ALL:
        return dict(settings)
    return {
        name: value for name, value in settings.items() if architecture in _ARCHITECTURES_WITH.get(name, _ALL)
    }
