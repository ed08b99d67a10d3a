"""Files that must outlive a kill, and what a kill may leave of them."""

import contextlib
import errno
import json
import os
from pathlib import Path


def sync(path):
    """Have the disk hold a file or folder before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some disks of other machines cannot do that with a folder
        if not (os.path.isdir(path) and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def read_metrics(path):
    """The whole lines of a metrics.jsonl, each a dict; a half written last one is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def exported(folder):
    """The folder, or the model in it where it is a run's."""
    folder, inner = Path(folder), Path(folder) / "model"
    is_run = (inner / "crlft.json").exists() and not (folder / "crlft.json").exists()
    return inner if is_run else folder
