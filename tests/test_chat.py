"""chat.py: the text the model means, one token at a time; files, terminal and limits."""

import dataclasses
import json
import shutil
import subprocess
import sys
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


# ---------------------------------------------------------------------------- exported folders


def export(stories, folder, conditioned=True):
    """stories260K with an end-of-turn token, as train.py writes a model."""
    tokenizer = data.Tokenizer(stories)
    config = model.LlamaConfig.from_folder(stories)
    config = dataclasses.replace(
        config, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eot
    )
    llama = model.Llama(config)
    model.fill_parameters(llama, stories, new_rows=1)
    model.save(llama, folder)
    tokenizer.save(folder, "GPT4" if conditioned else "")
    classes = {name: dataclasses.asdict(c) for name, c in loss.DEFAULT_CLASSES.items()}
    crlft = {"classes": classes, "conditioned": conditioned, "template": "openchat_v3.2"}
    model.write_json(folder / "crlft.json", crlft)
    return folder


@pytest.fixture(scope="module")
def folder(stories, tmp_path_factory):
    return export(stories, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def talker(folder):
    return chat.Chat(folder, device="cpu")


def user(text):
    return data.Message("user", text)


def test_the_expert_condition_is_the_default_and_class_names_another(folder, talker):
    assert talker.condition == "GPT4"
    assert chat.Chat(folder, "gpt3.5", device="cpu").condition == "GPT3"
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


def test_transformers_generates_the_same_answer(folder, talker):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "Tell me of a big red ball."}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    theirs = llama.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
    ((ours, _),) = talker.answers([[user(messages[0]["content"])]], max_new_tokens=40)
    assert ours == tokenizer.decode(theirs, skip_special_tokens=True).strip()
    assert len(ours) > 50


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
    assert "answered as class gpt4; 1 of the lines have another" in err
    assert (code, out) == (0, "") and "19/19 answered\n19 answers cut: --max-new-tokens" in err
    answered = [json.loads(text) for text in target.read_text("utf-8").split("\n")[:-1]]
    assert len(answered) == 19
    for before, after in zip(lines, answered, strict=True):
        messages = [data.Message(m["role"], m["content"]) for m in before["messages"]]
        ((text, _),) = talker.answers([messages], max_new_tokens=8)
        turn = {"role": "assistant", "content": text}
        assert after == before | {"messages": [*before["messages"], turn]}


def test_a_batch_never_overwrites(folder, run, tmp_path):
    source, target = write(tmp_path / "in.jsonl", asked("Hi")), tmp_path / "out.jsonl"
    target.write_text("precious")
    code, _, err = run(chat.main, folder, "--batch", source, "--to", target)
    assert code == 1 and err.startswith("error: ") and "File exists" in err and str(target) in err
    assert target.read_text() == "precious"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "broken JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "broken JSON: nested too deeply"),
        (b"[]", "a line must be a JSON object, not a list"),
        ({"items": []}, "the last message must be the user's"),
        ({"item": []}, "no conversation: 'messages'"),
        ({"messages": {}}, "'messages' must be a list, not an object"),
        ({"messages": []}, "the last message must be the user's"),
        (asked("Hi", "Ho"), "the last message must be the user's"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 1: 'role' is 'bot'"),
        (asked("Hi", "Ho", "\ud800"), "message 3: lone surrogate"),
        (asked(""), "empty user message"),
        (asked("ball " * 600), "tokens, the model's context is 512"),
        (b'"' + b"x" * (17 << 20) + b'"', "longer than 16 MiB"),
        (asked("Hi", id="\ud800"), "surrogates not allowed"),
    ],
    ids=[str(i) for i in range(15)],
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
    """[[(role, text) ...]] of what a conversation at the terminal asks; "An answer" to all."""
    asked = []

    def stream(messages, **options):
        asked.append([(m.role, m.content) for m in messages])
        return iter(["An ", "answer"])

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    return asked


ANSWER = ("assistant", "An answer")


def test_a_conversation_at_the_terminal(folder, run, asked_of_model):
    stdin = "Hi\n\n  \nMore\n/new\nAgain\n/quit\nnever\n"
    code, out, _ = run(chat.main, folder, stdin=stdin)
    assert code == 0 and out.count("An answer\n") == 3
    assert asked_of_model == [
        [("user", "Hi")],
        [("user", "Hi"), ANSWER, ("user", "More")],
        [("user", "Again")],
    ]


LONG, LONGER = ("word " * 70).strip(), ("time " * 250).strip()  # together beyond 512 tokens


@pytest.mark.parametrize("said, kept", [((LONG, "Hi", LONGER), 2), (("Hi", LONG, LONGER), 1)])
def test_a_full_context_forgets_questions_with_their_answers_and_no_more_than_needed(
    said, kept, folder, run, asked_of_model
):
    code, out, _ = run(chat.main, folder, stdin="\n".join(said) + "\n")
    forgotten = out.count("[the context is full: the oldest turn is forgotten]\n")
    assert (code, forgotten) == (0, 3 - kept)
    first, *others = [("user", text) for text in said[-kept:]]
    assert asked_of_model[-1] == [first, *(turn for user in others for turn in (ANSWER, user))]


def test_what_never_fits_is_not_sent_and_the_conversation_goes_on(folder, run, asked_of_model):
    code, out, _ = run(chat.main, folder, stdin="Hi\n" + "word " * 999 + "\nMore\n")
    assert code == 0
    assert out.count("[too long for the model's context of 512 tokens; not sent]\n") == 1
    assert asked_of_model == [[("user", "Hi")], [("user", "Hi"), ANSWER, ("user", "More")]]


def test_what_is_said_of_a_cut_answer_is_no_part_of_the_conversation(folder, run, monkeypatch):
    prompts, real = [], chat.Chat.stream

    def stream(self, messages, **options):
        prompts.append(messages[:])
        return real(self, messages, **options)

    monkeypatch.setattr(chat.Chat, "stream", stream)
    flags = ["--max-new-tokens", "3"]
    code, out, err = run(chat.main, folder, *flags, stdin="Hi\nMore\n")
    assert code == 0 and err.count("[cut after 3 tokens") == 2
    assert [m.role for m in prompts[1]] == ["user", "assistant", "user"]
    assert "cut after" not in prompts[1][1].content and prompts[1][1].content in out


def test_ctrl_c_keeps_what_was_said(folder, talker, run, monkeypatch):
    said = []

    def stream(messages, **options):
        said.append([m.content for m in messages])
        yield "Half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    code, out, _ = run(chat.main, folder, stdin="Hi\nMore\n")
    assert code == 0 and out.count("Half [stopped]\n") == 2
    assert said[1] == ["Hi", "Half", "More"]


def test_ctrl_c_of_one_answer_ends_without_a_traceback(folder, talker, run, monkeypatch):
    def stream(messages, **options):
        yield "Half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "Chat", lambda *_: talker)
    monkeypatch.setattr(talker, "stream", stream)
    code, out, _ = run(chat.main, folder, "--prompt", "Hi")
    assert (code, out) == (130, "Half\n")


def test_the_command_runs_as_a_program(folder):
    command = [sys.executable, ROOT / "chat.py", folder, "--max-new-tokens", "5"]
    done = subprocess.run(command, input="Hi\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Ctrl-D or /quit ends")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature from 0"),
        (["--top-p", "0"], "--top-p in (0, 1]"),
        (["--max-new-tokens", "0"], "--max-new-tokens from 1"),
        (["--batch", "a"], "--batch and --to go together"),
        (["--batch", "a", "--to", "b", "--prompt", "c"], "without --prompt"),
        (["--heat", "3"], "--heat is not a flag of chat.py"),
    ],
)
def test_a_bad_flag_is_an_error_before_anything_is_loaded(flags, message, run, tmp_path):
    code, _, err = run(chat.main, tmp_path, *flags)
    assert code == 2 and message in err


BROKEN = {
    "gone": (None, "crlft.json: not found; chat.py needs a folder exported by train.py"),
    "no JSON": (b"{", "crlft.json: cannot be read"),
    "a list": (b"[]", "crlft.json: cannot be read"),
    "no classes": (b'{"conditioned": true}', "crlft.json: cannot be read"),
    "bad class": (b'{"classes": {"a": 1}, "conditioned": true}', "crlft.json: cannot be read"),
    "deep": (b"[" * 100_000, "crlft.json: cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_was_not_exported_is_said(name, folder, run, tmp_path):
    content, message = BROKEN[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "crlft.json").unlink()
    if content is not None:
        (copy / "crlft.json").write_bytes(content)
    code, _, err = run(chat.main, copy, "--prompt", "Hi")
    assert code == 1 and err.startswith(f"error: {copy}/") and message in err
