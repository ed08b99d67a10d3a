"""No text but ours controls the terminal: drawn from all control characters, in a pty of its own.

What a stranger wrote reaches the terminal by answers, names of files, keys and classes, errors and
tracebacks. In a pipe or a file every byte is as it was.
"""

import importlib
import json
import os
import random
import subprocess
import sys
import unicodedata

import processes
import pytest
import small
from test_hour import Pipe, Terminal

import chat
import data
import loss
import model
from support import terminal
from support.report import StatusLine

TITLE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b2J\b\x7f\u202eevil\u2066"  # of a window; clears it
REVERSING = "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"


def harmless(text):
    """What a terminal may get of a text, by Unicode's own tables."""

    def harms(c):
        control = unicodedata.category(c) == "Cc" and c not in "\n\t"
        return control or unicodedata.bidirectional(c) in REVERSING

    return "".join("\ufffd" if harms(c) else c for c in text)


def odd_texts(count):
    """Texts of all kinds of characters, of which a third would control a terminal."""
    rng, controls = random.Random(7), [c for c in map(chr, range(0x3000)) if harmless(c) != c]
    assert len(controls) == 31 + 33 - 2 + 1 + 9
    others = [chr(c) for c in range(0x20, 0x1FFFF) if chr(c).isprintable()]
    kept = ["\n", "\t", "\u200d", "\u200b", "\u2028", "\ufeff", "👩\u200d👧"]
    kinds = controls, others, kept
    drawn = ["".join(rng.choice(kinds[rng.randrange(3)]) for _ in range(40)) for _ in range(count)]
    return [*drawn, "".join(controls), TITLE, *small.ODD_TEXTS]


def shown(main, arguments, folder, columns=0, **environment):
    """(exit code, text) that a program gives a terminal of so many columns, or a file."""
    screen = Terminal(columns) if columns else Pipe(folder / "log")
    running = processes.start(arguments, 1, screen.path, main=main, **environment)
    (code,) = processes.finish(running)
    if columns:
        return code, screen.shown().replace("\r\n", "\n")  # "\n" is sent as both
    return code, (folder / "log").read_bytes().decode()


def says(arguments):
    """By every way that Python writes: print, lines, streaming, an exit with a message."""
    terminal.guard_terminal(), terminal.guard_terminal()
    for text in json.loads(arguments[0]):
        print(text, end="", flush=True)
        print(text, end="", file=sys.stderr, flush=True)
        sys.stdout.writelines([text])
        for piece in text:
            print(piece, end="", flush=True)
    sys.exit(arguments[1])


@pytest.mark.parametrize("columns", [80, 0])
def test_a_terminal_gets_no_control_character_and_a_file_gets_all(columns, tmp_path):
    texts = [text for text in odd_texts(60) if "\r\n" not in text]
    code, found = shown(says, [json.dumps(texts), TITLE], tmp_path, columns)
    said = "".join(4 * text for text in texts) + f"{TITLE}\n"
    assert code == 1 and found == (harmless(said) if columns else said)


def test_lone_surrogates_and_a_small_alphabet_end_no_program(tmp_path):
    said = [json.dumps(["caf\udce9", "日本"]), "end"]
    assert "caf\ufffd日本" in shown(says, said, tmp_path, 80)[1]
    assert "caf?" in shown(latin, said, tmp_path, 80)[1]


def latin(arguments):
    sys.stdout = open(1, "w", encoding="latin-1", closefd=False)
    says(arguments)


@pytest.mark.parametrize("end", ["raise ValueError(odd)", "sys.exit(odd)"])
def test_what_ends_a_program_is_text(end):
    """As the interpreter itself prints it; and what Python's own colours do to it."""
    screen = Terminal(80)
    code = f"import sys; from support.flags import Parser; Parser(); odd = {TITLE!r}; "
    code += "odd += sys.argv[1]; " + end
    environment = os.environ | {"FORCE_COLOR": "1", "PYTHONPATH": str(processes.ROOT)}
    command = [sys.executable, "-c", code, TITLE]
    subprocess.run(command, stdout=screen.slave, stderr=screen.slave, env=environment)
    found = screen.shown().replace("\r\n", "\n")
    assert found == harmless(found) and "owned" in found


def test_a_wrong_flag_is_text(tmp_path):
    _, found = shown(chat.main, [f"--{TITLE}"], tmp_path, 80)
    assert "is not a flag of chat.py" in found and found == harmless(found)


def refreshes(arguments):
    terminal.guard_terminal()
    line = StatusLine(sys.stdout, 1.0)
    line.refresh(f"a {arguments[0]} b")
    line.refresh("c", final=True)
    line.say(arguments[0])


def test_our_own_line_is_refreshed_with_no_control_but_ours(tmp_path):
    _, found = shown(refreshes, [TITLE], tmp_path, 80)
    text = harmless(TITLE)
    assert found == f"\ra {text} b\x1b[K\rc\x1b[K\n{text}\n"
    assert shown(refreshes, [TITLE], tmp_path)[1] == f"a {TITLE} b\nc\n{TITLE}\n"


# ---------------------------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def folder(sums, tmp_path_factory):
    """A model in a folder of an odd name."""
    tokenizer = data.Tokenizer(sums)
    llama = small.random_llama(vocab_size=tokenizer.vocab_size)
    name = TITLE.replace("/", "")
    return small.export(llama, tokenizer, tmp_path_factory.mktemp("odd") / name)


def answers_oddly(arguments):
    """chat.py, whose model says TITLE, a few characters at a time; what is typed comes first."""
    typed, *arguments = arguments
    sys.stdin = open(typed)

    def streams(self, prompts, **options):
        for start in range(0, len(TITLE), 5):
            yield 0, TITLE[start : start + 5], None
        yield 0, "", "cut"

    chat.Chat.streams = streams
    chat.main(arguments)


@pytest.mark.parametrize("flags", [["--prompt", "Hi"], []])
def test_no_answer_controls_the_terminal(flags, folder, tmp_path):
    (tmp_path / "typed").write_text(f"Hi\n/both {TITLE}\n/class {TITLE}\n/{TITLE}\n")
    arguments = [tmp_path / "typed", folder, *flags]
    times = 1 if flags else 3
    code, found = shown(answers_oddly, arguments, tmp_path, 80)
    assert code == 0 and found.count(harmless(TITLE)) >= times and found == harmless(found)
    code, found = shown(answers_oddly, arguments, tmp_path)
    assert code == 0 and found.count(TITLE) >= times


def preview(arguments):
    importlib.import_module("support.preview").main(arguments)


def test_no_data_and_no_name_of_a_file_controls_the_terminal(sums, tmp_path):
    path = tmp_path / f"{TITLE}.jsonl"
    turns = [{"role": "user", "content": TITLE}, {"role": "assistant", "content": TITLE}]
    small.write(path, {"class": "gpt4", "messages": turns, TITLE: 1})
    code, found = shown(preview, [path, "--model", sums], tmp_path, 80)
    assert code == 0 and harmless(path.name) in found and found == harmless(found)
    code, found = shown(preview, [f"{path}.gone", "--model", sums], tmp_path, 80)
    assert code == 1 and found.startswith("error: ") and found == harmless(found)


def train(arguments):
    importlib.import_module("train").main(arguments)


def test_no_key_and_no_tensor_of_a_downloaded_folder_controls_the_terminal(folder, tmp_path):
    copies = {}
    for name, change in (("key", {TITLE: True}), ("text", {"model_type": TITLE})):
        copies[name] = tmp_path / name
        copies[name].mkdir()
        for file in folder.iterdir():
            (copies[name] / file.name).write_bytes(file.read_bytes())
        raw = json.loads((folder / "config.json").read_text()) | change
        model.write_json(copies[name] / "config.json", raw)
    for copy in copies.values():
        flags = ["--model", copy, "--data", copy / "config.json", "--dry-run"]
        code, found = shown(train, flags, tmp_path, 80)
        assert code == 1 and "error: " in found and found == harmless(found), found


@pytest.mark.parametrize("name", ["gpt4\nstep 9/9 done", TITLE, "a\u202e", "a\u200b", "a\u2028"])
@pytest.mark.parametrize("where", ["name", "condition"])
def test_a_class_whose_characters_do_not_print_is_refused_in_one_line(
    name, where, folder, tmp_path
):
    entry = {"condition": name if where == "condition" else "A", "reward": 1.0}
    classes = {name if where == "name" else "a": entry}
    with pytest.raises(ValueError, match="that do not print") as raised:
        loss.class_table(classes)
    assert str(raised.value).isprintable()
    path = tmp_path / "model"
    path.mkdir()
    model.write_json(path / "crlft.json", {"classes": classes, "conditioned": True})
    code, found = shown(chat.main, [path, "--prompt", "Hi"], tmp_path, 80)
    assert code == 1 and found.count("\n") == 1 and found.isprintable() is False
    assert found[:-1].isprintable() and found.startswith(f"error: {path}/crlft.json: ")
