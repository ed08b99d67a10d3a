"""The page of one step shows the numbers of Eq. (6): beside a second network, in float64."""

import html.parser
import json
import math
import re
import statistics
import subprocess
import sys

import browser
import pytest
import small
import torch
from processes import ROOT, SUMS
from sentencepiece import SentencePieceProcessor

import data
import model

sys.path.insert(0, str(ROOT / "examples"))
import one_step  # noqa: E402

CONDITIONS = {"gpt4": "GPT4", "gpt3.5": "GPT3"}  # expert first, as on the page
H, E = 4, 32  # heads of the example's network, which share one key and value; their width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example's model with weights so large that each token has a loss of its own."""
    folder = tmp_path_factory.mktemp("model")
    llama = model.Llama(model.LlamaConfig.from_folder(SUMS))
    torch.manual_seed(0)
    small.make_random(llama, std=0.25)
    model.save(llama, folder)
    (folder / "tokenizer.model").write_bytes((SUMS / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def html_file(folder):
    """What the script writes, as it is run by hand."""
    out = folder / "sub" / "page.html"
    command = [sys.executable, ROOT / "examples" / "one_step.py", folder, out]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == f"{out}: one step of {folder}; open it in a browser\n", result.stderr
    return out


class Scripts(html.parser.HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *attributes))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] == "script" and text.strip():
            self.texts.append(text)

    def step(self):
        return json.loads(self.texts[0])


@pytest.fixture(scope="module")
def step(html_file):
    return Scripts(html_file.read_text()).step()


# ------------------------------------------------- the same numbers from their definition, float64


@pytest.fixture(scope="module")
def weights(folder):
    found = model.load(folder).state_dict()
    return {name: tensor.double().requires_grad_() for name, tensor in found.items()}


def logits(w, tokens):
    """(T, V) of one conversation."""
    T = len(tokens)
    x = w["model.embed_tokens.weight"][tokens]
    turns = torch.arange(T).double()[:, None] / 10000 ** (torch.arange(0, E, 2).double() / E)
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]
    future = torch.ones(T, T).triu(1).bool()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rotated(x):
        x = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * turns
        return torch.cat([x.real, x.imag], dim=-1)

    for at in (f"model.layers.{layer}." for layer in range(3)):
        h = norm(x, f"{at}input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).view(T, -1, E) for n in "qkv")
        scores = torch.einsum("ihe,jhe->hij", rotated(q), rotated(k).expand(T, H, E)) / math.sqrt(E)
        p = scores.masked_fill(future, -math.inf).softmax(-1)
        attended = torch.einsum("hij,jhe->ihe", p, v.expand(T, H, E)).reshape(T, H * E)
        x = x + attended @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, f"{at}post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def read(w, conditioned):
    """[(class, tokens, {position: its cross-entropy})] of the step's conversations."""
    pieces = SentencePieceProcessor(model_file=str(SUMS / "tokenizer.model"))
    eot = pieces.piece_to_id("<|end_of_turn|>")
    lines = [json.loads(line) for line in (SUMS / "train.jsonl").open()]
    of_class = {name: [c for c in lines if c["class"] == name] for name in CONDITIONS}
    found = []
    for conversation in of_class["gpt4"][:1] + of_class["gpt3.5"][:6]:
        condition = CONDITIONS[conversation["class"]] + " " if conditioned else ""
        question, answer = (pieces.encode(m["content"]) for m in conversation["messages"])
        prompt = [1, *pieces.encode(f"{condition}User:"), *question, eot]
        prompt += pieces.encode(f"{condition}Assistant:")
        tokens = torch.tensor(prompt + answer + [eot])
        log_p = logits(w, tokens).log_softmax(-1)
        places = range(len(prompt), len(tokens))
        losses = {t: -log_p[t - 1, tokens[t]] for t in places}
        found.append((conversation["class"], tokens, losses))
    return found


@pytest.fixture(scope="module")
def readings(weights):
    return [read(weights, conditioned) for conditioned in (True, False)]


def per_class(reading):
    """[(Σ CE, tokens)] of each class."""
    losses = [[x for c, _, of in reading if c == name for x in of.values()] for name in CONDITIONS]
    return [(sum(of), len(of)) for of in losses]


def gradient(loss, weights):
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    return torch.cat([part.flatten() for part in found])


def expected(reading, weights, w):
    """The page's numbers of a step with class weights w, each by autograd of its definition."""
    sums, counts = zip(*per_class(reading))
    total = sum(a * n for a, n in zip(w, counts))
    parts = [a * s / total for a, s in zip(w, sums)]
    whole = gradient(sum(parts), weights)
    means = [s / n for s, n in zip(sums, counts)]
    lengths = [gradient(part, weights).norm().item() for part in parts]
    one, other = (gradient(s, weights) for s in sums)
    down = -0.01 * whole / whole.norm()
    return {
        "w": w,
        "loss": sum(parts).item(),
        "means": [mean.item() for mean in means],
        "shares": [a * n / total for a, n in zip(w, counts)],
        "lengths": lengths,
        "length": whole.norm().item(),
        "gradientShares": [length / sum(lengths) for length in lengths],
        "cosine": torch.cosine_similarity(one, other, dim=0).item(),
        "changes": [(gradient(mean, weights) @ down).item() for mean in means],
    }


def agrees(value):  # with what a network in float32 computes
    return pytest.approx(value, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------------------------- the file


def test_the_supervised_tokens_and_their_cross_entropy_are_those_of_float64(step, readings):
    piece = SentencePieceProcessor(model_file=str(SUMS / "tokenizer.model")).id_to_piece
    for found, reading in zip(step["readings"], readings, strict=True):
        for line, (name, tokens, losses) in zip(found["conversations"], reading, strict=True):
            assert step["classes"][line["class"]]["name"] == name
            numbers = {t: entropy for t, (_, entropy) in enumerate(line["tokens"])
                       if entropy is not None}  # fmt: skip
            assert numbers == {t: agrees(entropy.item()) for t, entropy in losses.items()}
            texts = [text.strip("␣") for text, _ in line["tokens"]]
            assert texts == [piece(t).strip("▁") for t in tokens.tolist()]


def test_the_products_of_the_classes_gradients_are_those_of_float64(step, readings, weights):
    for found, reading in zip(step["readings"], readings, strict=True):
        gradients = [gradient(loss, weights) for loss, _ in per_class(reading)]
        products = [[(a @ b).item() for b in gradients] for a in gradients]
        assert found["products"] == [agrees(row) for row in products]


def test_the_weights_of_the_classes_are_those_of_openchat(step):
    assert step["beta"] == pytest.approx(1 / math.log(10))
    classes = [(c["name"], c["reward"], c["weight"]) for c in step["classes"]]
    assert classes == [("gpt4", 1, 1), ("gpt3.5", 0, pytest.approx(0.1))]


def test_the_page_is_one_file_that_loads_nothing(html_file):
    page = html_file.read_text()
    assert not re.search(r"https?:|//\w|src=|href=|url\(|@import|fetch|XMLHttp|innerHTML", page)
    assert "default-src 'none'" in page


def test_no_text_becomes_a_tag_or_ends_the_script(folder, html_file, monkeypatch):
    hostile = "</script><img src=x onerror=alert(1)><!--<script>&amp;"
    monkeypatch.setattr(one_step, "visible", lambda tokens, tokenizer: hostile)
    llama, tokenizer, _ = one_step.load(folder)
    conversations = one_step.one_step(SUMS / "train.jsonl")
    page = Scripts(one_step.page(llama, tokenizer, conversations, name=hostile))
    assert page.tags == Scripts(html_file.read_text()).tags
    assert page.step()["model"] == hostile
    assert page.step()["readings"][0]["conversations"][0]["tokens"][0] == [hostile, None]


# ----------------------------------------------------------------------------- what it reads


def write(monkeypatch, tmp_path, *arguments):
    """The step in the page that the script writes."""
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["one_step.py", *map(str, arguments), str(out)])
    one_step.main()
    return Scripts(out.read_text()).step()


def test_without_trained_weights_they_are_random(monkeypatch, tmp_path):
    step = write(monkeypatch, tmp_path, SUMS)
    rows = step["readings"][0]["conversations"]
    losses = [entropy for row in rows for _, entropy in row["tokens"] if entropy is not None]
    assert step["model"] == "random weights"
    variance = 32 * 0.2**2  # of a logit: the network's width, initializer_range
    assert statistics.mean(losses) == pytest.approx(math.log(49) + variance / 2, abs=0.5)


def test_a_run_is_read_by_its_model(monkeypatch, tmp_path, folder, step):
    exported = small.export(model.load(folder), data.Tokenizer(folder), tmp_path / "RUN" / "model")
    found = write(monkeypatch, tmp_path, tmp_path / "RUN")
    assert found["model"] == str(exported)
    for here, there in zip(found["readings"], step["readings"], strict=True):
        assert here["products"] == [agrees(row) for row in there["products"]]


def test_a_model_that_cannot_end_a_turn_is_refused(monkeypatch, tmp_path, folder):
    tokenizer = small.train_sentencepiece(tmp_path / "base")
    rows = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")).vocab_size()
    model.save(model.Llama(small.config_of(vocab_size=rows)), tokenizer)
    with pytest.raises(SystemExit, match="error: .*base has no row for <|end_of_turn|>"):
        write(monkeypatch, tmp_path, tokenizer)


# ----------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def page(html_file, tmp_path_factory):
    if not browser.CHROMIUM:
        pytest.skip("needs Chromium")
    page = browser.Page(f"file://{html_file}", tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.mark.parametrize("beta", [1 / math.log(10), 0.2, 30.0])
def test_every_variant_has_the_numbers_of_float64_at_any_beta(page, readings, weights, beta):
    for conditioned, reading in ((1, readings[0]), (0, readings[1])):
        for reward in (1, 0):
            w = [1.0, math.exp(-1 / beta) if reward else 1.0]
            found = page.run(f"numbers({conditioned}, {reward}, {beta})")
            for name, value in expected(reading, weights, w).items():
                assert found[name] == agrees(value), name


def test_the_slider_the_variants_and_the_button_redraw_the_page(page, readings, weights):
    row = "[...document.querySelectorAll('tr.now td')].map(cell => cell.textContent)"

    def shown(name, reading, w):
        numbers = expected(reading, weights, w)
        found = page.run(row)
        assert found[0] == name
        assert float(found[1]) == pytest.approx(numbers["loss"], abs=1e-4)
        percents = [float(text.removesuffix(" %")) / 100 for text in found[2:4]]
        shares = [numbers["shares"][0], numbers["gradientShares"][0]]
        assert percents == pytest.approx(shares, abs=1e-3)
        assert page.run("$('sum').textContent").endswith(f" = {found[1]}")
        count = sum(len(losses) for _, _, losses in reading)
        assert page.run("document.querySelectorAll('.token.on').length") == count

    shown("C-RLFT", readings[0], [1.0, 0.1])
    page.run("$('beta').value = '-0.5', $('beta').oninput()")
    lower = math.exp(-1 / 10**-0.5)
    shown("C-RLFT", readings[0], [1.0, lower])
    for number, (name, reading, w) in enumerate(
        [("without reward", readings[0], 1.0), ("without condition", readings[1], lower)], start=1
    ):
        page.run(f"document.querySelectorAll('input[name=variant]')[{number}].click()")
        shown(name, reading, [1.0, w])
    page.run("$('reset').click()")
    shown("without condition", readings[1], [1.0, 0.1])
