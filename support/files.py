"""Files that must survive a kill, and how those that a run leaves are read."""

import errno
import json
import os
from pathlib import Path
from typing import NamedTuple

from loss import class_table


def sync(path):
    """Have the disk hold a file or folder before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network disks cannot do that with a folder
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def read_metrics(path):
    """The complete lines of a metrics.jsonl, each a dict, without a half-written last one."""
    lines = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def model_folder(folder):
    """The folder itself, or the model in it if it is a run's."""
    folder, inner = Path(folder), Path(folder) / "model"
    is_run = (inner / "crlft.json").exists() and not (folder / "crlft.json").exists()
    return inner if is_run else folder


class Export(NamedTuple):
    """An exported model, by its crlft.json."""

    classes: dict  # {name: SourceClass}
    conditioned: bool  # was the class in the prompt?
    weights: dict  # {name: weight}; {} in older exports
    most_answers: int  # the most that one of its training conversations had; 0: unknown
    steps: int | None  # of training; None in a folder that no run exported
    max_length: int | None  # tokens of its training conversations, if limited by a flag


def read_export(folder):
    """The Export in a folder, None without crlft.json; ValueError if that cannot be read."""
    path = Path(folder) / "crlft.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
        weights = {name: float(weight) for name, weight in raw.get("weights", {}).items()}
        numbers = raw.get("steps"), raw.get("config", {}).get("max_length")
        if not all(isinstance(number, int | None) for number in numbers):
            raise ValueError(f"steps and max_length are {numbers}")
        classes = class_table(raw["classes"])
        return Export(classes, raw["conditioned"], weights, raw.get("most_answers", 0), *numbers)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None
