"""A whole run of train.py on a GPU without numbers (phantom.py): devices, dtypes, graphs, waits.

Each scenario is a run of two steps, or of three and two more, with evaluation, checkpoints and
exports; each planted fault is one that such a run must find.
"""

import json
import shutil
import subprocess
import sys

import phantom
import pytest
import torch
from processes import ROOT, SUMS

import model

NETWORK = model.LlamaConfig(256, 688, 2, 8, 66, 4, 32, max_position_embeddings=512)
SCENARIOS = {
    "one GPU": {},
    "eight, one block recomputed": {
        "world": 8, "recompute": 1, "adam_precision": "bf16", "tight": True,
    },
    "two groups of four, tied": {
        "world": 8, "replicas": 2, "network": {"tie_word_embeddings": True},
    },
    "not compiled": {"compile": False, "tight": True},
    "heads of 20": {"network": {"head_dim": 20}},
    "rank 1 of eight": {"world": 8, "rank": 1},
    "resumed": {"resumed": True, "adam_precision": "bf16"},
}  # fmt: skip
FAULTS = {
    "table_on_the_cpu": "on the same device",
    "item_in_a_micro_batch": "in a micro-batch the host waits",
    "longest_of_each_batch": None,
    "signal_asked_for_apart": None,
    "nothing_made_again": None,
    "clip_over_dtensors": None,
    "replicas_of_one": None,
    "first_device": "on the same device",
    "moments_on_the_cpu": "the optimizer's state is on",
    "moments_of_adamw_itself": None,
}
IN = {  # the scenarios of those that one GPU in its first steps cannot show
    "clip_over_dtensors": "eight, one block recomputed",
    "replicas_of_one": "eight, one block recomputed",
    "first_device": "rank 1 of eight",
    "moments_of_adamw_itself": "eight, one block recomputed",
}
OF_COMPILED = {"longest_of_each_batch", "nothing_made_again"}
pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the device is 40 lines of C++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA's own"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{scenario or fault: its result}, all from one process."""
    folder = tmp_path_factory.mktemp("phantom")
    library = phantom.build(tmp_path_factory.mktemp("library"))
    model.write_json(folder / "config.json", NETWORK.to_json())
    shutil.copy(SUMS / "tokenizer.model", folder)
    lines = (SUMS / "train.jsonl").read_text().splitlines(True)
    expert = [line for line in lines if '"gpt4"' in line][:30]
    rest = [line for line in lines if '"gpt3.5"' in line][:90]
    (folder / "few.jsonl").write_text("".join(expert + rest))
    (folder / "held_out.jsonl").write_text("".join(rest[:18]))
    faults = {f: SCENARIOS[IN.get(f, "one GPU")] | {"fault": f} for f in FAULTS}
    for fault in faults.keys() - OF_COMPILED:
        faults[fault]["compile"] = False  # which is quicker
    scenarios = SCENARIOS | faults
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "phantom.py", library, folder],
        input=json.dumps([*scenarios.values()]), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(scenarios, json.loads(done.stdout), strict=True))


@pytest.fixture(params=SCENARIOS)
def seen(results, request):
    found = results[request.param]
    assert "error" not in found, found["error"][:3000]
    return found | SCENARIOS[request.param] | {"name": request.param}


def test_a_run_saves_and_exports(seen):
    assert any(file.startswith("checkpoints/") for file in seen["files"])
    assert seen.get("rank") or any(file.startswith("epoch-") for file in seen["files"])
    assert seen["launches"] > 2 * len(seen["waits"])  # and of evaluations


def test_a_step_waits_once_and_reduces_once_beside_the_gradients(seen):
    assert seen["waits"] == [["tolist"]] * len(seen["waits"]) and len(seen["waits"]) >= 2
    # A group of ranks tells another its gradients, of 2 blocks and the root.
    of_gradients = NETWORK.num_hidden_layers + 1 if seen.get("replicas") else 0
    assert seen["all_reduces"] == [1 + of_gradients] * len(seen["waits"])


def test_all_blocks_and_steps_share_one_graph(seen):
    """And one without gradients, of the first evaluation: before step 1, or after a resumed 4."""
    expected = [1, 2] if seen.get("resumed") else [2] * len(seen["frames"])
    assert seen["frames"] == ([0] * len(expected) if seen.get("compile") is False else expected)


def test_blocks_are_compiled_without_the_pass_that_gave_wrong_gradients(seen):
    """pytorch#193061"""
    assert seen["mix_order_reduction"] is (seen.get("compile") is False)


def test_no_process_group_is_made_but_those_of_replicas(seen):
    """Two groups of four ranks: each rank's own of four, and one with its like in the other."""
    assert {*seen["groups"]} == ({2, 4} if seen.get("replicas") else set())


def test_blocks_are_gathered_once_a_micro_batch_if_there_is_room_and_else_twice(seen):
    """The root once in any case. An evaluation between two steps leaves nothing gathered."""
    times = 2 if seen.get("tight") else 1
    of_micro_batch = 1 + times * NETWORK.num_hidden_layers
    assert seen["gathers"] == [2 * of_micro_batch] * len(seen["waits"])


def test_moments_are_in_the_dtype_asked_for_at_every_step_and_in_files(seen):
    """AdamW takes those in bf16 over float32 weights, of a resumed run as well."""
    moments = f"torch.{'bfloat16' if seen.get('adam_precision') == 'bf16' else 'float32'}"
    assert seen["moments"] == [moments] * len(seen["waits"])
    assert seen["dtypes"]["exp_avg"] == seen["dtypes"]["exp_avg_sq"] == moments


# Blocks that are not compiled: tests/test_plan.py, on a CPU.
@pytest.mark.parametrize("seen", [s for s in SCENARIOS if s != "not compiled"], indirect=True)
def test_blocks_keep_for_backward_what_the_plan_says(seen):
    d, f = NETWORK.hidden_size, NETWORK.intermediate_size
    once = phantom.TOKENS * 2 * (8 * d + 4 * f)  # of the plan's activations: one block's backward
    assert {*seen["saved"]} == {seen["planned"] - once}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(results, fault):
    found = results[fault]
    if FAULTS[fault]:
        assert FAULTS[fault] in found.get("error", "")
        return
    sound = results[IN.get(fault, "one GPU")]
    assert "error" not in found
    if fault == "signal_asked_for_apart":
        assert found["waits"] != sound["waits"] and found["all_reduces"] != sound["all_reduces"]
    elif fault == "clip_over_dtensors":
        assert found["all_reduces"] != sound["all_reduces"]
    elif fault == "moments_of_adamw_itself":
        assert found["moments"] != sound["moments"]
    elif fault == "longest_of_each_batch":
        assert found["frames"][-1] > sound["frames"][-1]
    elif fault == "replicas_of_one":
        assert 1 in found["groups"] and not sound["groups"]
    else:
        assert found["saved"][0] > 1.2 * sound["saved"][0]
