"""A store's folder in a dataset on the Hugging Face hub, over huggingface_hub.

It brings the session, the token, uploads and their verification, and tells how long the hub wants to be left
alone; here no more is received than was asked for, and the size of the whole is checked. A read is one
request, and a redirect to where the hub keeps large files. A write is a commit, of which the hub allows some
hundred an hour, so many files belong in one ``commit``.

The token is the one that huggingface_hub finds: HF_TOKEN, or that of ``hf auth login``. HF_ENDPOINT
names another hub, HF_HUB_OFFLINE forbids all of this.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import quote, unquote, urlsplit

import httpx2
import huggingface_hub
import huggingface_hub.utils
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from ..errors import SettingsError, StoreError, StoreRemoteError
from .folder import PIECE_BYTES, ListedFile, changed, inside, shown, too_large
from .retries import RetryableError, resume, retry

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every URL, with a query that may be secret

_CREDENTIALS = "HF_TOKEN, hf auth login"
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
# 409 and 412: another commit came first.
_MAY_PASS = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})


class HubFolder:
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
        self.url = f"hf://{'/'.join(words)}"
        self._revision, self._folder = unquote(revision) or "main", "".join(f"{w}/" for w in words[3:])
        self._dataset: dict[str, Any] = {"repo_id": f"{words[1]}/{name}", "repo_type": "dataset"}
        token = huggingface_hub.get_token() or False
        self._api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=token)
        self._headers: dict[str, str] = {
            **cast(Any, huggingface_hub.utils).build_hf_headers(token=token),
            "Accept-Encoding": "identity",
        }
        self._base = (
            f"{self._api.endpoint}/datasets/{words[1]}/{name}/resolve/{quote(self._revision, safe='')}"
        )
        # The hub takes one commit at a time to a branch.
        self._committing = threading.Lock()

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"HubFolder({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``."""
        return b"".join(resume(lambda n: self._body(path, start + n, stop, of), f"{self.url}/{path}"))

    def pieces(self, path: str, of: int) -> Iterator[bytes]:
        """The whole of a file; see ``RemoteFolder``."""
        return resume(lambda n: self._body(path, n, of, of), f"{self.url}/{path}")

    def _body(self, path: str, start: int, stop: int, of: int) -> Iterator[bytes]:
        with self._get(path, start, stop, of) as (_, body):
            yield from body

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``."""

        def once() -> bytes:
            with self._get(path) as (n_bytes, body):
                if n_bytes > limit_bytes:
                    raise too_large(path, limit_bytes)
                return b"".join(body)

        return retry(once, f"{self.url}/{path}")

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``."""
        try:
            listed = retry(lambda: self._info([self._place(path)], self._revision), self.url)
        except FileNotFoundError:
            return None
        return listed[path].n_bytes if path in listed else None

    def list_files(self) -> dict[str, ListedFile]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""

        def once() -> dict[str, ListedFile]:
            with self._explained():
                return self._listed(
                    self._api.list_repo_tree(
                        path_in_repo=self._folder.rstrip("/") or None,
                        recursive=True,
                        revision=self._revision,
                        **self._dataset,
                    )
                )

        try:
            return retry(once, self.url)
        except FileNotFoundError:
            return {}

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
        """Write several files, all or none, in one commit.

        Makes the dataset, private, where it is missing.

        Args:
            files: by path.
            only_new: as for ``write``; exact, as the commit names the one before it.

        Raises:
            FileExistsError: ``only_new``, and one is there (it may be what an earlier try wrote).
            StoreRemoteError: as for ``write``.
        """
        sources = {self._place(path): source for path, source in files.items()}
        with self._committing:
            retry(lambda: self._commit(sources, only_new), self.url)

    def _commit(self, sources: Mapping[str, Path | bytes], only_new: bool) -> None:
        with self._explained():
            before = self._head()
            if only_new and (present := self._info([*sources], before)):
                raise FileExistsError(f"{self.url}/{min(present)} is there already")
            more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
            with _without_progress_bars():
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
            raise StoreRemoteError(
                f"{self.url}: there is no revision {self._revision}; make the branch first"
            ) from None
        except RepositoryNotFoundError:
            self._api.create_repo(private=True, exist_ok=True, **self._dataset)
            return self._api.repo_info(**self._dataset).sha

    def _info(self, places: list[str], revision: str | None) -> dict[str, ListedFile]:
        with self._explained():
            return self._listed(self._api.get_paths_info(paths=places, revision=revision, **self._dataset))

    def _listed(self, entries: Any) -> dict[str, ListedFile]:
        return {
            inside(entry.path.removeprefix(self._folder), self.url): ListedFile(
                entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id
            )
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def _place(self, path: str) -> str:
        return f"{self._folder}{inside(path, self.url)}"

    @contextmanager
    def _get(
        self, path: str, start: int = 0, stop: int | None = None, of: int | None = None
    ) -> Generator[tuple[int, Iterator[bytes]]]:
        """How many bytes the whole file has, and the part that was asked for (by default all)."""
        is_part = stop is not None and (start, stop) != (0, of)
        expected = f"bytes {start}-{stop - 1}/{of}" if stop is not None else ""
        headers = self._headers | ({"Range": expected.partition("/")[0].replace(" ", "=")} if is_part else {})
        url = f"{self._base}/{quote(self._place(path))}"
        with (
            self._explained(path),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer,
        ):
            n_bytes = _whole_bytes(answer)
            if of not in (None, n_bytes) and n_bytes is not None:
                raise changed(path, n_bytes, of or 0)
            if answer.status_code != 416:
                hf_raise_for_status(answer)
            if n_bytes is None or (is_part and answer.headers.get("Content-Range") != expected):
                raise self._error(path, "the hub sends another part than was asked for; try again later")
            yield n_bytes, self._received(answer, path, (stop - start) if stop is not None else n_bytes)

    def _received(self, answer: httpx2.Response, path: str, n_bytes: int) -> Iterator[bytes]:
        n_received = 0
        for piece in answer.iter_raw():
            n_received += len(piece)
            if n_received > n_bytes:
                raise self._error(path, "the hub sends more than was asked for; do not use it")
            yield piece
        if n_received < n_bytes:
            raise RetryableError("the connection was cut")

    @contextmanager
    def _explained(self, path: str | None = None) -> Generator[None]:
        """The errors of huggingface_hub in our words."""
        try:
            yield
        except (StoreError, FileExistsError):
            raise
        except HfHubHTTPError as error:
            self._explain_status(error, path)
        except (httpx2.TransportError, TimeoutError):
            raise RetryableError("the hub cannot be reached, or cut the connection") from None
        except LocalTokenNotFoundError:
            raise self._error(path, f"it wants a token; looked in {_CREDENTIALS}") from None
        except OfflineModeIsEnabled:
            raise self._error(path, "HF_HUB_OFFLINE forbids the hub; unset it") from None
        except HFValidationError:
            raise self._error(path, "no name of a dataset; check the URL") from None
        except ValueError as error:
            # What it finds wrong before it sends anything, in a README.md say.
            problem = (str(error).splitlines() or [""])[0]
            raise self._error(path, f"the hub would not take it: {problem}") from None
        except (OSError, RuntimeError) as error:
            # What its uploaders raise has no type of its own.
            if isinstance(error.__cause__, HfHubHTTPError):
                self._explain_status(error.__cause__, path)
            raise RetryableError(f"the upload failed ({type(error).__name__})") from None

    def _explain_status(self, error: HfHubHTTPError, path: str | None) -> NoReturn:
        status, headers = error.response.status_code, error.response.headers
        answers = f"the hub answers {status}"
        if status in _MAY_PASS:
            raise RetryableError(answers, _wait_seconds(headers)) from None
        if status == 404:
            raise FileNotFoundError(f"{self.url}/{path or ''}: no such file") from None
        if status in (401, 403):
            problem = f"{answers}: not there, or not for you; looked for a token in {_CREDENTIALS}"
            raise self._error(path, problem) from None
        raise self._error(path, f"{answers}; check the URL") from None

    def _error(self, path: str | None, problem: str) -> StoreRemoteError:
        return StoreRemoteError(f"{self.url if path is None else f'{self.url}/{path}'}: {problem}")


def _whole_bytes(answer: httpx2.Response) -> int | None:
    """How many bytes the whole file has, as the answer says."""
    length = answer.headers.get("Content-Length" if answer.status_code == 200 else "Content-Range", "")
    size = re.fullmatch(r"(?:bytes (?:\d+-\d+|\*)/)?(\d{1,19})", length)
    return int(size[1]) if size else None


def _wait_seconds(headers: Mapping[str, str]) -> float | None:
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
