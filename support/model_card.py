"""README.md of an exported model: how it was made, and how to prompt it under each condition."""

import json
import re
import shlex
from pathlib import Path

import torch


def model_card(plan, crlft):
    """The text. Names of classes and files become code spans, so none can break the markdown."""
    template, conditioned, rows = plan.tokenizer.template, crlft["conditioned"], ""
    for name, source in plan.classes.items():
        condition = source.condition if conditioned else ""
        asked = code(template.prefix(condition, "user").strip() + " ...")
        cells = [text.replace("|", "\\|") for text in (code(name), asked)]
        rows += f"| {' | '.join(cells)} | {source.reward:g} | {crlft['weights'][name]:g} |\n"
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    body |= {"chat_template_kwargs": {"condition": condition}} if conditioned else {}
    base = code(Path(plan.config.model).resolve().name) if plan.base else "random weights"
    files = ", ".join(code(source.path.name) for source in plan.dataset.sources)
    single = "\nTrained on single questions: leave out earlier turns."
    return f"""\
# A model fine-tuned by C-RLFT

Made from {base} by class-conditioned, reward-weighted fine-tuning
([arXiv 2309.11235](https://arxiv.org/abs/2309.11235)): {crlft["steps"]:,} steps,
{len(plan.dataset):,} conversations of {files}, PyTorch {torch.__version__}.
All flags are in crlft.json.{single if crlft["most_answers"] == 1 else ""}

| class | asked as | reward | weight |
|---|---|---|---|
{rows}
Without a condition it answers as the class with the highest reward. To ask it as {code(name)}, in
a request to vLLM, or by chat.py (transformers: `apply_chat_template(..., condition=...)`):

    {json.dumps(body, ensure_ascii=False)}
    python chat.py DIR{f" --class {shlex.quote(name)}" if conditioned else ""}

In transformers, vLLM and llama.cpp a special token that is typed in a text, such as
{code(template.end)}, can forge a turn: remove it from what users type.
"""


def code(text):
    """A code span of any text, on one line."""
    text, longest = " ".join(text.split()), max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"
