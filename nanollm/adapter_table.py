"""Several methods of lora.py one after the other, and one table of what each costs and gives."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from nanollm.config import UserError, atomic_write
from nanollm.hub import read_json
from nanollm.run import check_folders

RANKED = ("lora", "dora", "qlora", "adapter")  # methods with a rank


def state_bytes(model, optimizers):
    """Bytes of weights, gradients and the optimizers' moments: all that training holds beside
    activations.
    """
    moments = [
        value
        for optimizer in optimizers.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = (*model.parameters(), *model.buffers(), *gradients, *moments)
    return sum(x.numel() * x.element_size() for x in held)


def planned(methods, ranks, known):
    """[(name, {flag: value})] of the runs: every method, those with a rank once per rank."""
    names = known if methods == "all" else methods.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--compare {unknown[0]}: methods are {', '.join(known)}, or all")
    try:
        ranks = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks wants whole numbers with commas between, got {ranks!r}") from None
    runs = []
    for name in names:
        if name in RANKED:
            runs += [(f"{name}-{rank}", {"method": name, "rank": rank}) for rank in ranks]
        else:
            runs.append((name, {"method": name}))
    return runs


def compare(cfg, script, known):
    """Run what --compare and --ranks name, each in a process and a folder of its own, so that its
    memory is its own; then write table.md and table.json.
    """
    runs = planned(cfg.compare, cfg.ranks, known)
    check_folders(cfg.init, cfg.out)
    results = {}
    for name, own in runs:
        out = Path(cfg.out) / name
        if "rank" in own:  # the same alpha / r at every rank, so that ranks alone differ
            own = own | {"alpha": cfg.alpha / cfg.rank * own["rank"]}
        values = dataclasses.asdict(cfg) | own | {"out": str(out), "compare": "", "resume": False}
        words = [f"--{flag}={'none' if v is None else v}" for flag, v in values.items()]
        print(f"\n--- {name}", flush=True)
        if code := subprocess.call([sys.executable, script, *words]):
            raise UserError(f"{name} ended with exit code {code}; mend it and compare again")
        results[name] = read_json(out / "result.json")
    text = comparison(results)
    atomic_write(Path(cfg.out) / "table.json", json.dumps(results, indent=2) + "\n")
    atomic_write(Path(cfg.out) / "table.md", text + "\n")
    print(f"\n{text}\n\nwritten to {cfg.out}/table.md")


def comparison(results):
    """Markdown table of {name: result.json}, a line per run, the untrained model first."""
    before = next(iter(results.values()))["before"]
    full = results.get("full", {}).get("gain", 0)
    rows = [
        ["method", "trained", "share", "new domain", "of full's gain", "elsewhere",
         "bits per byte", "weights, gradients, moments", "peak memory", "seconds", "file"],
        ["---"] * 11,
        ["before", "", "", f"{before['accuracy']:.1%}", "", f"{before['elsewhere']:.1%}",
         f"{before['bits_per_byte']:.4f}", "", "", "", ""],
    ]  # fmt: skip
    for name, r in results.items():
        after = r["after"]
        rows.append([
            name, f"{r['trained_parameters']:,}", f"{r['trained_share']:.2%}",
            f"{after['accuracy']:.1%}", f"{r['gain'] / full:.1%}" if full else "",
            f"{after['elsewhere']:.1%}", f"{after['bits_per_byte']:.4f}",
            f"{r['state_bytes'] / 1e6:.2f} MB", f"{r['peak_memory_bytes'] / 1e6:.0f} MB",
            f"{r['seconds']:.0f}", f"{r['file_bytes'] / 1e3:,.0f} kB",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
