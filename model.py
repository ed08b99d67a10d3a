"""Llama and Mistral in plain PyTorch over packed conversations, and their Hugging Face folders.

Many conversations lie end to end in one row of T tokens; none sees another:

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
import os
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
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn.attention.varlen import varlen_attn

    # Since torch 2.12 grouped heads must be asked for; before, the argument does not exist.
    GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
except ImportError:
    varlen_attn = None


# ------------------------------------------------------------------------------ configuration

# Keys that change the network, with the only value implemented here.
ONLY_VALUE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
}
# Keys that do not change the logits.
IGNORED = {"architectures", "auto_map", "dtype", "torch_dtype", "use_cache", "tokenizer_class"}
IGNORED |= {"pad_token_id", "pretraining_tp", "transformers_version", "use_flash_attention_2"}
IGNORED |= {"max_sequence_length", "unsloth_version", "unsloth_fixed"}
# Keys of generation, and of a model's outputs, that transformers writes there as well.
IGNORED |= {"temperature", "top_k", "top_p", "typical_p", "do_sample", "num_beams", "max_length"}
IGNORED |= {"max_new_tokens", "min_length", "length_penalty", "repetition_penalty"}
IGNORED |= {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_beam_groups"}
IGNORED |= {"diversity_penalty", "early_stopping", "exponential_decay_length_penalty"}
IGNORED |= {"num_return_sequences", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"}
IGNORED |= {"forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
IGNORED |= {"output_attentions", "output_hidden_states", "output_scores", "return_dict"}
IGNORED |= {"return_dict_in_generate", "id2label", "label2id", "problem_type"}
# Bounds against a broken or hostile file; well above any published Llama.
LARGEST = {
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
}
LARGEST_NUMBER = 1e30  # of those that are not sizes


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
        """Read `folder`/config.json; ValueError names what is missing or not implemented."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: not found; --model needs a Hugging Face folder") from None
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: must hold a JSON object, not {type(raw).__name__}")
        try:
            return cls(**_implemented(dict(raw)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def __post_init__(self):
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise ValueError(f"{name} must be a whole number, 1 to {largest}, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        window = self.sliding_window
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"sliding_window must be null or at least 1, not {window!r}")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError("tie_word_embeddings must be true or false")
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
    return type(value) in (int, float) and 0 < value <= LARGEST_NUMBER


def _implemented(raw):
    """config.json's keys as LlamaConfig arguments; ValueError for what the code lacks."""
    model_type = raw.setdefault("model_type", "llama")
    if model_type not in ("llama", "mistral"):
        raise ValueError(f"model_type {model_type!r} is not implemented (llama, mistral)")
    for key, value in ONLY_VALUE.items():
        if raw.pop(key, value) != value:
            raise ValueError(f"{key} other than {value!r} is not implemented")
    # transformers 5 holds theta and scaling in one, and that theta wins over one outside.
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
    if raw.get("head_dim") is None and type(heads) is int and type(size) is int and heads > 0:
        if size % heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, or give head_dim"
            )
        raw["head_dim"] = size // heads
    raw.setdefault("head_dim", None)
    fields = dataclasses.fields(LlamaConfig)
    lacking = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in raw]
    if lacking:
        raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    known = {field.name for field in fields}
    asked = [key for key, value in raw.items() if value not in (None, False) and key[0:1] != "_"]
    unknown = [key for key in asked if key not in known | IGNORED]
    if unknown:
        raise ValueError(
            f"asks for {', '.join(sorted(unknown))}, which is not implemented; "
            "if it does not change the network, remove it"
        )
    return {key: value for key, value in raw.items() if key in known}


# ------------------------------------------------------------------------------------ network


class Llama(nn.Module):
    """The network; parameters carry Hugging Face's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = 0  # blocks whose activations are computed again in backward
        blocks = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(blocks),
                "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens, positions, cu_seqlens, objective=None, rows=None, max_seqlen=None, attend=None
    ):
        """Logits (T, V), or what `objective(hidden (N, D), lm_head weight (V, D))` returns.

        tokens (T,) and positions (T,) int64, cu_seqlens (B+1,) int32. `rows` (N,) int64 picks the
        positions that reach the final norm and the head (all T without it). `max_seqlen` bounds
        the length of a conversation (T without it). `attend`, one callable a layer, replaces the
        attention over the packed tokens, as a key-value cache does.

        The objective runs here, inside the root's forward: under FSDP the gradient of a sharded
        lm_head used anywhere else is never reduced over the ranks, without any error.
        """
        if attend is None:
            packed = PackedAttention(cu_seqlens, max_seqlen, self.config.sliding_window)
            attend = [packed] * len(self.model.layers)
        rotary = rotary_embedding(self.config, positions)
        hidden = self.model.embed_tokens(tokens)  # (T, D)
        for index, block in enumerate(self.model.layers):
            if self.training and index < self.recompute:
                hidden = recomputed(block, hidden, rotary, attend[index])
            else:
                hidden = block(hidden, rotary, attend[index])
        if rows is not None:
            hidden = hidden.index_select(0, rows)  # (N, D)
        hidden = self.model.norm(hidden)
        tied = self.config.tie_word_embeddings
        weight = (self.model.embed_tokens if tied else self.lm_head).weight  # (V, D)
        return F.linear(hidden, weight) if objective is None else objective(hidden, weight)


# Nothing in a block is random: no generator's state is kept for the second time.
recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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
    """Causal attention with H query heads over K key-value heads (GQA; MHA where H = K)."""

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

    On CUDA in half precision, torch's varlen_attn, which is FlashAttention. Elsewhere conversations
    of similar length are padded at the end to a rectangle, where a causal mask alone keeps the
    padding unseen.
    """

    def __init__(self, cu_seqlens, max_seqlen, sliding_window):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.sliding_window = sliding_window
        self.rectangles = None

    def __call__(self, q, k, v):  # (T, H, E), (T, K, E), (T, K, E) -> (T, H, E)
        half = q.dtype in (torch.bfloat16, torch.float16)
        if q.is_cuda and half and flash_takes(q.shape[-1]):
            return self.attend_varlen(q, k, v)
        return self.attend_rectangles(q, k, v)

    def attend_varlen(self, q, k, v):
        # (left, right): how many tokens besides itself a token sees on either side.
        head_dim, longest, offsets = q.shape[-1], self.max_seqlen or len(q), self.cu_seqlens
        # -1 is all of them, and faster than a window which no conversation is longer than.
        left = -1 if longest <= (self.sliding_window or longest) else self.sliding_window - 1
        options = {"window_size": (left, 0), "scale": head_dim**-0.5} | GQA
        if lacking := -head_dim % 8:  # FlashAttention takes multiples of 8; zeros add nothing
            q, k, v = (F.pad(x, (0, lacking)) for x in (q, k, v))
        out = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
        return out[..., :head_dim]

    @torch.compiler.disable  # its shapes follow the conversations' lengths
    def attend_rectangles(self, q, k, v):
        if self.rectangles is None:  # made once for all layers
            self.rectangles = rectangles(self.cu_seqlens)
        out = torch.empty_like(q)
        for index, valid in self.rectangles:  # (B, L)
            grouped = (x[index].transpose(1, 2) for x in (q, k, v))  # (B, heads, L, E)
            mask = sliding_mask(index.shape[1], self.sliding_window, q.device)
            attended = F.scaled_dot_product_attention(
                *grouped,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[index[valid]] = attended.transpose(1, 2)[valid]
        return out


def flash_takes(head_dim):
    """Can varlen_attn attend with heads so wide? FlashAttention 2 ends at 256."""
    return varlen_attn is not None and head_dim <= 256


def rectangles(cu_seqlens):
    """Conversations grouped by length, within a factor of two: [(index, valid), ...].

    index (B, L): the token at each cell, padding repeating the last; valid (B, L): no padding.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    groups = []
    for bits in sorted({length.bit_length() for length in lengths.tolist() if length}):
        chosen = ((lengths >> (bits - 1)) == 1).nonzero()[:, 0]
        columns = torch.arange(lengths[chosen].max(), device=lengths.device)
        last = lengths[chosen, None] - 1
        index = starts[chosen, None] + columns.minimum(last)
        groups.append((index, columns <= last))
    return groups


def sliding_mask(length, window, device):
    """(L, L) boolean: token i sees j with i - window < j <= i; None where causality is enough."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def rotary_embedding(config, positions):
    """cos and sin (T, 1, E) float32, each angle twice: once for either half of a head."""
    angles = positions[:, None].float() * rotary_frequencies(config, positions.device)  # (T, E/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotary_frequencies(config, device):
    """Radians a position (E/2,) of each pair of head dimensions, after rope_scaling."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_scaling {kind!r} is not implemented (default, linear, llama3)")
    needed = LLAMA3_KEYS if kind == "llama3" else ["factor"]
    for key in needed:
        if not _is_positive(scaling.get(key)):
            raise ValueError(f"rope_scaling {kind!r} needs {key} as a positive number")
    if kind == "linear":
        return frequencies / scaling["factor"]
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling 'llama3' needs high_freq_factor above low_freq_factor")
    return _llama3(frequencies, *(scaling[key] for key in needed))


LLAMA3_KEYS = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


def _llama3(frequencies, factor, low, high, original):
    """Llama 3.1: waves longer than original/low positions are stretched, shorter than
    original/high kept, between the two interpolated."""
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)


def rotate(x, cos, sin):
    """Rotary position embedding of x (T, heads, E), in float32; RoFormer, arXiv 2104.09864."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


# ----------------------------------------------------------------------- Hugging Face folders


def load(folder, device="cpu", dtype=torch.float32):
    """The Llama of a Hugging Face folder; ValueError lists whatever does not fit."""
    config = LlamaConfig.from_folder(folder)
    check_weights(folder, config)
    with torch.device("meta"):
        llama = Llama(config)
    llama = llama.to(dtype).to_empty(device=device)
    fill_parameters(llama, folder)
    return llama


def has_weights(folder):
    """Are there safetensors? ValueError where there are only pickled weights, never opened here."""
    folder = Path(folder)
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return True
    if pickled := [*folder.glob("*.bin"), *folder.glob("*.pth")]:
        raise ValueError(f"{pickled[0]}: a pickle; convert the weights to safetensors")
    return False


INDEX = "model.safetensors.index.json"
FLOATS = {"F64", "F32", "F16", "BF16"}


def weight_files(folder):
    """{tensor name: path}. An index may only name files that lie in its own folder."""
    folder, index = Path(folder), Path(folder) / INDEX
    if not index.exists():
        path = folder / "model.safetensors"
        with open_safetensors(path) as tensors:
            return dict.fromkeys(tensors.keys(), path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"{index}: no readable weight_map: {error!r}") from None
    for name, file in entries:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {name} names {file!r}, which is not a file of this folder")
    for file in sorted({file for _, file in entries}):
        with open_safetensors(folder / file) as tensors:
            listed = {name for name, of in entries if of == file}
            if listed != set(tensors.keys()):
                odd = sorted(listed ^ set(tensors.keys()))[:5]
                raise ValueError(f"{index}: disagrees with {file} about {', '.join(odd)}")
    return {name: folder / file for name, file in entries}


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, UnicodeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from None


def check_weights(folder, config, new_rows=0):
    """Compare every tensor's name, shape and dtype with the network's before reading one.

    The vocabulary may have `new_rows` rows that the files lack. ValueError lists all problems.
    """
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in Llama(config).named_parameters()}
    files = weight_files(folder)
    problems = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in files]
    for path in sorted(set(files.values())):
        with open_safetensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
                view = tensors.get_slice(name)
                shape, dtype = view.get_shape(), view.get_dtype()
                expected = wanted.get(name)
                if expected is None:
                    if not _is_redundant(name, config):
                        problems.append(f"unexpected {name} {shape}")
                    continue
                if is_vocabulary(name):
                    expected = [expected[0] - new_rows, *expected[1:]]
                if shape != expected:
                    problems.append(f"{name} is {shape}, config.json makes it {expected}")
                if dtype not in FLOATS:
                    problems.append(f"{name} has dtype {dtype}, not one of {sorted(FLOATS)}")
    if problems:
        shown = "\n  ".join(problems[:50])
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit config.json:\n  {shown}")


def untrained(folder, tokens):
    """Those of `tokens` that a checkpoint never trained, as a row of its embedding shows.

    What never comes up is left to weight decay, so near zero: in Llama 3's base models a turn's
    tokens are. Trained rows are about as far from each other as they are long; the bound is 1 % of
    a usual length. A row that stayed as it was drawn does not show. The head does not tell: what
    begins a turn is read but never learned, so its head rows stay alike in a trained model too.
    """
    name = "model.embed_tokens.weight"
    with open_safetensors(weight_files(folder)[name]) as file:
        view = file.get_slice(name)
        usual = view[:1024].float().norm(dim=1).median()
        rows = {t: view[t : t + 1].float() for t in tokens if t < view.get_shape()[0]}
    found = set()
    for token, row in rows.items():
        others = [torch.zeros_like(row), *(rows[t] for t in rows if t != token)]
        if min((row - other).norm() for other in others) < 0.01 * usual:
            found.add(token)
    return sorted(found)


def fingerprint(folder):
    """8 hex digits that tell the weights of one folder from another's, however split into files."""

    def line_of(name):
        tensor = file.get_tensor(name)
        return f"{name} {tensor.dtype} {list(tensor.shape)} {checksum(tensor)}"

    lines = []
    for path in set(weight_files(folder).values()):
        with open_safetensors(path) as file, ThreadPoolExecutor(READERS) as pool:
            lines += pool.map(line_of, file.keys())
    return f"{zlib.crc32(chr(10).join(sorted(lines)).encode()):08x}"


def checksum(tensor):
    """CRC-32 of a CPU tensor's bytes; zlib lets go of the interpreter's lock meanwhile."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def is_vocabulary(name):
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _is_redundant(name, config):
    # Old checkpoints store the rotary table; some tied ones store the head again.
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return name.endswith("rotary_emb.inv_freq") or tied_head


@torch.no_grad()
def fill_parameters(llama, folder, new_rows=0, new_tokens=(), ordinary=None):
    """Copy a checked folder into `llama`; a sharded parameter reads its own rows alone.

    The last `new_rows` of the vocabulary, which the files lack, and the rows `new_tokens`, which
    they may hold as padding or untrained, become the mean of the first `ordinary` rows (without it
    of those before them): float32, summed in float64 so that it is the same for any number of
    ranks.
    """
    files, parameters = weight_files(folder), dict(llama.named_parameters())
    paths = sorted(set(files.values()))
    # Files and float32 parameters may fill the host: then what is read leaves its page cache.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    scarce = memory < 4 * sum(path.stat().st_size for path in paths)
    for path in paths:
        read_rows(path, {name: p for name, p in parameters.items() if files[name] == path})
        if scarce:
            _drop_from_page_cache(path)
    for name, parameter in parameters.items():
        if is_vocabulary(name) and (new_rows or new_tokens):
            _fill_new_rows(parameter, new_rows, new_tokens, ordinary)


READERS = 4  # threads, so that the disk has several requests at hand


def read_rows(path, tensors, first_rows=None):
    """Copy into each of `tensors`, by name, those of its rows that a safetensors file holds.

    A sharded tensor takes the rows of this rank. `first_rows` {name: row} says where the file's
    part of a tensor begins, as in a checkpoint; without it the file holds whole tensors.
    """

    @torch.no_grad()  # a setting of each thread, and these are new ones
    def read(name):
        view, tensor = file.get_slice(name), tensors[name]
        low, high = local_rows(tensor)
        first = first_rows[name] if first_rows else 0
        begin, end = max(low, first), min(high, first + view.get_shape()[0])
        if begin < end:
            rows = view[begin - first : end - first]
            local_tensor(tensor)[begin - low : end - low].copy_(rows)

    with open_safetensors(path) as file, ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, tensors))


def _drop_from_page_cache(path):
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill_new_rows(parameter, new_rows, new_tokens, ordinary):
    low, high = local_rows(parameter)
    local, old = local_tensor(parameter), parameter.shape[0] - new_rows
    known = min([old, *new_tokens]) if ordinary is None else min(old, ordinary)
    total = local[: max(0, known - low)].sum(0, dtype=torch.float64)
    if isinstance(parameter, DTensor):
        dist.all_reduce(total, group=_shard_group(parameter))
    local[max(0, old - low) :] = total / known
    for token in new_tokens:
        if low <= token < high:
            local[token - low] = total / known


@torch.no_grad()
def random_parameters(llama, seed):
    """Normal(0, initializer_range), norms 1; the same for any number of ranks.

    The projections that write into the residual stream are scaled by 1/sqrt(2 · layers), GPT-2's.
    """
    config = llama.config
    for index, (name, parameter) in enumerate(llama.named_parameters()):
        low, high = local_rows(parameter)
        if name.endswith("norm.weight"):
            local_tensor(parameter).fill_(1.0)
            continue
        std = config.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        full = torch.randn(parameter.shape, generator=generator).mul_(std)
        local_tensor(parameter).copy_(full[low:high])


def local_tensor(parameter):
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _shard_group(parameter):
    mesh = parameter.device_mesh  # its last dimension shards, any before it replicates
    return mesh.get_group(mesh.ndim - 1)


def local_rows(parameter):
    """(low, high): the rows of dimension 0 that this rank holds; all of them when not sharded."""
    rows = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, rows
    group = _shard_group(parameter)
    chunk = -(-rows // group.size())
    low = min(rows, chunk * group.rank())
    return low, min(rows, low + chunk)


@torch.no_grad()
def save(llama, folder, dtype=None, shard_bytes=5 << 30):
    """Write config.json and safetensors of at most `shard_bytes` each, indexed when several.

    With a sharded model every rank must call it; rank 0 gathers one parameter at a time and
    writes. Tensors are stored as `dtype`, without it in the parameters' own. A failed write
    raises only after the gathering, for which the other ranks are needed.
    """
    folder, parameters = Path(folder), dict(llama.named_parameters())
    first = not dist.is_initialized() or dist.get_rank() == 0
    dtype = dtype or next(iter(parameters.values())).dtype
    files, failure = shard_files(parameters, dtype, shard_bytes), None
    for file, names in files.items():
        tensors = {}
        for name in names:
            parameter = parameters[name]
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if first:
                tensors[name] = full.detach().to("cpu", dtype).contiguous()
        if first and failure is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / file, metadata={"format": "pt"})
                # safetensors writes for the owner alone: as readable as the folder is, instead.
                (folder / file).chmod(folder.stat().st_mode & 0o666)
            except (OSError, SafetensorError) as error:
                failure = OSError(f"{folder / file}: {error}")
    if failure:
        raise failure
    if first:
        described = llama.config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        write_json(folder / "config.json", described)
    if first and len(files) > 1:
        size = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def shard_files(parameters, dtype, shard_bytes):
    """{file name: names of its tensors}, in order, each file at most `shard_bytes` if it can be."""
    shards = split(parameters, dtype, shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def split(tensors, dtype, most):
    """Their names in lists, in order, each of at most `most` bytes if it can be."""
    lists, filled = [[]], 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if lists[-1] and filled + size > most:
            lists.append([])
            filled = 0
        lists[-1].append(name)
        filled += size
    return lists


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
