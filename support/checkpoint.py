"""What a run keeps: checkpoints to go on from, and exported models.

    OUT/checkpoints/step-N/    float32 weights and AdamW's state, each rank its rows, as safetensors
        state.json             where each file's rows belong, their checksums, of which run it is
    OUT/epoch-K/               an exported Hugging Face folder, after the checkpoint of its step
    OUT/model                  a link to the export of the least loss, or to the last
    OUT/run.json               that this folder holds a run with checkpoints

A folder is written under another name, synced, and renamed on one rank once all have written: under
its own name it is whole. So a kill at any instant costs the steps since the last checkpoint.

Why a resumed run ends with the same bits: a step depends on the weights and AdamW's two moments,
saved in float32 as they are; on its number, which decides the learning rate, AdamW's bias
correction and the conversations (data.pack is a function of lengths, seed and epoch); and on
nothing random, as nothing is drawn in training. The arithmetic itself repeats on a CPU, and on
CUDA under --deterministic. The evaluation and the export that are due at a step come after its
checkpoint; each leaves a record (metrics.jsonl, crlft.json), and one without it is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import model
from loss import DEFAULT_CLASSES, expert_class
from support.files import exported, sync
from support.model_card import model_card
from support.ranks import SaveFailed

FILE_SIZE = 4 << 30  # bytes: what a rank on a GPU copies into the host's memory at a time
MOMENTS = "exp_avg", "exp_avg_sq"  # what AdamW keeps of a parameter, besides its count of steps
REMOVE = "remove that folder to go on from the one before"


# ------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """OUT/checkpoints/step-N; any number of ranks reads what any other number wrote."""

    def __init__(self, plan, ranks, out):
        self.plan, self.ranks, self.out = plan, ranks, out
        self.folder = out / "checkpoints"
        self.saved = 0  # the step of the newest checkpoint
        with torch.device("meta"):
            parameters = dict(model.Llama(plan.network).named_parameters())
        self.shapes = {name: list(p.shape) for name, p in parameters.items()}
        for moment in MOMENTS:
            self.shapes |= {moment_name(n, moment): list(p.shape) for n, p in parameters.items()}
        self.bytes = 4 * len(MOMENTS + ("weight",)) * plan.network.parameter_count()

    def committed(self):
        """[(step, folder)] of whole checkpoints, oldest first."""
        found = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in self.folder.glob("step-*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _check_space(self, needed):
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise SaveFailed(
                f"{self.out} has {free / 1e9:.1f} GB free, and the checkpoints and model need "
                f"{needed / 1e9:.1f} GB: free some, choose another --out, or a smaller --keep"
            )

    # --- save

    def save(self, llama, optimizer, step):
        """Save the state after `step` steps, once; SaveFailed leaves the older checkpoints."""
        if self.saved == step:
            return
        folder = self.folder / f"step-{step}"
        aside = folder.with_name(folder.name + ".tmp")
        written = {}
        try:
            with self.ranks.all_or_none(f"saving {folder}"):
                if self.ranks.first:
                    self._check_space(self.bytes)
                tensors = state_tensors(llama, optimizer)
                aside.mkdir(exist_ok=True)
                if self.ranks.rank < self.plan.world // self.plan.config.replicas:
                    written = write_rows(aside, f"rank-{self.ranks.rank:05d}", tensors)
            pieces = self.ranks.gather(written)
            with self.ranks.all_or_none(f"saving {folder}"):
                if self.ranks.first:
                    files = {name: rows for found in pieces for name, rows in found.items()}
                    check_rows(files, self.shapes)
                    self._commit(aside, folder, step, files)
        except SaveFailed:
            if self.ranks.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        self.saved = step
        if self.ranks.first:
            self._settle()

    def _commit(self, aside, folder, step, files):
        state = {"step": step, "recipe": recipe(self.plan), "config": flags(self.plan)}
        (aside / "state.json").write_text(json.dumps(state | {"files": files}))
        for path in (aside / "state.json", aside, self.out / "metrics.jsonl"):
            sync(path)
        aside.rename(folder)

    def _settle(self):
        """After the rename, when the checkpoint stands: what may fail without harm."""
        try:
            sync(self.folder)
            self._mark()
            for _, path in self.committed()[: -self.plan.config.keep]:
                doomed = path.with_name(path.name + ".tmp")  # a kill here leaves no half folder
                path.rename(doomed)
                shutil.rmtree(doomed)
        except OSError as error:
            self.ranks.say(f"warning: {error}")

    def _mark(self):
        """Say in OUT that it holds a run, even where its checkpoints are taken away."""
        temporary = self.out / ".run.tmp"
        model.write_json(temporary, {"recipe": recipe(self.plan), "config": flags(self.plan)})
        temporary.replace(self.out / "run.json")

    # --- resume

    def resume(self):
        """Steps done in the newest checkpoint, 0 without one; ValueError where it cannot serve.

        Decided on rank 0 alone: the others might see an older state of the disk.
        """
        self.saved = self.ranks.first_does("resume", self._newest)
        return self.saved

    def _newest(self):
        self.folder.mkdir(exist_ok=True)
        committed, total = self.committed(), self.plan.order.total
        check_exports(self.out, len(self.plan.order.ends), bool(committed))
        step = self._resumable(*committed[-1]) if committed else 0
        clear_leftovers(self.out)
        if step < total:  # the newest --keep, and the one being written
            missing = max(0, self.plan.config.keep + 1 - len(committed))
            self._check_space(missing * self.bytes + self.bytes // 3)
        if step:
            with contextlib.suppress(OSError):
                self._mark()
        return step

    def _resumable(self, step, folder):
        total = self.plan.order.total
        if not self.plan.config.resume:
            raise ValueError(
                f"{self.out} holds a run ({folder.name}): --resume goes on with it, a new --out "
                "starts another"
            )
        state = read_state(folder)
        check_recipe(folder, state["recipe"], recipe(self.plan))
        if step > total:
            raise ValueError(
                f"{folder} is beyond the {total} steps asked for: raise --epochs or --max-steps, "
                "or give a new --out"
            )
        older = type(self.plan.config)()  # what was no flag yet acted as its default does
        saved = as_read_back(dataclasses.asdict(older)) | state["config"]
        for change in changed_flags(saved, flags(self.plan)):
            self.ranks.say(f"changed since the checkpoint: {change}")
        return step

    def load(self, llama, optimizer):
        """Fill weights and optimizer state from the checkpoint that resume() found."""
        folder, ranks = self.folder / f"step-{self.saved}", self.ranks
        state = read_state(folder)
        for parameter in llama.parameters():  # as AdamW makes it in its first step
            optimizer.state[parameter] = {
                "step": torch.full((), float(state["step"]), device=parameter.device)
            } | {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        tensors, files = state_tensors(llama, optimizer), state["files"]
        with ranks.all_or_none(f"resuming from {folder}"):
            try:
                check_rows(files, self.shapes)
            except ValueError as error:
                raise ValueError(f"{error}; {REMOVE}") from None
            for name in sorted(files)[ranks.rank :: ranks.world]:  # each file is summed once
                check_sums(folder / name, files[name])
        for name, rows in files.items():
            first_rows = {tensor: first for tensor, (first, _, _) in rows.items()}
            model.read_rows(folder / name, {n: tensors[n] for n in rows}, first_rows)
        if ranks.cuda:
            torch.cuda.empty_cache()  # what loading took, FSDP's streams could not use again
        ranks.say(f"resuming from {folder}")


def moment_name(parameter, moment):
    return f"optimizer.{parameter}.{moment}"


def state_tensors(llama, optimizer):
    """{name: tensor}: the parameters, and beside each AdamW's moments; SaveFailed if one has none.

    FSDP2 puts plain tensors in the place of a module's parameters while it is gathered, as the
    root is after a forward without a backward. AdamW knows nothing of those.
    """
    found = {}
    for name, parameter in llama.named_parameters():
        state = optimizer.state.get(parameter, {})  # indexing would make one
        if not isinstance(parameter, DTensor) or any(moment not in state for moment in MOMENTS):
            raise SaveFailed(f"{name} has no optimizer state, as where FSDP has gathered it")
        found[name] = parameter.detach()
        found |= {moment_name(name, moment): state[moment] for moment in MOMENTS}
    return found


def write_rows(folder, prefix, tensors):
    """Write this rank's rows of each tensor, in files of about FILE_SIZE.

    Returns {file: {tensor: [first row, rows, CRC-32 of their bytes]}}.
    """
    mine = {name: model.local_tensor(tensor) for name, tensor in tensors.items()}
    mine = {name: rows for name, rows in mine.items() if len(rows)}
    written = {}
    for number, names in enumerate(model.split(mine, torch.float32, FILE_SIZE), start=1):
        path = folder / f"{prefix}-{number:05d}.safetensors"
        rows = {name: mine[name].cpu().contiguous() for name in names}
        save_file(rows, path, metadata={"format": "pt"})
        sync(path)
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(model.checksum, rows.values()))
        written[path.name] = {
            name: [model.local_rows(tensors[name])[0], len(rows[name]), value]
            for name, value in zip(names, sums, strict=True)
        }
    return written


def check_rows(files, shapes):
    """ValueError in one line, unless the files hold every row of every tensor exactly once."""
    found = {name: [] for name in shapes}
    for rows in files.values():
        for name, (first, count, _) in rows.items():
            found.setdefault(name, []).append((first, first + count))
    problems = [f"{name} is not of this network" for name in found.keys() - shapes.keys()]
    for name, shape in shapes.items():
        end = 0
        for first, last in sorted(found[name]):
            if first != end:
                how = "lacks" if first > end else "repeats"
                problems.append(f"{name} {how} rows {min(first, end)} to {max(first, end)}")
            end = last
        if end != shape[0]:
            problems.append(f"{name} has {end} rows, not {shape[0]}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(", ".join(sorted(problems)[:5]) + more)


def check_sums(path, rows):
    """ValueError unless a file holds exactly these rows, bit for bit."""
    try:
        with model.open_safetensors(path) as file:
            if set(file.keys()) != set(rows):
                raise ValueError(f"{path} holds other tensors than state.json says")
            with ThreadPoolExecutor(4) as pool:
                tensors = list(pool.map(file.get_tensor, rows))
                found = zip(map(len, tensors), pool.map(model.checksum, tensors), strict=True)
                found = dict(zip(rows, found, strict=True))
    except ValueError as error:
        raise ValueError(f"{error}; {REMOVE}") from None
    odd = [name for name, (_, count, known) in rows.items() if found[name] != (count, known)]
    if odd:
        raise ValueError(f"{path} is damaged: {', '.join(odd[:5])}; {REMOVE}")


# What a resumed run must share with the saved one, and the flags that set it.
RECIPE = {
    "data": "data, tokenizer or length (--data, --model, --max-length, --no-condition)",
    "network": "network (config.json of --model)",
    "base": "weights that it began with (--model, --random-weights)",
    "classes": "classes (--classes)",
    "beta": "weights of the classes (--beta, --no-reward)",
    "seed": "order of the data (--seed)",
    "batch_tokens": "tokens a micro-batch (--batch-tokens)",
    "micro_batches": "micro-batches a step (ranks x --accumulate)",
}


def recipe(plan):
    """What makes this run itself: a checkpoint that differs in any of it is refused."""
    config = plan.config
    values = {
        "data": plan.dataset.folder.name,
        "network": dataclasses.asdict(plan.network),
        "base": plan.base or "random weights",
        "classes": {name: dataclasses.asdict(c) for name, c in plan.classes.items()},
        "beta": config.beta if config.reward else None,
        "seed": config.seed,
        "batch_tokens": config.batch_tokens,
        "micro_batches": plan.world * config.accumulate,
    }
    return as_read_back(values)


def flags(plan):
    return as_read_back(dataclasses.asdict(plan.config))


def as_read_back(value):
    return json.loads(json.dumps(value))


def check_recipe(folder, saved, now):
    different = []
    for key, text in RECIPE.items():
        before, here = saved.get(key), now[key]
        if before != here:
            if isinstance(before, dict):  # only what differs of it
                changed = [k for k in before | here if before.get(k) != here.get(k)]
                before = {k: before.get(k) for k in changed}
                here = {k: here.get(k) for k in changed}
            different.append(f"{text}: saved {before!r}, now {here!r}")
    if different:
        raise ValueError(
            f"{folder} is of another run; give the saved values, or a new --out:\n  "
            + "\n  ".join(different)
        )


def changed_flags(saved, now):
    """What may differ from the run as it was saved, but changes where it goes."""
    for name, value in now.items():
        if name not in ("model", "data", "out") and saved.get(name) != value:
            yield f"--{name.replace('_', '-')} {saved.get(name)!r}, now {value!r}"


def read_state(folder):
    try:
        state = json.loads((folder / "state.json").read_text())
        wanted = {"step": int, "recipe": dict, "config": dict, "files": dict}
        odd = [key for key, kind in wanted.items() if not isinstance(state[key], kind)]
        rows = [of for files in state["files"].values() for of in files.values()]
        if odd or f"step-{state['step']}" != folder.name or any(len(of) != 3 for of in rows):
            raise ValueError(f"not what a run writes: {odd or state['step']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}/state.json: cannot be read: {error!r}; {REMOVE}") from None
    return state


# ----------------------------------------------------------------------------------------- exports


def export(plan, ranks, llama, out, step, losses):
    """Write OUT/epoch-K as a Hugging Face folder and point OUT/model at the best or last.

    `losses` {step: the expert class's loss} of the evaluations so far, all on the same data.
    """
    folder = out / f"epoch-{plan.order.epoch_of(step)}"
    aside = out / f".{folder.name}.tmp"
    try:
        with ranks.all_or_none(f"saving {folder}"):
            if not all(isinstance(parameter, DTensor) for parameter in llama.parameters()):
                raise SaveFailed("the network is not resharded")
            model.save(llama, aside, torch.bfloat16 if plan.bf16 else torch.float32)
        with ranks.all_or_none(f"saving {folder}"):
            if ranks.first:
                describe_export(plan, aside, step, state_digest(out, step))
                publish(aside, folder, out)
                chosen, why = best_export(out, step, losses)
                point_model_at(chosen, out)
                ranks.say(f"exported {folder}; {out / 'model'} is {chosen}, {why}")
    except SaveFailed:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def describe_export(plan, folder, step, digest):
    """The files beside the weights: tokenizer, generation config, and what the model is.

    An answer ends at either of two tokens, as chat.py's do. config.json names the end of turn
    alone: llama.cpp's converter takes one number there.
    """
    config, tokenizer, dataset = plan.config, plan.tokenizer, plan.dataset
    expert = plan.classes[expert_class(plan.classes)]
    tokenizer.save(folder, expert.condition if config.condition else "")
    ends = [token for token in (tokenizer.eot, tokenizer.eos) if token is not None and token >= 0]
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": list(dict.fromkeys(ends))}
    model.write_json(folder / "generation_config.json", tokens)
    weights = [1.0] * len(plan.classes) if plan.class_weights is None else plan.class_weights
    crlft = {"classes": {name: dataclasses.asdict(c) for name, c in plan.classes.items()}}
    crlft |= {"weights": dict(zip(plan.classes, map(float, weights), strict=True))}
    crlft |= {"conditioned": config.condition, "most_answers": dataset.most_answers(tokenizer.eot)}
    crlft |= {"template": tokenizer.template.name, "steps": step, "checkpoint": digest}
    model.write_json(folder / "crlft.json", crlft | {"config": dataclasses.asdict(config)})
    files = [source.path for source in dataset.sources]
    base = config.model if plan.base else None
    card = model_card(crlft, tokenizer.template, base, files, len(dataset))
    (folder / "README.md").write_text(card, encoding="utf-8")


def publish(aside, folder, out):
    """Rename a finished export into its place, an older one of the same epoch out of it."""
    for path in [*aside.iterdir(), aside]:
        sync(path)
    older = out / f".{folder.name}.old"
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    aside.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


def point_model_at(chosen, out):
    link = out / ".model.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(chosen)
    link.replace(out / "model")
    sync(out)


def best_export(out, step, losses):
    """(folder name, why): of the least of `losses` {step: loss}; without any, the last one.

    What a run exported beyond `step`, before it went back to an older checkpoint, does not count.
    """
    exports = {e["steps"]: name for name, e in read_exports(out).items() if e["steps"] <= step}
    evaluated = [steps for steps in exports if math.isfinite(losses.get(steps) or math.inf)]
    if not evaluated:
        return exports[max(exports)], "the last"
    best = min(evaluated, key=lambda steps: (losses[steps], -steps))
    others = ", ".join(sorted(exports[steps] for steps in exports.keys() - set(evaluated)))
    unknown = f"; not evaluated on this --eval-data: {others}" if others else ""
    return exports[best], f"the least expert loss, {losses[best]:.4f}{unknown}"


def is_exported(plan, out, step, losses):
    """Is the export of this step's checkpoint there, and was OUT/model set after it?"""
    export, link = read_exports(out).get(f"epoch-{plan.order.epoch_of(step)}"), out / "model"
    if not export or (export["steps"], export["checkpoint"]) != (step, state_digest(out, step)):
        return False
    return link.is_symlink() and os.readlink(link) == best_export(out, step, losses)[0]


def read_exports(out):
    """{folder name: crlft.json} of the exports in `out`; of a user's copies of them, none."""
    found = {}
    for path in out.glob("epoch-*"):
        if re.fullmatch(r"epoch-\d+", path.name) and (export := read_export(path)):
            found[path.name] = export
    return found


def read_export(folder):
    """crlft.json as describe_export writes it; None where there is no such file."""
    try:
        export = json.loads((folder / "crlft.json").read_text(encoding="utf-8-sig"))
        return export if isinstance(export["steps"], int) and "checkpoint" in export else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_exported(config):
    """The Config by which --evaluate is planned, and its class table.

    As an export was trained, so it is measured: its own classes, with or without condition, cut at
    its own length. Every token counts alike: another --beta could round a class's weight to 0.
    """
    folder = exported(config.model)
    path, export = folder / "crlft.json", read_export(folder) or {}
    trained = export.get("config", {})
    length = trained.get("max_length") if isinstance(trained, dict) else ""
    if not isinstance(length, int | None) or (not export and path.exists()):
        raise ValueError(f"{path}: cannot be read, and says how the model is asked")
    length = config.max_length or length
    own = {
        "model": str(folder), "data": config.eval_data, "epochs": 1, "random_weights": False,
        "condition": config.condition and export.get("conditioned", True), "reward": False,
        "max_length": min(length, config.batch_tokens) if length else None,
    }  # fmt: skip
    return dataclasses.replace(config, **own), export.get("classes", DEFAULT_CLASSES)


def state_digest(out, step):
    """What tells the checkpoint of a step from another of the same step; None without one."""
    path = out / "checkpoints" / f"step-{step}" / "state.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def check_exports(out, epochs, has_checkpoints):
    """ValueError where the run would overwrite what is not its own to overwrite."""
    if not has_checkpoints and ((out / "run.json").exists() or read_exports(out)):
        raise ValueError(
            f"{out} holds a run, but none of its checkpoints, and this command would start over "
            f"and overwrite it: put {out}/checkpoints/step-N back, or give a new --out"
        )
    for folder in (out / f"epoch-{epoch}" for epoch in range(1, epochs + 1)):
        if folder.exists() and not read_export(folder):
            raise ValueError(f"{folder} is no export of this run, which writes one there: move it")


def clear_leftovers(out):
    """Remove what a kill left of a save or of `publish`, and finish a rename that it cut short."""
    for path in [*(out / "checkpoints").iterdir(), *out.iterdir()]:
        if re.fullmatch(r"step-\d+\.tmp|\.epoch-\d+\.tmp", path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"\.epoch-\d+\.old", path.name):
            if (out / path.stem[1:]).exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(out / path.stem[1:])
