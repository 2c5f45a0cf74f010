"""A storage bucket in memory behind Google's JSON interface, on a port of this host.

It serves what TensorStore's driver, gcsfs and the checkpoint library ask for: reads of ranges,
conditions on generations, uploads in one request, in two parts and in pieces, lists and copies.
`Bucket.fault` is asked before each request and may have it answered otherwise.
"""

import contextlib
import itertools
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 500
"""Names in an answer to a list."""


class Object(NamedTuple):
    """What a name stands for; each write gives another generation."""

    data: bytes
    generation: int
    seconds: float


class Bucket:
    """All objects of one emulator, by name; every bucket's name leads to the same ones.

    Attributes:
      objects: name to `Object`.
      requests: (method, path with its query, number of bytes of the answer) of each request.
      fault: of (method, path) gives None, a status to answer with, seconds (a float) to wait first,
        "cut" to end the connection in the middle of the upload or of the answer, "lost" to do
        what is asked and end it then, or "silent" to do and say nothing.
    """

    def __init__(self):
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.fault: Callable[[str, str], int | float | str | None] = lambda method, path: None
        self.lock = threading.RLock()
        self._generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    def put(self, name: str, data: bytes) -> Object:
        with self.lock:
            self.objects[name] = Object(data, next(self._generations), time.time())
            return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    """One request: routes by method and path, as the JSON interface does."""

    protocol_version = "HTTP/1.1"
    # An answer is one packet, and none waits for another.
    wbufsize, disable_nagle_algorithm = -1, True
    bucket: Bucket

    def handle_one_request(self):
        # Clients that were killed leave broken connections.
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        body, self.cut, self.lost = self._body(), False, False
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        fault = self.bucket.fault(self.command, self.path)
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            return self._json({"error": {"code": fault, "message": "injected"}}, fault)
        if fault == "silent":
            return None
        self.cut, self.lost = fault == "cut", fault == "lost"
        if self.cut and self.command != "GET":
            return self._hang_up()
        path = url.path.removeprefix("/download")
        with self.bucket.lock:
            if upload := re.fullmatch(r"/upload/(?:resumable/)?storage/v1/b/([^/]+)/o", path):
                return self._upload(body, upload[1])
            if "/rewriteTo/" in path:
                source, _, target = path.partition("/rewriteTo/")
                return self._copy(_object(source), _object("/" + target))
            if re.fullmatch(r"/storage/v1/b/[^/]+", path):
                return self._json({"kind": "storage#bucket", "name": path.rpartition("/")[2]})
            if re.fullmatch(r"/storage/v1/b/[^/]+/o/?", path):
                return self._list()
            if name := _object(path):
                return self._delete(name) if self.command == "DELETE" else self._read(name)
        return self._json({"error": {"code": 400, "message": path}}, 400)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.bucket.requests.append((self.command, self.path, len(data)))
        if self.lost:
            return self._hang_up()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.cut else data)
        self.close_connection |= self.cut

    def _json(self, value: dict, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _resource(self, name: str) -> dict:
        found = self.bucket.objects[name]
        written = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.seconds))
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "generation": str(found.generation),
            "size": str(len(found.data)),
            "crc32c": "",
            "etag": str(zlib.crc32(found.data)),
            "timeCreated": written,
            "updated": written,
        }

    def _refused(self, name: str, query: dict[str, str]) -> bool:
        """Answers with 412 or 304 where a condition on the generation does not hold."""
        found = self.bucket.objects.get(name)
        generation = found.generation if found else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            self._json({"error": {"code": 412, "message": "conditionNotMet"}}, 412)
            return True
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            self._send(304)
            return True
        return False

    def _absent(self, name: str) -> bool:
        if name in self.bucket.objects:
            return False
        self._json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)
        return True

    def _read(self, name: str) -> None:
        if self._absent(name) or self._refused(name, self.query):
            return None
        if self.query.get("alt") != "media":
            return self._json(self._resource(name))
        found = self.bucket.objects[name]
        headers = {"x-goog-generation": str(found.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        size = len(found.data)
        if not wanted:
            return self._send(200, found.data, **headers)
        if wanted[1]:
            start, stop = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
        else:
            start, stop = max(0, size - int(wanted[2])), size
        if start >= size:
            return self._send(416, **headers)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self._send(206, found.data[start:stop], **headers)

    def _delete(self, name: str) -> None:
        if not self._absent(name) and not self._refused(name, self.query):
            del self.bucket.objects[name]
            self._send(204)

    def _copy(self, source: str, target: str) -> None:
        if not self._absent(source):
            self.bucket.put(target, self.bucket.objects[source].data)
            self._json({"done": True, "resource": self._resource(target)})

    def _list(self) -> None:
        prefix, cut = self.query.get("prefix", ""), self.query.get("delimiter")
        after = self.query.get("pageToken", "")
        first, last = self.query.get("startOffset", ""), self.query.get("endOffset")
        seen = ""
        items, prefixes, most = [], set(), int(self.query.get("maxResults", PAGE))
        answer: dict = {"kind": "storage#objects"}
        for name in self.bucket.names(prefix):
            if name <= after or name < first or (last and name >= last):
                continue
            if len(items) + len(prefixes) >= min(most, PAGE):
                answer["nextPageToken"] = seen
                break
            seen = name
            head, found, _ = name[len(prefix) :].partition(cut) if cut else ("", "", "")
            if found:
                prefixes.add(prefix + head + cut)
            else:
                items.append(self._resource(name))
        self._json(answer | {"items": items, "prefixes": sorted(prefixes)})

    def _upload(self, body: bytes, bucket: str) -> None:
        kind, number = self.query.get("uploadType"), self.query.get("upload_id")
        if number:
            return self._upload_piece(number, body)
        if kind == "media":
            return self._store(self.query["name"], body, self.query)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, _ = re.split(rb"(?:\r?\n)?--" + re.escape(boundary), body)
            name = json.loads(re.split(rb"\r?\n\r?\n", described, maxsplit=1)[1])["name"]
            return self._store(name, re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1], self.query)
        name = self.query.get("name") or json.loads(body)["name"]
        number = str(len(self.bucket.uploads))
        self.bucket.uploads[number] = name, self.query, bytearray()
        here = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o"
        return self._send(200, Location=f"{here}?uploadType=resumable&upload_id={number}")

    def _upload_piece(self, number: str, body: bytes) -> None:
        if self.command == "DELETE":
            self.bucket.uploads.pop(number, None)
            return self._send(499)
        name, query, data = self.bucket.uploads[number]
        wanted = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"])
        if wanted[1]:
            data[int(wanted[1]) :] = body
        if wanted[2] != "*" and len(data) == int(wanted[2]):
            return self._store(name, bytes(data), query)
        return self._send(308, Range=f"bytes=0-{len(data) - 1}") if data else self._send(308)

    def _store(self, name: str, data: bytes, query: dict[str, str]) -> None:
        if not self._refused(name, query):
            self.bucket.put(name, data)
            self._json(self._resource(name))


def _object(path: str) -> str:
    found = re.fullmatch(r"/?(?:storage/v1/)?b/[^/]+/o/(.+)", path)
    return unquote(found[1]) if found else ""


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """An emulator while the block runs, and the environment in which programs find it."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        # Seconds of silence; it reads them once in a process.
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "3",
        # gcsfs would ask Google over gRPC what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "tests",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_ROOT": address.removeprefix("http://"),
    }
    try:
        yield bucket, environment
    finally:
        server.shutdown()
        server.server_close()
