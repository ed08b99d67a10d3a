"""The plan of a run: everything that is decided before a weight is read.

    flags -> classes, tokenizer, network -> tokenized data -> order of the steps -> memory
"""

import dataclasses
import functools
import math

import numpy as np
import torch

import data
import model
from loss import DEFAULT_CLASSES, class_table, class_weights, read_classes
from support import memory, report
from support.containers import sources
from support.dataset import Dataset
from support.files import model_folder, read_export
from support.flags import flag_of
from support.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Plan:
    # --- the run
    config: object  # train.Config
    world: int  # ranks
    classes: dict  # {name: SourceClass}
    class_weights: np.ndarray | None  # (C,), None without reward: every w is 1
    tokenizer: Tokenizer
    network: model.LlamaConfig
    dataset: Dataset
    eval_dataset: Dataset | None
    order: data.Order
    exports: set  # steps after which a model is exported: the last, and of every n-th epoch
    saves: set  # steps after which a checkpoint is saved: at exports, and every n-th
    evaluations: set  # steps after which the model is evaluated: 0, at exports, and every n-th
    # --- decisions on flags that were left open
    bf16: bool
    compile: bool
    flash: bool  # is FlashAttention used?
    max_length: int
    lr: float  # the peak
    shape: tuple | None  # (tokens, offsets, longest) of every batch if blocks are compiled
    # --- how the weights are loaded
    base: str | None  # fingerprint of --model's weights; None: random weights
    new_rows: int  # of the vocabulary that the checkpoint lacks
    untrained: list  # turn tokens whose rows in the checkpoint look untrained
    # --- memory
    recompute: int  # blocks whose activations are recomputed in backward
    spared: int  # of these, how many --adam-precision bf16 would spare
    size: memory.Size
    memory: dict  # {part: bytes per rank}
    available: int  # bytes per rank; 0: no limit known

    @property
    def fits(self):
        return not self.available or sum(self.memory.values()) <= self.available

    @property
    def eval_name(self):
        return self.eval_dataset.folder.name if self.eval_dataset else None


def make_plan(config, ranks, out):
    """The Plan of a run. Tokenizes the data; any error in the input is raised here."""
    table = DEFAULT_CLASSES
    if config.evaluate:
        config, table = evaluation_config(config)
    world = config.plan_ranks or ranks.world
    if world % config.replicas:
        raise ValueError(f"--replicas must be a divisor of {world} ranks")

    classes = read_classes(config.classes) if config.classes else class_table(table)
    weights = np.array([*class_weights(classes, config.beta).values()]) if config.reward else None

    tokenizer = Tokenizer(config.model)
    read = model.LlamaConfig.from_folder(config.model)
    tokenizer.check_vocabulary(read.vocab_size)
    rows = max(read.vocab_size, tokenizer.vocab_size)
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    network = dataclasses.replace(read, vocab_size=rows, **tokens)
    new_rows = rows - read.vocab_size
    pretrained = not config.random_weights and model.has_weights(config.model)
    if not (pretrained or config.random_weights or config.dry_run):  # which needs none
        hint = "" if config.evaluate else "; --random-weights starts from random ones"
        raise ValueError(f"{config.model}: no *.safetensors there{hint}")
    base, untrained = None, []
    if pretrained:
        model.check_weights(config.model, network, new_rows)
        base = model.fingerprint(config.model)
        if len(set(ranks.gather(base))) > 1:
            raise ValueError(f"--model {config.model}: the weights differ between machines")
        if not read_export(config.model):  # an export has all its rows
            untrained = model.untrained(config.model, tokenizer.marks)

    cuda = ranks.cuda or config.plan_memory > 0  # the plan is for a GPU, even if none is here
    obstacle = obstacle_to_bf16_moments(config, cuda)
    if obstacle and config.adam_precision == "bf16":
        raise ValueError(f"--adam-precision bf16 {obstacle}")
    bf16 = (config.precision or ("bf16" if cuda else "fp32")) == "bf16"
    flash = cuda and bf16 and network.head_dim <= model.LARGEST_FLASH_HEAD
    # Only FlashAttention has fixed shapes; anything else would compile again for every batch.
    compile = flash if config.compile is None else config.compile
    max_length = length_limit(config, network.max_position_embeddings)

    def tokenized(field):
        prepare = functools.partial(
            data.prepare, getattr(config, field), tokenizer, classes, out / "tokens",
            max_length=max_length, condition=config.condition, class_field=config.class_field,
            skip_bad=config.skip_bad, beta=config.beta if config.reward else math.inf,
            progress=report.Progress(f"tokenizing {flag_of(field)}"),
        )  # fmt: skip
        name = ranks.first_does(lambda: prepare().folder.name)
        return Dataset(out / "tokens" / name, sources(getattr(config, field), classes))

    dataset = tokenized("data")
    if not dataset.total_weight(slice(None), weights):
        raise ValueError("the weight of every class in --data is 0: raise --beta, or --no-reward")
    eval_dataset = tokenized("eval_data") if config.eval_data else None
    order = data.Order(dataset.lengths, config, world * config.accumulate)
    total, epochs = order.total, every(config.export_every, len(order.ends))
    exports = {total, *(min(order.ends[epoch - 1], total) for epoch in epochs)}
    evaluations = exports.union([0], every(config.eval_every, total)) if eval_dataset else set()

    share = dataset.total_weight(slice(None), None) / int(dataset.lengths.sum())
    supervised = config.batch_tokens * world * config.accumulate * share  # tokens per step

    fullest = order.fullest
    if eval_dataset:
        steps = data.pack(eval_dataset.lengths, config.batch_tokens, world, 0, 0)
        fullest = max(fullest, *(len(b) for step in steps for b in step))
    # The cu_seqlens of every batch, for the fullest bin and data.collate's padding.
    offsets = fullest + math.ceil(config.batch_tokens / max_length) + 1
    sequences = offsets - 1 if flash else 0
    shards, moment = world // config.replicas, 2 if config.adam_precision == "bf16" else 4
    size = memory.Size(shards, config.batch_tokens, bf16, compile, sequences, moment)
    available = memory.of_a_rank(config.plan_memory)
    recompute, spared = config.recompute, 0
    if recompute is None:
        recompute = memory.blocks_to_recompute(network, size, available)
        fewer = memory.blocks_to_recompute(network, size._replace(moment=2), available)
        spared = 0 if obstacle else recompute - fewer
    roomy = size._replace(resharded=False)
    if available and not memory.blocks_to_recompute(network, roomy, available):
        size = roomy  # with one all-gather per block instead of two
    recompute = min(recompute, network.num_hidden_layers)
    return Plan(
        config=config, world=world, classes=classes, class_weights=weights, tokenizer=tokenizer,
        network=network, dataset=dataset, eval_dataset=eval_dataset, order=order,
        exports=exports, saves=exports.union(every(config.save_every, total)),
        evaluations=evaluations,
        bf16=bf16, compile=compile, flash=flash, max_length=max_length,
        lr=auto_lr(network, tokenizer, supervised) if config.lr == "auto" else float(config.lr),
        shape=(config.batch_tokens, offsets, max_length) if compile else None,
        base=base, new_rows=new_rows, untrained=untrained,
        recompute=recompute, spared=spared, size=size,
        memory=memory.estimate(network, size, recompute), available=available,
    )  # fmt: skip


def every(n, last):
    return range(n, last + 1, n) if n else ()  # the multiples of n, up to `last`


def evaluation_config(config):
    """The Config for planning --evaluate, and its class table.

    An export is measured as it was trained: with its own classes, with or without conditions, cut
    at its own length. All tokens count equally: with a different --beta a class could weigh 0.
    """
    folder = model_folder(config.model)
    export = read_export(folder)
    length = config.max_length or (export and export.max_length)
    own = {
        "model": str(folder), "data": config.eval_data, "epochs": 1, "random_weights": False,
        "condition": config.condition and (not export or export.conditioned), "reward": False,
        "adam_precision": "fp32",
        "max_length": min(length, config.batch_tokens) if length else None,
    }  # fmt: skip
    return dataclasses.replace(config, **own), export.classes if export else DEFAULT_CLASSES


def obstacle_to_bf16_moments(config, cuda):
    """Why AdamW's moments cannot be in bf16, as the end of an error; None if they can."""
    if not cuda:
        return "needs CUDA (or --dry-run --plan-memory): AdamW on a CPU takes float32 moments only"
    if torch.__version__ < (2, 12):
        return f"needs torch 2.12 or later, and this is {torch.__version__}"
    beta = max(config.adam_beta1, config.adam_beta2)
    if 1 - beta < 2**-8:  # half the distance between bf16's numbers just above 1
        lost = f"a step changes a moment by {1 - beta:.1g} of it, which bf16 rounds away"
        return f"needs --adam-beta1 and --adam-beta2 of at most 0.996, not {beta}: {lost}"


def length_limit(flags, context):
    """Tokens to cut a conversation at, by default 4096 or less; `context` is the model's, or 0."""
    if flags.max_length and context and flags.max_length > context:
        raise ValueError(f"--max-length must be within the model's {context}")
    return flags.max_length or min(4096, flags.batch_tokens, context or 4096)


def auto_lr(network, tokenizer, supervised_tokens):
    """OpenChat's 3e-4 · sqrt(supervised tokens per step / 4e6); Mistral / 6, Llama 3 / 5.3."""
    llama = 5.3 if tokenizer.template.name == "openchat_3.6" else 1
    divisor = 6 if network.model_type == "mistral" else llama
    return 3e-4 / divisor * math.sqrt(supervised_tokens / 4e6)
