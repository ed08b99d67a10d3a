"""Talk to a model that train.py exported, under the condition of its expert class.

    python chat.py RUN                          a conversation at the terminal
    python chat.py RUN --web                    in a browser, with a column per class
    python chat.py RUN --prompt "Hello"         one answer
    python chat.py RUN --batch in.jsonl --to out.jsonl

C-RLFT's inference: the prompt is the training template with the best-rewarded class's condition,
`GPT4 User: Hello<|end_of_turn|>GPT4 Assistant:`, and the answer ends at <|end_of_turn|>.
Shapes: B prompts, T tokens of all prompts end to end, S cached positions, H heads, K key-value
heads, E head_dim, V vocabulary.
"""

import functools
import os
import sys
from pathlib import Path
from types import NoneType

import torch
import torch.nn.functional as F

import data
import loss
import model
from support.batch import answer_file
from support.files import model_folder, of_type, read_export, reading
from support.flags import Parser
from support.terminal import converse
from support.web import PORT, serve


@torch.inference_mode()
def generate(llama, prompts, max_new_tokens, stop=(), temperature=0.0, top_p=1.0, seed=0):
    """Yields lists of B next tokens, with None for a prompt that is done.

    prompts: B lists of token ids. A prompt is done at a token in `stop`, after `max_new_tokens`,
    or when the model's context is full. Temperature 0 takes the likeliest token.
    """
    context = llama.config.max_position_embeddings
    if wrong := [len(prompt) for prompt in prompts if not 0 < len(prompt) <= context]:
        raise ValueError(f"a prompt has {wrong[0]} tokens, the model's context is {context}")
    device = next(llama.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KeyValueCache(llama, lengths, min(context, int(lengths.max()) + max_new_tokens))
    last = lengths.cumsum(0) - 1
    tokens = torch.tensor(sum(prompts, []), device=device)
    logits = llama(tokens, cache.positions, cache.cu_seqlens, rows=last, attend=cache.layers)
    running = [True] * len(prompts)
    for count in range(1, max_new_tokens + 1):
        tokens = sample(logits, temperature, top_p, generator)  # (B,)
        yield [t if on else None for t, on in zip(tokens.tolist(), running, strict=True)]
        full = (lengths + count >= context).tolist()
        ended = [token in stop for token in tokens.tolist()]
        running = [on and not (e or f) for on, e, f in zip(running, ended, full, strict=True)]
        if count == max_new_tokens or not any(running):
            return
        cache.advance((lengths + count - 1).clamp(max=context - 1))  # beyond it only if done
        logits = llama(tokens, cache.positions, None, attend=cache.layers)


def sample(logits, temperature, top_p, generator):
    """Next tokens (B,) from logits (B, V); top_p keeps the likeliest up to that mass."""
    if temperature == 0:
        return logits.argmax(-1)
    temperature = max(temperature, 1e-30)  # or float32 overflows, and infinity - infinity is NaN
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, choice)[:, 0]


class KeyValueCache:
    """Keys and values of every layer, (B, S, K, E), for prompts of different lengths.

    The first forward runs the prompts packed end to end; later ones run one token per prompt.
    """

    def __init__(self, llama, lengths, size):
        config, device = llama.config, lengths.device
        self.window, self.size = config.sliding_window, size
        ends = F.pad(lengths.cumsum(0), (1, 0))
        self.cu_seqlens = ends.int()
        self.prompt = torch.repeat_interleave(lengths)  # (T,) the prompt of each token
        self.positions = torch.arange(len(self.prompt), device=device) - ends[self.prompt]
        self.packed = model.PackedAttention(self.cu_seqlens, int(lengths.max()), self.window)
        shape = len(lengths), size, config.num_key_value_heads, config.head_dim
        dtype = next(llama.parameters()).dtype
        new = torch.zeros(config.num_hidden_layers, 2, *shape, device=device, dtype=dtype)
        self.layers = [functools.partial(self.attend, *layer) for layer in new]

    def advance(self, positions):
        """The next forward has one token per prompt, at these positions (B,)."""
        self.packed, self.positions = None, positions
        self.prompt = torch.arange(len(positions), device=positions.device)
        distance = positions[:, None] - torch.arange(self.size, device=positions.device)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        self.mask = seen[:, None, None]  # (B, 1, 1, S)

    def attend(self, keys, values, q, k, v):  # (T, H, E), (T, K, E), (T, K, E) -> (T, H, E)
        at = self.prompt, self.positions
        keys[at], values[at] = k, v
        if self.packed:
            return self.packed(q, k, v)
        q, keys, values = q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
        options = {"attn_mask": self.mask, "enable_gqa": q.shape[1] != k.shape[1]}
        return F.scaled_dot_product_attention(q, keys, values, **options)[:, :, 0]


class Chat:
    """A loaded model with its tokenizer and the class under whose condition it answers."""

    def __init__(self, folder, source_class=None, device=None):
        export = export_of(folder)
        name = source_class or loss.expert_class(export.classes)
        if name not in export.classes:
            raise ValueError(f"--class {name!r} is not one of {', '.join(export.classes)}")
        self.folder, self.export, self.class_name = folder, export, name
        best_first = sorted(export.classes, key=lambda n: -export.classes[n].reward)
        self.names = best_first if export.conditioned else [name]  # that differ in their prompt
        self.single = export.most_answers == 1  # trained on single questions: asked without history
        self.tokenizer = data.Tokenizer(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.llama = model.load(folder, device, dtype).eval()
        self.context = self.llama.config.max_position_embeddings
        self.stop = {self.tokenizer.eot, self.tokenizer.eos, *ends_of(folder)}

    def condition_of(self, name):
        return self.export.classes[name].condition if self.export.conditioned else ""

    def prefix(self, name, role):
        """The text that a turn of class `name` begins with."""
        return self.tokenizer.template.prefix(self.condition_of(name), role).strip()

    def prompt(self, messages, name=None):
        """Tokens, under the condition of class `name`, by default of the current one."""
        condition = self.condition_of(name or self.class_name)
        return data.encode_prompt(messages, self.tokenizer, condition)

    def fitting(self, messages, max_new_tokens):
        """The newest turns that leave room for an answer; [] if even the last one is too long.

        The room is max_new_tokens, but at most a quarter of the context; the last message may use
        it. A system message remains. Turns older than those that fit are not tokenized.
        """
        room = min(max_new_tokens, self.context // 4)
        first = 1 if messages[0].role == "system" else 0
        kept = [*messages[:first], messages[-1]]
        longest = max(self.names, key=lambda name: len(self.prompt(kept, name)))  # condition
        left = self.context - len(self.prompt(kept, longest))
        if left < 1:
            return []
        for at in range(len(messages) - 3, first - 1, -2) if not self.single else ():
            pair = messages[at : at + 2]
            left -= len(self.prompt(pair, longest)) - len(self.prompt([], longest))
            if left < room:
                break
            kept[first:first] = pair
        return kept

    def answers(self, conversations, **options):
        """(text, ended) for each list of messages; ended: by the model, not by a limit."""
        prompts = [self.prompt(messages) for messages in conversations]
        rows = generate(self.llama, prompts, stop=self.stop, **options)
        answers = [[t for t in column if t is not None] for column in zip(*rows, strict=True)]
        return [(self.text(answer), answer[-1] in self.stop) for answer in answers]

    def text(self, tokens):
        return self.tokenizer.decode([t for t in tokens if t not in self.stop])

    def stream(self, messages, name=None, **options):
        """Pieces of one answer's text as they come; prints on stderr if a limit cut it."""
        for _, piece, cut in self.streams([self.prompt(messages, name)], **options):
            yield piece
            if cut:
                print(f" [{cut}]", end="", file=sys.stderr, flush=True)

    def streams(self, prompts, **options):
        """Yields (number of a prompt, piece of its answer's text, None) as they come.

        A character split over several tokens is held back until it is whole. The last piece of an
        answer has, instead of None, the limit that cut it, or "" if the model ended it.
        """
        answers, shown = [[] for _ in prompts], [""] * len(prompts)
        for tokens in generate(self.llama, prompts, stop=self.stop, **options):
            for i, token in enumerate(tokens):
                if token is None:
                    continue
                answers[i].append(token)
                text, ended = self.text(answers[i]), token in self.stop
                if ended or not text.endswith("\ufffd"):
                    yield i, text[len(shown[i]) :], "" if ended else None
                    shown[i] = text
        for i, answer in enumerate(answers):
            if answer[-1] not in self.stop:
                limit = f"cut after {len(answer)} tokens: --max-new-tokens or the model's context"
                yield i, self.text(answer)[len(shown[i]) :], limit


def export_of(folder):
    """The Export in a folder; ValueError if it has none."""
    if export := read_export(folder):
        return export
    why = "chat.py needs an export of train.py, as a base model knows no class's condition"
    raise ValueError(f"{folder}/crlft.json: not found; {why} (save_pretrained omits it: copy it)")


def ends_of(folder):
    """Tokens at which generation_config.json ends an answer; none without that file."""
    path = Path(folder) / "generation_config.json"
    ends = model.read_json(path).get("eos_token_id", []) if path.exists() else []
    with reading(path):
        return [of_type(end, int, NoneType) for end in (ends if isinstance(ends, list) else [ends])]


def main(argv=None):
    parser = Parser(prog="chat.py", description="Class-conditioned generation from an export.")
    add, add_way = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("folder", metavar="DIR", help="a model exported by train.py, or the RUN that holds it")
    add_way("--prompt", metavar="TEXT", help="answer this and exit")
    add("--class", dest="source_class", metavar="NAME", help="(default: the expert class)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    add("--seed", type=int, default=0, help="of the sampling")
    add_way("--batch", metavar="IN.jsonl", help="answer the last user turn of every conversation")
    add("--to", metavar="OUT.jsonl", help="output of --batch; resumes a file that was cut short")
    add("--drop-last-answer", action="store_true", help="--batch replaces a last answer")
    in_browser = f"a page for this machine's browser, at this port (default {PORT})"
    add_way("--web", type=int, nargs="?", const=PORT, metavar="PORT", help=in_browser)
    args = parser.parse_args(argv)
    if not args.temperature >= 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("needs --temperature from 0, --top-p in (0, 1], --max-new-tokens from 1")
    if bool(args.batch) != bool(args.to) or (args.drop_last_answer and not args.batch):
        parser.error("--batch and --to go together, --drop-last-answer only with them")
    if args.web is not None and args.source_class:
        parser.error("--web asks under each class: leave out --class")
    if sys.stdin is None and args.web is args.batch is args.prompt is None:
        parser.error("standard input is closed: give --prompt, --batch or --web")
    options = {n: getattr(args, n) for n in ("temperature", "top_p", "max_new_tokens", "seed")}
    try:
        if args.to and os.path.exists(args.to) and os.path.samefile(args.batch, args.to):
            parser.error("--to is the file of --batch: give a new one")
        folder = model_folder(args.folder)
        if args.source_class and not export_of(folder).conditioned:
            raise ValueError("--class: this model was trained without conditions")
        answer(Chat(folder, args.source_class), args, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


def answer(chat, args, options):
    if args.web is not None:
        serve(chat, args.web, options)
    elif args.batch:
        answer_file(chat, args.batch, args.to, options, args.drop_last_answer)
    elif args.prompt is not None:
        text = args.prompt.encode("utf-8", "replace").decode()  # "?" for bytes that are not UTF-8
        for piece in chat.stream([data.Message("user", text)], **options):
            print(piece, end="", flush=True)
        print()
    else:
        converse(chat, options)


if __name__ == "__main__":
    main()
