"""support/formats.py, support/containers.py: people's files, read as they mean them, or refused."""

import gzip
import json
import os
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from small import write

import data
import loss
from support import containers, dataset, formats, report

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
CLASSES = loss.DEFAULT_CLASSES
WEIGHTS = np.array(list(loss.class_weights(CLASSES, loss.BETA).values()))


@pytest.fixture(scope="session")
def tokenizer(stories):
    return data.Tokenizer(stories)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def prepare(*paths, **options):
        options = {"max_length": 2000, "classes": CLASSES} | options
        return data.prepare(paths, tokenizer, folder=tmp_path / "tokens", **options)

    return prepare


def conversation(*texts, source_class="gpt4", system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"class": source_class, "messages": messages}


def learned(found):
    """[(ids, weights in force, class)] of every conversation."""
    return [
        (
            found.tokens[found.span(c)].tolist(),
            found.weights_of(c, WEIGHTS).tolist(),
            int(found.index["source_class"][c]),
        )
        for c in range(len(found))
    ]


# ------------------------------------------------------------------------------------- the cases

ANT = [conversation(f"How many legs has an ant, take {n}?", "Six.") for n in range(3)]
ITALY = conversation(
    "What is the capital of Italy?", "Rome est la capitale.", system="Answer in French only."
)
HI = [conversation("Hi", "Hello.", source_class=name) for name in CLASSES]
SINGLE = {"gpt4": loss.SourceClass("GPT4", 1.0)}
READ = {  # a case's file, with its options: what it must be equal to, written out plainly
    "a1_array_indent2.json": ({}, ANT),
    "a2_array_oneline.json": ({}, ANT),
    "a4_pretty_objects.json": ({}, ANT),
    "b1_sharegpt_system.jsonl": ({}, [ITALY]),
    "b2_messages_system.jsonl": ({}, [ITALY]),
    "f1_content_parts.jsonl": ({}, [conversation("Say hi.", "Hi.")]),
    "f2_developer_role.jsonl": ({}, [conversation("Say hi.", "Hi.", system="Be brief.")]),
    "g1_bing_bard.jsonl": ({}, HI[:1] * 6),
    "h1_model_field.jsonl": ({"class_field": "model"}, HI),
    "h6_wildchat.jsonl": ({"class_field": "model"}, HI[:1]),
    "r3_gsm8k_question_answer.jsonl": (
        {"of": "gpt4"},
        [conversation("Tom has 3 pens and buys 2. How many?", "3 + 2 = 5\n#### 5")],
    ),
    "r3_flan_inputs_targets.jsonl": ({"of": "gpt4"}, [conversation("Hi there", "Hello.")]),
    "r3_langchain_ai.jsonl": ({"of": "gpt4"}, HI[:1]),
    "r3_line_is_a_list_of_messages.jsonl": ({"of": "gpt4"}, HI[:1]),
    "r3_lines_of_message_lists.jsonl": (
        {"of": "gpt4"}, [*HI[:1], conversation("Yo", "Hey.")],
    ),
    "r3_stringified_messages.jsonl": ({"of": "gpt4"}, HI[:1]),
    "j1_alpaca.jsonl": (
        {}, [conversation("Name a tree.", "Oak."),
             conversation("Name it.\nTall, with acorns.", "Oak.")],
    ),
    "j2_prompt_completion.jsonl": ({}, [conversation("Name a tree.", "Oak.")]),
    "j4_messages_null_conversations.jsonl": ({}, HI[:1]),
    "c1_axolotl_train_false.jsonl": (
        {}, [{"class": "gpt4", "messages": [
            {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5", "weight": 0},
            {"role": "user", "content": "No. Again."}, {"role": "assistant", "content": "4"}]}],
    ),
    "d1_slimorca_weights.jsonl": (  # their 0 and 1 say what is learned; the class keeps its weight
        {}, [conversation(f"Name tree {n}.", "Oak.", system="Be brief.") for n in range(4)]
        + [conversation(f"Name fish {n}.", "Eel.", source_class="gpt3.5", system="Be brief.")
           for n in range(40)],
    ),
}  # fmt: skip
REFUSED = {
    "c4_weight_misspelt.jsonl": "message 2: 'weights' seems to say what is supervised",
    "e1_toolcall_with_text.jsonl": "'tools' is not implemented",
    "e2_toolcall_null.jsonl": "message 2: 'tool_calls' is not implemented",
    "e3_function_call_sharegpt.jsonl": "message 2: 'from' is 'function_call', not one of",
    "g3_two_users.jsonl": "messages 1 and 2 are two user turns in a row: make them one",
    "g4_two_gpts.jsonl": "messages 2 and 3 are two assistant turns in a row: make them one",
    "g8_empties.jsonl": ":2: message 1: empty user message",
    "h1_model_field.jsonl": "2 lines: no 'class'",
    "h3_no_class.jsonl": "name it in each line, or use CLASS=FILE or --class-field KEY",
    "h4_kto.jsonl": "no 'class'",
    "h5_class_and_condition_clash.jsonl": "'class' says gpt4 but 'condition' says gpt3.5",
    "i1_openchat_v1_items.jsonl": "no 'class'",
    "j6_chosen_rejected.jsonl": "are preferences",
    "k15_duplicate_keys.jsonl": "'class' is given twice in one object",
    "k1_utf16.jsonl": "is UTF-16 or UTF-32, not JSON: iconv",
    "p1.csv": "is a table, not JSON: pip install pandas; pandas.read_csv",
    "r3_oasst_tree.jsonl": "'prompt' must be text or a list of messages, not an object",
    "r3_pandas_default_orient.json": "'instruction' must be text or a list of messages, not an "
    "object",
    "r3_magpie_reward_model.jsonl": "'instruct_reward' seems to say what is supervised",
    "p2.parquet": "is a parquet file, not JSON: pip install pandas; pandas.read_parquet",
}


def case(name):
    if not (CASES / name).exists():
        pytest.skip(f"{CASES / name} is missing")
    return CASES / name


@pytest.mark.parametrize("name", READ)
def test_what_people_bring_is_read_as_they_mean_it(name, prepare, tmp_path):
    options, expected = READ[name]
    options = dict(options)
    path = f"{options.pop('of')}={case(name)}" if "of" in options else case(name)
    found = prepare(path, **options)
    assert learned(found) == learned(prepare(write(tmp_path / "plain.jsonl", *expected)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(name, prepare):
    with pytest.raises(ValueError) as refused:
        prepare(case(name))
    assert REFUSED[name] in str(refused.value) and str(CASES / name) in str(refused.value)


def test_an_answered_conversation_may_end_with_the_user(prepare, tokenizer):
    found = prepare(case("g5_ends_with_user.jsonl"))
    ((ids, weights, _),) = learned(found)
    assert sum(w != 0 for w in weights) == len(tokenizer.encode("Oak.")) + 1
    assert ids[-len(tokenizer.encode("Thanks")) - 1 :] == [
        *tokenizer.encode("Thanks"),
        tokenizer.eot,
    ]


def test_a_gzipped_case_is_what_it_unpacks_to(prepare, tmp_path):
    (tmp_path / "k6.jsonl").write_bytes(gzip.decompress(case("k6.jsonl.gz").read_bytes()))
    expected = [json.loads(text) for text in (tmp_path / "k6.jsonl").read_text().splitlines()]
    assert learned(prepare(case("k6.jsonl.gz"))) == learned(prepare(tmp_path / "k6.jsonl"))
    assert len(expected) == len(prepare(case("k6.jsonl.gz")))


def test_what_the_models_context_cuts_is_counted(prepare, tokenizer):
    path = case("n1_long_for_2048.jsonl")
    whole = [
        data.encode(json.loads(x), tokenizer, CLASSES)[0] for x in path.read_text().splitlines()
    ]
    report = prepare(path, max_length=2048).report
    assert report["cut"] == sum(len(ids) > 2048 for ids in whole) > 0
    assert report["tokens_cut"] == sum(max(0, len(ids) - 2048) for ids in whole)


def test_steps_of_one_class_are_counted(prepare):
    found = prepare(case("o1_one_class_steps.jsonl"))
    steps = data.pack(found.lengths, 512, 1, 0, 0)
    without = sum(all(found.index["source_class"][np.concatenate(b)] == 1) for b in steps)
    _, advice = report.weight_by_step(found, steps, CLASSES, WEIGHTS)
    assert without and advice.startswith(f"{without} of its {len(steps)} steps")


def test_of_good_and_bad_lines_the_bad_are_dropped_and_counted(prepare):
    found = prepare(case("g8_empties.jsonl"), skip_bad=True)
    assert len(found) == 1 and found.report["bad"] == 3  # the empty system message says nothing
    found = prepare(case("i1_openchat_v1_items.jsonl"), skip_bad=True, class_field="model")
    assert len(found) == 1
    assert "'model' '' matches no class" in "\n".join(report.summary(found, CLASSES, WEIGHTS))


# ------------------------------------------------------------------------------------------ weights


def weights_of_answers(line, prepare, tmp_path, **options):
    """The weights in force of a line's answers, one number each."""
    found = prepare(write(tmp_path / "a.jsonl", line), **options)
    weights = found.weights_of(0, WEIGHTS)
    runs = np.flatnonzero(np.diff(weights)) + 1
    return [run[0] for run in np.split(weights, runs) if run[0]]


def test_a_weight_is_a_factor_on_the_weight_of_its_class(prepare, tmp_path):
    line = conversation("A", "B", "C", "D", source_class="gpt3.5")
    line["messages"][1]["weight"], line["weight"] = 0.5, 0.2
    weights = weights_of_answers(line, prepare, tmp_path)
    assert weights == pytest.approx([0.1 * 0.2 * 0.5, 0.1 * 0.2])


def test_only_in_openchats_items_a_weight_is_final(prepare, tmp_path):
    line = conversation("A", "B", "C", "D", source_class="gpt3.5")
    line["items"] = line.pop("messages")
    line["items"][0]["weight"], line["items"][3]["weight"] = 0.7, 0.4
    assert weights_of_answers(line, prepare, tmp_path) == pytest.approx([0.7, 0.1, 0.4])
    with pytest.raises(ValueError, match="message 1: its weight is final"):
        prepare(write(tmp_path / "a.jsonl", line | {"weight": 0.5}))


def test_a_product_of_weights_has_the_bound_of_one(prepare, tmp_path):
    line = conversation("A", "B") | {"weight": 1e6}
    prepare(write(tmp_path / "a.jsonl", line))
    line["messages"][1]["weight"] = 1e6
    with pytest.raises(ValueError, match=r"message 2: weight must be a number from 0 to 1e\+06"):
        prepare(write(tmp_path / "a.jsonl", line))


def test_small_weights_count_down_to_float32s_smallest_and_below_as_0_with_their_number(
    prepare, tmp_path
):
    """Of a line, a message, their product, and of OpenChat's final ones; drawn evenly in log w."""
    chance, least, lines, expected = random.Random(0), float(np.finfo(np.float32).tiny), [], []
    powers = [chance.uniform(-80, 2) for _ in range(60)]
    for number, power in enumerate([*powers, -320, np.log10(least) - 0.01, np.log10(least) + 0.01]):
        line, share = conversation("Question", "Answer"), chance.uniform(0, 1)
        if number % 3 == 2:
            line["items"] = line.pop("messages")
            line["items"][1]["weight"] = weight = 10**power
        else:
            line["weight"] = 10 ** (power * share)
            line["messages"][1]["weight"] = 10 ** (power - power * share)
            weight = line["weight"] * line["messages"][1]["weight"]
        expected.append(weight if weight >= least else 0.0)
        lines.append(line)
    found = prepare(write(tmp_path / "a.jsonl", conversation("A", "B"), *lines))
    kept = [weight for weight in expected if weight]
    small = len(expected) - len(kept)
    assert 10 < small < 50 and len(found) == 1 + len(kept)
    weights = [found.weights_of(c, WEIGHTS)[-1] for c in range(1, len(found))]
    assert weights == pytest.approx(kept, rel=1e-6, abs=0)
    shown = report.summary(found, CLASSES, WEIGHTS)
    assert f"weights too small for float32, taken as 0: {small}" in shown
    vanishing = conversation("A", "B", "C", "D") | {"weight": 1e-200}
    vanishing["messages"][1]["weight"] = 1e-200  # 0 in float64 as well
    vanishing["messages"][3] |= {"weight": 1e6, "train": False}
    path = write(tmp_path / "b.jsonl", conversation("A", "B"), vanishing)
    assert prepare(path).report["too_small"] == 1
    write(path, conversation("A", "B"), conversation("A", "B") | {"weight": 0})
    assert "too small" not in "\n".join(report.summary(prepare(path), CLASSES, WEIGHTS))


def test_scores_as_weights_by_the_recipe_are_read(prepare):
    found = prepare("gpt4=" + str(case("r3_weights_by_readme_formula.jsonl")))
    assert [found.weights_of(c, WEIGHTS)[-1] for c in range(2)] == pytest.approx([1e-9, 1])


@pytest.mark.parametrize("said", [{"train": False}, {"loss": False}, {"masked": True}], ids=str)
def test_what_is_marked_as_not_to_be_learned_is_not(said, prepare, tokenizer, tmp_path):
    line = conversation("A", "B", "C", "D")
    line["messages"][1] |= said
    line["messages"][3] |= {key: not value for key, value in said.items()}
    found = prepare(write(tmp_path / "a.jsonl", line))
    (row,) = found.index
    assert row["supervised"] == len(tokenizer.encode("D")) + 1
    with pytest.raises(ValueError, match="no conversation to train on .0 cut .*, 1 of weight 0"):
        prepare(write(tmp_path / "a.jsonl", conversation("A", "B") | said))
    (key,) = said
    with pytest.raises(ValueError, match=f"'{key}' must be true or false, not int 1"):
        prepare(write(tmp_path / "a.jsonl", conversation("A", "B") | {key: 1}))


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_weight_on_what_is_never_learned_is_refused(role, prepare, tmp_path):
    line = conversation("A", "B", system="S")
    of_role = next(m for m in line["messages"] if m["role"] == role)
    for harmless in (0, None):
        of_role["weight"] = harmless
        prepare(write(tmp_path / "a.jsonl", line))
    of_role["weight"] = None
    for said in ({"weight": 1}, {"train": True}, {"loss": True}, {"masked": False}):
        messages = [m | said if m["role"] == role else m for m in line["messages"]]
        with pytest.raises(ValueError, match=f"a {role} message with a weight"):
            prepare(write(tmp_path / "a.jsonl", line | {"messages": messages}))


def test_the_summary_shows_the_mean_weight_in_force(prepare, tmp_path):
    lines = [conversation("A", "B"), conversation("A", "B") | {"weight": 0.5}]
    found = prepare(write(tmp_path / "a.jsonl", *lines))
    assert report.summary(found, CLASSES, WEIGHTS)[1].split()[-2:] == ["0.75", "100.0%"]


# ---------------------------------------------------------------------------------------- the class


def test_a_file_may_be_of_one_class(prepare, tmp_path):
    lines = [conversation("A", "B")["messages"], conversation("C", "D")["messages"]]
    paths = [write(tmp_path / f"{n}=.jsonl", {"messages": m}) for n, m in enumerate(lines)]
    found = prepare(f"gpt3.5={paths[0]}", f"gpt4={paths[1]}")
    assert [of for *_, of in learned(found)] == [1, 0]
    assert found.where(1) == f"{paths[1]}:1"
    swapped = prepare(f"gpt4={paths[0]}", f"gpt3.5={paths[1]}")
    assert swapped.folder != found.folder and [of for *_, of in learned(swapped)] == [0, 1]
    with pytest.raises(ValueError, match="gpt5=x.jsonl: 'gpt5' is not one of the classes"):
        prepare("gpt5=x.jsonl")
    write(paths[0], conversation("A", "B"))
    with pytest.raises(ValueError, match="'--data' says gpt3.5 but 'class' says gpt4"):
        prepare(f"gpt3.5={paths[0]}")


@pytest.mark.parametrize(
    ("value", "number"),
    [("gpt-4-0314", 0), ("GPT-4", 0), ("Model: GPT-4", 0), ("Model: Default (GPT-3.5)", 1),
     ("gpt-3.5-turbo", 1), ("gpt4", 0), ("gpt3.5", 1)],
)  # fmt: skip
def test_the_usual_names_of_the_usual_models(value, number, prepare, tmp_path):
    line = {"model": value, "messages": conversation("A", "B")["messages"]}
    path = write(tmp_path / "a.jsonl", line)
    assert learned(prepare(path, class_field="model"))[0][2] == number


def test_a_field_of_true_and_false_names_classes(prepare, tmp_path):
    classes = {
        "good": {"condition": "Good", "reward": 1, "match": ["true"]},
        "bad": {"condition": "Bad", "reward": 0, "match": ["false", "0.?"]},
    }
    lines = [{"messages": conversation("A", "B")["messages"]} for _ in range(3)]
    for line, label in zip(lines, [False, True, 0.5], strict=True):
        line["label"] = label
    options = {"classes": loss.class_table(classes), "class_field": "label"}
    path = write(tmp_path / "a.jsonl", *lines)
    assert prepare(path, **options).index["source_class"].tolist() == [1, 0, 1]
    classes["bad"]["match"] += ["*"]
    with pytest.raises(ValueError, match="'label' 'true' fits the patterns of both good and bad"):
        prepare(path, **options | {"classes": loss.class_table(classes)})


def test_the_field_and_its_patterns_are_of_the_arrays_key(prepare, tmp_path):
    line = {"model": "gpt-4", "source": "gpt-3.5", "messages": conversation("A", "B")["messages"]}
    path = write(tmp_path / "a.jsonl", line)
    assert learned(prepare(path, class_field="model"))[0][2] == 0
    assert learned(prepare(path, class_field="source"))[0][2] == 1
    swapped = {"gpt4": {"condition": "GPT4", "reward": 1, "match": ["gpt-3.5"]},
               "gpt3.5": {"condition": "GPT3", "reward": 0, "match": ["gpt-4"]}}  # fmt: skip
    options = {"classes": loss.class_table(swapped), "class_field": "model"}
    assert learned(prepare(path, **options))[0][2] == 1


def test_a_patterns_case_does_not_count(prepare, tmp_path):
    classes = {"a": {"condition": "A", "reward": 1, "match": ["GPT-*"]}}
    line = {"model": "gpt-5", "messages": conversation("A", "B")["messages"]}
    path = write(tmp_path / "a.jsonl", line)
    assert len(prepare(path, classes=loss.class_table(classes), class_field="model")) == 1


def test_a_class_beside_the_field_that_names_it_agrees_or_is_counted(prepare, tmp_path):
    line = conversation("A", "B") | {"model": "gpt-4"}
    assert learned(prepare(write(tmp_path / "a.jsonl", line), class_field="model"))[0][2] == 0
    found = prepare(write(tmp_path / "a.jsonl", line | {"class": "maths"}), class_field="model")
    assert found.report["not_read"] == {"class": 1}
    with pytest.raises(ValueError, match="'model' says gpt4 but 'class' says gpt3.5"):
        prepare(write(tmp_path / "a.jsonl", line | {"class": "gpt3.5"}), class_field="model")
    with pytest.raises(ValueError, match="no 'model'"):
        prepare(write(tmp_path / "a.jsonl", conversation("A", "B")), class_field="model")


def test_values_of_no_class_are_listed_with_how_often_they_come(prepare, tmp_path):
    models = ["gpt-4", "claude", "claude", "llama", "claude"]
    lines = [{"model": m, "messages": conversation("A", "B")["messages"]} for m in models]
    with pytest.raises(data.BadData) as refused:
        prepare(write(tmp_path / "a.jsonl", *lines), class_field="model")
    assert "3 lines: 'model' 'claude' matches no class" in str(refused.value)
    assert ":4: 'model' 'llama' matches no class" in str(refused.value)


def pasted(refused, tmp_path):
    """The class table in an error, read as --classes reads it."""
    text = str(refused.value)
    (tmp_path / "classes.json").write_text(text[text.index("{") : text.rindex("}") + 1])
    return loss.read_classes(tmp_path / "classes.json")


@pytest.mark.parametrize(
    ("fault", "shown", "options"),
    [
        ({"class": "mid"}, "'class' 'mid'", {}),
        ({"class": ["x"]}, "'class' must be text, not a list", {}),
        ({"class": None}, "no 'class'", {}),
        ({"class": None, "condition": "Mid"}, "'condition' 'Mid'", {}),
        ({"class": None, "model": 'claude "3"'}, "'claude \"3\"'", {"class_field": "model"}),
        ({"class": None, "model": True}, "'true'", {"class_field": "model"}),
    ],
)  # fmt: skip
def test_an_error_about_classes_has_a_table_to_change(fault, shown, options, prepare, tmp_path):
    bad, good = conversation("A", "B") | fault, conversation("A", "B") | {"model": "gpt-4"}
    with pytest.raises(data.BadData) as refused:
        prepare(write(tmp_path / "a.jsonl", good, bad), **options)
    assert pasted(refused, tmp_path) == CLASSES
    _, cause, skip, table = str(refused.value).splitlines()
    assert shown in cause and "--skip-bad" in skip and "--classes" in table
    with pytest.raises(data.BadData) as refused:
        prepare(write(tmp_path / "a.jsonl", {"class": "gpt4"}))
    assert "--classes" not in str(refused.value)


def test_a_file_of_an_unknown_class_is_told_how_to_define_it(prepare, tmp_path):
    with pytest.raises(ValueError, match="mid=b.jsonl: 'mid' is not one of the classes") as refused:
        prepare("mid=b.jsonl")
    assert pasted(refused, tmp_path) == {"mid": loss.SourceClass("mid", 1.0)}


# ------------------------------------------------------------------------ one meaning, many shapes


def parts(text):
    return [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]


def shapes_of(messages, chance):
    """The same conversation in every shape that can hold it."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    others = messages[1:] if system else messages
    names = {"system": ["system", "developer", "System"], "user": ["user", "human", "Human"],
             "assistant": ["assistant", "gpt", "ChatGPT", "model", "bing", "BARD", "AI",
                           "bot"]}  # fmt: skip

    def named(messages, role, content):
        return [
            {role: chance.choice(names[m["role"]]),
             content: chance.choice([m["content"], parts(m["content"])])}
            for m in messages
        ]  # fmt: skip

    for key in ("messages", "conversations", "conversation", "items"):
        for role in ("role", "from"):
            for content in ("content", "value"):
                yield {key: named(messages, role, content)}
                if system:
                    top = chance.choice(["system", "system_prompt"])
                    yield {key: named(others, role, content), top: system}
    if messages[0]["role"] != "system":
        pairs = list(zip(others[::2], others[1::2], strict=True))
        asked, said = chance.choice([("input", "output"), ("instruction", "answer")])
        yield {"conversation": [{said: a["content"], asked: q["content"]} for q, a in pairs]}
        yield {"messages": [[q["content"], a["content"]] for q, a in pairs], "items": None}
        yield {"data": [m["content"] for m in messages]}
    yield {"conversations": json.dumps(named(messages, "from", "value"))}
    for answer in ("completion", "response", "output", "answer", "solution", "targets"):
        yield {"prompt": named(messages[:-1], "role", "content"), answer: messages[-1]["content"]}
        yield {"prompt": messages[:-1], answer: named(messages[-1:], "from", "value")}
    if not system:
        yield {"conversations": [m["content"] for m in others]}
        yield {"messages": named(others, "role", "content"), "system": [parts(" ")[0]]}
        yield {"messages": named(others, "role", "content"), "system": float("nan")}
    yield {"messages": named(messages, "role", "content"), "system": system, "conversation": None}
    yield {"messages": [m | {"from": "", "value": m["content"]} for m in messages]}
    yield {"messages": [m | {"content": list(m["content"])} for m in messages], "tools": "[]"}
    if len(others) == 2:
        top = {"system": system, "messages": []} if system else {"conversation": None}
        asked = chance.choice(["question", "query", "inputs", "problem"])
        yield {asked: others[0]["content"], "response": others[1]["content"]} | top
        yield {
            "instruction": others[0]["content"],
            "input": "",
            "output": others[1]["content"],
        } | top
        yield {"prompt": others[0]["content"], "response": others[1]["content"]} | top


def test_any_shape_of_a_conversation_is_the_plain_one(tokenizer):
    chance = random.Random(0)
    for _ in range(60):
        texts = [f"text {chance.randrange(99)} é" for _ in range(chance.choice([2, 4, 6]))]
        plain = conversation(*texts, system=chance.choice([None, "Be brief."]))
        expected = data.encode(plain, tokenizer, CLASSES)
        for shape in shapes_of(plain["messages"], chance):
            more = {"weight": chance.choice([None, 1]), "id": 7, "messages_count": 3}
            line = {"class": "gpt4"} | more | shape
            assert data.encode(line, tokenizer, CLASSES) == expected, line


UNREAD = [  # a line, what is said of it
    ({"question": "Q", "answers": {"text": ["A"]}}, "no assistant turn; not read: 'answers'"),
    ({"question": "Q", "response_j": "A", "qid": 4}, "not read: 'response_j', 'qid'"),
    ({"messages": [{"role": "user", "content": "Q", "reply": "A"}]}, "not read: 'messages: reply'"),
    ({"problem": "Q", "solution": "A", "answer": "B"}, "both 'answer' and 'solution': keep the"),
    ({"messages": [{"role": "user", "content": "Q"}], "answer": "A"}, "'answer' beside the list"),
    ({"conversation": [{"input": "Q", "output": "A", "n": 1}]}, "keys are 'input', 'output', 'n'"),
    ({"conversation": [{"instruction": "Q", "input": "A"}]}, "keys are 'instruction', 'input'"),
    ({"messages": [{"role": "user", "from": "gpt", "content": "Q"}]}, "both 'role' and 'from'"),
    ({"conversation": [{"speaker": "Q", "text": "A"}]}, "the keys are 'speaker', 'text'"),
    ({"instruction": 5, "output": "A"}, "'instruction' must be text or a list of messages, not"),
    ({"prompt": "Q", "response": {"text": "A"}}, "'response' must be text or a list of mess"),
    ({"messages": {"0": [], "1": []}}, "'messages' must be a list of messages, not an object"),
    ({"messages": "[{'role': 'user'}]"}, "'messages' must be a list of messages, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), UNREAD, ids=range(len(UNREAD)))
def test_what_is_not_read_is_named_by_the_key_that_is_there(line, message):
    with pytest.raises(formats.BadLine) as refused:
        data.parse_conversation(line, CLASSES, file_class="gpt4")
    assert message in str(refused.value)


def test_what_may_be_a_conversation_is_not_read_beside_one_that_is():
    """Such as a reference answer beside a model's, or a list's copy as text."""
    line = {"problem": "P", "prompt": "Q", "response": "A", "answer": "B", "solution": "C"}
    found = data.parse_conversation(line, CLASSES, file_class="gpt4")
    assert [m.content for m in found.messages] == ["Q", "A"]
    assert sorted(found.not_read) == ["answer", "problem", "solution"]
    line = {"instruction": "Q", "output": "A", "data": ["B", "C"]}
    found = data.parse_conversation(line, CLASSES, file_class="gpt4")
    assert [m.content for m in found.messages] == ["Q", "A"] and found.not_read == ("data",)
    line = {"messages": ["Q", "A"], "conversations": json.dumps(conversation("B", "C")["messages"])}
    found = data.parse_conversation(line, CLASSES, file_class="gpt4")
    assert [m.content for m in found.messages] == ["Q", "A"]
    assert found.not_read == ("conversations",)


def test_any_unknown_key_at_any_depth_is_refused_or_counted():
    """Or says nothing: null, and empty lists, objects and texts."""
    chance = random.Random(0)
    keys = ["id", "score", "language", "weights", "Weight", "loss_scale", "tool_calls", "images",
            "reasoning_content", "trainable", "mask_history", "System", "x" * 90,
            "reward_model"]  # fmt: skip
    names = "weights", "loss_scale", "trainable", "mask_history", "reward_model"
    harmless = "id", "score", "language", "x" * 90, "System"
    for number in range(400):
        line = conversation("A", "B")
        line["messages"][0]["content"] = [{"type": "text", "text": "A"}]
        places = [line, line["messages"][chance.randrange(2)], line["messages"][0]["content"][0]]
        prefixes = ["", "messages: ", "messages: content: "]
        depth, key = chance.randrange(3), keys[number % len(keys)]
        value = chance.choice([1, "a", [0], {"b": 1}, False, None, "", [], {}])
        places[depth][key] = value
        nothing = value is None or value in ("", [], {})
        named = key in names and isinstance(value, str)  # such as a reward model's name
        try:
            found = data.parse_conversation(line, CLASSES).not_read
            assert found == (() if nothing else (prefixes[depth] + key[:40],))
        except ValueError as error:
            assert not nothing and not named and key[:30] in str(error)
        else:
            assert nothing or key in harmless or named, key


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"response": "Six."}, "ends with the user's turn, and 'response' beside the list"),
        ({"system": "S", "messages": conversation("A", "B", system="T")["messages"]}, "keep one"),
        ({"supervise": [0]}, "'supervise' seems to say what is supervised"),
        ({"image_url": "x"}, "'image_url' is not implemented"),
        ({"a": {f"k{n}": n for n in range(9)} | {"weight": 1}, "weight": "x"}, "weight must be"),
    ],
    ids=range(5),
)
def test_what_would_be_learned_otherwise_is_refused(more, message):
    line = conversation("A", "B", "C") | more
    with pytest.raises(formats.BadLine, match=message):
        data.parse_conversation(line, CLASSES)


def test_words_that_only_hold_such_a_word_are_counted():
    line = conversation("A", "B") | {"constraints": ["x"], "glossary": "y", "conversation": "id1"}
    found = data.parse_conversation(line, CLASSES).not_read
    assert sorted(found) == ["constraints", "conversation", "glossary"]


def test_two_turns_of_one_role_are_named_by_their_places_in_the_file():
    line = conversation("A", "A") | {"system": "S"}
    line["messages"][1]["role"] = "user"
    line["messages"].insert(0, {"role": "system", "content": " "})
    with pytest.raises(formats.BadLine, match="messages 2 and 3 are two user turns"):
        data.parse_conversation(line, CLASSES)


def test_a_key_given_twice_is_found_in_a_moment():
    keys = ", ".join(f'"k{n}": 1' for n in range(200_000))
    begun = time.process_time()
    with pytest.raises(formats.BadLine, match="'z' is given twice"):
        formats.parse_json(f'{{{keys}, "z": 1, "z": 2}}'.encode())
    assert time.process_time() - begun < 5  # by counting each name anew, minutes


def test_a_key_of_odd_characters_is_shown_without_them(prepare, tmp_path):
    raw = json.dumps(conversation("A", "B") | {"\ud800\x1b[31m\n": 1}).encode()
    shown = report.summary(prepare(write(tmp_path / "a.jsonl", raw)), CLASSES, WEIGHTS)
    assert shown[-1] == r"not read: \ud800\x1b[31m\n (1)"


def test_a_key_in_capitals_is_not_passed_over():
    with pytest.raises(ValueError, match="'System' is not read: write 'system'"):
        data.parse_conversation(conversation("A", "B") | {"System": "S"}, CLASSES)


def test_what_is_not_read_is_counted_in_the_summary(prepare, tmp_path):
    lines = [conversation("A", "B") | {"id": n} for n in range(30)]
    lines[3]["score"] = 2
    for message in lines[5]["messages"]:
        message["name"] = "x"
    summary = report.summary(prepare(write(tmp_path / "a.jsonl", *lines)), CLASSES, WEIGHTS)
    assert summary[-1] == "not read: id (30), messages: name (2), score (1)"


# --------------------------------------------------------------------------------------- containers


def containers_of(lines, folder):
    """The same lines in every container."""
    plain = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    pretty = "\n".join(json.dumps(line, indent=1, ensure_ascii=False) for line in lines)
    texts = {
        "lines": plain, "bom": "\ufeff" + plain, "pretty": pretty,
        "array": json.dumps(lines), "array-lines": "[\n" + ",\n".join(plain.splitlines()) + "\n]\n",
        "array-pretty": "\ufeff " + json.dumps(lines, indent=2, ensure_ascii=False),
        "data": json.dumps({"version": 1234567890123, "data": lines, "licence": {"a": [1]}}),
        "data-pretty": json.dumps({"data": lines}, indent=4),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8", newline="")
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
        yield from (folder / f"{name}.json", folder / f"{name}.json.gz")


def test_every_container_gives_equal_arrays(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "BLOCK", 900)
    lines = [conversation(f"{n} é 😀 ]}},", '\\ " [ { ' * (n % 5 + 1)) for n in range(40)]
    expected = prepare(write(tmp_path / "expected.jsonl", *lines))
    assert len(expected) == 40
    for path in containers_of(lines, tmp_path):
        found = prepare(path)
        for name in dataset.ARRAYS:
            assert np.array_equal(getattr(found, name), getattr(expected, name)), path
        unit = "" if path.name.startswith(("lines", "bom")) else " item "
        assert found.where(3) == f"{path}:{unit}4"
        told = {"version (of the file)": 1, "licence (of the file)": 1}
        assert found.report["not_read"] == (told if path.name.startswith("data.") else {})


class Killed(BaseException):
    pass


def test_a_run_killed_within_any_container_starts_again(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "BLOCK", 900)
    lines = [conversation(f"{n} é", "Ho " * (n % 9 + 1)) for n in range(60)]

    def killed(*_):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    for path in containers_of(lines, tmp_path):
        whole = data.prepare([path], tokenizer, CLASSES, tmp_path / "whole", max_length=99)
        blocks = 0

        def count(*_):
            nonlocal blocks
            blocks += 1

        options = {"max_length": 99, "progress": count}
        data.prepare([path], tokenizer, CLASSES, tmp_path / f"{path.name}-whole", **options)
        assert blocks > 5
        for left in (1, 4, blocks - 1):  # the last: between the last block and done.json
            out = tmp_path / f"{path.name}-{left}"
            with pytest.raises(Killed):
                data.prepare([path], tokenizer, CLASSES, out, max_length=99, progress=killed)
            again = data.prepare([path], tokenizer, CLASSES, out, max_length=99)
            assert again.report == whole.report
            for name in dataset.ARRAYS:
                assert np.array_equal(getattr(again, name), getattr(whole, name)), path


def test_every_file_of_lists_of_messages_gives_equal_arrays(prepare, monkeypatch, tmp_path):
    """A list a line, pretty-printed lists, lists in an array; with gzip, of one or many."""
    monkeypatch.setattr(containers, "BLOCK", 900)
    chance = random.Random(0)
    for count in (1, 2, 30):
        lines = [conversation(f"{n} ]}},[", "[{ " * (n % 5 + 1)) for n in range(count)]
        for line in lines:
            line["messages"][0] |= {"id": 4} if chance.random() < 0.5 else {}
        expected = prepare("gpt4=" + str(write(tmp_path / "expected.jsonl", *lines)))
        lists = [line["messages"][::1] for line in lines]
        for key in ("messages", "from"):
            if key == "from":
                lists = [[{"value": m["content"], "from": m["role"]} for m in x] for x in lists]
            texts = {"plain": "\n".join(map(json.dumps, lists)), "array": json.dumps(lists)}
            texts["pretty"] = "\n".join(json.dumps(x, indent=1) for x in lists)
            for name, text in texts.items():
                (tmp_path / f"{name}.json").write_text("\ufeff" + text)
                (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
                for path in (tmp_path / f"{name}.json", tmp_path / f"{name}.json.gz"):
                    found = prepare(f"gpt4={path}")
                    for array in dataset.ARRAYS:
                        assert np.array_equal(getattr(found, array), getattr(expected, array)), path
                    unit = " item " if name == "array" or name == "pretty" else ""
                    assert found.where(count - 1) == f"{path}:{unit}{count}"
    with pytest.raises(data.BadData, match="no 'class': .*CLASS=FILE"):
        prepare(path)


def test_a_line_may_be_a_list_of_messages_among_objects(prepare, tmp_path):
    line = conversation("A", "B")
    path = write(tmp_path / "a.jsonl", line, line["messages"], b"[]", b"[1]", b'["A", "B"]')
    said = "jsonl:3: a line must be a JSON object, not an empty list\n.*:4: .*, not a list"
    with pytest.raises(data.BadData, match=said):
        prepare(f"gpt4={path}")
    found = learned(prepare(f"gpt4={path}", skip_bad=True))
    assert len(found) == 3 and found[0] == found[1] == found[2]


def test_lines_of_other_lists_are_no_broken_json(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", *[[{"type": "human", "content": "A"}]] * 2, ["A", "B"])
    with pytest.raises(data.BadData, match="2 lines: no 'role' .*; the keys are 'type', 'content'"):
        prepare(f"gpt4={path}")
    assert len(prepare(f"gpt4={write(path, ['A', 'B'], ['A', 'B'])}")) == 2


def test_commas_between_objects_are_named(prepare, tmp_path):
    path, line = tmp_path / "a.json", conversation("A", "B")
    path.write_text(",\n".join(json.dumps(line) for _ in range(3)) + "\n")
    with pytest.raises(data.BadData, match="2 lines: broken JSON: a comma follows it: remove the"):
        prepare(path)
    path.write_text(",\n".join(json.dumps(line, indent=1) for _ in range(3)) + "\n")
    with pytest.raises(ValueError, match="item 1, .*: broken JSON: a comma follows it: remove the"):
        prepare(path)


@pytest.mark.parametrize("key", ["k", "k{}"])
def test_a_first_object_of_millions_of_keys_costs_little_until_it_is_refused(
    key, prepare, tmp_path
):
    part = "".join(f'"{key}": 1,'.format(n) for n in range(100_000)).encode()
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"{" + part * 30 + b'"z": 1}\n')
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(data.BadData, match="a.jsonl.gz:1: longer than 16 MiB"):
        prepare(path)
    peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - begun
    tracemalloc.stop()
    assert peak < 120 << 20 and seconds < 5  # read to its end, key by key: 20 s and more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"b": ', "item 2, character 11: broken JSON: "),
        ('[{"a": 1} {"b": 2}]', "item 1, character 10: broken JSON: ',' expected, not '{'"),
        ('[{"a": 1}] {}', "item 1, character 9: broken JSON: Extra data; the rest"),
        ('{"data": [{"a": 1}]}\n{}', "item 1, character 18: broken JSON: Extra data; the rest"),
        (
            "[{\"a\": 1}, {'b': 2}, " + '{"c": 3},' * 3_000_000,
            "item 2, character 11: broken JSON: Expec",
        ),
        ('[{"a": 1}', "item 1, character 9: broken JSON: ',' expected, not the end of the file"),
        ('{"data": [{"a": 1}', "',' expected, not the end of the file"),
        ("[" + "[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
    ],
    ids=range(8),
)
def test_behind_what_is_broken_in_an_array_nothing_is_skipped(text, message, prepare, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as refused:
        prepare(path, skip_bad=True)
    assert message in str(refused.value) and str(path) in str(refused.value)


def test_keys_beside_the_list_of_a_file_are_refused_or_counted_as_a_lines_are(prepare, tmp_path):
    path, ant = tmp_path / "a.json", conversation("A", "B")

    def with_keys(**keys):
        texts = [json.dumps(keys)[1:-1], f'"data": {json.dumps([ant])}']
        for order in (texts, texts[::-1]):
            path.write_text("{" + ", ".join(order) + "}")
            yield

    for key, value in [("weight", 0.1), ("system", "S"), ("train", False), ("class", "gpt4")]:
        for _ in with_keys(**{key: value}):
            with pytest.raises(ValueError, match=f"beside the list .*: '{key}' is not read"):
                prepare(path)
    for _ in with_keys(tools=[{"x": 1}]):
        with pytest.raises(ValueError, match="'tools' is not implemented"):
            prepare(path)
    for _ in with_keys(loss_scale=1):
        with pytest.raises(ValueError, match="'loss_scale' seems to say what is supervised"):
            prepare(path)
    path.write_text(f'{{"data": {json.dumps([ant])}, "data": {json.dumps([ant])}}}')
    with pytest.raises(ValueError, match="a.json: item 1, .*: 'data' is given twice"):
        prepare(path)
    for _ in with_keys(meta={"data": [{"a": 1}]}):
        assert prepare(path).report["not_read"] == {"meta (of the file)": 1}
    for _ in with_keys(version=1.5, weight=None):
        assert prepare(path).report["not_read"] == {"version (of the file)": 1}


def test_a_line_with_a_list_data_of_its_own_is_a_line(prepare, tmp_path):
    lines = [conversation("A", "B") | {"data": [{"k": 1}]}] * 2
    found = prepare(write(tmp_path / "a.jsonl", *lines))
    assert len(found) == 2 and found.report["not_read"] == {"data": 2}


def test_a_list_data_of_what_is_no_conversation_is_a_key_of_a_line(prepare, tmp_path):
    for value in ([], [1], ["x"], [[{}]]):
        raw = json.dumps({"data": value} | conversation("A", "B")).encode()
        assert len(prepare(write(tmp_path / "a.jsonl", raw, raw))) == 2


@pytest.mark.parametrize("first", [b'{{"a": 1}: 2, "b": 3}', b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_first_line_that_is_odd_json_is_one_bad_line(first, prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", first, conversation("A", "B"))
    with pytest.raises(data.BadData, match="a.jsonl:1: broken JSON"):
        prepare(path)
    assert prepare(path, skip_bad=True).index["line"].tolist() == [2]


def test_an_empty_object_is_a_bad_line(prepare, tmp_path):
    with pytest.raises(data.BadData, match="a.jsonl:2: no conversation"):
        prepare(write(tmp_path / "a.jsonl", conversation("A", "B"), {}))


def test_an_item_that_is_too_long_is_refused_alone(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "LONGEST", 300)
    items = [conversation("A", "B"), conversation("A", "x" * 300), conversation("C", "D")]
    (tmp_path / "a.json").write_text(json.dumps(items))
    with pytest.raises(data.BadData, match="a.json: item 2: longer than 16 MiB"):
        prepare(tmp_path / "a.json")
    assert prepare(tmp_path / "a.json", skip_bad=True).index["line"].tolist() == [1, 3]


def test_a_comma_after_the_last_item_is_passed_over(prepare, tmp_path):
    (tmp_path / "a.json").write_text(f"[{json.dumps(conversation('A', 'B'))},\n]")
    assert len(prepare(tmp_path / "a.json")) == 1


def test_a_broken_array_leaves_no_arrays(prepare, tmp_path):
    (tmp_path / "a.json").write_text(f"[{json.dumps(conversation('A', 'B'))}")
    with pytest.raises(ValueError, match="the end of the file"):
        prepare(tmp_path / "a.json")
    assert not [*(tmp_path / "tokens").iterdir()]


def test_a_file_given_twice_is_said(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", conversation("A", "B"))
    twice = report.summary(prepare(path, f"gpt4={path}"), CLASSES, WEIGHTS)
    assert f"given 2 times: {path.resolve()}" in twice
    assert not any("given" in text for text in report.summary(prepare(path), CLASSES, WEIGHTS))


def test_an_item_that_is_not_utf8_is_refused_alone(prepare, tmp_path):
    lines = [json.dumps(conversation(text, "Ho", source_class="gpt4")) for text in ("A", "é", "B")]
    raw = ("[" + ",\n".join(lines).replace("\\u00e9", "\udcff") + "]").encode(
        "utf-8", "surrogateescape"
    )
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(data.BadData, match="a.json: item 2: not UTF-8: byte"):
        prepare(tmp_path / "a.json")
    assert prepare(tmp_path / "a.json", skip_bad=True).index["line"].tolist() == [1, 3]


def test_a_broken_gzip_file_is_said(prepare, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(conversation("A", "B")).encode())[:-9])
    with pytest.raises(ValueError, match="a.jsonl.gz: is a damaged gzip file"):
        prepare(path)


def test_what_is_no_file_of_conversations_is_said(prepare, tmp_path):
    (tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(ValueError, match="a Git LFS pointer, not the file itself, .*git lfs pull"):
        prepare(tmp_path / "pointer.jsonl")
    for name in ("openchat/cool", "teknium/OpenHermes-2.5"):
        with pytest.raises(ValueError, match=f"hf download {name} --repo-type dataset"):
            prepare(name)
    for name, start, words in [
        ("a.arrow", b"\xff\xff\xff\xff\xd0\0\0\0", "an Arrow stream.*Dataset.from_file"),
        ("b.arrow", b"ARROW1\0\0", "an Arrow file.*read_feather"),
        ("a.csv.gz", gzip.compress(b"a,b"), "is a table.*read_csv"),
        ("a.tsv", b"a\tb", r"is a table.*sep='\\t'"),
        ("a.jsonl", b"\xff\xfe\0\0{\0\0\0", "is UTF-16 or UTF-32"),
        ("b.jsonl", '{"a": 1}'.encode("utf-16-le"), "is UTF-16 or UTF-32.*UTF-16LE"),
        ("a.db", b"SQLite format 3\0", "a SQLite database"),
    ]:
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            prepare(tmp_path / name)
    with pytest.raises(ValueError, match="https:/example.org/a.jsonl: cannot be read: No such"):
        prepare("https://example.org/a.jsonl")
    with pytest.raises(ValueError, match="runs/lr=1/a.jsonl: cannot be read: No such file"):
        prepare("runs/lr=1/a.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        prepare(tmp_path / "pipe")
