"""distill.py --compare: the kinds of distillation side by side, what each may see, and a table."""

import contextlib
import dataclasses
import json
from pathlib import Path

from nanollm.comparison import markdown, named, run_each, start_comparison
from nanollm.config import UserError, atomic_write
from nanollm.distillation import load_lessons, prompt_ids
from nanollm.generate import check_room
from nanollm.hub import load_model
from nanollm.plot import line_chart
from nanollm.run import read_metrics
from nanollm.teacher import ask_teacher, write_answers


def kinds(cfg):
    """{row of the table: (settings, what the student may see)}."""
    N, half = cfg.labels, max(1, cfg.labels // 2)
    labels, prompts = f"{N} labels", f"{cfg.unlabelled} prompts with the teacher's"
    rows = {
        "answers": ({"method": "labels", "label": "answer"}, f"{N} answers without steps"),
        "step_by_step": (
            {"method": "step_by_step", "labels": half, "samples": max(4, cfg.samples)},
            f"{half} answers, the teacher's reasoning where it finds them",
        ),
        "labels": ({"method": "labels"}, labels),
        "soft_on_labels": (
            {"method": "soft", "unlabelled": 0},
            f"{labels}, the teacher's probabilities on them",
        ),
        "soft": ({"method": "soft"}, f"{labels}, {prompts} answers and probabilities"),
        "hard": ({"method": "hard"}, f"{labels}, {prompts} answers that a checker let through"),
        "both": ({"method": "both"}, f"{labels}, {prompts} checked answers and probabilities"),
        "on_policy": (
            {"method": "on_policy"},
            "as soft, and the teacher's probabilities on the student's own answers",
        ),
        "compress": (
            {"method": "compress"},
            "as both, and the teacher's hidden states; starts with half of its layers",
        ),
    }
    chosen = named(cfg.compare, rows)
    if cfg.data == "village":  # whose dialogues have no steps
        typed = [name.strip() for name in cfg.compare.split(",")]
        if asked := [name for name in ("answers", "step_by_step") if name in typed]:
            raise UserError(
                f"--compare {asked[0]} wants problems that are worked step by step, not the "
                "village's dialogues; add --data problems --teacher runs/grpo, or name others"
            )
        chosen = [name for name in chosen if name not in ("answers", "step_by_step")]
    return {name: rows[name] for name in chosen}


def compare(cfg, rt, gather, train):
    """Run every kind with every seed, all with the same answers of the teacher, and write table.md,
    table.json and curves.svg. What `gather` refuses, before a run, is refused before anything is
    written.
    """
    rows = kinds(cfg)
    if not cfg.resume:
        rt.print(f"{len(rows)} kinds, {cfg.seeds} times each; first, whether all of them can run")
        for changes, _ in rows.values():
            with contextlib.redirect_stdout(None):
                gather(dataclasses.replace(cfg, **changes | {"unlabelled": 0}))
    if rt.main:
        start_comparison(cfg)
    runs, answers = {}, cfg.answers
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, (changes, _) in rows.items():
            runs[f"{name}_{seed}"] = own = {"seed": seed, **changes}
            asks = own.get("unlabelled", cfg.unlabelled)
            if asks and own["method"] not in ("labels", "step_by_step"):
                answers = answers or shared_answers(cfg, rt)
                own["answers"] = answers
    results = run_each(cfg, runs, train)
    if rt.main:
        write_table(cfg, rows, results)


def shared_answers(cfg, rt):
    """The file of the teacher's answers to the unlabelled prompts."""
    path = Path(cfg.out) / "answers.jsonl"
    if rt.main and not (cfg.resume and path.exists()):
        teacher, tokenizer = load_model(cfg.teacher)
        rt.prepare(teacher, train=False)
        records = load_lessons(cfg)[1]
        prompts = [prompt_ids(record, tokenizer) for record in records]
        check_room(teacher, prompts, cfg.max_new_tokens, records)
        rt.print(f"the teacher answers {len(records)} prompts, {cfg.samples} times each")
        write_answers(ask_teacher(cfg, teacher, tokenizer, records), path)
    rt.barrier()
    return str(path)


def table_row(name, sees, parameters, measured, seconds):
    """A row of the table: {column: text}; `measured` holds a measurement of each seed."""
    tasks = list(measured[0]["figures"])
    shares = {f: [each["figures"][f]["greedy"] for each in measured] for f in tasks}
    row = {"student": name, "parameters": f"{parameters:,}"}
    row |= {task: f"{sum(s) / len(s):.1%}" for task, s in shares.items()}
    if "all" in shares:
        row["range of all"] = f"{min(shares['all']):.1%} to {max(shares['all']):.1%}"
    speed = sum(each["speed"] for each in measured) / len(measured)
    row["tokens/s"] = f"{speed:,.0f}"
    return row | {"seconds": seconds, "may see": sees}


def write_table(cfg, rows, results):
    """table.md, table.json and curves.svg of {name_seed: result}."""
    out, curves, table = Path(cfg.out), {}, []
    for name, (_, sees) in rows.items():
        own = [results[f"{name}_{seed}"] for seed in range(cfg.seed, cfg.seed + cfg.seeds)]
        seconds = sum(result["seconds"] for result in own) / cfg.seeds
        measured = [result["after"] for result in own]
        size = own[0]["student_parameters"]
        if not table:
            known = own[0]["teacher"]
            table.append(table_row("teacher", "", own[0]["teacher_parameters"], [known], ""))
        table.append(table_row(name, sees, size, measured, f"{seconds:.0f}"))
        metrics = read_metrics(out / f"{name}_{cfg.seed}")
        curves[name] = [(m["step"], m["val_accuracy"]) for m in metrics if "val_accuracy" in m]
    text = markdown([list(table[0]), *(list(row.values()) for row in table)])
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
