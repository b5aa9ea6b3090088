# SPDX-License-Identifier: MIT
"""A real Chromium for tests, through its driver's WebDriver protocol, which is plain HTTP.

Nobody's library: `chromium` and `chromedriver` are Debian's packages of these names.
"""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-color-profile=srgb"),
)
_KEYS = {"ArrowLeft": "\ue012", "ArrowDown": "\ue015", "Enter": "\ue007", "Tab": "\ue004"}


class Browser:
    """One window. Raises `httpx.HTTPStatusError` for what the driver refuses."""

    def __init__(self, driver: str, profile: Path) -> None:
        self._http = httpx.Client(base_url=driver, timeout=60, trust_env=False)
        options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": "/usr/bin/chromium"}
        asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._post("/session", capabilities={"alwaysMatch": asked})
        self._session = f"/session/{made['sessionId']}"

    def close(self) -> None:
        self._http.delete(self._session)
        self._http.close()

    def open(self, url: str) -> None:
        self._post(f"{self._session}/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns."""
        return self._post(f"{self._session}/execute/sync", script=script, args=list(arguments))

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """What the script returns once that is anything."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"never: {script}\n{self.log()}"
            time.sleep(0.1)
        return found

    def press(self, *keys: str) -> None:
        """Keys by their name, as a person's."""
        codes = [_KEYS.get(key, key) for key in keys]
        strokes = [{"type": kind, "value": c} for c in codes for kind in ("keyDown", "keyUp")]
        hands = [{"type": "key", "id": "keyboard", "actions": strokes}]
        self._post(f"{self._session}/actions", actions=hands)

    def look(self, width: int, height: int, scheme: str) -> None:
        """The window's size, and what the person's system is like: `light` or `dark`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._command("Emulation.setEmulatedMedia", {"features": [feature]})

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._http.get(f"{self._session}/screenshot").json()["value"])

    def log(self) -> list[str]:
        """What the page and the browser complained of since the last time."""
        return [one["message"] for one in self._post(f"{self._session}/se/log", type="browser")]

    def _command(self, name: str, parameters: dict[str, Any]) -> None:
        self._post(f"{self._session}/goog/cdp/execute", cmd=name, params=parameters)

    def _post(self, path: str, **body: Any) -> Any:
        reply = self._http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["value"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A window, and no process left of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["chromedriver", f"--port={port}", "--allowed-ips=127.0.0.1"]
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _until(lambda: httpx.get(f"{url}/status", trust_env=False).status_code == 200)
        made = Browser(url, folder / "profile")
        try:
            yield made
        finally:
            made.close()
    finally:
        process.terminate()
        process.wait(20)


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if done():
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline
        time.sleep(0.05)
