"""`python data.py FILE --model DIR`: check conversations, and show them as the model reads them."""

import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import data
from loss import BETA, DEFAULT_CLASSES, class_weights, read_classes
from model import LlamaConfig
from support import report
from support.flags import Parser
from support.plan import length_limit
from support.tokenizer import Tokenizer


def main(argv=None):
    parser = Parser(prog="data.py", description="Check conversations and show their tokens.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="conversations, or CLASS=FILE: all of one class")
    add("--model", required=True, metavar="DIR", help="folder with its tokenizer")
    add("--classes", metavar="FILE", help='{"a": {"condition": "A", "reward": 1, "match": ["a*"]}}')
    add("--class-field", default="class", metavar="KEY", help="the field that names its class")
    add("--beta", type=float, default=BETA, help="w = exp((reward - best reward) / beta)")
    add("--max-length", type=int, help="tokens; longer ones are cut (default: as in train.py)")
    add("--batch-tokens", type=int, default=8192, help="tokens per bin, for the packing figures")
    add("--ranks", type=int, default=1, help="bins per step: ranks x --accumulate of train.py")
    add("--show", type=int, default=4, metavar="N", help="conversations to show")
    add("--skip-bad", action="store_true", help="drop bad lines and count them")
    args = parser.parse_args(argv)
    try:
        run_preview(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def run_preview(args):
    asked = 1 if args.max_length is None else args.max_length
    if not 1 <= asked <= args.batch_tokens or args.ranks < 1:
        raise ValueError("needs 1 <= --max-length <= --batch-tokens and --ranks of at least 1")
    classes = read_classes(args.classes) if args.classes else DEFAULT_CLASSES
    tokenizer = Tokenizer(args.model)
    weights = np.array(list(class_weights(classes, args.beta).values()))
    known = (Path(args.model) / "config.json").exists()
    context = LlamaConfig.from_folder(args.model).max_position_embeddings if known else 0
    max_length = length_limit(args, context)
    with tempfile.TemporaryDirectory() as folder:
        found = data.prepare(
            args.files, tokenizer, classes, folder, max_length=max_length,
            class_field=args.class_field, skip_bad=args.skip_bad, beta=args.beta,
            progress=report.Progress("tokenizing"),
        )  # fmt: skip
        print("\n".join(report.summary(found, classes, weights)))
        if tokenizer.warning:
            print(tokenizer.warning)
        if not known:
            print(f"{args.model} has no config.json: the model's context is not known")
        steps = data.pack(found.lengths, args.batch_tokens, args.ranks, seed=0, epoch=0)
        fill = found.lengths.sum() / (len(steps) * args.ranks * args.batch_tokens)
        packed = f"{len(steps):,} steps of {args.ranks} x {args.batch_tokens:,} tokens"
        print(f"packing: {packed}, {fill:.2%} full, conversations up to {max_length:,} tokens")
        print("\n".join(report.weight_by_step(found, steps, classes, weights)))
        print("\nsupervised: ⟦between these⟧, with its weight w")
        print("the name of a special token, if spelled out in a text, is shown as <\\s>\n")
        for conversation in varied(found, args.show):
            print(*preview(found, conversation, tokenizer, classes, weights), sep="\n")


def preview(dataset, conversation, tokenizer, classes, class_weights):
    """Lines of text: one conversation as the model reads it, with the weights of its tokens."""
    weights = dataset.weights_of(conversation, class_weights)
    name = list(classes)[dataset.index["source_class"][conversation]]
    text, tokens = "", dataset.tokens[dataset.span(conversation)].tolist()
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(tokens)]
    for low, high in itertools.pairwise(bounds):
        run = report.visible(tokens[low:high], tokenizer)
        inner = run.removesuffix("\n")  # so that the weight stands at the end of its line
        text += f"⟦{inner}⟧w={weights[low]:.3g}{run[len(inner):] or ' '}" if weights[low] else run
    where = dataset.where(conversation)
    return [f"{where}  class {name}, {len(weights)} tokens", text.rstrip("\n"), ""]


def varied(dataset, count):
    """Indices of the first conversations of each class in turn."""
    source_class = dataset.index["source_class"]
    by_class = [np.flatnonzero(source_class == c) for c in np.unique(source_class)]
    return [of[i] for i in range(count) for of in by_class if i < len(of)][:count]
