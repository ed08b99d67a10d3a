"""chat.py --batch: the conversations of a file, each with the model's answer at its end.

Reads what train.py reads. Writes a line a conversation, in the order and the shape of the input,
so that a run that was cut short goes on from the lines it has written.
"""

import json
import os
import sys

from support.containers import blocks, sources
from support.formats import parse_json, parse_messages, with_answer, without_answer

BATCH = 16  # conversations answered at a time


def answer_file(chat, source, target, options, drop_last_answer=False):
    """Answer the last user turn of every conversation in `source`, from where `target` ends."""
    lines, cut = list(read_prompts(chat, source, drop_last_answer)), 0
    others = sum(line.get("class") not in (None, chat.class_name) for line, _ in lines)
    if others:
        say(f"note: answered as class {chat.class_name}; {others} of the lines have another "
            '"class", which their copies keep')  # fmt: skip
    with open(target, "ab+") as out:
        done = continue_after(out, target, [line for line, _ in lines])
        for start in range(done, len(lines), BATCH):
            batch = lines[start : start + BATCH]
            answers = chat.answers([messages for _, messages in batch], **options)
            for (line, _), (text, ended) in zip(batch, answers, strict=True):
                out.write(encoded(with_answer(line, text)) + b"\n")
                cut += not ended
            out.flush()
            say(f"{start + len(batch)}/{len(lines)} answered")
    if cut:
        say(f"{cut} answers cut: --max-new-tokens or the model's context")


def read_prompts(chat, path, drop_last_answer):
    """(line, messages) of each conversation; ValueError names the line that is not one."""
    context, (source,) = chat.llama.config.max_position_embeddings, sources([path], {})
    raws = (raw for block in blocks([source]) for raw in block.raw)
    for number, raw in enumerate(raws, start=1):
        try:
            line = parse_json(raw)
            if line is None:
                continue
            if drop_last_answer:
                line, _ = without_answer(line)
            messages, _ = parse_messages(line)  # what is not read is copied
            encoded(line)  # a lone surrogate fails now
            if not messages or messages[-1].role != "user":
                hint = "; --drop-last-answer answers anew" if without_answer(line)[1] else ""
                raise ValueError(f"the last message must be the user's{hint}")
            if (length := len(chat.prompt(messages))) > context:
                raise ValueError(f"has {length} tokens, the model's context is {context}")
        except ValueError as error:
            raise ValueError(f"{source.where(number)}: {error}") from None
        yield line, messages


def continue_after(out, target, lines):
    """How many of the lines are answered in `out`, in whole batches; the rest of it is removed.

    Whole ones, as the same conversations together, drawn from the same seed, give the same
    answers. ValueError, and nothing removed, unless it holds answers to the first of these lines.
    """
    out.seek(0)
    *whole, torn = out.read().split(b"\n")
    fits = len(whole) + bool(torn) <= len(lines) and all(map(is_answer, whole, lines))
    if torn and fits:  # a line that a kill or a full disk cut short
        line = lines[len(whole)]
        head = os.path.commonprefix([encoded(with_answer(line, text)) for text in "ab"])
        fits = torn[: len(head)] == head[: len(torn)]
    if not fits:
        raise ValueError(f"{target} exists, and does not hold the first answers to these lines")
    done = len(whole) if len(whole) == len(lines) else len(whole) // BATCH * BATCH
    out.truncate(sum(len(line) + 1 for line in whole[:done]))
    if done:
        say(f"{done}/{len(lines)} were answered before")
    return done


def is_answer(written, line):
    """Is a written line this one with some answer?"""
    try:
        written = json.loads(written)
        _, text = without_answer(written)
        return written == with_answer(line, text or "")
    except (ValueError, AttributeError, RecursionError):
        return False


def encoded(line):
    return json.dumps(line, ensure_ascii=False).encode()


def say(text):
    print(text, file=sys.stderr)
