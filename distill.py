"""Distillation: a small student learns from a large teacher's probabilities, answers or reasoning.

With p_T, p_S = softmax(logits / tau) of teacher and student at every token of an answer:

    soft          alpha tau^2 KL(p_T || p_S) + (1 - alpha) CE(label)    Hinton et al., 1503.02531
    hard          CE of the teacher's answers that a checker lets through   Kim & Rush, 1606.07947
    both          soft, with the answers that passed as labels
    on_policy     JSD_beta(p_T, p_S) on the student's own answers in a share lambda of the steps
                  (GKD; Agarwal et al., 2306.13649), on given ones in the others
    step_by_step  CE(answer) + lambda CE(rationale), the rationale written by the teacher
                  (Hsieh et al., 2305.02301)
    compress      soft and 1 - cos(h_S, h_T) of the last hidden states, from every other layer of
                  the teacher (DistilBERT; Sanh et al., 1910.01108)
    labels        CE of the labels alone: what a student is compared with

KL is the forward one, the reverse, or GKD's generalised JSD (--divergence). Labels are scarce and
prompts are plenty: beside --labels labelled examples there are --unlabelled prompts, which the
teacher answers. soft and on_policy learn from all of its answers; hard, both and compress from
those that the checker lets through; labels and step_by_step from none of them.

The teacher's logits are never stored. They are computed on the fly, or once per token with
--cache_top_k K: then the K most likely successors keep their probabilities, and all others become
one event. KL between such coarse distributions is a lower bound of KL between the whole ones, and
reaches it with K (data-processing inequality).

Differs from the papers: rationale and answer of step_by_step are one sequence, not two tasks, and
the rationales are sampled and checked by the label; on_policy begins once --on_policy_start of the
steps has taught the student to end an answer; tau^2 scales every divergence.

Run     python distill.py                          # soft; the village's questions about people
        python distill.py --method hard --samples 4 --out runs/hard
        python distill.py --compare --out runs/kinds    # every kind with three seeds, and a table
        python distill.py --compare --data problems --teacher runs/grpo --steps 800 \
            --only answers,step_by_step --out runs/steps
Needs   runs/sft                                         (python train_sft.py)
Expect  see README.md: a third of the parameters, 95% of the accuracy or more
"""

import dataclasses
import json
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanollm.comparison import write_table
from nanollm.config import UserError, atomic_write, cli, save_config
from nanollm.data import Sampler
from nanollm.evaluate import (
    as_text,
    figures_table,
    first_of_each_family,
    sample_replies,
    sampled_figures,
)
from nanollm.generate import check_room, generate
from nanollm.gpt import GPT, count_parameters, document_mask
from nanollm.hub import load_model, read_json
from nanollm.lessons import (
    as_dialogue,
    load_lessons,
    make_lessons,
    prompt_ids,
    read_lessons,
    tokenize,
)
from nanollm.logprobs import token_logprobs
from nanollm.optim import SCHEDULES, build_optimizers
from nanollm.rewards import accuracy
from nanollm.run import Run, check_folders, set_aside
from nanollm.runtime import clock, start


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Teacher and student
    teacher: str = "runs/sft"  # run folder or model folder of the teacher
    method: Literal[
        "soft", "hard", "both", "on_policy", "step_by_step", "compress", "labels"
    ] = "soft"
    # run folder or model folder of a student that exists; default: a new one of the shape below
    init: str | None = None
    layers: int = 4  # number of blocks; compress: half the teacher's
    channels: int = 64  # width C of the residual stream; compress: the teacher's
    heads: int = 4  # query heads
    kv_heads: int | None = None  # key-value heads; default: as many as heads
    mlp: int = 192  # hidden width of the MLP
    # -- Data
    # village (dialogues about its people), problems (the village's), or JSONL of dialogues or
    # problems (see data/README.md)
    data: str = "village"
    labels: int = 1000  # the first so many of --data are labelled
    # label of a problem: its worked solution, or the answer alone
    label: Literal["worked", "answer"] = "worked"
    unlabelled: int = 4000  # so many of the others are prompts for the teacher; 0: none
    # dialogues with the teacher's answers, such as another run's teacher.jsonl; default: it is
    # asked
    answers: str | None = None
    val_fraction: float = 0.05  # share of --data that is held out; the village has its own
    test_data: str | None = None  # test items to measure accuracy on; the village has its own
    test_items: int = 200  # items per family for that
    context: int = 128  # row length T
    # -- Answers of the teacher, and with on_policy of the student
    samples: int = 1  # answers per prompt; step_by_step: rationales per label
    sample_temperature: float = 1.0  # temperature of sampling
    max_new_tokens: int = 112  # longest answer
    # -- Loss
    temperature: float = 2.0  # tau, which softens both distributions
    alpha: float = 0.9  # weight of the divergence; 1 - alpha is that of the labels
    # default: forward, and jsd with on_policy
    divergence: Literal["forward", "reverse", "jsd"] | None = None
    jsd_beta: float = 0.5  # jsd: 0 is the forward KL, 1 the reverse
    on_policy_share: float = 0.5  # lambda of GKD: share of the steps on the student's own answers
    on_policy_start: float = 0.5  # share of the steps before the first of those
    rationale_weight: float = 1.0  # lambda of step_by_step
    cosine_weight: float = 0.2  # compress: of the cosine loss
    # probabilities of the teacher that are kept per token; 0: none, it computes them on the fly, as
    # it always does for compress, which needs hidden states, and for the student's own answers
    cache_top_k: int = 16
    # -- Training
    out: str = "runs/distill"  # run folder to write
    steps: int = 300  # optimizer steps
    batch_size: int = 24  # rows per optimizer step, over all processes
    accumulate: int = 1  # parts that a process splits its rows into, to save memory
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 0.03  # learning rate of Muon
    adam_lr: float = 0.02  # learning rate of AdamW
    weight_decay: float = 0.0  # on matrices and embeddings
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"  # learning rate over the steps
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 100  # steps between evaluations, each followed by a checkpoint
    eval_items: int = 30  # test items per family for those in between
    # -- Comparison
    compare: bool = False  # run every kind, and write table.md, table.json and curves.svg to --out
    seeds: int = 3  # runs of each kind
    only: str = ""  # only these rows of the table, separated by commas; default: all
    # -- Machine
    seed: int = 0  # of the student's weights, the sampling and the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    # precision of the layers; weights stay fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False  # torch.compile: about half a minute to start, then faster
    # recompute activations in backward: less memory, a third more time
    checkpoint_activations: bool = False
    resume: bool = False  # continue the run in --out from its last checkpoint


PRESETS = {
    "smoke": {
        "steps": 10,
        "labels": 40,
        "unlabelled": 40,
        "batch_size": 4,
        "max_new_tokens": 16,
        "eval_every": 5,
        "warmup": 2,
        "test_items": 4,
        "eval_items": 2,
        "cache_top_k": 8,
        "seeds": 1,
    },
    "tiny": {},
    "gpu": {
        "layers": 6,
        "channels": 384,
        "heads": 6,
        "mlp": 1024,
        "labels": 10000,
        "unlabelled": 100000,
        "context": 512,
        "max_new_tokens": 256,
        "batch_size": 128,
        "steps": 4000,
        "lr": 0.01,
        "adam_lr": 1e-3,
        "compile": True,
    },
}


# --- algorithm: log-probabilities (..., V) of student and teacher -> (...) in nats ---------------


def tempered(logits, temperature=1.0):
    """log softmax(logits / tau), (..., V) in fp32."""
    return (logits.float() / temperature).log_softmax(-1)


def forward_kl(student, teacher):
    """KL(T || S) = sum_v p_T (log p_T - log p_S): the student has to cover all that the teacher
    may say.
    """
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student, teacher):
    """KL(S || T): the student may leave out, but must not say what the teacher would not."""
    return forward_kl(teacher, student)


def generalised_jsd(student, teacher, beta=0.5):
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S (GKD, eq. 1).

    By definition 0 is the forward and 1 the reverse KL, the limits of JSD / (beta (1 - beta)).
    """
    if beta in (0, 1):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def hidden_cosine_loss(student, teacher):
    """1 - cos(h_S, h_T): hidden states (..., C) -> (...) (DistilBERT, section 3)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def coarse(logprobs, ids):
    """Log-probabilities (n, K + 1) of the tokens `ids` (n, K), and of all others together, from
    log-probabilities (n, V).
    """
    others = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logprobs.gather(-1, ids), others), dim=-1)


@dataclass
class Counts:
    """Tokens that a loss divides by: of the whole batch, over all of its parts and processes."""

    tokens: float  # of answers
    labelled: float
    rationale: float  # labelled and inside of <think>...</think>


# The losses of a batch: per-token values (n,) -> scalar. Parts of a batch add up to the whole.


def label_loss(ce, labelled, counts):
    """Mean cross-entropy of the labels."""
    return (ce * labelled).sum() / max(1, counts.labelled)


def soft_loss(divergence, ce, labelled, counts, alpha, temperature):
    """alpha tau^2 D + (1 - alpha) CE, means over their tokens. A gradient of D falls with 1/tau^2,
    hence the factor (Hinton et al., section 2.1).
    """
    soft = temperature**2 * divergence.sum() / max(1, counts.tokens)
    return alpha * soft + (1 - alpha) * label_loss(ce, labelled, counts)


def step_by_step_loss(ce, labelled, rationale, counts, weight):
    """CE(answer) + lambda CE(rationale), each a mean over its tokens (Hsieh et al., eq. 2)."""
    answer, rationale = labelled & ~rationale, labelled & rationale
    of_answer = (ce * answer).sum() / max(1, counts.labelled - counts.rationale)
    return of_answer + weight * (ce * rationale).sum() / max(1, counts.rationale)


# --- teacher and student -------------------------------------------------------------------------


def every_other_layer(teacher):
    """A student of the teacher's width and half its depth: it starts as its layers 0, 2, ..."""
    kept = range(0, teacher.cfg.num_hidden_layers, 2)
    student = GPT(dataclasses.replace(teacher.cfg, num_hidden_layers=len(kept)))
    for own, other in zip(student.model.layers, kept):
        own.load_state_dict(teacher.model.layers[other].state_dict())
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    if teacher.lm_head is not None:
        student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    return student


def build_student(cfg, teacher, tokenizer):
    """From --init, from the teacher's layers, or new."""
    shape = teacher.cfg
    if cfg.init:
        student, own = load_model(cfg.init)
        if own != tokenizer:
            raise UserError(
                f"--init {cfg.init} has another tokenizer than --teacher {cfg.teacher}: their "
                f"probabilities are of different tokens; start from a model with the teacher's"
            )
        if cfg.method == "compress" and student.cfg.hidden_size != shape.hidden_size:
            raise UserError(
                f"--method compress compares hidden states: --init {cfg.init} has "
                f"{student.cfg.hidden_size} channels, the teacher {shape.hidden_size}"
            )
        return student
    if cfg.method == "compress":
        if shape.num_hidden_layers < 2:
            raise UserError(f"--teacher {cfg.teacher} has one layer: no half of it can be taken")
        return every_other_layer(teacher)
    if cfg.channels % (2 * cfg.heads):
        raise UserError(
            f"--channels {cfg.channels} don't make --heads {cfg.heads} of an even size each"
        )
    if cfg.heads % (cfg.kv_heads or cfg.heads):
        raise UserError(f"--heads {cfg.heads} is no multiple of --kv_heads {cfg.kv_heads}")
    changed = {
        "hidden_size": cfg.channels,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads or cfg.heads,
        "head_dim": cfg.channels // cfg.heads,
    }
    return GPT(dataclasses.replace(shape, **changed))


def ask_teacher(cfg, teacher, tokenizer, records):
    """The records with the teacher's answers as "reply", `samples` of each, and "right": what the
    checker says of it, None where no answer is known. Without those that don't end.
    """
    prompts = [prompt_ids(record, tokenizer) for record in records]
    generator = torch.Generator(teacher.device).manual_seed(cfg.seed)
    replies = sample_replies(
        teacher,
        tokenizer,
        prompts,
        cfg.max_new_tokens,
        cfg.samples,
        cfg.sample_temperature,
        generator=generator,
    )
    answered = []
    for n, ids in enumerate(replies):
        record, text = records[n // cfg.samples], as_text(tokenizer, ids)
        if ids[-1] in tokenizer.stop_ids:
            right = bool(accuracy(record, text)) if "answer" in record else None
            answered.append({**record, "reply": text, "right": right})
    return answered


def filtered(cfg, answered):
    """(records that the student learns from, a sentence with the counts)."""
    seen, kept, twice, wrong = set(), [], 0, 0
    for record in answered:
        key = json.dumps([record["messages"], record["reply"]])
        if cfg.method not in ("soft", "on_policy") and record.get("right") is False:
            wrong += 1
        elif key in seen:
            twice += 1
        else:
            seen.add(key)
            kept.append(record)
    unchecked = sum(record.get("right") is None for record in kept)
    return kept, (
        f"{wrong} found wrong by the checker, {twice} equal to another, {len(kept)} kept"
        + (f", {unchecked} of them unchecked: no answer is known" if unchecked else "")
    )


def teacher_answers(cfg, rt, teacher, tokenizer, records):
    """What the student learns from, beside the labels: records with the teacher's answers."""
    file = Path(cfg.out) / "teacher.jsonl"
    if cfg.resume and file.exists():
        return read_lessons(file) if file.stat().st_size else []
    if cfg.method == "labels" or not records:
        return []
    if cfg.answers:
        answered, count = read_lessons(cfg.answers), ""
        if not all("reply" in record for record in answered):
            raise UserError(f"--answers {cfg.answers}: a dialogue doesn't end with an answer")
    else:
        begin = clock(rt.device)
        answered = [ask_teacher(cfg, teacher, tokenizer, records) if rt.main else None]
        if rt.world > 1:
            dist.broadcast_object_list(answered)
        answered, asked = answered[0], len(records) * cfg.samples
        count = (
            f"{asked} in {clock(rt.device) - begin:.0f} s, {asked - len(answered)} without an end "
            f"within {cfg.max_new_tokens} tokens, "
        )
    kept, counts = filtered(cfg, answered)
    rt.print(f"teacher's answers: {count}{counts}")
    return kept


class Targets:
    """The teacher's distribution at the trained tokens of lessons: on the fly, or from a cache."""

    def __init__(self, cfg, teacher, V):
        self.teacher, self.V, self.temperature = teacher, V, cfg.temperature
        self.K = cfg.cache_top_k if cfg.method != "compress" else 0
        self.ids = self.logprobs = None

    @torch.no_grad()
    def on_the_fly(self, part):
        """(log-probabilities (n, V), hidden states (n, C)) at the trained tokens of a batch."""
        rows = part.rows
        hidden = self.teacher.hidden(rows.tokens, rows.positions, document_mask(rows.documents))
        hidden = hidden[part.where()]
        return tempered(self.teacher.head(hidden)[:, : self.V], self.temperature), hidden

    def fill(self, lessons, device, batch=64):
        """Keep the K most likely successors of every trained token, and the sum of the others."""
        shape = lessons.rows.tokens.shape
        self.ids = torch.zeros(*shape, self.K, dtype=torch.int32)  # (R, T, K)
        self.logprobs = torch.zeros(*shape, self.K + 1)  # (R, T, K + 1)
        for numbers in torch.arange(len(lessons)).split(batch):
            part = lessons.select(numbers).to(device)
            logprobs, _ = self.on_the_fly(part)
            ids = logprobs.topk(self.K).indices
            rows, columns = part.where().cpu().nonzero(as_tuple=True)
            self.ids[numbers[rows], columns] = ids.cpu().int()
            self.logprobs[numbers[rows], columns] = coarse(logprobs, ids).cpu()

    def cached(self, part, numbers):
        """(log-probabilities (n, K + 1), ids (n, K)) of the rows `numbers` that the cache holds."""
        where, device = part.where().cpu(), part.labelled.device
        ids = self.ids[numbers][where].long()
        return self.logprobs[numbers][where].to(device), ids.to(device)


# --- training ------------------------------------------------------------------------------------


RANGES = {
    (0, 1): "alpha jsd_beta on_policy_share on_policy_start",
    (0, math.inf): "unlabelled cache_top_k rationale_weight cosine_weight",
    (1, math.inf): "labels seeds",
    (0.01, math.inf): "temperature sample_temperature",
}


def check(cfg):
    """Refuse settings that mean nothing; nanollm/config.py knows those that all scripts share."""
    for (least, most), names in RANGES.items():
        for name in names.split():
            value = getattr(cfg, name)
            if not least <= value <= most:
                between = f"between {least} and {most}" if most < math.inf else f"from {least} on"
                raise UserError(f"--{name} lies {between}, not at {value}")


class Distillation:
    """Teacher, student and lessons: everything that a training step needs."""

    def __init__(self, cfg, rt):
        self.cfg, self.rt = cfg, rt
        self.teacher, self.tokenizer = load_model(cfg.teacher)
        random.seed(cfg.seed)
        torch.manual_seed(cfg.seed)
        self.student = build_student(cfg, self.teacher, self.tokenizer)
        if cfg.method == "compress":
            norm = self.student.model.norm
            norm.register_forward_hook(lambda module, x, out: setattr(self, "hidden", out))
        self.V = min(self.teacher.cfg.vocab_size, self.student.cfg.vocab_size)
        context = min(m.cfg.max_position_embeddings for m in (self.teacher, self.student))
        self.T = min(cfg.context, context)
        if cfg.cache_top_k >= self.V:
            raise UserError(
                f"--cache_top_k {cfg.cache_top_k} must be below the vocabulary, {self.V}"
            )
        if cfg.method == "step_by_step" and "<think>" not in self.tokenizer.special:
            raise UserError(f"--teacher {cfg.teacher} knows no <think>: it writes no rationale")
        self._load()

    def _load(self):
        cfg, rt, tokenizer = self.cfg, self.rt, self.tokenizer
        labelled, unlabelled, val, items = load_lessons(cfg)
        self.items = first_of_each_family(items, cfg.test_items)
        asked = labelled if cfg.method == "step_by_step" else unlabelled
        self.prompts = [prompt_ids(r, tokenizer) for r in labelled + unlabelled]
        every = self.prompts + [prompt_ids(item, tokenizer) for item in self.items]
        rt.prepare(self.teacher, train=False)
        for model in (self.teacher, self.student):
            check_room(model, every, cfg.max_new_tokens)
        self.answers = teacher_answers(cfg, rt, self.teacher, tokenizer, asked)
        taught = tokenize(
            self.answers, cfg.method not in ("soft", "on_policy"), tokenizer, self.T
        )
        own = labelled if cfg.method != "step_by_step" else []
        examples = tokenize(own, True, tokenizer, self.T)
        held_out = tokenize(val, True, tokenizer, self.T)
        if not examples + taught or not held_out:
            raise UserError(
                f"nothing to learn from: no label and none of the teacher's {len(self.answers)} "
                f"answers that were kept fits {self.T} tokens; see whether --teacher {cfg.teacher} "
                f"answers the prompts, or raise --context"
            )
        self.lessons = make_lessons(examples + taught, self.T, tokenizer)
        self.val = make_lessons(held_out, self.T, tokenizer)
        rt.print(
            f"{len(examples)} labelled examples and {len(taught)} answers of the teacher in "
            f"{len(self.lessons)} rows of {self.T} tokens, {len(own) - len(examples)} and "
            f"{len(self.answers) - len(taught)} left out because they were longer"
        )

    def own_answers(self, numbers, share):
        """Lessons from what the student itself answers to these prompts (GKD, algorithm 1)."""
        cfg, tokenizer = self.cfg, self.tokenizer
        noise = torch.rand(len(numbers), cfg.max_new_tokens, dtype=torch.float64)[share]
        prompts = [self.prompts[i] for i in numbers[share]]
        self.student.eval()
        out = generate(
            self.student,
            prompts,
            cfg.max_new_tokens,
            temperature=cfg.sample_temperature,
            stop_ids=tokenizer.stop_ids,
            pad_id=tokenizer.pad_id,
            noise=noise.to(self.rt.device),
        )
        self.student.train()
        examples = [(p, reply, False) for p, reply in zip(prompts, out.lists())]
        longest = max(len(prompt) + len(reply) for prompt, reply, _ in examples)
        return make_lessons(examples, max(self.T, longest), tokenizer)

    def part_loss(self, called, targets, part, cached, counts):
        """Loss of a part of the batch; `cached`: the numbers of its rows, where the cache has
        them.
        """
        cfg, rows, where = self.cfg, part.rows, part.where()
        logits = called(rows.tokens, rows.positions, document_mask(rows.documents), where=where)
        logits = logits[:, : self.V]  # (n, V)
        labelled, ce = part.at(part.labelled), -token_logprobs(logits, part.at(rows.tokens))  # (n,)
        if cfg.method in ("labels", "hard"):
            return label_loss(ce, labelled, counts)
        if cfg.method == "step_by_step":
            inside = part.at(part.rationale)
            return step_by_step_loss(ce, labelled, inside, counts, cfg.rationale_weight)
        student = tempered(logits, cfg.temperature)
        if cached is not None:
            teacher, ids = targets.cached(part, cached)
            student = coarse(student, ids)
        else:
            teacher, teacher_hidden = targets.on_the_fly(part)
        divergence = self.divergence()(student, teacher)
        alpha = 1.0 if cfg.method == "on_policy" else cfg.alpha
        loss = soft_loss(divergence, ce, labelled, counts, alpha, cfg.temperature)
        if cfg.method == "compress":
            cosine = hidden_cosine_loss(self.hidden[where], teacher_hidden)
            loss = loss + cfg.cosine_weight * cosine.sum() / counts.tokens
        return loss

    def divergence(self):
        kind = self.cfg.divergence or ("jsd" if self.cfg.method == "on_policy" else "forward")
        jsd = partial(generalised_jsd, beta=self.cfg.jsd_beta)
        return {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd}[kind]

    def batch(self, step, samplers):
        """(Lessons of this process, their numbers; None where the student wrote them itself)."""
        cfg, rt = self.cfg, self.rt
        own = cfg.method == "on_policy" and step >= cfg.on_policy_start * cfg.steps
        if own and random.random() < cfg.on_policy_share:
            n = 2 * cfg.batch_size  # about as many tokens as in packed rows
            return self.own_answers(samplers[1].take(n), rt.share(n)), None
        numbers = samplers[0].take(cfg.batch_size)[rt.share(cfg.batch_size)]
        return self.lessons.select(numbers), numbers

    def counts(self, part):
        labelled = part.at(part.labelled)
        inside = labelled & part.at(part.rationale)
        numbers = part.rows.mask[:, 1:].sum(), labelled.sum(), inside.sum()
        return Counts(*(self.rt.sum(number.item()) for number in numbers))

    @torch.no_grad()
    def validation_loss(self, model, batch=64):
        """Nats per token of the held-out labels."""
        total, count = 0.0, 0
        for numbers in torch.arange(len(self.val)).split(batch):
            part = self.val.select(numbers).to(self.rt.device)
            rows, mask = part.rows, document_mask(part.rows.documents)
            logits = model(rows.tokens, rows.positions, mask, where=part.where())
            total -= token_logprobs(logits, part.at(rows.tokens)).sum().item()
            count += len(logits)
        return total / count

    def measure(self, model, limit=0):
        """({"val_loss", "figures" of each family, "speed" of answering in tokens per second}, a
        sample) of a model; at most `limit` test items per family.
        """
        model.eval()
        found = {"val_loss": self.validation_loss(model), "figures": {}, "speed": 0.0}
        items = first_of_each_family(self.items, limit)
        prompts, begin = [prompt_ids(i, self.tokenizer) for i in items], clock(self.rt.device)
        ids = sample_replies(
            model, self.tokenizer, prompts, self.cfg.max_new_tokens, temperature=0.0
        )
        replies = [as_text(self.tokenizer, reply) for reply in ids]
        if items:
            found["speed"] = sum(map(len, ids)) / (clock(self.rt.device) - begin)
            found["figures"] = sampled_figures(items, replies)
        model.train(model is self.student)
        first = {i["family"]: (i, reply) for i, reply in zip(items[::-1], replies[::-1])}
        asked = ((i["messages"][-1]["content"], reply) for i, reply in first.values())
        return found, "\n".join(f"{question}\n    {reply}" for question, reply in asked)


def distil(cfg, rt, known=None):
    """Train one student; `known`: the teacher's figures, where they have been measured."""
    task = Distillation(cfg, rt)
    student = task.student
    rt.share(cfg.batch_size)  # refuses what can't be shared before a folder is written
    run = Run(cfg, rt, cfg.steps)
    if rt.main and not cfg.resume:
        lines = (json.dumps(as_dialogue(r), ensure_ascii=False) + "\n" for r in task.answers)
        atomic_write(run.folder / "teacher.jsonl", "".join(lines))
    called = rt.prepare(student, cfg.compile)
    student.model.checkpoint_activations = cfg.checkpoint_activations
    targets = Targets(cfg, task.teacher, task.V)
    if targets.K and cfg.method in ("soft", "both", "on_policy"):
        targets.fill(task.lessons, rt.device)
    optimizers = build_optimizers(student, cfg.optimizer, cfg.lr, cfg.adam_lr, cfg.weight_decay)
    samplers = [Sampler(len(task.lessons), cfg.seed), Sampler(len(task.prompts), cfg.seed + 1)]
    scaler, trained = rt.scaler(), [student, optimizers, samplers]
    saved = run.restore(*trained, scaler)
    known = saved.get("teacher") or known or task.measure(task.teacher)[0]
    before = saved.get("before") or task.measure(student)[0]
    after = saved.get("after", before)
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(SCHEDULES[cfg.schedule](run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        batch, chosen = task.batch(run.step, samplers)
        counts, loss = task.counts(batch), 0.0
        parts = torch.arange(len(batch)).chunk(cfg.accumulate)
        for i, numbers in enumerate(parts):
            part = batch.select(numbers).to(rt.device)
            cached = chosen[numbers] if targets.K and chosen is not None else None
            with rt.accumulating(called, more=i + 1 < len(parts)):
                part_loss = task.part_loss(called, targets, part, cached, counts)
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.clip or math.inf)
        loss = rt.sum(loss.item())
        run.check_finite(loss)
        if rt.dtype != torch.float16:  # there the scaler skips such steps
            run.check_finite(norm.item(), "gradient")
        optimizers.step(scaler)
        run.advance()

        since += counts.tokens
        last = run.step == cfg.steps
        if run.step % 10 == 0 or last:
            run.log(since, show=("loss",), loss=loss, grad_norm=norm.item())
            since = 0
        if run.step % cfg.eval_every == 0 or last:
            after, sample = task.measure(student, 0 if last else cfg.eval_items)
            run.check_finite(after["val_loss"], "held-out loss")
            run.log(**scores(after), show=("val_loss", "val_accuracy"))
            run.write_sample(sample)
            run.export(student, task.tokenizer)
            run.checkpoint(*trained, scaler, teacher=known, before=before, after=after)
    return finish(run, task, known, before, after)


def scores(measured):
    """What the curves show of a measurement."""
    shown = {"val_loss": measured["val_loss"]}
    if measured["figures"]:
        shown["val_accuracy"] = measured["figures"]["all"]["greedy"]
    return shown


def finish(run, task, known, before, after):
    """Print what the student has learnt and keep it in result.json, which is returned."""
    run.close()
    run.draw_curves("loss", "val_loss", "val_accuracy", y_label="nats per token, or share")
    result = {"method": task.cfg.method, "teacher": known, "before": before, "after": after}
    for name, model in ("teacher", task.teacher), ("student", task.student):
        result[f"{name}_parameters"] = count_parameters(model)[0]
    result |= {"answers": len(task.answers), **run.speed()}
    run.write_result(**result)
    if after["figures"]:
        columns = {"teacher": known, "before": before, "after": after}
        task.rt.print(figures_table({name: each["figures"] for name, each in columns.items()}))
    task.rt.print(
        f"{run.folder}: {result['student_parameters']:,} parameters, the teacher has "
        f"{result['teacher_parameters']:,}; answers {after['speed']:,.0f} tokens/s, the teacher "
        f"{known['speed']:,.0f}; {run.step} steps in {run.elapsed:.0f} s"
    )
    return result


# --- comparison ----------------------------------------------------------------------------------


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
    wanted = [name.strip() for name in cfg.only.split(",") if name.strip()]
    if unknown := set(wanted) - rows.keys():
        raise UserError(f"--only {', '.join(unknown)}: rows are {', '.join(rows)}")
    if cfg.data == "village":  # whose dialogues have no steps
        rows = {k: v for k, v in rows.items() if k not in ("answers", "step_by_step")}
    return {name: row for name, row in rows.items() if not wanted or name in wanted}


def compare(cfg, rt):
    """Run every kind with every seed, and write the table. With --resume what is done stays."""
    out, rows, known = Path(cfg.out), kinds(cfg), None
    if rt.main and not cfg.resume:
        if out.exists() and any(out.iterdir()):
            if not (out / "train_config.json").exists():
                raise UserError(f"{out} holds files that are no run of ours; choose another --out")
            rt.print(f"the comparison that was in {out} is now in {set_aside(out)}")
        save_config(cfg, out / "train_config.json")
    rt.barrier()
    results = {name: [] for name in rows}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name, (changes, _) in rows.items():
            folder = out / f"{name}_{seed}"
            each = dataclasses.replace(cfg, compare=False, out=str(folder), seed=seed, **changes)
            if each.unlabelled and each.method not in ("labels", "step_by_step"):
                each.answers = cfg.answers or str(share_answers(cfg, rt, out / "answers.jsonl"))
            if not (cfg.resume and (folder / "result.json").exists()):
                each.resume = cfg.resume and (folder / "state.pt").exists()
                rt.print(f"\n{name}, seed {seed}")
                distil(each, rt, known)
                rt.barrier()
            results[name].append(read_json(folder / "result.json"))
            known = results[name][-1]["teacher"]
    if rt.main:
        write_table(cfg, rows, results)


def share_answers(cfg, rt, path):
    """The file of the teacher's answers to the unlabelled prompts, the same for all students."""
    if rt.sum(not path.exists()):  # asked of all, so that every process takes the same way
        teacher, tokenizer = load_model(cfg.teacher)
        rt.prepare(teacher, train=False)
        records = load_lessons(cfg)[1]
        check_room(teacher, [prompt_ids(r, tokenizer) for r in records], cfg.max_new_tokens)
        rt.print(f"the teacher answers {len(records)} prompts, {cfg.samples} times each")
        if rt.main:
            answered = ask_teacher(cfg, teacher, tokenizer, records)
            lines = (json.dumps(as_dialogue(r), ensure_ascii=False) + "\n" for r in answered)
            atomic_write(path, "".join(lines))
        rt.barrier()
    return path


def main(cfg):
    check(cfg)
    check_folders(cfg.teacher, cfg.out)
    if cfg.init:
        check_folders(cfg.init, cfg.out)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    (compare if cfg.compare else distil)(cfg, rt)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
