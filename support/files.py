"""Writing files that must survive a kill, and reading those that a run leaves."""

import contextlib
import errno
import json
import os
import time
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from loss import class_table


def sync(*paths):
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some network disks cannot sync a folder
            if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def reading(path, hint=""):
    """Anything wrong in a JSON file becomes a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # of any type: what the file holds may be odd in any way
        raise ValueError(f"{path}: cannot be read: {error!r:.300}{hint}") from None


def told_torchrun(error):
    """The error; if torchrun started this process, it prints it last. (The form is elastic's.)"""
    message = {"message": error, "extraInfo": {"timestamp": int(time.time())}}
    with contextlib.suppress(KeyError, OSError):  # KeyError: not started by torchrun
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
    return error


def of_type(value, *types):
    if type(value) not in types:
        raise TypeError(f"{value!r:.50} is not of type {types[0].__name__}")
    return value


def read_metrics(path):
    """The lines of a metrics.jsonl, each a dict, except what follows the last newline."""
    *texts, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, text in enumerate(texts, start=1):
        with reading(f"{path}:{number}"):
            line = json.loads(text)
            of_type(line["step"], int)
            for of_class in line["eval" if "eval" in line else "classes"].values():
                of_type(of_class.get("loss"), float, int, NoneType)
        lines.append(line)
    return lines


def model_folder(folder):
    """The folder itself, or, if it is a run's, the model in it."""
    folder, inner = Path(folder), Path(folder) / "model"
    is_run = (inner / "crlft.json").exists() and not (folder / "crlft.json").exists()
    return inner if is_run else folder


class Export(NamedTuple):
    """An exported model, by its crlft.json."""

    classes: dict  # {name: SourceClass}
    conditioned: bool  # was the class in the prompt?
    weights: dict  # {name: weight}; {} in older exports
    most_answers: int  # the most in one of its training conversations; 0: unknown
    steps: int | None  # of training; None in a folder that no run exported
    max_length: int | None  # tokens of its training conversations, if limited by a flag


def read_export(folder):
    """The Export in a folder, None without crlft.json; ValueError if that cannot be read."""
    path = Path(folder) / "crlft.json"
    if not path.exists():
        return None
    with reading(path):
        raw = json.loads(path.read_bytes())
        weights = {name: float(weight) for name, weight in raw.get("weights", {}).items()}
        numbers = raw.get("steps"), raw.get("config", {}).get("max_length")
        return Export(
            class_table(raw["classes"]), of_type(raw["conditioned"], bool), weights,
            raw.get("most_answers", 0), *(of_type(number, int, NoneType) for number in numbers),
        )  # fmt: skip
