"""README.md of an exported model: what it is, and how to ask it under each condition."""

import json
import re
import shlex
from pathlib import Path

import torch

CARD = """\
# A model fine-tuned by C-RLFT

Made of {base} by class-conditioned, reward-weighted fine-tuning
([arXiv 2309.11235](https://arxiv.org/abs/2309.11235)): {steps:,} steps, {conversations:,}
conversations of {files}, PyTorch {torch}. crlft.json has every flag.{single}

| class | asked as | reward | weight |
|---|---|---|---|
{rows}

To ask it as {other}, by transformers, in a request to vLLM, and by the trainer's own chat.py
(left out, it is asked as the class of most reward):

{asked}

transformers, vLLM and llama.cpp read a special token that is spelled in a text, such as
`{end}`, as that token: whoever may type one can forge a turn. Take them out before.
"""
SINGLE = "\nIt learned from single questions: leave out what was said before."


def model_card(crlft, template, base, files, conversations):
    """The text, of what crlft.json says; no name in it breaks the markdown or tells a folder."""
    classes, conditioned = crlft["classes"], crlft["conditioned"]
    other = list(classes)[-1]
    condition = classes[other]["condition"] if conditioned else ""
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    body |= {"chat_template_kwargs": {"condition": condition}} if conditioned else {}
    asked = [
        "tokenizer.apply_chat_template(messages, add_generation_prompt=True"
        + (f", condition={condition!r})" if conditioned else ")"),
        json.dumps(body, ensure_ascii=False),
        "python chat.py DIR" + (f" --class {shlex.quote(other)}" if conditioned else ""),
    ]
    return CARD.format(
        base=code(name_of(base)) if base else "random weights", steps=crlft["steps"],
        conversations=conversations, files=", ".join(code(Path(file).name) for file in files),
        torch=torch.__version__, single=SINGLE if crlft["most_answers"] == 1 else "",
        rows="\n".join(class_row(name, crlft, template) for name in classes),
        other=code(other), asked="\n\n".join(map(fenced, asked)), end=template.end,
    )  # fmt: skip


def class_row(name, crlft, template):
    source_class = crlft["classes"][name]
    condition = source_class["condition"] if crlft["conditioned"] else ""
    asked = template.prefix(condition, "user").strip()
    numbers = f"{source_class['reward']:g}", f"{crlft['weights'][name]:g}"
    cells = [code(text).replace("|", "\\|") for text in (name, asked + " ...")]
    return f"| {' | '.join([*cells, *numbers])} |"


def name_of(folder):
    """A model's name without its path; in the hub's own cache, its name on the hub."""
    parts = Path(folder).resolve().parts
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else parts[-1]


def code(text):
    """A code span of any text, in one line."""
    text, ticks = " ".join(text.split()), "`" * (longest_run(text) + 1)
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text or ' '}{ticks}"


def fenced(text):
    ticks = "`" * max(3, longest_run(text) + 1)
    return f"{ticks}\n{text}\n{ticks}"


def longest_run(text):
    return max(map(len, re.findall("`+", text)), default=0)
