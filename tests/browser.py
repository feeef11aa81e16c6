"""A real Chromium without a window, moved by its DevTools protocol; for tests of pages."""

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import websocket

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Tab": 9}
"""Keys that can be pressed, with their codes."""


class Page:
    """An open page.

    Attributes:
        problems: What the page wrote to the console or threw.
        asked: The addresses that it asked for, but for those that hold their content.
    """

    def __init__(self, socket):
        self._socket, self._number, self.problems, self.asked = socket, 0, [], []

    def call(self, method, **parameters):
        """Return the result of a method of the protocol, and note what happened until it came."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv())).get("id") != self._number:
            self._note(message.get("method"), message.get("params", {}))
        assert "error" not in message, message["error"]
        return message["result"]

    def _note(self, event, parameters):
        if event in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(parameters)
        url = parameters.get("request", {}).get("url", "data:")
        if event == "Network.requestWillBeSent" and not url.startswith("data:"):
            self.asked.append(url)

    def open(self, url):
        """Open an address, from the beginning even where only its fragment differs, and wait for it."""
        for address in ("about:blank", url):
            self.call("Page.navigate", url=address)
            self.until(f"location.href.startsWith({address.partition('#')[0]!r}) && document.readyState == 'complete'")

    def until(self, condition, seconds=30):
        """Wait until a condition holds, an expression of JavaScript."""
        end = time.monotonic() + seconds
        while not self.value(condition):
            assert time.monotonic() < end, f"{condition} did not come true"
            time.sleep(0.05)

    def value(self, expression):
        """Return the value of an expression of JavaScript."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key):
        """Press a key and let it go."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def drag(self, start, end):
        """Press the mouse at one place, (x, y) in pixels, and let it go at another."""
        for kind, (x, y), buttons in (("mousePressed", start, 1), ("mouseMoved", end, 1), ("mouseReleased", end, 0)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def names(self, role):
        """Return what a screen reader calls the things of a role, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        found = [node for node in nodes if not node["ignored"] and node["role"]["value"] == role]
        return [node["name"]["value"] for node in found]


@contextmanager
def chromium() -> Iterator[Page]:
    """Run a Chromium inside the context, and give its page."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
        ]
        process = subprocess.Popen(
            [CHROMIUM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            page = Page(websocket.create_connection(_address(Path(folder)), suppress_origin=True, timeout=60))
            for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
                page.call(f"{domain}.enable")
            yield page
        finally:
            process.terminate()
            process.wait(timeout=30)


def _address(folder):
    """Return where the first page of a Chromium is spoken to, once it has started."""
    end = time.monotonic() + 60
    while True:
        try:
            port = (folder / "DevToolsActivePort").read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                return next(item["webSocketDebuggerUrl"] for item in json.load(answer) if item["type"] == "page")
        except (OSError, IndexError, StopIteration):
            assert time.monotonic() < end, "Chromium did not start"
            time.sleep(0.1)
