# The part of google_crc32c that posae uses.
from typing import Any

def value(chunk: Any) -> int: ...
