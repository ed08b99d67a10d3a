"""README.md and docs/ name what is there: functions, tests, flags, files; their lines run."""

import dataclasses
import importlib
import inspect
import re
import subprocess

import pytest
import torch
from processes import ROOT

import train

README = (ROOT / "README.md").read_text()
FILES = ["README.md", "examples/README.md", "tests/README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {str((ROOT / page).relative_to(ROOT)): (ROOT / page).read_text() for page in FILES}
NAMES = {
    (name, str((ROOT / page).parent.joinpath(path).resolve().relative_to(ROOT)))
    for page, text in PAGES.items()
    for name, path in re.findall(r"\[`([\w.]+)`\]\(([\w/.]+\.py)\)", text)
}


def test_there_are_names_to_look_for():
    assert sum(name.startswith("test_") for name, _ in NAMES) > 12 and len(NAMES) > 35


@pytest.mark.parametrize("name, path", sorted(NAMES))
def test_every_name_here_is_there(name, path):
    if name.startswith("test_"):
        assert f"\ndef {name}(" in (ROOT / path).read_text()
        return
    module, *parts = name.split(".")
    assert path.endswith(f"{module}.py")
    found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in parts:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    if hasattr(found, "__module__") and inspect.isroutine(found):
        assert inspect.getsourcefile(inspect.unwrap(found)) == str(ROOT / path)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_short(page):
    assert len(PAGES[page].splitlines()) <= (160 if page == "README.md" else 90)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one_of_the_program_it_stands_behind(page):
    programs = re.findall(r"(?:python|torchrun[^`\n]*?) ((?:\w+/)?\w+\.py)((?:[^`\n]|\n--)*)",
                          PAGES[page])  # fmt: skip
    assert programs or page not in ("README.md", "docs/RUNNING.md", "examples/README.md")
    for program, flags in programs:
        if program == "convert_hf_to_gguf.py":  # llama.cpp's
            continue
        code = "support/preview.py" if program == "data.py" else program
        source = (ROOT / code).read_text()
        known = ["--help", *re.findall(r'"(--[\w-]+)"', source)]
        if program == "train.py":
            fields = dataclasses.fields(train.Config)
            known += ["--" + field.name.replace("_", "-") for field in fields]
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", flags):
            assert flag.replace("--no-", "--") in known or flag in known, (program, flag)


def test_the_kernel_stands_alone_in_transformers_llama(tmp_path, monkeypatch):
    """The README's own lines beside transformers' logits and PyTorch's cross-entropy in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(97, (3, 11))
    weights = torch.tensor([[1.0], [0.1], [0.5]]) * (torch.rand(3, 11) > 0.5)
    (copy,) = re.findall(r"`(mkdir mine .*?)`", README)
    subprocess.run(copy.replace("CLONE", str(ROOT)), shell=True, cwd=tmp_path, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    (lines,) = re.findall(r"```python\n(from mine.loss .*?)```", README, re.DOTALL)
    exec(lines, names := {"llama": llama, "tokens": tokens, "weights": weights})
    mine = {name: p.grad.double() for name, p in llama.named_parameters()}

    llama.double().zero_grad()
    logits = llama(tokens).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    w = weights[:, 1:].double()
    loss = (w * losses.view_as(w)).sum() / w.sum()
    loss.backward()
    assert names["total"].item() / w.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in llama.named_parameters():
        assert (mine[name] - p.grad).norm() < 2e-6 * p.grad.norm(), name
