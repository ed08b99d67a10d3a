"""A stranger's hour, in a minute: the commands of README.md as they stand, on a small model.

With a home of their own, on terminals of 100 and of 80 columns, and in a pipe.
"""

import fcntl
import importlib
import os
import pty
import re
import shlex
import struct
import termios
import threading

import lives
import processes
import pytest
from processes import ROOT

SECTION = (ROOT / "README.md").read_text().partition("## On your own data")[2]
LINES = SECTION.partition("```\n")[2].partition("```")[0].splitlines()
LINES = [line for line in LINES if "--web" not in line]  # which ends by Ctrl-C: test_web.py
SMALL = ["--batch-tokens", "256", "--epochs", "2", "--precision", "fp32"]


def program(arguments):
    name, *arguments = arguments
    module = "support.preview" if name == "data.py" else name.removesuffix(".py")
    importlib.import_module(module).main(arguments)


def typed(words, places, columns, home):
    """(exit codes, all that is shown) of a command as README.md has it, its names replaced."""
    name = next(word for word in words if word.endswith(".py"))
    ranks = 2 if words[0] == "torchrun" else 1
    arguments = [places.get(word, word) for word in words[words.index(name) + 1 :]]
    arguments += SMALL if "--out" in words else []
    screen = Terminal(columns) if columns else Pipe(home / "log")
    environment = {"HOME": str(home), "COLUMNS": str(columns or 80)}
    running = processes.start([name, *arguments], ranks, screen.path, main=program, **environment)
    return processes.finish(running), screen.shown()


class Pipe:
    def __init__(self, path):
        self.path = path
        path.write_text("")

    def shown(self):
        return self.path.read_text()


class Terminal:
    def __init__(self, columns):
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.path, self.bytes = os.ttyname(self.slave), b""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        while not self.bytes.endswith(END):
            self.bytes += os.read(self.master, 1 << 16)

    def shown(self):
        os.write(self.slave, END)
        self.reader.join(60)
        os.close(self.slave)
        os.close(self.master)
        return self.bytes.removesuffix(END).decode()


END = b"\x04 end \x04"


@pytest.mark.parametrize("columns", [100, 80, None])
def test_the_commands_of_the_readme_run_as_they_stand(few, tmp_path, columns):
    home = tmp_path / "home"
    home.mkdir()
    folder = lives.small_model(tmp_path / "small", tied=False)
    places = {"DIR": folder, "chats.jsonl": few, "held_out.jsonl": few, "RUN": tmp_path / "RUN"}
    places["RUN/model"] = tmp_path / "RUN" / "model"
    programs = [re.search(r"\w+\.py", line)[0] for line in LINES]
    assert programs == ["data.py", "train.py", "train.py", "plot.py", "train.py", "chat.py"]
    screens = {}
    for line in LINES:
        words = shlex.split(line, comments=True)
        codes, shown = typed(words, places, columns, home)
        assert set(codes) == {0} and "Traceback" not in shown, (line, shown[-3000:])
        screens[line] = shown
    everything = "\n".join(screens.values())
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", everything)
    for row in plain.split("\n"):
        *refreshed, last = row.rstrip("\r").split("\r")
        assert all(len(text) < columns for text in refreshed if columns), row
        # A path may be as long as it is, and a log's line of a step has all of its numbers.
        of_a_log = str(tmp_path) in last or (not columns and last.startswith("step "))
        assert len(last) <= 100 or of_a_log, last
    (training,) = [shown for line, shown in screens.items() if line.startswith("torchrun")]
    assert re.search(r"step \d+/\d+  \d+:\d\d:\d\d left", training)
    assert re.search(r"    gpt4 +loss [\d.]+, token accuracy [\d.]+%, \d+ tokens", everything)
    assert "class gpt4" in everything and "w=0.1" in everything.replace(" \x1b[0m", "")
    assert (tmp_path / "RUN" / "curves.png").exists()


def test_a_run_that_ends_within_an_epoch_says_so_and_a_log_has_few_lines(few, tmp_path):
    log, out = Pipe(tmp_path / "log"), tmp_path / "RUN"
    settings = processes.flags(few, out, epochs=9, max_steps=15, eval_data=few)
    (code,) = processes.finish(processes.start(settings, 1, log.path))
    shown = log.shown()
    assert code == 0 and "steps 15, epochs 3; per step" in shown
    steps = re.findall(r"^step (\d+)/15 .*$", shown, re.MULTILINE)
    assert steps[0] == "1" and steps[-1] == "15" and len(steps) < 6
    assert "  epoch 3/3  " in shown and f"exported {out}/epoch-3 after step 15; " in shown
    assert re.search(r"memory +about \d+\.\d\d MiB per rank; ", shown)
    accuracy = processes.metrics(out, "eval")[-1]["eval"]["gpt4"]["accuracy"]
    last = shown.partition("evaluation at step 15\n")[2].split("\n")
    assert re.match(rf"    gpt4 +loss [\d.]+, token accuracy {accuracy:.2%}, \d+ tokens$", last[0])
    assert last[1].startswith("    gpt3.5 ")
