"""train.py on a disk that takes a second for every checkpoint.

    python tests/slow_disk.py FLAGS OF TRAIN.PY

Prints, of each checkpoint, how many steps were done when it was written. In the environment,
MEMORY=1: on a host with one byte to spare; COPY=fails: where the state cannot be copied.
"""

import os
import sys
import time
from pathlib import Path

import train

out = Path(sys.argv[sys.argv.index("--out") + 1])
write_data = train.CheckpointWriter.write_data


def slowly(writer, *arguments):
    time.sleep(1)
    written = write_data(writer, *arguments)
    if os.environ.get("RANK", "0") == "0":
        steps = (out / "metrics.jsonl").read_bytes().count(b'"lr": ')
        print(Path(writer.path).stem, "written at step", steps, flush=True)
    return written


train.CheckpointWriter.write_data = slowly
if "MEMORY" in os.environ:
    train.available_memory = lambda: int(os.environ["MEMORY"])
if os.environ.get("COPY") == "fails":

    def fail(*_):
        raise RuntimeError("cannot pin memory")

    train.StateDictStager.stage = fail
train.main()
