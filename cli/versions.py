"""Versions of the libraries that results depend on, for ``posae --version``: include them in a bug report.

They are read from the installed packages' metadata without importing anything, in a few milliseconds.
"""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_THAT_MATTER = ("torch", "transformers", "datasets", "zarr", "numcodecs", "numpy")


def versions() -> Iterator[tuple[str, str]]:
    """Pairs of name and version; with CUDA's, where torch was built with it."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _THAT_MATTER:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            yield name, "not installed"
            continue
        yield name, package.version
        if name == "torch" and (cuda := _cuda(package)):
            yield "cuda", cuda


def _cuda(torch: Distribution) -> str | None:
    """``torch.version.cuda``, read from its file, as importing torch takes seconds."""
    file = Path(str(torch.locate_file("torch/version.py")))
    match = re.search(r"^cuda\b.*= '([\d.]+)'", file.read_text(), re.MULTILINE) if file.exists() else None
    return match[1] if match else None
