"""A web server in a thread, for tests of downloads: it gives what a dictionary says and notes what was asked."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep


class Site:
    """What a server gives.

    Attributes:
        pages: Path -> bytes, or an HTTP status, or a list of these for one request after the other; ``Cut`` bytes are
            announced whole, but end in the middle; of ``Slow`` ones there is one in a twentieth of a second.
        asked: The paths that were asked for.
        url: Where the server is, without a slash at the end.
    """

    def __init__(self):
        self.pages, self.asked, self.url = {}, [], ""

    def next(self, path):
        self.asked.append(path)
        page = self.pages.get(path, 404)
        if isinstance(page, list):
            page = page.pop(0) if len(page) > 1 else page[0]
        return page


class Cut(bytes):
    """Bytes of which only the first half is sent."""


class Slow(bytes):
    """Bytes that come one by one, as long as anybody waits for them."""


@contextmanager
def serve() -> Iterator[Site]:
    """Run a server on this machine inside the context."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            page = site.next(self.path)
            body = page if isinstance(page, bytes) else b"nothing here"
            self.send_response(200 if isinstance(page, bytes) else page)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not isinstance(page, Slow):
                self.wfile.write(body[: len(body) // 2] if isinstance(page, Cut) else body)
                return
            with suppress(OSError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    sleep(0.05)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
