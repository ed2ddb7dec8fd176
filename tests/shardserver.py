"""A stand-in for a server of shards: files by path with ranges, late answers, and faults that are asked for."""

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Shelf:
    """Files by path. Every answer comes `delay` seconds late; `log` lists the requests, `most` of them at a time.

    `faults` are what happens to the next requests, one each: a status, `drop` (the connection ends in the middle of
    the bytes), or `refuse` (it ends before an answer). With `whole`, ranges are ignored.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.delay, self.whole = 0.0, False
        self.log: list[str] = []
        self.faults: list[int | str] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        self.address = ""

    @contextmanager
    def request(self, line):
        with self.lock:
            self.log.append(line)
            fault = self.faults.pop(0) if self.faults else None
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            time.sleep(self.delay)
            yield fault
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def serving():
    shelf = Shelf()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"shelf": shelf}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    shelf.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield shelf
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with self.shelf.request(
            f"{self.command} {self.path} {self.headers.get('Range', '')}".strip()
        ) as fault:
            if fault == "refuse":
                self.close_connection = True
                return
            content = self.shelf.files.get(self.path)
            if content is None or isinstance(fault, int):
                self.send_response(fault or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if asked and not self.shelf.whole else 200)
            if asked and not self.shelf.whole:
                first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and fault == "drop":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
            elif body:
                self.wfile.write(content)
