"""chat.py at the terminal: questions, commands, and the conversation so far."""

import contextlib
import shlex

from support.formats import Message

HELP = """\
/class NAME    answer under the condition of this class
/both [TEXT]   ask this, or the last question again, under each condition
/new           forget the conversation
/quit          end, as Ctrl-D does; Ctrl-C stops an answer
A question that begins with a slash needs a space before it."""


def converse(chat, options):
    """Chat until Ctrl-D, /quit, or Ctrl-C twice at the prompt."""
    with contextlib.suppress(ImportError):  # history, editing; a paste of many lines is one text
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
    talk, millions = Talk(chat, options), chat.llama.config.parameter_count() / 1e6
    print(f"{chat.folder}: {millions:,.1f}M parameters, context {chat.context:,} tokens")
    print(talk.condition())
    if chat.single:
        print("trained on single questions: each is asked without the earlier ones")
    print("/help lists the commands, Ctrl-D ends")
    while (text := typed()) is not None:
        if text.strip() in ("/quit", "/exit", "quit", "exit"):
            return
        if text.startswith("/"):
            talk.command(*text.strip().split(maxsplit=1))
        elif text.strip():
            talk.ask(text.strip())


def typed():
    """A line, "?" for bytes that are not UTF-8; None at Ctrl-D or at Ctrl-C twice in a row."""
    for notice in ("\n[Ctrl-C once more ends]", ""):
        try:
            return input("> ").encode("utf-8", "replace").decode()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print(notice)


class Talk:
    def __init__(self, chat, options):
        self.chat, self.options = chat, options
        self.messages = []  # ends with a question and its answer

    def condition(self):
        chat = self.chat
        asked = f'asked as "{chat.prefix(chat.class_name, "user")} ..."'
        others = ", ".join(name for name in chat.names if name != chat.class_name)
        if not others:
            return f"{asked}: trained without conditions, or on only one class"
        return f"class {chat.class_name}, {asked}; others: {others}"

    def command(self, name, rest=""):
        if name == "/help":
            print(HELP)
        elif name == "/new" and not rest:
            self.messages = []
        elif name == "/class" and rest in self.chat.names:
            self.chat.class_name = rest
            print(self.condition())
        elif name == "/class":
            print(f"[/class takes one of: {', '.join(self.chat.names)}]")
        elif name == "/both" and (rest or self.messages):
            if not rest:  # the last question again
                rest, self.messages = self.messages[-2].content, self.messages[:-2]
            current = self.chat.class_name
            self.ask(rest, sorted(self.chat.names, key=lambda name: name != current))
        elif name == "/both":
            print("[no question yet: /both TEXT]")
        else:
            print(f"[no command: {shlex.quote(name)}; /help lists them]")

    def ask(self, text, names=()):
        """Print the answer of the current class, or of each in `names`, and keep the first."""
        asked, answers = [*self.messages, Message("user", text)], []
        messages = self.chat.fitting(asked, self.options["max_new_tokens"])
        if not messages:
            return print(f"[too long for the context of {self.chat.context} tokens; not sent]")
        forgotten = 0 if self.chat.single else (len(asked) - len(messages)) // 2
        print("[the context is full: the oldest turn is forgotten]\n" * forgotten, end="")
        try:
            for name in names or [self.chat.class_name]:
                answers.append("")
                if names:
                    print(self.chat.prefix(name, "assistant"), end=" ", flush=True)
                for piece in self.chat.stream(messages, name, **self.options):
                    answers[-1] += piece
                    print(piece, end="", flush=True)
                print()
        except KeyboardInterrupt:
            print(" [stopped]")
        self.messages = [*messages, Message("assistant", answers[0])]
