"""chat.py --batch: the conversations of a file, each with the model's answer at its end.

Reads the files that train.py reads. Writes one line per conversation, in the order of the input:
its other keys, and its turns and the answer under "messages". An interrupted run resumes.
"""

import contextlib
import json
import sys

from support.containers import blocks, sources
from support.formats import Message, keys_beside, parse_json, parse_messages

BATCH = 16  # conversations answered at a time


def answer_file(chat, source, target, options, drop_last_answer=False):
    """Answer the last user turn of every conversation in `source`, after those in `target`."""
    asked = list(read_prompts(chat, source, drop_last_answer))
    if drop_last_answer and (kept := {key for keys, _ in asked for key in keys}):
        say(f"note: kept, though some may describe the old answers: {', '.join(sorted(kept))}")
    with open(target, "ab+") as out:
        for start in range(continue_after(out, target, asked), len(asked), BATCH):
            batch = asked[start : start + BATCH]
            answers = chat.answers([messages for _, messages in batch], **options)
            out.writelines(encoded(*prompt, text) for prompt, (text, _) in zip(batch, answers))
            out.flush()
            cut = f"{sum(not ended for _, ended in answers)} of these cut at the maximum length"
            say(f"{start + len(batch)}/{len(asked)} answered, {cut}")


def read_prompts(chat, path, drop_last_answer):
    """(other keys, messages) of each conversation; ValueError names the line that is bad."""
    (source,) = sources([path], {})
    raws = (raw for block in blocks([source]) for raw in block.raw)
    for number, raw in enumerate(raws, start=1):
        try:
            if (line := parse_json(raw)) is None:
                continue
            messages, _ = parse_messages(line)
            if drop_last_answer and messages and messages[-1].role == "assistant":
                messages.pop()
            if not messages or messages[-1].role != "user":
                raise ValueError("the last message must be the user's (see --drop-last-answer)")
            if (length := len(chat.prompt(messages))) > chat.context:
                raise ValueError(f"has {length} tokens, the model's context is {chat.context}")
            prompt = keys_beside(line), messages
            encoded(*prompt, "")  # a lone surrogate fails now
        except ValueError as error:
            raise ValueError(f"{source.where(number)}: {error}") from None
        yield prompt


def continue_after(out, target, asked):
    """How many prompts `out` answers, in whole batches, because a batch is sampled together.

    The rest is removed. ValueError if its first lines are not the answers to the first prompts.
    """
    out.seek(0)
    written = out.read().splitlines(True)
    whole = [line for line in written if line.endswith(b"\n")]
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        answers = [json.loads(line)["messages"][-1]["content"] for line in whole]
        ours = [encoded(*prompt, text) for prompt, text in zip(asked, answers)]
        if whole == ours and bool(whole) == bool(written):
            done = len(whole) if len(whole) == len(asked) else len(whole) // BATCH * BATCH
            out.truncate(sum(map(len, whole[:done])))
            if done:
                say(f"{done}/{len(asked)} were answered in {target}; remove it to answer again")
            return done
    raise ValueError(f"{target} exists, and does not hold the first answers to these lines")


def encoded(keys, messages, answer):
    messages = [*messages, Message("assistant", answer)]
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return json.dumps(keys | {"messages": turns}, ensure_ascii=False).encode() + b"\n"


def say(text):
    print(text, file=sys.stderr)
