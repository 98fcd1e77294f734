"""Several methods of lora.py one after the other, and one table of what each costs and gives."""

import json
from pathlib import Path

import torch

from nanollm.comparison import in_own_process, markdown, named, run_each
from nanollm.config import UserError, atomic_write
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


def planned(cfg, known):
    """{name: {flag: value}} of the runs: every method, those with a rank once per rank, at the same
    alpha / r, so that ranks alone differ.
    """
    methods, ranks = named(cfg.compare, known), cfg.ranks
    try:
        ranks = [int(rank) for rank in ranks.split(",")]
    except ValueError:
        raise UserError(f"--ranks wants whole numbers with commas between, got {ranks!r}") from None
    runs = {}
    for method in methods:
        for rank in ranks if method in RANKED else [None]:
            own = {} if rank is None else {"rank": rank, "alpha": cfg.alpha / cfg.rank * rank}
            runs[method if rank is None else f"{method}-{rank}"] = {"method": method} | own
    return runs


def compare(cfg, script, known):
    """Run what --compare and --ranks name, each in a process and a folder of its own, so that its
    memory is its own; then write table.md and table.json.
    """
    runs = planned(cfg, known)
    check_folders(cfg.init, cfg.out)
    results = run_each(cfg, runs, in_own_process(script))
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
    return markdown(rows)
