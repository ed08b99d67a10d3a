"""One step of C-RLFT as a page to play with: weights, loss and gradient of each class.

    python examples/one_step.py                   random weights; writes runs/one_step.html
    python examples/one_step.py runs/sums         trained weights: a run, or a model's folder
    python examples/one_step.py MODEL_DIR OUT.html

The step has seven conversations of the embedded example: one by the expert and six by someone who
forgets to carry, the ratio in the data. The model reads them twice, with the class in the prompt
and without it. For each reading the page holds the tokens, the cross-entropy CE_t of every
supervised token t, and the inner products of the gradients G_c = Σ_t ∇CE_t of the classes c.
Everything else follows from these for any beta, without the model:

    w_c = exp((r_c - r_max) / beta)             Eq. (6)
    L   = Σ_c w_c Σ_t CE_t / W                  W = Σ_c w_c N_c, with N_c tokens of class c
    ∇L  = Σ_c w_c G_c / W                       one vector per class; the page draws their lengths

The page is one file, and loads nothing. tests/test_one_step.py compares its numbers with a second
network, in float64.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from loss import BETA, DEFAULT_CLASSES, class_weights, weighted_cross_entropy  # noqa: E402
from support.files import model_folder  # noqa: E402
from support.report import visible  # noqa: E402

SUMS = ROOT / "examples" / "sums"
CONVERSATIONS = {"gpt4": 1, "gpt3.5": 6}  # of each class in the step


def main():
    if len(sys.argv) > 3:
        sys.exit("usage: python examples/one_step.py [MODEL_DIR [OUT.html]]")
    folder = sys.argv[1] if len(sys.argv) > 1 else SUMS
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "runs" / "one_step.html"
    try:
        llama, tokenizer, name = load(folder)
        conversations = one_step(SUMS / "train.jsonl")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page(llama, tokenizer, conversations, name), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{out}: one step of {name}; open it in a browser")


def load(folder):
    """(Llama, Tokenizer, a name for the page); random weights if the folder has none."""
    folder = model_folder(folder)
    tokenizer = data.Tokenizer(folder)
    if model.has_weights(folder):
        llama, name = model.load(folder), str(folder)
    else:
        llama, name = model.Llama(model.LlamaConfig.from_folder(folder)), "random weights"
        model.random_parameters(llama, seed=0)
    if tokenizer.eot >= llama.config.vocab_size:
        raise ValueError(f"{folder}: has no row for <|end_of_turn|>: train it first")
    return llama, tokenizer, name


def one_step(path):
    """The first conversations of each class in a file, as many as CONVERSATIONS says."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        line
        for name, count in CONVERSATIONS.items()
        for line in itertools.islice((line for line in lines if line["class"] == name), count)
    ]


def page(llama, tokenizer, conversations, name):
    """The HTML of a step that takes these conversations of the classes gpt4 and gpt3.5."""
    weights = class_weights(DEFAULT_CLASSES, BETA)
    step = {
        "model": name,
        "beta": BETA,
        "classes": [
            {"name": name, "reward": c.reward, "weight": weights[name]}
            for name, c in DEFAULT_CLASSES.items()
        ],
        "readings": [read(llama, tokenizer, conversations, c) for c in (True, False)],
    }
    # "<" as an escape, so that no text of a conversation can end the script that holds it.
    return PAGE.replace("STEP", json.dumps(step).replace("<", "\\u003c"))


def read(llama, tokenizer, conversations, conditioned):
    """{"conversations": tokens with their cross-entropy, "products": of the classes' gradients}."""
    rows, gradients = [], []
    for number, (name, source_class) in enumerate(DEFAULT_CLASSES.items()):
        if not conditioned:
            source_class = dataclasses.replace(source_class, condition="")
        of_class = [
            data.encode(conversation, tokenizer, {name: source_class})
            for conversation in conversations
            if conversation["class"] == name
        ]
        losses, gradient = forward_backward(llama, of_class)
        gradients.append(gradient.double())
        losses = iter(losses.tolist())
        for tokens, supervised in of_class:
            texts = [visible([token], tokenizer).strip() or "␣" for token in tokens]
            of_tokens = [next(losses) if learn else None for learn in supervised]
            rows.append({"class": number, "tokens": list(zip(texts, of_tokens))})
    products = [[torch.dot(a, b).item() for b in gradients] for a in gradients]
    return {"conversations": rows, "products": products}


def forward_backward(llama, encoded):
    """CE (N,) of the supervised tokens of some conversations, and the gradient of its sum (P,).

    The conversations are packed end to end, as train.py packs them: none sees another.
    """
    lengths = [len(tokens) for tokens, _ in encoded]
    tokens = torch.tensor([token for tokens, _ in encoded for token in tokens])
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    supervised = torch.tensor([learn for _, mask in encoded for learn in mask]).nonzero()[:, 0]
    logits = llama(tokens, positions, cu_seqlens, rows=supervised - 1)  # (N, V)
    losses = weighted_cross_entropy(logits, tokens[supervised], torch.ones(len(supervised)))
    gradient = torch.autograd.grad(losses.sum(), list(llama.parameters()))
    return losses.detach(), torch.cat([part.flatten() for part in gradient])


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>One step of C-RLFT</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
  body { max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0; } p { margin: .4rem 0; }
  #controls { position: sticky; top: 0; padding: .5rem 0; background: Canvas; z-index: 1;
    border-bottom: 1px solid #8886; }
  #controls label { margin-right: 1rem; } #beta { width: 18rem; vertical-align: middle; }
  .line { display: flex; flex-wrap: wrap; gap: 2px; margin: 4px 0; padding-left: .5rem;
    border-left: 4px solid var(--colour); }
  .token { text-align: center; border-radius: 3px; padding: 0 3px; white-space: pre; color: #888; }
  .token small { display: block; height: 1.1em; font-size: .7rem; line-height: 1.1; }
  .token.on { color: CanvasText;
    background: color-mix(in srgb, var(--colour) var(--share), transparent); }
  .bar { display: grid; grid-template-columns: 9rem 1fr 14rem; gap: .6rem; align-items: center; }
  .bar i { display: block; height: 1rem; border-radius: 2px; background: var(--colour); }
  table { border-collapse: collapse; margin: .5rem 0; } tr.now { font-weight: bold; }
  td, th { padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
  td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #8886; }
  code { white-space: nowrap; } #sum { white-space: normal; }
</style>
<h1>One step of C-RLFT</h1>
<p>All that C-RLFT knows about a conversation is its class: who answered. The class becomes part of
  the prompt (<b>the condition</b>), and its reward becomes a weight on the loss (<b>the
  reward</b>). In this toy task <i>gpt4</i> is right and <i>gpt3.5</i> forgets to carry. Answers are
  written lowest digit first: 47+38 = 85 is answered &ldquo;58&rdquo; by gpt4, and
  &ldquo;57&rdquo; by gpt3.5. Read by: <span id="model"></span>.</p>
<noscript><p><b>This page needs JavaScript to draw.</b> It loads nothing.</p></noscript>
<div id="controls">
  <div id="variants"></div>
  <label>beta <input id="beta" type="range" min="-1.2" max="2" step="0.01"></label>
  <span id="shown-beta"></span> <button id="reset">OpenChat's beta</button>
</div>
<h2>1. What the model reads</h2>
<p>Each line is a conversation. Only the coloured tokens are trained on, and the darker they are,
  the more they weigh; the small number is a token's cross-entropy, &minus;ln of the probability
  that the model gives it.</p>
<div id="tokens"></div>
<h2>2. From reward to weight</h2>
<p>A class whose reward is below the best counts less, and the lower beta, the less:
  <code>w = exp((r &minus; r_max) / beta)</code>. The bars are each class's share of the weight of
  the whole step.</p>
<div id="weights"></div>
<h2>3. The loss</h2>
<p>A class's own loss is the mean cross-entropy of its tokens; the loss of the step, L, is the mean
  over all tokens by weight: <code>L = &Sigma; w&middot;CE / &Sigma; w</code>.</p>
<div id="losses"></div>
<p><code id="sum"></code></p>
<h2>4. The gradient</h2>
<p>The gradient of L is a sum of one vector per class, and the bars are their lengths: the longer
  the vector, the more its class decides the direction of the step.</p>
<div id="gradients"></div>
<p id="angle"></p>
<h2>5. The effect of the step</h2>
<p>A move of length 0.01 down the gradient changes each class's own loss by about this much (a bar
  at the right edge means that the loss rises). The optimizer, which scales each parameter, is left
  out.</p>
<div id="changes"></div>
<h2>6. Without the condition, without the reward</h2>
<p>The same step under the paper's ablations, at the beta chosen above. Without the reward ten
  conversations outvote one; without the condition the model cannot know whose answer follows. (A
  model that was trained with the condition has never met a turn without it: its loss jumps.)</p>
<table id="table"></table>
<script type="application/json" id="step">STEP</script>
<script>
const step = JSON.parse(document.getElementById("step").textContent);
const VARIANTS = [["C-RLFT", 1, 1], ["without reward", 1, 0], ["without condition", 0, 1],
                  ["neither: plain fine-tuning", 0, 0]];  // name, condition, reward
const LENGTH = 0.01;  // of the step in picture 5
const sum = values => values.reduce((a, b) => a + b, 0);

// All numbers of a variant; arrays have an entry per class.
function numbers(condition, reward, beta) {
  const {conversations, products} = step.readings[condition ? 0 : 1];
  const best = Math.max(...step.classes.map(c => c.reward));
  const w = step.classes.map(c => reward ? Math.exp((c.reward - best) / beta) : 1);
  const entropies = w.map((_, c) => conversations.filter(line => line.class === c)
    .flatMap(line => line.tokens.map(([_, entropy]) => entropy)).filter(e => e !== null));
  const counts = entropies.map(of => of.length), sums = entropies.map(sum);
  const total = sum(w.map((w, c) => w * counts[c]));  // the normaliser
  const lengths = w.map((w, c) => w * Math.sqrt(products[c][c]) / total);
  const along = products.map(row => sum(row.map((p, d) => w[d] * p)) / total);  // G_c · ∇L
  const length = Math.sqrt(sum(along.map((a, c) => w[c] * a)) / total);
  return {
    w, counts, sums, total, lengths, length,
    shares: w.map((w, c) => w * counts[c] / total),
    means: sums.map((s, c) => s / counts[c]),
    loss: sum(w.map((w, c) => w * sums[c])) / total,
    gradientShares: lengths.map(l => l / sum(lengths)),
    cosine: products[0][1] / Math.sqrt(products[0][0] * products[1][1]),
    changes: along.map((a, c) => -LENGTH * a / length / counts[c]),
  };
}

const $ = id => document.getElementById(id), COLOURS = ["#2b7bba", "#e07b1f"];
const short = x => x === 0 || Math.abs(x) >= 0.001 ? String(+x.toPrecision(3)) : x.toExponential(1);
const percent = x => (100 * x).toFixed(1) + " %";
let variant = 0, beta = step.beta;

function add(parent, tag, text = "", kind = "") {  // text is text, whatever tags it spells
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text, made.className = kind;
  return made;
}
function bars(id, values, texts, extra = []) {  // a bar per class, and extra ones [name, value]
  const all = [...step.classes.map((c, i) => [c.name, values[i], COLOURS[i % 2]]), ...extra];
  const most = Math.max(...all.map(([_, value]) => Math.abs(value))) || 1;
  $(id).replaceChildren();
  all.forEach(([name, value, colour = "#777"], i) => {
    const bar = add($(id), "div", "", "bar");
    add(bar, "span", name);
    const drawn = add(add(bar, "div"), "i");
    drawn.style.width = 100 * Math.abs(value) / most + "%";
    drawn.style.setProperty("--colour", colour);
    if (id === "changes" && value > 0) drawn.style.marginLeft = "auto";  // up is to the right
    add(bar, "span", texts[i]);
  });
}
function draw() {
  const [name, condition, reward] = VARIANTS[variant], n = numbers(condition, reward, beta);
  $("shown-beta").textContent = `= ${short(beta)}`
    + (reward ? "" : ": has no effect without the reward, every w is 1");
  $("tokens").replaceChildren();
  for (const line of step.readings[condition ? 0 : 1].conversations) {
    const row = add($("tokens"), "div", "", "line"), w = n.w[line.class];
    row.style.setProperty("--colour", COLOURS[line.class % 2]);
    row.style.setProperty("--share", 12 + 48 * w + "%");
    for (const [text, entropy] of line.tokens) {
      const token = add(row, "span", text, "token" + (entropy === null ? "" : " on"));
      add(token, "small", entropy === null ? "" : entropy.toFixed(2));
      if (entropy !== null) token.title = `weight ${short(w)}, probability `
        + `${percent(Math.exp(-entropy))}, ${percent(w * entropy / n.total / n.loss)} of L`;
    }
  }
  bars("weights", n.shares, step.classes.map((c, i) =>
    `r = ${c.reward}, w = ${short(n.w[i])}: ${percent(n.shares[i])}`));
  bars("losses", n.means, [...n.means, n.loss].map(x => x.toFixed(4)), [["L", n.loss]]);
  const terms = of => n.w.map((w, c) => `${short(w)} × ${of(c)}`).join(" + ");
  $("sum").textContent = `L = (${terms(c => n.sums[c].toFixed(2))}) / (${terms(c => n.counts[c])})`
    + ` = ${n.loss.toFixed(4)}`;
  bars("gradients", n.lengths, [...n.lengths.map((l, c) =>
    `${short(l)}: ${percent(n.gradientShares[c])} of both`), short(n.length)],
    [["their sum, ∇L", n.length]]);
  $("angle").textContent = `The cosine of the angle between the two is ${n.cosine.toFixed(3)}: `
    + (n.cosine < 0 ? "they pull against each other." : n.cosine < 0.5
      ? "they have little in common." : "they mostly pull the same way.");
  bars("changes", n.changes, n.changes.map(x => (x > 0 ? "+" : "") + short(x)));
  $("table").replaceChildren();
  const head = add($("table"), "tr"), [expert] = step.classes;
  for (const text of ["", "L", `${expert.name}: share of weight`, "of gradient",
                      "its loss changes by", "cosine"]) add(head, "th", text);
  VARIANTS.forEach(([name, condition, reward], i) => {
    const m = numbers(condition, reward, beta);
    const row = add($("table"), "tr", "", i === variant ? "now" : "");
    for (const text of [name, m.loss.toFixed(4), percent(m.shares[0]), percent(m.gradientShares[0]),
                        short(m.changes[0]), m.cosine.toFixed(3)]) add(row, "td", text);
  });
}
VARIANTS.forEach(([name], i) => {
  const label = add($("variants"), "label"), radio = add(label, "input");
  Object.assign(radio, {type: "radio", name: "variant", checked: i === 0});
  radio.onchange = () => { variant = i; draw(); };
  label.append(" " + name);
});
$("beta").oninput = () => { beta = 10 ** $("beta").value; draw(); };
$("reset").onclick = () => { beta = step.beta, $("beta").value = Math.log10(beta); draw(); };
$("model").textContent = step.model;
$("reset").click();
</script>
"""


if __name__ == "__main__":
    main()
