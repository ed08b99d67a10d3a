"""The terminal, which no text controls but ours; and chat.py's conversation there."""

import contextlib
import io
import os
import re
import sys

from support.formats import Message

# Control characters but newline and tab, marks that reverse the direction of text, lone surrogates.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Terminal(io.TextIOWrapper):
    """Standard output or error on a terminal: CONTROLS are written as U+FFFD.

    An answer, a name or an error may hold a stranger's text, and a control sequence can clear the
    screen, forge a line, or worse.
    """

    refreshed = False  # does the cursor follow a refreshed line? What is written then ends it first

    def write(self, text):
        before, Terminal.refreshed = "\n" * Terminal.refreshed, False
        return super().write(before + CONTROLS.sub("\ufffd", text))

    def refresh(self, line, final):
        """Show a line in place of the last refreshed one."""
        Terminal.refreshed = not final
        super().write("\r" + CONTROLS.sub("\ufffd", line) + "\033[K" + "\n" * final)


def guard_terminal():
    """Make sys.stdout and sys.stderr Terminals if they are on one; files and pipes get all text."""
    os.environ.setdefault("PYTHON_COLORS", "0")  # Python's own are control sequences too
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and stream.isatty():
            screen = open(stream.fileno(), "wb", closefd=False)
            setattr(sys, name, Terminal(screen, stream.encoding, "replace", line_buffering=True))


HELP = """\
/system TEXT   a system message for all turns; without TEXT, none
/class NAME    answer under the condition of this class
/both [TEXT]   ask this, or the last question again, under each condition
/new           forget the conversation
/quit          end, as Ctrl-D does; Ctrl-C stops an answer
A question that begins with a slash needs a space before it."""


def converse(chat, options):
    """Chat until Ctrl-D, /quit, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError, AttributeError):  # of a stream that is not a file
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8
        import readline  # history, editing; a paste of many lines is one text

        readline.parse_and_bind("set enable-bracketed-paste on")
    talk, millions = Talk(chat, options), chat.llama.config.parameter_count() / 1e6
    print(f"{chat.folder}: {millions:,.1f}M parameters, context {chat.context:,} tokens")
    print(talk.condition())
    if chat.single:
        print("trained on single questions: each is asked without the earlier ones")
    print("/help lists the commands, Ctrl-D ends")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (text := input("> ")).strip() not in ("/quit", "/exit", "quit", "exit"):
            try:
                if text.startswith("/"):
                    talk.command(*text.strip().split(maxsplit=1))
                elif text.strip():
                    talk.ask(text.strip())
            except KeyboardInterrupt:
                print(" [stopped]")
    print()


class Talk:
    def __init__(self, chat, options):
        self.chat, self.options = chat, options
        self.system, self.messages = [], []  # the latter ends with a question and its answer

    def condition(self):
        name, names = self.chat.class_name, self.chat.names
        others = ", ".join(other for other in names if other != name) or "none"
        return f'class {name}, asked as "{self.chat.prefix(name, "user")} ..."; others: {others}'

    def command(self, name, rest=""):
        if name == "/help":
            print(HELP)
        elif name == "/new" and not rest:
            self.messages = []
        elif name == "/system":
            self.system = [Message("system", rest)] if rest else []
            print("[for all turns; /system removes it]" if rest else "[no system message]")
        elif name == "/class" and rest in self.chat.names:
            self.chat.class_name = rest
            print(self.condition())
        elif name == "/both" and (rest or self.messages):
            if not rest:  # the last question again
                rest, self.messages = self.messages[-2].content, self.messages[:-2]
            self.ask(rest, sorted(self.chat.names, key=lambda name: name != self.chat.class_name))
        else:
            print(f"[not done; /help lists the commands; classes: {', '.join(self.chat.names)}]")

    def ask(self, text, names=()):
        """Print the answer of the current class, or of each in `names`, and keep the first."""
        asked, answers = [*self.system, *self.messages, Message("user", text)], [""]
        messages = self.chat.fitting(asked, self.options["max_new_tokens"])
        if not messages:
            return print(f"[too long for the context of {self.chat.context} tokens; not sent]")
        if len(messages) < len(asked) and not self.chat.single:
            print("[the context is full: the oldest turns are forgotten]")
        try:
            for name in names or [self.chat.class_name]:
                if names:
                    print(self.chat.prefix(name, "assistant"), end=" ", flush=True)
                for piece in self.chat.stream(messages, name, **self.options):
                    answers[-1] += piece
                    print(piece, end="", flush=True)
                print()
                answers.append("")
        finally:  # at Ctrl-C too
            self.messages = [*messages[len(self.system) :], Message("assistant", answers[0])]
