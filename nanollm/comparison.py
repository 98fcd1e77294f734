"""The table and the curves of several ways to train a student, side by side (distill.py)."""

import json
from pathlib import Path

from nanollm.config import atomic_write
from nanollm.plot import line_chart
from nanollm.run import read_metrics


def table_row(name, sees, parameters, measured, seconds):
    """A row of the table: {column: text}; `measured` holds a measurement of each seed."""
    families = list(measured[0]["figures"])
    shares = {f: [each["figures"][f]["greedy"] for each in measured] for f in families}
    row = {"student": name, "parameters": f"{parameters:,}"}
    row |= {family: f"{sum(s) / len(s):.1%}" for family, s in shares.items()}
    if "all" in shares:
        row["range of all"] = f"{min(shares['all']):.1%} to {max(shares['all']):.1%}"
    speed = sum(each["speed"] for each in measured) / len(measured)
    row["tokens/s"] = f"{speed:,.0f}"
    return row | {"seconds": seconds, "may see": sees}


def write_table(cfg, rows, results):
    """table.md, table.json and curves.svg of {name: results of each seed}."""
    out, first, curves = Path(cfg.out), next(iter(results.values()))[0], {}
    table = [table_row("teacher", "", first["teacher_parameters"], [first["teacher"]], "")]
    for name, (_, sees) in rows.items():
        seconds = sum(result["seconds"] for result in results[name]) / cfg.seeds
        measured = [result["after"] for result in results[name]]
        size = results[name][0]["student_parameters"]
        table.append(table_row(name, sees, size, measured, f"{seconds:.0f}"))
        metrics = read_metrics(out / f"{name}_{cfg.seed}")
        curves[name] = [(m["step"], m["val_accuracy"]) for m in metrics if "val_accuracy" in m]
    lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text += (
        f"\n\nGreedy accuracy on held-out items, means of {cfg.seeds} seeds; {cfg.steps} steps of "
        f"{cfg.batch_size} rows for each. tokens/s: of answering. seconds: of training and "
        f"evaluation, without those in which the teacher answers.\n"
    )
    print(f"\n{text}")
    atomic_write(out / "table.md", text)
    atomic_write(out / "table.json", json.dumps(table, indent=2) + "\n")
    chart = line_chart(curves, f"seed {cfg.seed}", "step", "accuracy on held-out items")
    atomic_write(out / "curves.svg", chart)
