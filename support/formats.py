"""The formats of people's files, turned into one checked conversation.

    a line's bytes -> parse_json -> parse_conversation -> Conversation

Every key is used, refused, or returned in `not_read` and counted. Errors raise BadLine.
"""

import contextlib
import fnmatch
import itertools
import json
import re
from typing import NamedTuple

from loss import BETA, SMALLEST, reward_weight, without_repeats

# A line has its conversation as a list of messages under one of these keys,
LISTS = "messages", "conversations", "conversation", "items"
# or as a question, followed by its context, and an answer: each text or a list of messages. A key
# of the second group counts only if there is none of the first.
QUESTIONS = ("instruction", "prompt", "question", "query"), ("inputs", "problem")
CONTEXTS = (("input", "context"),)
ANSWERS = ("output", "completion", "response"), ("answer", "solution", "targets")
ASKED, ANSWERED = sum(QUESTIONS + CONTEXTS, ()), sum(ANSWERS, ())
SYSTEMS = "system", "system_prompt"  # the system message, with any of them

MODELS = "assistant", "gpt", "chatgpt", "model", "bing", "bard", "ai", "bot"
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"prompter": "user"} | dict.fromkeys(MODELS, "assistant")
SPEAKERS = "user", "assistant"  # of texts without a role, in turn
TEXT_PARTS = "text", "input_text", "output_text"

FACTORS = "weight", "train", "loss", "masked"  # of a line, or of an assistant's message
LINE_KEYS = {*SYSTEMS, *FACTORS, "class", "condition", "reward"}
MESSAGE_KEYS = {*FACTORS, "role", "from", "content", "value"}
# The answer depends on these, so a line that has one is refused.
NEEDED = {
    "tools", "tool", "tool_calls", "tool_call", "tool_call_id", "tool_responses", "tool_plan",
    "functions", "function_call", "reasoning", "reasoning_content", "reasoning_details",
    "thinking", "thinking_blocks", "thought", "thoughts", "images", "image", "image_url", "videos",
    "video", "audios", "audio", "input_audio", "documents", "attachments", "history", "refusal",
}  # fmt: skip
SUPERVISION = re.compile(  # a key that has one of these seems to speak of supervision
    "(^|[^a-z])(weight|train|loss|mask|learn|superv|reward|advantage|importance)"
)

LEAST_WEIGHT = 2.0**-126  # float32's smallest normal number; a smaller weight is taken as 0
LARGEST_WEIGHT = 1e6  # float32 holds sums of these
LONGEST = 16 << 20  # bytes of a line, or of an item of an array


class BadLine(ValueError):
    """An error in a line; `cause` is the same text for all lines with the same error."""

    def __init__(self, text, cause=None, of_class=False):
        super().__init__(text)
        self.cause, self.of_class = cause or text, of_class  # of_class: a different table helps


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str
    weight: float = 1.0  # of an assistant's: a factor on the weight of its class
    final: bool = False  # `weight` replaces the class's, and any role may have one


class Conversation(NamedTuple):
    source_class: str
    messages: tuple
    not_read: tuple = ()  # keys that were not used: "id", "messages: name"
    own_weight: float = -1.0  # of its own reward; -1: that of its class
    too_small: int = 0  # weights that are taken as 0


def parse_json(raw):
    """The JSON object of a line or an item, None if it is blank; a list becomes its messages."""
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
    except (ValueError, RecursionError) as error:
        if text.endswith(("},", "],")):
            raise BadLine(f"broken JSON: {COMMA}") from None
        cause = "broken JSON" if isinstance(error, json.JSONDecodeError) else None  # has no place
        raise BadLine(f"broken JSON: {error}", cause) from None
    if isinstance(line, list) and line and isinstance(line[0], (dict, str)):
        return {"messages": line}
    if not isinstance(line, dict):
        raise BadLine(f"a line must be a JSON object, not {_kind(line)}")
    return line


DECODER = json.JSONDecoder(object_pairs_hook=without_repeats)
COMMA = "a comma follows it: remove the commas, or put [ before the first and ] after the last"


def is_message(value):
    """Is an item of a list a message, and not a conversation?"""
    keys = value.keys() if isinstance(value, dict) else set()
    return bool(keys & {"role", "from"} and keys & {"content", "value"})


def parse_conversation(line, classes, class_field="class", file_class=None, beta=BETA):
    """A checked Conversation from one decoded JSON line.

    Its class is named by `class_field`, or is `file_class` if the file has one; it is an error if
    they disagree. A message's weight is its class's x the line's "weight" x its own; in OpenChat's
    "items" its own weight is final, because it includes the class's. The line's "reward" is r of
    Eq. (3) instead of its class's.
    """
    messages, not_read = parse_messages(line, {class_field})
    source_class = _source_class(line, classes, class_field, file_class)
    own_weight = _own_weight(line, classes, beta)
    if class_field != "class" and line.get("class") not in [None, *classes]:
        not_read.append("class")
    roles = [message.role for message in messages]
    for key in ANSWERED:
        if roles[-1:] == ["user"] and key in not_read:
            raise BadLine(f"ends with the user's turn, and {key!r} beside the list is not read")
    if "assistant" not in roles:
        raise BadLine("no assistant turn" + f"; not read: {_names(not_read)}" * bool(not_read))
    too_small = int(own_weight == 0)
    for number, message in enumerate(messages):
        if 0 < message.weight < LEAST_WEIGHT:
            messages[number], too_small = message._replace(weight=0.0), too_small + 1
    return Conversation(source_class, tuple(messages), tuple(not_read), own_weight, too_small)


def parse_messages(line, obeyed=()):
    """([Message, ...], keys not read) of a decoded JSON line; the caller reads those `obeyed`."""
    turns, keys = _turns(line)
    not_read = _check_keys(line, LINE_KEYS, "", (*keys, *obeyed))
    factor, numbered = _factor(line), []
    final = keys == ["items"]
    for number, raw in enumerate(turns, start=1):
        try:
            message = _message(raw, final, not_read)
            if message and message.final and (factor != 1 or line.get("reward") is not None):
                raise BadLine("its weight is final in 'items': remove the line's weight or reward")
            if message and message.role == "assistant":
                message = message._replace(weight=_checked_weight(message.weight * factor))
        except BadLine as error:
            raise BadLine(f"message {number}: {error}", error.cause) from None
        numbered += [(number, message)] if message else []
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
    keys = {*_turns(line)[1], *SYSTEMS, "messages"}
    keys |= {key for key in ASKED + ANSWERED if is_empty(line.get(key))}
    return {key: line[key] for key in line if key not in keys}


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def is_empty(value):
    return value is None or value in ("", [], {}) or value != value  # NaN, as pandas writes it


def _one_of(keys):
    """The keys, of which a line may have only one."""
    if len(keys) > 1:
        raise BadLine(f"both {keys[0]!r} and {keys[1]!r}: keep the one that is meant")
    return keys


# ------------------------------------------------------------------------------- turns of a line


def _turns(line):
    """(the messages of a line, each as it is or of a role and a text; the keys they come from)."""
    lists = {key: line[key] for key in LISTS if isinstance(line.get(key), list) and line[key]}
    lists = lists or {key: found for key in LISTS if (found := _spelled_list(line.get(key)))}
    for key in _one_of([*lists]):
        if _are_texts(lists[key]):
            return [*map(_turn, itertools.cycle(SPEAKERS), lists[key])], [key]
        return [turn for raw in lists[key] for turn in _pair(raw) or [raw]], [key]
    if "chosen" in line or "rejected" in line:
        raise BadLine("'chosen' and 'rejected' are preferences: give each its line and class")
    questions, contexts, answers = (_first_of(line, of) for of in (QUESTIONS, CONTEXTS, ANSWERS))
    if not questions and not (contexts and answers):
        if _are_texts(line.get("data")):  # as in UltraChat
            return [*map(_turn, itertools.cycle(SPEAKERS), line["data"])], ["data"]
        for key in LISTS:
            if key in line:
                raise BadLine(f"{key!r} must be a list of messages, not {_kind(line[key])}")
        raise BadLine(
            f"no conversation: one of {_names(LISTS)}, or of {_names(QUESTIONS[0])} with one of "
            f"{_names(ANSWERS[0])}; the keys are {_names(line)}"
        )
    turns = []
    for role, keys in zip(SPEAKERS, (questions + contexts, answers)):
        values = [line[key] for key in keys]
        if len(values) > 1 and _are_texts(values):
            values = ["\n".join(values)]
        for key, value in zip(keys, values):
            if not isinstance(value, (str, list)):
                raise BadLine(f"{key!r} must be text or a list of messages, not {_kind(value)}")
            turns += value if isinstance(value, list) else [_turn(role, value)]
    return turns, questions + contexts + answers


def _spelled_list(value):
    """The list that a text spells in JSON, as a cell of a table does; None if it is none."""
    if isinstance(value, str) and value.startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):
            return DECODER.decode(value)


def _are_texts(value):
    return isinstance(value, list) and value != [] and all(isinstance(raw, str) for raw in value)


def _turn(role, text):
    return {"role": role, "content": text}


def _pair(raw):
    """Two turns of an object or a list with a question and its answer, as in Capybara; or None."""
    if isinstance(raw, dict) and not raw.keys() & {"role", "from"}:
        keys = {key for key in raw if not is_empty(raw[key])}
        pairs = (pair for pair in itertools.product(ASKED, ANSWERED) if keys == {*pair})
        raw = [raw[key] for key in next(pairs, ())]
    return [*map(_turn, SPEAKERS, raw)] if _are_texts(raw) and len(raw) == 2 else None


def _first_of(line, groups):
    """The key that a line has, at most one, of the first group of which it has any."""
    found = (_one_of([key for key in keys if not is_empty(line.get(key))]) for keys in groups)
    return next(filter(None, found), [])


def _names(keys):
    return ", ".join(map(ascii, keys))[:200] or "none"


def _system(line, not_read):
    for key in _one_of([key for key in SYSTEMS if not is_empty(line.get(key))]):
        text = _text(line[key], key, not_read)
        return Message("system", text) if text.strip() else None


def _check_turns(numbered):
    if any(message.role == "system" for _, message in numbered[1:]):
        raise BadLine("a system message after the first message")
    for (number, message), (other, following) in itertools.pairwise(numbered):
        if (role := message.role) == following.role:
            cause = f"two {role} turns in a row: make them one"
            raise BadLine(f"messages {number} and {other} are {cause}", cause)


# ---------------------------------------------------------------------------------- one message


def _message(raw, final, not_read):
    """A Message, or None for an empty system message; adds to the keys not read."""
    if not isinstance(raw, dict):
        raise BadLine(f"must be an object, not {_kind(raw)}")
    not_read += _check_keys(raw, MESSAGE_KEYS, "messages: ")
    role, content = _key(raw, "role", "from"), _key(raw, "content", "value")
    name = raw[role].strip().lower() if isinstance(raw[role], str) else None
    if name not in ROLES:
        raise BadLine(f"{role!r} is {ascii(raw[role]):.40}, not one of {', '.join(ROLES)}")
    role, text = ROLES[name], _text(raw[content], content, not_read)
    if not text.strip():
        if role == "system":
            return None
        raise BadLine("empty answer" if role == "assistant" else f"empty {role} message")
    weight = _factor(raw)
    if final and raw.get("weight") is not None:
        return Message(role, text, weight, final=True)
    if role != "assistant" and weight and any(raw.get(key) is not None for key in FACTORS):
        raise BadLine(f"a {role} message with a weight: only OpenChat's 'items' supervise one")
    return Message(role, text, weight)


def _key(raw, *names):
    """Whichever of two keys a message has; if it has both, they must agree."""
    found = [key for key in names if raw.get(key) not in (None, "")]
    if found := found or [key for key in names if key in raw]:
        return found[0] if raw[found[0]] == raw[found[-1]] else _one_of(found)[0]
    raise BadLine(f"no {names[0]!r} (nor {names[1]!r}); the keys are {_names(raw)}")


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
        if SUPERVISION.search(name) and not isinstance(value, str):  # text is a name or a note
            known = "'weight' (a factor), 'train', 'loss', 'masked' or, for a line, 'reward'"
            raise BadLine(f"{key!r:.40} seems to say what is supervised: remove it or use {known}")
        not_read.append(prefix + key[:40])
    return not_read


def check_file_keys(beside):
    """The keys beside a file's list of conversations; BadLine if it belongs in each of these."""
    for key in beside.keys() & {*LINE_KEYS, *LISTS, "data"}:
        if not is_empty(beside[key]):
            raise BadLine(f"{key!r} is not read: put it into each of them, or use CLASS=FILE")
    return _check_keys(beside, set(), "")


def _factor(keys):
    """The product of the FACTORS of a line or a message; 1 if it has none."""
    product = 1.0
    for key in FACTORS:
        if (value := keys.get(key)) is None:
            continue
        if key == "weight":
            product *= _checked_weight(value)
        elif value is True or value is False:
            product *= value != (key == "masked")
        else:
            raise BadLine(f"{key!r} must be true or false, not {_kind(value)}")
    return float(product)


def _checked_weight(value):
    if type(value) in (int, float) and 0 <= value <= LARGEST_WEIGHT:
        return value and max(value, 1e-100)  # so that a product of two is not 0, and is counted
    raise BadLine(f"weight must be a number from 0 to {LARGEST_WEIGHT:g}, not {value!r:.40}")


def _own_weight(line, classes, beta):
    """w of the line's own "reward", as r of Eq. (3); -1 if it has none."""
    if (reward := line.get("reward")) is None:
        return -1.0
    if type(reward) not in (int, float) or not abs(reward) <= 1e308:
        raise BadLine(f"reward must be a finite number, not {reward!r:.40}")
    if (weight := reward_weight(reward, classes, beta)) > 1 / SMALLEST:
        fault = f"reward {reward:g} is too far above the best class's: its weight exceeds float32"
        raise BadLine(f"{fault}; raise --beta, or the class's reward")
    return weight


# ---------------------------------------------------------------------------------------- the class


def _source_class(line, classes, class_field, file_class):
    found = {"--data": file_class}
    found |= {key: _class_of(line, key, classes) for key in (class_field, "condition")}
    found = {who: name for who, name in found.items() if name is not None}
    if not found:
        fault = f"no {class_field!r}: name it in each line, or use CLASS=FILE or --class-field KEY"
        raise BadLine(f"{fault}; the classes are {', '.join(classes)}", of_class=True)
    if line.get("class") in list(classes):  # beside the field that names it
        found["class"] = line["class"]
    if len(set(found.values())) > 1:
        raise BadLine(" but ".join(f"{who!r} says {name}" for who, name in found.items()))
    return next(iter(found.values()))


def _class_of(line, key, classes):
    """The class that a key's value names, or whose pattern it matches (ignoring case), or None.

    "class" must be a class's name, and OpenChat's "condition" its condition.
    """
    if (value := line.get(key)) is None:
        return None
    with_patterns = key not in ("class", "condition")
    if with_patterns and isinstance(value, (int, float)):
        value = json.dumps(value)  # true is "true"
    if not isinstance(value, str):
        raise BadLine(f"{key!r} must be text, not {_kind(value)}", of_class=True)
    names = {c.condition if key == "condition" else name: name for name, c in classes.items()}
    if value in names:
        return names[value]
    patterns = [(name, p) for name, c in classes.items() for p in c.match if with_patterns]
    low = value.lower()
    fits = [*dict.fromkeys(name for name, p in patterns if fnmatch.fnmatchcase(low, p.lower()))]
    if len(fits) == 1:
        return fits[0]
    fault = f"fits the patterns of both {fits[0]} and {fits[1]}" if fits else "matches no class"
    hint = ': list the values of each class as its "match" in --classes' if with_patterns else ""
    raise BadLine(f"{key!r} {value!r:.40} {fault} ({', '.join(names)}){hint}", of_class=True)
