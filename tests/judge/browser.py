"""A headless Chromium, driven over its DevTools protocol: what a page looks like to a reader, and what it asks for."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

START_S, LOAD_S = 60.0, 60.0
CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const luminance = c => { const [r, g, b] = numbers(c).map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (numbers(c).length < 4 || numbers(c)[3] > 0) return c; } return 'rgb(255, 255, 255)'; };
  let worst = [99, ''];
  for (const e of document.body.querySelectorAll('*')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const a = luminance(getComputedStyle(e).color), b = luminance(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.textContent.trim().slice(0, 60)];
  }
  return worst;
})()"""


@dataclass
class Page:
    """What was seen. requests: addresses asked for. errors: console errors and violations of the policy."""

    width: int
    scroll_width: int
    text: str
    title: str
    contrast: tuple[float, str]
    wide: list[str]
    screenshot: bytes
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def chromium() -> str | None:
    """The program, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[str]:
    """A running browser's address."""
    program = chromium()
    assert program is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            file, deadline = Path(profile, "DevToolsActivePort"), time.monotonic() + START_S
            while not (file.is_file() and "\n" in file.read_text()):
                assert time.monotonic() < deadline, "the browser does not start"
                time.sleep(0.1)
            yield f"http://127.0.0.1:{file.read_text().splitlines()[0]}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def look(address: str, url: str, *, width: int, dark: bool) -> Page:
    """Load a page in a window of that width."""
    return asyncio.run(_look(address, url, width, dark))


async def _look(address: str, url: str, width: int, dark: bool) -> Page:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{address}/json/new?about:blank") as response:
            target = await response.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Network", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            await tab.call("Emulation.setDeviceMetricsOverride", **metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", features=[scheme])
            await tab.call("Page.navigate", url=url)
            await tab.until("Page.loadEventFired")
            scroll_width = await tab.value("document.documentElement.scrollWidth")
            wide = await tab.value(
                "[...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll') && "
                "e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 120))"
            )
            page = Page(
                width=await tab.value("document.documentElement.clientWidth"),
                scroll_width=scroll_width,
                text=await tab.value("document.body.innerText"),
                title=await tab.value("document.title"),
                contrast=tuple(await tab.value(CONTRAST)),
                wide=wide,
                screenshot=base64.b64decode(
                    (await tab.call("Page.captureScreenshot", captureBeyondViewport=True, format="png"))["data"]
                ),
            )
            for event in tab.events:
                said = event["params"]
                if event["method"] == "Network.requestWillBeSent":
                    page.requests.append(said["request"]["url"])
                elif event["method"] == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                    page.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
                elif event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                    page.errors.append(json.dumps(said)[:300])
        await session.get(f"{address}/json/close/{target['id']}")
        return page


class _Tab:
    """Commands and events of one tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._last = socket, 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> Any:
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        while True:
            message = await self._receive()
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]

    async def value(self, expression: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"]

    async def until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await asyncio.wait_for(self._socket.receive_json(), LOAD_S)
        if "method" in message:
            self.events.append(message)
        return message
