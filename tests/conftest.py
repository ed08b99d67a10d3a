"""What several tests share: commands run in this process, and files beside the repository.

A test that needs a missing file skips.
"""

import importlib.metadata
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)  # for networks this small more only wait for each other
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def version(name, given=importlib.metadata.version):
    """Of an installed package; not of Hugging Face's `kernels`, which our folder hides here.

    transformers imports from it if this finds a version of it.
    """
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return given(name)


importlib.metadata.version = version


LONGEST = """survival tokenizer cross_entropy phantom ablation checkpoint data inductor llama3
             chat ranks one_page train plan ptx model"""


def pytest_collection_modifyitems(items):
    """The longest files first: with a worker per core, each takes the next file."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def stories():
    """A pretrained Llama of 260K parameters, with the text llama2.c generates from it."""
    return shared("checkpoints/stories260K")


@pytest.fixture(scope="session")
def llama2():
    """A folder with Llama 2's tokenizer.model and nothing else."""
    return shared("tokenizers/llama2")


@pytest.fixture(scope="session")
def code_mixed():
    """6,250 real conversations of the classes gpt4 and gpt3.5."""
    return shared("data/code_mixed.train.jsonl")


@pytest.fixture(scope="session")
def sums():
    """The embedded example's folder."""
    return ROOT / "examples" / "sums"


@pytest.fixture(scope="session")
def few(sums, tmp_path_factory):
    """60 conversations of the sums, of both classes; the first ten are the expert's."""
    path = tmp_path_factory.mktemp("data") / "few.jsonl"
    lines = (sums / "train.jsonl").read_text().splitlines()
    expert = [line for line in lines if '"gpt4"' in line][:10]
    path.write_text("\n".join(expert + [line for line in lines if '"gpt3.5"' in line][:50]) + "\n")
    return path


@pytest.fixture(scope="module")
def ranks():
    """One rank on the CPU, with a process group as train.py makes it."""
    if dist.is_initialized():
        dist.destroy_process_group()
    from support.ranks import Ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        made = Ranks()
        yield made
        made.finish()


@pytest.fixture
def run(capsys, monkeypatch):
    """run(main, *arguments) is (exit code, stdout, stderr) of that command."""

    def run(main, *arguments, stdin=None):
        code = 0
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        return code, *capsys.readouterr()

    return run
