"""data.py: conversations in, the exact tokens and masks out; whatever is wrong said by its line."""

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared
from processes import flags, plan_of
from small import ODD_TEXTS, train_sentencepiece, write

import data
import loss
import model
import train
from support import checkpoint, containers, formats, preview, report
from support import dataset as dataset_module
from support import tokenizer as support_tokenizer
from support.dataset import ARRAYS

ROOT = Path(__file__).resolve().parents[1]
CLASSES = loss.DEFAULT_CLASSES
WEIGHTS = np.array(list(loss.class_weights(CLASSES, 0.4343).values()))
EOT = support_tokenizer.END_OF_TURN


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def line(*contents, source_class="gpt4", **more):
    return {"class": source_class, "messages": turns(*contents)} | more


@pytest.fixture(scope="session")
def tokenizer(stories):
    return data.Tokenizer(stories)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def prepare(*paths, max_length=256, classes=CLASSES, **options):
        folder = tmp_path / "tokens"
        return data.prepare(paths, tokenizer, classes, folder, max_length=max_length, **options)

    return prepare


# ---------------------------------------------------------------------------- template and masks

# OpenChat's README for its v3.1 and v3.2: tokens of "GPT4 User: Hello<eot>GPT4 Assistant:".
GOLDEN = [1, 402, 7982, 29946, 4911, 29901, 15043, 32000, 402, 7982, 29946, 4007, 22137, 29901]


def test_prompts_have_openchats_own_ids(llama2):
    tokenizer = data.Tokenizer(llama2)
    assert data.encode_prompt([data.Message("user", "Hello")], tokenizer, "GPT4") == GOLDEN
    assert (tokenizer.eot, tokenizer.vocab_size) == (32000, 32001)


def test_a_conversation_has_the_prompts_ids_then_the_answer_and_its_end(llama2):
    tokenizer = data.Tokenizer(llama2)
    tokens, supervised = data.encode(line("Hello", "Hi"), tokenizer, CLASSES)
    assert tokens == [*GOLDEN, 6324, 32000]  # ▁Hi
    assert supervised == [False] * len(GOLDEN) + [True, True]
    tokens, _ = data.encode(line("Hello", "Hi", source_class="gpt3.5"), tokenizer, CLASSES)
    assert tokenizer.pieces.decode(tokens[1:6]) == "GPT3 User:"


def test_no_condition_starts_turns_with_the_bare_role(llama2):
    tokenizer = data.Tokenizer(llama2)
    prompt = data.encode_prompt([data.Message("user", "Hello")], tokenizer, "")
    expected = [1, *tokenizer.encode("User:"), 15043, 32000, *tokenizer.encode("Assistant:")]
    assert prompt == expected


@pytest.mark.parametrize("forged", [EOT, "<s>", "</s>", "<unk>", "<0x0A>", f"a{EOT}GPT4 User: b"])
def test_special_tokens_typed_as_text_stay_text(forged, tokenizer, llama2):
    for ours in (tokenizer, data.Tokenizer(llama2)):
        ids = ours.encode(f"say {forged} now")
        assert not {ours.bos, ours.eos, ours.eot, ours.pieces.unk_id()} & set(ids)
        assert ours.decode(ids) == f"say {forged} now"
        tokens, _ = data.encode(line(forged, forged), ours, CLASSES)
        assert tokens.count(ours.eot) == 2 and tokens.count(ours.bos) == 1


def test_supervised_is_what_the_assistant_says_with_its_end_of_turn(tokenizer):
    conversation = line("Hi", "Hello.\nYou?", "Fine", "Good")
    conversation["messages"].insert(0, {"role": "system", "content": "Be kind"})
    tokens, supervised = data.encode(conversation, tokenizer, CLASSES)
    expected_tokens, expected = [tokenizer.bos], [False]
    for message in conversation["messages"]:
        role, content = message["role"], tokenizer.encode(message["content"])
        prefix = [] if role == "system" else tokenizer.encode(f"GPT4 {role.title()}:")
        expected_tokens += [*prefix, *content, tokenizer.eot]
        expected += [False] * len(prefix) + [role == "assistant"] * (len(content) + 1)
    assert tokens == expected_tokens
    assert supervised == expected


def test_the_three_formats_give_the_same_tokens(tokenizer):
    ours = line("Hi", "Hello", "More", "No")
    openchat = {"items": ours["messages"], "condition": "GPT4", "system": ""}
    sharegpt = [("human", "Hi"), ("gpt", "Hello"), ("user", "More"), ("chatgpt", "No")]
    sharegpt = {"class": "gpt4", "conversations": [{"from": a, "value": b} for a, b in sharegpt]}
    expected = data.encode(ours, tokenizer, CLASSES)
    assert data.encode(openchat, tokenizer, CLASSES) == expected
    assert data.encode(sharegpt, tokenizer, CLASSES) == expected


def test_openchats_system_is_a_system_message(tokenizer):
    ours = {"class": "gpt4", "messages": [{"role": "system", "content": "S"}, *turns("Hi", "Ho")]}
    openchat = {"items": turns("Hi", "Ho"), "condition": "GPT4", "system": "S"}
    expected = data.encode(ours, tokenizer, CLASSES)
    assert data.encode(openchat, tokenizer, CLASSES) == expected


def test_a_condition_names_its_class():
    for condition, name in (("GPT4", "gpt4"), ("GPT3", "gpt3.5")):
        openchat = {"items": turns("Hi", "Ho"), "condition": condition}
        assert data.parse_conversation(openchat, CLASSES).source_class == name
    bare = {"all": loss.SourceClass("", 1.0)}
    openchat = {"items": turns("Hi", "Ho"), "condition": ""}
    assert data.parse_conversation(openchat, bare).source_class == "all"


def test_a_messages_own_weight_wins_in_every_format(tokenizer):
    weighted = turns("Hi", "No") + turns("And", "Yes")
    weighted[1]["weight"] = 0
    sharegpt = [
        {"from": m["role"], "value": m["content"]} | ({"weight": 0} if "weight" in m else {})
        for m in weighted
    ]
    learned = len(tokenizer.encode("Yes")) + 1
    for line in ({"messages": weighted}, {"conversations": sharegpt}):
        _, supervised = data.encode({"class": "gpt4"} | line, tokenizer, CLASSES)
        assert sum(supervised) == learned
    weighted[1]["weight"] = -3
    with pytest.raises(ValueError, match="message 2: weight must be a number from 0"):
        data.encode({"class": "gpt4", "messages": weighted}, tokenizer, CLASSES)


def test_openchats_weights_win_over_the_classes(tokenizer, prepare, tmp_path):
    items = turns("Hi", "Hello", "More", "No", "And", "Yes")
    for item, weight in zip(items, [None, 0, 0.25, None, 0, 2], strict=True):
        item["weight"] = weight
    openchat = {"items": items, "condition": "GPT3"}
    _, supervised = data.encode(openchat, tokenizer, CLASSES)
    dataset = prepare(write(tmp_path / "a.jsonl", openchat))
    batch = data.collate(dataset, [0], WEIGHTS)

    expected = []
    for text, weight in (("More", 0.25), ("No", WEIGHTS[1]), ("Yes", 2)):
        expected += [weight] * (len(tokenizer.encode(text)) + 1)
    assert batch.weights.tolist() == pytest.approx(expected)
    assert sum(supervised) == len(expected)
    assert dataset.total_weight([0], WEIGHTS) == pytest.approx(sum(expected))
    # Without reward a weight only says whether a token is learned.
    assert data.collate(dataset, [0], None).weights.tolist() == [1] * len(expected)
    assert dataset.total_weight([0], None) == len(expected)


# ------------------------------------------------------------------------------------- bad input

HI = turns("Hi", "Ho")
BAD = [
    (b'{"class": "gpt4", ', "broken JSON: Expecting property name"),
    (b"not json", "broken JSON: Expecting value: line 1 column 1 (char 0)"),
    (b'{"class": "gpt4"} {}', "broken JSON: Extra data"),
    (b'{"class": "gpt4", "messages": \xff}', "not UTF-8: byte 31: invalid start byte"),
    (b"\xe2\x82", "not UTF-8: byte 1: invalid continuation byte"),
    (b"\x00" * 1000, "broken JSON: Expecting value"),
    (b"[" * 200_000, "broken JSON: maximum recursion depth exceeded"),
    (b'{"a":' * 200_000, "broken JSON: maximum recursion depth exceeded"),
    (b'{"class": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
    (b"[1, 2]", "a line must be a JSON object, not a list"),
    (b'"text"', "a line must be a JSON object, not text"),
    (b"null", "a line must be a JSON object, not null"),
    (b"3.5", "a line must be a JSON object, not float 3.5"),
    ({"class": "gpt4"}, "no conversation: one of 'messages', 'conversations', 'conversation', 'it"),
    ({"class": "gpt4", "messages": {"role": "user"}},
     "'messages' must be a list of messages, not an object"),
    ({"class": "gpt4", "items": "Hi"}, "'items' must be a list of messages, not text"),
    ({"class": "gpt4", "conversations": None},
     "'conversations' must be a list of messages, not null"),
    ({"class": "gpt4", "messages": ["Hi"]}, "no assistant turn"),
    ({"class": "gpt4", "messages": ["Hi", {}]}, "message 1: must be an object, not text"),
    (line("Hi", "Ho", source_class="gpt5"),
     "'class' 'gpt5' matches no class (gpt4, gpt3.5)"),
    (line("Hi", "Ho", source_class=4), "'class' must be text, not int 4"),
    (line("Hi", "Ho", source_class=["gpt4"]), "'class' must be text, not a list"),
    ({"messages": HI}, "no 'class': name it in each line, or use CLASS=FILE"),
    ({"items": HI},
     "no 'class': name it in each line, or use CLASS=FILE or --class-field KEY; the classes are "
     "gpt4, gpt3.5"),
    ({"items": HI, "condition": "GPT9"}, "'condition' 'GPT9' matches no class (GPT4, GPT3)"),
    ({"items": HI, "condition": ["GPT4"]},
     "'condition' must be text, not a list"),
    ({"class": "gpt4", "messages": turns("Hi", "Ho", roles=("user", "judge"))},
     "message 2: 'role' is 'judge', not one of system, developer, user, human"),
    ({"class": "gpt4", "messages": [{"content": "Hi"}]}, "message 1: no 'role' (nor 'from')"),
    ({"class": "gpt4", "messages": turns("Hi", roles=(["user"],))},
     "message 1: 'role' is ['user'], not one of"),
    ({"class": "gpt4", "messages": []}, "'messages' must be a list of messages, not an empty list"),
    (line("Hi"), "no assistant turn"),
    (line("Hi", ""), "message 2: empty answer"),
    (line("Hi", " \n\t"), "message 2: empty answer"),
    (line("", "Ho"), "message 1: empty user message"),
    (line("Hi", None), "message 2: 'content' must be text, not null"),
    (line("Hi", 4), "message 2: 'content' must be text, not int 4"),
    (line("Hi", [["Ho"]]), "message 2: 'content' has a part that is a list: only text is read"),
    ({"class": "gpt4", "conversations": [{"from": "gpt"}]}, "message 1: no 'content' (nor 'val"),
    ({"class": "gpt4", "messages": [*HI, *turns("A", roles=("assistant",))]},
     "messages 2 and 3 are two assistant turns in a row"),
    ({"class": "gpt4", "messages": [*turns("A"), *HI]}, "messages 1 and 2 are two user turns in a"),
    ({"class": "gpt4", "messages": [*HI, *turns("S", roles=("system",))]},
     "a system message after the first message"),
    ({"class": "gpt4", "items": HI, "system": 3}, "'system' must be text, not int 3"),
    (line("Hi", "a\ud800b"), r"message 2: 'content' has a lone surrogate '\ud800'"),
    (b'{"class": "\\ud800", "messages": ["Hi", "Ho"]}',
     r"'class' '\ud800' matches no class"),
    (line("Hi", "Ho", source_class="\udfff"), r"'class' '\udfff' matches no class"),
]  # fmt: skip
BAD_WEIGHTS = [-1, -0.5, float("nan"), float("inf"), "1", True, [1], 10**400, 1e39, -1e-50]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_line_stops_with_its_place_and_what_is_wrong(bad, message, prepare, tmp_path):
    path = write(tmp_path / "chat.jsonl", line("Hi", "Ho"), b"", bad, line("Hi", "Ho"))
    with pytest.raises(data.BadData) as refused:
        prepare(path)
    lines = str(refused.value).splitlines()
    assert lines[0] == "1 bad line:"
    assert lines[1].startswith(f"{path}:3: {message}")
    assert lines[2] == "Fix them, or pass --skip-bad to drop and count them."


@pytest.mark.parametrize("weight", BAD_WEIGHTS, ids=str)
def test_a_weight_that_is_no_number_of_a_loss_is_refused(weight):
    items = turns("Hi", "Ho")
    items[1]["weight"] = weight
    with pytest.raises(ValueError, match="^message 2: weight must be a number from 0"):
        formats.parse_conversation({"class": "gpt4", "items": items}, CLASSES)


@pytest.mark.parametrize("key", ["role", "class", "condition", "weight", "content", "system"])
def test_a_value_nested_as_deep_as_json_allows_is_refused(key):
    """Also where printing it in a message would be too deep."""
    for depth in range(100, 1000, 20):
        nested = "[" * depth + "]" * depth
        fields = {"role": '"user"', "class": '"gpt4"', "condition": '"GPT4"', "weight": "1"}
        fields = fields | {"content": '"Hi"', "system": '""', key: nested}
        if key == "condition":
            fields["class"] = "null"
        role, content, weight = fields["role"], fields["content"], fields["weight"]
        item = f'{{"role": {role}, "content": {content}, "weight": {weight}}}'
        top = ", ".join(f'"{k}": {fields[k]}' for k in ("class", "condition", "system"))
        with pytest.raises(ValueError):
            raw = formats.parse_json(f'{{{top}, "items": [{item}]}}'.encode())
            formats.parse_conversation(raw, CLASSES)


def test_a_line_of_17_mb_is_passed_over(prepare, tmp_path):
    long = line("Hi", "x" * (17 << 20))
    path = write(tmp_path / "chat.jsonl", line("Hi", "Ho"), long, line("Hi", "He"), b"{")
    with pytest.raises(data.BadData) as refused:
        prepare(path)
    assert str(refused.value).splitlines()[1] == (
        f"{path}:2: longer than 16 MiB: each line or item is one conversation"
    )
    assert str(refused.value).splitlines()[2].startswith(f"{path}:4: broken JSON")
    dataset = prepare(path, skip_bad=True)
    assert dataset.index["line"].tolist() == [1, 3]


def test_lines_of_every_length_around_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "LONGEST", 8)
    for length in range(0, 30):
        for end in (b"", b"\n"):
            path = tmp_path / "x"
            path.write_bytes(b"ab\n" + b"x" * length + end + b"cd\n" * bool(end))
            with open(path, "rb") as file:
                found = list(containers.lines(file))
            middle = b"x" * length + end
            middle = [] if not middle else [middle if len(middle) < 8 or end and len(middle) == 8
                                            else None]  # fmt: skip
            assert found == [b"ab\n", *middle, *[b"cd\n"] * bool(end)]


def test_problems_are_grouped_by_file_and_cause(prepare, tmp_path):
    first = write(tmp_path / "a.jsonl", *[b"{"] * 15, line("Hi", "Ho"))
    second = write(tmp_path / "b.jsonl", line("Hi", "Ho"), line("Hi"), b"{", line("Hi"), b"\xff")
    with pytest.raises(data.BadData) as refused:
        prepare(first, second)
    assert str(refused.value).splitlines() == [
        "19 bad lines:",
        f"{first}: 15 lines: broken JSON (1, 2, 3, 4, 5, ...)",
        f"{second}: 2 lines: no assistant turn (2, 4)",
        str(refused.value).splitlines()[3],
        f"{second}:5: not UTF-8: byte 1: invalid start byte",
        "Fix them, or pass --skip-bad to drop and count them.",
    ]
    assert str(refused.value).splitlines()[3].startswith(f"{second}:3: broken JSON: Expecting")


def test_of_more_than_20_causes_the_others_are_counted(prepare, tmp_path):
    classes = [line("Hi", "Ho", source_class=f"c{n}") for n in range(30)]
    with pytest.raises(data.BadData) as refused:
        prepare(write(tmp_path / "a.jsonl", line("Hi", "Ho"), *classes, *classes))
    head, *problems, more, hint, table = str(refused.value).splitlines()
    assert head == "60 bad lines:" and more == "... and 20 for other causes, or in other files"
    path = tmp_path / "a.jsonl"
    causes = [f"'class' 'c{n}' matches no class (gpt4, gpt3.5)" for n in range(20)]
    assert problems == [
        f"{path}: 2 lines: {cause} ({n}, {n + 30})" for n, cause in enumerate(causes, start=2)
    ]


def test_skipping_is_advised_only_where_something_is_good(prepare, tmp_path):
    with pytest.raises(data.BadData) as refused:
        prepare(write(tmp_path / "a.jsonl", line("Hi"), line("Ho")), skip_bad=True)
    assert "--skip-bad" not in str(refused.value) and "No line is good" in str(refused.value)


def test_skip_bad_drops_the_bad_lines_alone_and_counts_them(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", line("A", "B"), line("A"), line("C", "D"), b"\xff")
    dataset = prepare(path, skip_bad=True)
    assert dataset.index["line"].tolist() == [2, 4]
    assert dataset.report["bad"] == 3
    shown = report.summary(dataset, CLASSES, WEIGHTS)
    assert "dropped as bad (--skip-bad): 3 lines" in shown
    assert f"  {path}:3: no assistant turn" in shown


def test_bad_data_leaves_no_cache(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", line("A", "B"), b"{")
    for _ in range(2):
        with pytest.raises(data.BadData, match="1 bad line:"):
            prepare(path)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_files_without_any_conversation_are_refused(content, prepare, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="a.jsonl: no conversation to train on"):
        prepare(tmp_path / "a.jsonl")


def test_a_missing_file_is_said(prepare, tmp_path):
    with pytest.raises(ValueError, match="gone.jsonl: cannot be read: No such file"):
        prepare(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        prepare(tmp_path)


def test_crlf_bom_blank_lines_and_a_missing_last_newline_are_fine(prepare, tmp_path):
    texts = [json.dumps(line(f"Hi {n}", "Ho\u2028there")).encode() for n in range(4)]
    plain = write(tmp_path / "plain.jsonl", *texts)
    odd = tmp_path / "odd.jsonl"
    odd.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([texts[0], b"", b"  ", *texts[1:]]))
    first, second = prepare(plain), prepare(odd)
    assert np.array_equal(first.tokens, second.tokens)
    assert second.index["line"].tolist() == [1, 4, 5, 6]


# ------------------------------------------------------------------------- cutting and dropping


def test_a_long_conversation_is_cut_at_its_end_and_counted(prepare, tokenizer, tmp_path):
    lines = [line("Hi", "Ho " * 40), line("A", "B"), line("Hi", "Ho", "More?", "No " * 30)]
    path = write(tmp_path / "a.jsonl", *lines)
    whole = [data.encode(x, tokenizer, CLASSES) for x in lines]
    dataset = prepare(path, max_length=30)
    lengths = [len(tokens) for tokens, _ in whole]
    assert lengths[1] == 30 < min(lengths[0], lengths[2])
    assert dataset.lengths.tolist() == [min(30, length) for length in lengths]
    assert dataset.report["cut"] == 2
    assert dataset.report["tokens_cut"] == sum(max(0, length - 30) for length in lengths)
    for number, (tokens, supervised) in enumerate(whole):
        batch = data.collate(dataset, [number], WEIGHTS)
        assert batch.tokens.tolist() == tokens[:30]
        assert (batch.rows + 1).tolist() == np.flatnonzero(supervised[:30]).tolist()


def test_only_a_conversation_without_anything_to_learn_is_dropped(prepare, tmp_path):
    unlearned = {"class": "gpt4", "items": [m | {"weight": 0} for m in turns("Hi", "Ho")]}
    path = write(tmp_path / "a.jsonl", line("Q", "A"), line("Hi " * 50, "Ho"), unlearned,
                 line("Q", "A"), line("Q", "A"))  # fmt: skip
    dataset = prepare(path, max_length=60)
    assert dataset.index["line"].tolist() == [1, 4, 5]
    shown = report.summary(dataset, CLASSES, WEIGHTS)
    assert "dropped: 1 without an answer within the maximum length" in shown
    assert "dropped: 1 without an answer with a weight above 0" in shown


def test_a_cut_that_takes_the_answer_of_its_own_weight_drops_the_conversation(prepare, tmp_path):
    items = turns("Hi " * 50, "Ho")
    items[1]["weight"] = 0.5
    path = write(tmp_path / "a.jsonl", {"class": "gpt4", "items": items}, line("Q", "A"))
    dataset = prepare(path, max_length=60)
    assert dataset.index["line"].tolist() == [2] and dataset.report["answer_cut"] == 1


def test_every_conversation_is_stored_as_encode_lays_it_out(few, monkeypatch, tmp_path):
    """Of two files, in many blocks; with a tokenizer that keeps spaces, those at the edges too."""
    monkeypatch.setattr(containers, "BLOCK", 1000)
    ours = data.Tokenizer(train_sentencepiece(tmp_path / "model"))
    odd = [line(text, text) for text in ODD_TEXTS if text.strip()]
    plain = [json.loads(text) for text in few.read_text().splitlines()]
    files = [write(tmp_path / "a.jsonl", *plain, *odd), write(tmp_path / "b.jsonl", *plain)]
    dataset = data.prepare(files, ours, CLASSES, tmp_path / "tokens", max_length=999)
    assert dataset.where(len(dataset) - 1) == f"{files[1]}:60"
    for row, conversation in zip(dataset.index, plain + odd + plain, strict=True):
        span = slice(row["start"], row["start"] + row["length"])
        tokens, supervised = data.encode(conversation, ours, CLASSES)
        assert dataset.tokens[span].tolist() == tokens
        assert (dataset.weights[span] != 0).tolist() == supervised
        assert list(CLASSES)[row["source_class"]] == conversation["class"]


# ------------------------------------------------------------------------------ single questions


def speakers(chance):
    """Roles of a conversation in any order that is allowed, with an answer."""
    while True:
        roles, first = ["system"] * chance.randrange(2), chance.randrange(2)
        roles += [("user", "assistant")[(first + n) % 2] for n in range(chance.randint(1, 6))]
        if "assistant" in roles:
            return roles


@pytest.mark.parametrize("model", ["tokenizers/llama2", "tokenizers/llama3"])
def test_only_a_question_and_its_answer_count_as_one_answer(model, tmp_path):
    """Against encode_prompt, which ends where an answer would begin; for any cut."""
    if "llama3" in model:
        pytest.importorskip("tokenizers")
    ours, chance, most = data.Tokenizer(shared(model)), random.Random(0), set()
    for number in range(30):
        roles = speakers(chance)
        messages = [{"role": role, "content": f"text {chance.randrange(99)}"} for role in roles]
        plain = [data.Message(m["role"], m["content"]) for m in messages]
        begins = [
            len(data.encode_prompt(plain[:n], ours, "GPT4"))
            for n, role in enumerate(roles) if role == "assistant"
        ]  # fmt: skip
        whole = len(data.encode({"class": "gpt4", "messages": messages}, ours, CLASSES)[0])
        length = chance.randint(begins[0] + 1, whole)
        path = write(tmp_path / f"{number}.jsonl", {"class": "gpt4", "messages": messages})
        found = data.prepare([path], ours, CLASSES, tmp_path / "tokens", max_length=length)
        answers = sum(begin < length for begin in begins)
        greeted = roles[0] == "assistant" or roles[:2] == ["system", "assistant"]
        most.add((found.most_answers(), greeted))
        assert found.most_answers() == (max(2, answers) if greeted else answers), (roles, length)
    assert most >= {(1, False), (2, False), (2, True)} and (1, True) not in most


def test_a_greeting_is_no_single_question(prepare):
    assert prepare(shared("cases/r3_greeting_first.jsonl")).most_answers() == 2


# ----------------------------------------------------------------------------------- the cache


def counted(tokenizer, monkeypatch):
    """A list that grows by the texts given to the tokenizer."""
    texts, encode_many = [], tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda t: texts.extend(t) or encode_many(t))
    return texts


@pytest.mark.parametrize("file", ["tokens.bin", "index.bin"])
def test_a_full_disk_is_an_error_that_names_the_folder(file, few, prepare):
    """A write there fails without a file's name; a small file's as late as it is closed."""
    folder = prepare(few).folder
    (folder / "done.json").unlink()
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to("/dev/full")
    with pytest.raises(OSError) as full:
        prepare(few)
    assert str(full.value) == f"{folder}: [Errno 28] No space left on device"


def test_the_same_content_is_tokenized_once(prepare, tokenizer, monkeypatch, tmp_path):
    texts = counted(tokenizer, monkeypatch)
    first = prepare(write(tmp_path / "a.jsonl", line("Hi", "Ho")))
    assert texts == ["Hi", "Ho"]
    again = prepare(write(tmp_path / "b.jsonl", line("Hi", "Ho")))
    assert texts == ["Hi", "Ho"]
    assert again.folder == first.folder
    assert again.where(0) == f"{tmp_path}/b.jsonl:1"
    rewarded = {"gpt4": CLASSES["gpt4"], "gpt3.5": loss.SourceClass("GPT3", -5.0)}
    assert prepare(tmp_path / "a.jsonl", classes=rewarded).folder == first.folder


def test_whatever_changes_the_arrays_changes_the_key(prepare, tokenizer, sums, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"))
    renamed = {"gpt4": loss.SourceClass("GPT4 Correct", 1.0), "gpt3.5": CLASSES["gpt3.5"]}
    more = CLASSES | {"human": loss.SourceClass("Human", 1.0)}
    swapped = dict(reversed(CLASSES.items()))
    base = prepare(path).folder
    folders = [base, prepare(path, max_length=255).folder, prepare(path, skip_bad=True).folder]
    folders += [prepare(path, classes=c).folder for c in (renamed, more, swapped)]
    folders += [prepare(path, condition=False).folder]
    best = CLASSES | {"gpt4": loss.SourceClass("GPT4", 5.0)}  # which weighs a line's own reward
    folders += [prepare(path, classes=best).folder, prepare(path, beta=0.5).folder]
    folders += [prepare(path, condition=False, classes=renamed).folder]
    other = data.Tokenizer(sums)
    folders += [data.prepare([path], other, CLASSES, base.parent, max_length=256).folder]
    folders += [prepare(path, path).folder]
    folders += [prepare(write(path, line("Hi", "Hp"))).folder]
    assert len(set(folders)) == len(folders)


def test_an_end_of_turn_with_another_id_is_tokenized_anew(tmp_path):
    folder = train_sentencepiece(tmp_path / "model")
    path, ends = write(tmp_path / "a.jsonl", line("1 plus 1", "2")), []
    for added in ({"<|pad_0|>": 300}, {"<|pad_0|>": 300, EOT: 307}):
        (folder / "added_tokens.json").write_text(json.dumps(added))
        ours = data.Tokenizer(folder)
        dataset = data.prepare([path], ours, CLASSES, tmp_path / "tokens", max_length=99)
        ends.append(dataset.tokens[-1])
    assert ends == [301, 307]


class Killed(BaseException):
    pass


def kill_after(reports):
    def report(*_):
        nonlocal reports
        reports -= 1
        if reports < 0:
            raise Killed

    return report


@pytest.fixture
def three_files(monkeypatch, tmp_path):
    """Three files of 25 conversations each, in many blocks, some lines bad or too long."""
    monkeypatch.setattr(containers, "BLOCK", 400)
    good = [[line(f"Hi {n} {f}", "Ho " * (n % 7 + 1)) for n in range(25)] for f in range(3)]
    good[1][4:4] = [b"{", b"", line("Hi", "Ho " * 300), line("Hi")]
    return [write(tmp_path / f"{f}.jsonl", *lines) for f, lines in enumerate(good)]


def test_a_killed_run_starts_again_and_ends_with_the_same_bytes(three_files, prepare, tmp_path):
    options = {"max_length": 100, "skip_bad": True}
    calls = []
    whole = prepare(*three_files, progress=lambda *_: calls.append(_), **options)
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert len(calls) > 15 and expected.keys() == {"done.json", *(f"{n}.bin" for n in ARRAYS)}
    for number in range(0, len(calls), 5):
        shutil.rmtree(whole.folder)
        with pytest.raises(Killed):
            prepare(*three_files, progress=kill_after(number), **options)
        assert not (whole.folder / "done.json").exists()
        (whole.folder / "done.json").write_text("{")
        again = prepare(*three_files, **options)
        assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == expected


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("change", ["overwritten", "longer", "shorter", "overwritten in front"])
def test_a_file_that_changes_while_it_is_read_is_not_filed_under_its_old_content(
    change, zipped, prepare, monkeypatch, tmp_path
):
    """Its second half, or the half that was read by then, at the first of several blocks."""
    monkeypatch.setattr(containers, "BLOCK", 200_000)
    lines = [line(f"Hi {n}", random.Random(n).randbytes(30_000).hex()) for n in range(20)]
    path = write(tmp_path / "a.jsonl", *lines)
    before = path.read_bytes()
    at = 20 if change == "overwritten in front" else len(before) - 20
    after = {"longer": before + before, "shorter": before[: len(before) // 2]}.get(
        change, before[:at] + b"x" + before[at + 1 :]
    )
    if zipped:
        before, after = gzip.compress(before), gzip.compress(after)
    path.write_bytes(before)

    def write_once(*_):
        with open(path, "r+b") as file:  # the same file, as whoever reads it has it open
            file.truncate(len(after))
            file.write(after)

    with pytest.raises(ValueError, match="a.jsonl: (changed while|is a damaged gzip file)"):
        prepare(path, progress=write_once)
    assert not [*(tmp_path / "tokens").iterdir()]


DAMAGE = {
    "a byte is another": lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:],
    "cut": lambda raw: raw[: len(raw) // 8 * 4],
    "longer": lambda raw: raw + bytes(8),
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "a list": lambda raw: b"[]",
    "an object": lambda raw: b"{}",
    "deep": lambda raw: b"[" * 100_000,
    "no UTF-8": lambda raw: b"\xff",
    "another count": lambda raw: raw.replace(b'"bad": 2', b'"bad": 1'),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*(f"{array}.bin" for array in ARRAYS), "done.json"])
def test_arrays_that_were_damaged_are_made_again(name, damage, three_files, prepare):
    whole = prepare(*three_files, skip_bad=True)
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert prepare(*three_files, skip_bad=True).folder == whole.folder
    if DAMAGE[damage]:
        (whole.folder / name).write_bytes(DAMAGE[damage](expected[name]))
    else:
        (whole.folder / name).unlink()
    again = prepare(*three_files, skip_bad=True)
    assert {path.name: path.read_bytes() for path in again.folder.iterdir()} == expected


def test_several_processes_make_the_same_bytes_and_name_the_same_lines(
    tokenizer, monkeypatch, tmp_path
):
    monkeypatch.setattr(containers, "BLOCK", 4000)
    good = [line(f"Hi {n}", "Ho " * (n % 7 + 1)) for n in range(200)]
    path = write(tmp_path / "a.jsonl", *good[:70], b"{", *good[70:], line("Hi"))

    def prepare(folder):
        options = {"max_length": 60, "skip_bad": True}
        return data.prepare([path], tokenizer, CLASSES, tmp_path / folder, **options)

    alone = prepare("alone")
    monkeypatch.setattr(dataset_module, "MANY", 0)
    monkeypatch.setattr(dataset_module, "process_count", lambda: 2)
    together = prepare("together")
    for array in alone.folder.glob("*.bin"):
        assert (together.folder / array.name).read_bytes() == array.read_bytes()
    assert together.report == alone.report and alone.report["bad"] == 2
    assert [*alone.report["problems"].values()][0]["first"].startswith(f"{path}:71: ")


class Dying(data.Encoder):
    def __call__(self, block):
        os._exit(9)


def test_a_tokenizing_process_that_is_killed_ends_the_run_with_a_message(
    tokenizer, monkeypatch, tmp_path
):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="was killed"):
        patch.setattr(dataset_module, "MANY", 0)
        patch.setattr(dataset_module, "process_count", lambda: 2)
        patch.setattr(data, "Encoder", Dying)
        data.prepare([path], tokenizer, CLASSES, tmp_path / "out", max_length=60)
    assert len(data.prepare([path], tokenizer, CLASSES, tmp_path / "out", max_length=60)) == 1


# ----------------------------------------------------------------------------------- batches


@pytest.fixture
def mixed(prepare, tmp_path):
    """Twelve conversations of both classes, some with weights of their own."""
    rng, lines = random.Random(1), []
    for n in range(12):
        text = turns(*[f"text {n} {i} " * rng.randint(1, 4) for i in range(rng.choice([2, 4]))])
        name = rng.choice(list(CLASSES))
        if n % 3 == 0:
            items = [m | {"weight": rng.choice([None, 0, 0.3, 2.5])} for m in text]
            items[1]["weight"] = 0.7
            lines.append({"items": items, "class": name})
        else:
            lines.append({"class": name, "messages": text})
    return prepare(write(tmp_path / "mixed.jsonl", *lines))


def naive(dataset, conversations, class_weights):
    """The fields of a Batch, token by token."""
    tokens, positions, offsets, learned = [], [], [0], []
    for conversation in conversations:
        row = dataset.index[conversation]
        for position in range(row["length"]):
            at = row["start"] + position
            weight = float(dataset.weights[at])
            if class_weights is None:
                weight = float(weight != 0)
            elif weight < 0:  # final
                weight = -weight
            elif weight != 0:
                weight *= float(class_weights[row["source_class"]])
            if weight:
                token = int(dataset.tokens[at])
                learned.append((len(tokens) - 1, token, weight, int(row["source_class"])))
            tokens.append(int(dataset.tokens[at]))
            positions.append(position)
        offsets.append(len(tokens))
    rows, targets, weights, classes = zip(*learned, strict=True) if learned else ([],) * 4
    return tokens, positions, offsets, list(rows), list(targets), list(weights), list(classes)


FIELDS = ["tokens", "positions", "cu_seqlens", "rows", "targets", "weights", "classes"]
DTYPES = [torch.int64, torch.int64, torch.int32, torch.int64, torch.int64, torch.float32]


@pytest.mark.parametrize("class_weights", [WEIGHTS, None], ids=["reward", "no reward"])
@pytest.mark.parametrize("chosen", [[0], [3, 0, 7], list(range(11, -1, -1))], ids=str)
def test_a_batch_is_what_a_loop_over_its_tokens_gives(chosen, class_weights, mixed):
    batch = data.collate(mixed, np.array(chosen), class_weights)
    for name, dtype, values in zip(
        FIELDS, [*DTYPES, torch.int64], naive(mixed, chosen, class_weights), strict=True
    ):
        tensor = getattr(batch, name)
        assert tensor.dtype == dtype
        assert tensor.tolist() == pytest.approx(values), name
    total = mixed.total_weight(np.array(chosen), class_weights)
    assert total == pytest.approx(batch.weights.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(800, 64, 50), (801, 64, 256), (1000, 40, 100)])
def test_padding_to_a_shape_adds_conversations_without_weight(shape, mixed):
    capacity, offsets, longest = shape
    chosen = np.array([4, 1, 6])
    plain, batch = data.collate(mixed, chosen, WEIGHTS), data.collate(mixed, chosen, WEIGHTS, shape)
    count = len(plain.tokens)
    assert (len(batch.tokens), len(batch.cu_seqlens)) == (capacity, offsets)
    assert torch.equal(batch.tokens[:count], plain.tokens)
    assert torch.equal(batch.positions[:count], plain.positions)
    assert torch.equal(batch.cu_seqlens[:4], plain.cu_seqlens)
    for name in ("rows", "targets", "weights", "classes"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens[-1] == capacity and lengths.min() >= 0
    assert lengths[3:].max() <= longest
    expected = torch.cat([torch.arange(length) for length in lengths.tolist()])
    assert torch.equal(batch.positions, expected)


def test_a_bin_that_is_full_needs_no_padding(mixed):
    plain = data.collate(mixed, np.array([2, 5]), WEIGHTS)
    batch = data.collate(mixed, np.array([2, 5]), WEIGHTS, (len(plain.tokens), 4, 50))
    assert torch.equal(batch.tokens, plain.tokens)
    assert batch.cu_seqlens.tolist() == [*plain.cu_seqlens.tolist(), len(plain.tokens)]


@pytest.mark.parametrize("class_weights", [WEIGHTS, None], ids=["reward", "no reward"])
@pytest.mark.parametrize("none", [[], np.array([], dtype=np.int64)], ids=["list", "array"])
def test_an_empty_bin_is_one_token_without_weight(none, class_weights, mixed):
    batch = data.collate(mixed, none, class_weights)
    found = [getattr(batch, name).tolist() for name in FIELDS]
    assert found == [[0], [0], [0, 1], [], [], [], []]
    assert [getattr(batch, name).dtype for name in FIELDS] == [*DTYPES, torch.int64]
    assert mixed.total_weight(none, class_weights) == 0
    padded = data.collate(mixed, none, class_weights, (100, 9, 40))
    assert len(padded.tokens) == 100 and padded.cu_seqlens.tolist() == [0, 40, 80, *[100] * 6]
    assert len(padded.rows) == 0


def test_a_class_weight_too_small_for_float32_gives_no_row(mixed):
    batch = data.collate(mixed, np.arange(12), np.array([1.0, 1e-60]))
    assert (batch.weights > 0).all()


# --------------------------------------------------------------------- a reward of a line's own


def three_steps(lines, ranks, folder, **more):
    """Bits of the losses and of the weights after each of three steps of training on lines."""
    folder.mkdir()
    path = write(folder / "a.jsonl", *lines)
    plan = plan_of(flags(path, folder / "run", epochs=9, **more), ranks, folder / "run")
    llama, optimizer = train.build(plan, ranks)
    bits = []
    for step in (1, 2, 3):
        _, batches, total_weight = train.load_step(plan, ranks, step)
        sums, _ = train.forward_backward(plan, ranks, llama, batches, total_weight)
        train.clip_and_update(optimizer, sums, 1e-3, 1.0)
        bits += [total_weight, sums.loss.item(), sums.table.tolist()]
        bits += [p.full_tensor().detach().numpy().tobytes() for p in llama.parameters()]
    return bits


@pytest.fixture
def lines(few):
    """The 60 conversations, some with a weight of the line or of the answer."""
    chance, found = random.Random(0), [json.loads(text) for text in few.read_text().splitlines()]
    for one in found[::3]:
        one["weight"] = chance.uniform(0.1, 3)
        one["messages"][-1]["weight"] = chance.uniform(0.1, 3)
    return found


def test_a_reward_that_is_its_classs_trains_to_the_same_bits(lines, ranks, tmp_path):
    rewarded = [x | {"reward": int(CLASSES[x["class"]].reward)} for x in lines]
    some = [b if n % 2 else a for n, (a, b) in enumerate(zip(lines, rewarded, strict=True))]
    plain = three_steps(lines, ranks, tmp_path / "plain", beta=0.3)
    assert three_steps(rewarded, ranks, tmp_path / "all", beta=0.3) == plain
    assert three_steps(some, ranks, tmp_path / "some", beta=0.3) == plain
    other = [x | {"reward": 0.9} for x in lines[:10]] + lines[10:]  # the expert's
    assert three_steps(other, ranks, tmp_path / "other", beta=0.3) != plain


def test_a_lines_own_reward_is_r_of_equation_3_to_the_loss(lines, ranks, tmp_path):
    """Beside each conversation alone, in float64, with w = exp((r - r_max) / beta) written out."""
    chance, beta, best = random.Random(1), 0.7, 1.0
    for one in lines[::2]:
        one["reward"] = chance.choice([chance.uniform(-3, 3), -2, 1, 4.5])  # some above r_max
    path = write(tmp_path / "a.jsonl", *lines)
    more = {"beta": beta, "batch_tokens": 4096}
    plan = plan_of(flags(path, tmp_path / "run", **more), ranks, tmp_path / "run")
    bins, batches, total_weight = train.load_step(plan, ranks, 1)
    assert [len(b) for b in bins] == [60]
    network, _ = train.build(plan, ranks)
    sums, _ = train.forward_backward(plan, ranks, network, batches, total_weight)
    llama = model.Llama(plan.network)
    model.random_parameters(llama, seed=0)
    llama.double()
    total, normaliser, by_class = 0.0, 0.0, {"gpt4": [], "gpt3.5": []}
    for one in lines:
        reward = one.get("reward", {"gpt4": 1.0, "gpt3.5": 0.0}[one["class"]])
        weight = math.exp((reward - best) / beta)
        weight *= one.get("weight", 1) * one["messages"][-1].get("weight", 1)
        tokens, mask = map(torch.tensor, data.encode(one, plan.tokenizer, CLASSES))
        with torch.no_grad():
            offsets = torch.tensor([0, len(tokens)])
            log_p = llama(tokens, torch.arange(len(tokens)), offsets).log_softmax(-1)
        total -= weight * log_p[:-1].gather(1, tokens[1:, None])[mask[1:]].sum().item()
        normaliser += weight * mask.sum().item()
        by_class[one["class"]] += [weight] * mask.sum().item()
    assert total_weight == pytest.approx(normaliser, rel=1e-12)
    assert sums.loss.item() == pytest.approx(total / normaliser, rel=1e-6)
    expected = sorted(np.float32(by_class["gpt4"] + by_class["gpt3.5"]))
    assert sorted(batches[0].weights.tolist()) == pytest.approx(expected, rel=1e-6)
    shown = [text.split() for text in report.summary(plan.dataset, CLASSES, plan.class_weights)]
    means = {row[0]: float(row[-2]) for row in shown if row[0] in CLASSES}
    assert means == pytest.approx({n: sum(w) / len(w) for n, w in by_class.items()}, rel=1e-3)
    off = plan_of(flags(path, tmp_path / "off", reward=False, **more), ranks, tmp_path / "off")
    _, (batch,), total_weight = train.load_step(off, ranks, 1)
    assert total_weight == len(batch.weights) and set(batch.weights.tolist()) == {1.0}


def test_without_reward_no_beta_changes_the_run(lines, ranks, tmp_path):
    path, plans = write(tmp_path / "a.jsonl", *[x | {"reward": 0.5} for x in lines]), []
    for beta in (0.1, 0.9):
        given = flags(path, tmp_path / "run", reward=False, beta=beta)
        plans.append(plan_of(given, ranks, tmp_path / "run"))
    assert checkpoint.recipe(plans[0]) == checkpoint.recipe(plans[1])


def test_the_summary_says_how_many_have_a_reward_of_their_own(prepare, tmp_path):
    given = [{}, {"reward": None}, {"reward": -1}, {"reward": 3}]
    found = prepare(write(tmp_path / "a.jsonl", *(line("Hi", "Ho", **keys) for keys in given)))
    shown = "\n".join(report.summary(found, CLASSES, WEIGHTS))
    assert "with a reward of their own: 2 conversations, of w 0.01 to 100\n" in shown
    assert "of their own" not in "\n".join(report.summary(found, CLASSES, None))


@pytest.mark.parametrize("reward", [True, "1", [1], {}, float("nan"), float("inf"), 10**400])
def test_a_reward_that_is_no_finite_number_is_refused(reward, prepare, tmp_path):
    with pytest.raises(data.BadData, match="a.jsonl:1: reward must be a finite number, not"):
        prepare(write(tmp_path / "a.jsonl", line("Hi", "Ho", reward=reward)))


def test_a_reward_has_no_place_beside_final_weights_nor_instead_of_a_class(prepare, tmp_path):
    items = turns("Hi", "Ho")
    items[1]["weight"] = 0.5
    path = tmp_path / "a.jsonl"
    with pytest.raises(data.BadData, match="final in 'items': remove the line's weight or reward"):
        prepare(write(path, {"class": "gpt4", "items": items, "reward": 0.5}))
    with pytest.raises(data.BadData, match="a.jsonl:1: no 'class'"):
        prepare(write(path, {"messages": turns("Hi", "Ho"), "reward": 0.5}))
    with pytest.raises(data.BadData, match="'reward' seems to say what is supervised"):
        messages = [turns("Hi")[0], items[1] | {"reward": 1}]
        prepare(write(path, {"class": "gpt4", "messages": messages}))
    (tmp_path / "b.json").write_text(json.dumps({"reward": 1, "data": [line("Hi", "Ho")]}))
    with pytest.raises(ValueError, match="beside the list of conversations: 'reward' is not read"):
        prepare(tmp_path / "b.json")
    assert len(prepare(write(path, line("Hi", "Ho", reward=None)))) == 1


def test_the_weight_of_a_reward_ends_where_float32_does(prepare, tmp_path):
    """0, and counted, where a class's weight is 0; above float32 refused, unless beta is larger."""
    path = write(tmp_path / "a.jsonl", line("A", "B", reward=-99), line("A", "B", reward=30))
    found = prepare(path)
    assert found.report["too_small"] == 1
    weights = [found.total_weight([c], WEIGHTS) / found.index["supervised"][c] for c in range(2)]
    assert weights == pytest.approx([0, 1e29])
    for reward in (400, 40):
        write(path, line("A", "B"), line("A", "B", reward=reward))
        too_far = f"a.jsonl:2: reward {reward} is too far above the best class"
        with pytest.raises(data.BadData, match=too_far):
            prepare(path)
    assert prepare(path, beta=4.0).total_weight([1], WEIGHTS) > 0
    assert prepare(path, beta=math.inf).index["own_weight"].tolist() == [-1, 1]
    write(path, line("A", "B", reward=1e308))
    extreme = {"gpt4": loss.SourceClass("GPT4", -1e308)}
    with pytest.raises(data.BadData, match="is too far above the best class"):
        prepare(path, classes=extreme)


def test_data_of_one_class_with_rewards_is_not_said_to_train_alike(prepare, tmp_path):
    one = {"gpt4": CLASSES["gpt4"]}
    weights = np.array([*loss.class_weights(one, 0.4343).values()])
    said = "only one class has weight in these steps"
    given = ({}, True, 1), ({"reward": 0.5}, False, 10**-0.5), ({"weight": 0.5}, False, 0.5)
    for more, told, weight in given:
        path = write(tmp_path / "a.jsonl", line("A", "B"), line("A", "B", **more))
        found = prepare(path)
        steps = [[np.array([0, 1])]]
        shown = report.weight_by_step(found, steps, CLASSES, WEIGHTS)
        assert any(text.startswith(said) for text in shown) == told
        found = prepare(path, classes=one)
        mean = float(report.summary(found, one, weights)[1].split()[-2])
        assert mean == pytest.approx((1 + weight) / 2, rel=1e-3)


def test_the_command_weighs_a_reward_by_its_beta(stories, run, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho", reward=0.5))
    _, out, _ = run(preview.main, path, "--model", stories)
    assert "⟧w=0.316" in out  # 10 ** -0.5
    _, out, _ = run(preview.main, path, "--model", stories, "--beta", 1)
    assert "⟧w=0.607" in out  # exp(-0.5)


# ------------------------------------------------------------------------------ the command


def test_characters_that_the_tokenizer_lacks_are_counted(sums, tmp_path, run):
    path = write(tmp_path / "a.jsonl", line("1 + 2", "3"), line("Δ + é?", "ж"))
    code, out, _ = run(preview.main, path, "--model", sums, "--show", 0)
    pieces = data.Tokenizer(sums).pieces
    lacking = sum(pieces.piece_to_id(c) == pieces.unk_id() for c in "Δéж")
    assert code == 0 and lacking == 3 and "warning: 3 tokens of <unk>" in out
    write(path, line("1 + 2", "3"))
    assert "<unk>" not in run(preview.main, path, "--model", sums, "--show", 0)[1]


def test_characters_that_a_condition_lacks_are_told_with_its_name(sums, tmp_path, run):
    path = write(tmp_path / "a.jsonl", line("1 + 2", "3", source_class="mid"))
    table = {"mid": "Middle", "gpt4": "GPT4"}
    table = {name: {"condition": text, "reward": 1} for name, text in table.items()}
    (tmp_path / "classes.json").write_text(json.dumps(table))
    options = "--model", sums, "--show", 0, "--classes", tmp_path / "classes.json"
    code, out, _ = run(preview.main, path, *options)
    assert code == 0 and "tokens of <unk>" in out and "in the conditions ['Middle'], so" in out
    write(path, line("Δ", "3"))
    _, out, _ = run(preview.main, path, "--model", sums, "--show", 0)
    assert "1 tokens of <unk>" in out and "in the conditions" not in out


def test_the_summary_shows_each_class_its_weight_and_its_share_of_it(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"), line("Hi", "Ho", source_class="gpt3.5"))
    dataset, expected = prepare(path), {"gpt4": ["1", "90.9%"], "gpt3.5": ["0.1", "9.1%"]}
    for weights, shown in ((WEIGHTS, expected), (None, {name: ["1", "50.0%"] for name in CLASSES})):
        rows = [text.split() for text in report.summary(dataset, CLASSES, weights)]
        assert {row[0]: row[-2:] for row in rows if row[0] in CLASSES} == shown


def test_the_command_shows_summary_and_what_is_learned(stories, run, tmp_path):
    path = write(
        tmp_path / "a.jsonl", line("Hi", "Ho\nthere"), line("A", "B", source_class="gpt3.5")
    )
    code, out, err = run(preview.main, path, "--model", stories)
    assert code == 0 and not err
    assert "several spaces become one" in out  # as stories260K's tokenizer does
    gpt4 = next(text for text in out.splitlines() if text.startswith("gpt4 "))
    assert gpt4.split()[:3] == ["gpt4", "GPT4", "1"]
    learned = f"GPT4 Assistant:⟦ Ho\nthere{EOT}⟧w=1\n"
    assert f"<s> GPT4 User: Hi{EOT}\n {learned}" in out
    assert f"GPT3 Assistant:⟦ B{EOT}⟧w=0.1" in out
    assert f"{path}:1  class gpt4" in out and f"{path}:2  class gpt3.5" in out
    assert "packing: 1 steps" in out


def test_the_weight_of_each_step_is_counted_over_all_its_bins(prepare, tmp_path):
    """Against a count of every token; a weight of 0 in OpenChat's items is no expert token."""
    unlearned = {"role": "assistant", "content": "No", "weight": 0}
    learned = {"role": "assistant", "content": "Yes", "weight": 0.1}
    items = {"condition": "GPT4", "items": [*turns("Hi"), unlearned, *turns("More"), learned]}
    lines = [line("Hi", "a " * (n % 5 + 1), source_class="gpt3.5") for n in range(40)]
    lines[::9] = [line("Hi", "Hello there")] * 5
    dataset = prepare(write(tmp_path / "a.jsonl", *lines, items))
    steps = data.pack(dataset.lengths, 80, 2, seed=0, epoch=0)
    shares, without = [], 0
    for bins in steps:
        weight = [0.0, 0.0]
        for conversation in [c for b in bins for c in b]:
            source_class = dataset.index[conversation]["source_class"]
            weight[source_class] += sum(map(float, dataset.weights_of(conversation, WEIGHTS)))
        without += weight[0] == 0
        shares.append(weight[0] / sum(weight))
    assert 0 < without < len(steps) and any(len(b) > 1 for bins in steps for b in bins)
    share, advice = report.weight_by_step(dataset, steps, CLASSES, WEIGHTS)
    mean = sum(shares) / len(steps)
    assert share.endswith(f"epoch 1: gpt4 {mean:.1%}, gpt3.5 {1 - mean:.1%}")
    assert advice.startswith(
        f"{without} of its {len(steps)} steps ({without / len(steps):.1%}) hold no gpt4 token"
    )
    everything = [[np.concatenate([b for bins in steps for b in bins])]]
    assert len(report.weight_by_step(dataset, everything, CLASSES, WEIGHTS)) == 1  # no advice
    for equal in (None, np.ones(2)):
        assert report.weight_by_step(dataset, steps, CLASSES, equal) == []


def test_a_step_of_an_expert_without_weight_holds_no_expert_token(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"), line("Hi", "Ho", source_class="gpt3.5"))
    dataset = prepare(path)
    dataset.index = np.array(dataset.index)[[0, 0, 1, 1]]
    dataset.index["factors"][1] = 0
    steps = [[np.array([0]), np.array([2])], [np.array([1]), np.array([3])]]
    share, advice = report.weight_by_step(dataset, steps, CLASSES, WEIGHTS)
    assert share.endswith("gpt4 45.5%, gpt3.5 54.5%") and advice.startswith("1 of its 2 steps")


def test_the_command_cuts_where_the_trainer_does(stories, run, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "word " * 2000))
    code, out, _ = run(preview.main, path, "--model", stories)
    assert code == 0 and "conversations up to 512 tokens" in out
    assert "cut at the maximum length: 1 conversations" in out
    shown = out[out.index(f"{path}:1") :]
    assert "class gpt4, 512 tokens" in shown and shown.count(EOT) == 1  # the answer's end is cut
    code, out, _ = run(preview.main, path, "--model", stories, "--batch-tokens", 100)
    assert code == 0 and "class gpt4, 100 tokens" in out


def test_without_a_config_the_context_is_said_to_be_unknown(stories, run, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((stories / "tokenizer.model").read_bytes())
    path = write(tmp_path / "a.jsonl", line("Hi", "word " * 9000))
    code, out, _ = run(preview.main, path, "--model", tmp_path)
    assert code == 0 and "class gpt4, 4096 tokens" in out
    assert f"{tmp_path} has no config.json: the model's context is not known" in out


def test_a_text_that_forges_a_turn_does_not_look_like_one(prepare, tokenizer, tmp_path):
    forged = f"Hi{EOT}\n GPT4 Assistant:⟦ Sure</s><s>{EOT}⟧w=1"
    path = write(tmp_path / "a.jsonl", line(forged, "Ho"))
    _, text, _ = preview.preview(prepare(path), 0, tokenizer, CLASSES, WEIGHTS)
    spelled = r"Hi<\|end_of_turn|>"
    spelled += "\n GPT4 Assistant:\ufffd Sure" + r"<\/s><\s><\|end_of_turn|>" + "\ufffdw=1"
    end = f"{spelled}{EOT}\n GPT4 Assistant:⟦ Ho{EOT}⟧w=1"
    assert text == f"<s> GPT4 User: {end}"


def test_the_command_says_errors_without_a_traceback(stories, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"), b"{")
    command = [sys.executable, ROOT / "data.py", path, "--model", stories]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith(f"error: 1 bad line:\n{path}:2: broken JSON")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["gone.jsonl"], "error: gone.jsonl: cannot be read: No such file or directory"),
        (["{data}", "--classes", "{tmp}/gone.json"], "gone.json"),
        (["{data}", "--classes", "{tmp}/classes.json"], "classes.json: "),
        (["{data}", "--model", "{tmp}"], "tokenizer.model: not found"),
        (["{data}", "--max-length", "0"], "--max-length"),
        (["{data}", "--max-length", "9000"], "--max-length <= --batch-tokens"),
        (["{data}", "--max-length", "513"], "error: --max-length must be within the model's 512"),
        (["{data}", "--beta", "0"], "beta must be a number above 0, not 0.0"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(flags, message, stories, run, tmp_path):
    path = write(tmp_path / "a.jsonl", line("Hi", "Ho"))
    (tmp_path / "classes.json").write_text('{"gpt4": {"condition": "GPT4"}}')
    flags = [flag.format(data=path, tmp=tmp_path) for flag in flags]
    given = [] if "--model" in flags else ["--model", stories]
    code, _, err = run(preview.main, *given, *flags)
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_ten_times_the_data_takes_no_more_memory(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "BLOCK", 30_000)
    peaks = []
    for copies in (150, 1500):
        path = write(tmp_path / f"{copies}.jsonl", *[line("Hi " * 100, "Ho " * 400)] * copies)
        tracemalloc.start()
        prepare(path, max_length=20_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_progress_is_quiet_for_a_short_file(capsys):
    progress = report.Progress("tokenizing")
    progress(1, 2, 3)
    assert capsys.readouterr().err == ""
    progress.started = time.time() - 10
    progress(1, 2, 3)
    assert capsys.readouterr().err.startswith("tokenizing [######      ]  50%  0:00:10 left  3 ")


def test_arrays_are_summed_in_flat_memory(tmp_path):
    """512 MB of zeros that take no room on the disk, in a process of their own."""
    for name in dataset_module.ARRAYS:
        (tmp_path / f"{name}.bin").write_bytes(b"")
    os.truncate(tmp_path / "tokens.bin", 512 << 20)
    code = """
import resource, sys, pathlib
from support import dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sums = dataset._checksums(pathlib.Path(sys.argv[1]), {})
print(sums["tokens"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, tmp_path]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    value, grown = map(int, shown.split())
    assert value == zlib.crc32(bytes(512 << 20))
    assert grown < (64 << 20) / (1 if sys.platform == "darwin" else 1024)
