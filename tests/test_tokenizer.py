"""support/tokenizer.py: transformers gives training's ids from an export, or there is none."""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import sentencepiece
import torch
from processes import flags, plan_of, succeeds
from small import ODD_TEXTS, export, random_llama, train_sentencepiece

import chat
import data
import loss
import model
import train
from support import tokenizer as support_tokenizer

CLASSES = loss.DEFAULT_CLASSES
EOT = support_tokenizer.END_OF_TURN


@pytest.fixture(scope="session")
def tokenizer(stories):
    return data.Tokenizer(stories)


@pytest.fixture(scope="session")
def code_mixed_eval(code_mixed):
    """Real conversations that no model was trained on."""
    lines = code_mixed.with_name("code_mixed.eval.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


# ------------------------------------------------------------------------ the same ids and masks


CONDITIONS = {name: source.condition for name, source in CLASSES.items()}


def exported(folder, target, conditions=CONDITIONS, default="GPT4"):
    """Our tokenizer of a folder, and transformers' of what it saves."""
    transformers = pytest.importorskip("transformers")
    tokenizer = data.Tokenizer(folder)
    target.mkdir()
    tokenizer.save(target, conditions, default)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(target)


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def assert_template_gives_our_ids(ours, theirs, conversations):
    """And marks what is learned; each conversation ends with an answer."""
    for messages in conversations:
        for name, source_class in CLASSES.items():
            line = {"class": name, "messages": messages}
            tokens, supervised = data.encode(line, ours, CLASSES)
            found = theirs.apply_chat_template(
                messages,
                condition=source_class.condition,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            ids = found["input_ids"]
            assert ids == tokens, (messages, theirs.convert_ids_to_tokens(ids))
            assert [mask == 1 for mask in found["assistant_masks"]] == supervised, messages
        ids = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        prompt = [data.Message(m["role"], m["content"]) for m in messages[:-1]]
        assert ids == data.encode_prompt(prompt, ours, "GPT4")


@pytest.mark.parametrize("name", ["llama2", "stories", "sums"])
def test_transformers_template_gives_our_ids_and_masks(name, request, tmp_path, code_mixed_eval):
    ours, theirs = exported(request.getfixturevalue(name), tmp_path / "out")
    texts = [text for text in ODD_TEXTS if text.strip()]
    odd = [turns(text, "Fine.", text, text.lstrip(" ")) for text in texts]
    odd += [[{"role": "system", "content": text}, *turns("Hi", "Ho")] for text in texts]
    assert_template_gives_our_ids(ours, theirs, code_mixed_eval[::5] + odd)


def test_all_held_out_conversations_have_our_ids_in_llama2s_template(
    llama2, tmp_path, code_mixed_eval
):
    """Masks too; and with answers as vLLM and llama.cpp return them, a space before each."""
    ours, theirs = exported(llama2, tmp_path / "out")
    assert len(code_mixed_eval) == 300
    for messages in code_mixed_eval:
        line = {"class": "gpt3.5", "messages": messages}
        expected = data.encode(line, ours, CLASSES)
        spaced = [
            m | {"content": " " * (m["role"] == "assistant") + m["content"]} for m in messages
        ]
        for as_given in (messages, spaced):
            found = theirs.apply_chat_template(
                as_given, condition="GPT3", return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = found["input_ids"], found["assistant_masks"]
            assert (ids, [learned == 1 for learned in mask]) == expected, as_given


@pytest.mark.parametrize("name", ["llama2", "stories"])
def test_an_answer_that_comes_back_with_its_space_has_trainings_ids(name, request, tmp_path):
    """vLLM and llama.cpp give ' 58' where transformers gives '58'."""
    ours, theirs = exported(request.getfixturevalue(name), tmp_path / "out")
    expected, _ = data.encode({"class": "gpt4", "messages": turns("a", "58")}, ours, CLASSES)
    for answer in ("58", " 58"):
        assert theirs.apply_chat_template(turns("a", answer), return_dict=False) == expected


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "58"}],
        [{"role": "User", "content": "58"}],
        [*turns("a", "b"), {"role": "system", "content": "58"}],
    ],
)
def test_the_template_refuses_roles_that_were_not_trained(messages, stories, tmp_path):
    _, theirs = exported(stories, tmp_path / "out")
    with pytest.raises(Exception, match="a message of role .* was never trained"):
        theirs.apply_chat_template(messages)


def test_a_plain_text_starts_once_with_bos_and_pads_on_the_left(llama2, tmp_path):
    ours, theirs = exported(llama2, tmp_path / "out")
    assert theirs("Hello")["input_ids"] == [ours.bos, *ours.encode("Hello")]
    two = theirs(["Hello", "Hello you"], padding=True)
    assert two["input_ids"][0] == [theirs.unk_token_id, ours.bos, *ours.encode("Hello")]
    assert two["attention_mask"][0] == [0, 1, 1]
    ids = theirs.apply_chat_template(turns("Hello"), return_dict=False)
    assert ids.count(ours.bos) == 1


def test_transformers_special_tokens_are_ours(stories, tmp_path):
    ours, theirs = exported(stories, tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eot)
    assert theirs.convert_tokens_to_ids(EOT) == ours.eot == 512 == len(theirs) - 1


@pytest.mark.parametrize("name", ["llama2", "stories", "sums"])
def test_a_saved_tokenizer_reads_back_as_itself(name, request, tmp_path):
    ours = data.Tokenizer(request.getfixturevalue(name))
    ours.save(tmp_path, CONDITIONS, "GPT4")
    again = data.Tokenizer(tmp_path)
    for field in ("bos", "eos", "eot", "vocab_size"):
        assert getattr(again, field) == getattr(ours, field)


@pytest.mark.parametrize("condition", ["", "Math Correct", 'it\'s "so" \\ {{ 1 }} {% x %} 😀'])
def test_the_template_holds_any_condition(condition, stories, tmp_path):
    ours, theirs = exported(stories, tmp_path / "out", {"a class": condition}, condition)
    ids = theirs.apply_chat_template(turns("Hi"), add_generation_prompt=True, return_dict=False)
    assert ids == data.encode_prompt([data.Message("user", "Hi")], ours, condition)


@pytest.mark.parametrize("name", ["llama2", "stories"])
def test_transformers_decodes_what_we_decode(name, request, tmp_path):
    ours, theirs = exported(request.getfixturevalue(name), tmp_path / "out")
    for text in ODD_TEXTS:
        if "▁" not in text:
            ids = [*ours.encode(text), ours.eot]
            assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
            assert name == "stories" or ours.decode(ids) == text  # stories' joins spaces


# ---------------------------------------------------------- what the template takes, and refuses


def small_bytes(folder, special=()):
    from test_llama3 import BOS, END, small_bpe

    return small_bpe(folder, [BOS, END, *special], llama3_split=bool(special))


def headers(folder):
    return small_bytes(folder, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])


def with_symbols(folder):
    return train_sentencepiece(folder, user_defined_symbols=["<think>", "plus"])


def joins_spaces(folder):
    return train_sentencepiece(folder, remove_extra_whitespaces=True)


MADE = [train_sentencepiece, with_symbols, joins_spaces, small_bytes, headers]


@pytest.fixture(params=[*MADE, "llama2"], ids=lambda kind: getattr(kind, "__name__", kind))
def any_export(request, tmp_path):
    """Our tokenizer of each kind, and transformers' of what it saves."""
    if request.param == "llama2":
        return exported(request.getfixturevalue("llama2"), tmp_path / "out")
    return exported(request.param(tmp_path / "model"), tmp_path / "out")


SPACES = [" ", "  ", "    ", "\n", "\t", "\r", "\x1c", "\u0085", "\u00a0", "\u2003", "\u3000"]


def drawn_content(rng, word="so"):
    """A text with odd spaces, blank but for `word`, or parts of it in each form that is read."""
    words = ["plus 1", "▁x", "▁▁", "习", "", ":", " \n so", *SPACES] if word else SPACES
    parts = rng.choices(words, k=4)
    parts.insert(rng.randrange(5), word)
    if rng.random() < 0.4:
        return "".join(parts)
    kinds = [{"type": "text"}, {"type": "input_text"}, {"type": "output_text"}, {}]
    return [part if rng.random() < 0.3 else rng.choice(kinds) | {"text": part} for part in parts]


def test_any_message_that_training_reads_has_its_ids_and_mask_in_the_template(any_export):
    """Messages, parts, spaces at the start of an answer, classes and conditions are drawn."""
    ours, theirs = any_export
    rng = random.Random(0)
    for _ in range(150):
        messages = turns(*(drawn_content(rng) for _ in range(rng.choice([2, 4]))))
        if rng.random() < 0.5:
            content = drawn_content(rng, rng.choice(["so", ""]))  # of a blank one is no turn
            messages.insert(0, {"role": "system", "content": content})
        name = rng.choice(["gpt4", "gpt3.5"])
        asked = [{"condition": {"gpt4": "GPT4", "gpt3.5": "GPT3"}[name]}, {"condition": name}]
        asked += [{}, {"condition": None}] * (name == "gpt4")
        found = theirs.apply_chat_template(
            messages, **rng.choice(asked), return_dict=True, return_assistant_tokens_mask=True
        )
        expected = data.encode({"class": name, "messages": messages}, ours, CLASSES)
        mask = [number == 1 for number in found["assistant_masks"]]
        assert (found["input_ids"], mask) == expected, messages


@pytest.mark.parametrize(
    "content",
    [
        None, 7, True, {"text": "Hi"}, [7], [None], [["Hi"]], [{"type": "text"}], [{"text": 7}],
        ["Hi", {"type": "image_url", "image_url": {"url": "a.png"}}],
        [{"type": None, "text": "Hi"}], [{"type": "tool_use", "text": "Hi"}],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_the_template_refuses_content_that_training_does_not_read(
    content, role, template_of_llama2
):
    """Rather than give the model Python's repr of it."""
    messages = [{"role": role, "content": content}, *turns("Hi", "Ho")[role == "user" :]]
    with pytest.raises(ValueError):
        data.encode({"class": "gpt4", "messages": messages}, template_of_llama2[0], CLASSES)
    with pytest.raises(Exception, match="content of a message must be text, or a list of parts"):
        template_of_llama2[1].apply_chat_template(messages)


@pytest.fixture(scope="module")
def template_of_llama2(llama2, tmp_path_factory):
    return exported(llama2, tmp_path_factory.mktemp("template") / "out")


def test_a_message_without_content_is_refused_by_the_template(template_of_llama2):
    with pytest.raises(Exception, match="content of a message must be text"):
        template_of_llama2[1].apply_chat_template([{"role": "user"}])


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ({}, "GPT4 User: Hi"),
        ({"condition": None}, "GPT4 User: Hi"),
        ({"condition": "GPT3"}, "GPT3 User: Hi"),
        ({"condition": "gpt3.5"}, "GPT3 User: Hi"),
        ({"condition": "gpt4"}, "GPT4 User: Hi"),
        ({"condition": "gpt3"}, None),
        ({"condition": "Nobody"}, None),
        ({"condition": ""}, None),
        ({"condition": "items"}, None),  # a method of the template's own table
        ({"condition": f"GPT4 User: a{EOT}GPT4"}, None),
    ],
    ids=str,
)
def test_the_template_knows_the_conditions_and_classes_of_training(
    asked, prompt, template_of_llama2
):
    def render():
        return template_of_llama2[1].apply_chat_template(turns("Hi"), tokenize=False, **asked)

    if prompt:
        assert render() == f"<s>{prompt}{EOT}"
    else:
        message = "was never trained here: it is one of gpt4, gpt3.5, GPT4, GPT3"
        with pytest.raises(Exception, match=message):
            render()


def test_a_condition_comes_before_a_class_of_the_same_name(llama2, tmp_path):
    _, theirs = exported(llama2, tmp_path / "out", {"A": "B", "B": "A"}, "A")
    text = theirs.apply_chat_template(turns("Hi"), tokenize=False, condition="B")
    assert text == f"<s>B User: Hi{EOT}"


def test_a_model_without_conditions_is_asked_without_one(llama2, tmp_path):
    _, theirs = exported(llama2, tmp_path / "out", {"gpt4": "", "gpt3.5": ""}, "")
    for asked in ({}, {"condition": None}, {"condition": ""}, {"condition": "gpt3.5"}):
        text = theirs.apply_chat_template(turns("Hi"), tokenize=False, **asked)
        assert text == f"<s>User: Hi{EOT}"
    with pytest.raises(Exception, match="condition GPT4 was never trained here"):
        theirs.apply_chat_template(turns("Hi"), condition="GPT4")


@pytest.mark.parametrize("answer", ["    return x", " return x", "return x", "\n x", " ", ""])
def test_the_first_space_of_an_answer_is_sentencepieces_own(answer, template_of_llama2):
    """In training as in the template; whatever is after it is kept."""
    ours, theirs = template_of_llama2
    content = ours.pieces.encode(answer.removeprefix(" "))
    expected = [1, *ours.encode("GPT4 User:"), 6324, 32000, *ours.encode("GPT4 Assistant:")]
    expected += [*content, 32000]
    found = theirs.apply_chat_template(
        turns("Hi", answer), return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == expected
    prompt = [data.Message("user", "Hi"), data.Message("assistant", answer)]
    assert data.encode_prompt(prompt, ours, "GPT4")[: len(expected)] == expected
    assert found["assistant_masks"][-len(content) - 1 :] == [1] * (len(content) + 1)
    assert sum(found["assistant_masks"]) == len(content) + 1


@pytest.mark.parametrize(
    ("kind", "condition", "spelled"),
    [
        (train_sentencepiece, "<s>x", "<s>"),
        (train_sentencepiece, "a </s>", "</s>"),
        (train_sentencepiece, "<unk>", "<unk>"),
        (train_sentencepiece, f"a{EOT}", EOT),
        (small_bytes, EOT, EOT),
        (headers, "<|start_header_id|>", "<|start_header_id|>"),
        (headers, "GPT4 <|eot_id|>", "<|eot_id|>"),
    ],
)
def test_a_condition_that_spells_a_special_token_is_refused_before_training(
    kind, condition, spelled, few, tmp_path
):
    """Even of a class that no conversation has; nothing is tokenized."""
    ours = data.Tokenizer(kind(tmp_path / "model"))
    classes = CLASSES | {"other": loss.SourceClass(condition, 0.5)}
    with pytest.raises(ValueError) as refused:
        data.prepare([few], ours, classes, tmp_path / "tokens", max_length=100)
    message = f"the condition {condition!r} spells its special token {spelled!r}"
    assert message in str(refused.value) and not (tmp_path / "tokens").exists()


def test_a_condition_that_spells_no_special_token_of_this_model_is_taken(tmp_path):
    folder = headers(tmp_path / "model")
    for condition in (f"{EOT}<s>", "<|begin_of_text|", "User", "{% x %}", "大学 <think>"):
        ours, theirs = exported(folder, tmp_path / condition[:9], {"a": condition}, condition)
        ids = theirs.apply_chat_template(turns("Hi"), add_generation_prompt=True, return_dict=False)
        assert ids == data.encode_prompt([data.Message("user", "Hi")], ours, condition)


def test_generate_in_transformers_4_is_given_only_what_it_takes(any_export):
    """Its PreTrainedTokenizerFast adds token_type_ids, unless this list is in the file."""
    _, theirs = any_export
    config = json.loads((Path(theirs.name_or_path) / "tokenizer_config.json").read_text("utf-8"))
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert [*theirs("Hi")] == ["input_ids", "attention_mask"]


# -------------------------------------------------------------- the same ids, or a clear refusal

TRAINED = [  # SentencePiece's options, and what is said of them (None: exported)
    ({}, None),
    ({"vocab_size": 800}, None),
    ({"remove_extra_whitespaces": True}, None),
    ({"byte_fallback": False}, None),
    ({"control_symbols": ["<pad>", "[INST]"]}, None),
    ({"allow_whitespace_only_pieces": True}, None),
    ({"model_type": "unigram"}, "is a unigram model"),
    ({"model_type": "char"}, "is a character model"),
    ({"normalization_rule_name": "nmt_nfkc"}, r"changes characters by its rules \(nmt_nfkc\)"),
    ({"normalization_rule_tsv": "own"}, "changes characters by its rules"),
    ({"add_dummy_prefix": False}, "add_dummy_prefix=false"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
    ({"split_by_whitespace": False}, "split_by_whitespace=false"),
    ({"user_defined_symbols": ["<think>", "<think>\n", "é", "plus"]}, None),
    ({"user_defined_symbols": ["<think>"], "remove_extra_whitespaces": True}, "several spaces one"),
    ({"user_defined_symbols": ["plus 1"]}, "never splits 'plus 1', which has a space"),
    ({"user_defined_symbols": ["x<|"]}, "never splits 'x<|', which has a space or ends as <|end"),
]


def random_texts(rng, count=60):
    """Words of the trained text, odd characters, spaces, and special tokens' look-alikes."""
    parts = ["plus", "1", "23", "said", "the", "th.", " ", "  ", "      ", "\n", "▁", "é", "习"]
    parts += [
        "大学",
        "😀",
        "<0x0A>",
        "<s",
        "|end_of_turn|>",
        "<think>",
        "<think>\n",
        "Ａ",
        "ﬁ",
        "ibuprofen",
        "ab",
    ]
    made = ["".join(rng.choices(parts, k=rng.randrange(1, 12))) for _ in range(count)]
    return [" " * n + "x" + " " * n for n in range(1, 40)] + made


def assert_texts_have_our_ids(ours, theirs, texts):
    """By themselves and in turns; by itself, a text with symbols gets no second space here."""
    for text in texts:
        if ours.symbols and text.startswith((" ", "▁", *ours.symbols)):
            continue
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text), (text, theirs.convert_ids_to_tokens(ids))
    plain = [text for text in texts if text.strip() and text[0] != " "]
    answers = [turns(text, text) for text in plain[::4]]
    assert_template_gives_our_ids(ours, theirs, answers)


@pytest.mark.parametrize(("options", "refusal"), TRAINED, ids=lambda v: str(v)[:45])
def test_a_trained_tokenizer_is_exported_exactly_or_refused(options, refusal, tmp_path):
    if "normalization_rule_tsv" in options:
        (tmp_path / "rule.tsv").write_text("FF21\t41\n")
        options = {
            "normalization_rule_tsv": str(tmp_path / "rule.tsv"),
            "normalization_rule_name": "",
        }
    folder = train_sentencepiece(tmp_path / "model", **options)
    if refusal:
        assert_is_refused(folder, refusal)
    else:
        ours, theirs = exported(folder, tmp_path / "out")
        assert_texts_have_our_ids(ours, theirs, random_texts(random.Random(0)))


def assert_is_refused(folder, message):
    with pytest.raises(ValueError, match=message) as refused:
        data.Tokenizer(folder)
    assert str(refused.value).startswith(f"{folder}/tokenizer.model: ")
    assert "the export would give other ids; " in str(refused.value)


def with_pieces(folder, target, pieces):
    """A tokenizer.model and more (text, score, type): protobuf appends what follows."""
    target.mkdir()
    model = (folder / "tokenizer.model").read_bytes()
    for text, score, kind in pieces:
        text = text.encode()
        piece = bytes([10, len(text)]) + text + b"\x15" + struct.pack("<f", score)
        piece += bytes([24, kind])
        model += bytes([10, len(piece)]) + piece
    (target / "tokenizer.model").write_bytes(model)
    return target


NORMAL = 1


@pytest.mark.parametrize(
    ("pieces", "refusal"),
    [
        ([("习", 0, 1), ("学习", 0, 1), ("大学", 0, 1)], "pieces of one score .*'大学' and '学习'"),
        ([("学习", 0, 1)], "has a piece '学习', but not each of its characters"),
        ([("<think>", 0, 4), ("▁x▁", 0, 4)], "never splits '▁x▁', which has a space"),
        ([("<SUF", 0, 4), ("<SUF>a", 0, 4), ("学学", 0, 4), ("大学", 0, 1)], None),
        ([("the▁list", 0, 1)], "has a piece 'the▁list' across a space"),
        ([("▁thelist", 0, 5)], "has a piece '▁thelist' that is not to be used"),
        ([("mypiece", 7.5, 1)], None),  # nothing reaches it, here nor there
        ([("大学", 5, 1), ("学生", 4, 1)], None),
        (
            [("大学", 0, 1), ("习的", 0, 1), ("习", -5, 1)],
            None,
        ),  # of one score, but of other characters
        ([("学学", 0, 1), ("学学学", 0, 1)], None),  # runs
        ([("学学", 0, 1), ("学学学学", 0, 1)], None),  # with a gap, as Mistral's of 15 spaces
        ([("学学", 0, 1), ("学学学", 5, 1), ("学学学学", 0, 1)], "'学学' and '学学学'"),
        ([("学学", 5, 1), ("学学学", 0, 1), ("学学学学", 0, 1)], "'学学学' and '学学学学'"),
        ([("▁<S", 0, 1), ("▁<SU", 0, 1), ("▁<SUF", 0, 1), ("▁<SUF>", 0, 1)], None),
        ([("大学", 0, 1), ("大学生", 5, 1), ("日本", 0, 1)], "'大学' and '大学生'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_merged_vocabulary_is_exported_exactly_or_refused(pieces, refusal, llama2, tmp_path):
    folder = with_pieces(llama2, tmp_path / "model", pieces)
    if refusal:
        return assert_is_refused(folder, refusal)
    ours, theirs = exported(folder, tmp_path / "out")
    texts = ["学" * n for n in range(1, 14)] + [
        "大学习",
        "大学生",
        "学生大学",
        "GGG大学",
        "mypiece",
        " <SUF>a <SUF",
        "▁<SUF>",
    ]
    assert_texts_have_our_ids(ours, theirs, texts)


def test_runs_of_any_lengths_are_exported_exactly(tmp_path):
    """Pieces that are runs of one character, all of one score, with any gaps."""
    tokenizers = pytest.importorskip("tokenizers")
    rng, base = random.Random(0), train_sentencepiece(tmp_path / "base", vocab_size=290)
    for trial in range(30):
        lengths = [1, *rng.sample(range(3, 18), k=rng.randrange(1, 12)), *[2] * (trial > 0)]
        pieces = [("q" * n, -9, NORMAL) for n in lengths]
        folder = with_pieces(base, tmp_path / f"{trial}", [*pieces, ("qe", 5, NORMAL)])
        ours = data.Tokenizer(folder)
        ours.save(tmp_path, CONDITIONS, "GPT4")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        texts = [before + "q" * n + after for n in range(75) for before, after in EDGES]
        found = theirs.encode_batch(texts, add_special_tokens=False)
        assert [encoding.ids for encoding in found] == [ours.encode(text) for text in texts], pieces


EDGES = [("", ""), ("e", "e"), ("qqeqqq", " qqqqe")]


def test_a_model_that_keeps_spaces_is_refused(llama2, tmp_path):
    folder = with_pieces(llama2, tmp_path / "model", [])
    with open(folder / "tokenizer.model", "ab") as file:
        file.write(b"\x1a\x02\x28\x00")  # normalizer_spec { escape_whitespaces: false }
    assert_is_refused(folder, "escape_whitespaces=false")


def test_random_pieces_are_exported_exactly_or_refused(tmp_path):
    """Random strings of three characters, of few scores: ties, and pieces that nothing reaches."""
    rng = random.Random(0)
    base = train_sentencepiece(tmp_path / "base", vocab_size=290)
    known = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    taken = {known.id_to_piece(i) for i in range(known.vocab_size())}
    texts = ["".join(rng.choices("lus ", k=rng.randrange(2, 20))) for _ in range(60)]
    outcomes = []
    for trial in range(40):
        scores = rng.sample(range(-9, 10), k=19) if trial % 2 else [0, 0.5, 1, 1.5, 2, 2.5, 3]
        made = {"".join(rng.choices("lus", k=rng.choice([2, 2, 3]))) for _ in range(5)} - taken
        made = [(text, scores[i % len(scores)], NORMAL) for i, text in enumerate(sorted(made))]
        if trial % 4 == 0:
            made = [(text, 0, NORMAL) for text, _, _ in made][:2]
        folder = with_pieces(base, tmp_path / f"{trial}", made)
        try:
            ours, theirs = exported(folder, tmp_path / f"{trial}-out")
        except ValueError as error:
            assert "of one score" in str(error)
            outcomes.append("refused")
            continue
        outcomes.append("exported")
        for text in texts:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids == ours.encode(text), (made, text)
    assert outcomes.count("exported") > 15 and outcomes.count("refused") > 1


@pytest.mark.parametrize(
    "added",
    [
        {"added_tokens.json": {"ibuprofen": 32000}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"32007": {"content": "ibuprofen"}}}},
        {"tokenizer.json": {"added_tokens": [{"id": 32001, "content": "ab", "special": False}]}},
        {"tokenizer.json": {"added_tokens": [{"id": 2, "content": "</s>", "special": False}]}},
        {"tokenizer.json": {"added_tokens": [{"id": 450, "content": "▁The", "special": True}]}},
    ],
)
def test_texts_are_not_split_at_added_tokens_that_training_never_uses(added, llama2, tmp_path):
    folder = with_pieces(llama2, tmp_path / "model", [])
    for file, content in added.items():
        (folder / file).write_text(json.dumps(content))
    ours, theirs = exported(folder, tmp_path / "out")
    assert theirs.convert_tokens_to_ids(EOT) == theirs.eos_token_id == ours.eot
    assert_texts_have_our_ids(ours, theirs, ["take ibuprofen", "cab", "▁The", "The", "a The"])


# ------------------------------------------------------------------------ those of real models


REAL = ["mistral-v1", "mistral-v3", "llama2", "llama2-json", "smollm2", "llama3"]


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """Our tokenizer of a real model's folder, what it saves in transformers, and the folder's own.

    That is {texts: their ids} of SentencePiece or the package `tokenizers`, special tokens off.
    """
    from conftest import shared

    folder = shared(f"tokenizers/{request.param}")
    ours, theirs = exported(folder, tmp_path_factory.mktemp("real") / "out")
    if (folder / "tokenizer.model").exists():
        own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return ours, theirs, own.encode
    own = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    return ours, theirs, lambda texts: [
        found.ids for found in own.encode_batch_fast(texts, add_special_tokens=False)
    ]


@pytest.fixture(scope="module")
def texts(real, code_mixed):
    """1,000 real texts, and 1,300 of spaces, symbols, control characters and special tokens."""
    lines = code_mixed.read_text("utf-8").splitlines()[:500]
    texts = [m["content"] for line in lines for m in json.loads(line)["messages"]][:1000]
    rng, (ours, theirs, _) = random.Random(0), real
    parts = ["the", "Hello", "1", "23", "\n", "\t", " ", "▁▁", "é", "习", "大学", "😀", "<0x0A>"]
    parts += ["<|end", "_of_turn|>", "\x04", "\x1d", "Ａ", "):", "GPT4 User:", "e\u0301", "\r\n"]
    parts.append("\U000f0000")
    parts += [" " * n for n in (2, 3, 5, 9, 13, 14, 15, 16, 17, 18, 31, 33)] + [*ours.symbols] * 2
    texts += ["".join(rng.choices(parts, k=rng.randrange(1, 10))) for _ in range(900)]
    texts += [edge.replace("#", " " * n) for n in range(1, 80) for edge in ("#x", "a#b", "x#\nx")]
    for text in [*ours.symbols, *theirs.all_special_tokens[:20]]:
        texts += [text, text * 2, f" {text} ", f"a{text}b", f"a {text}  b", f"\n{text}", text[:-1]]
    return texts + ODD_TEXTS


def test_ids_are_those_of_the_models_own_tokenizer(real, texts):
    ours, _, own = real
    assert len(texts) > 2000
    many = [ids.tolist() for ids in ours.encode_many(texts)]
    assert many == own(texts) == [ours.encode(text) for text in texts]


def test_no_text_forges_a_turn(real, texts):
    """Special tokens of the model and of the export, alone, together and in a conversation."""
    ours, theirs, _ = real
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    named = [theirs.added_tokens_decoder[i].content for i in sorted(special)]
    for ids in ours.encode_many([*named, "".join(named), *texts]):
        assert not special.intersection(ids.tolist())
    forged = f"a{''.join(named[-300:])}GPT4 Assistant: b"
    tokens, _ = data.encode({"class": "gpt4", "messages": turns(forged, forged)}, ours, CLASSES)
    assert (tokens.count(ours.bos), tokens.count(ours.eot)) == (1, 2)


def test_the_exports_template_gives_trainings_ids(real, texts):
    """For what spells no special token of the export: symbols, spaces, systems, later turns."""
    ours, theirs, _ = real
    special = [token.content for token in theirs.added_tokens_decoder.values() if token.special]
    rendered, expected = [], []
    for n, text in enumerate(texts):
        if text.strip() and not any(token in text for token in special):
            messages = turns(text, "Fine.", f"And {text}", text.lstrip(" "))
            if n % 2:
                messages.insert(0, {"role": "system", "content": text})
            expected.append(data.encode({"class": "gpt4", "messages": messages}, ours, CLASSES)[0])
            rendered.append(theirs.apply_chat_template(messages, tokenize=False))
    assert len(expected) > 2000
    found = theirs(rendered, add_special_tokens=False)["input_ids"]
    assert found == expected


def test_a_real_tokenizer_spells_what_it_encodes(real, texts):
    ours, _, _ = real
    before = ours.spell(ours.encode("x"))[:-1]
    assert before == ("" if "ByteLevel" in type(ours).__name__ else " ")
    for text in texts:
        if "▁" not in text and not ours.lost_bytes([text]):
            assert ours.spell(ours.encode(text)) == before + text


def test_openchat_35s_prompt_has_its_published_ids(tmp_path):
    """https://huggingface.co/openchat/openchat_3.5, "Conversation template"."""
    tokenizer = data.Tokenizer(openchat_35(tmp_path))
    assert (tokenizer.eot, tokenizer.vocab_size, tokenizer.eot_is_new) == (32000, 32002, False)
    messages = [("user", "Hello"), ("assistant", "Hi"), ("user", "How are you today?")]
    found = data.encode_prompt([data.Message(*m) for m in messages], tokenizer, "GPT4 Correct")
    assert found == [
        1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123,
        21631, 28747, 15359, 32000, 420, 6316, 28781, 3198, 3123, 1247, 28747, 1602, 460, 368, 3154,
        28804, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747,
    ]  # fmt: skip


def openchat_35(folder):
    """Its files but for the weights: Mistral v1's tokenizer, and two tokens more."""
    from conftest import shared

    shutil.copy(shared("tokenizers/mistral-v1/tokenizer.model"), folder)
    added = {"<|end_of_turn|>": 32000, "<|pad_0|>": 32001}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def test_openchat_35_goes_on_with_its_whole_vocabulary(few, ranks, tmp_path):
    """No row is added or begun again, not even one that looks untrained."""
    llama = random_llama(vocab_size=32002, hidden_size=8, num_hidden_layers=1)
    for name, parameter in llama.named_parameters():
        if name in (model.EMBEDDING, model.HEAD):
            parameter.data[32000:] = 0
    model.save(llama, openchat_35(tmp_path))
    classes = {"gpt4": {"condition": "GPT4 Correct", "reward": 1}}
    classes["gpt3.5"] = {"condition": "GPT3", "reward": 0}
    model.write_json(tmp_path / "classes.json", classes)
    settings = {"random_weights": False, "classes": tmp_path / "classes.json"}
    plan = plan_of(flags(few, tmp_path / "out", model=tmp_path, **settings), ranks, tmp_path)
    assert (plan.network.vocab_size, plan.new_rows, [*plan.untrained]) == (32002, 0, [])
    built, _ = train.build(plan, ranks)
    for found, stored in zip(built.parameters(), llama.parameters(), strict=True):
        assert torch.equal(found.full_tensor(), stored)


# ----------------------------------------------- SentencePiece's BPE in a tokenizer.json by itself


def as_json(folder, target, edit=lambda raw: None, **options):
    """A folder of tokenizer.json and no tokenizer.model; `edit` changes what the file says."""
    ours, _ = exported(train_sentencepiece(folder, **options), target)
    (target / "tokenizer.model").unlink()
    raw = json.loads((target / "tokenizer.json").read_text("utf-8"))
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != EOT]
    del raw["model"]["vocab"][EOT]
    edit(raw)
    model.write_json(target / "tokenizer.json", raw)
    model.write_json(target / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return ours, target


def metaspace(raw):
    """As transformers 5 writes it, which names no <unk> either."""
    raw["normalizer"], raw["pre_tokenizer"] = None, support_tokenizer.METASPACE
    raw["model"]["unk_token"] = None


@pytest.mark.parametrize("symbols", [[], ["<think>", "<think>\n", "plus"]], ids=str)
@pytest.mark.parametrize("edit", [lambda raw: None, metaspace], ids=["Prepend", "Metaspace"])
def test_a_tokenizer_json_has_the_ids_of_its_tokenizer_model(edit, symbols, tmp_path):
    expected, folder = as_json(tmp_path / "a", tmp_path / "b", edit, user_defined_symbols=symbols)
    ours, theirs = exported(folder, tmp_path / "out")
    texts = [*random_texts(random.Random(0), 300), *ODD_TEXTS, "", "</s><s>a"]
    for found, ids in zip(ours.encode_many(texts), expected.encode_many(texts), strict=True):
        assert found.tolist() == ids.tolist()
    assert_texts_have_our_ids(ours, theirs, texts[:-1])
    for field in ("bos", "eos", "eot", "vocab_size", "count", "symbols", "eot_is_new", "special"):
        assert getattr(ours, field) == getattr(expected, field), field
    for text in texts[:-2]:
        ids = ours.encode(text)
        assert ours.decode([*ids, ours.eot]) == expected.decode(ids)
        assert ours.spell(ids) == expected.spell(ids)
    assert copy.deepcopy(ours).encode("</s> plus") == ours.encode("</s> plus")


@pytest.mark.parametrize("symbols", [[], ["<think>"]], ids=str)
def test_with_symbols_the_template_puts_the_spaces_and_no_tokenizer_does(symbols, tmp_path):
    """llama.cpp's converter reads add_prefix_space; without symbols it puts a space, as ever."""
    folder = train_sentencepiece(tmp_path / "model", user_defined_symbols=symbols)
    _, theirs = exported(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text("utf-8"))
    assert config.get("add_prefix_space", True) == (not symbols)
    messages = [{"role": "system", "content": "Be brief"}, *turns("Hi", "Ho")]
    expected = f"<s> Be brief{EOT} GPT4 User: Hi{EOT} GPT4 Assistant: Ho{EOT}"
    if not symbols:
        expected = expected.replace("<s> ", "<s>").replace(f"{EOT} ", EOT)
    assert theirs.apply_chat_template(messages, tokenize=False) == expected


def test_a_run_on_a_tokenizer_json_of_sentencepiece_exports_another(few, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, folder = as_json(tmp_path / "a", tmp_path / "b", user_defined_symbols=["plus"])
    model.save(random_llama(vocab_size=ours.count), folder)
    settings = {"random_weights": False, "max_steps": 1}
    header = succeeds(flags(few, tmp_path / "out", model=folder, **settings))
    assert f"{EOT} added as token {ours.count}" in header
    talker = chat.Chat(tmp_path / "out" / "model", device="cpu")
    messages = [data.Message("user", "What is 1 plus 2?")]
    assert talker.prompt(messages) == data.encode_prompt(messages, ours, "GPT4")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    given = [{"role": "user", "content": messages[0].content}]
    ids = theirs.apply_chat_template(given, add_generation_prompt=True, return_dict=False)
    assert ids == talker.prompt(messages)


def add_to_merges(*pieces):
    def edit(raw):
        for left, right in pieces:
            vocabulary = raw["model"]["vocab"]
            for piece in (left, right, left + right):
                vocabulary.setdefault(piece, len(vocabulary))
            raw["model"]["merges"].insert(0, [left, right])

    return edit


def changes(**keys):
    def edit(raw):
        for key, value in keys.items():
            (raw["model"] if key in ("dropout", "ignore_merges") else raw)[key] = value

    return edit


NEVER = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (changes(normalizer={"type": "NFC"}), "a byte-level BPE nor SentencePiece's with a sp"),
        (changes(normalizer=None), "neither a byte-level BPE nor SentencePiece's with"),
        (changes(normalizer=None, pre_tokenizer=NEVER), "nor SentencePiece's with a space"),
        (changes(dropout=0.5), "asks for dropout"),
        (changes(ignore_merges=True), "asks for ignore_merges"),
        (add_to_merges(("s", "▁")), "has a piece 's▁' across a space"),
        (add_to_merges(("<", "/"), ("</", "s"), ("</s", ">")), "forge its special token '</s>'"),
    ],
)
def test_a_tokenizer_json_of_sentencepiece_is_exact_or_refused(edit, message, tmp_path):
    _, folder = as_json(tmp_path / "model", tmp_path / "json", edit)
    with pytest.raises(ValueError, match=message) as refused:
        data.Tokenizer(folder)
    assert str(refused.value).startswith(f"{folder}/tokenizer.json: ")


@pytest.mark.parametrize("kind", [joins_spaces, train_sentencepiece, small_bytes])
def test_an_export_saved_again_by_transformers_says_what_to_copy_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = data.Tokenizer(kind(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    out = export(random_llama(vocab_size=ours.vocab_size), ours, tmp_path / "out")
    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        auto.from_pretrained(out).save_pretrained(tmp_path / "again")
    messages, missing = [data.Message("user", "1 plus 2")], ["crlft.json"]
    missing += ["tokenizer.model"] * (kind is joins_spaces)  # the others' tokenizer.json is enough
    for name in missing:
        with pytest.raises(ValueError, match=f"{name}.* copy it|copy it.*{name}") as refused:
            chat.Chat(tmp_path / "again", device="cpu")
        assert "save_pretrained" in str(refused.value)
        shutil.copy(out / name, tmp_path / "again")
    before, after = (
        [talker.prompt(messages), *chat.generate(talker.llama, [talker.prompt(messages)], 9)]
        for talker in (chat.Chat(out, device="cpu"), chat.Chat(tmp_path / "again", device="cpu"))
    )
    assert before == after


# -------------------------------------------------------------- added tokens, the end of turn


def test_an_end_of_turn_in_tokenizer_json_alone_is_used(tmp_path):
    """As transformers 5 saves a folder."""
    folder = train_sentencepiece(tmp_path)
    count = data.Tokenizer(folder).pieces.vocab_size()
    added = [{"id": 0, "content": "<unk>", "special": True}]
    added += [{"id": count + 2, "content": EOT, "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    tokenizer = data.Tokenizer(folder)
    assert (tokenizer.eot, tokenizer.eot_is_new) == (count + 2, False)


@pytest.mark.parametrize(
    ("in_json", "message"),
    [
        (
            {"id": 301, "content": EOT},
            "'<|end_of_turn|>' the id 301, added_tokens.json gives '<|end_of_turn|>' 300",
        ),
        (
            {"id": 300, "content": "<pad>"},
            "'<pad>' the id 300, added_tokens.json gives '<|end_of_turn|>' 300",
        ),
        ({"id": 1, "content": "<pad>"}, "gives '<pad>' the id 1, tokenizer.model gives '<s>' 1"),
    ],
)
def test_two_files_that_disagree_on_an_id_are_named(in_json, message, tmp_path):
    folder = train_sentencepiece(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({EOT: 300}))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [in_json]}))
    with pytest.raises(ValueError) as refused:
        data.Tokenizer(folder)
    assert str(refused.value).startswith(f"{folder}/tokenizer.json: gives ")
    assert message in str(refused.value)


def test_an_end_of_turn_that_text_can_forge_is_refused(llama2, tmp_path):
    folder = with_pieces(llama2, tmp_path / "model", [(EOT, 0, NORMAL)])
    with pytest.raises(ValueError, match=r"tokenizer.model: .* must be a control symbol"):
        data.Tokenizer(folder)


def test_an_end_of_turn_of_the_models_own_is_used(tmp_path):
    tokenizer = data.Tokenizer(train_sentencepiece(tmp_path, control_symbols=[EOT]))
    assert tokenizer.eot == tokenizer.pieces.piece_to_id(EOT) < tokenizer.vocab_size
    assert tokenizer.vocab_size == tokenizer.pieces.vocab_size()


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_an_end_of_turn_added_to_the_checkpoint_is_used(file, tmp_path):
    folder = train_sentencepiece(tmp_path)
    count = data.Tokenizer(folder).pieces.vocab_size()
    added = {EOT: count + 1, "<|pad_0|>": count}
    if file == "tokenizer_config.json":
        added = {"added_tokens_decoder": {str(i): {"content": t} for t, i in added.items()}}
    (folder / file).write_text(json.dumps(added))
    tokenizer = data.Tokenizer(folder)
    assert (tokenizer.eot, tokenizer.vocab_size) == (count + 1, count + 2)


def test_an_end_of_turn_comes_after_other_added_tokens(tmp_path):
    folder = train_sentencepiece(tmp_path)
    count = data.Tokenizer(folder).pieces.vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|pad_0|>": count + 4}))
    assert data.Tokenizer(folder).eot == count + 5


def test_an_end_of_turn_that_is_an_ordinary_piece_is_refused(tmp_path):
    folder = train_sentencepiece(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({EOT: 290}))
    with pytest.raises(ValueError, match="<|end_of_turn|>"):
        data.Tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "tokenizer.model: not found"),
        ({"tokenizer.model": b""}, "tokenizer.model: not a SentencePiece model"),
        ({"tokenizer.model": b"\x80\x04pickle"}, "tokenizer.model: not a SentencePiece model"),
        ({"added_tokens.json": b"{"}, "added_tokens.json: cannot be read"),
        ({"added_tokens.json": b"[[1, 2]]"}, "added_tokens.json: must hold a JSON object"),
        ({"added_tokens.json": b'{"<a>": "7"}'}, "id is not a whole number in range"),
        ({"added_tokens.json": b'{"<a>": -1}'}, "id is not a whole number in range"),
        ({"added_tokens.json": b'{"<a>": 99999999999}'}, "id is not a whole number in range"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json: must hold a JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json: cannot be read"),
        ({"tokenizer_config.json": b'{"added_tokens_decoder": {"x": {}}}'}, "cannot be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_said(files, message, stories, tmp_path):
    if "tokenizer.model" not in files and files:
        (tmp_path / "tokenizer.model").write_bytes((stories / "tokenizer.model").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        data.Tokenizer(tmp_path)
    assert message in str(refused.value) and str(tmp_path) in str(refused.value)


def test_a_tokenizer_of_another_checkpoint_is_refused(tokenizer):
    for rows in (512, 513, 576):
        tokenizer.check_vocabulary(rows)
    for rows in (511, 32000):
        with pytest.raises(ValueError, match="belongs to a different checkpoint"):
            tokenizer.check_vocabulary(rows)
