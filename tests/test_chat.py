"""chat.py: the text the model means, one token at a time; files, terminal and limits."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from small import write

import chat
import data
import loss
import model
from support import report

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    "grouped heads": {},
    "multi-head": {"num_key_value_heads": 4},
    "window": {"model_type": "mistral", "sliding_window": 6},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


def random_llama(context=64, **changes):
    """A network whose likeliest token depends on all that it sees."""
    changes |= {"num_hidden_layers": 2, "max_position_embeddings": context}
    return small.random_llama(std=0.3, **changes).eval()


PROMPTS = [[7, 3, 9, 20, 41], [1], [5, 4, 3, 2, 1, 50, 49, 48, 47, 46, 45, 44], [8, 8]]


def generated(llama, prompts, count, **options):
    """B lists of new tokens."""
    steps = list(chat.generate(llama, prompts, count, **options))
    return [[token for token in column if token is not None] for column in zip(*steps, strict=True)]


@torch.no_grad()
def recomputed(llama, prompt, count):
    """The likeliest tokens, the whole text run again for each; at the margin of a tie, an error."""
    text = list(prompt)
    for _ in range(count):
        positions = torch.arange(len(text))
        logits = llama(torch.tensor(text), positions, torch.tensor([0, len(text)]).int())[-1]
        best, second = logits.topk(2).values.tolist()
        assert best - second > 1e-4
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


# ----------------------------------------------------------------------------------- generation


def test_greedy_text_of_stories260k_is_what_llama2c_prints(stories):
    llama, tokenizer = model.load(stories).eval(), data.Tokenizer(stories)
    (tokens,) = generated(llama, [[tokenizer.bos]], 200)
    assert len(tokens) == 200
    assert tokenizer.decode(tokens) == (stories / "greedy.txt").read_text().rstrip("\n")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_gives_what_the_whole_text_gives(name):
    llama = random_llama(**VARIANTS[name])
    for prompt in PROMPTS:
        assert generated(llama, [prompt], 20) == [recomputed(llama, prompt, 20)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_gives_each_prompt_what_it_gets_alone(name):
    llama = random_llama(**VARIANTS[name])
    together = generated(llama, PROMPTS, 20)
    assert together == [generated(llama, [prompt], 20)[0] for prompt in PROMPTS]
    assert generated(llama, PROMPTS[::-1], 20) == together[::-1]


def test_a_stop_token_ends_its_prompt_alone_and_is_the_last():
    llama = random_llama()
    free = generated(llama, PROMPTS, 20)
    stop = next(token for token in free[0][3:] if token not in free[0][:3])
    cut = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
    assert 3 < len(cut[0]) < 20 and any(len(tokens) == 20 for tokens in cut)
    assert generated(llama, PROMPTS, 20, stop={stop}) == cut


def test_nothing_runs_on_after_all_have_stopped():
    llama = random_llama()
    free = generated(llama, [[7, 3]], 20)[0]
    steps = list(chat.generate(llama, [[7, 3]] * 2, 20, stop={free[2]}))
    assert steps == [[token] * 2 for token in free[:3]]


@pytest.mark.parametrize("context", [15, 30])
def test_a_prompt_ends_where_the_context_is_full_and_the_others_go_on(context):
    llama, wide = random_llama(context), random_llama(context=256)
    together = generated(llama, PROMPTS, 100)
    assert [len(tokens) for tokens in together] == [context - len(p) for p in PROMPTS]
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        assert tokens == generated(wide, [prompt], len(tokens))[0]


def test_a_prompt_as_long_as_the_context_gets_one_token():
    llama = random_llama(context=12)
    assert [len(tokens) for tokens in generated(llama, [PROMPTS[2]], 5)] == [1]


@pytest.mark.parametrize("prompts", [[[1] * 13], [[1], [2] * 13], [[]], [[1], []]])
def test_a_prompt_longer_than_the_context_or_empty_is_refused(prompts):
    llama = random_llama(context=12)
    longest = max(map(len, prompts))
    message = f"a prompt has {longest} tokens, the model's context is 12"
    with pytest.raises(ValueError, match=message if longest > 12 else "a prompt has 0 tokens"):
        generated(llama, prompts, 5)


def test_sampling_repeats_with_its_seed_and_differs_without():
    llama = random_llama()
    options = {"temperature": 1.0, "top_p": 0.9}
    runs = [generated(llama, PROMPTS, 20, seed=seed, **options) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0] != generated(llama, PROMPTS, 20)


def test_sampling_has_the_probabilities_of_temperature_and_top_p():
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    logits = (2.0 * probabilities.log()).expand(40_000, 5)

    def shares(top_p):
        generator = torch.Generator().manual_seed(0)
        tokens = chat.sample(logits, 2.0, top_p, generator)  # temperature 2 halves the logits
        return (tokens.bincount(minlength=5) / len(tokens)).tolist()

    assert shares(1.0) == pytest.approx(probabilities.tolist(), abs=0.01)
    assert shares(0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.01)
    assert shares(0.71) == pytest.approx([0, 8 / 17, 3 / 17, 6 / 17, 0], abs=0.01)
    assert shares(1e-6) == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_the_least_temperature_takes_the_likeliest_token(temperature):
    logits, generator = torch.tensor([[1.0, 3.0, -2.0]]), torch.Generator()
    assert chat.sample(logits, temperature, 1.0, generator).tolist() == [1]


# ---------------------------------------------------------------------------- exported folders


def export(stories, folder, conditioned=True, **more):
    """stories260K with an end-of-turn token, as train.py writes a model."""
    tokenizer = data.Tokenizer(stories)
    config = model.LlamaConfig.from_folder(stories)
    config = dataclasses.replace(
        config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eot
    )
    llama = model.Llama(config)
    model.fill_parameters(llama, stories, new_rows=1)
    return small.export(llama, tokenizer, folder, conditioned, **more)


@pytest.fixture(scope="module")
def folder(stories, tmp_path_factory):
    return export(stories, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def talker(folder):
    return chat.Chat(folder, device="cpu")


def user(text):
    return data.Message("user", text)


def test_the_expert_condition_is_the_default_and_class_names_another(folder, talker):
    other = chat.Chat(folder, "gpt3.5", device="cpu")
    assert [of.prefix(of.class_name, "user") for of in (talker, other)] == [
        "GPT4 User:", "GPT3 User:"
    ]  # fmt: skip
    prompt = talker.prompt([user("Hi"), data.Message("assistant", "Ho"), user("Ha")])
    text = "GPT4 User: Hi<|end_of_turn|>GPT4 Assistant: Ho<|end_of_turn|>GPT4 User: Ha"
    shown = report.visible(prompt, talker.tokenizer)
    turns = f"<s> {text}<|end_of_turn|>GPT4 Assistant:"
    assert shown == turns.replace("|>GPT4", "|>\n GPT4")
    with pytest.raises(ValueError, match="--class 'gpt5' is not one of gpt4, gpt3.5"):
        chat.Chat(folder, "gpt5", device="cpu")


def test_a_model_trained_without_condition_is_asked_without(stories, tmp_path):
    talker = chat.Chat(export(stories, tmp_path / "bare", conditioned=False), device="cpu")
    shown = report.visible(talker.prompt([user("Hi")]), talker.tokenizer)
    assert shown == "<s> User: Hi<|end_of_turn|>\n Assistant:"


@pytest.mark.parametrize("name, condition", [("gpt4", "GPT4"), ("gpt3.5", "GPT3")])
def test_transformers_generates_the_same_answer(name, condition, folder):
    """By the lines of docs/SERVING.md."""
    transformers = pytest.importorskip("transformers")
    page = (ROOT / "docs" / "SERVING.md").read_text()
    (lines,) = re.findall(r"```python\n(inputs = .*?)```", page, re.DOTALL)
    names = {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
        "model": transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "messages": [{"role": "user", "content": "Tell me of a big red ball."}],
    }
    exec(lines.replace('"GPT3"', f'"{condition}"'), names)
    talker = chat.Chat(folder, name, device="cpu")
    ((ours, _),) = talker.answers([[user("Tell me of a big red ball.")]], max_new_tokens=100)
    assert ours == names["answer"].strip() and len(ours) > 50


def test_answers_say_whether_the_model_ended_them(talker, monkeypatch):
    eot, eos = talker.tokenizer.eot, talker.tokenizer.eos
    words = talker.tokenizer.encode("Yes")
    ends = [[*words, eot], [*words, eos], [*words, words[0]]]
    padded = [[row[i] if i < len(row) else None for row in ends] for i in range(len(words) + 1)]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: iter(padded))
    answers = talker.answers([[user("Hi")]] * 3)
    assert answers[:2] == [("Yes", True)] * 2 and answers[2][1] is False


@pytest.mark.parametrize("text", ["Hi 😀 there", "日本語", "é", "a\n b"])
def test_streaming_waits_for_whole_characters(text, talker, monkeypatch):
    tokens = [*talker.tokenizer.encode(text), talker.tokenizer.eot]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: iter([[t] for t in tokens]))
    pieces = list(talker.stream([user("Hi")]))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert text != "Hi 😀 there" or len([piece for piece in pieces if piece]) > 4


def test_a_character_cut_by_the_limit_is_still_shown_in_the_end(talker, monkeypatch, capsys):
    tokens = talker.tokenizer.encode("a😀")[:-1]
    monkeypatch.setattr(chat, "generate", lambda *_, **__: iter([[t] for t in tokens]))
    assert "".join(talker.stream([user("Hi")])).startswith("a\ufffd")
    assert f"[cut after {len(tokens)} tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the command line


def test_one_prompt_prints_the_answer_alone(folder, talker, run):
    code, out, err = run(chat.main, folder, "--prompt", "A big red ball", "--max-new-tokens", "30")
    ((expected, ended),) = talker.answers([[user("A big red ball")]], max_new_tokens=30)
    assert (code, out) == (0, expected + "\n")
    assert ended or "[cut after 30 tokens: --max-new-tokens or the model's context]" in err


def asked(*texts, **more):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages} | more


def test_a_batch_file_comes_back_with_the_answers_appended(folder, talker, run, tmp_path):
    lines = [asked(f"Story {n} of a ball " * (n % 3 + 1), id=n, note="é\u2028") for n in range(18)]
    lines.append(asked("Hi", "Ho", "Ha", **{"class": "gpt3.5"}))
    source, target = (
        write(tmp_path / "in.jsonl", *lines[:3], b"", *lines[3:]),
        tmp_path / "out.jsonl",
    )
    code, out, err = run(chat.main, folder, "--batch", source, "--to", target,
                         "--max-new-tokens", "8")  # fmt: skip
    assert (code, out) == (0, "") and "19/19 answered, 3 of these cut at the maximum length" in err
    answered = [json.loads(text) for text in target.read_text("utf-8").split("\n")[:-1]]
    assert len(answered) == 19
    for before, after in zip(lines, answered, strict=True):
        messages = [data.Message(m["role"], m["content"]) for m in before["messages"]]
        ((text, _),) = talker.answers([messages], max_new_tokens=8)
        turn = {"role": "assistant", "content": text}
        assert after == before | {"messages": [*before["messages"], turn]}


def answer_lines(run, folder, source, target, *flags):
    flags = ["--batch", source, "--to", target, "--max-new-tokens", "4", *flags]
    code, _, err = run(chat.main, folder, *flags)
    assert code == 0, err
    return target.read_bytes().splitlines(True)


SAMPLED = ["--temperature", "1", "--seed", "5"]


@pytest.mark.parametrize(
    "kept, torn", [(0, 0), (1, 0), (1, 70), (16, 0), (16, 9), (17, 70), (20, 0)]
)
def test_a_batch_that_was_cut_short_goes_on_to_what_it_would_have_been(
    kept, torn, folder, run, tmp_path, monkeypatch
):
    """Sampled too, where an answer depends on its seed and on what is answered beside it."""
    texts = [f"Story {n} of a ball" for n in range(20)]
    shapes = [asked, lambda text, id: {"id": id, "instruction": text, "output": "", "system": "Be"},
              lambda text, id: {"messages": None, "id": id, "conversation": [text]}]  # fmt: skip
    lines = [shapes[n % 3](text, id=n) for n, text in enumerate(texts)]
    source = write(tmp_path / "in.jsonl", *lines)
    whole = answer_lines(run, folder, source, tmp_path / "whole", *SAMPLED)
    written = b"".join(whole[:kept]) + b"".join(whole[kept : kept + 1])[:torn]
    (target := tmp_path / "cut").write_bytes(written)
    counted, real = [], chat.Chat.answers
    monkeypatch.setattr(
        chat.Chat, "answers", lambda *a, **o: counted.append(len(a[1])) or real(*a, **o)
    )
    assert answer_lines(run, folder, source, target, *SAMPLED) == whole
    assert sum(counted) == {0: 20, 1: 20, 16: 4, 17: 4, 20: 0}[kept]


def test_answers_are_in_the_file_when_the_next_are_begun(folder, run, tmp_path, monkeypatch):
    source, target = write(tmp_path / "in", *[asked("Hi")] * 40), tmp_path / "out.jsonl"
    written, real = [], chat.Chat.answers

    def answers(*arguments, **options):
        written.append(len(target.read_bytes().splitlines()))
        return real(*arguments, **options)

    monkeypatch.setattr(chat.Chat, "answers", answers)
    answer_lines(run, folder, source, target)
    assert written == [0, 16, 32]


def test_every_key_beside_a_conversation_is_kept_and_its_turns_come_as_messages(
    folder, run, tmp_path
):
    beside = {"id": [1, {"é": None}], "class": "gpt4", "weight": 0.5, "items_count": 2, "note": ""}
    system = {"role": "system", "content": "Be kind"}
    turns = [{"from": "human", "value": [{"type": "text", "text": "Hi"}], "name": "x"}]
    lines = [
        beside | {"conversations": turns, "system": "Be kind", "conversation": "id1"},
        {"messages": None, "items": [{"role": "developer", "content": "Be kind"}, *turns]} | beside,
        beside | {"prompt": "Hi", "system_prompt": "Be kind", "response": None, "input": ""},
    ]
    written = answer_lines(run, folder, write(tmp_path / "in", *lines), tmp_path / "out")
    for line, more in zip(written, ({"conversation": "id1"}, {}, {}), strict=True):
        found = json.loads(line)
        answer = found["messages"].pop()
        assert answer.keys() == {"role", "content"} and answer["role"] == "assistant"
        messages = [system, {"role": "user", "content": "Hi"}]
        assert found == beside | more | {"messages": messages}


@pytest.mark.parametrize(
    "content",
    [
        b"precious",
        b"precious\n",
        b'{"messages": [{"role": "user", "content": "Other"}',
        b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
        b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}], '
        b'"id": 1}\n',
        b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}, '
        b'{"role": "user", "content": "More"}]}\n',
        2 * b'{"messages": [{"role": "user", "content": "Hi"}, '
        b'{"role": "assistant", "content": "A"}]}\n',
    ],
)
def test_a_batch_never_overwrites_what_is_not_its_own(content, folder, run, tmp_path):
    source, target = write(tmp_path / "in.jsonl", asked("Hi")), tmp_path / "out.jsonl"
    target.write_bytes(content)
    code, _, err = run(chat.main, folder, "--batch", source, "--to", target)
    message = f"error: {target} exists, and does not hold the first answers to these lines\n"
    assert (code, err, target.read_bytes()) == (1, message, content)


def test_a_batch_reads_what_train_reads(folder, run, tmp_path):
    questions = [asked("Hi"), {"instruction": "Hi", "output": ""}, {"conversations": ["Hi"]}]
    source = tmp_path / "in.json.gz"
    source.write_bytes(gzip.compress(json.dumps(questions, indent=1).encode()))
    written = answer_lines(run, folder, source, tmp_path / "out.jsonl")
    (text,) = {json.loads(written[0])["messages"][1]["content"]}
    assert written == written[:1] * 3 and json.loads(written[0]) == asked("Hi", text)


def test_a_last_answer_can_be_replaced(folder, run, tmp_path):
    """In each shape an answer may have; what has none is answered as ever."""
    bare = [asked("Hi"), asked("Hi", "Ho", "Ha"), {"question": "Hi", "response": ""}]
    bare += [{"instruction": "Hi", "output": ""}, {"conversations": ["Hi"]}, asked("Hi")]
    old = [asked("Hi", "Old"), asked("Hi", "Ho", "Ha", "Old")]
    old += [{"question": "Hi", "response": "Old"}, {"instruction": "Hi", "output": "Old"}]
    old += [{"conversations": ["Hi", "Old"]}, asked("Hi")]
    expected = answer_lines(run, folder, write(tmp_path / "bare", *bare), tmp_path / "a")
    assert json.loads(expected[2]).keys() == {"messages"}
    source = write(tmp_path / "old", *old)
    assert answer_lines(run, folder, source, tmp_path / "b", "--drop-last-answer") == expected
    again = ["--batch", source, "--to", tmp_path / "b", "--drop-last-answer"]
    code, _, err = run(chat.main, folder, *again, "--class", "gpt3.5")  # who answered is unknown
    assert code == 0 and (tmp_path / "b").read_bytes().splitlines(True) == expected
    assert f"6/6 were answered in {tmp_path / 'b'}; remove it to answer again\n" in err
    code, _, err = run(chat.main, folder, "--batch", source, "--to", tmp_path / "c")
    assert code == 1 and err.startswith(f"error: {source}:1: the last message must be the user's")
    assert "(see --drop-last-answer)" in err


def test_keys_that_may_describe_a_dropped_answer_are_named(folder, run, tmp_path):
    alpaca = {"instruction": "Hi", "output": "Old", "generator": "davinci", "dataset": "x"}
    rated = asked("Hi", "Old", model_id="m", id=1, score=0.5)
    bare = asked("Hi", **{"model": "not of an answer", "class": "gpt4"})
    source = write(tmp_path / "in", alpaca, rated, bare, alpaca)
    flags = ["--batch", source, "--to", tmp_path / "out", "--drop-last-answer"]
    code, _, err = run(chat.main, folder, *flags, "--max-new-tokens", "2")
    note = "note: kept, though some may describe the old answers: "
    assert code == 0 and f"{note}class, dataset, generator, id, model, model_id, score\n" in err
    kept = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert kept[0]["generator"] == "davinci" and kept[1]["model_id"] == "m"
    flags = ["--batch", write(tmp_path / "bare", bare), "--to", tmp_path / "b"]
    assert "note" not in run(chat.main, folder, *flags, "--max-new-tokens", "2")[2]


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_a_batch_into_its_own_file_is_refused_before_anything(link, run, tmp_path):
    source = target = write(tmp_path / "in.jsonl", asked("Hi", "Ho"))
    before = source.read_bytes()
    if link:
        link(source, target := tmp_path / "out.jsonl")
    for pair in ((source, target), (target, source)):
        flags = ["--batch", pair[0], "--to", pair[1], "--drop-last-answer"]
        code, _, err = run(chat.main, tmp_path / "no model", *flags)
        assert (code, err) == (2, "error: --to is the file of --batch: give a new one\n")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "broken JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "broken JSON: maximum recursion depth"),
        (b"[]", "a line must be a JSON object, not an empty list"),
        ({"items": []}, "'items' must be a list of messages, not an empty list"),
        ({"item": []}, "no conversation: one of 'messages'"),
        ({"messages": {}}, "'messages' must be a list of messages, not an object"),
        ({"messages": []}, "'messages' must be a list of messages, not an empty list"),
        (
            {"messages": [{"role": "system", "content": "Be"}]},
            "the last message must be the user's",
        ),
        (asked("Hi", "Ho"), "the last message must be the user's"),
        ({"messages": [{"role": "judge", "content": "Hi"}]}, "message 1: 'role' is 'judge'"),
        (asked("Hi", "Ho", "\ud800"), "message 3: 'content' has a lone surrogate"),
        (asked(""), "empty user message"),
        (asked("ball " * 600), "tokens, the model's context is 512"),
        (b'"' + b"x" * (17 << 20) + b'"', "longer than 16 MiB"),
        (asked("Hi", id="\ud800"), "surrogates not allowed"),
    ],
    ids=[str(i) for i in range(16)],
)
def test_a_bad_line_of_a_batch_is_named_before_anything_is_written(
    bad, message, folder, run, tmp_path
):
    source, target = write(tmp_path / "in.jsonl", asked("Hi"), b"", bad), tmp_path / "out.jsonl"
    code, _, err = run(chat.main, folder, "--batch", source, "--to", target)
    assert code == 1 and not target.exists()
    assert err.startswith(f"error: {source}:3: ") and message in err and err.count("\n") == 1


@pytest.fixture
def asked_of_model(talker, monkeypatch):
    """[(class, [(role, text) ...])] of what is asked at the terminal; "An answer" to all."""
    asked = []

    def stream(messages, name, **options):
        asked.append((name, [(m.role, m.content) for m in messages]))
        return iter(["An ", "answer"])

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    monkeypatch.setattr(talker, "class_name", "gpt4")
    return asked


ANSWER = ("assistant", "An answer")
NOT_DONE = "[not done; /help lists the commands; classes: gpt4, gpt3.5]\n"


def questions(*texts):
    """What is asked of the model with the last of these, all others answered."""
    first, *others = [("user", text) for text in texts]
    return [first, *(turn for user in others for turn in (ANSWER, user))]


def test_a_conversation_at_the_terminal(folder, run, asked_of_model):
    stdin = "Hi\n\n  \nMore\n/new\n /new what?\n/quit\nnever\n"
    code, out, _ = run(chat.main, folder, stdin=stdin)
    assert code == 0 and out.count("An answer\n") == 3
    expected = [questions("Hi"), questions("Hi", "More"), questions("/new what?")]
    assert asked_of_model == [("gpt4", of) for of in expected]


def test_the_banner_says_what_answers_and_how(folder, run):
    _, out, _ = run(chat.main, folder, "--class", "gpt3.5", stdin="")
    first, second, third, *_ = out.splitlines()
    assert first == f"{folder}: 0.3M parameters, context 512 tokens"
    assert second == 'class gpt3.5, asked as "GPT3 User: ..."; others: gpt4'
    assert third == "/help lists the commands, Ctrl-D ends"


def test_class_takes_another_condition_and_the_conversation_goes_on(folder, run, asked_of_model):
    stdin = "Hi\n/class gpt3.5\nMore\n/class gpt5\n/class\nStill\n"
    _, out, _ = run(chat.main, folder, stdin=stdin)
    assert 'class gpt3.5, asked as "GPT3 User: ..."; others: gpt4\n' in out
    assert out.count(NOT_DONE) == 2
    asked = [questions(*of) for of in (["Hi"], ["Hi", "More"], ["Hi", "More", "Still"])]
    assert asked_of_model == list(zip(["gpt4", "gpt3.5", "gpt3.5"], asked, strict=True))


def test_both_asks_the_same_under_each_condition_and_keeps_that_in_force(
    folder, run, asked_of_model
):
    stdin = "/both\n/class gpt3.5\n/both Hi\nMore\n/both\n/both Still\n"
    _, out, _ = run(chat.main, folder, stdin=stdin)
    assert out.count(NOT_DONE) == 1
    assert out.count("> GPT3 Assistant: An answer\nGPT4 Assistant: An answer\n") == 3
    hi, more, still = questions("Hi"), questions("Hi", "More"), questions("Hi", "More", "Still")
    asked = [(name, of) for of in (hi, more, still) for name in ("gpt3.5", "gpt4")]
    asked.insert(2, ("gpt3.5", more))
    assert asked_of_model == asked


def test_both_conditions_give_what_each_gives_alone(folder, talker, run):
    _, out, _ = run(chat.main, folder, "--max-new-tokens", "20", stdin="/both A big red ball\n")
    for name, label in (("gpt4", "GPT4 Assistant: "), ("gpt3.5", "GPT3 Assistant: ")):
        alone = chat.Chat(folder, name, device="cpu")
        ((text, _),) = alone.answers([[user("A big red ball")]], max_new_tokens=20)
        assert f"{label}{text}\n" in out


def test_a_system_message_comes_before_all_turns_until_it_is_removed(folder, run, asked_of_model):
    stdin = "Hi\n/system Be kind.\nMore\n/both\n/new\nHa\n/system\nStill\n"
    _, out, _ = run(chat.main, folder, stdin=stdin)
    assert "> [for all turns; /system removes it]\n" in out and "> [no system message]\n" in out
    system = ("system", "Be kind.")
    more, ha = [system, *questions("Hi", "More")], [system, ("user", "Ha")]
    assert asked_of_model == [
        ("gpt4", questions("Hi")), ("gpt4", more), ("gpt4", more), ("gpt3.5", more), ("gpt4", ha),
        ("gpt4", questions("Ha", "Still")),
    ]  # fmt: skip


def test_a_model_is_given_the_system_message_as_in_training(folder, talker, run):
    turns = [data.Message("system", "Be kind."), user("A big red ball")]
    ((text, _),) = talker.answers([turns], max_new_tokens=9)
    stdin = "/system Be kind.\nA big red ball\n"
    _, out, _ = run(chat.main, folder, "--max-new-tokens", "9", stdin=stdin)
    assert f"> {text}\n" in out
    line = {"class": "gpt4", "messages": [m._asdict() for m in turns]}
    line["messages"] = [{"role": m.role, "content": m.content} for m in turns]
    line["messages"].append({"role": "assistant", "content": "Yes"})
    trained, _ = data.encode(line, talker.tokenizer, talker.export.classes)
    prompt = talker.prompt(turns)
    assert trained[: len(prompt)] == prompt


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in a UTF-8 and a C locale
def test_bytes_that_are_not_utf8_are_asked_as_a_replacement(errors, folder, run, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"Hi\n\xff\n/system \xff\nHi\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = run(chat.main, folder, "--max-new-tokens", "2")
    assert code == 0 and "error" not in err and out.count("> ") == 5
    assert run(chat.main, folder, "--prompt", "\udcff", "--max-new-tokens", "2")[0] == 0


@pytest.mark.parametrize("command", ["/exit", "/quit", "quit", "exit"])
def test_words_that_end_it(command, folder, run, asked_of_model):
    assert run(chat.main, folder, stdin=f"{command}\nnever\n")[0] == 0 and not asked_of_model


def test_an_unknown_command_is_not_asked(folder, run, asked_of_model):
    _, out, _ = run(chat.main, folder, stdin="/reset\n/new x\n/\n/help\n")
    assert out.count(NOT_DONE) == 3 and not asked_of_model
    assert all(f"\n{word} " in out.replace("> ", "\n") for word in ("/class", "/both", "/quit"))


def test_a_model_of_single_questions_is_asked_each_afresh_and_says_so(stories, run, tmp_path):
    folder = export(stories, tmp_path / "single", most_answers=1)
    _, out, _ = run(chat.main, folder, "--max-new-tokens", "9", stdin="Hi\nA big ball\n")
    assert "trained on single questions: each is asked without the earlier ones" in out
    talker = chat.Chat(folder, device="cpu")
    ((text, _),) = talker.answers([[user("A big ball")]], max_new_tokens=9)
    assert f"> {text}\n" in out and "forgotten" not in out
    assert talker.fitting([user("Hi"), *[data.Message(*ANSWER), user("Ha")]], 9) == [user("Ha")]
    several = chat.Chat(export(stories, tmp_path / "more", most_answers=2), device="cpu")
    assert len(several.fitting([user("Hi"), data.Message(*ANSWER), user("Ha")], 9)) == 3


LONG, LONGER = ("word " * 70).strip(), ("time " * 190).strip()  # together beyond 512 tokens


@pytest.mark.parametrize("said, kept", [((LONG, "Hi", LONGER), 2), (("Hi", LONG, LONGER), 1)])
def test_a_full_context_forgets_questions_with_their_answers_and_no_more_than_needed(
    said, kept, folder, run, asked_of_model
):
    code, out, _ = run(chat.main, folder, stdin="\n".join(said) + "\n")
    assert code == 0
    assert out.count("[the context is full: the oldest turns are forgotten]\n") == 1
    assert asked_of_model[-1] == ("gpt4", questions(*said[-kept:]))


@pytest.mark.parametrize("most, room", [(512, 128), (20, 20)])
def test_the_oldest_turns_go_before_an_answer_has_no_room(most, room, talker):
    turns = [user("word"), data.Message(*ANSWER)]
    conversation = [*turns * 200, user("Hi")]
    kept = talker.fitting(conversation, most)
    left = [512 - len(talker.prompt(of)) for of in (kept, [*turns, *kept])]
    assert left[0] >= room > left[1] and kept[-1] == user("Hi") and len(kept) % 2
    alone = [user("word " * 158)]  # takes the room itself, where it must
    assert 0 < 512 - len(talker.prompt(alone)) < room
    assert talker.fitting([*turns, *alone], most) == alone


def test_kept_turns_have_room_under_every_condition(sums, tmp_path):
    """/both and --web ask the same under each, and one condition may be far longer."""
    tokenizer = data.Tokenizer(sums)
    llama = random_llama(context=128, vocab_size=tokenizer.vocab_size)
    classes = {"a": loss.SourceClass("A", 1.0), "b": loss.SourceClass("B " * 9 + "B", 0.0)}
    folder = small.export(llama, tokenizer, tmp_path / "model", classes=classes)
    talker = chat.Chat(folder, device="cpu")

    def left(messages):
        return [128 - len(talker.prompt(messages, name)) for name in classes]

    turns, forgotten = [user("1 + 2"), data.Message("assistant", "3")], set()
    for count in range(15):
        asked = [*turns * count, user("1 + 2")]
        kept = talker.fitting(asked, 8)
        assert kept == asked[-len(kept) :] and left(kept)[0] > left(kept)[1] >= 8
        assert kept == asked or left([*turns, *kept])[1] < 8
        forgotten.add(len(asked) - len(kept))
    assert {0, 2} < forgotten


def test_what_is_kept_is_the_longest_end_of_a_conversation_that_fits(talker, monkeypatch):
    """By trying every end of conversations at random, with a system message and without."""
    rng, several = random.Random(3), 0
    for _ in range(40):
        monkeypatch.setattr(talker, "context", rng.randrange(20, 200))
        most, count = rng.randrange(1, 80), 2 * rng.randrange(6) + 1
        words = ["ball " * rng.randrange(1, 12) for _ in range(count)]
        turns = [data.Message(("user", "assistant")[i % 2], text) for i, text in enumerate(words)]
        system = [data.Message("system", "Be kind")] * rng.randrange(2)

        def fits(kept, system=system, most=most):
            length = max(len(talker.prompt([*system, *kept], name)) for name in talker.names)
            room = min(most, talker.context // 4) if len(kept) > 1 else 1
            return length + room <= talker.context

        ends = [turns[start:] for start in range(0, count, 2)]
        expected = next(([*system, *kept] for kept in ends if fits(kept)), [])
        assert talker.fitting([*system, *turns], most) == expected
        several += 1 < len(expected) < count
    assert several > 5


@pytest.mark.parametrize("turns", [10_001, 40_001])
def test_turns_that_cannot_fit_cost_no_tokenizing(turns, talker, monkeypatch):
    kind, encoded = type(talker.tokenizer), []
    real = kind.encode
    monkeypatch.setattr(kind, "encode", lambda *of: encoded.append(of[1]) or real(*of))
    earlier = [user("a"), data.Message("assistant", "b")] * (turns // 2)
    kept = talker.fitting([*earlier, user("c")], 9)
    assert kept[-1] == user("c") and 20 < len(kept) < 100
    assert len(encoded) < 10 * len(kept)


def test_a_question_needs_room_for_one_token_of_an_answer(talker, monkeypatch):
    question = [user("Hi")]
    length = max(len(talker.prompt(question, name)) for name in talker.names)
    for context, kept in ((length + 1, question), (length, [])):
        monkeypatch.setattr(talker, "context", context)
        assert talker.fitting(question, 9) == kept


def test_what_never_fits_is_not_sent_and_the_conversation_goes_on(folder, run, asked_of_model):
    code, out, _ = run(chat.main, folder, stdin="Hi\n" + "word " * 999 + "\nMore\n")
    assert code == 0
    assert out.count("[too long for the context of 512 tokens; not sent]\n") == 1
    assert asked_of_model == [("gpt4", questions("Hi")), ("gpt4", questions("Hi", "More"))]


def test_what_is_said_of_a_cut_answer_is_no_part_of_the_conversation(folder, run, monkeypatch):
    prompts, real = [], chat.Chat.stream

    def stream(self, messages, *name, **options):
        prompts.append(messages[:])
        return real(self, messages, *name, **options)

    monkeypatch.setattr(chat.Chat, "stream", stream)
    flags = ["--max-new-tokens", "3"]
    code, out, err = run(chat.main, folder, *flags, stdin="Hi\nMore\n")
    assert code == 0 and err.count("[cut after 3 tokens") == 2
    assert [m.role for m in prompts[1]] == ["user", "assistant", "user"]
    assert "cut after" not in prompts[1][1].content and prompts[1][1].content in out


def test_ctrl_c_keeps_what_was_said(folder, talker, run, monkeypatch):
    said = []

    def stream(messages, name, **options):
        said.append([m.content for m in messages])
        yield "Half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    code, out, _ = run(chat.main, folder, stdin="Hi\nMore\n/both Still\n")
    assert code == 0 and out.count("Half [stopped]\n") == 3  # one of /both ends the others too
    assert said[1] == ["Hi", "Half", "More"]


def test_ctrl_c_before_the_first_token_stops_no_more_than_the_answer(folder, run, monkeypatch):
    talker, asked = chat.Chat(folder, device="cpu"), []

    def fitting(messages, room):
        asked.append(messages[-1].content)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "fitting", fitting)
    code, out, _ = run(chat.main, folder, stdin="Hi\nMore\n/both Ha\n")
    assert code == 0 and out.count(" [stopped]\n") == 3 and asked == ["Hi", "More", "Ha"]


def test_ctrl_c_at_the_prompt_ends(folder, run, asked_of_model, monkeypatch):
    keys = iter(["Hi", None])

    def typing(_):
        if (key := next(keys)) is None:
            raise KeyboardInterrupt
        return key

    monkeypatch.setattr("builtins.input", typing)
    code, out, _ = run(chat.main, folder)
    assert code == 0 and len(asked_of_model) == 1 and out.endswith("An answer\n\n")


def test_a_terminal_has_history_and_takes_a_paste_of_many_lines_as_one_question(tmp_path):
    """In a pseudo-terminal, with a model that says what it is asked."""
    pytest.importorskip("readline")
    (tmp_path / "echo.py").write_text(ECHO)
    pid, terminal = pty.fork()
    if pid == 0:
        # A shell's "&" has SIGINT ignored, and a program started so keeps it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), "INPUTRC": "/dev/null"}
        os.execv(sys.executable, [sys.executable, str(tmp_path / "echo.py")])
    shown = b""

    def type_and_wait(keys, awaited):
        nonlocal shown
        os.write(terminal, keys)
        while awaited not in shown:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 4096)
        before, _, shown = shown.partition(awaited)
        return before

    type_and_wait(b"", b"\x1b[?2004h> ")  # asks the terminal to bracket what is pasted
    type_and_wait(b"\x1b[200~one\ntwo\x1b[201~\r", b"asked 'one\\ntwo'")
    type_and_wait(b"\x1b[A\x1b[D!\r", b"asked 'one\\ntw!o'")  # up, left
    type_and_wait(b"", b"> ")
    type_and_wait(b"/both\r", b"GPT3 Assistant: asked 'one\\ntw!o'")
    type_and_wait(b"", b"> ")
    type_and_wait(b"slow\r", b"one ")
    os.write(terminal, b"\x03")
    type_and_wait(b"", b" [stopped]\r\n")
    type_and_wait(b"", b"> ")
    time.sleep(0.5)  # the prompt is shown just before Python waits for keys and signals
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # at its end; what nobody reads would hold it up
        while select.select([terminal], [], [], 60)[0] and os.read(terminal, 4096):
            pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


ECHO = """
import time
from types import SimpleNamespace

from support.terminal import converse, guard_terminal

def stream(messages, name, **_):
    question = messages[-1].content
    yield "asked "
    for word in ("one ", "two ", "three") if question == "slow" else [repr(question)]:
        yield word
        time.sleep(0.4 * (question == "slow"))

guard_terminal()

conditions = {"gpt4": "GPT4", "gpt3.5": "GPT3"}
config = SimpleNamespace(parameter_count=lambda: 0)
chat = SimpleNamespace(
    folder="echo", context=100, single=True, class_name="gpt4", names=list(conditions),
    prefix=lambda name, role: f"{conditions[name]} {role.title()}:",
    llama=SimpleNamespace(config=config),
    fitting=lambda messages, _: messages[-1:],
    stream=stream,
)
converse(chat, {"max_new_tokens": 9})
"""


def test_ctrl_c_of_one_answer_ends_without_a_traceback(folder, talker, run, monkeypatch):
    def stream(messages, **options):
        yield "Half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    code, out, _ = run(chat.main, folder, "--prompt", "Hi")
    assert (code, out) == (130, "Half\n")


def test_closed_standard_input_is_one_line(folder, run, monkeypatch):
    """As under cron, and by `<&-`, which leaves Python without a sys.stdin."""
    monkeypatch.setattr(sys, "stdin", None)
    message = "error: standard input is closed: give --prompt, --batch or --web\n"
    assert run(chat.main, folder) == (2, "", message)
    assert run(chat.main, folder, "--prompt", "Hi", "--max-new-tokens", "2")[0] == 0


def test_the_command_runs_as_a_program(folder):
    command = [sys.executable, ROOT / "chat.py", folder, "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hi\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0 and "/help lists the commands, Ctrl-D ends\n> " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature from 0"),
        (["--temperature", "nan"], "--temperature from 0"),
        (["--top-p", "0"], "--top-p in (0, 1]"),
        (["--max-new-tokens", "0"], "--max-new-tokens from 1"),
        (["--batch", "a"], "--batch and --to go together"),
        (["--batch", "a", "--to", "b", "--prompt", "c"], "not allowed with argument --batch"),
        (["--heat", "3"], "--heat is not a flag of chat.py"),
        (["--drop-last-answer"], "--drop-last-answer only with them"),
        (["--web", "1", "--prompt", "a"], "--prompt: not allowed with argument --web"),
        (["--web", "--class", "a"], "--web asks under each class"),
        (["--web", "--batch", "a", "--to", "b"], "--batch: not allowed with argument --web"),
        (["--web", "x"], "invalid int value"),
    ],
)
def test_a_bad_flag_is_an_error_before_anything_is_loaded(flags, message, run, tmp_path):
    code, _, err = run(chat.main, tmp_path, *flags)
    assert code == 2 and message in err


def test_a_run_is_asked_at_its_model(folder, run, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    flags = ["--prompt", "Hi", "--max-new-tokens", "9"]
    assert run(chat.main, tmp_path, *flags) == run(chat.main, folder, *flags)


BROKEN = {
    "gone": (None, "crlft.json: not found; chat.py needs an export of train.py"),
    "no JSON": (b"{", "crlft.json: cannot be read"),
    "a list": (b"[]", "crlft.json: cannot be read"),
    "no classes": (b'{"conditioned": true}', "crlft.json: cannot be read"),
    "bad class": (b'{"classes": {"a": 1}, "conditioned": true}', "crlft.json: cannot be read"),
    "deep": (b"[" * 100_000, "crlft.json: cannot be read"),
}


def test_a_base_model_is_told_why_it_cannot_answer(stories, run):
    code, _, err = run(chat.main, stories, "--prompt", "Hi")
    assert code == 1 and "a base model knows no class's condition" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_was_not_exported_is_said(name, folder, run, tmp_path):
    content, message = BROKEN[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "crlft.json").unlink()
    if content is not None:
        (copy / "crlft.json").write_bytes(content)
    code, _, err = run(chat.main, copy, "--prompt", "Hi")
    assert code == 1 and err.startswith(f"error: {copy}/") and message in err
