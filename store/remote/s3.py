"""A store's folder in S3, or in what speaks its protocol (MinIO, R2, Ceph), over boto3.

A read costs one request, which also tells the size of the whole. What is written goes in parts of 16 MiB,
held in memory one at a time, each with its MD5, which the service checks; a file appears when its last
part has arrived, and never in part. Credentials, region and endpoint are those that boto3 finds by
itself; where there are none, requests go unsigned, as public buckets want them.

boto3 and not s3fs: an answer of S3 tells the size of the whole file, which fsspec's reading drops.
"""

import base64
import hashlib
import io
import re
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import boto3
import urllib3.exceptions
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    SSLError,
)

from ..errors import SettingsError, StoreError, StoreRemoteError
from .folder import PIECE_BYTES, changed, inside, opened, same, shown, too_large
from .retries import BUSY, PassingError, retry_after_seconds, tried, tried_once

_MAX_PARTS = 10_000
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_BUSY_CODES = frozenset({"SlowDown", "RequestTimeout", "Throttling", "InternalError", "BadDigest"})


class S3Folder:
    """A folder in a bucket; see ``RemoteFolder``."""

    def __init__(self, url: str) -> None:
        """Look for credentials; connect to nothing yet.

        Args:
            url: ``s3://bucket/folder``; AWS_ENDPOINT_URL names another service than Amazon's.

        Raises:
            SettingsError: no bucket in it, or a user.
            StoreRemoteError: boto3's own configuration is broken.
        """
        parts = urlsplit(url)
        self.url = shown(url)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        if not self._bucket or "@" in self._bucket:
            raise SettingsError(f"{self.url} names no bucket; write s3://bucket/folder")
        options: dict[str, Any] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": 64,
            "retries": {"total_max_attempts": 1},  # ours are enough
            # Each part has its MD5, which every service knows; newer checksums not all.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        try:
            session = boto3.Session()
            if session.get_credentials() is None:
                options["signature_version"] = UNSIGNED
            self._client: Any = session.client("s3", config=Config(**options))
        except (BotoCoreError, ValueError) as error:
            raise StoreRemoteError(
                f"{self.url}: boto3 is not set up ({type(error).__name__}); see ~/.aws"
            ) from None
        weakref.finalize(self, self._client.close)

    def __repr__(self) -> str:
        """The class, and the URL as it may be shown."""
        return f"S3Folder({self.url!r})"

    def read(self, path: str, start: int, stop: int, of: int) -> bytes:
        """Bytes [start, stop) of a file; see ``RemoteFolder``. One request."""

        def once() -> bytes:
            with self._answer("get_object", path, Range=f"bytes={start}-{stop - 1}") as answer:
                found = _RANGE.fullmatch(answer.get("ContentRange", ""))
                if not found and (start, answer["ContentLength"]) != (0, stop):
                    raise self._error(path, "the server sends whole files only; use one that sends ranges")
                n_bytes = int(found[3]) if found else int(answer["ContentLength"])
                if n_bytes != of:
                    raise changed(path, n_bytes, of)
                if found and (int(found[1]), int(found[2])) != (start, stop - 1):
                    raise self._error(path, "the server sends another range than was asked for")
                data: bytes = answer["Body"].read(stop - start)
            if len(data) < stop - start:
                raise PassingError("the connection was cut")
            return data

        try:
            return tried(once, f"{self.url}/{path}")
        except _OutOfRangeError:
            raise changed(path, self.size_bytes(path) or 0, of) from None

    def read_small(self, path: str, limit_bytes: int) -> bytes:
        """The whole of a file of unknown size; see ``RemoteFolder``. One request."""

        def once() -> bytes:
            with self._answer("get_object", path) as answer:
                data: bytes = answer["Body"].read(limit_bytes + 1)
            if len(data) > limit_bytes:
                raise too_large(path, limit_bytes)
            if len(data) != answer["ContentLength"]:
                raise PassingError("the connection was cut")
            return data

        return tried(once, f"{self.url}/{path}")

    def size_bytes(self, path: str) -> int | None:
        """The size of a file, or None where there is none; see ``RemoteFolder``. One request."""

        def once() -> int:
            with self._answer("head_object", path) as answer:
                return int(answer["ContentLength"])

        try:
            return tried(once, f"{self.url}/{path}")
        except FileNotFoundError:
            return None

    def walk(self) -> Iterator[str]:
        """Every file below the folder; see ``RemoteFolder``. One request for each thousand."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        more: dict[str, Any] = {"Prefix": prefix}
        while True:
            page = tried(lambda: self._call("list_objects_v2", None, **more), self.url)
            for entry in page.get("Contents", ()):
                # A key that ends in / is what some tools write to show a folder.
                if not entry["Key"].endswith("/"):
                    yield inside(entry["Key"].removeprefix(prefix), self.url)
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def write(self, path: str, source: Path | bytes, *, only_new: bool = False) -> None:
        """Put a file there, whole or not at all; see ``RemoteFolder``. One request for each 16 MiB."""
        condition = {"IfNoneMatch": "*"} if only_new else {}
        with opened(source) as file:
            n_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            if n_bytes <= PIECE_BYTES:
                put = partial(self._put, "put_object", path, file.read(), **condition)
                tried_once(put, lambda: same(self, path, source), f"{self.url}/{path}")
                return
            upload: str = self._tried("create_multipart_upload", path)["UploadId"]
            try:
                parts: list[dict[str, Any]] = []
                part_bytes = max(PIECE_BYTES, -(-n_bytes // _MAX_PARTS))
                for number, data in enumerate(iter(lambda: file.read(part_bytes), b""), 1):
                    put = partial(self._put, "upload_part", path, data, UploadId=upload, PartNumber=number)
                    parts.append({"ETag": tried(put, f"{self.url}/{path}")["ETag"], "PartNumber": number})
                done = {"UploadId": upload, "MultipartUpload": {"Parts": parts}, **condition}
                complete = partial(self._call, "complete_multipart_upload", path, **done)
                tried_once(complete, lambda: same(self, path, source), f"{self.url}/{path}")
            except BaseException:
                with suppress(StoreError, PassingError, OSError):
                    self._call("abort_multipart_upload", path, UploadId=upload)
                raise

    def _put(self, operation: str, path: str, data: bytes, **arguments: Any) -> dict[str, Any]:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return self._call(operation, path, Body=data, ContentMD5=md5, **arguments)

    def _tried(self, operation: str, path: str) -> dict[str, Any]:
        return tried(lambda: self._call(operation, path), f"{self.url}/{path}")

    def _call(self, operation: str, path: str | None, **arguments: Any) -> dict[str, Any]:
        with self._answer(operation, path, **arguments) as answer:
            return answer

    @contextmanager
    def _answer(self, operation: str, path: str | None, **arguments: Any) -> Generator[dict[str, Any]]:
        """One request, about the bucket where ``path`` is None; a body lives as long as the ``with``."""
        if path is not None:
            arguments["Key"] = f"{self._prefix}/{inside(path, self.url)}".lstrip("/")
        try:
            answer = getattr(self._client, operation)(Bucket=self._bucket, **arguments)
            with closing(answer["Body"]) if "Body" in answer else nullcontext():
                yield answer
        except ClientError as error:
            self._refuse(path, error)
        except (HTTPClientError, IncompleteReadError, ConnectionError, urllib3.exceptions.HTTPError) as error:
            if isinstance(error, SSLError):
                raise self._error(path, "its certificate is not valid") from None
            raise PassingError("the server cannot be reached, or cut the connection") from None
        except BotoCoreError as error:
            raise self._error(path, f"boto3 refuses ({type(error).__name__}); {_CREDENTIALS}") from None

    def _refuse(self, path: str | None, error: ClientError) -> NoReturn:
        code = str(error.response.get("Error", {}).get("Code", ""))
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        if code == "NoSuchBucket":
            raise self._error(path, "there is no such bucket; make it first, or check the URL") from None
        if status == 404:
            raise FileNotFoundError(f"{self.url}/{path}: no such file") from None
        if status == 412:
            raise FileExistsError(f"{self.url}/{path} is there already") from None
        if status == 416:
            raise _OutOfRangeError from None
        if status in BUSY or status == 409 or code in _BUSY_CODES:
            wait = retry_after_seconds(metadata.get("HTTPHeaders", {}).get("retry-after"))
            raise PassingError(f"the server answers {status} ({code})", wait) from None
        if status in (401, 403):
            problem = f"the server answers {status} ({code}): not there, or not for you; "
            raise self._error(path, f"{problem}looked for credentials in {_CREDENTIALS}") from None
        raise self._error(
            path, f"the server answers {status} ({code}); check the URL and the region"
        ) from None

    def _error(self, path: str | None, problem: str) -> StoreRemoteError:
        return StoreRemoteError(f"{self.url if path is None else f'{self.url}/{path}'}: {problem}")


class _OutOfRangeError(Exception):
    """The file ends before the range begins."""
