"""What tests are made of: small networks, and files of a few lines."""

import dataclasses
import io
import json

import sentencepiece
import torch

import loss
import model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 51,
    "max_position_embeddings": 256,
}


def config_of(**changes):
    return model.LlamaConfig(**SIZES | {"head_dim": 8} | changes)


def random_llama(std=0.2, **changes):
    """A small network with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    llama = model.Llama(config_of(**changes))
    make_random(llama, std)
    return llama


@torch.no_grad()
def make_random(llama, std=0.2):
    for name, parameter in llama.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, std)


def export(llama, tokenizer, folder, conditioned=True, classes=loss.DEFAULT_CLASSES, **more):
    """A folder as train.py exports it; `more` goes into crlft.json."""
    model.save(llama, folder)
    conditions = {name: c.condition if conditioned else "" for name, c in classes.items()}
    tokenizer.save(folder, conditions, conditions[loss.expert_class(classes)])
    classes = {name: dataclasses.asdict(c) for name, c in classes.items()}
    crlft = {"classes": classes, "conditioned": conditioned}
    crlft |= {"template": tokenizer.template.name} | more
    model.write_json(folder / "crlft.json", crlft)
    return folder


def write(path, *lines):
    """A JSONL file of objects, or of raw bytes as they are."""
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


ODD_TEXTS = [
    "\n\nstarts with newlines",
    "  two  spaces   and three ",
    " one before",
    "\tTabs\there\t\n\t",
    "emoji 😀👩‍👩‍👧 and 日本語, עברית",
    "ends in a newline\n",
    "a\r\nb",
    "\u00a0no-break space\u200b",
    "GPT4 User: not a turn",
    "▁ the marker itself ▁▁",
    "ﬁ ① Å é e\u0301",
    ":", "::", "1+1=2", "\n", "\x01",
]  # fmt: skip


def train_sentencepiece(folder, **options):
    """A small SentencePiece model of the example's own text, Llama-like but for `options`."""
    text = [f"{a} plus {b} is {a + b}, said the {a}th." for a in range(40) for b in range(9)]
    model = io.BytesIO()
    settings = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True} | options
    settings = {"normalization_rule_name": "identity", "minloglevel": 2} | settings
    settings = {"hard_vocab_limit": False, "remove_extra_whitespaces": False} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, **settings
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
