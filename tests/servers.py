"""Servers for tests: nginx, moto for S3, Azurite for Azure, and the fakes of the hub and of Google's storage.

Each starts once a session and stays on this machine. ``server`` is one of them, made ready for a test:
its URL, its files, and the environment (also of child processes) in which posae finds its credentials. A
server whose program or package is missing skips its tests; CI has all.
"""

import base64
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, quote
from urllib.request import Request, urlopen
from uuid import uuid4
from xml.etree import ElementTree

import pytest
from fakes import TOKEN, Files, Hub, HubHandler, StorageHandler, serving

WRITABLE = ("s3", "gs", "az", "hf")
KINDS = ("http", *WRITABLE)


@dataclass(frozen=True)
class Server:
    """A folder on a server that no other test uses.

    Attributes:
        kind: one of ``KINDS``.
        base: the URL of the folder.
        put: put a file there, not by posae.
        files: all files there, not by posae.
        remove: remove a file, not by posae.
    """

    kind: str
    base: str
    put: Callable[[str, bytes], None]
    files: Callable[[], dict[str, bytes]]
    remove: Callable[[str], object]

    def url(self, path: str = "") -> str:
        """The URL of a folder within."""
        return f"{self.base}/{path}".rstrip("/")

    def fill(self, files: Mapping[str, bytes] | Path, under: str = "") -> str:
        """Put files, or all of a local folder, under a folder within; its URL."""
        found = files_of(files) if isinstance(files, Path) else files
        for path, data in found.items():
            self.put(f"{under}/{path}".lstrip("/"), data)
        return self.url(under)


class StartServer(Protocol):
    """The fixture ``start_server``: a server by its kind."""

    def __call__(self, kind: str) -> Server: ...


def files_of(root: Path) -> dict[str, bytes]:
    """All files of a local folder, a store's lock aside."""
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def local(kind: str, base: str, root: Path) -> Server:
    """A server that shows a folder of this machine."""

    def put(path: str, data: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    root.mkdir(parents=True, exist_ok=True)
    return Server(kind, base, put, lambda: files_of(root), lambda path: (root / path).unlink())


def in_dict(kind: str, base: str, files: Files, prefix: str) -> Server:
    """A server whose files are a dict of this process."""

    def put(path: str, data: bytes) -> None:
        files[prefix + path] = data

    return Server(
        kind,
        base,
        put,
        lambda: {n.removeprefix(prefix): d for n, d in files.items() if n.startswith(prefix)},
        lambda path: files.pop(prefix + path),
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def program(name: str) -> str:
    """The path of a program; daemons are not in everybody's PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:{sys.prefix}/node_modules/.bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextmanager
def running(words: list[str], port: int) -> Generator[None]:
    """A program, from when its port answers; stopped in the end."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None:
                    assert process.stderr
                    raise RuntimeError(process.stderr.read().decode())
                time.sleep(0.02)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)


NGINX = """
daemon off; master_process off; pid {root}/pid; error_log {root}/errors;
events {{ worker_connections 128; }}
http {{
    access_log off; default_type application/octet-stream;
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
    server {{
        listen 127.0.0.1:{port};
        root {root}/files;
        location /locked/ {{
            auth_basic x; auth_basic_user_file {root}/passwords; rewrite ^/locked/(.*)$ /$1 break;
        }}
        location /forbidden/ {{ return 403; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /circle/ {{ rewrite ^ /circle/again redirect; }}
        location /elsewhere/ {{ return 302 http://me:secret@127.0.0.2:{port}$request_uri; }}
        location /whole/ {{ max_ranges 0; rewrite ^/whole/(.*)$ /$1 break; }}
    }}
}}
"""


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, Path]]:
    """nginx: its URL, and the folder that it shows.

    Also below ``/locked/`` (user ``me``, password ``secret``), ``/moved/`` (a redirect to the same host),
    ``/whole/`` (no ranges); ``/forbidden/``, ``/circle/``, ``/elsewhere/`` say what they are.
    """
    path, root, port = program("nginx"), tmp_path_factory.mktemp("nginx"), free_port()
    (root / "files").mkdir()
    (root / "passwords").write_text("me:{PLAIN}secret\n")
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port))
    with running([path, "-c", str(root / "nginx.conf"), "-p", str(root), "-e", str(root / "errors")], port):
        yield f"http://127.0.0.1:{port}", root / "files"


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""What Azurite knows; its documentation names both."""


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Azure's storage by Azurite: its URL. It has the container ``bucket``, which everybody may read."""
    path, root, port = program("azurite-blob"), tmp_path_factory.mktemp("azurite"), free_port()
    words = ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--location", str(root)]
    with running([path, "--blobPort", str(port), *words], port):
        url = f"http://127.0.0.1:{port}"
        ask_azurite(url, "/bucket", query="restype=container", x_ms_blob_public_access="container")
        yield url


def ask_azurite(
    url: str, place: str, method: str = "PUT", data: bytes = b"", query: str = "", **headers: str
) -> None:
    """A request, signed with the account's key."""
    headers = {**headers, "x_ms_version": "2021-12-02", "x_ms_date": formatdate(usegmt=True)}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    resource = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}{quote(place)}" + "".join(
        f"\n{name}:{value}" for name, value in sorted(parse_qsl(query))
    )
    ours = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    length, kind = str(len(data) or ""), "application/octet-stream"
    words = f"{method}\n\n\n{length}\n\n{kind}\n\n\n\n\n\n\n{ours}{resource}"
    digest = hmac.new(base64.b64decode(AZURE_KEY), words.encode(), "sha256").digest()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    headers["Content-Type"] = kind
    where = f"{url}/{AZURE_ACCOUNT}{quote(place)}" + (f"?{query}" if query else "")
    with urlopen(Request(where, data if method == "PUT" else None, headers, method=method)):
        pass


def in_azurite(base: str, url: str, prefix: str) -> Server:
    def put(path: str, data: bytes) -> None:
        ask_azurite(url, f"/bucket/{prefix}{path}", data=data, x_ms_blob_type="BlockBlob")

    def get(path: str) -> bytes:
        with urlopen(f"{url}/{AZURE_ACCOUNT}/bucket{path}") as answer:
            return answer.read()

    def files() -> dict[str, bytes]:
        listed = ElementTree.fromstring(get(f"?restype=container&comp=list&prefix={prefix}"))
        names = [each.text or "" for each in listed.iter("Name")]
        return {name.removeprefix(prefix): get(f"/{quote(name)}") for name in names}

    return Server("az", base, put, files, lambda path: ask_azurite(url, f"/bucket/{prefix}{path}", "DELETE"))


@pytest.fixture(scope="session")
def moto() -> Generator[str]:
    """S3 by moto: its URL. It has the bucket ``bucket``."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = moto_client(boto3, url)
    client.create_bucket(Bucket="bucket")
    client.close()
    yield url
    server.stop()


def moto_client(boto3: Any, url: str) -> Any:
    keys = {"aws_access_key_id": "made", "aws_secret_access_key": "up", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


@pytest.fixture(scope="session")
def fake_storage() -> Generator[tuple[str, dict[str, Files]]]:
    """The fake of Google's storage: its URL, and its buckets."""
    buckets: dict[str, Files] = {"bucket": {}}
    with serving(StorageHandler, buckets) as url:
        yield url, buckets


@pytest.fixture(scope="session")
def fake_hub() -> Generator[tuple[str, Hub]]:
    """The fake of the hub: its URL, and its datasets."""
    hub = Hub()
    with serving(HubHandler, hub) as url:
        yield url, hub


@pytest.fixture
def start_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StartServer:
    """A server by its kind, ready to be used."""

    def setenv(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    def start(kind: str) -> Server:
        name = f"test-{uuid4().hex[:12]}"
        match kind:
            case "http":
                url, root = request.getfixturevalue("nginx")
                return local(kind, f"{url}/{name}", root / name)
            case "s3":
                url = request.getfixturevalue("moto")
                setenv(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="made", AWS_SECRET_ACCESS_KEY="up")
                setenv(AWS_DEFAULT_REGION="us-east-1")
                return in_moto(f"s3://bucket/{name}", url, f"{name}/", request)
            case "gs":
                url, buckets = request.getfixturevalue("fake_storage")
                setenv(STORAGE_EMULATOR_HOST=url)
                return in_dict(kind, f"gs://bucket/{name}", buckets["bucket"], f"{name}/")
            case "az":
                url = request.getfixturevalue("azurite")
                setenv(AZURE_STORAGE_USE_EMULATOR="true", AZURITE_BLOB_STORAGE_URL=url)
                return in_azurite(f"az://bucket/{name}", url, f"{name}/")
            case "hf":
                url, hub = request.getfixturevalue("fake_hub")
                setenv(HF_ENDPOINT=url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
                # It has read its environment when it was imported.
                monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
                monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
                monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
                return in_hub(f"hf://datasets/team/{name}", hub, f"team/{name}")
            case _:
                raise ValueError(kind)

    return start


def in_moto(base: str, url: str, prefix: str, request: pytest.FixtureRequest) -> Server:
    import boto3

    client = moto_client(boto3, url)
    request.addfinalizer(client.close)

    def put(path: str, data: bytes) -> None:
        client.put_object(Bucket="bucket", Key=prefix + path, Body=data)

    def files() -> dict[str, bytes]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        names = [each["Key"] for page in pages for each in page.get("Contents", ())]
        return {
            name.removeprefix(prefix): client.get_object(Bucket="bucket", Key=name)["Body"].read()
            for name in names
        }

    def remove(path: str) -> None:
        client.delete_object(Bucket="bucket", Key=prefix + path)

    return Server("s3", base, put, files, remove)


def in_hub(base: str, hub: Hub, dataset: str) -> Server:
    def files() -> dict[str, bytes]:
        commits = hub.datasets.get(dataset)
        return {n: d for n, d in commits[-1][1].items() if n != ".gitattributes"} if commits else {}

    def remove(path: str) -> None:
        hub.datasets[dataset][-1][1].pop(path)

    return Server("hf", base, lambda path, data: cast(None, hub.commit(dataset, {path: data})), files, remove)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """Each kind of server."""
    return start_server(request.param)


@pytest.fixture(params=WRITABLE)
def writable_server(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """Each kind of server that takes files."""
    return start_server(request.param)
