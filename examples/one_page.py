"""C-RLFT on one page (OpenChat, arXiv 2309.11235), to be read before train.py.

    python examples/one_page.py MODEL_DIR data.jsonl OUT
    python examples/one_page.py examples/sums examples/sums/train.jsonl runs/one_page

The second line trains the embedded example, from random weights, in two minutes. A model with
weights needs <|end_of_turn|> in its vocabulary, as an export of train.py has.

All that C-RLFT knows about the quality of a conversation is its source, the class c. The class is
part of the prompt, and its reward weighs the loss:

    tokens    <s> GPT4 User: Hello <|end_of_turn|> GPT4 Assistant: Hi <|end_of_turn|>
    weights    0   0    0      0          0         0       0      w        w

    (3)  r_c = 1 for the expert class, less for any other
    (6)  maximise  E[ exp(r_c / beta) · log pi(y | x, c) ]
         w_c = exp((r_c - r_max) / beta)        the factor exp(r_max / beta) cancels in L
         L = Σ w·CE / Σ w                       over all tokens of the step

A weight acts only relative to the others of its step: data of a single class train the same at any
reward. No reference model, no value model, no sampling. train.py does the same with many
conversations at a time on many GPUs; tests/test_one_page.py compares the two, number by number.
Shapes: T tokens of one conversation, N of them supervised, V vocabulary.
"""

import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

CLASSES = {  # to train on your own classes, change these
    "gpt4": {"condition": "GPT4", "reward": 1.0},
    "gpt3.5": {"condition": "GPT3", "reward": 0.0},
}
BETA = 1 / math.log(10)  # rewards 1 and 0 then weigh 1 and 0.1
EPOCHS, CONVERSATIONS = 3, 16  # passes over the data, conversations per step


def train(
    llama, tokenizer, steps, classes=CLASSES, beta=BETA,
    lr=1e-5, min_lr_ratio=0.1, warmup_ratio=0.05,
    betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, clip=1.0,
):  # fmt: skip
    """Takes a step on each list of conversations in `steps`, and yields its numbers."""
    if tokenizer.eot >= llama.config.vocab_size:
        raise ValueError("the model has no row for <|end_of_turn|>, which train.py would add")
    best = max(c["reward"] for c in classes.values())
    peak, parameters = lr, list(llama.parameters())

    def weight_of(reward):
        return math.exp((reward - best) / beta)  # Eq. (6)

    optimizer = torch.optim.AdamW(parameters, peak, betas, eps, weight_decay)
    for step, conversations in enumerate(steps, start=1):
        laid_out = [lay_out(c, tokenizer, classes, weight_of) for c in conversations]
        total_weight = sum(sum(weights) for _, weights in laid_out)
        loss = 0.0  # L and its gradient are sums: one conversation at a time
        for tokens, weights in laid_out:
            losses, _, weights = cross_entropy(llama, tokens, weights)
            part = (weights * losses).sum() / total_weight
            part.backward()
            loss += part.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
        lr = learning_rate(step, len(steps), peak, min_lr_ratio, warmup_ratio)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        yield {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm}


def lay_out(conversation, tokenizer, classes, weight_of):
    """(tokens, weights), lists of T: <s>, then every turn: prefix, content, <|end_of_turn|>.

    The assistant's content and its end of turn have weight: that of the reward, the conversation's
    own or its class's, times the "weight" of the conversation and of the message, 1 if not given.
    """
    source = classes[conversation["class"]]
    w = weight_of(conversation.get("reward", source["reward"])) * conversation.get("weight", 1)
    tokens, weights = [tokenizer.bos], [0.0]
    for message in conversation["messages"]:
        role = message["role"]
        weight = w * message.get("weight", 1) if role == "assistant" else 0.0
        prefix = f"{source['condition']} {role.title()}:".strip()
        # Each text is encoded separately, so that no content can forge a turn.
        prefix = tokenizer.encode("" if role == "system" else prefix)
        content = tokenizer.encode(tokenizer.turn_text(role, message["content"]))
        tokens += prefix + content + [tokenizer.eot]
        weights += [0.0] * len(prefix) + [weight] * (len(content) + 1)
    return tokens, weights


def cross_entropy(llama, tokens, weights):
    """Of the supervised tokens: CE (N,), was each the likeliest (N,), weights (N,)."""
    tokens, weights = torch.tensor(tokens), torch.tensor(weights)
    T = len(tokens)
    logits = llama(tokens, torch.arange(T), cu_seqlens=torch.tensor([0, T]))  # (T, V)
    logits, targets, weights = logits[:-1], tokens[1:], weights[1:]  # t predicts t + 1
    log_p = logits - logits.logsumexp(dim=1, keepdim=True)
    losses = -log_p.gather(1, targets[:, None])[:, 0]
    rows = weights != 0
    return losses[rows], (logits.argmax(1) == targets)[rows], weights[rows]


def learning_rate(step, total, peak, min_lr_ratio, warmup_ratio):
    """Linear up to `peak`, then a cosine down to min_lr_ratio · peak; steps count from 1."""
    warmup = math.ceil(warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * cosine)


@torch.no_grad()
def evaluate(llama, tokenizer, conversations, classes=CLASSES):
    """{class: its supervised tokens, their mean CE and accuracy}; rewards play no part here."""
    table = {}
    for name in dict.fromkeys(c["class"] for c in conversations):
        of_class = [c for c in conversations if c["class"] == name]
        laid_out = [lay_out(c, tokenizer, classes, lambda reward: 1.0) for c in of_class]
        outcomes = [cross_entropy(llama, tokens, weights) for tokens, weights in laid_out]
        losses, correct, _ = (torch.cat(parts).double() for parts in zip(*outcomes))
        means = {"loss": losses.mean().item(), "accuracy": correct.mean().item()}
        table[name] = {"tokens": len(losses)} | means
    return table


def main():
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/one_page.py MODEL_DIR data.jsonl OUT")
    folder, file, out = sys.argv[1:]
    tokenizer, trained = data.Tokenizer(folder), model.has_weights(folder)
    if trained:
        llama = model.load(folder, "cpu", torch.float32)
    else:
        llama = model.Llama(model.LlamaConfig.from_folder(folder))
        model.random_parameters(llama, seed=0)
    rng = random.Random(0)
    with open(file, encoding="utf-8") as lines:
        conversations = [json.loads(line) for line in lines]
    rng.shuffle(conversations)
    held_out = [conversations.pop() for _ in range(len(conversations) // 20)]
    steps = []
    for _ in range(EPOCHS):
        rng.shuffle(conversations)
        starts = range(0, len(conversations), CONVERSATIONS)
        steps += [conversations[i : i + CONVERSATIONS] for i in starts]
    for numbers in train(llama, tokenizer, steps, lr=1e-5 if trained else 3e-3):
        print(numbers, flush=True)
    print("held out:", evaluate(llama, tokenizer, held_out))
    model.save(llama, out)


if __name__ == "__main__":
    main()
