"""A real browser for tests, driven over its DevTools protocol: no package beside `websockets`.

Chromium is looked for on the PATH; where there is none, or it does not start, the tests that need
it are skipped with the reason. It talks to this machine only.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect

PATIENCE_S: Final = 30.0
"""A browser on a busy machine takes seconds to start; what takes longer has failed."""
NAMES: Final = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
    "chromium-headless-shell",
)
_OPTIONS: Final = (
    *("--headless=new", "--remote-debugging-port=0", "--no-first-run", "--disable-gpu"),
    *("--no-sandbox", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--no-proxy-server"),
    *(
        "--disable-sync",
        "--disable-default-apps",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ),
)
"""Chromium's sandbox does not work for root, which CI is. No name is resolved: nothing but
addresses of this machine can be reached."""


def browser_path() -> str | None:
    """Of an installed browser; None: there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.problems: list[str] = []
        """Errors of scripts and refusals of the page's own policy, as the browser words them."""
        self._socket = socket
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = len(self._replies) + 1
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send(json.dumps(message))
        found = await asyncio.wait_for(reply, PATIENCE_S)
        if "error" in found:
            raise AssertionError(f"{method}: {found['error']}")
        return dict(found["result"])

    async def open(self, url: str) -> None:
        """Load a page, from now on noting its problems."""
        for domain in ("Runtime", "Log", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, expression: str) -> Any:
        """Of a JavaScript expression, which may be a promise."""
        reply = await self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in reply:
            raise AssertionError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Its value, as soon as it is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := await self.value(expression)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return found

    async def press(self, key: str) -> None:
        """A key as a user presses it."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}
        virtual = codes.get(key, ord(key.upper()[0]))
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=virtual,
                **(text if kind == "keyDown" else {}),
            )

    async def resize(self, width: int, height: int) -> None:
        """The size of the window, in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def prefer(self, scheme: str) -> None:
        """What the system says of colours: ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, path: Path) -> None:
        """What is to be seen, as PNG."""
        reply = await self.call("Page.captureScreenshot", format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(reply["data"]))

    async def _read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                self._replies[message["id"]].set_result(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded":
                entry = message["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(f"{entry['source']}: {entry['text']}")


@asynccontextmanager
async def browser_page(path: str) -> AsyncIterator[Page]:
    """A new browser with one empty page, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *(path, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            url = await _page_url(process, Path(folder) / "DevToolsActivePort")
            async with connect(url, max_size=None, proxy=None) as socket:
                page = Page(socket)
                try:
                    yield page
                finally:
                    await page.close()
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 10)
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _page_url(process: asyncio.subprocess.Process, port_file: Path) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while not port_file.exists() or "\n" not in port_file.read_text():  # noqa: ASYNC240
            if process.returncode is not None:
                raise AssertionError(f"the browser ended at its start with {process.returncode}")
            await asyncio.sleep(0.05)
    port = port_file.read_text().split("\n")[0]  # noqa: ASYNC240
    pages = await asyncio.to_thread(_pages, int(port))
    return str(next(each["webSocketDebuggerUrl"] for each in pages if each["type"] == "page"))


def _pages(port: int) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE_S) as reply:
        return list(json.loads(reply.read()))
