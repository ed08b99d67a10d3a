"""Talk to a model that train.py exported, under the condition of its expert class.

    python chat.py RUN/model                          a conversation at the terminal
    python chat.py RUN/model --prompt "Hello"         one answer
    python chat.py RUN/model --batch in.jsonl --to out.jsonl

C-RLFT's inference: the prompt is the training template with the best-rewarded class's condition,
`GPT4 User: Hello<|end_of_turn|>GPT4 Assistant:`, and the answer ends at <|end_of_turn|>.
Shapes: B prompts, T tokens of all prompts end to end, S positions kept, H heads, K key-value
heads, E head_dim, V vocabulary.
"""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import loss
import model
from support.containers import blocks, sources
from support.flags import Parser
from support.formats import parse_json, parse_messages, with_answer

BATCH = 16  # conversations answered at a time by --batch


@torch.inference_mode()
def generate(llama, prompts, max_new_tokens, stop=(), temperature=0.0, top_p=1.0, seed=0):
    """Yields a list of B next tokens at a time, None for a prompt that is done.

    prompts: B lists of token ids. A prompt is done at a token of `stop`, after `max_new_tokens`,
    or where the model's context is full. Temperature 0 takes the likeliest token.
    """
    context = llama.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest > context or not all(prompts):
        wrong = longest if longest > context else 0
        raise ValueError(f"a prompt has {wrong} tokens, the model's context is {context}")
    device = next(llama.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = KeyValueCache(llama, lengths, min(context, longest + max_new_tokens))
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
        cache.advance((lengths + count - 1).clamp(max=context - 1))  # past it only where done
        logits = llama(tokens, cache.positions, None, attend=cache.layers)


def sample(logits, temperature, top_p, generator):
    """Next tokens (B,) from logits (B, V); top_p keeps the likeliest that reach that mass."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, choice)[:, 0]


class KeyValueCache:
    """Keys and values of every layer, (B, S, K, E), for prompts of different lengths.

    The first forward runs the prompts packed end to end; each later one a token a prompt.
    """

    def __init__(self, llama, lengths, size):
        config, device = llama.config, lengths.device
        self.window, self.size = config.sliding_window, size
        ends = F.pad(lengths.cumsum(0), (1, 0))
        self.cu_seqlens = ends.int()
        self.prompt = torch.repeat_interleave(lengths)  # (T,) which prompt a token is of
        self.positions = torch.arange(len(self.prompt), device=device) - ends[self.prompt]
        self.packed = model.PackedAttention(self.cu_seqlens, int(lengths.max()), self.window)
        shape = len(lengths), size, config.num_key_value_heads, config.head_dim
        dtype = next(llama.parameters()).dtype
        new = torch.zeros(config.num_hidden_layers, 2, *shape, device=device, dtype=dtype)
        self.layers = [functools.partial(self.attend, *layer) for layer in new]

    def advance(self, positions):
        """The next forward holds one token a prompt, at these positions (B,)."""
        self.packed, self.positions = None, positions
        self.prompt = torch.arange(len(positions), device=positions.device)
        distance = positions[:, None] - torch.arange(self.size, device=positions.device)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        self.mask = seen[:, None, None]  # (B, 1, 1, S)

    def attend(self, keys, values, q, k, v):  # (T, H, E), (T, K, E), (T, K, E) -> (T, H, E)
        where = self.prompt, self.positions
        keys[where], values[where] = k, v
        if self.packed:
            return self.packed(q, k, v)
        out = F.scaled_dot_product_attention(
            q[:, :, None],  # (B, H, 1, E)
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self.mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[:, :, 0]


class Chat:
    """A loaded model with its tokenizer and the condition it answers under."""

    def __init__(self, folder, source_class=None, device=None):
        classes, conditioned = read_crlft(folder)
        name = source_class or loss.expert_class(classes)
        if name not in classes:
            raise ValueError(f"--class {name!r} is not one of {', '.join(classes)}")
        self.class_name = name
        self.condition = classes[name].condition if conditioned else ""
        self.tokenizer = data.Tokenizer(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.llama = model.load(folder, device, dtype).eval()
        self.stop = {self.tokenizer.eot, self.tokenizer.eos}

    def prompt(self, messages):
        return data.encode_prompt(messages, self.tokenizer, self.condition)

    def answers(self, conversations, **options):
        """(text, ended) for each list of messages; ended: by the model, not by a limit."""
        answers = [[] for _ in conversations]
        prompts = [self.prompt(messages) for messages in conversations]
        for tokens in generate(self.llama, prompts, stop=self.stop, **options):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [(self.text(a), bool(a) and a[-1] in self.stop) for a in answers]

    def text(self, tokens):
        return self.tokenizer.decode([t for t in tokens if t not in self.stop])

    def stream(self, messages, **options):
        """Pieces of one answer's text as they come; a character cut between tokens waits."""
        tokens, shown = [], ""
        for (token,) in generate(self.llama, [self.prompt(messages)], stop=self.stop, **options):
            tokens.append(token)
            text = self.text(tokens)
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        yield self.text(tokens)[len(shown) :]
        if tokens[-1] not in self.stop:
            note = f" [cut after {len(tokens)} tokens: --max-new-tokens or the model's context]"
            print(note, end="", file=sys.stderr, flush=True)


def read_crlft(folder):
    path = Path(folder) / "crlft.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return loss.class_table(raw["classes"]), raw["conditioned"]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found; chat.py needs a folder exported by train.py"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None


def answer_file(chat, source, target, options):
    """Conversation lines in, the same lines out, each with the assistant's turn appended."""
    lines, cut = list(read_prompts(chat, source)), 0
    others = sum(line.get("class") not in (None, chat.class_name) for line, _ in lines)
    if others:
        print(
            f"note: answered as class {chat.class_name}; {others} of the lines have another "
            '"class", which their copies keep',
            file=sys.stderr,
        )
    with open(target, "x", encoding="utf-8") as out:
        for start in range(0, len(lines), BATCH):
            batch = lines[start : start + BATCH]
            answers = chat.answers([messages for _, messages in batch], **options)
            for (line, _), (text, ended) in zip(batch, answers, strict=True):
                out.write(json.dumps(with_answer(line, text), ensure_ascii=False) + "\n")
                cut += not ended
            print(f"{start + len(batch)}/{len(lines)} answered", file=sys.stderr)
    if cut:
        print(f"{cut} answers cut: --max-new-tokens or the model's context", file=sys.stderr)


def read_prompts(chat, path):
    """(line, messages) of each conversation; ValueError names the line that is not one."""
    context, (source,) = chat.llama.config.max_position_embeddings, sources([path], {})
    raws = (raw for block in blocks([source]) for raw in block.raw)
    for number, raw in enumerate(raws, start=1):
        try:
            line = parse_json(raw)
            if line is None:
                continue
            messages, _ = parse_messages(line)  # what is not read is copied
            json.dumps(line, ensure_ascii=False).encode()  # a lone surrogate fails now
            if not messages or messages[-1].role != "user":
                raise ValueError("the last message must be the user's")
            if (length := len(chat.prompt(messages))) > context:
                raise ValueError(f"has {length} tokens, the model's context is {context}")
        except ValueError as error:
            raise ValueError(f"{source.where(number)}: {error}") from None
        yield line, messages


def converse(chat, options):
    """A conversation at the terminal; the oldest turns go when the context is full."""
    print("Ctrl-D or /quit ends, /new starts again, Ctrl-C stops an answer.")
    messages, context = [], chat.llama.config.max_position_embeddings
    while True:
        try:
            text = readable(input("> ").strip())
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/quit", "/new"):
            if text == "/quit":
                return
            messages = []
            continue
        if not text:
            continue
        messages.append(data.Message("user", text))
        if len(chat.prompt(messages[-1:])) >= context:
            print(f"[too long for the model's context of {context} tokens; not sent]")
            messages.pop()
            continue
        while len(chat.prompt(messages)) >= context:
            messages = messages[2:]
            print("[the context is full: the oldest turn is forgotten]")
        answer = ""
        try:
            for piece in chat.stream(messages, **options):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()
        messages.append(data.Message("assistant", answer))


def readable(text):
    """Text of the terminal; what was no UTF-8 becomes question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def main(argv=None):
    parser = Parser(
        prog="chat.py", description="Class-conditioned generation from an exported folder."
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="a model exported by train.py, such as RUN/model")
    add("--prompt", metavar="TEXT", help="answer this and end")
    add(
        "--class", dest="source_class", metavar="NAME", help="condition (default: the expert class)"
    )
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    add("--max-new-tokens", type=int, default=512, help="longest answer (default 512)")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--batch", metavar="IN.jsonl", help="answer the last user turn of every line")
    add("--to", metavar="OUT.jsonl", help="where --batch writes; must not exist")
    args = parser.parse_args(argv)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("needs --temperature from 0, --top-p in (0, 1], --max-new-tokens from 1")
    if bool(args.batch) != bool(args.to) or (args.batch and args.prompt is not None):
        parser.error("--batch and --to go together, and without --prompt")
    options = {
        key: getattr(args, key) for key in ("temperature", "top_p", "max_new_tokens", "seed")
    }
    try:
        if args.source_class and not read_crlft(args.folder)[1]:
            raise ValueError("--class: this model was trained without conditions")
        chat = Chat(args.folder, args.source_class)
        if args.batch:
            answer_file(chat, args.batch, args.to, options)
        elif args.prompt is not None:
            prompt = data.Message("user", readable(args.prompt))
            for piece in chat.stream([prompt], **options):
                print(piece, end="", flush=True)
            print()
        else:
            converse(chat, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
