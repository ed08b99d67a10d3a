"""The compiled block of train.py, as Inductor and Triton make it for an H100 (inductor.py)."""

import json
import os
import shutil
import subprocess
import sys

import phantom
import pytest
import torch
from processes import ROOT

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the device is 40 lines of C++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA's own"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    library = phantom.build(tmp_path_factory.mktemp("library"))
    command = [sys.executable, ROOT / "tests" / "inductor.py", library]
    command += [tmp_path_factory.mktemp("inductor")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_of_a_mistral_7b_no_kernel_spills(results):
    """In any configuration that Inductor would time on an H100, at 8192 tokens."""
    kernels = results["mistral"]
    assert len(kernels) >= 15 and len({name for name, *_ in kernels}) >= 10
    assert [kernel for kernel in kernels if kernel[2]] == []
    assert max(registers for _, registers, _ in kernels) <= 128


def test_output_and_gradients_are_as_near_to_float64_as_the_eager_blocks(results):
    eager = results["eager"]
    assert len(eager) == 11  # output, hidden, and nine parameters
    for compiled in results["compiled"]:
        assert compiled.keys() == eager.keys()
        worse = {name: error for name, error in compiled.items() if error > 1.2 * eager[name]}
        assert not worse and max(eager.values()) < 0.01


def test_a_lost_barrier_is_a_race(results):
    assert results["faults"]["a lost barrier"] == "Race"


def test_a_wrong_instruction_is_a_wrong_output(results):
    assert results["faults"]["a wrong instruction"] > 10 * results["eager"]["output"]
