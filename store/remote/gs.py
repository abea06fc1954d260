"""A store's folder in Google Cloud Storage: XML interface for files, JSON interface for lists.

Files are plain HTTP there, so the careful reading is that of ``http.py``: one request a read. A file is
written in one request with its MD5, which the service checks before the file appears. Credentials are
Google's application default ones; where there are none, requests go without, as public buckets want them.

google-auth, for credentials, and not gcsfs, which is tied to one version of fsspec and hides the size of
the whole.
"""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode, urlsplit

import google.auth
import httpx2
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.auth.transport.requests import Request

from ..errors import SettingsError, StoreRemoteError
from .folder import PIECE_BYTES, inside, opened, same, shown
from .http import HttpReader, received
from .retries import PassingError, tried, tried_once

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_MAX_PAGE_BYTES = 1 << 24


class GsFolder(HttpReader):
    """A folder in a bucket; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Look for credentials.

        Args:
            url: ``gs://bucket/folder``; STORAGE_EMULATOR_HOST names another service than Google's.

        Raises:
            SettingsError: no bucket in it, or a user.
        """
        parts = urlsplit(url)
        if not parts.netloc or "@" in parts.netloc:
            raise SettingsError(f"{shown(url)} names no bucket; write gs://bucket/folder")
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        if emulator and "://" not in emulator:
            emulator = f"http://{emulator}"
        self._service = emulator or "https://storage.googleapis.com"
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        super().__init__(
            f"{self._service}/{self._bucket}/{quote(self._prefix)}",
            shown(url),
            credentials="GOOGLE_APPLICATION_CREDENTIALS, gcloud auth application-default login",
            auth=None if emulator else _credentials(),
        )

    def walk(self) -> Iterator[str]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        asked = {"prefix": prefix, "fields": "items/name,nextPageToken"}
        while True:
            page = tried(lambda: self._page(asked), self.url)
            for item in page.get("items", ()):
                # A name that ends in / is what some tools write to show a folder.
                if not item["name"].endswith("/"):
                    yield inside(item["name"].removeprefix(prefix), self.url)
            if "nextPageToken" not in page:
                return
            asked["pageToken"] = page["nextPageToken"]

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Put a file there, whole or not at all; see ``RemoteFolder``. One request; reads the file twice."""
        with opened(source) as file:
            md5 = hashlib.md5(usedforsecurity=False)
            for data in iter(lambda: file.read(PIECE_BYTES), b""):
                md5.update(data)
            headers = {
                "Content-MD5": base64.b64encode(md5.digest()).decode(),
                "Content-Length": str(file.tell()),
                "Content-Type": "application/octet-stream",
            }
            if only_new:
                headers["x-goog-if-generation-match"] = "0"

            def once() -> None:
                file.seek(0)
                with self.answer("PUT", path, headers, file) as answer:
                    if answer.status_code == 412:
                        raise FileExistsError(f"{self.url}/{path} is there already")
                    if answer.status_code == 404:
                        raise StoreRemoteError(f"{self.url}: there is no such bucket; make it first")
                    if answer.status_code != 200:
                        self.refuse(path, answer)

            tried_once(once, lambda: same(self, path, source), f"{self.url}/{path}")

    def _page(self, asked: dict[str, str]) -> dict[str, Any]:
        where = f"{self._service}/storage/v1/b/{quote(self._bucket, safe='')}/o?{urlencode(asked)}"
        with self.request("GET", where, {}) as answer:
            if answer.status_code != 200:
                self.refuse("", answer)
            data = bytearray()
            if not received(answer, data, _MAX_PAGE_BYTES):
                raise StoreRemoteError(f"{self.url}: the server sends a list without end; do not use it")
        return json.loads(data)


def _credentials() -> httpx2.Auth | None:
    try:
        return _Token(cast(Any, google.auth).default(scopes=[_SCOPE])[0])  # its types are half there
    except DefaultCredentialsError:
        return None


class _Token(httpx2.Auth):
    """Google's credentials as a header, renewed when they end."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response]:
        with self._lock:
            if not self._credentials.valid:
                try:
                    self._credentials.refresh(Request())
                except GoogleAuthError as error:
                    if getattr(error, "retryable", False):
                        raise PassingError("Google's credentials cannot be renewed now") from None
                    raise StoreRemoteError(
                        "Google's credentials cannot be renewed; run gcloud auth application-default login"
                    ) from None
            self._credentials.apply(request.headers)
        yield request
