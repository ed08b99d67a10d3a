"""A page in headless Chromium, driven over --remote-debugging-pipe: JSON, each ended by a zero."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import signal
import time

NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]


class Page:
    def __init__(self, url, profile, size=(1000, 700)):
        (inner_in, self.to), (self.back, inner_out) = high_pipe(), high_pipe()
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        arguments += ["--window-size={},{}".format(*size)]
        ends = [(os.POSIX_SPAWN_DUP2, inner_in, 3), (os.POSIX_SPAWN_DUP2, inner_out, 4)]
        ends.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
        options = {"file_actions": ends, "setpgroup": 0}
        self.pid = os.posix_spawn(CHROMIUM, arguments, os.environ, **options)
        os.close(inner_in), os.close(inner_out)
        self.ids, self.rest, self.session = itertools.count(1), b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete'")

    def call(self, method, **params):
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.back, 1 << 20) or b'{"id": 0}\0'
            first, _, self.rest = self.rest.partition(b"\0")
            if (answer := json.loads(first)).get("id") == number:
                return answer.get("result", {})

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer.get("result", {}).get("value")

    def until(self, script, seconds=60):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.02)

    def type(self, text):
        """As typed where the cursor is, and Enter."""
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **enter)

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self):
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def high_pipe():
    """Above the numbers that Chromium wants them at."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high
