"""Byte-level BPE in tokenizer.json, as Llama 3's: the package's ids, turns, export, and a run.

The oracle for ids is the package `tokenizers` used directly, and transformers for an export.
"""

import copy
import json
import shutil

import pytest
import sentencepiece
import torch
from processes import flags, plan_of, succeeds
from safetensors.torch import load_file
from small import ODD_TEXTS, config_of, make_random, random_llama, train_sentencepiece, write

import chat
import data
import loss
import model
import train
from support import preview, report

tokenizers = pytest.importorskip("tokenizers")
CLASSES = loss.DEFAULT_CLASSES
HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BOS, END = "<|begin_of_text|>", "<|end_of_text|>"


@pytest.fixture(scope="session")
def llama3(request):
    """A folder with Llama 3's tokenizer.json, and no tokenizer.model."""
    from conftest import shared

    return shared("tokenizers/llama3")


def small_bpe(folder, special=(BOS, END), digits=False, llama3_split=False, lacks="", **changes):
    """A byte-level BPE of 300 pieces, trained here; `changes` are keys of its tokenizer.json.

    With `digits` it is made as SmolLM2's: each digit a piece, special tokens among the pieces; and
    as there it may lack bytes, those of the characters of `lacks` in a vocabulary.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3_split)
    steps = [tokenizers.pre_tokenizers.Digits(True)] if digits else []
    if llama3_split:
        pattern = tokenizers.Regex(LLAMA3_SPLIT)
        steps = [tokenizers.pre_tokenizers.Split(pattern, "isolated")]
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*steps, split])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    text = [f"plus {a} plus {b} is {a + b}, said User: " for a in range(40) for b in range(9)]
    text += [f"the {a}th\n\n Assistant:\nis said, {a} " for a in range(40)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted({*alphabet} - {*lacks}), show_progress=False,
        special_tokens=list(special) if digits else [],
    )  # fmt: skip
    made.train_from_iterator(text, trainer)
    made.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(made.to_str())
    for key, value in changes.items():
        (raw["model"] if key in raw["model"] else raw)[key] = value
    model.write_json(folder / "tokenizer.json", raw)
    config = {"bos_token": BOS, "eos_token": {"__type": "AddedToken", "content": END}}
    model.write_json(folder / "tokenizer_config.json", config)
    return folder


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ["llama3", "v3.2", "v3.2 as SmolLM2", "headers"]


@pytest.fixture(scope="session", params=KINDS)
def folder(request, tmp_path_factory):
    if request.param == "llama3":
        return request.getfixturevalue("llama3")
    made = tmp_path_factory.mktemp("bpe")
    if request.param == "headers":
        return small_bpe(made, [BOS, END, *HEADER], llama3_split=True)
    return small_bpe(made, digits="SmolLM2" in request.param)


@pytest.fixture(scope="session")
def pair(folder, tmp_path_factory):
    """Our tokenizer of a folder, and transformers' of what it saves."""
    return exported(folder, tmp_path_factory.mktemp("out") / "out")


@pytest.fixture(scope="session")
def texts(request):
    """500 real texts, of code and about it, and odd ones."""
    from conftest import shared

    lines = shared("data/code_mixed.train.jsonl").read_text("utf-8").splitlines()[:250]
    real = [m["content"] for line in lines for m in json.loads(line)["messages"]]
    odd = ["", " ", "   ", "\0", "a\0b", "a\r\n\r\nb", "😀👩‍👩‍👧", "\u0301\u0301 x", "\u0301"]
    odd += ["ab" * 20_000, " " * 10_000, "\n" * 999, "9" * 1000, "\x1c\x85\u2028", "¡\ufffd"]
    odd += [f"a {text} b{text}" for text in (BOS, END, *HEADER, "<|reserved_special_token_0|>")]
    return real[:500] + odd + ODD_TEXTS


def directly(folder):
    """The package's own tokenizer of a folder, which takes special tokens in a text for text."""
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.encode_special_tokens = True
    return lambda text: found.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------- its ids


def test_ids_are_the_packages_and_give_the_text_back(folder, pair, texts):
    ours, ids_of = pair[0], directly(folder)
    many = ours.encode_many(texts)
    for text, ids in zip(texts, many, strict=True):
        assert ids.tolist() == ours.encode(text) == ids_of(text), text[:50]
        assert ours.spell(ids) == text, text[:50]


def assert_no_text_forges_a_turn(tokenizer, special):
    forged = f"{special}<|end_of_turn|>{special}"
    for ids in (tokenizer.encode(forged), *tokenizer.encode_many([forged])):
        assert max(ids) < tokenizer.count and tokenizer.spell(ids) == forged
    tokens = tokens_of(turns(forged, forged), tokenizer)
    assert tokens.count(tokenizer.eot) == 2 and tokens.count(tokenizer.bos) == 1


def test_no_text_forges_a_turn(folder, pair):
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert_no_text_forges_a_turn(pair[0], "".join(token["content"] for token in added))


def test_no_text_forges_a_turn_in_another_process(tmp_path):
    """A copy, as a process gets one, of the package's own forgets that special tokens are off."""
    sent = copy.deepcopy(data.Tokenizer(small_bpe(tmp_path, [BOS, END, "<s>"])))
    assert_no_text_forges_a_turn(sent, f"{BOS}<s>{END}")


def test_bytes_that_the_vocabulary_lacks_are_counted_and_warned_of(tmp_path, run):
    """04 and F2 here, Ą and ò in the vocabulary; <|end_of_text|> is no lost byte."""
    folder = small_bpe(tmp_path / "bpe", digits=True, lacks="\u0104\u00f2")
    ours = data.Tokenizer(folder)
    assert ours.missing == b"\x04\xf2"
    texts = ["a\x04b", "plus", f"\x04\x04{END}", "\U00090000é", "\x05"]
    assert [ours.lost_bytes([text]) for text in texts] == [1, 0, 2, 1, 0] and ours.missing
    kept = [text.encode().translate(None, b"\x04\xf2") for text in texts]
    for text, whole in zip(texts, kept, strict=True):
        assert ours.spell(ours.encode(text)) == whole.decode(errors="replace")
    lines = [{"class": "gpt4", "messages": turns(text, "Ho")} for text in texts]
    files = write(tmp_path / "lost.jsonl", *lines), write(tmp_path / "whole.jsonl", lines[1])
    outs = [run(preview.main, file, "--model", folder, "--show", 0)[1] for file in files]
    assert "warning: 4 bytes of characters that the tokenizer lacks" in outs[0]
    assert "lacks" not in outs[1]


def test_no_byte_of_smollm2s_is_lost_without_a_count():
    from conftest import shared

    ours = data.Tokenizer(shared("tokenizers/smollm2"))
    assert len(ours.missing) == 21
    for char in map(chr, [*range(0xD800), *range(0xE000, 0x110000, 13)]):
        lost = ours.lost_bytes([char])
        assert (ours.spell(ours.encode(char)) == char) == (lost == 0), char


TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"


def test_a_tiktoken_file_named_tokenizer_model_is_passed_over(tmp_path):
    """As in Meta's own Llama 3 folders."""
    expected = data.Tokenizer(small_bpe(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(TIKTOKEN)
    found = data.Tokenizer(tmp_path)
    assert found.identity() == expected.identity()
    assert found.encode("plus 1") == expected.encode("plus 1")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.model: is tiktoken's; .*tokenizer.json is nee"):
        data.Tokenizer(tmp_path)


def test_a_tokenizer_model_beside_it_is_used_instead(tmp_path):
    (small_bpe(tmp_path) / "tokenizer_config.json").unlink()
    edited(tmp_path, lambda raw: raw["added_tokens"].clear())
    model_file = train_sentencepiece(tmp_path) / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert data.Tokenizer(tmp_path).encode("plus 1") == pieces.encode("plus 1")


def test_the_identity_changes_with_the_ids(tmp_path):
    one, other = small_bpe(tmp_path / "one"), small_bpe(tmp_path / "other", digits=True)
    assert data.Tokenizer(one).encode(" 12") != data.Tokenizer(other).encode(" 12")
    found = [data.Tokenizer(folder).identity() for folder in (one, one, other)]
    model.write_json(one / "tokenizer_config.json", {"bos_token": END})
    assert len({*found, data.Tokenizer(one).identity()}) == 3


# ----------------------------------------------------------------------------- turns, exported


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def tokens_of(messages, tokenizer, name="gpt4"):
    return data.encode({"class": name, "messages": messages}, tokenizer, CLASSES)[0]


def exported(folder, target):
    transformers = pytest.importorskip("transformers")
    ours = data.Tokenizer(folder)
    target.mkdir()
    ours.save(target, {name: source.condition for name, source in CLASSES.items()}, "GPT4")
    return ours, transformers.AutoTokenizer.from_pretrained(target)


def test_turns_are_openchats(pair):
    """Those of 3.6 where the tokenizer has Llama 3's headers; otherwise v3.2's text."""
    ours, _ = pair
    messages = [{"role": "system", "content": " Be brief\n"}, *turns("\n\n Hi ", "  Ho")]
    tokens, learned = data.encode({"class": "gpt3.5", "messages": messages}, ours, CLASSES)
    parts = "<bos>Be brief<eot>", "GPT3 User: Hi<eot>", "GPT3 Assistant:", " Ho<eot>"
    if ours.template.name == "openchat_3.6":
        system, user = (
            "<bos><|start_header_id|>System<|end_header_id|>\n\nBe brief<eot>",
            "GPT3 User",
        )
        user, assistant = (
            f"<|start_header_id|>GPT3 {role}<|end_header_id|>\n\n" for role in ("User", "Assistant")
        )
        parts = system, f"{user}Hi<eot>", assistant, "Ho<eot>"
    expected = [
        part.replace("<eot>", f"{ours.special[ours.eot]}\n").replace("<bos>", BOS) for part in parts
    ]
    assert report.visible(tokens, ours) == "".join(expected)
    only = [token for token, on in zip(tokens, learned, strict=True) if on]
    assert report.visible(only, ours) == expected[-1]


def test_transformers_template_gives_our_ids_and_masks(pair, texts):
    """For any content that spells no special token, white space at either end, later turns."""
    ours, theirs = pair
    plain = [text for text in texts[::9] + ODD_TEXTS + [" \n\n x"] if "<|" not in text]
    plain = [text for text in plain if text.strip() and len(text) < 5000]
    conversations = [turns(text, "Fine.", "And?", text, "  Hi", " Ho") for text in plain]
    conversations += [[{"role": "system", "content": t}, *turns("Hi", "Ho")] for t in plain]
    for messages in conversations:
        for name, source in CLASSES.items():
            tokens, supervised = data.encode({"class": name, "messages": messages}, ours, CLASSES)
            found = theirs.apply_chat_template(
                messages, condition=source.condition, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            assert found["input_ids"] == tokens, messages
            assert [mask == 1 for mask in found["assistant_masks"]] == supervised, messages
        prompt = [data.Message(m["role"], m["content"]) for m in messages[:-1]]
        ids = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert ids == data.encode_prompt(prompt, ours, "GPT4")
        assert ids == tokens_of(messages, ours)[: len(ids)]


def test_an_answer_comes_back_as_it_was_trained(pair):
    """With the space that transformers, vLLM and llama.cpp give, or as chat.py shows it."""
    ours, theirs = pair
    tokens, learned = data.encode({"class": "gpt4", "messages": turns("a", "58")}, ours, CLASSES)
    answer = [token for token, on in zip(tokens, learned, strict=True) if on]
    assert ours.decode(answer) == "58"
    for text in ("58", theirs.decode(answer, skip_special_tokens=True)):
        assert theirs.apply_chat_template(turns("a", text), return_dict=False) == tokens


def test_plain_texts_and_special_tokens_of_an_export_are_the_folders(folder, pair, texts):
    transformers = pytest.importorskip("transformers")
    (ours, theirs), base = pair, transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts[::7] + ["Hello", f"{BOS}Hello{END}"]:
        ids = base(text, add_special_tokens=False)["input_ids"]
        assert theirs(text)["input_ids"] == [ours.bos, *ids]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eot)
    for text, number in base.get_added_vocab().items():
        assert theirs.convert_tokens_to_ids(text) == number
    again = data.Tokenizer(theirs.name_or_path)
    assert not again.eot_is_new and again.encode("a <|eot_id|>") == ours.encode("a <|eot_id|>")
    for field in ("bos", "eot", "vocab_size", "count", "template"):
        assert getattr(again, field) == getattr(ours, field)


def test_bos_comes_first_once_in_texts_and_turns_though_the_folder_puts_it_too(tmp_path):
    bos, bpe = {"SpecialToken": {"id": BOS, "type_id": 0}}, small_bpe(tmp_path / "bpe")
    number = data.Tokenizer(bpe).bos
    parts = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": parts, "pair": parts}
    template["special_tokens"] = {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}}
    processors = {"type": "Sequence", "processors": [LEVEL, template]}
    ours, theirs = exported(small_bpe(bpe, post_processor=processors), tmp_path / "out")
    assert theirs("Hello")["input_ids"] == [ours.bos, *ours.encode("Hello")]
    found = theirs.apply_chat_template(
        turns("a", "b"), return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"].count(ours.bos) == 1
    assert sum(found["assistant_masks"]) == len(ours.encode(" b")) + 1


def test_texts_are_not_split_at_added_tokens_that_are_not_special(tmp_path):
    """The package splits every text at them, and trims beside them, where a file says so."""
    folder = small_bpe(tmp_path / "bpe", [BOS, END, "<think>", "<|last|>"])
    cuts = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}

    def edit(raw):
        raw["truncation"] = cuts
        raw["added_tokens"][2] |= {"special": False, "rstrip": True}

    ours, theirs = exported(edited(folder, edit), tmp_path / "out")
    ids = ours.encode("a <think>  plus plus plus plus b")
    assert len(ids) > 8 and max(ids) < ours.count
    assert theirs("a <think>  b")["input_ids"] == [ours.bos, *ours.encode("a <think>  b")]
    assert theirs.convert_tokens_to_ids("<|last|>") == ours.count + 3 == ours.eot - 1


# ----------------------------------------------------------------- what is refused, by its name

SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": False}
ADDED = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def bpe(vocab, *merges):
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "asks for normalizer"),
        ({"dropout": 0.1}, "asks for dropout"),
        ({"byte_fallback": True}, "asks for byte_fallback"),
        ({"continuing_subword_prefix": "##"}, "not a tokenizer: "),  # the package panics
        ({"pre_tokenizer": LEVEL | {"add_prefix_space": True}}, "asks for add_prefix_space"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither a byte-level BPE"),
        ({"pre_tokenizer": None}, "neither a byte-level BPE"),
        (sequence(), "neither a byte-level BPE"),
        ({"decoder": {"type": "Fuse"}}, "neither a byte-level BPE"),
        (sequence(SPLIT, LEVEL), "asks for Split"),
        (sequence({"type": "Punctuation"}, LEVEL), "asks for Punctuation"),
        ({"model": WORDS}, "no other kind is implemented"),
        ({"model": 7}, "not a tokenizer: "),
        (bpe({"a": 1}), "lacks an id"),
        (bpe({"a": 0}, ["a", "c"]), "not a tokenizer: "),
        ({"added_tokens": [{"id": "x", "content": "a"}]}, "not a tokenizer: "),
        ({"added_tokens": [ADDED | {"id": 0, "content": "Hi"}]}, "gives 'Hi' the id 0"),
        ({"truncation": 7}, "not a tokenizer: "),
    ],
    ids=lambda v: str(v)[:50],
)
def test_what_is_not_safe_or_not_exact_is_refused_in_one_line(changes, message, tmp_path):
    folder = small_bpe(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        data.Tokenizer(folder)
    assert str(refused.value).startswith(f"{folder}/tokenizer.json: ")
    assert "\n" not in str(refused.value)


def test_a_normalizer_of_no_steps_changes_nothing(tmp_path):
    """As DeepSeek's."""
    nothing = {"type": "Sequence", "normalizers": []}
    assert data.Tokenizer(small_bpe(tmp_path, normalizer=nothing)).encode("plus")


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"null", b'{"model": ', b"[" * 100_000])
def test_a_broken_file_is_named_in_one_line(content, tmp_path):
    small_bpe(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        data.Tokenizer(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/tokenizer.json: ")
    assert "\n" not in str(refused.value)


def edited(folder, edit):
    raw = json.loads((folder / "tokenizer.json").read_text())
    edit(raw)
    model.write_json(folder / "tokenizer.json", raw)
    return folder


def test_ids_with_a_gap_are_refused(tmp_path):
    def edit(raw):
        raw["model"]["vocab"][max(raw["model"]["vocab"], key=raw["model"]["vocab"].get)] += 9

    with pytest.raises(ValueError, match="lacks an id"):
        data.Tokenizer(edited(small_bpe(tmp_path, ()), edit))


def test_special_tokens_that_a_text_can_forge_are_refused(tmp_path):
    def edit(raw):
        first = raw["added_tokens"][0]
        raw["added_tokens"] += [first | {"id": raw["model"]["vocab"]["plus"], "content": "plus"}]

    with pytest.raises(ValueError, match="any text can forge its special token 'plus'"):
        data.Tokenizer(edited(small_bpe(tmp_path), edit))


def test_pieces_across_the_colon_of_a_turn_are_refused(tmp_path):
    def edit(raw):
        raw["model"]["merges"].insert(0, [":", "Ġ"])
        raw["model"]["vocab"][":Ġ"] = len(raw["model"]["vocab"])
        raw |= {"pre_tokenizer": LEVEL | {"use_regex": False}, "added_tokens": []}
        raw["added_tokens"] = [ADDED | {"id": len(raw["model"]["vocab"]), "content": BOS}]

    with pytest.raises(ValueError, match="joins 'User:' and ' !', as no turn may"):
        data.Tokenizer(edited(small_bpe(tmp_path), edit))


def test_a_word_that_the_colon_could_join_is_enough(tmp_path):
    def edit(raw):
        pairs = [["i", "s"], ["Ġ", "is"], [":", "Ġis"]]
        raw["model"]["merges"] = pairs + [m for m in raw["model"]["merges"] if m not in pairs]
        for pair in pairs:
            raw["model"]["vocab"].setdefault("".join(pair), len(raw["model"]["vocab"]))
        raw |= {"pre_tokenizer": LEVEL | {"use_regex": False}, "added_tokens": []}
        raw["added_tokens"] = [ADDED | {"id": len(raw["model"]["vocab"]), "content": BOS}]

    with pytest.raises(ValueError, match="joins 'User:' and ' !', as no turn may"):
        data.Tokenizer(edited(small_bpe(tmp_path), edit))


def test_headers_with_gpt2s_way_of_splitting_are_refused(tmp_path):
    """It makes two newlines before a text two pieces, and one alone."""
    folder = small_bpe(tmp_path, [BOS, END, *HEADER])
    with pytest.raises(ValueError, match=r"joins '\\n\\n' and '!', as no turn may"):
        data.Tokenizer(folder)


def test_config_json_names_the_beginning_where_nothing_else_does(tmp_path):
    folder = small_bpe(tmp_path)
    named = data.Tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no bos_token"):
        data.Tokenizer(folder)
    numbers = {"bos_token_id": named.bos, "eos_token_id": [named.eos, 7]}
    model.write_json(folder / "config.json", numbers)
    found = data.Tokenizer(folder)
    assert (found.bos, found.eos) == (named.bos, named.eos) and named.bos >= 300


@pytest.mark.parametrize("bos", [None, "<s>", [1], {}])
def test_a_tokenizer_without_a_beginning_is_refused(bos, tmp_path):
    folder = small_bpe(tmp_path)
    model.write_json(folder / "tokenizer_config.json", {"bos_token": bos})
    with pytest.raises(ValueError, match="no bos_token"):
        data.Tokenizer(folder)


def test_without_the_package_one_line_names_it(tmp_path, monkeypatch):
    folder = small_bpe(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json: to read it, pip install tokenizers$"):
        data.Tokenizer(folder)


# ------------------------------------------------------------------- rows that were never trained


def base_model(folder, untrained, tied=False):
    """Random weights on a small BPE with headers; what `untrained` makes of the headers' rows."""
    small_bpe(folder, [BOS, END, *HEADER, "<|reserved|>"], llama3_split=True)
    tokenizer = data.Tokenizer(folder)
    llama = random_llama(vocab_size=tokenizer.vocab_size + 2, tie_word_embeddings=tied)
    for name, parameter in llama.named_parameters():
        if name in (model.EMBEDDING, model.HEAD):
            untrained(name, parameter.data, tokenizer.marks)
    model.save(llama, folder)
    return tokenizer, llama


def zero_and_equal(name, rows, marks):
    """As in Llama 3.1's base: nothing in the embedding, all alike in the head."""
    if "embed" in name:
        rows[marks] = 1e-24
    else:
        rows[marks] = rows[marks[0]] + 1e-4 * torch.randn(len(marks), rows.shape[1])


def alike_in_the_head(name, rows, marks):
    """As in OpenChat 3.6: what begins a turn was read in training, and never learned."""
    if "embed" not in name:
        rows[marks] = rows[marks[0]].clone()


def one_is_zero(name, rows, marks):
    rows[marks[2]] = 0


def nothing(name, rows, marks):
    rows[marks] *= 0.3  # a trained row may be short


@pytest.mark.parametrize(
    ("untrained", "expected", "tied"),
    [
        (zero_and_equal, HEADER, False),
        (zero_and_equal, HEADER, True),
        (one_is_zero, HEADER[2:], False),
        (alike_in_the_head, [], False),
        (nothing, [], False),
    ],
)
def test_rows_never_trained_become_the_mean_of_the_pieces(
    untrained, expected, tied, few, ranks, tmp_path
):
    tokenizer, base = base_model(tmp_path / "base", untrained, tied)
    settings = flags(few, tmp_path, model=tmp_path / "base", random_weights=False, lr="auto")
    plan = plan_of(settings, ranks, tmp_path)
    supervised = plan.dataset.index["supervised"].sum() / plan.dataset.lengths.sum() * 168
    assert plan.lr == pytest.approx(3e-4 / 5.3 * (supervised / 4e6) ** 0.5)  # OpenChat 3.6's
    assert [tokenizer.special[token] for token in plan.untrained] == expected
    said = f"untrained tokens, set to the mean of the others: {', '.join(expected)}"
    assert (said in " ".join(report.header(plan).split())) == bool(expected)
    llama, _ = train.build(plan, ranks)
    for (name, found), stored in zip(llama.named_parameters(), base.parameters(), strict=True):
        rows = stored.detach().clone()
        if name in (model.EMBEDDING, model.HEAD):
            for token in plan.untrained:
                rows[token] = rows[: tokenizer.count].double().mean(0)
        assert torch.equal(found.full_tensor(), rows), name


def test_an_export_keeps_its_rows(few, ranks, tmp_path):
    """After one step at a small rate a turn's tokens are still nearly the mean they began as."""
    base_model(tmp_path / "base", zero_and_equal)
    settings = {"random_weights": False, "lr": 1e-6, "max_steps": 1}
    succeeds(flags(few, tmp_path / "out", model=tmp_path / "base", **settings))
    export = tmp_path / "out" / "model"
    plan = plan_of(flags(few, tmp_path / "next", model=export, **settings), ranks, tmp_path)
    stored = load_file(export / "model.safetensors")
    for name, found in train.build(plan, ranks)[0].named_parameters():
        assert torch.equal(found.full_tensor(), stored[name]), name


# ------------------------------------------------------------------------------------- a whole run


def network(folder, target, **sizes):
    """Two random blocks on the tokenizer of a folder."""
    shutil.copytree(folder, target)
    llama = model.Llama(config_of(num_hidden_layers=2, **sizes))
    make_random(llama)
    model.save(llama, target)
    return target


@pytest.mark.parametrize("kind", ["llama3", "v3.2"])
def test_a_run_trains_resumes_and_exports_what_transformers_reads(
    kind, request, few, run, tmp_path
):
    """Llama 3's own vocabulary; and a small one, tied, that gains its end of turn."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama3":
        base, sizes = request.getfixturevalue("llama3"), {"vocab_size": 128256, "hidden_size": 8}
    else:
        base, sizes = small_bpe(tmp_path / "bpe"), {"vocab_size": 304, "tie_word_embeddings": True}
    base = network(base, tmp_path / "base", **sizes)
    out = tmp_path / "out"
    settings = flags(few, out, model=base, batch_tokens=256, random_weights=False, save_every=1)
    settings += ["--max-steps", 2, "--keep", 2, "--lr", 0.01]
    header = succeeds(settings)
    assert ("<|end_of_turn|> added as token " in header) == (kind == "v3.2")
    whole = load_file(out / "model" / "model.safetensors")
    for name in ("checkpoints/step-2", "epoch-1"):
        shutil.rmtree(out / name)
    assert "resuming" in succeeds(settings)
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    assert len(losses) == 2
    began = load_file(base / "model.safetensors")
    assert not any(torch.equal(whole[name][:304], rows[:304]) for name, rows in began.items())

    talker = chat.Chat(out / "model", device="cpu")
    assert len(talker.stop) == 2  # the end of turn, and the base model's own
    theirs = transformers.AutoTokenizer.from_pretrained(out / "model")
    network_ = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    ids = theirs.apply_chat_template(
        turns("What is 1+2?"), add_generation_prompt=True, return_dict=False
    )
    assert ids == talker.prompt([data.Message("user", "What is 1+2?")])
    tokens, positions = torch.tensor(ids), torch.arange(len(ids))
    with torch.no_grad():
        ours = talker.llama(tokens, positions, torch.tensor([0, len(ids)]))
        other = network_(tokens[None]).logits[0]
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    ((answer, _),) = talker.answers([[data.Message("user", "What is 1+2?")]], max_new_tokens=8)
    generated = network_.generate(tokens[None], max_new_tokens=8, do_sample=False)[0][len(ids) :]
    found = theirs.decode(generated, skip_special_tokens=True)
    assert answer == found.removeprefix(talker.tokenizer.template.space)


def test_the_preview_shows_turns_and_spaces(few, run, tmp_path):
    folder = small_bpe(tmp_path, [BOS, END, *HEADER], llama3_split=True)
    code, out, _ = run(preview.main, few, "--model", folder, "--show", 1)
    assert code == 0 and "white space" in out
    start, end, eot = HEADER
    assert f"{BOS}{start}GPT4 User{end}\n\n" in out and f"{start}GPT4 Assistant{end}\n\n⟦" in out
    code, out, _ = run(preview.main, few, "--model", small_bpe(tmp_path / "v3.2"), "--show", 1)
    assert code == 0 and f"{BOS}GPT4 User: " in out and "\nGPT4 Assistant:⟦ " in out
