"""The shapes that users' files have, made one checked conversation.

    a line's bytes -> parse_json -> parse_conversation -> Conversation

Whatever is wrong with a line is a ValueError that says what, to stand behind file:line.
"""

import dataclasses
import json

LONGEST_LINE = 16 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str
    weight: float | None = None  # None: the class's for an assistant, 0 for the others


@dataclasses.dataclass(frozen=True)
class Conversation:
    source_class: str
    messages: tuple


def parse_line(raw, classes):
    """A Conversation, or None for an empty line; ValueError says what is wrong."""
    line = parse_json(raw)
    return None if line is None else parse_conversation(line, classes)


def parse_json(raw):
    """The JSON object of a line of `lines`, None of a blank one; ValueError says what is wrong."""
    if raw is None:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}: {error.reason}") from None
    if not text:
        return None
    try:
        line = json.loads(text)
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"a line must be a JSON object, not {_kind(line)}")
    return line


def parse_conversation(line, classes):
    """A checked Conversation from one decoded JSON line; ValueError says what is wrong.

    Formats: {"class", "messages": [{"role", "content"}]}; OpenChat's {"items": [{"role",
    "content", "weight"}], "condition", "system"}; ShareGPT's {"class", "conversations": [{"from",
    "value"}]}. A message's own "weight", in any of them, wins over the class's.
    """
    if "messages" in line:
        messages = [parse_message(i, m) for i, m in numbered(line, "messages")]
    elif "items" in line:
        messages = [parse_message(i, m) for i, m in numbered(line, "items")]
        if line.get("system"):
            messages.insert(0, parse_message(0, {"role": "system", "content": line["system"]}))
    elif "conversations" in line:
        turns = numbered(line, "conversations")
        messages = [parse_message(i, m, "from", "value", roles=SHAREGPT_ROLES) for i, m in turns]
    else:
        raise ValueError("no 'messages' (nor OpenChat's 'items', nor ShareGPT's 'conversations')")
    _check_turns(messages)
    return Conversation(_source_class(line, classes), tuple(messages))


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def numbered(line, key):
    """(1, first), (2, second) ... of the list under `key`; ValueError where it is none."""
    if not isinstance(line[key], list):
        raise ValueError(f"'{key}' must be a list, not {_kind(line[key])}")
    return enumerate(line[key], start=1)


ROLES = {role: role for role in ("system", "user", "assistant")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # apart from 0; float32 holds sums of these


def parse_message(number, raw, role_key="role", content_key="content", roles=ROLES):
    """A checked Message; ValueError says what is wrong with message `number`."""
    if not isinstance(raw, dict):
        raise ValueError(f"message {number} must be an object, not {_kind(raw)}")
    role, content = raw.get(role_key), raw.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {number} has role {role!r:.40}, not one of {', '.join(roles)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: '{content_key}' must be text, not {_kind(content)}")
    role = roles[role]
    if not content.strip():
        raise ValueError("empty answer" if role == "assistant" else f"empty {role} message")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"message {number}: lone surrogate {ascii(error.object[error.start])}"
        ) from None
    weight = raw.get("weight")
    if weight is not None and not (
        type(weight) in (int, float) and (weight == 0 or LEAST_WEIGHT <= weight <= LARGEST_WEIGHT)
    ):
        raise ValueError(
            f"message {number}: weight must be 0, or a number from {LEAST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}, not {weight!r:.40}"
        )
    return Message(role, content, weight)


def _check_turns(messages):
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn")
    if "system" in roles[1:]:
        raise ValueError("a system message after the first message")
    for number, (role, following) in enumerate(zip(roles, roles[1:], strict=False), start=1):
        if role == following:
            raise ValueError(f"messages {number} and {number + 1} are two {role} turns in a row")


def _source_class(line, classes):
    name, known = line.get("class"), ", ".join(classes)
    if name is None and line.get("condition") is not None:  # OpenChat's name of the class
        condition = line["condition"]
        for name, source in classes.items():
            if source.condition == condition:
                return name
        raise ValueError(f"no class has the condition {condition!r:.40} ({known})")
    if not isinstance(name, str):
        raise ValueError(f"'class' must be one of {known}, not {_kind(name)}")
    if name not in classes:
        raise ValueError(f"class {name!r:.40} is not in the class table ({known})")
    return name
