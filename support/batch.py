"""chat.py --batch: the conversations of a file, each with the model's answer at its end.

Reads the files that train.py reads. Writes one line per conversation, in the order of the input:
its other keys, and its turns and the answer under "messages". An interrupted run resumes.
"""

import json
import re
import sys

from support.containers import blocks, sources
from support.formats import Message, keys_beside, parse_json, parse_messages

BATCH = 16  # conversations answered at a time
# A line after its question: the rest of a JSON text and the brackets, or anything if cut short.
ANSWER = rb'(?:[^"\\]|\\.)*"}]}\n|[^\n]*'


def answer_file(chat, source, target, options, drop_last_answer=False):
    """Answer the last user turn of every conversation in `source`, after those in `target`."""
    asked, cut = list(read_prompts(chat, source, drop_last_answer)), 0
    if others := sum(keys.get("class") not in (None, chat.class_name) for keys, _ in asked):
        say(f"note: answered as class {chat.class_name}; {others} of the lines have another class")
    if drop_last_answer and (kept := {key for keys, _ in asked for key in keys}):
        say(f"note: kept, though some may describe the old answers: {', '.join(sorted(kept))}")
    with open(target, "ab+") as out:
        for start in range(continue_after(out, target, asked), len(asked), BATCH):
            batch = asked[start : start + BATCH]
            answers = chat.answers([messages for _, messages in batch], **options)
            for prompt, (text, ended) in zip(batch, answers, strict=True):
                out.write(encoded(*prompt, text))
                cut += not ended
            out.flush()
            say(f"{start + len(batch)}/{len(asked)} answered")
    if cut:
        say(f"{cut} answers cut: --max-new-tokens or the model's context")


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

    The rest is removed. ValueError if `out` has anything but answers to the first prompts.
    """
    out.seek(0)
    written = out.read().splitlines(True)
    if len(written) > len(asked) or not all(map(is_answer, written, asked)):
        raise ValueError(f"{target} exists, and does not hold the first answers to these lines")
    whole = [line for line in written if line.endswith(b"\n")]
    done = len(whole) if len(whole) == len(asked) else len(whole) // BATCH * BATCH
    out.truncate(sum(map(len, whole[:done])))
    if done:
        say(f"{done}/{len(asked)} were already answered in {target}; remove it to answer again")
    return done


def is_answer(line, prompt):
    """Is a line, perhaps cut short, this prompt with some answer, as encoded() writes it?"""
    start = encoded(*prompt, "").removesuffix(b'"}]}\n')
    return start.startswith(line[: len(start)]) and re.fullmatch(ANSWER, line[len(start) :])


def encoded(keys, messages, answer):
    messages = [*messages, Message("assistant", answer)]
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return json.dumps(keys | {"messages": turns}, ensure_ascii=False).encode() + b"\n"


def say(text):
    print(text, file=sys.stderr)
