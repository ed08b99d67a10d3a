"""The formats of people's files, turned into one checked conversation.

    a line's bytes -> parse_json -> parse_conversation -> Conversation

Every key is used, refused, or returned in `not_read` and counted. Errors raise BadLine.
"""

import collections
import fnmatch
import itertools
import json
import re
from typing import NamedTuple

# A line has its conversation as a list of messages under one of these keys,
LISTS = "messages", "conversations", "conversation", "items"
# or as a question, followed by its context, and an answer: each text or a list of messages.
QUESTIONS, CONTEXTS = ("instruction", "prompt", "question", "query"), ("input", "context")
ANSWERS = "output", "completion", "response"
SYSTEMS = "system", "system_prompt"  # the system message, with any of them

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip
TEXT_PARTS = "text", "input_text", "output_text"

FACTORS = "weight", "train", "loss", "masked"  # of a line, or of an assistant's message
LINE_KEYS = {*LISTS, *SYSTEMS, *FACTORS, "class", "condition"}
MESSAGE_KEYS = {*FACTORS, "role", "from", "content", "value"}
# The answer depends on these, so a line that has one is refused.
NEEDED = {
    "tools", "tool", "tool_calls", "tool_call", "tool_call_id", "tool_responses", "tool_plan",
    "functions", "function_call", "reasoning", "reasoning_content", "reasoning_details",
    "thinking", "thinking_blocks", "thought", "thoughts", "images", "image", "image_url", "videos",
    "video", "audios", "audio", "input_audio", "documents", "attachments", "history", "refusal",
}  # fmt: skip
SUPERVISION = re.compile(  # a key that has one of these seems to say what is supervised
    "(^|[^a-z])(weight|train|loss|mask|learn|superv|reward|advantage|importance)"
)

LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # apart from 0; float32 holds sums of these
LONGEST = 16 << 20  # bytes of a line, or of an item of an array


class BadLine(ValueError):
    """An error in a line; `cause` is the same text for all lines with the same error."""

    def __init__(self, text, cause=None):
        super().__init__(text)
        self.cause = cause or text


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str
    weight: float = 1.0  # of an assistant's: a factor on the weight of its class
    final: bool = False  # `weight` replaces the class's, and any role may have one


class Conversation(NamedTuple):
    source_class: str
    messages: tuple
    not_read: tuple = ()  # keys that were not used: "id", "messages: name"


def parse_json(raw):
    """The JSON object of a line or an item, None if it is blank."""
    if raw is None:
        raise BadLine(f"longer than {LONGEST >> 20} MiB: each line or item is one conversation")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8: byte {error.start + 1}: {error.reason}", "not UTF-8") from None
    if not text:
        return None
    try:
        line = DECODER.decode(text)
    except BadLine:
        raise
    except RecursionError:
        raise BadLine("broken JSON: nested too deeply") from None
    except ValueError as error:
        raise BadLine(f"broken JSON: {error}", "broken JSON") from None
    if not isinstance(line, dict):
        raise BadLine(f"a line must be a JSON object, not {_kind(line)}")
    return line


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        (repeated, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise BadLine(f"{repeated!r:.40} is given twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def parse_conversation(line, classes, class_field="class", file_class=None):
    """A checked Conversation from one decoded JSON line.

    Its class is named by `class_field`, or is `file_class` if the file has one; it is an error if
    they disagree. A message's weight is its class's x the line's "weight" x its own; in OpenChat's
    "items" its own weight is final, because it includes the class's.
    """
    messages, not_read = parse_messages(line, {class_field})
    source_class = _source_class(line, classes, class_field, file_class)
    if class_field != "class" and line.get("class") not in [None, *classes]:
        not_read.append("class")
    roles = [message.role for message in messages]
    for key in ANSWERS:
        if roles[-1:] == ["user"] and not is_empty(line.get(key)):
            raise BadLine(f"ends with the user's turn, and {key!r} beside the list is not read")
    if "assistant" not in roles:
        raise BadLine("no assistant turn")
    return Conversation(source_class, tuple(messages), tuple(not_read))


def parse_messages(line, obeyed=()):
    """([Message, ...], keys not read) of a decoded JSON line, answered or not yet.

    `obeyed` are keys that the caller reads.
    """
    parts, keys = _parts(line)
    not_read = _check_keys(line, LINE_KEYS, "", (*keys, *obeyed))
    for key in LISTS:  # such as a text, when another key has the list
        if key in line and key not in keys and not is_empty(line[key]):
            not_read.append(key)
    factor, numbered = _factor(line), []
    final = keys == ["items"]
    for number, (role, raw) in enumerate(parts, start=1):
        try:
            message, keys = _message(role, raw, final)
            if factor != 1 and message and message.final:
                raise BadLine("its weight is final in 'items': remove the line's weight")
            if message and message.role == "assistant":
                message = message._replace(weight=_checked_weight(message.weight * factor))
        except BadLine as error:
            raise BadLine(f"message {number}: {error}", error.cause) from None
        numbered += [(number, message)] if message else []
        not_read += keys
    _check_turns(numbered)
    messages = [message for _, message in numbered]
    if system := _system(line, not_read):
        if not messages or messages[0].role != "system":
            messages.insert(0, system)
        elif messages[0].content != system.content:
            raise BadLine("a 'system' at the top and a system message: keep one of them")
    return messages, not_read


def keys_beside(line):
    """The line's keys and values beside its conversation."""
    _, keys = _parts(line)
    return {key: line[key] for key in line if key not in {*keys, *SYSTEMS, "messages"}}


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def is_empty(value):
    return value is None or value in ("", [], {}) or value != value  # NaN, as pandas writes it


def _one_of(keys):
    """The keys, of which a line may have only one."""
    if len(keys) > 1:
        raise BadLine(f"both {keys[0]!r} and {keys[1]!r}: keep the one that is meant")
    return keys


# ------------------------------------------------------------------------------- turns of a line


def _parts(line):
    """([(role or None, a message or a text), ...], the keys that they come from)."""
    lists = _one_of([key for key in LISTS if isinstance(line.get(key), list) and line[key]])
    if lists:
        texts = all(isinstance(raw, str) for raw in line[lists[0]])  # question, answer, question
        roles = itertools.cycle(("user", "assistant") if texts else (None,))
        return list(zip(roles, line[lists[0]])), lists
    if "chosen" in line or "rejected" in line:
        raise BadLine(
            "'chosen' and 'rejected' are preferences, which C-RLFT does not take: make each a "
            "conversation of a class of its own"
        )
    questions, contexts, answers = (
        _one_of([key for key in keys if not is_empty(line.get(key))])
        for keys in (QUESTIONS, CONTEXTS, ANSWERS)
    )
    if not questions and not (contexts and answers):
        for key in LISTS:
            if key in line:
                kind = "an empty one" if line[key] == [] else _kind(line[key])
                raise BadLine(f"{key!r} must be a list of messages, not {kind}")
        raise BadLine(
            "no conversation: 'messages', 'conversations', 'conversation' or 'items', or "
            "'instruction', 'prompt', 'question' or 'query' with 'output', 'completion' or "
            "'response'; the keys are " + (", ".join(map(ascii, line))[:200] or "none")
        )
    question = [line[key] for key in questions + contexts]
    if len(question) > 1 and all(isinstance(text, str) for text in question):
        question = ["\n".join(question)]
    parts = [part for value in question for part in _turns("user", value)]
    parts += [part for key in answers for part in _turns("assistant", line[key])]
    return parts, [*QUESTIONS, *CONTEXTS, *ANSWERS]


def _turns(role, value):
    return [(None, raw) for raw in value] if isinstance(value, list) else [(role, value)]


def _system(line, not_read):
    for key in _one_of([key for key in SYSTEMS if not is_empty(line.get(key))]):
        text = _text(line[key], key, not_read)
        return Message("system", text) if text.strip() else None


def _check_turns(numbered):
    if any(message.role == "system" for _, message in numbered[1:]):
        raise BadLine("a system message after the first message")
    for (number, message), (other, following) in itertools.pairwise(numbered):
        if (role := message.role) == following.role:
            raise BadLine(
                f"messages {number} and {other} are two {role} turns in a row: make them one",
                f"two {role} turns in a row: make them one",
            )


# ---------------------------------------------------------------------------------- one message


def _message(role, raw, final):
    """(Message, keys not read), or (None, []) for an empty system message."""
    raw = raw if role is None else {"role": role, "content": raw}
    if not isinstance(raw, dict):
        raise BadLine(f"must be an object, not {_kind(raw)}")
    not_read = _check_keys(raw, MESSAGE_KEYS, "messages: ")
    role, content = _key(raw, "role", "from"), _key(raw, "content", "value")
    name = raw[role].strip().lower() if isinstance(raw[role], str) else None
    if name not in ROLES:
        known = ", ".join(ROLES)
        raise BadLine(f"{role!r} is {ascii(raw[role]):.40}, not one of {known}")
    role, text = ROLES[name], _text(raw[content], content, not_read)
    if not text.strip():
        if role == "system":
            return None, not_read
        raise BadLine("empty answer" if role == "assistant" else f"empty {role} message")
    weight = _factor(raw)
    if final and raw.get("weight") is not None:
        return Message(role, text, weight, final=True), not_read
    if role != "assistant" and weight and any(raw.get(key) is not None for key in FACTORS):
        raise BadLine(
            f"a {role} message with a weight; it is supervised only with a 'weight' in OpenChat's "
            "'items'"
        )
    return Message(role, text, weight), not_read


def _key(raw, first, second):
    """Whichever of two keys a message has; if it has both, they must agree."""
    found = [key for key in (first, second) if key in raw]
    if not found:
        raise BadLine(f"no {first!r} (nor {second!r})")
    if len(found) > 1 and raw[first] != raw[second]:
        found = _one_of([key for key in found if raw[key] not in (None, "")]) or found
    return found[0]


def _text(value, key, not_read):
    """Text, or a list of parts of text, joined."""
    if isinstance(value, list):
        value = "".join([_part(part, key, not_read) for part in value])
    elif not isinstance(value, str):
        raise BadLine(f"{key!r} must be text, not {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(f"{key!r} has a lone surrogate {ascii(error.object[error.start])}") from None
    return value


def _part(part, key, not_read):
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        odd = f"of type {kind!r:.40}" if kind else f"that is {_kind(part)}"
        raise BadLine(f"{key!r} has a part {odd}: only text is read")
    not_read += _check_keys(part, {"type", "text"}, "messages: content: ")
    if not isinstance(part.get("text"), str):
        raise BadLine(f"{key!r} has a part without text")
    return part["text"]


# ------------------------------------------------------------------------------------ keys, weights


def _check_keys(given, obeyed, prefix, more=()):
    """The keys that are not read, each after `prefix`; BadLine if one may not be ignored."""
    not_read = []
    for key, value in given.items():
        if key in obeyed or key in more or is_empty(value):
            continue
        name = key.strip().lower()
        if name in NEEDED and value not in ("[]", "{}", "null"):
            raise BadLine(f"{key!r:.40} is not implemented, and the answer depends on it")
        if name in obeyed:
            raise BadLine(f"{key!r:.40} is not read: write {name!r}")
        if SUPERVISION.search(name):
            raise BadLine(
                f"{key!r:.40} seems to say what is supervised, and is not read: remove it or "
                "write 'weight' (a factor) or 'train', 'loss', 'masked' (true or false)"
            )
        not_read.append(prefix + key[:40])
    return not_read


def check_file_keys(beside):
    """The keys beside a file's list of conversations; BadLine if it belongs in each of these."""
    for key in beside.keys() & {*LINE_KEYS, "data"}:
        if not is_empty(beside[key]):
            hint = "put it into each of them, or give the class of all as CLASS=FILE"
            raise BadLine(f"{key!r} is not read: {hint}")
    return _check_keys(beside, set(), "")


def _factor(keys):
    """The product of the FACTORS of a line or a message; 1 if it has none."""
    product = 1.0
    for key in FACTORS:
        value = keys.get(key)
        if value is None:
            continue
        if key == "weight":
            product *= _checked_weight(value)
        elif value is True or value is False:
            product *= value != (key == "masked")
        else:
            raise BadLine(f"{key!r} must be true or false, not {_kind(value)}")
    return float(product)


def _checked_weight(value):
    if type(value) in (int, float) and (value == 0 or LEAST_WEIGHT <= value <= LARGEST_WEIGHT):
        return value
    raise BadLine(
        f"weight must be 0, or a number from {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:g}, "
        f"not {value!r:.40}"
    )


# ---------------------------------------------------------------------------------------- the class


def _source_class(line, classes, class_field, file_class):
    found = {}  # {who says so: class}
    if file_class is not None:
        found["--data"] = file_class
    if (value := line.get(class_field)) is not None:
        try:
            if class_field == "class":
                found["class"] = _named_class("class", value, {name: name for name in classes})
            else:
                found[class_field] = _matching_class(class_field, value, classes)
        except BadLine as error:
            if file_class is None:
                raise
            hint = f"--data says {file_class}; a different --class-field ignores {class_field!r}"
            raise BadLine(f"{error}; {hint}") from None
    if found and class_field != "class" and line.get("class") in list(classes):
        found["class"] = line["class"]
    if line.get("condition") is not None:  # OpenChat's name of the class
        conditions = {source.condition: name for name, source in classes.items()}
        found["condition"] = _named_class("condition", line["condition"], conditions)
    if not found:
        raise BadLine(
            f"no {class_field!r}: name it in each line, or for a whole file by CLASS=FILE in its "
            f"place, or by another field, --class-field KEY; the classes are {', '.join(classes)}"
        )
    if len(found) > 1 and len(set(found.values())) > 1:
        raise BadLine(" but ".join(f"{who!r} says {name}" for who, name in found.items()))
    return next(iter(found.values()))


def _named_class(key, value, names):
    """names[value]: `names` are {name or condition: class}."""
    if isinstance(value, str) and value in names:
        return names[value]
    shown = f"{value!r:.40}" if isinstance(value, str) else _kind(value)
    raise BadLine(f"{key} {shown} is not in the class table ({', '.join(names)})")


def _matching_class(key, value, classes):
    """The class that a field's value names, or whose pattern it matches (ignoring case)."""
    if isinstance(value, (dict, list)):
        raise BadLine(f"{key!r} must be text, a number, true or false, not {_kind(value)}")
    text = value if isinstance(value, str) else json.dumps(value)
    if text in classes:
        return text
    fits = [
        name for name, source in classes.items()
        if any(fnmatch.fnmatchcase(text.lower(), pattern.lower()) for pattern in source.match)
    ]  # fmt: skip
    if len(fits) == 1:
        return fits[0]
    fault = f"fits the patterns of both {fits[0]} and {fits[1]}" if fits else "matches no class"
    hint = 'list the values of each class as its "match" in --classes'
    raise BadLine(f"{key!r} {text!r:.40} {fault} ({', '.join(classes)}): {hint}")
