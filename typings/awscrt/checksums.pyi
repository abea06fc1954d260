# The part of awscrt that posae uses; any buffer will do (numpy's stubs name none on 3.11).
from typing import Any

def crc32c(input: Any, previous_crc32c: int = 0) -> int: ...
