"""A store's folder in a dataset on the Hugging Face hub.

Reading is that of ``http.py``, one request a read; the hub redirects to hosts of its own, which are
followed without the token. Writing is a commit; what has arrived is told by the digests that the hub
keeps of each file. The hub allows some hundred commits an hour, so who has many files gives them to
``commit`` together.

The token is the one that huggingface_hub finds: HF_TOKEN, or what ``hf auth login`` left. HF_ENDPOINT
names another hub, HF_HUB_OFFLINE forbids all of this.
"""

import hashlib
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..errors import SettingsError, StoreError, StoreRemoteError
from .folder import PIECE_BYTES, inside, opened, shown
from .http import HttpReader
from .retries import BUSY, PassingError, retry_after_seconds, tried, tried_once

_CREDENTIALS = "HF_TOKEN, hf auth login"


class HubFolder(HttpReader):
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
        if words[0] != "datasets" or not words[1] or not name or (at and not revision):
            raise SettingsError(
                f"{shown(url)} is no dataset; write hf://datasets/team/name[@revision][/folder]"
            )
        if huggingface_hub.is_offline_mode():
            raise StoreRemoteError(f"{shown(url)}: HF_HUB_OFFLINE forbids the hub; unset it")
        self._repository, self._revision = f"{words[1]}/{name}", unquote(revision) or "main"
        self._folder = "".join(f"{word}/" for word in words[3:])
        endpoint, branch = huggingface_hub.constants.ENDPOINT, quote(self._revision, safe="")
        token = huggingface_hub.get_token()
        super().__init__(
            f"{endpoint}/datasets/{self._repository}/resolve/{branch}/{quote(self._folder)}",
            f"hf://{'/'.join(words)}",
            credentials=_CREDENTIALS,
            auth=_Token(token) if token else None,
            may_leave=True,
        )
        self._api = HfApi(endpoint=endpoint, token=token or False)
        # The hub takes one commit at a time to a branch.
        self._committing = threading.Lock()

    def walk(self) -> Iterator[str]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""
        for path in tried(self._listed, self.url):
            yield inside(path, self.url)

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Put a file there, whole or not at all; see ``RemoteFolder``. A commit of its own."""
        self.commit({path: source}, only_new=only_new)

    def commit(self, files: Mapping[str, Path | bytes], *, only_new: bool = False) -> None:
        """Put several files there, all or none, in one commit.

        Makes the dataset, for you alone, where it is missing.

        Args:
            files: by path.
            only_new: as for ``write``; exact, as the commit names the one before it.

        Raises:
            FileExistsError: ``only_new``, and one is there.
            StoreRemoteError: as for ``write``.
        """
        there = {f"{self._folder}{inside(path, self.url)}": source for path, source in files.items()}
        with self._committing:
            tried_once(lambda: self._commit(there, only_new), lambda: self._arrived(there), self.url)

    def _listed(self) -> list[str]:
        with self._explained():
            try:
                entries = self._api.list_repo_tree(
                    self._repository,
                    self._folder.rstrip("/") or None,
                    recursive=True,
                    revision=self._revision,
                    repo_type="dataset",
                )
                return [e.path.removeprefix(self._folder) for e in entries if isinstance(e, RepoFile)]
            except EntryNotFoundError:
                return []

    def _commit(self, files: Mapping[str, Path | bytes], only_new: bool) -> None:
        with self._explained():
            before = self._head()
            if only_new and (found := self._digests(files, before)):
                raise FileExistsError(f"{self.url}: {min(found)} is there already")
            with _without_progress_bars():
                self._api.create_commit(
                    self._repository,
                    [CommitOperationAdd(path, source) for path, source in files.items()],
                    commit_message=f"Add {min(files)}"
                    + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
                    repo_type="dataset",
                    revision=self._revision,
                    parent_commit=before if only_new else None,
                )
        if not self._arrived(files):
            raise StoreRemoteError(f"{self.url}: {min(files)} did not arrive as it was sent; try again")

    def _head(self) -> str | None:
        """The commit that the branch is at; makes the dataset where it is missing."""
        try:
            return self._api.dataset_info(self._repository, revision=self._revision).sha
        except RevisionNotFoundError:
            raise StoreRemoteError(
                f"{self.url}: there is no revision {self._revision}; make the branch first"
            ) from None
        except RepositoryNotFoundError:
            self._api.create_repo(self._repository, repo_type="dataset", private=True, exist_ok=True)
            return self._api.dataset_info(self._repository).sha

    def _arrived(self, files: Mapping[str, Path | bytes]) -> bool:
        with self._explained():
            found = self._digests(files, self._revision)
        return all(found.get(path) in _digests_of(source) for path, source in files.items())

    def _digests(self, paths: Mapping[str, object], revision: str | None) -> dict[str, str]:
        """What the hub keeps of each file that is there: SHA-256 of large ones, git's SHA-1 of others."""
        infos = self._api.get_paths_info(
            self._repository, list(paths), revision=revision, repo_type="dataset"
        )
        return {
            info.path: info.lfs.sha256 if info.lfs else info.blob_id
            for info in infos
            if isinstance(info, RepoFile)
        }

    @contextmanager
    def _explained(self) -> Generator[None]:
        """The errors of huggingface_hub in our words."""
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except HfHubHTTPError as error:
            self._explain_status(error)
        except (httpx2.TransportError, TimeoutError):
            raise PassingError("the hub cannot be reached, or cut the connection") from None
        except LocalTokenNotFoundError:
            raise StoreRemoteError(f"{self.url}: it wants a token; looked in {_CREDENTIALS}") from None
        except OfflineModeIsEnabled:
            raise StoreRemoteError(f"{self.url}: HF_HUB_OFFLINE forbids the hub; unset it") from None
        except HFValidationError:
            raise StoreRemoteError(f"{self.url}: no name of a dataset; check the URL") from None
        except ValueError as error:
            # What it finds wrong before it sends anything, in a README.md say.
            problem = (str(error).splitlines() or [""])[0]
            raise StoreRemoteError(f"{self.url}: the hub would not take it: {problem}") from None
        except (OSError, RuntimeError) as error:
            # What its uploaders raise has no type of its own.
            if isinstance(error.__cause__, HfHubHTTPError):
                self._explain_status(error.__cause__)
            raise PassingError(f"the upload failed ({type(error).__name__})") from None

    def _explain_status(self, error: HfHubHTTPError) -> NoReturn:
        status = error.response.status_code
        words = f"the hub answers {status}"
        # 409 and 412: another commit came first.
        if status in BUSY or status in (409, 412):
            raise PassingError(
                words, retry_after_seconds(error.response.headers.get("Retry-After"))
            ) from None
        if status in (401, 403, 404):
            raise StoreRemoteError(
                f"{self.url}: {words}: not there, or not for you; looked for a token in {_CREDENTIALS}"
            ) from None
        raise StoreRemoteError(f"{self.url}: {words}; check the URL") from None


def _digests_of(source: Path | bytes) -> tuple[str, str]:
    """SHA-256, and git's SHA-1 of a blob."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    with opened(source) as file:
        sha1.update(b"blob %d\0" % file.seek(0, 2))
        file.seek(0)
        for data in iter(lambda: file.read(PIECE_BYTES), b""):
            sha256.update(data)
            sha1.update(data)
    return sha256.hexdigest(), sha1.hexdigest()


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Those of huggingface_hub: who copies many files shows one of its own."""
    shown_before = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown_before:
            enable_progress_bars()


class _Token(httpx2.Auth):
    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response]:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request
