"""How fast does a step train: python bench/train.py --geometry mistral-7b [--markdown]

Random weights of a named geometry, or --model DIR: that folder's network and weights, with the row
of the vocabulary that training adds. Conversations of ShareGPT's lengths (bench/packing.py, scaled
to --max-length) with random tokens, the last 76 % of each supervised as in OpenChat's data, one in
ten of the expert class. This project trains on them packed; transformers on the same conversations
padded to the longest of a batch, as its Trainer does, with the same weights, class weights,
optimizer and tokens per step. "Trainer" is transformers' own (needs accelerate), "loop" a plain
one around its model, "Liger" that loop with Liger's patch, which knows no weights.

Each provider is a process of its own; rounds take turns on a CPU, and on a GPU, which may not hold
two of them, follow each other. Tokens are the conversations' own: no padding counts.
TFLOP/s as report.training_flops counts, without recomputation; MFU is their share of the peak that
report.py lists. The parts are shares of one profiled step: time on the GPU there, else on the CPU.
Beside this project's speed and peak stand their predictions: an estimate (`estimated`) and the
plan's memory. Alone on a GPU, its random weights are drawn there, which takes a second.
"""

import argparse
import datetime
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, which has a train.py
# ruff: noqa: E402

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import data
import model
import train
from bench.packing import NETWORKS, like_sharegpt
from support import dataset, plan, report, tokenizer

# hidden, intermediate, blocks, heads, vocabulary, key-value heads, head_dim
GEOMETRIES = NETWORKS | {
    "tiny": model.LlamaConfig(256, 688, 6, 8, 2002, 4, 32),
    "mistral-7b": model.LlamaConfig(
        4096, 14336, 32, 32, 32002, 8, 128, "mistral", max_position_embeddings=4096
    ),
}
SUPERVISED, EXPERTS = 0.76, 0.1  # of a conversation's tokens, of the conversations
WARMUP = 2  # steps before the first measured one


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--model", metavar="DIR", help="instead of a geometry: a folder to train")
    parser.add_argument("--batch-tokens", type=int, help="8192; 2048 for tiny")
    parser.add_argument("--accumulate", type=int, default=1, help="above 1: this project alone")
    parser.add_argument("--max-length", type=int, help="4096; 512 for tiny")
    parser.add_argument("--recompute", type=int, help="blocks, as train.py's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=installed())
    parser.add_argument("--markdown", action="store_true", help="a table for RESULTS.md")
    args = parser.parse_args()
    tiny = args.geometry == "tiny" and not args.model
    args.batch_tokens = args.batch_tokens or (2048 if tiny else 8192)
    args.max_length = args.max_length or (512 if tiny else 4096)
    args.providers = args.providers if args.accumulate == 1 else ["this project"]
    results = measure(args)
    if "this project" not in results:
        sys.exit("this project was not measured, so there is nothing to compare with")
    print_results(args, results)


def installed():
    has = {name: importlib.util.find_spec(name) for name in ("transformers", "accelerate")}
    names = ["this project"]
    names += ["loop"] if has["transformers"] else []
    names += ["Trainer"] if all(has.values()) else []
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")
    return names + (["Liger"] if liger else [])


# ------------------------------------------------------------------------------------ workload


def synthetic_plan(args, ranks, folder):
    """train.py's plan of a run, but over a generated data set, and maybe of a named geometry."""
    network, tokens = network_of(args), folder / "tokens" / "generated"
    tokens.mkdir(parents=True)
    count = (WARMUP + args.rounds * args.steps + 2) * args.accumulate * args.batch_tokens
    lengths = like_sharegpt(count // 16)
    lengths = (lengths * args.max_length // 4096).clip(4, args.max_length)
    write_dataset(tokens, lengths[: np.searchsorted(lengths.cumsum(), count)], network.vocab_size)
    if not args.model:
        model.LlamaConfig.from_folder = lambda _: network
        tokenizer.OfFolder.check_vocabulary = lambda *_: None
    data.prepare = lambda *_, **__: SimpleNamespace(folder=tokens)
    plan.sources = lambda *_: []
    config = train.Config(
        model=args.model or str(ROOT / "examples" / "sums"),  # this one for its tokenizer, unused
        data=["generated"],
        out=str(folder),
        epochs=1,
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        max_length=args.max_length,
        recompute=args.recompute,
        random_weights=not args.model,
    )
    return train.make_plan(config, ranks, folder)


def network_of(args):
    if args.model:
        return model.LlamaConfig.from_folder(args.model)
    return GEOMETRIES[args.geometry]


def write_dataset(folder, lengths, vocab_size):
    """Conversations of random tokens in the arrays of data.prepare."""
    rng = np.random.default_rng(0)
    index = np.zeros(len(lengths), dataset.INDEX)
    ends = np.cumsum(lengths)
    index["start"], index["length"] = ends - lengths, lengths
    index["supervised"] = index["factors"] = (SUPERVISED * lengths).astype(int)
    index["own_weight"] = -1  # none: that of the class
    index["source_class"] = rng.random(len(lengths)) > EXPERTS
    weights = np.zeros(ends[-1])
    for end, supervised in zip(ends, index["supervised"]):
        weights[end - supervised : end] = 1.0
    arrays = {"tokens": rng.integers(vocab_size, size=ends[-1]), "weights": weights, "index": index}
    for name, dtype in dataset.ARRAYS.items():
        arrays[name].astype(dtype).tofile(folder / f"{name}.bin")
    (folder / "done.json").write_text(json.dumps({"report": {"conversations": len(lengths)}}))


# ----------------------------------------------------------------------------------- providers


class ThisProject:
    """The loop of train.train, without its log, evaluations and checkpoints."""

    def __init__(self, args, folder):
        self.ranks = train.Ranks()
        self.plan = synthetic_plan(args, self.ranks, folder)
        torch.use_deterministic_algorithms(not self.ranks.cuda)
        torch.utils.deterministic.fill_uninitialized_memory = False
        if self.ranks.cuda and args.providers == ["this project"]:
            model.random_parameters = drawn_on_the_device
        self.llama, self.optimizer = train.build(self.plan, self.ranks)
        self.loader = ThreadPoolExecutor(1)

    def run(self, steps):
        """(seconds, seconds of them spent waiting for data) of some steps."""
        plan, ranks, waited = self.plan, self.ranks, 0.0
        began = time.perf_counter()
        # Here steps count from 0, in train.py from 1.
        pending = self.loader.submit(train.load_step, plan, ranks, steps[0] + 1)
        for step in steps:
            asked = time.perf_counter()
            _, batches, total_weight = pending.result()
            waited += time.perf_counter() - asked
            if step + 1 < steps.stop:
                pending = self.loader.submit(train.load_step, plan, ranks, step + 2)
            sums, _ = train.forward_backward(plan, ranks, self.llama, batches, total_weight)
            train.clip_and_update(self.optimizer, sums, plan.lr, plan.config.clip)
            self.loss = sums.to_host().loss  # where the trainer waits for the GPU
        return seconds_since(began), waited


@torch.no_grad()
def drawn_on_the_device(llama, seed):
    """In the place of model.random_parameters, which draws them one by one on the CPU."""
    for name, parameter in llama.named_parameters():
        local = model.local_tensor(parameter)
        if name.endswith("norm.weight"):
            local.fill_(1.0)
        else:
            local.normal_(0, llama.config.initializer_range)


class Loop:
    """transformers' model on the conversations of this project's step, in padded batches."""

    liger = False

    def __init__(self, args, folder):
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        ranks = SimpleNamespace(world=1, rank=0, cuda=cuda, device=self.device)
        ranks.first_does = lambda function: function()
        ranks.gather = lambda value: [value]
        self.plan = synthetic_plan(args, ranks, folder)
        self.model = their_model(self.plan, folder, self.liger).to(self.device).train()
        config = self.plan.config
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.plan.lr, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps, weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self.size = max(1, round(config.batch_tokens / self.plan.dataset.lengths.mean()))

    def run(self, steps):
        began, waited = time.perf_counter(), 0.0
        for step in steps:
            conversations = shuffled(self.plan, [step])
            total = self.plan.dataset.total_weight(conversations, self.plan.class_weights)
            self.loss = 0.0
            for start in range(0, len(conversations), self.size):
                asked = time.perf_counter()
                batch = self.collate(conversations[start : start + self.size])
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                waited += time.perf_counter() - asked
                with torch.autocast("cuda", torch.bfloat16, enabled=self.plan.bf16):
                    loss = self.weighted_sum(self.model, batch) / total
                loss.backward()
                self.loss += loss.item()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return seconds_since(began), waited

    def collate(self, conversations):
        """{input_ids, attention_mask, targets, weights}, each (B, L), padded at the end."""
        batches = [data.collate(self.plan.dataset, [c], self.plan.class_weights)
                   for c in conversations]  # fmt: skip
        shape = len(batches), max(len(batch.tokens) for batch in batches)
        out = {name: torch.zeros(shape, dtype=torch.int64)
               for name in ("input_ids", "attention_mask", "targets")}  # fmt: skip
        out["weights"] = torch.zeros(shape)
        for row, batch in enumerate(batches):
            out["input_ids"][row, : len(batch.tokens)] = batch.tokens
            out["attention_mask"][row, : len(batch.tokens)] = 1
            out["targets"][row, batch.rows] = batch.targets
            out["weights"][row, batch.rows] = batch.weights
        return out

    @staticmethod
    def weighted_sum(model, batch):
        """Σ w·CE in float32 over all positions, as a Trainer's compute_loss would have it."""
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none"
        )
        return losses @ batch["weights"].flatten()


class Liger(Loop):
    """The loop with Liger's kernels; its fused loss has no weights, so each is 1."""

    liger = True

    @staticmethod
    def weighted_sum(model, batch):
        labels = batch["targets"].masked_fill(batch["weights"] == 0, -100)
        labels = F.pad(labels[:, :-1], (1, 0), value=-100)  # the model shifts them back
        fed = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**fed, labels=labels, num_items_in_batch=1).loss


class Trainer(Loop):
    """transformers.Trainer over the conversations of some steps, as many a step as this project."""

    def run(self, steps):
        import transformers

        outer, times, config = self, {}, self.plan.config

        class Weighted(transformers.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return outer.weighted_sum(model, inputs) / inputs["weights"].sum()

        class Clock(transformers.TrainerCallback):
            def on_train_begin(self, *_, **__):
                times["began"] = time.perf_counter()

            def on_train_end(self, *_, **__):
                times["seconds"] = seconds_since(times["began"])

        settings = transformers.TrainingArguments(
            output_dir=config.out, per_device_train_batch_size=self.size, num_train_epochs=1,
            max_grad_norm=config.clip, bf16=self.plan.bf16, use_cpu=self.device.type == "cpu",
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Weighted(
            self.model, settings, data_collator=self.collate,
            train_dataset=shuffled(self.plan, steps).tolist(), callbacks=[Clock()],
            optimizers=(self.optimizer, torch.optim.lr_scheduler.LambdaLR(self.optimizer, one)),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return times["seconds"], 0.0


def one(step):
    return 1.0


def shuffled(plan, steps):
    """The conversations of some of this project's steps, in random order."""
    conversations = np.concatenate([b for step in steps for b in plan.order.bins(step + 1)])
    return np.random.default_rng(0).permutation(conversations.astype(np.int64))


def seconds_since(began):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def their_model(plan, folder, liger):
    """transformers' model of the same network, in float32, with this project's weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    if liger:
        import liger_kernel.transformers as peer

        getattr(peer, f"apply_liger_kernel_to_{plan.network.model_type}")()
    model.write_json(Path(folder) / "config.json", plan.network.to_json())
    with torch.device("meta"):
        ours = model.Llama(plan.network)
    ours.to_empty(device="cpu")
    if plan.base:
        new_tokens = [plan.tokenizer.eot] if plan.tokenizer.eot_is_new else plan.untrained
        rows = plan.new_rows, new_tokens, plan.tokenizer.ordinary
        model.fill_parameters(ours, plan.config.model, *rows)
    else:
        model.random_parameters(ours, plan.config.seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = ours.state_dict()
    theirs.load_state_dict({model.HEAD: weights[model.EMBEDDING]} | weights)  # if they are tied
    theirs.config.use_cache = False
    if plan.recompute:
        theirs.gradient_checkpointing_enable()
    return theirs


PROVIDERS = {"this project": ThisProject, "loop": Loop, "Trainer": Trainer, "Liger": Liger}


# ----------------------------------------------------------------------------------- measuring


def measure(args):
    """{provider: [a result of serve a round, the last one]}; on a CPU the rounds take turns."""
    if not torch.cuda.is_available():
        return rounds_of(args.providers, args)
    results = {}
    for name in args.providers:
        try:
            results |= rounds_of([name], args)
            speeds = [round(result["tokens/s"]) for result in results[name][:-1]]
            print(f"{name}: tokens/s {speeds}", flush=True)
        except (EOFError, BrokenPipeError):  # its process said why
            print(f"{name}: ended early, and is left out", flush=True)
    return results


def rounds_of(names, args):
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in names}
    workers = [context.Process(target=serve, args=(pipes[n][1], n, args)) for n in names]
    for worker in workers:
        worker.start()
    for _, end in pipes.values():
        end.close()  # so that a worker's death is an EOFError here
    ends = {name: pipe[0] for name, pipe in pipes.items()}
    results = {name: [] for name in names}
    for number in [*range(args.rounds), None]:
        for name in names:
            ends[name].send(number)
            results[name].append(ends[name].recv())
    for worker in workers:
        worker.join()
    return results


def serve(pipe, name, args):
    """Answers each round's number with its figures, and None with the parts and the peak."""
    with tempfile.TemporaryDirectory() as folder:
        provider = PROVIDERS[name](args, Path(folder))
        provider.run(range(1))
        first_loss = getattr(provider, "loss", math.nan)
        provider.run(range(1, WARMUP))
        while (number := pipe.recv()) is not None:
            start = WARMUP + number * args.steps
            pipe.send(figures(provider, range(start, start + args.steps)))
        peak = report.peak_memory(SimpleNamespace(cuda=torch.cuda.is_available()))
        planned = sum(provider.plan.memory.values())
        last = WARMUP + args.rounds * args.steps
        parts = profiled(provider, range(last, last + 1))
        results = {"peak": peak, "planned": planned, "parts": parts, "first loss": first_loss}
        pipe.send(results)


def figures(provider, steps):
    began = time.process_time()
    seconds, _ = provider.run(steps)
    processor = time.process_time() - began
    plan = provider.plan
    conversations = shuffled(plan, steps)
    lengths = plan.dataset.lengths[conversations].astype(float)
    flops = report.training_flops(plan.network, lengths.sum(), (lengths**2).sum())
    supervised = plan.dataset.total_weight(conversations, None)
    return {
        "tokens/s": lengths.sum() / seconds,
        "supervised/s": supervised / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "tokens/CPU s": lengths.sum() / processor,
        "estimate": lengths.sum() / estimated(plan, lengths, len(steps)),
    }


# Bytes a second that a copy reaches, read and written; of the products 70 % of the peak.
COPIES = {"H200": 4.2e12, "H100": 2.95e12}


def estimated(plan, lengths, steps):
    """Seconds of steps of this project on one GPU, as expected before any ran; NaN on others."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    copies = next((COPIES[card] for card in COPIES if card in name), math.nan)
    n, tokens, micro_batches = plan.network, lengths.sum(), steps * plan.config.accumulate
    d, f, layers, parameters = (
        n.hidden_size, n.intermediate_size, n.num_hidden_layers, n.parameter_count()
    )  # fmt: skip
    q, kv = n.num_attention_heads * n.head_dim, n.num_key_value_heads * n.head_dim
    head, again = n.vocab_size * d, plan.recompute / layers
    products = 2 * (parameters - 2 * head) * tokens * (3 + again) + 6 * head * SUPERVISED * tokens
    attention = 2 * layers * q * (lengths**2).sum()  # of the forward; the backward's is 2.5 times
    elementwise = layers * tokens * (2 * (30 * d + 9 * f + 4 * q + 4 * kv))  # as Inductor fuses it
    fsdp = 36 * parameters * micro_batches  # casts, copies, sums of gradients
    adamw = 36 * parameters * steps
    return (
        products / (0.7 * 989e12)
        + attention * ((1 + again) / 330e12 + 2.5 / 240e12)
        + (elementwise + fsdp + adamw) / copies
        + 0.012 * steps  # of the host, between them
    )


PARTS = {  # the first that an operation or one it is called by belongs to
    "optimizer": ("Optimizer.step", "_fused_adamw", "_foreach_norm"),
    "head + loss": ("LinearWeightedCrossEntropy", "LigerFusedLinearCrossEntropy"),
    "attention": ("scaled_dot_product", "flash_attention", "varlen_attn"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
}


def profiled(provider, steps):
    """{part: share of the time} of some steps; transformers' head is told by its shapes."""
    cuda = torch.cuda.is_available()
    by_name = isinstance(provider, ThisProject)
    logits_width = None if by_name else provider.plan.network.vocab_size
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, record_shapes=True) as profiler:
        seconds, waited = provider.run(steps)
    shares = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            busy = event.self_device_time_total if cuda else event.self_cpu_time_total
            shares[part_of(event, logits_width)] += busy / 1e6 / seconds
    return shares | {"waiting for data": waited / seconds}


def part_of(event, logits_width):
    names, logits = [], False
    while event is not None:
        names.append(event.name)
        embedding = "embedding" in event.name
        logits |= not embedding and any(logits_width in shape for shape in event.input_shapes or ())
        event = event.cpu_parent
    for part, words in PARTS.items():
        if any(word in name for word in words for name in names):
            return "head + loss" if part == "products" and logits else part
    return "head + loss" if logits else "other"


# ------------------------------------------------------------------------------------- showing


def print_results(args, results):
    cuda = torch.cuda.is_available()
    network, name = network_of(args), Path(args.model).name if args.model else args.geometry
    device = torch.cuda.get_device_name() if cuda else (
        f"CPU, {torch.get_num_threads()} thread a process"
    )  # fmt: skip
    versions = f"PyTorch {torch.__version__}"
    if len(results) > 1:
        import transformers

        versions += f", transformers {transformers.__version__}"
    print(f"\n{'### ' * args.markdown}{name}: {device}, {versions}, "
          f"{datetime.date.today()}\n")  # fmt: skip
    losses = ", ".join(
        f"{name} {found[-1]['first loss']:.6f}"
        for name, found in results.items()
        if not math.isnan(found[-1]["first loss"])
    )
    print(
        f"{network.parameter_count():,} parameters, conversations of up to {args.max_length} "
        f"tokens, {args.accumulate} x {args.batch_tokens} tokens a step; {args.rounds} rounds of "
        f"{args.steps} steps, "
        f"medians. Loss of the first step: {losses}.\n"
    )
    ours = results["this project"]
    rows = [row(name, found, ours, cuda) for name, found in results.items()]
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for cells in rows:
        print("| " + " | ".join(map(str, cells.values())) + " |")


def row(name, found, ours, cuda):
    def median(key):
        return statistics.median(result[key] for result in found[:-1])

    def faster(key):
        pairs = zip(ours[:-1], found[:-1], strict=True)
        return f"{statistics.median(mine[key] / theirs[key] for mine, theirs in pairs):.2f}"

    speeds = [result["tokens/s"] for result in found[:-1]]
    cells = {
        "": name,
        "tokens/s": f"{median('tokens/s'):,.0f}",
        "slowest to fastest round": f"{min(speeds):,.0f} to {max(speeds):,.0f}",
        "supervised tokens/s": f"{median('supervised/s'):,.0f}",
        "TFLOP/s": f"{median('TFLOP/s'):.3f}",
    }
    if cuda:
        peak = report.peak_flops(torch.cuda.get_device_name())
        cells["MFU"] = f"{median('TFLOP/s') * 1e12 / peak:.1%}" if peak else "peak not known"
    if cuda and name == "this project":
        cells["estimate of tokens/s"] = f"{median('estimate'):,.0f}"
        cells["planned GiB"] = f"{found[-1]['planned'] / 2**30:.2f}"
    elif cuda:
        cells |= {"estimate of tokens/s": "", "planned GiB": ""}
    cells["this project is faster by"] = faster("tokens/s")
    if not cuda:  # unlike the clock's, the same whatever else the machine does
        cells["by processor time"] = faster("tokens/CPU s")
    cells["peak GiB"] = f"{found[-1]['peak'] / 2**30:.2f}"
    return cells | {part: f"{share:.1%}" for part, share in found[-1]["parts"].items()}


if __name__ == "__main__":
    main()
