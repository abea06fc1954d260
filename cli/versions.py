"""Versions of what a result may depend on, for ``posae --version``: what to send with a question.

They are read from what installers wrote, and nothing is imported: it costs a few milliseconds.
"""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_THAT_MATTER = ("torch", "transformers", "datasets", "zarr", "numcodecs", "numpy")


def versions() -> Iterator[tuple[str, str]]:
    """Each as name and version; CUDA, where torch was built with it, as torch says."""
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _THAT_MATTER:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            yield name, "not installed"
            continue
        yield name, found.version
        if name == "torch" and (cuda := _cuda(found)):
            yield "cuda", cuda


def _cuda(torch: Distribution) -> str | None:
    """What ``torch.version.cuda`` is, from its file; importing torch takes seconds."""
    file = Path(str(torch.locate_file("torch/version.py")))
    said = re.search(r"^cuda\b.*= '([\d.]+)'", file.read_text(), re.MULTILINE) if file.exists() else None
    return said[1] if said else None
