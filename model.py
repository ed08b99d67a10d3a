"""Llama and Mistral in plain PyTorch over packed conversations, and their Hugging Face folders.

A row of T tokens holds many conversations end to end; none sees another:

    tokens      [ a a a a b b c c c c c ]      (T,)
    positions   [ 0 1 2 3 0 1 0 1 2 3 4 ]      (T,)   each conversation starts at 0
    cu_seqlens  [ 0       4   6         11 ]   offsets of the conversations, the last one is T

Module names, tensor names and config keys are those of transformers' LlamaForCausalLM.
Shapes: T tokens, N rows that reach the head, D hidden, H heads, K key-value heads, E head_dim,
F intermediate, V vocabulary.
"""

import dataclasses
import functools
import inspect
import json
import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from loss import without_repeats

# From torch 2.12 on grouped heads need this argument, which earlier versions do not have.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
LARGEST_FLASH_HEAD = 256  # FlashAttention 2 takes no larger head_dim

# ------------------------------------------------------------------------------ configuration

# Keys that change the network, with the only value implemented here.
ONLY_VALUE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}
# Keys that do not change the logits: of files, tools, training, generation, other kinds of models.
IGNORED = set(
    """
    add_cross_attention architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder is_llama_config
    label2id length_penalty max_length max_new_tokens max_sequence_length min_length
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache use_flash_attention_2
    """.split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A config.json of model_type llama or mistral; field names are its keys."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", ...}
    sliding_window: int | None = None  # a token sees this many, itself included (mistral)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of random weights
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    @classmethod
    def from_folder(cls, folder):
        """Read `folder`/config.json; ValueError names keys missing or not implemented."""
        check_folder(folder)
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: not found; --model needs a Hugging Face folder")
        raw = read_json(path)
        try:
            return cls(**_implemented(raw))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            whole = field.type is int or (name == "sliding_window" and value is not None)
            if whole and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
            if field.type is float and not _is_positive(value):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if self.parameter_count() > 10**12:
            raise ValueError(f"too large: its sizes make {self.parameter_count():,} parameters")
        rotary_frequencies(self, "cpu")  # raises on a scaling that is not implemented

    def to_json(self):
        """The config.json of this network, as a dict."""
        name = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[self.model_type]
        return {"architectures": [name], "hidden_act": "silu"} | dataclasses.asdict(self)

    def parameter_count(self):
        """Parameters, tied embeddings counted once."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        attention = 2 * d * (self.num_attention_heads * self.head_dim + kv)
        block = attention + 3 * d * self.intermediate_size + 2 * d
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * d
        return self.num_hidden_layers * block + embeddings + d


def _is_positive(value):
    return type(value) in (int, float) and 0 < value <= 1e18  # fits an int64 too


def _implemented(raw):
    """config.json's keys as LlamaConfig arguments; ValueError names keys not implemented."""
    model_type = raw.setdefault("model_type", "llama")
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"model_type {model_type!r} is not implemented (llama, mistral)")
    for key, value in ONLY_VALUE.items():
        if raw.pop(key, None) not in (None, value):
            raise ValueError(f"{key} other than {value!r} is not implemented")
    # transformers 5 has theta and scaling in one object, whose theta takes precedence.
    new_rope = raw.pop("rope_parameters", None)
    rope = raw.get("rope_scaling") or new_rope or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling or rope_parameters must be an object, not {rope!r}")
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} or None
    if model_type == "mistral":
        raw.setdefault("sliding_window", 4096)  # transformers' default for an absent key
        raw.setdefault("num_key_value_heads", 8)
    elif raw.get("sliding_window") is not None:
        raise ValueError("sliding_window is implemented for model_type mistral only")
    heads, size = raw.get("num_attention_heads"), raw.get("hidden_size")
    if raw.get("num_key_value_heads") is None:
        raw["num_key_value_heads"] = heads
    if raw.setdefault("head_dim") is None and type(heads) is type(size) is int and heads > 0:
        if size % heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        raw["head_dim"] = size // heads
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    asked = {key for key, value in raw.items() if value and not key.startswith("_")}
    if unknown := sorted(asked - fields - IGNORED):
        raise ValueError(
            f"asks for {', '.join(unknown)}, which is not implemented; "
            "if it does not change the network, remove it"
        )
    return {key: value for key, value in raw.items() if key in fields}


# ------------------------------------------------------------------------------------ network


class Llama(nn.Module):
    """The network; its parameters have Hugging Face's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = 0  # blocks that recompute their activations in backward
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens, positions, cu_seqlens, objective=None, rows=None, max_seqlen=None, attend=None
    ):
        """Logits (T, V), or the result of `objective(hidden (N, D), lm_head weight (V, D))`.

        tokens (T,) and positions (T,) int64, cu_seqlens (B+1,) int32. `rows` (N,) int64: the
        positions that reach the final norm and the head (default: all T). `max_seqlen`: at least
        the longest conversation (default: T). `attend`: one callable per layer that replaces
        PackedAttention, such as a key-value cache.

        The objective runs here, inside the root's forward: if a sharded lm_head is used anywhere
        else, FSDP silently never reduces its gradient over the ranks.
        """
        if attend is None:
            packed = PackedAttention(cu_seqlens, max_seqlen, self.config.sliding_window)
            attend = [packed] * len(self.model.layers)
        rotary = rotary_embedding(self.config, positions)
        hidden = self.model.embed_tokens(tokens)  # (T, D)
        for index, block in enumerate(self.model.layers):
            if self.training and index < self.recompute:
                options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random
                block = functools.partial(checkpoint, block, **options)
            hidden = block(hidden, rotary, attend[index])
        if rows is not None:
            hidden = hidden.index_select(0, rows)  # (N, D)
        hidden = self.model.norm(hidden)
        tied = self.config.tie_word_embeddings
        weight = (self.model.embed_tokens if tied else self.lm_head).weight  # (V, D)
        return F.linear(hidden, weight) if objective is None else objective(hidden, weight)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, hidden, rotary, attend):  # (T, D) -> (T, D)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Causal attention with H query heads over K key-value heads (GQA; MHA if H = K)."""

    def __init__(self, config):
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, hidden, rotary, attend):
        q = self.q_proj(hidden).unflatten(-1, (-1, self.head_dim))  # (T, H, E)
        k = self.k_proj(hidden).unflatten(-1, (-1, self.head_dim))  # (T, K, E)
        v = self.v_proj(hidden).unflatten(-1, (-1, self.head_dim))  # (T, K, E)
        out = attend(rotate(q, *rotary), rotate(k, *rotary), v)  # (T, H, E)
        return self.o_proj(out.flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class PackedAttention:
    """Causal attention within each conversation of a packed row; called with q, k, v of a layer.

    In half precision on CUDA, torch's varlen_attn (FlashAttention). Otherwise conversations of
    similar length are padded at the end to a rectangle; the causal mask hides the padding.
    """

    def __init__(self, cu_seqlens, max_seqlen, sliding_window):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.sliding_window = sliding_window

    def __call__(self, q, k, v):  # (T, H, E), (T, K, E), (T, K, E) -> (T, H, E)
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.is_cuda and half and q.shape[-1] <= LARGEST_FLASH_HEAD:
            return self.attend_varlen(q, k, v)
        return self.attend_rectangles(q, k, v)

    def attend_varlen(self, q, k, v):
        # (left, right): how many tokens a token sees on either side of itself.
        head_dim, longest, offsets = q.shape[-1], self.max_seqlen or len(q), self.cu_seqlens
        # -1 means all; it is faster than a window that no conversation exceeds.
        left = -1 if longest <= (self.sliding_window or longest) else self.sliding_window - 1
        options = {"window_size": (left, 0), "scale": head_dim**-0.5} | GQA
        if lacking := -head_dim % 8:  # FlashAttention takes multiples of 8; zeros add nothing
            q, k, v = (F.pad(x, (0, lacking)) for x in (q, k, v))
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        return out[..., :head_dim]

    @torch.compiler.disable  # its shapes depend on the conversations' lengths
    def attend_rectangles(self, q, k, v):
        out, gqa, window = torch.empty_like(q), q.shape[1] != k.shape[1], self.sliding_window
        for index, valid in self.rectangles:  # (B, L)
            padded = (x[index].transpose(1, 2) for x in (q, k, v))  # (B, heads, L, E)
            length, mask = index.shape[1], None  # causality is enough
            if window and length > window:  # token i sees j with i - window < j <= i
                mask = torch.ones(length, length, dtype=torch.bool, device=q.device)
                mask = mask.tril().triu(1 - window)
            attended = F.scaled_dot_product_attention(
                *padded, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
            )
            out[index[valid]] = attended.transpose(1, 2)[valid]
        return out

    @functools.cached_property  # made once for all layers
    def rectangles(self):
        """Conversations grouped by length, within a factor of two: [(index, valid), ...].

        index (B, L): the token in each cell, padded with the last one; valid (B, L): not padding.
        """
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        groups = []
        for bits in sorted({length.bit_length() for length in lengths.tolist() if length}):
            chosen = ((lengths >> (bits - 1)) == 1).nonzero()[:, 0]
            columns = torch.arange(lengths[chosen].max(), device=lengths.device)
            last = lengths[chosen, None] - 1
            groups.append((starts[chosen, None] + columns.minimum(last), columns <= last))
        return groups


def rotary_embedding(config, positions):
    """cos and sin (T, 1, E) float32, each angle twice: once for each half of a head."""
    angles = positions[:, None].float() * rotary_frequencies(config, positions.device)  # (T, E/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotary_frequencies(config, device):
    """Radians per position (E/2,) of each pair of head dimensions, after rope_scaling."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_scaling {kind!r} is not implemented (default, linear, llama3)")
    needed = [] if kind == "default" else ["factor"]
    if kind == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if not all(_is_positive(scaling.get(key)) for key in needed):
        raise ValueError(f"rope_scaling {kind!r} needs positive numbers for {', '.join(needed)}")
    asked = {key for key, value in scaling.items() if value and value != ONLY_VALUE.get(key)}
    if unknown := sorted(asked - {"rope_type", "type", *needed}):
        raise ValueError(f"rope_scaling {kind!r} with {', '.join(unknown)} is not implemented")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        # Waves longer than original/low positions are stretched, those shorter than original/high
        # are kept, and those between are interpolated.
        factor, low, high, original = (scaling[key] for key in needed)
        if low >= high:
            raise ValueError("rope_scaling 'llama3' needs high_freq_factor above low_freq_factor")
        turns = original * frequencies / (2 * math.pi)  # full turns within the original context
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (smooth + (1 - smooth) / factor)
    return frequencies


def rotate(x, cos, sin):
    """Rotary position embedding of x (T, heads, E), in float32; RoFormer, arXiv 2104.09864."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


# ----------------------------------------------------------------------- Hugging Face folders


def load(folder, device="cpu", dtype=torch.float32):
    """The Llama of a Hugging Face folder; ValueError lists everything that does not fit."""
    config = LlamaConfig.from_folder(folder)
    check_weights(folder, config)
    with torch.device("meta"):
        llama = Llama(config)
    llama = llama.to(dtype).to_empty(device=device)
    fill_parameters(llama, folder)
    return llama


def check_folder(folder):
    """ValueError unless `folder` exists; for a name on the Hugging Face hub, how to fetch it."""
    if Path(folder).is_dir():
        return
    hint, hub = "", re.fullmatch(r"[\w.-]+/([\w.-]+)", str(folder))
    if hub and not Path(folder).parent.is_dir():
        hint = f"; fetch it with: hf download {folder} --local-dir {hub[1]}, and give {hub[1]}"
    raise ValueError(f"{folder}: no such folder{hint}")


def has_weights(folder):
    """Does `folder` hold safetensors? ValueError if it has only pickles, which are never opened."""
    folder = Path(folder)
    if any(folder.glob("*.safetensors*")):  # an index as well
        return True
    if pickled := [*folder.glob("*.bin"), *folder.glob("*.pth")]:
        raise ValueError(f"{pickled[0]}: a pickle; convert the weights to safetensors")
    return False


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # (V, D) each
FLOATS = {"F64", "F32", "F16", "BF16"}


def stored_tensors(folder):
    """{tensor name: slice of its file}. An index may only name files in its own folder."""
    folder, index = Path(folder), Path(folder) / INDEX
    if not index.exists():
        return open_safetensors(folder / SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: has no weight_map {{tensor: file}}")
    listed = {(str(file), name) for name, file in weight_map.items()}
    for file, name in sorted(listed):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {name} names {file!r}, which is not a file of this folder")
    files = {file: open_safetensors(folder / file) for file in sorted({file for file, _ in listed})}
    if SINGLE not in files and (folder / SINGLE).exists():  # programs differ in which they read
        raise ValueError(f"{folder}: holds two sets of weights, {SINGLE} and {INDEX}; remove one")
    found = {(file, name) for file, tensors in files.items() for name in tensors}
    if odd := sorted(listed ^ found):
        file, name = odd[0]
        raise ValueError(f"{index}: disagrees with {file} about {name}")
    return {name: view for tensors in files.values() for name, view in tensors.items()}


def open_safetensors(path):
    """{tensor name: slice}: get_shape(), get_dtype(), and [i:j], which reads these rows."""
    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def check_weights(folder, config, new_rows=0):
    """Compare every tensor's name, shape and dtype with the network's before reading one.

    The vocabulary may have `new_rows` rows that the files lack. ValueError lists all problems.
    """
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in Llama(config).named_parameters()}
    stored, problems = stored_tensors(folder), []
    for name, expected in wanted.items():
        if name in (EMBEDDING, HEAD):
            expected[0] -= new_rows
        if name not in stored:
            problems.append(f"missing {name} {expected}")
        elif (shape := stored[name].get_shape()) != expected:
            problems.append(f"{name} is {shape}, config.json makes it {expected}")
        elif (dtype := stored[name].get_dtype()) not in FLOATS:
            problems.append(f"{name} has dtype {dtype}, not one of {sorted(FLOATS)}")
    for name in sorted(stored.keys() - wanted.keys()):
        # Old checkpoints store the rotary table, and some tied ones store the head again.
        if not name.endswith("rotary_emb.inv_freq") and name != HEAD:
            problems.append(f"unexpected {name} {stored[name].get_shape()}")
    if problems:
        shown = "\n  ".join(problems[:50])
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit config.json:\n  {shown}")
    if HEAD in stored and HEAD not in wanted and not _same_rows(stored[EMBEDDING], stored[HEAD]):
        raise ValueError(
            f"{folder}: config.json ties the embeddings (tie_word_embeddings), but {HEAD} differs "
            f"from {EMBEDDING}; remove the tensor, or set tie_word_embeddings to false to train it"
        )


def _same_rows(a, b):
    """Do two stored tensors hold the same numbers? Read a part at a time."""
    return a.get_shape() == b.get_shape() and all(
        torch.allclose(a[i : i + 4096].float(), b[i : i + 4096].float(), 0, 0, equal_nan=True)
        for i in range(0, a.get_shape()[0], 4096)
    )


def untrained(folder, tokens):
    """Those of `tokens` that the checkpoint never trained, judging by their embedding rows.

    Such rows are near zero or equal to each other (within 1 % of the median norm), as for the turn
    tokens in Llama 3's base models. A row still at its random start is not detected. The head's
    rows would not tell: a token that only begins a turn is never a target, even in a trained model.
    """
    stored = stored_tensors(folder)[EMBEDDING]
    usual = stored[:1024].float().norm(dim=1).median()
    tokens = sorted({token for token in tokens if token < stored.get_shape()[0]})
    rows = torch.cat([torch.zeros_like(stored[:1]), *(stored[t : t + 1] for t in tokens)]).float()
    distances = (rows[:, None] - rows).norm(dim=-1).fill_diagonal_(math.inf)
    nearest = distances.amin(dim=1)[1:]  # of the other rows and zero
    return [token for token, d in zip(tokens, nearest, strict=True) if d < 0.01 * usual]


def fingerprint(folder):
    """8 hex digits from each tensor's name, dtype, shape and three rows, in any files."""
    lines = []
    for name, view in sorted(stored_tensors(folder).items()):
        shape = view.get_shape()
        rows = torch.cat([view[i : i + 1] for i in (0, shape[0] // 2, shape[0] - 1)])
        lines.append(f"{name} {view.get_dtype()} {shape} {checksum(rows)}")
    return f"{zlib.crc32(chr(10).join(lines).encode()):08x}"


def checksum(tensor):
    """CRC-32 of a CPU tensor's bytes; zlib releases the interpreter's lock meanwhile."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@torch.no_grad()
def fill_parameters(llama, folder, new_rows=0, new_tokens=(), ordinary_rows=None):
    """Copy a checked folder into `llama`; each rank reads only its own rows.

    Two kinds of rows become the mean of the first `ordinary_rows` (default: all before them): the
    last `new_rows`, which the files lack, and `new_tokens`, which may be padding or untrained.
    """
    parameters, count = dict(llama.named_parameters()), llama.config.vocab_size
    read_rows(stored_tensors(folder), parameters)
    filled = {*new_tokens, *range(count - new_rows, count)}
    if not filled:
        return
    known = min(filled) if ordinary_rows is None else min(ordinary_rows, count - new_rows)
    for parameter in [parameters[name] for name in (EMBEDDING, HEAD) if name in parameters]:
        low, high = local_rows(parameter)
        mean = whole_tensor(parameter)[:known].sum(0, dtype=torch.float64) / known
        rows = [row - low for row in filled if low <= row < high]
        local_tensor(parameter)[rows] = mean.to(parameter.dtype)


def read_rows(stored, tensors, first_rows=None):
    """Copy those of `stored` {name: slice of a file} that are in `tensors` {name: tensor}.

    A sharded tensor takes only this rank's rows. `first_rows` {name: row} is the first row of each
    tensor in the file, as in a checkpoint; without it the file holds whole tensors.
    """

    @torch.no_grad()  # grad mode is per thread, and these are new
    def read(name):
        view, tensor = stored[name], tensors[name]
        low, high = local_rows(tensor)
        first = first_rows[name] if first_rows else 0
        begin, end = max(low, first), min(high, first + view.get_shape()[0])
        if begin < end:
            local_tensor(tensor)[begin - low : end - low].copy_(view[begin - first : end - first])

    with ThreadPoolExecutor(4) as pool:  # keeps the disk busy
        list(pool.map(read, [name for name in stored if name in tensors]))


@torch.no_grad()
def random_parameters(llama, seed):
    """Normal(0, initializer_range), norms 1; the same for any number of ranks.

    Projections that write into the residual stream are scaled by 1/sqrt(2 · layers), as in GPT-2.
    """
    for index, (name, parameter) in enumerate(llama.named_parameters()):
        std = llama.config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * llama.config.num_hidden_layers)
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        full = torch.randn(parameter.shape, generator=generator).mul_(std)
        if name.endswith("norm.weight"):
            full.fill_(1.0)
        local_tensor(parameter).copy_(full[slice(*local_rows(parameter))])


def local_tensor(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole_tensor(parameter):
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local_rows(parameter):
    """(low, high): this rank's rows of dimension 0; all of them if it is not sharded."""
    low = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        last = mesh.ndim - 1  # shards; a dimension before it replicates
        low = math.ceil(len(parameter) / mesh.size(last)) * mesh.get_local_rank(last)
    return low, low + len(local_tensor(parameter))


@torch.no_grad()
def save(llama, folder, dtype=None, shard_bytes=5 << 30):
    """Write config.json and safetensors of at most `shard_bytes` each, with an index if several.

    With a sharded model every rank must call it; rank 0 gathers one parameter at a time and
    writes. Tensors are stored as `dtype` (default: that of the parameters). A failed write
    raises only once all are gathered, because the other ranks take part in that.
    """
    folder, parameters = Path(folder), dict(llama.named_parameters())
    first = not dist.is_initialized() or dist.get_rank() == 0
    dtype = dtype or next(iter(parameters.values())).dtype
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    shards, weight_map, failure = split(sizes, shard_bytes), {}, None
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        weight_map |= dict.fromkeys(names, file)
        gathered = ((name, whole_tensor(parameters[name])) for name in names)  # by every rank
        tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in gathered if first}
        if first and failure is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_tensors(folder / file, tensors)
            except OSError as error:
                failure = error
    if failure:
        raise failure
    if first:
        described = llama.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        write_json(folder / "config.json", described)
    if first and len(shards) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def write_tensors(path, tensors):
    """Write a safetensors file. Whoever may read its folder may read it, not only the owner."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: {error}") from None


def split(sizes, most):
    """The names of `sizes` {name: bytes} in lists of at most `most` bytes, or of one larger."""
    lists, filled = [[]], 0
    for name, size in sizes.items():
        if lists[-1] and filled + size > most:
            lists.append([])
            filled = 0
        lists[-1].append(name)
        filled += size
    return lists


def read_json(path):
    """The JSON object of a file, which may begin with a byte order mark; no key occurs twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
