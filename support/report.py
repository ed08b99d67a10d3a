"""What a run prints: lines that stay, and below them one line that is refreshed in place."""

import os
import shutil
import time


class StatusLine:
    """One refreshed line on a terminal; elsewhere a line of its own every `seconds`.

    Whatever else is to be printed goes through `say`, which ends the refreshed line first.
    """

    def __init__(self, stream, seconds):
        self.stream, self.seconds = stream, seconds
        self.open, self.shown = False, 0.0

    def refresh(self, text, final=False):
        now, terminal = time.monotonic(), self.stream.isatty()
        if now - self.shown < (0.1 if terminal else self.seconds) and not final:
            return
        self.shown, self.open = now, terminal and not final
        if terminal:
            width = shutil.get_terminal_size().columns
            text = f"\r{text[: width - 1]}\033[K"
        print(text, end="" if self.open else "\n", file=self.stream, flush=True)

    def say(self, text):
        print(("\n" if self.open else "") + text, file=self.stream, flush=True)
        self.open = False

    def say_in_handler(self, text):
        """From a signal's handler, which may have interrupted a print: past Python's buffers."""
        os.write(self.stream.fileno(), (("\n" if self.open else "") + text + "\n").encode())
        self.open = False
