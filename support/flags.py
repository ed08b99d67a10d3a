"""Command-line flags: a wrong one is a one-line error that suggests the nearest known flag."""

import argparse
import contextlib
import difflib
import inspect
import math
import re
import shlex
import sys
from pathlib import Path

from support.files import told_torchrun
from support.terminal import guard_terminal

PYTHON = shlex.quote(sys.executable)  # as a shell names it


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with exit code 2."""

    def __init__(self, **options):
        guard_terminal()  # here, as every program begins with a Parser
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, arguments=None):
        arguments = sys.argv[1:] if arguments is None else arguments
        known = self._option_string_actions
        # Report a wrong flag before a missing one: it may be the same one, misspelt.
        for flag in (argument.split("=")[0] for argument in arguments):
            if re.fullmatch(r"--\S+", flag) and flag not in known:
                near = difflib.get_close_matches(flag, known, 1, cutoff=0.7)
                hint = f"did you mean {near[0]}? " if near else ""
                self.error(f"{flag} is not a flag of {self.prog}; {hint}--help lists all")
        return super().parse_args(arguments)

    def error(self, message):
        self.exit(2, told_torchrun(f"error: {message}") + "\n")

    def add_fields(self, config):
        """A flag per field of a dataclass: the comment beside it is its help, `# ---` a group."""
        group, lines = self, r"^    (?:# --- (.*)|(\w+): .*?  # (.*))$"
        for title, name, comment in re.findall(lines, inspect.getsource(config), re.MULTILINE):
            if title:
                group = self.add_argument_group(title)
                continue
            kind, default = config.__annotations__[name], getattr(config, name)
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind is list:
                options = {"nargs": "+", "action": "extend", "metavar": "FILE"}
            else:
                options = {"type": kind, "metavar": kind.__name__.upper()}
            text = f"{comment} (default: {default})" if default else comment
            group.add_argument(flag_of(name), help=text.replace("%", "%%"), **options)

    def values(self, arguments):
        """{field: value} of the flags given; the command line overrides an @FILE."""
        from_files, others = [], [text for text in arguments if not text.startswith("@")]
        for path in [text[1:] for text in arguments if text.startswith("@")]:
            try:
                from_files += shlex.split(Path(path).read_text("utf-8-sig"), comments=True)
            except (OSError, ValueError) as error:  # ValueError: an open quote, or not text
                self.error(f"@{path}: {error}")
        for text in others:
            if text != text.encode("utf-8", "ignore").decode():  # an export could not hold it
                self.error(f"{text!a}: its name is not UTF-8: rename it")
        return vars(self.parse_args(from_files)) | vars(self.parse_args(others))


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_ranges(config):
    """ValueError for the first flag of train.Config whose value makes no sense."""
    rules = [
        ("used with --dry-run", lambda x: config.dry_run or not x, "plan_ranks plan_memory"),
        ("used without --dry-run", lambda x: not (x and config.dry_run), "evaluate"),
        ("at least 0", lambda x: x >= 0,
         "max_steps eval_every save_every export_every recompute plan_ranks plan_memory"),
        ("at least 1", lambda x: x >= 1, "epochs accumulate keep replicas batch_tokens"),
        ("above 0", lambda x: x > 0, "beta adam_eps clip"),
        ("from 0 to 1", lambda x: 0 <= x <= 1, "min_lr_ratio warmup_ratio weight_decay"),
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2"),
        ("from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32, "seed"),
        (f"from 2 to --batch-tokens {config.batch_tokens}",
         lambda x: 2 <= x <= config.batch_tokens, "max_length"),
        ("bf16 or fp32", lambda x: x in ("bf16", "fp32"), "precision adam_precision"),
        ("auto or a number above 0", lambda x: x == "auto" or 0 < float(x) < math.inf, "lr"),
    ]  # fmt: skip
    for words, holds, names in rules:
        for name in names.split():
            value = getattr(config, name)
            with contextlib.suppress(ValueError):  # by float
                if value is None or holds(value):
                    continue
            raise ValueError(f"{flag_of(name)} must be {words}")
