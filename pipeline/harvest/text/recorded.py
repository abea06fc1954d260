"""Whether text that is named is the one that a store was made of, as far as names tell."""

from pathlib import Path

from ....store.manifest import Manifest
from .documents import local_path


def names_recorded_text(dataset: str, revision: str | None, manifest: Manifest) -> bool:
    """Whether ``dataset`` may be the text of a manifest; where its files are here, their digest tells.

    A local file or folder may be gone: its base name is compared. What is on the hub and the standard library
    change under one name: the name without a revision means the text that was recorded.

    Args:
        dataset: as for ``open_corpus``.
        revision: as given; None means any.
        manifest: of a store whose tokens are committed, so that no text is needed.
    """
    recorded = manifest.dataset_revision
    was_local = (recorded or "").startswith("sha256:")
    if revision not in (None, recorded) or (dataset == "stdlib" and was_local):
        return False
    if dataset == "stdlib" or not _is_path(dataset):
        return dataset == manifest.dataset
    return was_local and Path(dataset).expanduser().name == manifest.dataset


def _is_path(dataset: str) -> bool:
    """Whether it is no id of the hub: the folder above what is gone may still be there."""
    path = Path(dataset)
    return local_path(dataset) is not None or (path.parent != Path() and path.parent.is_dir())
