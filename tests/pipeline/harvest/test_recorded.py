"""What names tell of text that may be gone."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from posae.pipeline.harvest.text.recorded import names_recorded_text
from posae.store.manifest import Manifest

from ...conftest import MANIFEST

COMMIT = "3be90335b66f24456a5d6659d9c8d208c0357119"


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Name and revision in a manifest."""

    dataset: str
    revision: str

    @property
    def manifest(self) -> Manifest:
        changed: dict[str, Any] = {"dataset": self.dataset, "dataset_revision": self.revision}
        return Manifest(**MANIFEST | changed)


FOLDER = Recorded("corpus", "sha256:0123456789abcdef")
FILE = Recorded("train.jsonl", "sha256:0123456789abcdef")
HUB = Recorded("owner/corpus", COMMIT)
STDLIB = Recorded("stdlib", "python-3.11.2-0123456789abcdef")
FOLDER_CALLED_STDLIB = Recorded("stdlib", "sha256:0123456789abcdef")


@pytest.mark.parametrize(
    ("recorded", "dataset", "revision", "is_named"),
    [
        (FILE, "train.jsonl", None, True),
        (FILE, "gone/train.jsonl", None, True),
        (FILE, "gone/other.jsonl", None, False),
        (FILE, "gone/train.jsonl", FILE.revision, True),
        (FILE, "gone/train.jsonl", "sha256:1", False),
        (FOLDER, "corpus", None, True),
        (FOLDER, "./corpus", None, True),
        (FOLDER, "here/corpus", None, True),  # the folder above it is there
        (FOLDER, "owner/corpus", None, False),  # an id of the hub
        (HUB, "owner/corpus", None, True),
        (HUB, "owner/corpus", COMMIT, True),
        (HUB, "owner/corpus", "main", False),
        (HUB, "other/corpus", None, False),
        (HUB, "corpus", None, False),
        (HUB, "./owner/corpus", None, False),
        (STDLIB, "stdlib", None, True),
        (STDLIB, "stdlib", "python-3.12.0-0", False),
        (STDLIB, "./stdlib", None, False),
        (FOLDER_CALLED_STDLIB, "./stdlib", None, True),
        (FOLDER_CALLED_STDLIB, "stdlib", None, False),
    ],
)
def test_a_name_is_that_of_the_text_recorded(
    recorded: Recorded,
    dataset: str,
    revision: str | None,
    is_named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert names_recorded_text(dataset, revision, recorded.manifest) is is_named
