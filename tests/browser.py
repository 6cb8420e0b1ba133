"""A headless Chromium, driven over its own protocol (CDP) by a websocket of aiohttp, which Ray brings along."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page. ``errors`` holds uncaught exceptions, console errors and policy reports; ``requests`` every address asked for."""

    def __init__(self, address: str) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._count = 0
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._call(self._connect(address))
        for domain in ("Runtime", "Page", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _connect(self, address: str) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(address, max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(said["params"]["exceptionDetails"])[:500])
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.errors.append(said["params"]["entry"]["text"])
            elif said["method"] == "Runtime.consoleAPICalled" and said["params"]["type"] == "error":
                self.errors.append(json.dumps(said["params"]["args"])[:500])
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(said["params"]["request"]["url"])

    async def _ask(self, method: str, params: dict[str, Any]) -> Any:
        self._count += 1
        future = self._answers[self._count] = self._loop.create_future()
        await self._socket.send_str(
            json.dumps({"id": self._count, "method": method, "params": params})
        )
        return await future

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        said = self._call(self._ask(method, params))
        assert "error" not in said, said
        return said["result"]

    def open(self, file: Path) -> None:
        """Load a file, and wait until its script has set data-ready."""
        self.send("Page.navigate", url=file.resolve().as_uri())
        ready = "document.documentElement?.dataset.ready"
        self.run(
            f"new Promise(done => {{ const look = () => {ready} ? done(1) : setTimeout(look, 20); look(); }})"
        )

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is waited for."""
        said = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def picture(self, file: Path, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._call(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)


@contextmanager
def page(program: str, size: tuple[int, int] = (1400, 900)) -> Iterator[Page]:
    """A new page of a browser of its own, which ends with it."""
    with tempfile.TemporaryDirectory() as home:
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-background-networking"
        own = [
            "--remote-debugging-port=0",
            f"--user-data-dir={home}",
            f"--window-size={size[0]},{size[1]}",
        ]
        words = [program, *options.split(), *own, "about:blank"]
        process = subprocess.Popen(
            words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stderr is not None
            line = next((line for line in process.stderr if "DevTools listening" in line), None)
            assert line, "the browser did not start"
            threading.Thread(target=process.stderr.read, daemon=True).start()
            port = int(re.findall(r":(\d+)/", line)[0])
            shown = Page(_address(port))
            try:
                yield shown
            finally:
                shown.close()
        finally:
            process.terminate()
            process.wait(30)


def _address(port: int) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as reply:
        return next(
            target["webSocketDebuggerUrl"]
            for target in json.load(reply)
            if target["type"] == "page"
        )
