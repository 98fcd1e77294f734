"""The run folder: settings, metrics, progress, samples, and checkpoints to resume from exactly.

runs/<name>/    a model folder (hub.py), and beside it
  train_config.json    the settings of the run; what --resume reads
  metrics.jsonl        one JSON object per logged step
  samples.txt          what the model wrote during training
  curves.svg           the metrics as a picture
  result.json          the figures reached at the end
  state.pt             weights, optimizer, step, random generators and data position, written
                       whole or not at all
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanollm.config import UserError, atomic_file, atomic_write, save_config
from nanollm.hub import bases_of, save_model
from nanollm.plot import line_chart
from nanollm.runtime import peak_memory, rng_state, set_rng_state


class Run:
    """A training run and its folder. Only the main process writes; every process may call every
    method.
    """

    def __init__(self, cfg, rt, steps):
        self.folder, self.cfg, self.rt, self.steps = Path(cfg.out), cfg, rt, steps
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # spent in earlier sessions of this run
        self.state = self._load_state() if cfg.resume else None
        if rt.main:
            self._prepare_folder()
        rt.barrier()
        self.started = self.last_time = time.perf_counter()
        self.ended = None
        self.bar = tqdm(
            total=steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            desc=self.folder.name,
            disable=not (rt.main and sys.stderr.isatty()),
        )

    def _load_state(self):
        path = checkpoint_of(self.folder)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]
        except Exception as e:  # torch.load raises many kinds on a damaged file
            raise UserError(
                f"{path} can't be read ({type(e).__name__}); start without --resume"
            ) from None
        return state

    def _prepare_folder(self):
        """A resumed run forgets metrics later than its checkpoint; a new one moves an older run out
        of the way.
        """
        metrics = self.folder / "metrics.jsonl"
        if self.state is not None:
            kept = [m for m in read_metrics(self.folder) if m["step"] <= self.step]
            atomic_write(metrics, "".join(json.dumps(m) + "\n" for m in kept))
        else:
            make_way(self.folder)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise UserError(
                    f"can't write to {self.folder} ({e.strerror}); choose another --out"
                ) from None
            atomic_write(metrics, "")
            save_config(self.cfg, self.folder / "train_config.json")

    def restore(self, model, optimizers, samplers, scaler):
        """Put everything back as it was at the checkpoint; does nothing in a fresh run. Returns
        extra values saved.
        """
        if self.state is None:
            return {}
        try:
            load_trained(model, self.state["model"])
            optimizers.load_state_dict(self.state["optimizers"])
        except (RuntimeError, ValueError, KeyError):
            raise UserError(
                f"the checkpoint in {self.folder} has another shape than the flags ask for"
            ) from None
        if self.rt.main:  # now that the flags fit the checkpoint
            save_config(self.cfg, self.folder / "train_config.json")
        for sampler, state in zip(samplers, self.state["samplers"], strict=True):
            sampler.load_state_dict(state)
        scaler.load_state_dict(self.state["scaler"])
        set_rng_state(
            self.state["rng"][min(self.rt.rank, len(self.state["rng"]) - 1)], self.rt.device
        )
        return self.state["extra"]

    def checkpoint(self, model, optimizers, samplers, scaler, **extra):
        """Write state.pt, from which --resume continues as if nothing had happened."""
        rng = rng_state(self.rt.device)
        if self.rt.world > 1:
            gathered = [None] * self.rt.world
            torch.distributed.all_gather_object(gathered, rng)
            rng = gathered
        else:
            rng = [rng]
        if not self.rt.main:
            return
        state = {
            "step": self.step,
            "seconds": self.elapsed,
            "rng": rng,
            "extra": extra,
            "model": trained_state(model),
            "optimizers": optimizers.state_dict(),
            "samplers": [s.state_dict() for s in samplers],
            "scaler": scaler.state_dict(),
        }
        with atomic_file(self.folder / "state.pt") as f:
            torch.save(state, f)

    @property
    def elapsed(self):
        """Seconds of training, earlier sessions of a resumed run included."""
        return self.seconds + (self.ended or time.perf_counter()) - self.started

    def log(self, tokens=0, show=(), **metrics):
        """Append a line to metrics.jsonl; values are numbers, `tokens` those trained on since the
        last call.

        The names in `show` go on the progress bar, or on a line of their own where stderr is no
        terminal.
        """
        now = time.perf_counter()
        record = {"step": self.step, "seconds": round(self.elapsed, 3), **metrics}
        if tokens:
            record["tokens_per_second"] = round(tokens / (now - self.last_time), 1)
        self.last_time = now
        if not self.rt.main:
            return
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
        shown = {
            name: f"{record[name]:.4g}" for name in (*show, "tokens_per_second") if name in record
        }
        self.bar.set_postfix(shown)
        if show and self.bar.disable:
            left = (self.elapsed - self.seconds) / max(1, self.bar_steps) * (self.steps - self.step)
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.step}/{self.steps}  {values}  {left:.0f} s left", flush=True)

    def advance(self):
        """One optimizer step is done."""
        self.step += 1
        self.bar.update()

    @property
    def bar_steps(self):
        return self.step - (self.state["step"] if self.state else 0)

    def check_finite(self, loss, name="loss"):
        """A loss that is no number ends the run; the last checkpoint stays as it is."""
        if loss != loss or abs(loss) == float("inf"):
            raise UserError(
                f"the {name} became {loss} at step {self.step}; lower the learning rate, or "
                f"continue from the last "
                f"checkpoint in {self.folder} with --resume"
            )

    def write_sample(self, text):
        if self.rt.main:
            with open(self.folder / "samples.txt", "a", encoding="utf-8") as f:
                f.write(f"--- step {self.step}\n{text}\n")

    def export(self, model, tokenizer, save=save_model):
        """Write the model folder: what --init, chat, evaluate and transformers open."""
        if self.rt.main:
            save(model, tokenizer, folder=self.folder)

    def write_result(self, **values):
        """Add to result.json what the run has reached: the figures that the report shows."""
        if self.rt.main:
            path = self.folder / "result.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            atomic_write(path, json.dumps(known | values, indent=2) + "\n")

    def speed(self):
        """Median tokens per second of the run, seconds of training, and peak memory, for
        result.json.
        """
        speeds = sorted(
            m["tokens_per_second"] for m in read_metrics(self.folder) if "tokens_per_second" in m
        )
        return {
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else 0.0,
            "seconds": self.elapsed,
            "peak_memory_bytes": peak_memory(self.rt.device),
            "steps": self.step,
        }

    def draw_curves(self, *names, x_label="step", y_label="nats per token"):
        """curves.svg: the named metrics over the steps, smoothed a little where there are many
        points.
        """
        if not self.rt.main:
            return
        metrics = read_metrics(self.folder)
        series = {
            name: smooth([(m["step"], m[name]) for m in metrics if m.get(name) is not None])
            for name in names
        }
        chart = line_chart(series, self.folder.name, x_label, y_label)
        atomic_write(self.folder / "curves.svg", chart)

    def close(self):
        """Training is over: stop the clock and the bar."""
        self.ended = time.perf_counter()
        self.bar.close()


def trained_state(model):
    """State dict of what training changes: beside an adapter the frozen base is left out."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def load_trained(model, state):
    """Put the tensors of `trained_state` back; raises RuntimeError where others are needed."""
    if state.keys() != trained_state(model).keys():
        raise RuntimeError("the checkpoint holds other tensors than the model trains")
    model.load_state_dict(state, strict=False)


def previous_of(folder):
    """Where the run that was in a folder goes when another one takes its place."""
    return folder.with_name(folder.name + ".previous")


def set_aside(folder):
    """Move a run out of the way, in place of the one moved before; returns where it went."""
    previous = previous_of(folder)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(folder, previous)
    return previous


def holds_a_run(folder):
    """True for a run of ours, False for nothing; UserError where there are other files."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "train_config.json").exists():
        raise UserError(f"{folder} holds files that are no run of ours; choose another --out")
    return True


def make_way(folder):
    """Move an earlier run out of the way; an attempt that never reached its first checkpoint is
    deleted.
    """
    if not holds_a_run(folder):
        return
    weights = ("model.safetensors", "adapter_model.safetensors", "state.pt")
    if any((folder / name).exists() for name in weights):
        print(f"the run that was in {folder} is now in {set_aside(folder)}")
    else:
        shutil.rmtree(folder)


def check_folders(init, out):
    """Refuse to read a folder that writing to `out` would replace, or an adapter whose base it
    would.
    """
    out = Path(out).resolve()
    for folder in (Path(init), *bases_of(init)):
        start = folder.resolve()
        if start in (out, previous_of(out)) or out in start.parents:
            base = "" if folder == Path(init) else f", whose base is {folder}"
            raise UserError(
                f"--out {out} would replace {init}{base}, which the run reads; use another folder"
            )


def check_file(out, *read):
    """Refuse a file to write that is a folder, or one of those that are read."""
    if Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; name a file to write")
    if Path(out).resolve() in (Path(path).resolve() for path in read):
        raise UserError(f"--out {out} would replace the file that is read; name another one")


def checkpoint_of(folder):
    """Path of the checkpoint to resume from; raises UserError where there is none."""
    path = Path(folder) / "state.pt"
    if not path.exists():
        raise UserError(
            f"nothing to resume in {folder}: no checkpoint was written yet; start without --resume"
        )
    return path


def read_metrics(folder):
    """The records of metrics.jsonl; a last line cut short by a kill is left out."""
    path, records = Path(folder) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def smooth(points, most=100):
    """Means of neighbours, so that at most `most` points are left."""
    size = -(-len(points) // most) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]
