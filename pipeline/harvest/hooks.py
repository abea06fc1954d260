"""Names that other programs give to places in a language model, and which of posae's layers they are."""

import re

_AFTER = re.compile(r"blocks\.(\d{1,5})\.hook_resid_post|(?:\w+\.)*(?:layers|layer|h)\.(\d{1,5})")
_BEFORE = re.compile(r"blocks\.(\d{1,5})\.hook_resid_pre")


def layer_of(hook_name: str) -> int | None:
    """The layer whose output, the residual stream after the block, is what the hook sees; None if none is.

    Args:
        hook_name: as TransformerLens names it, or the name of a block's module in transformers.

    >>> layer_of("blocks.12.hook_resid_post"), layer_of("blocks.12.hook_resid_pre")
    (12, 11)
    >>> layer_of("model.layers.3"), layer_of("blocks.12.hook_mlp_out"), layer_of("blocks.0.hook_resid_pre")
    (3, None, None)
    """
    if found := _AFTER.fullmatch(hook_name):
        return int(found[1] or found[2])
    found = _BEFORE.fullmatch(hook_name)
    return int(found[1]) - 1 if found and int(found[1]) else None
