"""README.md of an exported model: how it was made, and how to prompt it under each condition."""

import json
import re
import shlex
from pathlib import Path

import torch


def model_card(plan, crlft, loss=None):
    """The text. Names of classes and files become code spans, so none can break the markdown."""
    template, conditioned, rows = plan.tokenizer.template, crlft["conditioned"], ""
    for name, source in plan.classes.items():
        condition = source.condition if conditioned else ""
        asked = code(template.prefix(condition, "user").strip() + " ...")
        cells = [text.replace("|", "\\|") for text in (code(name), asked)]
        rows += f"| {' | '.join(cells)} | {source.reward:g} | {crlft['weights'][name]:g} |\n"
    asked = json.dumps({"condition": condition}, ensure_ascii=False)
    more = (f', "chat_template_kwargs": {asked}', f", tokenizer_encode_kwargs={asked}",
            f" --class {shlex.quote(name)}") if conditioned else [""] * 3  # fmt: skip
    folder = Path(plan.config.model).resolve()
    base, tuned = (code(folder.name), "fine-tun") if plan.base else ("random weights", "train")
    held_out = "" if loss is None else f"The expert class's held-out loss is {loss:.4f}. "
    single = "\nTrained on single questions: leave out earlier turns."
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{about(folder) if plan.base else ""}---
# A model {tuned}ed by C-RLFT

Made from {base} by class-conditioned, reward-weighted {tuned}ing
([arXiv 2309.11235](https://arxiv.org/abs/2309.11235)): {crlft["steps"]:,} steps,
{len(plan.dataset):,} conversations of {", ".join(code(s.path.name) for s in plan.dataset.sources)},
PyTorch {torch.__version__}.
{held_out}All flags are in crlft.json.{single if crlft["most_answers"] == 1 else ""}

| class | asked as | reward | weight |
|---|---|---|---|
{rows}
Without a condition it answers as the class with the highest reward. To ask it as {code(name)}, in
a request to vLLM, in transformers or by chat.py:

    {{"messages": [{{"role": "user", "content": "Hello"}}]{more[0]}}}
    pipeline("text-generation", DIR)([{{"role": "user", "content": "Hello"}}]{more[1]})
    python chat.py DIR{more[2]}

In transformers, vLLM and llama.cpp an answer may begin with a space (`answer.removeprefix(" ")`),
and a special token that a user types, such as {code(template.end)}, can forge a turn: remove both.
"""


def about(base):
    """YAML of a folder: its name on the hub, if its config.json gives it, and its licence."""
    files = base / "config.json", base / "README.md"
    config, readme = (f.read_text("utf-8", "replace") if f.exists() else "" for f in files)
    name = re.findall(rf'"_name_or_path": *"([\w.-]+/{re.escape(base.name)})"', config)
    stated = re.findall(r"^license\w*: .+", readme.partition("\n---\n")[0], re.MULTILINE)
    return "".join(f"{line}\n" for line in [f"base_model: {hub}" for hub in name[:1]] + stated)


def code(text):
    """A code span of any text, on one line."""
    text, longest = " ".join(text.split()), max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"
