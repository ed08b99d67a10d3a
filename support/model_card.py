"""README.md of an exported model: how it was made, and how to prompt it under each condition."""

import json
import re
import shlex
from pathlib import Path

import torch


def model_card(plan, crlft, loss=None):
    """The text. Names of classes and files are in a block of code, which no name can end."""
    template, folder, licence = plan.tokenizer.template, Path(plan.config.model).resolve(), []
    if plan.base and (folder / "README.md").exists():
        head = (folder / "README.md").read_text("utf-8", "replace").partition("\n---\n")[0]
        licence = re.findall(r"^license\w*: .+\n", head + "\n", re.MULTILINE)
    files = ", ".join(source.path.name for source in plan.dataset.sources)
    lines = [f"base   {folder.name if plan.base else 'random weights'}",
             f"data   {len(plan.dataset):,} conversations of {files}"]  # fmt: skip
    for name, source in plan.classes.items():
        condition = source.condition if crlft["conditioned"] else ""
        weight = f"reward {source.reward:g}, weight {crlft['weights'][name]:g}"
        lines.append(f"class  {name}: {template.prefix(condition, 'user').strip()} ...  {weight}")
    if loss is not None:
        lines.append(f"held-out loss of the expert class  {loss:.4f}")
    if crlft["conditioned"]:
        asked = json.dumps({"condition": condition}, ensure_ascii=False)
        lines += [f"as {name}:", f'vLLM          "chat_template_kwargs": {asked}',
                  f"transformers  pipeline(...)(..., tokenizer_encode_kwargs={asked})",
                  f"chat.py       --class {shlex.quote(name)}"]  # fmt: skip
    block = "\n".join("    " + re.sub(r"\s", " ", line) for line in lines)
    single = " Trained on single questions: leave out earlier turns." * (crlft["most_answers"] == 1)
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{"".join(licence)}---
# A model trained by C-RLFT

With class-conditioned, reward-weighted likelihood ([paper](https://arxiv.org/abs/2309.11235)),
{crlft["steps"]:,} steps, PyTorch {torch.__version__}. All flags are in crlft.json.{single}

{block}

Without a condition it answers as the class with the highest reward. In transformers, vLLM and
llama.cpp an answer may begin with a space (`answer.removeprefix(" ")`), and a special token that a
user types, such as `{template.end}`, can forge a turn: remove both.
"""
