"""What a run keeps: checkpoints to go on from, and exported models.

    OUT/checkpoints/step-N/    float32 weights and AdamW's state, each rank its rows, as safetensors
        state.json             where each file's rows belong, their checksums, of which run it is
    OUT/epoch-K/               an exported Hugging Face folder, after the checkpoint of its step
    OUT/model                  a link to the export of the least loss, or to the last
    OUT/run.json               that this folder holds a run with checkpoints

A folder is written under another name, synced, and renamed on one rank once all have written: under
its own name it is whole. So a kill at any instant costs the steps since the last checkpoint.

Why a resumed run ends with the same bits: a step depends on the weights, AdamW's two moments and
step count, all kept in float32 as they are; on the number of the step, which decides learning rate
and conversations (data.pack is a function of lengths, seed and epoch); and on nothing random, as
nothing is drawn in training. What is due at a step after its checkpoint, the evaluation and the
export, leaves a record (metrics.jsonl, crlft.json), and is made again where that is missing.
"""

import dataclasses
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import data
import loss
import model
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
        self.resumed_from, self.saved = None, 0  # a folder; the step of the newest checkpoint
        with torch.device("meta"):
            parameters = dict(model.Llama(plan.network).named_parameters())
        self.shapes = {name: list(p.shape) for name, p in parameters.items()}
        for moment in MOMENTS:
            self.shapes |= {moment_name(n, moment): list(p.shape) for n, p in parameters.items()}
        self.bytes = 4 * len(MOMENTS + ("weight",)) * plan.network.parameter_count()
        if ranks.first:
            self.folder.mkdir(exist_ok=True)
            clear_leftovers(out)
            # Kept are the newest, the one resumed from, and the one being written.
            here = len(self.committed())
            missing = max(0, plan.config.keep + 1 + bool(here) - here)
            self._check_space(missing * self.bytes + self.bytes // 3)

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
            self._prune()

    def _commit(self, aside, folder, step, files):
        plan, metrics = self.plan, self.out / "metrics.jsonl"
        run = {"recipe": recipe(plan), "config": flags(plan)}
        state = {"step": step, **run, "files": files}
        (aside / "state.json").write_text(json.dumps(state))
        for path in (aside / "state.json", aside, metrics):
            sync(path)
        aside.rename(folder)
        sync(self.folder)
        self._mark(run)

    def _mark(self, run):
        """Say in OUT that it holds a run, even where its checkpoints are taken away."""
        temporary = self.out / ".run.tmp"
        model.write_json(temporary, run)
        temporary.replace(self.out / "run.json")

    def _prune(self):
        for _, path in self.committed()[: -self.plan.config.keep]:
            if path != self.resumed_from:
                doomed = path.with_name(path.name + ".tmp")  # a kill here leaves no half folder
                try:
                    path.rename(doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    self.ranks.say(f"warning: {path} could not be removed: {error}")

    # --- resume

    def resume(self):
        """Steps done in the newest checkpoint, 0 without one; ValueError where it cannot serve.

        Decided on rank 0 alone: the others might see an older state of the disk.
        """
        step = self.saved = self.ranks.first_does("resume", self._newest)
        self.resumed_from = self.folder / f"step-{step}" if step else None
        return step

    def _newest(self):
        committed, total = self.committed(), self.plan.order.total
        if not committed:
            if (self.out / "run.json").exists():
                raise ValueError(
                    f"{self.out} holds a run (run.json), but none of its checkpoints, and this "
                    f"command would start over and overwrite it: put {self.folder}/step-N back, "
                    "or give a new --out"
                )
            return 0
        step, folder = committed[-1]
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
        for change in changed_flags(state["config"], flags(self.plan)):
            self.ranks.say(f"changed since: {change}")
        self._mark({key: state[key] for key in ("recipe", "config")})
        return step

    def load(self, llama, optimizer):
        """Fill weights and optimizer state from the checkpoint that resume() found."""
        folder, ranks = self.resumed_from, self.ranks
        state = read_state(folder)
        for parameter in llama.parameters():  # as AdamW makes it in its first step
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=parameter.device)
            } | {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        tensors, files = state_tensors(llama, optimizer), state["files"]
        with ranks.all_or_none(f"resuming from {folder}"):
            check_rows(files, self.shapes)
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
            raise SaveFailed(f"{name} has no optimizer state: is the network resharded?")
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
        sums = crc32(rows.values())
        written[path.name] = {
            name: [model.local_rows(tensors[name])[0], len(rows[name]), value]
            for name, value in zip(names, sums, strict=True)
        }
    return written


def crc32(tensors):
    """CRC-32 of each tensor's bytes."""
    arrays = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    with ThreadPoolExecutor(4) as pool:  # zlib lets go of the interpreter's lock
        return list(pool.map(zlib.crc32, arrays))


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
            tensors = [file.get_tensor(name) for name in rows]
    except ValueError as error:
        raise ValueError(f"{error}; {REMOVE}") from None
    found = zip(rows.items(), tensors, crc32(tensors), strict=True)
    odd = [n for (n, (_, count, known)), t, value in found if (len(t), value) != (count, known)]
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
    """What the run is: of another, no checkpoint is taken."""
    config = plan.config
    values = {
        "data": plan.dataset.folder.name,
        "network": dataclasses.asdict(plan.network),
        "base": plan.base,
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
        if odd or f"step-{state['step']}" != folder.name:
            raise ValueError(f"not what a run writes: {odd or state['step']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
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
                describe_export(plan, aside, step)
                publish(aside, folder, out)
                chosen, why = best_export(out, step, losses)
                point_model_at(chosen, out)
                ranks.say(f"exported {folder}; {out / 'model'} is {chosen}, {why}")
    except SaveFailed:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def describe_export(plan, folder, step):
    """The files beside the weights: tokenizer, generation config, and what the model is."""
    expert = plan.classes[loss.expert_class(plan.classes)]
    plan.tokenizer.save(folder, expert.condition if plan.config.condition else "")
    tokens = {"bos_token_id": plan.tokenizer.bos, "eos_token_id": plan.tokenizer.eot}
    model.write_json(folder / "generation_config.json", tokens)
    classes = {name: dataclasses.asdict(c) for name, c in plan.classes.items()}
    crlft = {"classes": classes, "conditioned": plan.config.condition, "template": data.TEMPLATE}
    crlft |= {"steps": step, "config": dataclasses.asdict(plan.config)}
    model.write_json(folder / "crlft.json", crlft)


def publish(aside, folder, out):
    """Rename a finished export into its place, an older one of the same epoch out of it."""
    for path in [*aside.iterdir(), aside]:
        sync(path)
    older = out / f".{folder.name}.old"
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        if steps_of(folder) is None:
            raise SaveFailed(f"{folder} is there already, and no export of a run: rename it")
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
    exports = {steps_of(path): path.name for path in out.glob("epoch-*")}
    exports = {steps: name for steps, name in exports.items() if steps and steps <= step}
    evaluated = [steps for steps in exports if losses.get(steps) is not None]
    if not evaluated:
        return exports[max(exports)], "the last"
    best = min(evaluated, key=lambda steps: (losses[steps], -steps))
    others = ", ".join(sorted(exports[steps] for steps in exports.keys() - set(evaluated)))
    unknown = f"; not evaluated on this --eval-data: {others}" if others else ""
    return exports[best], f"the least expert loss, {losses[best]:.4f}{unknown}"


def is_exported(plan, out, step, losses):
    """Is the export of this step there, and was OUT/model set after it?"""
    if steps_of(out / f"epoch-{plan.order.epoch_of(step)}") != step:
        return False
    link = out / "model"
    return link.is_symlink() and os.readlink(link) == best_export(out, step, losses)[0]


def steps_of(folder):
    """The steps after which a folder was exported; None where it is no export."""
    try:
        return json.loads((folder / "crlft.json").read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def clear_leftovers(out):
    """What a kill in the midst of a save or of `publish` left: half folders go, whole ones stay."""
    stale = [p for p in (out / "checkpoints").iterdir() if re.fullmatch(r"step-\d+\.tmp", p.name)]
    for path in stale + [p for p in out.iterdir() if re.fullmatch(r"\.epoch-\d+\.tmp", p.name)]:
        shutil.rmtree(path)
    for older in [p for p in out.iterdir() if re.fullmatch(r"\.epoch-\d+\.old", p.name)]:
        folder = out / older.stem[1:]
        if folder.exists():
            shutil.rmtree(older)
        else:
            older.rename(folder)


def sync(path):
    """Have the disk hold a file or folder before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
