"""A headless Chromium, driven through the DevTools protocol over a pair of pipes: no port, no library, no download."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--no-default-browser-check", "--mute-audio", "--remote-debugging-pipe"),
)
_PATIENCE = 60.0


class Chromium:
    """One browser; a profile of its own in ``profile``."""

    def __init__(self, profile: Path) -> None:
        assert EXECUTABLE is not None
        self.commands, theirs_in = os.pipe(), None
        self.answers = os.pipe()
        theirs_in, ours_out = self.commands
        ours_in, theirs_out = self.answers
        # Chromium reads commands from file descriptor 3 and writes to 4.
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.out, self.into = ours_out, ours_in
        self.rest = b""
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self.out)
        os.close(self.into)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def page(self, *, script: bool = True) -> Page:
        """A new page that tells its console, its errors and its requests."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        if not script:
            page.call("Emulation.setScriptExecutionDisabled", value=True)
        return page

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        number = self.number
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                found: dict[str, Any] = answer["result"]
                return found

    def read(self) -> dict[str, Any]:
        """The next message; events are kept."""
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            data = os.read(self.into, 1 << 20)
            assert data, "Chromium has ended"
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """A tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, session=self.session, **parameters)

    def open(self, path: Path, fragment: str = "", width: int = 1280) -> None:
        """Load a file and wait until it is there."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        # Away first: a change of the fragment alone would load nothing.
        for url in ("about:blank", path.resolve().as_uri() + (f"#{fragment}" if fragment else "")):
            seen = len(self.browser.events)
            self.call("Page.navigate", url=url)
            while not any(e["method"] == "Page.loadEventFired" for e in self.browser.events[seen:]):
                self.browser.read()

    def run(self, expression: str) -> Any:
        """The value of an expression; the test fails if it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, as a person presses it."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": "\r" if key == "Enter" else key} if kind == "char" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events so far."""
        return [
            e["params"] for e in self.browser.events if e["method"] in methods and e.get("sessionId") == self.session
        ]
