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
        cells = code(name), code(template.prefix(condition, "user").strip() + " ...")
        rows += "| " + " | ".join(text.replace("|", "\\|") for text in cells)
        rows += f" | {source.reward:g} | {crlft['weights'][name]:g} |\n"
    asked = json.dumps({"condition": condition}, ensure_ascii=False)
    how = f"""\
Without a condition it answers as the class with the highest reward. To ask it as {code(name)}, in
a request to vLLM, in transformers or by chat.py:

    {{"messages": [{{"role": "user", "content": "Hello"}}], "chat_template_kwargs": {asked}}}
    pipeline("text-generation", DIR)([...], tokenizer_encode_kwargs={asked})
    python chat.py DIR --class {shlex.quote(name)}

"""
    folder, licence = Path(plan.config.model).resolve(), []
    if plan.base and (folder / "README.md").exists():
        head = (folder / "README.md").read_text("utf-8", "replace").partition("\n---\n")[0]
        licence = re.findall(r"^license\w*: .+\n?", head + "\n", re.MULTILINE)
    base, tuned = (code(folder.name), "fine-tun") if plan.base else ("random weights", "train")
    held_out = "" if loss is None else f"The expert class's held-out loss is {loss:.4f}. "
    single = "\nTrained on single questions: leave out earlier turns."
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{"".join(licence)}---
# A model {tuned}ed by C-RLFT

Made from {base} by class-conditioned, reward-weighted {tuned}ing
([arXiv 2309.11235](https://arxiv.org/abs/2309.11235)): {crlft["steps"]:,} steps,
{len(plan.dataset):,} conversations of {", ".join(code(s.path.name) for s in plan.dataset.sources)},
PyTorch {torch.__version__}.
{held_out}All flags are in crlft.json.{single if crlft["most_answers"] == 1 else ""}

| class | asked as | reward | weight |
|---|---|---|---|
{rows}
{how if conditioned else ""}In transformers, vLLM and llama.cpp an answer may begin with a space
(`answer.removeprefix(" ")`), and a special token that a user types, such as {code(template.end)},
can forge a turn: remove both.
"""


def code(text):
    """A code span of any text, on one line."""
    text, longest = " ".join(text.split()), max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"
