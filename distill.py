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

Labels are scarce and prompts are plenty: beside --labels labelled examples there are --unlabelled
prompts, which the teacher answers. soft and on_policy learn from all of its answers; hard, both
and compress from those that the checker lets through; labels and step_by_step from none of them.
How the teacher is asked, and what is dropped and counted, is in nanollm/teacher.py.

The teacher's logits are never stored. They are computed on the fly, or once per token with
--cache_top_k K: then the K most likely successors keep their probabilities, and all others become
one event. KL between such coarse distributions is a lower bound of KL between the whole ones, and
reaches it with K (data-processing inequality).

Differs from the papers: rationale and answer of step_by_step are one sequence, not two tasks, and
the rationales are sampled and checked by the label; on_policy begins once --on_policy_start of the
steps has taught the student to end an answer; tau^2 scales every divergence.

Run     python distill.py                          # soft; the village's questions about people
        python distill.py --method hard --samples 4 --out runs/hard
        python distill.py --compare all --out runs/kinds    # every kind, three seeds, and a table
        python distill.py --compare answers,step_by_step --data problems --teacher runs/grpo \
            --steps 800 --out runs/steps
Needs    runs/sft                                         (python train_sft.py)
Expect  see README.md: a third of the parameters, 95% of the accuracy or more
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from nanollm.batches import Sampler
from nanollm.config import cli
from nanollm.distill_table import compare
from nanollm.distillation import PerToken, make_lessons
from nanollm.generate import generate
from nanollm.gpt import GPT, document_mask
from nanollm.hub import load_model
from nanollm.logprobs import token_logprobs
from nanollm.optim import build_optimizers, trapezoid
from nanollm.run import Run, check_folders
from nanollm.runtime import start
from nanollm.students import answer_examples, check_models, finish, new_student, open_student
from nanollm.teacher import prepare, write_answers
from train_sft import validation_loss


@dataclass
class Config:
    # smoke: seconds, to see that it runs; tiny: a laptop CPU; gpu: the gpu preset of pretraining
    preset: str = "tiny"
    # -- Teacher and student
    teacher: str = "runs/sft"  # run folder or model folder of the teacher
    method: Literal["soft", "hard", "both", "on_policy", "step_by_step", "compress", "labels"] = (
        "soft"
    )
    # run folder or model folder of a student that exists; default: a new one of the shape below
    init: str | None = None
    layers: int = 4  # number of blocks; compress: half the teacher's
    channels: int = 64  # width C of the residual stream; compress: the teacher's
    heads: int = 4  # attention heads
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
    test_data: str | None = None  # test examples to measure accuracy on; the village has its own
    test_examples: int = 200  # items per task for that
    context: int = 128  # row length T
    # -- Answers of the teacher, and with on_policy of the student
    samples: int = 1  # answers per prompt; step_by_step: rationales per label
    sample_temperature: float = 1.0  # temperature of sampling
    max_new_tokens: int = 112  # longest answer
    # -- Loss
    temperature: float = 2.0  # tau, which softens both distributions
    alpha: float = 0.9  # weight of the divergence; 1 - alpha is that of the labels
    # the divergence: 0 is the forward KL, 1 the reverse, between them lies GKD's generalised JSD;
    # default: 0, and 0.5 with on_policy
    jsd_beta: float | None = None
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
    muon_lr: float = 0.03  # learning rate of Muon
    lr: float = 0.02  # learning rate of AdamW
    warmup: int = 20  # steps of linear warm-up
    grad_clip: float = 1.0  # largest norm of the gradient; 0 for no clipping
    eval_every: int = 100  # steps between evaluations, each followed by a checkpoint
    # -- Comparison
    # instead of one run: rows of the table, separated by commas, or all, each in its own folder
    compare: str = ""
    seeds: int = 3  # runs of each row
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
        "layers": 2,
        "channels": 32,
        "heads": 2,
        "mlp": 64,
        "steps": 10,
        "labels": 40,
        "unlabelled": 40,
        "batch_size": 4,
        "max_new_tokens": 16,
        "eval_every": 5,
        "warmup": 2,
        "test_examples": 4,
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
        "muon_lr": 0.01,
        "lr": 1e-3,
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


# --- the teacher's probabilities -----------------------------------------------------------------


@torch.no_grad()
def probabilities(teacher, part, V, temperature):
    """(log-probabilities (n, V), hidden states (n, C)) of the teacher at the n trained tokens."""
    rows = part.rows
    hidden = teacher.hidden(rows.tokens, rows.positions, document_mask(rows.documents))
    hidden = hidden[part.where()]
    return tempered(teacher.head(hidden)[:, :V], temperature), hidden


def cache_top_k(teacher, lessons, K, V, temperature, batch=16):
    """PerToken of (log-probabilities (n, K + 1), ids (n, K)): the teacher's K most likely
    successors, and all others together, at every trained token.
    """
    kept = []
    for numbers in torch.arange(len(lessons)).split(batch):
        part = lessons.select(numbers).to(teacher.device)
        logprobs, _ = probabilities(teacher, part, V, temperature)
        ids = logprobs.topk(K).indices
        kept.append((coarse(logprobs, ids).cpu(), ids.int().cpu()))
    return PerToken(lessons, *map(torch.cat, zip(*kept)))


# --- training ------------------------------------------------------------------------------------


class Distillation:
    """Teacher, student and lessons: the batches of a run and their losses."""

    def __init__(self, cfg, rt, teacher, student, tokenizer, lessons, prompts):
        self.cfg, self.rt, self.tokenizer = cfg, rt, tokenizer
        self.teacher, self.student, self.ddp_model = (
            teacher,
            student,
            rt.prepare(student, cfg.compile),
        )
        self.lessons, self.prompts = lessons, prompts
        self.V = min(teacher.cfg.vocab_size, student.cfg.vocab_size)  # both may be padded
        self.samplers = [Sampler(len(lessons), cfg.seed), Sampler(len(prompts), cfg.seed + 1)]
        beta = 0.5 if cfg.method == "on_policy" else 0.0
        beta = beta if cfg.jsd_beta is None else cfg.jsd_beta
        self.divergence = partial(generalised_jsd, beta=beta)
        self.cache = None
        if cfg.cache_top_k and cfg.method in ("soft", "both", "on_policy"):
            self.cache = cache_top_k(teacher, lessons, cfg.cache_top_k, self.V, cfg.temperature)
        if cfg.method == "compress":
            seen = self.seen = {}  # not self in the hook: models that hold each other stay for ever
            student.model.norm.register_forward_hook(lambda norm, x, out: seen.update(hidden=out))

    def batch(self, step):
        """(Lessons of this process, their numbers; None where the student wrote them itself)."""
        cfg, rt = self.cfg, self.rt
        own = cfg.method == "on_policy" and step >= cfg.on_policy_start * cfg.steps
        if own and random.random() < cfg.on_policy_share:
            n = 2 * cfg.batch_size  # about as many tokens as in packed rows
            return self.own_answers(self.samplers[1].take(n), rt.share(n)), None
        numbers = self.samplers[0].take(cfg.batch_size)[rt.share(cfg.batch_size)]
        return self.lessons.select(numbers), numbers

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
        examples = [(p, completion, False) for p, completion in zip(prompts, out.lists())]
        longest = max(len(prompt) + len(completion) for prompt, completion, _ in examples)
        return make_lessons(examples, max(cfg.context, longest), tokenizer)

    def counts(self, part):
        labelled = part.at(part.labelled)
        inside = labelled & part.at(part.rationale)
        numbers = part.rows.mask[:, 1:].sum(), labelled.sum(), inside.sum()
        return Counts(*(self.rt.sum(number.item()) for number in numbers))

    def loss(self, part, numbers, counts):
        """Loss of a part of the batch; `numbers` of its rows among the lessons, or None."""
        cfg, rows, where = self.cfg, part.rows, part.where()
        mask = document_mask(rows.documents)
        logits = self.ddp_model(rows.tokens, rows.positions, mask, where=where)[
            :, : self.V
        ]  # (n, V)
        labelled, ce = part.at(part.labelled), -token_logprobs(logits, part.at(rows.tokens))  # (n,)
        if cfg.method in ("labels", "hard"):
            return label_loss(ce, labelled, counts)
        if cfg.method == "step_by_step":
            inside = part.at(part.rationale)
            return step_by_step_loss(ce, labelled, inside, counts, cfg.rationale_weight)
        student = tempered(logits, cfg.temperature)
        if self.cache is not None and numbers is not None:
            teacher, ids = self.cache.rows(numbers, self.rt.device)
            student = coarse(student, ids.long())
        else:
            teacher, hidden = probabilities(self.teacher, part, self.V, cfg.temperature)
        alpha = 1.0 if cfg.method == "on_policy" else cfg.alpha
        divergence = self.divergence(student, teacher)
        loss = soft_loss(divergence, ce, labelled, counts, alpha, cfg.temperature)
        if cfg.method == "compress":
            cosine = hidden_cosine_loss(self.seen["hidden"][where], hidden)
            loss = loss + cfg.cosine_weight * cosine.sum() / counts.tokens
        return loss


def open_models(cfg, rt):
    """(teacher, student, tokenizer): the student from --init, the teacher's layers, or new."""
    teacher, tokenizer = load_model(cfg.teacher)
    check_models(cfg, teacher, tokenizer)
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    if cfg.init:
        student = open_student(cfg, teacher, tokenizer)
    elif cfg.method == "compress":
        student = every_other_layer(teacher)
    else:
        student = new_student(cfg, teacher)
    rt.prepare(teacher, train=False)
    return teacher, student, tokenizer


def gather(cfg, rt):
    """(models, lessons) of a run; refuses what it can't do before it writes a folder."""
    rt.share(cfg.batch_size)
    models = open_models(cfg, rt)
    return models, prepare(cfg, rt, *models)


def distil(cfg, rt):
    """Train one student."""
    (teacher, student, tokenizer), gathered = gather(cfg, rt)
    lessons, prompts, val, examples, answers = gathered
    run = Run(cfg, rt, cfg.steps)
    if rt.main and not cfg.resume:
        write_answers(answers, run.folder / "teacher.jsonl")
    task = Distillation(cfg, rt, teacher, student, tokenizer, lessons, prompts)
    student.model.checkpoint_activations = cfg.checkpoint_activations
    optimizers = build_optimizers(student, cfg.optimizer, cfg.muon_lr, cfg.lr, weight_decay=0.0)
    scaler, trained = rt.scaler(), [student, optimizers, task.samplers]
    saved = run.restore(*trained, scaler)

    def measure(model):
        model.eval()
        found, sample = answer_examples(model, tokenizer, examples, cfg.max_new_tokens)
        found["val_loss"] = validation_loss(model, val)
        model.train(model is student)
        return found, sample

    known = saved.get("teacher") or measure(teacher)[0]
    before = saved.get("before") or measure(student)[0]
    after = saved.get("after", before)
    since = 0

    while run.step < cfg.steps:
        optimizers.schedule(trapezoid(run.step, cfg.steps, cfg.warmup))
        optimizers.zero_grad()
        batch, numbers = task.batch(run.step)
        counts, loss = task.counts(batch), 0.0
        parts = torch.arange(len(batch)).chunk(cfg.accumulate)
        for i, rows in enumerate(parts):
            part, chosen = batch.select(rows).to(rt.device), None
            if numbers is not None:
                chosen = numbers[rows]
            with rt.accumulating(task.ddp_model, more=i + 1 < len(parts)):
                part_loss = task.loss(part, chosen, counts)
                # times the number of processes, by which DDP's mean divides
                scaler.scale(part_loss * rt.world).backward()
            loss += part_loss.detach()
        optimizers.unscale(scaler)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip or math.inf)
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
            after, sample = measure(student)
            run.check_finite(after["val_loss"], "held-out loss")
            shown = {"val_loss": after["val_loss"]}
            if after["figures"]:
                shown["val_accuracy"] = after["figures"]["all"]["greedy"]
            run.log(**shown, show=tuple(shown))
            run.write_sample(sample)
            run.export(student, tokenizer)
            run.checkpoint(*trained, scaler, teacher=known, before=before, after=after)
    finish(run, teacher, student, len(answers), known, before, after)


def main(cfg):
    check_folders(cfg.teacher, cfg.out)
    if cfg.init:
        check_folders(cfg.init, cfg.out)
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    train = partial(distil, rt=rt)
    compare(cfg, rt, partial(gather, rt=rt), train) if cfg.compare else train(cfg)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
