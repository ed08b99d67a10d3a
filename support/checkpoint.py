"""The folders of a run: checkpoints to resume from, and exported models.

    OUT/checkpoints/step-N/    float32 weights and AdamW's moments as safetensors, per rank its rows
        state.json             the rows in each file, their checksums, and the run's identity
    OUT/epoch-K/               an exported Hugging Face folder, written after its step's checkpoint
    OUT/model                  a link to the export with the lowest loss, or to the last

A folder is written under a temporary name, synced, and renamed by rank 0 once all ranks have
written, so its final name means that it is complete. A failed save ends the run, and leaves the
earlier checkpoints intact.

A resumed run ends with the same bits, because a step depends only on the weights and AdamW's two
moments, each saved in its own dtype, and on its number, which decides the learning rate, AdamW's
bias correction and the conversations (data.pack). The arithmetic repeats on a CPU, and on CUDA with
--deterministic. A step's evaluation and export follow its checkpoint: a resumed run repeats both.
If --adam-precision has changed, which is printed, the moments are converted as they are read.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch

import model
from loss import expert_class
from support.files import of_type, read_export, reading, sync
from support.flags import flag_of
from support.model_card import model_card

FILE_SIZE = 4 << 30  # bytes that a rank on a GPU copies into host memory at a time
MOMENTS = "exp_avg", "exp_avg_sq"  # AdamW's state of a parameter, apart from its step count
REMOVE = "remove that folder to resume from the one before"
EXPORT = re.compile(r"epoch-\d+")


class Checkpoints:
    """OUT/checkpoints/step-N; any number of ranks can read the files of any other number."""

    def __init__(self, plan, ranks, out):
        self.plan, self.ranks, self.out = plan, ranks, out
        self.folder = out / "checkpoints"
        self.saved = 0  # the step of the newest checkpoint

    def committed(self):
        """[(step, folder)] of complete checkpoints, oldest first."""
        found = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in self.folder.glob("step-*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def save(self, llama, optimizer, step):
        """Save the state after `step` steps, once; a failure on any rank is an error on all."""
        if self.saved == step:
            return
        folder = self.folder / f"step-{step}"
        aside = folder.with_name(folder.name + ".tmp")
        tensors, task = state_tensors(llama, optimizer), f"saving {folder}"
        self.ranks.first_does(lambda: self.ranks.check_lock(self.out), task)
        files = self.ranks.all_do(lambda: self._write(aside, tensors), task)
        files = {name: rows for of_rank in files for name, rows in of_rank.items()}
        self.ranks.first_does(lambda: self._commit(aside, folder, step, files, tensors), task)
        self.saved = step

    def _write(self, aside, tensors):
        aside.mkdir(exist_ok=True)
        if self.ranks.rank >= self.plan.world // self.plan.config.replicas:
            return {}  # all replicas have the rows of the first one
        return write_rows(aside, f"rank-{self.ranks.rank:05d}", tensors)

    def _commit(self, aside, folder, step, files, tensors):
        check_rows(files, tensors)
        config = dataclasses.asdict(self.plan.config)
        state = {"step": step, "recipe": recipe(self.plan), "config": config, "files": files}
        (aside / "state.json").write_text(json.dumps(state))
        sync(aside / "state.json", aside)
        with contextlib.suppress(OSError):  # the weights do not depend on the log
            sync(self.out / "metrics.jsonl")
        aside.rename(folder)
        sync(self.folder, self.out)
        for _, path in self.committed()[: -self.plan.config.keep]:
            doomed = path.rename(path.with_name(path.name + ".tmp"))  # a kill leaves no half folder
            shutil.rmtree(doomed, ignore_errors=True)

    def finish(self):
        """Record that everything due after the last step is done, and on which --eval-data."""
        if self.ranks.first:
            (self.folder / f"step-{self.saved}" / "finished").write_text(str(self.plan.eval_name))

    def resume(self):
        """Steps done in the newest checkpoint, 0 without one; ValueError if it cannot be used."""
        # `finished`: is everything done that the flags ask for? Both are as rank 0 sees the disk.
        self.saved, self.finished = self.ranks.first_does(self._newest)
        return self.saved

    def _newest(self):
        committed, plan = self.committed(), self.plan
        check_ownership(self.out, len(plan.order.ends), bool(committed))
        self.folder.mkdir(exist_ok=True)
        step, finished = self._resumable(*committed[-1]) if committed else (0, False)
        clear_leftovers(self.out)
        if step < plan.order.total:  # room for the newest --keep, the one being written, a model
            count = max(0, plan.config.keep + 1 - len(committed))
            needed = (count * (4 + 2 * plan.size.moment) + 4) * plan.network.parameter_count() / 1e9
            free = shutil.disk_usage(self.out).free / 1e9
            if free < needed:
                hint = "free some, or give a new --out or a smaller --keep"
                raise ValueError(f"{self.out} has {free:,.3f} GB free, needs {needed:,.3f}: {hint}")
        return step, finished and (self.out / "model").exists()

    def _resumable(self, step, folder):
        if not self.plan.config.resume:
            raise ValueError(f"{folder} is there: resume with --resume, or give a new --out")
        state, total = read_state(folder), self.plan.order.total
        if different := differences(state["recipe"], recipe(self.plan)):
            hint = "give the saved values, or a new --out:"
            raise ValueError(f"{folder} belongs to a different run; {hint}{different}")
        if step > total:
            hint = "raise --epochs or --max-steps, or give a new --out"
            raise ValueError(f"{folder} is beyond the {total} steps asked for: {hint}")
        for name, before in state["config"].items():  # results change, but it is the same run
            now = getattr(self.plan.config, name, before)
            same = json.dumps(now) == json.dumps(before)  # () is saved as []
            if not same and name not in ("model", "data", "out", "resume"):
                change = f"{flag_of(name)} {before!r}, now {now!r}"
                self.ranks.say(f"changed since the checkpoint: {change}")
        mark = folder / "finished"
        finished = mark.exists() and mark.read_bytes() == str(self.plan.eval_name).encode()
        return step, finished and step == total

    def load(self, llama, optimizer):
        """Make AdamW's state, and fill it and the weights from the checkpoint found, if any."""
        dtype = torch.bfloat16 if self.plan.config.adam_precision == "bf16" else torch.float32
        for parameter in llama.parameters():
            state = {moment: torch.zeros_like(parameter, dtype=dtype) for moment in MOMENTS}
            state["step"] = torch.full((), float(self.saved), device=parameter.device)
            optimizer.state[parameter] = state
        if not self.saved:
            return
        folder, ranks = self.folder / f"step-{self.saved}", self.ranks
        tensors, files = state_tensors(llama, optimizer), read_state(folder)["files"]

        def check():
            check_rows(files, tensors)
            for name in sorted(files)[ranks.rank :: ranks.world]:  # each file on one rank
                check_sums(folder / name, files[name])

        ranks.all_do(check, f"reading {folder} ({REMOVE})")
        for name, rows in files.items():
            first_rows = {tensor: first for tensor, (first, _, _) in rows.items()}
            model.read_rows(model.open_safetensors(folder / name), tensors, first_rows)
        if ranks.cuda:
            torch.cuda.empty_cache()  # FSDP's streams cannot reuse the blocks that loading took
        ranks.say(f"resuming from {folder}")


def state_tensors(llama, optimizer):
    """{name: tensor}: each parameter and its AdamW moments; RuntimeError if one has none.

    While a module is gathered, as the root is after a forward without a backward, FSDP2 replaces
    its parameters with plain tensors, which AdamW does not know.
    """
    found = {}
    for name, parameter in llama.named_parameters():
        state = optimizer.state.get(parameter, {})  # indexing would make one
        if any(moment not in state for moment in MOMENTS):
            raise RuntimeError(f"{name} has no optimizer state, as when FSDP has gathered it")
        found[name] = parameter.detach()
        found |= {f"optimizer.{name}.{moment}": state[moment] for moment in MOMENTS}
    return found


def write_rows(folder, prefix, tensors):
    """Write this rank's rows of each tensor, which must be finite, in files of about FILE_SIZE.

    Returns {file: {tensor: [first row, rows, CRC-32 of their bytes]}}.
    """
    mine = {name: model.local_tensor(tensor) for name, tensor in tensors.items()}
    mine = {name: rows for name, rows in mine.items() if len(rows)}
    sizes, written = {name: rows.nbytes for name, rows in mine.items()}, {}
    for number, names in enumerate(model.split(sizes, FILE_SIZE), start=1):
        path = folder / f"{prefix}-{number:05d}.safetensors"
        rows = {name: mine[name].cpu().contiguous() for name in names}
        for name, tensor in rows.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity: try a lower --lr")
        model.write_tensors(path, rows)
        sync(path)
        with ThreadPoolExecutor(4) as pool:
            sums = dict(zip(names, pool.map(model.checksum, rows.values())))
        firsts = {name: model.local_rows(tensors[name])[0] for name in names}
        written[path.name] = {name: [firsts[name], len(rows[name]), sums[name]] for name in names}
    return written


def check_rows(files, tensors):
    """ValueError unless the files hold every row of every tensor exactly once."""
    parts = {name: [] for name in tensors}
    for rows in files.values():
        for name, (first, count, _) in rows.items():
            parts.setdefault(name, []).append((first, first + count))
    for name, found in parts.items():
        size = tensors[name].shape[0] if name in tensors else 0
        bounds = [0, *(row for part in sorted(found) for row in part), size]
        if bounds[::2] != bounds[1::2]:  # each part must begin at the end of the one before
            shown = ", ".join(f"{first} to {end}" for first, end in sorted(found)) or "none"
            raise ValueError(f"{name}: rows 0 to {size} must be there once, not {shown:.200}")


def check_sums(path, rows):
    """ValueError unless a file holds exactly these rows, bit for bit."""
    stored = model.open_safetensors(path)
    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(lambda name: stored[name][:], stored))
        sums = pool.map(model.checksum, tensors)
        found = {name: [len(tensor), crc] for name, tensor, crc in zip(stored, tensors, sums)}
    if found != {name: [count, crc] for name, (_, count, crc) in rows.items()}:
        raise ValueError(f"{path.name} is damaged: it does not hold what state.json lists")


def recipe(plan):
    """{flags: their values} that identify a run: a checkpoint with others is refused."""
    config, tokens = plan.config, plan.dataset.folder.name
    identity = {
        "tokens of --data by --model, --max-length, --classes, --beta, --no-condition": tokens,
        "config.json of --model": dataclasses.asdict(plan.network),
        "weights of --model, --random-weights": plan.base or "random",
        "--classes": {name: dataclasses.asdict(c) for name, c in plan.classes.items()},
        "--beta, --no-reward": config.beta if config.reward else None,
        "--seed": config.seed,
        "--batch-tokens": config.batch_tokens,
        "ranks x --accumulate": plan.world * config.accumulate,
    }
    return json.loads(json.dumps(identity))  # as it is read back: tuples become lists


def differences(saved, now, name=""):
    """A line for each value that differs, "" if none does; of dicts, for their values."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return "".join(differences(saved.get(k), now.get(k), f"{name}{k}: ") for k in saved | now)
    return "" if saved == now else f"\n  {name}saved {saved!r}, now {now!r}"


def read_state(folder):
    path = folder / "state.json"
    with reading(path, f"; {REMOVE}"):
        state = json.loads(path.read_bytes())
        of_type(state["recipe"], dict), of_type(state["config"], dict)
        for name, rows in state["files"].items():
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not a file of this folder")
            for first, count, crc32 in rows.values():
                of_type(first, int), of_type(count, int), of_type(crc32, int)
        if f"step-{state['step']}" != folder.name:
            raise ValueError(f"it belongs to step {state['step']}")
    return state


# ----------------------------------------------------------------------------------------- exports


def write_export(plan, ranks, llama, out, step, losses):
    """Write OUT/epoch-K as a Hugging Face folder and point OUT/model at the best or last.

    `losses` {step: the expert class's loss} of the evaluations so far, all on the same data.
    """
    folder = out / f"epoch-{plan.order.epoch_of(step)}"
    aside, task = out / f".{folder.name}.tmp", f"writing {folder}"
    ranks.first_does(lambda: ranks.check_lock(out), task)
    dtype = torch.bfloat16 if plan.bf16 else torch.float32
    ranks.all_do(lambda: model.save(llama, aside, dtype), task)
    ranks.say(ranks.first_does(lambda: publish(plan, aside, folder, step, losses), task))


def publish(plan, aside, folder, step, losses):
    """Describe an export, rename it into its place, and point OUT/model at the best one."""
    describe_export(plan, aside, step, losses.get(step))
    sync(*aside.iterdir(), aside)
    out, older = folder.parent, folder.with_name(f".{folder.name}.old")
    if folder.exists():  # of the same epoch
        folder.rename(older)
    aside.rename(folder)
    (chosen, why), link = best_export(out, step, losses), out / ".model.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(chosen)
    link.replace(out / "model")
    sync(out)
    shutil.rmtree(older, ignore_errors=True)
    return f"exported {folder} after step {step}; {out / 'model'} is {chosen}, {why}"


def describe_export(plan, folder, step, loss=None):
    """The files beside the weights: tokenizer, generation_config.json, crlft.json, README.md.

    An answer ends at either of two tokens, as in chat.py. config.json names only the end of turn,
    because llama.cpp's converter accepts only one number there.
    """
    config, tokenizer = plan.config, plan.tokenizer
    weights = [1.0] * len(plan.classes) if plan.class_weights is None else plan.class_weights
    crlft = {
        "classes": {name: dataclasses.asdict(c) for name, c in plan.classes.items()},
        "weights": dict(zip(plan.classes, map(float, weights), strict=True)),
        "conditioned": config.condition,
        "most_answers": plan.dataset.most_answers(),
        "template": tokenizer.template.name,
        "steps": step,
        "config": dataclasses.asdict(config),
    }
    (folder / "README.md").write_text(model_card(plan, crlft, loss), encoding="utf-8")
    model.write_json(folder / "crlft.json", crlft)
    conditions = {n: c.condition if config.condition else "" for n, c in plan.classes.items()}
    tokenizer.save(folder, conditions, conditions[expert_class(plan.classes)])
    ends = [token for token in (tokenizer.eot, tokenizer.eos) if token is not None and token >= 0]
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": list(dict.fromkeys(ends))}
    model.write_json(folder / "generation_config.json", tokens)


def best_export(out, step, losses):
    """(folder name, why) of the export with the lowest of `losses` {step: loss}, or of the last.

    Exports beyond `step`, from before the run went back to an older checkpoint, do not count.
    """
    exports = {e.steps: name for name, e in exports_of(out).items() if e.steps <= step}
    evaluated = [steps for steps in exports if math.isfinite(losses.get(steps) or math.inf)]
    if not evaluated:
        return exports[max(exports)], "the last"
    best = min(evaluated, key=lambda steps: (losses[steps], -steps))
    return exports[best], f"the lowest expert loss, {losses[best]:.4f}"


def exports_of(out):
    """{folder name: Export} of a run; a user's copies of its exports have other names."""
    found = {p.name: read_export(p) for p in out.glob("epoch-*") if EXPORT.fullmatch(p.name)}
    return {name: export for name, export in found.items() if export and export.steps is not None}


def check_ownership(out, epochs, has_checkpoints):
    """ValueError if the run would overwrite something that it did not make."""
    exports, link = exports_of(out), out / "model"
    started = (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists()
    if not has_checkpoints and (started or exports):
        hint = f"put {out}/checkpoints/step-N back, or give a new --out"
        raise ValueError(f"{out} has a run's log or exports, but none of its checkpoints: {hint}")
    if os.path.lexists(link) and not (link.is_symlink() and EXPORT.fullmatch(os.readlink(link))):
        hint = "give a new --out, or copy a copied run again with its links (cp -a)"
        raise ValueError(f"{link} is not a link to an export: {hint}")
    for folder in (out / f"epoch-{epoch}" for epoch in range(1, epochs + 1)):
        if os.path.lexists(folder) and folder.name not in exports:
            raise ValueError(f"{folder} is not an export, but one is due there: give a new --out")


def clear_leftovers(out):
    """Remove an incomplete save or export after a kill, and finish an interrupted rename."""
    for path in [*(out / "checkpoints").glob("step-*.tmp"), *out.glob(".epoch-*")]:
        export = out / path.stem[1:]
        if re.fullmatch(r"\.epoch-\d+\.old", path.name) and not export.exists():
            path.rename(export)
        elif re.fullmatch(r"step-\d+\.tmp|\.epoch-\d+\.(tmp|old)", path.name):
            shutil.rmtree(path, ignore_errors=True)
