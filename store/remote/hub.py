"""A store's folder in a dataset on the Hugging Face hub.

Reading is that of ``objects.py``; the hub redirects to hosts of its own, which do not get the token. Writing,
and checking what was written, is huggingface_hub's. A write is a commit, of which the hub allows some hundred
an hour, so many files belong in one ``commit``.

The token is the one that huggingface_hub finds: HF_TOKEN, or that of ``hf auth login``. HF_ENDPOINT
names another hub, HF_HUB_OFFLINE forbids all of this.
"""

import hashlib
import logging
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    parse_ratelimit_headers,
)

from ..errors import SettingsError, StoreError, StoreRemoteError
from .folder import ListedFile, inside, shown
from .objects import PIECE_BYTES, ObjectFolder, web
from .retries import RetryableError, retry

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every URL, with a query that may be secret

_CREDENTIALS = "HF_TOKEN, hf auth login"
# 409 and 412: another commit came first.
_MAY_PASS = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})


class HubFolder(ObjectFolder):
    """A folder in a dataset; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Look for a token; connect to nothing yet.

        Args:
            url: ``hf://datasets/team/name[@revision][/folder]``.

        Raises:
            SettingsError: not of that form.
            StoreRemoteError: HF_HUB_OFFLINE is set.
        """
        parts = urlsplit(url)
        words = f"{parts.netloc}{parts.path}".strip("/").split("/")
        name, at, revision = words[2].partition("@") if len(words) > 2 else ("", "", "")
        self._revision = unquote(revision) or "main"
        if words[0] != "datasets" or not words[1] or not name or (at and not revision):
            raise SettingsError(
                f"{shown(url)} is no dataset; write hf://datasets/team/name[@revision][/folder]"
            )
        if "/" in self._revision:
            raise SettingsError(f"{shown(url)}: name the commit instead of {self._revision!r}")
        if huggingface_hub.is_offline_mode():
            raise StoreRemoteError(f"{shown(url)}: HF_HUB_OFFLINE forbids the hub; unset it")
        self._folder = "".join(f"{word}/" for word in words[3:])
        self._dataset: dict[str, Any] = {"repo_id": f"{words[1]}/{name}", "repo_type": "dataset"}
        self._token = huggingface_hub.get_token()
        self._api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=self._token or False)
        place = f"datasets/{words[1]}/{name}/resolve/{quote(self._revision)}/{quote(self._folder)}".rstrip(
            "/"
        )
        self._base = f"{self._api.endpoint}/{place}"
        # The hub takes one commit at a time to a branch.
        self._committing = threading.Lock()
        connect = web(self._base, f"Bearer {self._token}" if self._token else None)
        super().__init__(f"hf://{'/'.join(words)}", connect, _CREDENTIALS)

    def _wait_seconds(self, path: str | None) -> float | None:
        """How long the hub wants to be left alone: asked once more, as obstore does not show its headers."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            answer = get_session().head(f"{self._base}/{quote(path or '')}", headers=headers, timeout=10)
        except httpx2.TransportError:
            return None
        return _asked_seconds(answer.headers) if answer.status_code == 429 else 0

    def list_files(self) -> dict[str, ListedFile]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""

        def once() -> dict[str, ListedFile]:
            with self._explained_by_hub():
                folder = self._folder.rstrip("/") or None
                options: Any = {"path_in_repo": folder, "revision": self._revision, **self._dataset}
                return self._listed(self._api.list_repo_tree(recursive=True, **options))

        try:
            return retry(once, self.url)
        except FileNotFoundError:
            return {}

    def _listed(self, entries: Iterable[object]) -> dict[str, ListedFile]:
        return {
            inside(entry.path.removeprefix(self._folder), self.url): ListedFile(
                entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def digests(self, source: Path) -> set[str]:
        """SHA-256, and git's SHA-1 of a blob; see ``RemoteFolder``."""
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
        sha1.update(b"blob %d\0" % source.stat().st_size)
        with source.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                sha256.update(data)
                sha1.update(data)
        return {sha256.hexdigest(), sha1.hexdigest()}

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Write a file, whole or not at all; see ``RemoteFolder``. A commit of its own."""
        self.commit({path: source}, only_new=only_new)

    def commit(self, files: Mapping[str, Path | bytes], *, only_new: bool = False) -> None:
        """Write several files, all or none; see ``TakesMany``. Makes the dataset, private, if it is missing.

        ``only_new`` is exact, as the commit names the one before it.
        """
        sources = {f"{self._folder}{inside(path, self.url)}": source for path, source in files.items()}
        try:
            with self._committing:
                retry(lambda: self._commit(sources, only_new), self.url)
        except FileNotFoundError:
            problem = f"the hub answers 404: not there, or not for you; looked for a token in {_CREDENTIALS}"
            raise self._error(None, problem) from None

    def _commit(self, sources: Mapping[str, Path | bytes], only_new: bool) -> None:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        with self._explained_by_hub(), _without_progress_bars():
            before = self._head()
            if only_new:
                present = self._api.get_paths_info(paths=[*sources], revision=before, **self._dataset)
                if present:
                    raise FileExistsError(f"{self.url}: {present[0].path} is there already")
            self._api.create_commit(
                operations=[CommitOperationAdd(path, source) for path, source in sources.items()],
                commit_message=f"Add {min(sources)}{more}",
                revision=self._revision,
                parent_commit=before if only_new else None,
                **self._dataset,
            )

    def _head(self) -> str | None:
        """The commit that the branch is at; makes the dataset where it is missing."""
        try:
            return self._api.repo_info(revision=self._revision, **self._dataset).sha
        except RevisionNotFoundError:
            raise self._error(None, f"there is no revision {self._revision}; make the branch first") from None
        except RepositoryNotFoundError:
            self._api.create_repo(private=True, exist_ok=True, **self._dataset)
            return self._api.repo_info(**self._dataset).sha

    @contextmanager
    def _explained_by_hub(self) -> Generator[None]:
        """The errors of huggingface_hub in our words."""
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except HfHubHTTPError as error:
            self._explain_status(error)
        except (httpx2.TransportError, TimeoutError):
            raise RetryableError("the hub cannot be reached, or cut the connection") from None
        except OfflineModeIsEnabled:
            raise self._error(None, "HF_HUB_OFFLINE forbids the hub; unset it") from None
        except HFValidationError:
            raise self._error(None, "no name of a dataset; check the URL") from None
        except (OSError, RuntimeError, ValueError) as error:
            # What its uploaders raise has no type of its own; a ValueError is what it finds wrong before.
            if isinstance(error.__cause__, HfHubHTTPError):
                self._explain_status(error.__cause__)
            problem = (str(error).splitlines() or [""])[0]
            if isinstance(error, ValueError):
                raise self._error(None, f"the hub would not take it: {problem}") from None
            raise RetryableError(f"the upload failed ({type(error).__name__})") from None

    def _explain_status(self, error: HfHubHTTPError) -> NoReturn:
        status, answers = error.response.status_code, f"the hub answers {error.response.status_code}"
        if status in _MAY_PASS:
            raise RetryableError(answers, _asked_seconds(error.response.headers)) from None
        if status == 404:
            raise FileNotFoundError(f"{self.url} is not there") from None
        if status in (401, 403):
            problem = f"{answers}: not there, or not for you; looked for a token in {_CREDENTIALS}"
            raise self._error(None, problem) from None
        raise self._error(None, f"{answers}; check the URL") from None


def _asked_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the hub wants to be left alone, as huggingface_hub understands it."""
    limits = parse_ratelimit_headers(headers)
    if limits and not limits.remaining:
        return limits.reset_in_seconds + 1
    after = headers.get("Retry-After", "")
    return float(after[:9]) if after.isascii() and after.isdigit() else None


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Without those of huggingface_hub: posae shows one of its own."""
    shown_before = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown_before:
            enable_progress_bars()
