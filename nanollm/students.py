"""Students of distillation: a new one or an old one, what it answers, and what a run says of it."""

import dataclasses

from nanollm.config import UserError
from nanollm.distillation import prompt_ids
from nanollm.generate import as_text, sample_completions
from nanollm.gpt import GPT, count_parameters
from nanollm.hub import load_model
from nanollm.metrics import metrics_table, sample_by_task, sampled_metrics
from nanollm.runtime import clock


def check_models(cfg, teacher, tokenizer):
    """Refuse settings that mean nothing, and what this teacher can't do."""
    for name in ("alpha", "jsd_beta", "on_policy_share", "on_policy_start"):
        value = getattr(cfg, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name} lies between 0 and 1, not at {value}")
    if cfg.temperature < 0.01:
        raise UserError(f"--temperature lies from 0.01 on, not at {cfg.temperature}")
    if cfg.cache_top_k >= teacher.cfg.vocab_size:
        raise UserError(
            f"--cache_top_k {cfg.cache_top_k} must be below the vocabulary, "
            f"{teacher.cfg.vocab_size}"
        )
    if cfg.method == "step_by_step" and "<think>" not in tokenizer.special:
        raise UserError(f"--teacher {cfg.teacher} knows no <think>: it writes no rationale")
    if cfg.method == "compress" and teacher.cfg.num_hidden_layers < 2:
        raise UserError(f"--teacher {cfg.teacher} has one layer: no half of it can be taken")


def new_student(cfg, teacher):
    """A model with random weights and the shape of the flags; all else is as in the teacher."""
    if cfg.channels % (2 * cfg.heads):
        raise UserError(
            f"--channels {cfg.channels} don't make --heads {cfg.heads} of an even size each"
        )
    shape = {
        "hidden_size": cfg.channels,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.heads,
        "head_dim": cfg.channels // cfg.heads,
    }
    return GPT(dataclasses.replace(teacher.cfg, **shape))


def open_student(cfg, teacher, tokenizer):
    """The model in --init, which must know the teacher's tokens."""
    student, own = load_model(cfg.init)
    if own != tokenizer:
        raise UserError(
            f"--init {cfg.init} has another tokenizer than --teacher {cfg.teacher}: their "
            f"probabilities are of different tokens; start from a model with the teacher's"
        )
    widths = [model.cfg.hidden_size for model in (student, teacher)]
    if cfg.method == "compress" and widths[0] != widths[1]:
        raise UserError(
            f"--method compress compares hidden states: --init {cfg.init} has {widths[0]} "
            f"channels, the teacher {widths[1]}"
        )
    return student


def answer_examples(model, tokenizer, examples, max_new_tokens):
    """({"figures" of each task, "speed" of answering in tokens per second}, a sample)."""
    if not examples:
        return {"figures": {}, "speed": 0.0}, ""
    prompts, begin = [prompt_ids(example, tokenizer) for example in examples], clock(model.device)
    ids = sample_completions(model, tokenizer, prompts, max_new_tokens, temperature=0.0)
    speed = sum(map(len, ids)) / (clock(model.device) - begin)
    completions = [as_text(tokenizer, completion) for completion in ids]
    figures = {"figures": sampled_metrics(examples, completions), "speed": speed}
    return figures, sample_by_task(examples, completions)


def finish(run, teacher, student, answers, known, before, after):
    """Print what the student has learnt and keep it in result.json; `known` is the teacher's."""
    run.close()
    run.draw_curves("loss", "val_loss", "val_accuracy", y_label="nats per token, or share")
    sizes = [count_parameters(model)[0] for model in (teacher, student)]
    result = {"method": run.cfg.method, "teacher": known, "before": before, "after": after}
    result |= dict(zip(("teacher_parameters", "student_parameters"), sizes))
    run.write_result(**result, answers=answers, **run.speed())
    if after["figures"]:
        columns = {"teacher": known, "before": before, "after": after}
        run.rt.print(metrics_table({name: each["figures"] for name, each in columns.items()}))
    run.rt.print(
        f"{run.folder}: {sizes[1]:,} parameters, the teacher has {sizes[0]:,}; answers "
        f"{after['speed']:,.0f} tokens/s, the teacher {known['speed']:,.0f}; {run.step} steps in "
        f"{run.elapsed:.0f} s"
    )
    run.rt.barrier()  # until the main process has written all of it
