"""The flags of the commands: a wrong one is an error of one line, with the nearest right one."""

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import shlex
import sys


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one line what is wrong, and exits with code 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.convert_arg_line_to_args = lambda line: shlex.split(
            line.removeprefix("\ufeff"), comments=True
        )

    def parse_args(self, arguments=None):
        arguments = sys.argv[1:] if arguments is None else arguments
        before_texts = [*arguments, "--"].index("--")  # what follows "--" are texts
        flags = [a for a in arguments[:before_texts] if a.startswith("--") and " " not in a]
        self.refuse_unknown(flags)  # before a missing one: it may be misspelt
        try:
            found, left = self.parse_known_args(arguments)
        except ValueError as error:  # in an @FILE: an open quote, or not text
            self.error(f"{' '.join(a for a in arguments if a.startswith('@'))}: {error}")
        self.refuse_unknown(left)
        if left:
            self.error(f"{left[0]} belongs to no flag of {self.prog}; --help lists all")
        return found

    def refuse_unknown(self, arguments):
        known = self._option_string_actions
        for flag in [argument.split("=")[0] for argument in arguments]:
            if flag.startswith("-") and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]}? " if near else ""
                self.error(f"{flag} is not a flag of {self.prog}; {hint}--help lists all")

    def error(self, message):
        self.exit(2, f"error: {message}\n")

    def add_fields(self, config, metavars):
        """A flag per field of a dataclass: a comment beside it is its help, one above it a group.

        metavars: {field: the name of its value in the help}, if its type does not say enough.
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
        """{field: value} of the flags given; those of the command line win over an @FILE's."""
        files = [argument for argument in arguments if argument.startswith("@")]
        others = [argument for argument in arguments if not argument.startswith("@")]
        return vars(self.parse_args(files)) | vars(self.parse_args(others))


def flag_of(name):
    return "--" + name.replace("_", "-")


LEAST = {
    "epochs": 1, "batch_tokens": 2, "accumulate": 1, "keep": 1, "replicas": 1,
    "max_steps": 0, "eval_every": 0, "save_every": 0, "export_every": 0, "seed": 0,
    "recompute": 0, "plan_ranks": 0, "plan_memory": 0,
}  # fmt: skip


def check_ranges(config):
    """ValueError for the first flag of train.Config whose value makes no sense."""

    def require(holds, name, what):
        if not holds:
            raise ValueError(f"{flag_of(name)} must be {what}")

    texts = map(str, [*vars(config).values(), *config.data, *config.eval_data])
    for text in [text for text in texts if text != text.encode("utf-8", "ignore").decode()]:
        raise ValueError(f"{text!a}: its name is not UTF-8: rename it")
    for name in ("plan_ranks", "plan_memory"):
        require(config.dry_run or not getattr(config, name), name, "used with --dry-run")
    require(not (config.evaluate and config.dry_run), "evaluate", "used without --dry-run")
    for name, least in LEAST.items():
        require((getattr(config, name) or 0) >= least, name, f"at least {least}")
    for name in ("beta", "adam_eps", "clip"):
        require(getattr(config, name) > 0, name, "above 0")
    for name in ("min_lr_ratio", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay"):
        require(0 <= getattr(config, name) <= 1, name, "from 0 to 1")
    for name in ("adam_beta1", "adam_beta2"):
        require(getattr(config, name) < 1, name, "below 1")
    require(config.seed < 2**32, "seed", "below 2^32")
    longest = config.max_length is None or 2 <= config.max_length <= config.batch_tokens
    require(longest, "max_length", f"from 2 to --batch-tokens {config.batch_tokens}")
    require(config.precision in (None, "bf16", "fp32"), "precision", "bf16 or fp32")
    try:
        rate = config.lr == "auto" or 0 < float(config.lr) < math.inf
    except ValueError:
        rate = False
    require(rate, "lr", "auto or a number above 0")
