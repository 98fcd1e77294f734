"""The run folder: settings, metrics, progress, samples, and checkpoints to resume from exactly.

runs/<name>/    a model folder (checkpoint.py), and beside it
  train_config.json    the settings of the run, and of the one that it began from; what --resume
                       reads
  metrics.jsonl        one JSON object per logged step
  samples.txt          what the model wrote during training
  curves.svg           the metrics as a picture
  result.json          what the run has reached: "effects", and all that was measured
  state.pt             weights, optimizer, step, random generators and data position, written
                       whole or not at all
"""

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean, median

import torch

from nanollm.checkpoint import bases_of, is_adapter, weights_hash
from nanollm.config import (
    BEGAN_FROM,
    TrainConfig,
    UserError,
    atomic_file,
    atomic_write,
    lock,
    read_json,
    save_config,
    say,
    unlock,
)
from nanollm.formats import mixture
from nanollm.plot import line_chart
from nanollm.runtime import peak_memory, rng_state, set_rng_state

LOG_EVERY = 10  # steps between the lines of `advance`
LARGE_MODEL = 1e8  # parameters; ours have fewer


class Run:
    """A training run and its folder. Only the main process writes; every process may call every
    method.
    """

    def __init__(self, cfg, rt):
        self.folder, self.rt, self.steps = Path(cfg.out), rt, cfg.steps
        # what was measured when the run began holds for its continuation, too
        self.cfg = replace(cfg, dtype=rt.dtype_name)
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent in earlier sessions of this run
        self.tokens = 0  # since the last logged line
        self.state = None  # the checkpoint that a resumed run goes on from
        if cfg.resume:
            path = checkpoint_of(self.folder)
            try:
                self.state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:  # torch.load raises many kinds on a damaged file
                why = f"{path} is damaged ({e!r:.80}); start without --resume"
                raise UserError(why) from None
            self.step, self.seconds = self.state["step"], self.state["seconds"]
        self.parts = {}  # what a checkpoint holds: model, optimizer, samplers
        if rt.main:
            self._prepare_folder()
        rt.barrier()
        self.started = self.last_time = time.perf_counter()
        self.ended = None

    def _prepare_folder(self):
        """A new run moves an older one out of the way. A resumed one changes nothing yet, and goes
        on with the data and from the model that it had before its checkpoint.
        """
        self.inputs = inputs_of(self.cfg)
        lock(self.folder)  # first: another process may be about to write its first file
        if self.state is None:
            move_aside(self.folder)
            atomic_write(self.folder / "metrics.jsonl", "")
            save_run_config(self.cfg)
            return
        for name, known in self.state["inputs"].items():
            if self.inputs.get(name) != known:
                raise UserError(
                    f"--{name} {getattr(self.cfg, name)} holds something else than when the "
                    f"checkpoint in {self.folder} was written; start without --resume"
                )

    # --- checkpoints

    def restore(self, model, optimizer, *samplers):
        """Say what a checkpoint holds, and put it back as it was; returns the extra values that
        were saved, {} in a fresh run.
        """
        self.parts = {"model": model, "optimizer": optimizer, "samplers": samplers}
        if self.state is None:
            note_on_rates(self.cfg, model)
            return {}
        state = self.state
        try:
            if state["model"].keys() != trained_state(model).keys():
                raise ValueError
            model.load_state_dict(state["model"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            for sampler, saved in zip(samplers, state["samplers"], strict=True):
                sampler.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError):
            raise UserError(
                f"the checkpoint in {self.folder} has another shape than the flags ask for"
            ) from None
        rank = min(self.rt.rank, len(state["rng"]) - 1)  # there may be more processes now
        set_rng_state(state["rng"][rank], self.rt.device)
        if self.rt.main:  # now that the flags fit the checkpoint: later metrics are forgotten
            kept = [m for m in read_metrics(self.folder) if m["step"] <= self.step]
            lines = "".join(json.dumps(m) + "\n" for m in kept)
            atomic_write(self.folder / "metrics.jsonl", lines)
            save_run_config(self.cfg)
        return state["extra"]

    def checkpoint(self, **extra):
        """Write state.pt, from which --resume continues as if nothing had happened."""
        rng = self.rt.gather([rng_state(self.rt.device)])
        if not self.rt.main:
            return
        state = {
            "step": self.step,
            "seconds": self.elapsed,
            "rng": rng,
            "extra": extra,
            "inputs": self.inputs,
            "model": trained_state(self.parts["model"]),
            "optimizer": self.parts["optimizer"].state_dict(),
            "samplers": [s.state_dict() for s in self.parts["samplers"]],
        }
        try:
            with atomic_file(self.folder / "state.pt") as f:
                torch.save(state, f)
        except RuntimeError as e:  # what torch makes of a full disk
            raise UserError(f"can't write {self.folder}/state.pt: is the disk full? {e}") from None

    # --- metrics

    @property
    def elapsed(self):
        """Seconds of training, earlier sessions of a resumed run included."""
        return self.seconds + (self.ended or time.perf_counter()) - self.started

    def due(self, every):
        """Is it time, every so many steps and at the end?"""
        return self.step % every == 0 or self.step == self.steps

    def advance(self, tokens=0, every=LOG_EVERY, show=("loss",), **metrics):
        """One optimizer step is done; its metrics are logged now and then. `tokens` count over all
        processes: of packed rows all that they hold, padding included, of a reward model's those
        that it reads, elsewhere those trained on, once for each pass.
        """
        self.step += 1
        self.tokens += tokens
        if self.due(every) or self.step == 1:
            now = time.perf_counter()
            if self.tokens:
                metrics["tokens_per_second"] = round(self.tokens / (now - self.last_time), 1)
            self.last_time, self.tokens = now, 0
            self._log(() if self.step == 1 else (*show, "tokens_per_second"), metrics)

    def evaluated(self, show=None, **metrics):
        """Log what an evaluation has found."""
        self._log(metrics if show is None else show, metrics)

    def _log(self, show, metrics):
        """Append a line to metrics.jsonl, and print the values of the names in `show`. One that is
        not finite ends the run; the last checkpoint stays as it is.
        """
        metrics = {name: float(value) for name, value in metrics.items() if value is not None}
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} became {value} at step {self.step}; lower the learning rate, or "
                    f"continue from the last checkpoint in {self.folder} with --resume"
                )
        if not self.rt.main:
            return
        record = {"step": self.step, "seconds": round(self.elapsed, 3)} | metrics
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        if shown := [f"{name} {metrics[name]:.4g}" for name in show if name in metrics]:
            left = self.elapsed / max(1, self.step) * (self.steps - self.step)
            line = [f"step {self.step}/{self.steps}", *shown, f"{left:.0f} s left"]
            print("  ".join(line), flush=True)

    def write_sample(self, text):
        if self.rt.main:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as f:
                f.write(f"--- step {self.step}\n{text}\n")

    # --- the end

    def export(self, save, model, tokenizer):
        """Write the model folder by `save` (checkpoint.save_gpt, hub.save_model or
        vision.clip.save_clip): what --init or --vision, chat, evaluate and transformers open.
        """
        if self.rt.main:
            save(model, tokenizer, self.folder)

    def close(self, *curves, **labels):
        """Training is over: stop the clock, and draw curves.svg, the named metrics over the steps,
        smoothed a little where there are many points.
        """
        self.ended = time.perf_counter()
        if not self.rt.main:
            return
        metrics = read_metrics(self.folder)
        series = {
            name: smooth([(m["step"], m[name]) for m in metrics if m.get(name) is not None])
            for name in curves
        }
        chart = line_chart(series, self.folder.name, **labels)
        atomic_write(self.folder / "curves.svg", chart)

    def write_result(self, effects=(), **values):
        """Write to result.json what the run has reached, beside its speed, and print the effects.

        effects: what the stage has changed, by `effect`; the report, compare and the pipeline's
        summary read them.
        """
        for each in effects:
            self.rt.print(effect_line(each))
        memory = peak_memory(self.rt.device)
        if self.rt.main:
            speeds = [m.get("tokens_per_second") for m in read_metrics(self.folder)]
            speed = {
                "tokens_per_second": median([s for s in speeds if s is not None] or [0.0]),
                "seconds": self.elapsed,
                "peak_memory_bytes": memory,
                "steps": self.step,
            }
            path = self.folder / "result.json"
            known = read_json(path) if path.exists() else {}
            result = known | {"effects": list(effects)} | values | speed
            atomic_write(path, json.dumps(result, indent=2) + "\n")
        most = f", at most {memory / 2**20:,.0f} MiB of memory" if memory else ""
        self.rt.print(f"{self.folder}: {self.step} steps in {self.elapsed:.0f} s{most}")
        unlock(self.folder)
        self.rt.barrier()  # until all of it is written


def effect(name, before, after, unit="", higher_is_better=True):
    """What a stage has changed, for result.json: a number before and after, each or None. The unit
    "share" is shown in percent.
    """
    values = {"name": name, "before": before, "after": after}
    return values | {"unit": unit, "higher_is_better": higher_is_better}


def format_value(value, unit=""):
    """A value of an effect as text, without its unit."""
    if value is None:
        return "-"
    return f"{value:.1%}" if unit == "share" else f"{value:.4g}"


def change(effect, arrow="->"):
    """The numbers of an effect as text: 0.68 -> 0.94."""
    unit = effect["unit"]
    text = format_value(effect["after"], unit)
    if effect["before"] is not None:
        text = f"{format_value(effect['before'], unit)} {arrow} {text}"
    return text if unit in ("", "share") else f"{text} {unit}"


def effect_line(effect):
    """An effect as text: gold score: 0.68 -> 0.94."""
    return f"{effect['name']}: {change(effect)}"


def note_on_rates(cfg, model):
    """Say so where a downloaded model is about to learn at the rates of a tiny one."""
    size = sum(p.numel() for p in model.parameters())
    ours = cfg.preset in ("tiny", "smoke") and cfg.optimizer == TrainConfig.optimizer
    if ours and size > LARGE_MODEL and getattr(cfg, "init", None):
        say("note: these are rates for a model of one million parameters; see --preset downloaded")


def trained_state(model):
    """State dict of what training changes: beside an adapter the frozen base is left out."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


# --- provenance ----------------------------------------------------------------------------------


def save_run_config(cfg):
    """Write train_config.json: the settings, and those of the run that this one began from (its
    first teacher's, or else --init's), which may be gone or replaced when somebody asks what it was
    trained on; null where there is none.
    """
    names = getattr(cfg, "teacher", "").split(",")[0], getattr(cfg, "init", None)
    paths = [Path(name, "train_config.json") for name in names if name]
    known = next((read_json(path) for path in paths if path.exists()), None)
    save_config(cfg, Path(cfg.out) / "train_config.json", **{BEGAN_FROM: known})


def inputs_of(cfg):
    """{setting: a hash of what it names} of the settings that name a file or a directory."""
    elsewhere, found = ("preset", "out", "device", "adapter", "tokenizer"), {}
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if not isinstance(value, str) or field.name in elsewhere:
            continue
        files = value.split(",") if field.name == "teacher" else mixture(value)
        if hashes := [content_hash(Path(file)) for file in files if file and Path(file).exists()]:
            found[field.name] = " ".join(hashes)
    return found


def content_hash(path):
    """SHA-256 of what is in a file, or in all files of a directory; of a model its weights'."""
    if (path / "config.json").exists() or is_adapter(path):
        return weights_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


# --- folders -------------------------------------------------------------------------------------


def previous_of(folder):
    """Where the run that was in a folder goes when another one takes its place."""
    return folder.with_name(folder.name + ".previous")


def holds_a_run(folder):
    """True for a run of ours, False for nothing; UserError where there are other files."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "train_config.json").exists():
        raise UserError(f"{folder} holds files that no run has written; choose another --out")
    return True


def move_aside(folder):
    """Move an earlier run out of the way; an attempt that never reached its first checkpoint is
    deleted.
    """
    if not holds_a_run(folder):
        return
    weights = ("model.safetensors", "adapter_model.safetensors", "state.pt")
    if any((folder / name).exists() for name in weights):
        shutil.rmtree(previous_of(folder), ignore_errors=True)
        os.replace(folder, previous_of(folder))
        print(f"the run that was in {folder} is now in {previous_of(folder)}")
    else:
        shutil.rmtree(folder)


def check_folders(out, *inputs):
    """Refuse an `out` that would replace a folder which the run reads, or the base of an adapter in
    it.
    """
    out = Path(out).resolve()
    replaced = out, previous_of(out)
    for folder in filter(None, inputs):
        for read in (Path(folder), *bases_of(folder)):
            if read.resolve() in replaced or out in read.resolve().parents:
                raise UserError(f"--out {out} would replace {read}, which the run reads")


def check_file(out, *read):
    """Refuse a file to write that is a directory, or one of those that are read."""
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a directory; name a file to write")
    if Path(out).resolve() in (Path(path).resolve() for path in read):
        raise UserError(f"--out {out} would replace the file that is read; name another one")


def checkpoint_of(folder):
    """Path of the checkpoint to resume from; raises UserError where there is none."""
    path = Path(folder) / "state.pt"
    if not path.exists():
        raise UserError(f"nothing to resume in {folder}: start without --resume")
    return path


def read_metrics(folder):
    """The records of metrics.jsonl; a last line cut short by a kill is left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def smooth(points, most=100):
    """Means of neighbours, so that at most `most` points are left."""
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(map(fmean, zip(*part))) for part in parts]
