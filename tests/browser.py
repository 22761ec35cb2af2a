"""A headless Chromium, driven over the pipe of its own protocol: no driver program, no socket.

with Browser(folder) as browser:
    browser.open(path, width=390)
    browser.press("ArrowRight")
    browser.evaluate("document.title")
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60  # seconds for one answer; a first start on a busy machine takes some
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
TEXTS = {"Enter": "\r", " ": " "}  # keys that press buttons do so by the character they type


def find_chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """`events` are those of the page since it was opened: console, log, network."""

    def __init__(self, folder: Path):
        flags = ["--headless=new", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += ["--hide-scrollbars", "--disable-dev-shm-usage", f"--user-data-dir={folder}"]
        flags += ["--no-sandbox"] if os.getuid() == 0 else []
        ends = [*os.pipe(), *os.pipe()]
        # Above 4, as the browser reads from 3 and writes to 4.
        read, self.out, self.into, written = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in ends)
        for fd in ends:
            os.close(fd)
        start = f'exec "$@" 3<&{read} 4>&{written} {read}<&- {written}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", find_chromium(), *flags, "about:blank"],
            pass_fds=(read, written), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(written)
        self.events, self.rest, self.count, self.session = [], b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def read(self) -> dict:
        """The next message. Raises TimeoutError, or EOFError when the browser is gone."""
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], PATIENCE)[0]:
                raise TimeoutError(f"Chromium said nothing for {PATIENCE} s")
            more = os.read(self.into, 1 << 20)
            if not more:
                raise EOFError("Chromium ended")
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def of(self, method: str) -> list[dict]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, path: Path, width: int, height: int = 800, scheme: str = "light"):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=False,
            deviceScaleFactor=1,
        )  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.of("Page.loadEventFired"):
            self.events.append(self.read())

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        asked = dict(expression=expression, returnByValue=True, awaitPromise=True)
        answer = self.call("Runtime.evaluate", **asked)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str):
        about = {"key": key, "code": "Space" if key == " " else key}
        about |= {"windowsVirtualKeyCode": KEYS[key]}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path: Path):
        """The whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
