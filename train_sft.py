"""Supervised fine-tuning: learn to answer from dialogues, predicting the assistant's tokens only.

    loss = - sum_t m_t log p(x_t | x_<t) / sum_t m_t

with m_t = 1 on the assistant's tokens and its end of turn, and on every token of a replay row; 0
elsewhere, on the results of tools and on messages with "loss": false, too. It is the first stage of
InstructGPT (Ouyang et al. 2022, arXiv:2203.02155); the mask is common practice.

Dialogues are packed into rows of T tokens; attention stays inside a dialogue, and positions restart
in each (Krell et al. 2021, arXiv:2107.02027); in a replay row they run on, as in pretraining. A
dialogue longer than T loses its last turns until it fits, and is dropped when not even its first
answer does; both are counted and printed. Two options work against forgetting: rows of pretraining
text in every batch (--replay; Ouyang et al. mix it in likewise) and smaller learning rates for
lower layers (--layer_decay; Howard & Ruder 2018, arXiv:1801.06146).

Run     python train_sft.py
        python train_sft.py --preset cot             # from runs/sft: think first, then answer;
                                                     # prints accuracy with and without steps
        python train_sft.py --preset tools           # from runs/grpo: call a calculator, or search
        python train_sft.py --preset sql             # from runs/tools: query a database as well
        python train_sft.py --preset reader          # from runs/sft: write questions from captions
        python train_sft.py --preset writer          # from runs/sft: write prompts, for distill.py
        python train_sft.py --preset judge           # from runs/sft: which completion is better?
        python train_sft.py --init path/to/SmolLM2-135M --preset downloaded --data chats.jsonl
        python train_sft.py --data village:0.7,chats.jsonl:0.3    # shares of the rows of dialogues
Needs   runs/pretrain                                     (python train_pretrain.py)
Expect  right answers about villagers absent from the training questions, and "I don't know"
        (README.md). --preset sql, combinations of values held out, seeds 0, 1 and 2 (200 questions
        a task, nanollm.evaluate runs/sql --data sql --tools): 1% -> 78%, 79%, 81%; count 92%, 90%,
        93%, befriended (a join) 100%, friend 92%, 90%, 88%, common 48%, 52%, 51%, attributes that
        training never joins 61%, 66%, 73% (AMD EPYC, AVX2, fp32, one thread). Questions for the
        other tools (--data tools --limit 64) fall from 97% to 91% and 92% (seeds 1, 2)
        --preset cot --init runs/cot --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --steps
        100: 2% -> 0% of 100 problems (seed 0), for that is not learnt at 1.1M parameters
Watch   loss, val_loss  nats per trained token; val_loss rising while loss falls: too many epochs
        bits_per_byte   of held-out text: what fine-tuning forgets; rising: more --replay
        grad_norm       below 1 after warm-up; rising: lower the learning rates
"""

from dataclasses import dataclass
from functools import partial

import torch

from data.village import examples as village
from nanollm.batches import (
    MixedSampler,
    Packed,
    Sampler,
    Windows,
    by_share,
    open_corpus,
    pack_chats,
    row_length,
)
from nanollm.config import LARGE, AdapterConfig, OpenShare, Share, TrainConfig, Whole, cli
from nanollm.formats import mixture, need, read_parts
from nanollm.gpt import document_mask
from nanollm.hub import load_model, save_model
from nanollm.logprobs import bits_per_byte, token_logprobs
from nanollm.metrics import (
    accuracy_by_task,
    accuracy_table,
    first_of_each_task,
    mean_accuracy,
    sample_by_task,
)
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.peft.adapters import start_adapter
from nanollm.records import read_chats, read_examples
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start
from nanollm.tools import Toolbox


@dataclass
class Config(AdapterConfig, TrainConfig):
    # -- Data
    init: str = "runs/pretrain"  # run folder or model folder to start from
    # village; its problems with worked solutions (reasoning), with the answers alone (answers) or
    # some of each (mixed); dialogues with calls (tools), those of SQL among them (sql); captions of
    # images, and a question about each (reader); requests for prompts (writer); which of two
    # completions annotators prefer (comparisons); or JSONL of dialogues (see data/README.md); or
    # several of these, each with its share of the rows of dialogues: a.jsonl:0.7,tools:0.3
    data: str = "village"
    val_data: str | None = None  # held-out dialogues; default: the last --val_fraction of --data
    # share of --data that is held out (the village has held-out dialogues of its own)
    val_fraction: OpenShare = 0.05
    # test examples to measure accuracy on, before and after; the village has its own
    test_data: str | None = None
    test_examples: Whole[0] = 64  # test examples per task; 0: all
    # row length T; default: what 99% of the dialogues need, from 256 to 2048 and as far as the
    # model can read
    context: Whole[1] | None = None
    # -- Against forgetting
    # share of the rows that are pretraining text; its share of the trained tokens is larger, as it
    # is trained on at every token
    replay: Share = 0.33
    # that text, .txt or .jsonl; default: the village's. With --replay 0: only to measure forgetting
    replay_data: str | None = None
    # learning rate factor per layer below the head; 1: the same everywhere
    layer_decay: Share = 1.0
    # -- Training
    out: str = "runs/sft"
    steps: int = 500
    lr: float = 1e-3
    muon_lr: float = 0.007
    eval_every: int = 125


# what most of the lessons have in common that a model learns after it has learnt to answer
LESSON = dict(init="runs/sft", lr=3e-3)
PRESETS = {
    "smoke": dict(steps=20, context=128, batch_size=8, eval_every=10, warmup=4, test_examples=4),
    "cot": dict(LESSON, data="mixed", batch_size=8, muon_lr=0.008, replay=0.125, out="runs/cot"),
    "tools": dict(LESSON, data="tools", steps=400, muon_lr=0.01, replay=0.125, out="runs/tools")
    | dict(init="runs/grpo"),
    "sql": dict(LESSON, data="sql", steps=150, muon_lr=0.01, replay=0.125, out="runs/sql")
    | dict(init="runs/tools", eval_every=100),
    "reader": dict(LESSON, data="reader", steps=400, batch_size=8, muon_lr=0.008, replay=0.0)
    | dict(eval_every=100, out="runs/reader"),
    "writer": dict(LESSON, data="writer", steps=100, batch_size=8, muon_lr=0.008, replay=0.0)
    | dict(out="runs/writer"),
    "judge": dict(LESSON, data="comparisons", steps=200, muon_lr=0.01, replay=0.0)
    | dict(eval_every=50, out="runs/judge"),
    "gpu": dict(context=1024, batch_size=128, accumulate=4, lr=3e-4, muon_lr=5e-3, compile=True),
    # rate and schedule of Alpaca (Taori et al. 2023) and Zephyr (Tunstall et al. 2023,
    # arXiv:2310.16944); 32 packed rows hold about the 128 dialogues of a batch of Alpaca's. An
    # adapter wants ten times the rate, --lr 2e-4 (Dettmers et al. 2023, 2305.14314)
    "downloaded": dict(LARGE, context=1024, batch_size=32, accumulate=32, lr=2e-5, replay=0.0),
}

# --data: (training and held-out dialogues, test examples) among the village's files
VILLAGE = {
    "village": ("sft", "sft_test"),
    "reasoning": ("reasoning", "problems_test"),
    "answers": ("answers", "problems_test"),
    "mixed": ("mixed", "problems_test"),
    "tools": ("tools", "tools_test"),
    "sql": ("sql", "sql_test"),
    "reader": ("reader", None),
    "writer": ("sft", None),
    "comparisons": ("comparisons", "comparisons_test"),
}
# how an answer has to begin, to measure what steps are worth
BEGINS = {"with_steps": "<think>", "without_steps": "The answer is"}


# --- data ----------------------------------------------------------------------------------------


def load_chats(cfg):
    """(training dialogues of each source, held-out dialogues of each, test examples)."""
    parts, tests = [], []
    for name in mixture(cfg.data):
        if name in VILLAGE:
            chats, test = VILLAGE[name]
            folder = images_folder() if name == "reader" else village.of_run(cfg.init)
            files = (folder / f"{chats}_{split}.jsonl" for split in ("train", "val"))
            read = chats_about_prompts if name == "writer" else read_chats
            parts.append(map(read, files))
            tests += [folder / f"{test}.jsonl"] if test else []
        else:
            parts.append(read_parts(read_chats, name, cfg.val_data, cfg.val_fraction))
    tests = [cfg.test_data] if cfg.test_data else dict.fromkeys(tests)
    examples = [example for test in tests for example in read_examples(test)]
    return *zip(*parts), first_of_each_task(examples, cfg.test_examples)


def chats_about_prompts(file):
    from nanollm.self_instruct import lessons  # imported only here: it brings the teachers' code

    return lessons(read_chats(file))


def images_folder():
    from data.village import images  # imported only here: drawing needs Pillow

    return images.prepare()


def load_text(cfg, tokenizer, T):
    """(training rows, held-out rows) of plain text, for replay and to measure forgetting."""
    if cfg.replay_data:
        sources = [(cfg.replay_data, part) for part in ("train", "val")]
    elif cfg.replay:
        folder = village.of_run(cfg.init)
        sources = [(folder / f"corpus_{part}.jsonl",) for part in ("train", "val")]
    else:
        return None, None
    train, val = (open_corpus(tokenizer, *source) for source in sources)
    return Windows(train, T - 1), Windows(val, T)


def replay_count(cfg):
    """How many rows of a batch are replay; UserError for a share that leaves none to either."""
    n = round(cfg.replay * cfg.batch_size)
    fine = 0 < n < cfg.batch_size or not cfg.replay
    need(fine, f"--replay {cfg.replay}", f"it would be {n} of {cfg.batch_size} rows")
    return n


def replay_rows(windows, numbers, begin_id):
    """Rows of plain text in the form of packed dialogues, trained on everywhere."""
    # positions run on through the row, as in pretraining; attention stays inside a document
    tokens = windows[numbers]  # (R, T)
    documents = (tokens == begin_id).cumsum(1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Packed(tokens, mask, documents, torch.arange(tokens.shape[1]).expand_as(tokens))


# --- algorithm -----------------------------------------------------------------------------------


def sft_loss(logits, tokens, mask):
    """Sum of -log p over the trained tokens: logits (B, T, V), tokens and mask (B, T) -> scalar.

    The caller divides by the number of trained tokens of the whole batch, so that every token
    has the same weight, however the batch is split.
    """
    return -(token_logprobs(logits[:, :-1], tokens[:, 1:]) * mask[:, 1:]).sum()


def packed_logits(model, rows):
    """Logits (B, T, V) of packed rows: attention inside documents, positions as given."""
    return model(rows.tokens, rows.positions, document_mask(rows.documents))


@torch.no_grad()
def validation_loss(model, rows, batch=32, logits_of=packed_logits):
    """Nats per trained token on held-out packed rows."""
    total = 0.0
    for numbers in torch.arange(len(rows)).split(batch):
        part = rows[numbers].to(model.device)
        total += sft_loss(logits_of(model, part), part.tokens, part.mask).item()
    return total / rows.mask[:, 1:].sum().item()


# --- training ------------------------------------------------------------------------------------


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, cfg.init)
    share, n_replay = rt.share(cfg.batch_size), replay_count(cfg)
    model, tokenizer = load_model(cfg.init)
    start_adapter(model, cfg, rt)
    chats, val_chats, examples = load_chats(cfg)
    length = partial(row_length, cfg.context, model)
    train_rows = [pack_chats(each, tokenizer, length, "training", rt) for each in chats]
    T = max(rows.tokens.shape[1] for rows in train_rows)
    val_rows = [pack_chats(each, tokenizer, T, "held-out", rt) for each in val_chats]
    text, val_text = load_text(cfg, tokenizer, T)
    shares, tools = mixture(cfg.data), None
    if {"tools", "sql"} & shares.keys():
        tools = Toolbox.with_knowledge(village.knowledge_of(cfg.init), tokenizer)

    run = Run(cfg, rt)
    ddp_model = rt.prepare(model, cfg.compile)
    model.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(model, cfg, rt.scaler, layer_decay=cfg.layer_decay)
    schedule = SCHEDULES[cfg.schedule]
    chat_sampler = MixedSampler(train_rows, shares.values(), cfg.seed)
    text_sampler = Sampler(len(text) if text else 0, cfg.seed + 1)
    before = run.restore(model, optimizer, chat_sampler, text_sampler)
    before = before or measure(model, tokenizer, tools, examples, val_text)[0]

    while run.step < cfg.steps:
        rows = chat_sampler.take(cfg.batch_size - n_replay)
        if n_replay:
            rows += [replay_rows(text, text_sampler.take(n_replay), tokenizer.begin[0])]
        rows = Packed.join(rows)[share].to(rt.device)
        num_tokens = rt.sum(rows.mask[:, 1:].sum())  # trained on, in the whole batch
        loss = 0.0
        for part in rt.micro_batches(rows, cfg.accumulate, ddp_model):
            part_loss = sft_loss(packed_logits(ddp_model, part), part.tokens, part.mask)
            loss += rt.backward(part_loss / num_tokens)
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(cfg.batch_size * T, loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            losses = [{"val_loss": validation_loss(model, each)} for each in val_rows]
            metrics = by_share(shares, losses)
            if val_text:
                metrics["bits_per_byte"] = bits_per_byte(model, tokenizer, val_text, 32768)[1]
            run.evaluated(**metrics)
            if examples and rt.main:
                _, sample = measure(model, tokenizer, tools, first_of_each_task(examples, 1), None)
                run.write_sample(sample)
            run.export(save_model, model, tokenizer)
            run.checkpoint(**before)
    run.close("loss", "val_loss", y_label="nats per token")
    after = measure(model, tokenizer, tools, examples, val_text)[0]
    if {"reasoning", "mixed"} & shares.keys():
        for name, begin in BEGINS.items():
            after[name] = accuracy_by_task(model, tokenizer, examples, begin=begin)[0]
    finish(rt, run, before, after)


def measure(model, tokenizer, tools, examples, val_text):
    """({"tasks": accuracy by task, "bits_per_byte"}, a sample of completions)."""
    tasks, completions = accuracy_by_task(model, tokenizer, examples, tools=tools)
    bits = bits_per_byte(model, tokenizer, val_text)[1] if val_text else None
    return {"tasks": tasks, "bits_per_byte": bits}, sample_by_task(examples, completions)


def finish(rt, run, before, after):
    """Print what fine-tuning has changed, and keep it in result.json."""
    columns = {"before": before["tasks"], "after": after["tasks"]}
    columns |= {name: after[name] for name in BEGINS if name in after}
    means, effects = {name: mean_accuracy(tasks) for name, tasks in columns.items()}, []
    if after["tasks"]:
        rt.print(accuracy_table(columns))
        compared = {"right answers to held-out questions": ("before", "after")}
        if "with_steps" in after:
            compared["right answers without and with steps"] = ("without_steps", "with_steps")
        effects = [effect(k, means[a], means[b], "share") for k, (a, b) in compared.items()]
    if after["bits_per_byte"] is not None:
        bits = before["bits_per_byte"], after["bits_per_byte"]
        effects.append(effect("held-out text", *bits, "bits per byte", False))
    run.write_result(effects, before=before, after=after)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
