# The part of numcodecs.blosc that posae uses; any buffer will do (numpy's stubs name none on 3.11).
from typing import Any

SHUFFLE: int
BITSHUFFLE: int
use_threads: bool

def compress(
    source: Any, cname: bytes, clevel: int, shuffle: int = ..., blocksize: int = ..., typesize: int | None = ...
) -> bytes: ...
def decompress(source: Any, dest: Any = ...) -> Any: ...
