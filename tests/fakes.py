"""Fakes of the Hugging Face hub and of Google Cloud Storage, for tests without a network.

They are no real services: each answers, as its public documentation says, the few requests that posae and
huggingface_hub make, and checks what the real one checks (tokens, digests, parent commits, generations).
What the real ones do beside that shows only in the checks by hand of docs/sharing.md.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

TOKEN = "hf_madeup"


class Handler(BaseHTTPRequestHandler):
    """Requests as paths without query, bodies and ranges."""

    protocol_version = "HTTP/1.1"
    # Headers and body in one packet: else the kernel holds the second back for 40 ms.
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    @property
    def where(self) -> str:
        return unquote(urlsplit(self.path).path)

    @property
    def query(self) -> dict[str, str]:
        asked = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {key: values[0] for key, values in asked.items()}

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def answer_file(self, data: bytes, **headers: str) -> None:
        """The file, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, data, **headers)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416, Content_Range=f"bytes */{len(data)}")
        there = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.answer(206, data[start:stop], Content_Range=there, **headers)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], state: object = None) -> Generator[str]:
    """A server in this process; its URL. A handler finds ``state`` as ``self.server.state``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    cast(Any, server).state = state
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Files = dict[str, bytes]


@dataclass
class Hub:
    """Datasets, each with its commits, newest last."""

    datasets: dict[str, list[tuple[str, Files]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    uploaded: Files = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    """The headers of so many further answers, each 429."""

    def files(self, dataset: str, revision: str) -> tuple[str, Files] | None:
        commits = self.datasets[dataset]
        if revision == "main":
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, dataset: str, files: Files) -> str:
        commits = self.datasets.setdefault(dataset, [])
        together = {**(commits[-1][1] if commits else {}), **files}
        oid = hashlib.sha1(repr((len(commits), sorted(together))).encode()).hexdigest()
        commits.append((oid, together))
        return oid


def is_large(data: bytes) -> bool:
    """Whether the fake keeps it as it keeps large files."""
    return len(data) >= 1000


class HubHandler(Handler):
    """What huggingface_hub asks of a hub about datasets."""

    @property
    def hub(self) -> Hub:
        return cast(Any, self.server).state

    def fail(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def is_busy(self) -> bool:
        if self.hub.busy:
            self.answer(429, b"", **self.hub.busy.pop())
            return True
        return False

    def do_GET(self) -> None:
        if self.is_busy():
            return None
        if self.where.startswith("/content/"):
            # Where large files are: another host, which must not see the token.
            if self.headers.get("Authorization"):
                return self.fail(400, "TokenLeaked")
            return self.answer_file(self.hub.uploaded[self.where.removeprefix("/content/")])
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.where):
            return self.with_files(found[1], found[2], self.resolve, found[3])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self.where):
            return self.with_files(found[1], found[2], self.tree, found[3])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.where):
            return self.with_files(found[1], found[2] or "main", self.info, found[1])
        return self.fail(404, "NoSuchPage")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.body()
        if self.is_busy():
            return None
        if self.where == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "RepoNotFound")
        if self.where == "/api/repos/create":
            asked = json.loads(body)
            dataset = f"{asked['organization']}/{asked['name']}"
            if dataset in self.hub.datasets:
                return self.fail(409, "RepoExists")
            self.hub.private[dataset] = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.commit(dataset, {".gitattributes": b"*.bin filter=lfs\n"})
            return self.answer_json({"url": f"{self.endpoint}/datasets/{dataset}"})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", self.where):
            return self.with_files(found[1], found[2], self.paths, parse_qs(body.decode()).get("paths", []))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/([^/]+)", self.where):
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= 1000 else "regular",
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            return self.answer_json({"files": modes})
        if self.where.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.endpoint}/content/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer_json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/([^/]+)", self.where):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self.fail(404, "NoSuchPage")

    def do_PUT(self) -> None:
        data = self.body()
        oid = self.where.removeprefix("/content/")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.fail(400, "WrongDigest")
        self.hub.uploaded[oid] = data
        return self.answer(200)

    @property
    def endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def with_files(self, dataset: str, revision: str, then: Any, argument: Any) -> None:
        if dataset not in self.hub.datasets or (
            self.hub.private.get(dataset) and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.fail(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        found = self.hub.files(dataset, revision)
        if found is None:
            return self.fail(404, "RevisionNotFound")
        return then(*found, argument)

    def info(self, oid: str, files: Files, dataset: str) -> None:
        self.answer_json({"id": dataset, "sha": oid, "private": self.hub.private.get(dataset, False)})

    def resolve(self, oid: str, files: Files, path: str) -> None:
        if path not in files:
            return self.fail(404, "EntryNotFound")
        data = files[path]
        if not is_large(data):
            return self.answer_file(data)
        digest = hashlib.sha256(data).hexdigest()
        self.hub.uploaded[digest] = data
        # The same server by another name.
        elsewhere = self.endpoint.replace("127.0.0.1", "localhost")
        return self.answer(302, Location=f"{elsewhere}/content/{digest}?signature=secret")

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if is_large(data):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 100}
        return entry

    def tree(self, oid: str, files: Files, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        found = sorted(path for path in files if path.startswith(prefix))
        if not found:
            return self.fail(404, "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        page = [self.entry(path, files[path]) for path in found[start : start + 3]]
        if start + 3 >= len(found):
            return self.answer_json(page)
        more = f"{self.endpoint}{urlsplit(self.path).path}?cursor={start + 3}"
        return self.answer_json(page, Link=f'<{more}>; rel="next"')

    def paths(self, oid: str, files: Files, paths: list[str]) -> None:
        self.answer_json([self.entry(path, files[path]) for path in paths if path in files])

    def commit(self, dataset: str, lines: list[dict[str, Any]]) -> None:
        with self.hub.lock:
            if dataset not in self.hub.datasets:
                return self.fail(404, "RepoNotFound")
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, self.hub.datasets[dataset][-1][0]):
                return self.fail(412, "NotTheParent")
            files: Files = {}
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = self.hub.uploaded[value["oid"]]
            oid = self.hub.commit(dataset, files)
        return self.answer_json(
            {"commitUrl": f"{self.endpoint}/datasets/{dataset}/commit/{oid}", "commitOid": oid}
        )


class StorageHandler(Handler):
    """Google Cloud Storage, by its XML interface: files, lists, and uploads in parts."""

    @property
    def buckets(self) -> dict[str, Files]:
        return cast(Any, self.server).state

    @property
    def place(self) -> tuple[str, str]:
        bucket, _, name = self.where.lstrip("/").partition("/")
        return bucket, name

    def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        super().answer(status, data, **{"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT", **headers})

    def do_GET(self) -> None:
        bucket, name = self.place
        if bucket not in self.buckets:
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        files = self.buckets[bucket]
        if not name:
            return self.list(files)
        if name not in files:
            return self.answer(404)
        return self.answer_file(files[name], ETag=etag(files[name]))

    do_HEAD = do_GET

    def list(self, files: Files) -> None:
        names = sorted(name for name in files if name.startswith(self.query.get("prefix", "")))
        start = int(self.query.get("continuation-token", 0))
        more = f"<NextContinuationToken>{start + 3}</NextContinuationToken>" if start + 3 < len(names) else ""
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(files[name])}</Size><ETag>{etag(files[name])}</ETag>"
            "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in names[start : start + 3]
        )
        self.answer_xml("ListBucketResult", found + more)

    def answer_xml(self, name: str, words: str) -> None:
        self.answer(200, f"<{name}>{words}</{name}>".encode())

    def do_PUT(self) -> None:
        data, (bucket, name) = self.body(), self.place
        if bucket not in self.buckets:
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if upload := self.query.get("uploadId"):
            self.buckets.setdefault(upload, {})[self.query["partNumber"]] = data
            return self.answer(200, ETag=etag(data))
        if self.headers.get("x-goog-if-generation-match") == "0" and name in self.buckets[bucket]:
            return self.answer(412)
        self.buckets[bucket][name] = data
        return self.answer(200, ETag=etag(data))

    def do_POST(self) -> None:
        _, (bucket, name) = self.body(), self.place
        if "uploadId" not in self.query:
            return self.answer_xml("InitiateMultipartUploadResult", f"<UploadId>upload-{name}</UploadId>")
        parts = self.buckets.pop(self.query["uploadId"])
        data = b"".join(parts[number] for number in sorted(parts, key=int))
        self.buckets[bucket][name] = data
        return self.answer_xml("CompleteMultipartUploadResult", f"<ETag>{etag(data)}</ETag>")


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
