"""The flags of the commands: a wrong one is an error of one line, with the nearest right one."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import shlex
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line what is wrong or missing, and ends with code 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.convert_arg_line_to_args = lambda line: shlex.split(
            line.removeprefix("\ufeff"), comments=True
        )

    def parse_args(self, arguments=None):
        self.given = sys.argv[1:] if arguments is None else [*arguments]
        self.refuse_unknown(self.given)  # before what is missing: it may be there, misspelt
        try:
            found, left = self.parse_known_args(self.given)
        except ValueError as error:  # of an @FILE: an open quote, or no text
            self.error(f"{' '.join(a for a in self.given if a.startswith('@'))}: {error}")
        self.refuse_unknown(left)  # those of a file
        if left:
            self.error(f"{left[0]} belongs to no flag of {self.prog}; --help lists all")
        return found

    def refuse_unknown(self, arguments):
        """The error of the first of them that is to be a flag and is none."""
        for argument in arguments:
            flag = argument.split("=")[0]
            if argument == "--":  # what follows are no flags
                return
            if _is_flag(argument) and flag not in self._option_string_actions:
                near = nearest(flag, self._option_string_actions)
                hint = f"; did you mean {near}? --help lists all" if near else "; --help lists all"
                self.error(f"{flag} is not a flag of {self.prog}{hint}")

    def error(self, message):
        if lacking := re.fullmatch("the following arguments are required: (.*)", message):
            self.error_missing(lacking[1].split(", "), self.given)
        self.exit(2, f"error: {message}\n")

    def error_missing(self, names, given):
        """The error that says the line to run: what was given, and what is missing, to fill in."""
        flags = self._option_string_actions
        rest = [f"{name} {flags[name].metavar}" if name in flags else name for name in names]
        line = " ".join(["python", self.prog, *map(shlex.quote, given), *rest])
        verb = "is" if len(names) == 1 else "are"
        self.error(f"{' and '.join(names)} {verb} missing: {line}")

    # --- of a dataclass

    def add_fields(self, config, metavars):
        """A flag a field of a dataclass: the comment beside it is its help, one above, a group.

        metavars: {field: what stands for its value}, where the name of its type says too little.
        """
        fields, group = {field.name: field for field in dataclasses.fields(config)}, self
        lines = r"^    (?:# --- (.*)|(\w+): .*?  # (.*))$"
        for title, name, comment in re.findall(lines, inspect.getsource(config), re.MULTILINE):
            if title:
                group = self.add_argument_group(title)
                continue
            kind, default, options = fields[name].type, fields[name].default, {}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind is list:
                options = {"nargs": "+", "action": "extend", "metavar": "FILE"}
            else:
                options = {"type": kind, "metavar": metavars.get(name, kind.__name__.upper())}
                if default:
                    shown = f"{default:.4g}" if kind is float else default
                    comment += f" (default: {shown})"
            group.add_argument(flag_of(name), help=comment.replace("%", "%%"), **options)

    def values(self, arguments):
        """{field: value} of what is given; the flags themselves win over those of an @FILE."""
        files = [argument for argument in arguments if argument.startswith("@")]
        others = [argument for argument in arguments if not argument.startswith("@")]
        return vars(self.parse_args(files)) | vars(self.parse_args(others))


def flag_of(name):
    return "--" + name.replace("_", "-")


ELSEWHERE = {  # as other trainers name it
    "--learning-rate": "--lr", "--gradient-accumulation-steps": "--accumulate",
    "--output-dir": "--out", "--output": "--out", "--max-grad-norm": "--clip",
    "--train-file": "--data", "--dataset": "--data", "--validation-file": "--eval-data",
    "--per-device-train-batch-size": "--batch-tokens", "--batch-size": "--batch-tokens",
    "--gradient-checkpointing": "--recompute", "--bf16": "--precision", "--fp16": "--precision",
    "--seq-len": "--max-length", "--eval-steps": "--eval-every", "--save-steps": "--save-every",
    "--model-name-or-path": "--model", "--num-train-epochs": "--epochs",
}  # fmt: skip


def nearest(flag, flags):
    """What `flag` was likely meant to be, or None."""
    if (same := ELSEWHERE.get(flag.replace("_", "-"))) in flags:
        return same
    flags = [known for known in flags if known not in ("-h", "--help")]
    if longer := [known for known in flags if known.startswith(flag)]:
        return longer[0]
    words = flag.replace("_", "-").split("-")
    alike = [known for known in flags if known.split("-")[2:3] == words[2:3]]  # --eval-steps
    part = [known for known in flags if set(known.split("-")) <= set(words)]  # --train-data
    matches = functools.partial(difflib.get_close_matches, cutoff=0.7)
    found = matches(flag, alike) or part or matches(flag, list(flags))
    return found[0] if found else None


def _is_flag(argument):
    """As argparse sees it: texts with a space and negative numbers are values."""
    if not argument.startswith("-") or " " in argument or argument == "-":
        return False
    with contextlib.suppress(ValueError):
        float(argument)
        return False
    return True
