"""A web server that takes its time: files below a folder, whole or in ranges, each after a delay.

    python benchmarks/slow_server.py PORT FOLDER SECONDS

In one thread, so that a thousand answers may be waiting at once, and a request costs 0.1 ms of CPU time.
"""

import asyncio
import multiprocessing
import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote

_RANGE = re.compile(rb"\r\nrange: bytes=(\d*)-(\d*)", re.IGNORECASE)


class _Server:
    def __init__(self, root: Path, delay: float) -> None:
        self.root, self.delay = root, delay

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(self.delay)
                self._answer(request, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        method, target, _ = request.split(b" ", 2)
        path = os.path.join(self.root, unquote(target.partition(b"?")[0].decode()).lstrip("/"))  # noqa: PTH118
        if not os.path.isfile(path):  # noqa: PTH113 (faster)
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (faster)
            size = os.fstat(file.fileno()).st_size
            start, stop, status, more = 0, size, b"200 OK", b""
            if asked := _RANGE.search(request):
                start = int(asked[1]) if asked[1] else size - int(asked[2])
                stop = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
                status, more = (
                    b"206 Partial Content",
                    b"Content-Range: bytes %d-%d/%d\r\n" % (start, stop - 1, size),
                )
            head = b"HTTP/1.1 %b\r\nAccept-Ranges: bytes\r\n%bContent-Length: %d\r\n\r\n" % (
                status,
                more,
                stop - start,
            )
            writer.write(head)
            if method == b"GET":
                writer.write(os.pread(file.fileno(), stop - start, start))


async def _serve(root: Path, delay: float, port: int, ready: Connection | None) -> None:
    server = await asyncio.start_server(_Server(root, delay).connected, "127.0.0.1", port, backlog=1024)
    if ready:
        ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _run(root: Path, delay: float, port: int, ready: Connection | None) -> None:
    asyncio.run(_serve(root, delay, port, ready))


@contextmanager
def served(root: Path, delay: float) -> Generator[str]:
    """The URL of a folder, served from another process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(root, delay, 0, theirs), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    _run(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[1]), None)
