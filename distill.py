r"""Distillation: a small student learns from a teacher's probabilities, completions or reasoning.

With p_T, p_S = softmax(logits / tau) of teacher and student at every token of a completion:

    labels        CE(label), to compare with
    soft          alpha tau^2 KL(p_T || p_S) + (1 - alpha) CE(label)    Hinton et al., 1503.02531
    hard          CE of labels and of the teacher's completions that pass the checker
                                                                        Kim & Rush, 1606.07947
    both          soft, with the completions that passed as labels
    on_policy     JSD_beta(p_T, p_S) on the student's own completions in a share lambda of the
                  steps (GKD; Agarwal et al., 2306.13649), on given ones in the others
    step_by_step  CE(answer) + lambda CE(rationale), the rationale written by the teacher
                  (Hsieh et al., 2305.02301)
    compress      both, and 1 - cos(h_S, h_T) of the last hidden states, starting from every other
                  layer of the teacher (DistilBERT; Sanh et al., 1910.01108)

Labels are scarce and prompts are plentiful: beside --labels labelled examples there are
--unlabelled prompts, which the teacher completes. soft and on_policy learn from all of its
completions; hard, both and compress from those that pass the checker; step_by_step asks the teacher
for rationales of the labelled examples instead, and keeps those that end in the label. The
completions are kept in teacher.jsonl, which another run reads with --completions.

Of several teachers, a,b,c, each completes every prompt, and p_T is the mean of their probabilities
(Hinton et al., section 1). What only writes text may be an HTTP endpoint, too
(nanollm/endpoint.py). --preset rejection is the third step of DeepSeek-R1 (Guo et al. 2025,
2501.12948, section 2.3.3): a model that reinforcement has taught teaches the one from before the
cold start, by its completions that are right, beside ordinary dialogues as labels.

With --cache_top_k K the teacher reads every row once, before training: the K most likely successors
of each token keep their probabilities, and all others become one event, which makes KL a little
smaller (data-processing inequality).

Differs from the papers: rationale and answer of step_by_step are one sequence, not two tasks, and
the rationales are sampled and checked by the label; on_policy trains on given completions for the
first half of the steps, so that the student learns to stop; tau^2 scales every divergence; losses
are means over a batch's tokens (GKD averages over each sequence first); hard samples what Kim &
Rush take from beam search.

Run     python distill.py                          # soft; the village's questions about people
        python distill.py --method hard --samples 4 --out runs/hard
        python distill.py --method step_by_step --data problems --teacher runs/grpo --labels 500 \
            --samples 4 --steps 800 --out runs/steps
        # every method with the same completions of the teacher, three seeds each, and a table:
        python distill.py --steps 1 --out runs/asked
        for seed in 0 1 2; do for method in labels soft hard both on_policy compress; do
            python distill.py --method $method --completions runs/asked/teacher.jsonl \
                --seed $seed --out runs/kinds/${method}_$seed
        done; done; python -m nanollm.compare runs/kinds/*
        python distill.py --preset rejection       # from runs/grpo; README.md has R1's whole chain
        python train_sft.py --preset writer && python distill.py --prompts runs/writer
        python distill.py --method hard --teacher http://localhost:8000/v1 --init runs/sft \
            --data problems --out runs/far
Needs   runs/sft                                         (python train_sft.py)
Expect  see README.md: a third of the parameters, 95% of the accuracy or more. --preset rejection,
        seed 0, fp32: of 8,000 completions 2,012 are wrong, 4,112 said twice, and 1,864 learnt.
        Teachers that know the same don't add up: with three that differ by their seed (--teacher
        runs/sft,runs/sft1,runs/sft2) a student gets 91.7%, 91.9%, 89.9% right, with the first of
        them 92.0%, 93.7%, 94.5% (seeds 0, 1, 2, bf16): its steps are shared by more completions
Watch   loss          falls steeply at first; higher in the steps on the student's own completions
        val_loss      nats per token of held-out labels; labels alone are soon learnt by heart, and
                      it rises while loss falls to nothing; the teacher's probabilities prevent that
        val_accuracy  of held-out questions, greedy; far below the teacher's: more --steps, or too
                      few prompts (see what was dropped, at the beginning)
        grad_norm     below 1 after 30 steps; rising: lower the learning rates
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from data.village import examples as village
from data.village.problems import answer_of, worked
from nanollm.batches import Sampler
from nanollm.config import LARGE, NotNegative, OpenShare, Positive, Share, TrainConfig, Whole, cli
from nanollm.distillation import (
    ask_teacher,
    filtered,
    pack_labelled,
    read_completions,
    tokenize,
    write_completions,
)
from nanollm.endpoint import Endpoint
from nanollm.formats import need, read_parts
from nanollm.generate import sample_together
from nanollm.gpt import GPT, count_parameters, document_mask, shape_of
from nanollm.hub import load_model, save_model
from nanollm.logprobs import token_logprobs
from nanollm.metrics import (
    accuracy_by_task,
    accuracy_table,
    first_of_each_task,
    mean_accuracy,
    sample_by_task,
)
from nanollm.optim import SCHEDULES, build_optimizer
from nanollm.records import read_examples
from nanollm.rollouts import chat_prompt
from nanollm.run import Run, check_folders, effect
from nanollm.runtime import start
from nanollm.self_instruct import write_prompts
from train_sft import validation_loss


@dataclass
class Config(TrainConfig):
    # -- Teacher and student
    # run folder or model folder of the teacher, or of several: a,b,c; with hard and step_by_step an
    # endpoint, too: http://host:port/v1#MODEL (see nanollm/endpoint.py)
    teacher: str = "runs/sft"
    # what the student learns from; the formulas stand above
    method: Literal["labels", "soft", "hard", "both", "on_policy", "step_by_step", "compress"] = (
        "soft"
    )
    # run folder or model folder of a student that exists; default: a new one of the shape below
    init: str | None = None
    layers: Whole[1] = 4  # number of blocks; compress: half the teacher's
    channels: Whole[1] = 64  # width C of the residual stream; compress: the teacher's
    heads: Whole[1] = 4  # attention heads
    mlp: Whole[1] = 192  # hidden width of the MLP
    # -- Data
    # village (dialogues about its people), dialogues (all of the village's), problems (the
    # village's), or JSONL of dialogues or problems (see data/README.md)
    data: str = "village"
    labels: Whole[0] = 1000  # so many of --data are labelled examples
    # where the teacher's prompts are from: as --data has it, or a run folder, model folder or
    # endpoint that writes them (nanollm/self_instruct.py); default: the others of --data
    prompts: str | None = None
    unlabelled: Whole[0] = 4000  # so many of them the teacher completes
    # file of the teacher's completions: another run's teacher.jsonl; default: it is asked
    completions: str | None = None
    val_fraction: OpenShare = 0.05  # share of --data that is held out; the village has its own
    test_data: str | None = None  # test examples to measure accuracy on; the village has its own
    test_examples: Whole[0] = 200  # test examples per task; 0: all
    context: Whole[1] = 128  # row length T, as far as both models can read
    # -- Completions of the teacher, and with on_policy of the student
    samples: Whole[1] = 1  # completions per prompt; step_by_step: rationales per label
    sample_temperature: NotNegative = 1.0  # temperature of sampling
    max_new_tokens: Whole[1] = 112  # longest completion
    timeout: Positive = 120.0  # seconds that an endpoint has for a completion
    # -- Loss
    # soft, both, on_policy, compress: tau, which softens both distributions
    temperature: Positive = 2.0
    # soft, both, compress: weight of the divergence; 1 - alpha is that of the labels
    alpha: Share = 0.9
    # the divergence: 0 is the forward KL, 1 the reverse, between them lies GKD's generalised JSD;
    # default: 0, and 0.5 with on_policy
    jsd_beta: Share | None = None
    # lambda of GKD: share of the steps, in the second half, on the student's own completions
    on_policy_share: Share = 0.5
    # soft, both, on_policy: probabilities of the teacher that are kept per token; 0: none, it
    # computes them on the fly, as it always does for compress and the student's own completions
    cache_top_k: Whole[0, 255] = 16
    # -- Training
    out: str = "runs/distill"
    batch_size: int = 24
    muon_lr: float = 0.03
    lr: float = 0.02

    @property
    def folders(self):
        """The teachers that aren't endpoints."""
        return [name for name in self.teacher.split(",") if "://" not in name]


PRESETS = {
    "smoke": dict(steps=10, labels=40, unlabelled=40, batch_size=4, eval_every=5, warmup=2)
    | dict(test_examples=4),
    "rejection": dict(method="hard", teacher="runs/grpo", init="runs/sft", out="runs/rejection")
    | dict(data="dialogues", labels=4000, prompts="problems", unlabelled=2000, samples=4)
    | dict(context=256, batch_size=12, lr=3e-3, muon_lr=0.008, test_examples=64),
    "gpu": dict(layers=6, channels=384, heads=6, mlp=1024, context=512, max_new_tokens=256)
    | dict(labels=10000, unlabelled=100000, batch_size=128, steps=4000, muon_lr=0.01, lr=1e-3)
    | dict(compile=True),
    # with --init, the student: rate and schedule of fine-tuning, as in train_sft.py
    "downloaded": dict(LARGE, labels=10000, unlabelled=10000, context=1024, max_new_tokens=256)
    | dict(batch_size=32, accumulate=32, steps=500, lr=2e-5),
}

TEXTS = ("labels", "hard", "step_by_step")  # need none of the teacher's probabilities
CACHED = ("soft", "both", "on_policy")  # need no more of the teacher than its probabilities
UNCHECKED = ("soft", "on_policy")  # learn from all completions, by their probabilities: no labels
ON_POLICY_START = 0.5  # share of the steps before the first on the student's own completions
RATIONALE_WEIGHT = 1.0  # lambda of step_by_step
COSINE_WEIGHT = 0.2  # of compress's cosine loss

# --- data ----------------------------------------------------------------------------------------

# --data, --prompts: the village's files
VILLAGE = {"village": "sft", "dialogues": "sft", "problems": "problems"}
PEOPLE = ("fact", "fact_never_asked", "unknown", "two_hop", "multi_turn")


def village_of(cfg):
    """The folder of the first teacher's village, or of the student's where endpoints teach."""
    return village.of_run([*cfg.folders, cfg.init][0])


def of_village(cfg, name, part):
    """The examples of one of VILLAGE: its "train", "val" or "test" part."""
    read = read_examples if part == "test" else read_completions
    examples = read(village_of(cfg) / f"{VILLAGE[name]}_{part}.jsonl")
    return [e for e in examples if name != "village" or e["task"] in PEOPLE]


def load_examples(cfg):
    """(labelled, the other training examples, held-out labelled, test) examples."""
    if cfg.data in VILLAGE:
        parts = [of_village(cfg, cfg.data, part) for part in ("train", "val")]
    else:
        parts = read_parts(read_completions, cfg.data, None, cfg.val_fraction)
    train, val = (list(map(with_label, part)) for part in parts)
    labelled, val = ([e for e in part if "completion" in e] for part in (train, val))
    others = labelled[cfg.labels :] + [e for e in train if "completion" not in e]
    if cfg.test_data:
        tests = read_examples(cfg.test_data)
    else:
        names = [name for name in dict.fromkeys((cfg.data, cfg.prompts)) if name in VILLAGE]
        tests = [e for name in names for e in of_village(cfg, name, "test")]
    return labelled[: cfg.labels], others, val, first_of_each_task(tests, cfg.test_examples)


def with_label(example):
    """An example and its label, if there is one: of a problem its solution, or the answer alone."""
    if "completion" in example or "answer" not in example:
        return example
    is_worked = "steps" in example
    label = worked(example)["messages"][-1]["content"] if is_worked else answer_of(example)
    return example | {"completion": label}


def load_prompts(cfg, rt, labelled, others):
    """The examples that the teacher is asked to complete."""
    if cfg.method == "step_by_step":
        return labelled
    if (cfg.prompts or cfg.data) == "village":
        prompts = village.prompts_about_people(village_of(cfg))
    elif cfg.prompts in VILLAGE:
        prompts = of_village(cfg, cfg.prompts, "train")
    elif not cfg.prompts:
        prompts = others
    elif Path(cfg.prompts).is_file():
        prompts = read_completions(cfg.prompts)
    else:  # a model that writes them after the example of the labelled ones
        model, tokenizer = open_teacher(cfg, rt, cfg.prompts)
        prompts = write_prompts(rt, model, tokenizer, labelled, cfg.unlabelled, cfg.seed)
    return prompts[: cfg.unlabelled]


def teacher_completions(cfg, rt, teachers, tokenizer, labelled, others):
    """Examples with every teacher's completions, as far as the method learns from them."""
    if cfg.method == "labels":
        return []
    own = Path(cfg.out) / "teacher.jsonl"
    if file := own if cfg.resume and own.exists() else cfg.completions:
        completed = [e for e in read_completions(file) if "completion" in e]
    else:
        prompts, completed = load_prompts(cfg, rt, labelled, others), []
        how = dict(samples=cfg.samples, temperature=cfg.sample_temperature, seed=cfg.seed)
        for teacher in teachers if prompts else ():
            completed += ask_teacher(rt, teacher, tokenizer, prompts, cfg.max_new_tokens, **how)
    kept, counts = filtered(completed, cfg.method not in UNCHECKED)
    rt.print(f"the teacher's completions: {counts}")
    return kept


def pack_rows(cfg, rt, tokenizer, T, labelled, completed, val):
    """(rows to train on, held-out rows) of T tokens."""
    labels = labelled if cfg.method != "step_by_step" else []
    labels = tokenize(labels, True, tokenizer, T, "labelled examples")
    checked = cfg.method not in UNCHECKED
    taught = tokenize(completed, checked, tokenizer, T, "the teacher's completions")
    val = tokenize(val, True, tokenizer, T, "held-out examples")
    train_rows, val_rows = (pack_labelled(each, T, tokenizer) for each in (labels + taught, val))
    counts = f"{len(labels)} labelled examples and {len(taught)} completions of the teacher"
    rt.print(f"{counts} in {len(train_rows)} rows of {T} tokens")
    enough = train_rows and val_rows and (taught or cfg.method != "hard")
    counts += f", {len(val_rows)} rows of held-out labels"
    need(enough, "nothing to learn from", f"{counts}; raise --context, --max_new_tokens")
    reasons = cfg.method != "step_by_step" or train_rows.rationale.any()
    need(reasons, f"--teacher {cfg.teacher}", "it gives no rationale, <think>...</think>")
    return train_rows, val_rows


# --- teacher and student -------------------------------------------------------------------------


def open_teacher(cfg, rt, name):
    """(GPT, Tokenizer) in a folder, or (Endpoint, None) at an address."""
    if "://" in name:
        return Endpoint(name, cfg.timeout), None
    model, tokenizer = load_model(name)
    return rt.prepare(model, train=False), tokenizer


def open_teachers(cfg, rt):
    """([GPT or Endpoint, ...], their Tokenizer, or None)."""
    names, reads = cfg.teacher.split(","), cfg.method in TEXTS and cfg.init
    wanted = "an endpoint gives text alone; add --method hard or step_by_step, and --init"
    need(len(cfg.folders) == len(names) or reads, f"--teacher {cfg.teacher}", wanted)
    teachers, tokenizers = zip(*(open_teacher(cfg, rt, name) for name in names))
    tokenizers = [tokenizer for tokenizer in tokenizers if tokenizer] or [None]
    same = all(tokenizer == tokenizers[0] for tokenizer in tokenizers)
    need(same, f"--teacher {cfg.teacher}", "their tokenizers differ; take teachers of one")
    return teachers, tokenizers[0]


def open_student(cfg, models, tokenizer):
    """(student, its Tokenizer): from --init, a part of the teacher, or new, as the flags say."""
    if cfg.init:
        student, own = load_model(cfg.init)
        same = own == (tokenizer or own)
        need(same, f"--init {cfg.init}", "it has another tokenizer than the teacher")
        return student, own
    if cfg.method == "compress":
        return every_other_layer(models[0]), tokenizer
    return GPT(dataclasses.replace(models[0].cfg, **shape_of(cfg))), tokenizer


def every_other_layer(teacher):
    """A student of the teacher's width and half its depth: it starts as its layers 0, 2, ..."""
    kept = range(0, teacher.cfg.num_hidden_layers, 2)
    student = GPT(dataclasses.replace(teacher.cfg, num_hidden_layers=len(kept)))
    for own, other in zip(student.model.layers, kept):
        own.load_state_dict(teacher.model.layers[other].state_dict())
    others = {name: x for name, x in teacher.state_dict().items() if "layers" not in name}
    student.load_state_dict(others, strict=False)
    return student


class Outputs(nn.Module):
    """(logits (n, V), last hidden states (n, C)) at the n trained tokens of LabelledRows: a module,
    for data-parallel training and torch.compile wrap modules alone.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        hidden = self.model.hidden(rows.tokens, rows.positions, document_mask(rows.documents))
        hidden = hidden[rows.where()]
        return self.model.head(hidden), hidden


# --- algorithm: log-probabilities (..., V) of student and teacher -> (...) in nats ---------------


def tempered(logits, temperature=1.0):
    """log softmax(logits / tau), (..., V) in fp32."""
    return (logits.float() / temperature).log_softmax(-1)


def kl(p, q):
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
    return (p.exp() * (p - q)).sum(-1)


def generalised_jsd(student, teacher, beta=0.5):
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S (GKD, eq. 1).

    By definition 0 is the forward KL(T || S), where the student has to cover all that the teacher
    may say, and 1 the reverse, where it must not say what the teacher would not: the limits of
    JSD / (beta (1 - beta)).
    """
    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def hidden_cosine_loss(student, teacher):
    """1 - cos(h_S, h_T): hidden states (..., C) -> (...) (DistilBERT, section 3)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def coarse(logprobs, ids):
    """Log-probabilities (n, K + 1) of the tokens `ids` (n, K), and of all others together, from
    log-probabilities (n, V).
    """
    others = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat((logprobs.gather(-1, ids), others), dim=-1)


@torch.no_grad()
def mean_of(teachers, rows, V, temperature):
    """(log of the teachers' mean probabilities (n, V), hidden states (n, C) of the first)."""
    outputs = [Outputs(teacher)(rows) for teacher in teachers]
    logprobs = torch.stack([tempered(logits[:, :V], temperature) for logits, _ in outputs])
    return logprobs.logsumexp(0) - math.log(len(teachers)), outputs[0][1]


@torch.no_grad()
def with_top_k(rows, teachers, K, V, temperature, batch=16):
    """The rows with the teachers' K most likely of V successors at every trained token."""
    R, T = rows.tokens.shape
    ids, logprobs = torch.zeros(R, T, K, dtype=torch.int32), torch.zeros(R, T, K + 1)
    for part in (slice(i, i + batch) for i in range(0, R, batch)):
        every, _ = mean_of(teachers, rows[part].to(teachers[0].device), V, temperature)
        top, where = every.topk(K).indices, rows[part].where()
        ids[part][where], logprobs[part][where] = top.int().cpu(), coarse(every, top).cpu()
    return dataclasses.replace(rows, top_ids=ids, top_logprobs=logprobs)


# The losses of a batch: values (n,) of a part's trained tokens -> scalar. They are divided by the
# tokens of the whole batch, over all parts and processes, so that the parts add up.


def masked_mean(ce, mask, num_tokens):
    """Mean cross-entropy of the tokens in the mask, num_tokens in the whole batch."""
    return (ce * mask).sum() / max(1, num_tokens)


def soft_loss(divergence, ce, labelled, num_tokens, num_labelled, alpha, temperature):
    """alpha tau^2 D + (1 - alpha) CE, means over their tokens. The gradient of D scales as 1/tau^2
    (Hinton et al., section 2), hence the factor.
    """
    soft = temperature**2 * divergence.sum() / max(1, num_tokens)
    return alpha * soft + (1 - alpha) * masked_mean(ce, labelled, num_labelled)


def step_by_step_loss(ce, rationale, num_answer, num_rationale, weight):
    """CE(answer) + lambda CE(rationale), each a mean over its tokens (Hsieh et al., eq. 2)."""
    answer = masked_mean(ce, ~rationale, num_answer)
    return answer + weight * masked_mean(ce, rationale, num_rationale)


def distillation_loss(cfg, student, teachers, rows, num_tokens, num_labelled, num_rationale):
    """What a part of the batch, LabelledRows, adds to its loss."""
    logits, hidden = student(rows)
    V = min([teacher.cfg.vocab_size for teacher in teachers] + [logits.shape[1]])
    logits = logits[:, :V]  # vocabularies may be padded
    labelled = rows.trained(rows.labelled)
    ce = -token_logprobs(logits, rows.trained(rows.tokens))  # (n,)
    if cfg.method in ("labels", "hard"):
        return masked_mean(ce, labelled, num_labelled)
    if cfg.method == "step_by_step":
        counts = num_tokens - num_rationale, num_rationale
        return step_by_step_loss(ce, rows.trained(rows.rationale), *counts, RATIONALE_WEIGHT)
    student_logprobs = tempered(logits, cfg.temperature)
    if rows.top_ids is None:
        teacher_logprobs, teacher_hidden = mean_of(teachers, rows, V, cfg.temperature)
    else:
        teacher_logprobs = rows.top_logprobs[rows.where()]
        student_logprobs = coarse(student_logprobs, rows.top_ids[rows.where()].long())
    alpha, beta = (1.0, 0.5) if cfg.method == "on_policy" else (cfg.alpha, 0.0)
    if cfg.jsd_beta is not None:
        beta = cfg.jsd_beta
    divergence = generalised_jsd(student_logprobs, teacher_logprobs, beta)
    loss = soft_loss(divergence, ce, labelled, num_tokens, num_labelled, alpha, cfg.temperature)
    if cfg.method == "compress":
        cosine = hidden_cosine_loss(hidden, teacher_hidden)
        loss = loss + COSINE_WEIGHT * cosine.sum() / max(1, num_tokens)
    return loss


# --- training ------------------------------------------------------------------------------------


def own_completions(cfg, rt, student, tokenizer, prompts, seed):
    """This process's LabelledRows of what the student itself completes (GKD, algorithm 1)."""
    how, share = {"temperature": cfg.sample_temperature, "seed": seed}, rt.share(len(prompts))
    completions = sample_together(rt, student, tokenizer, prompts, cfg.max_new_tokens, **how)
    tokenized = [(prompt, ids, False) for prompt, ids in zip(prompts[share], completions[share])]
    longest = max(len(prompt) + len(ids) for prompt, ids, _ in tokenized)
    return pack_labelled(tokenized, max(cfg.context, longest), tokenizer)


def measure(cfg, model, tokenizer, tests, val_rows):
    """({"val_loss", "tasks": accuracy by task}, a sample of completions)."""
    tasks, completions = accuracy_by_task(model, tokenizer, tests, cfg.max_new_tokens)
    found = {"val_loss": validation_loss(model, val_rows), "tasks": tasks}
    return found, sample_by_task(tests, completions)


def main(cfg):
    rt = start(cfg.device, cfg.dtype, cfg.seed)
    check_folders(cfg.out, *cfg.folders, cfg.init)
    teachers, tokenizer = open_teachers(cfg, rt)
    models = [each for each in teachers if isinstance(each, GPT)]  # which give probabilities
    student, tokenizer = open_student(cfg, models, tokenizer)
    T = min(cfg.context, *(m.cfg.max_position_embeddings for m in (*models, student)))
    labelled, others, val, tests = load_examples(cfg)
    completed = teacher_completions(cfg, rt, teachers, tokenizer, labelled, others)
    train_rows, val_rows = pack_rows(cfg, rt, tokenizer, T, labelled, completed, val)
    prompts = [chat_prompt(example, tokenizer) for example in labelled + completed]
    prompts = [prompt for prompt in prompts if len(prompt) < T]
    if cfg.cache_top_k and cfg.method in CACHED:
        V = min(model.cfg.vocab_size for model in (*models, student))
        train_rows = with_top_k(train_rows, models, cfg.cache_top_k, V, cfg.temperature)

    share, run = rt.share(cfg.batch_size), Run(cfg, rt)
    if rt.main and completed:
        write_completions(completed, run.folder / "teacher.jsonl")
    student.compute_dtype = rt.dtype
    ddp_model = rt.prepare(Outputs(student), cfg.compile)
    student.model.checkpoint_activations = cfg.checkpoint_activations
    optimizer = build_optimizer(student, cfg, rt.scaler)
    schedule, sampler = SCHEDULES[cfg.schedule], Sampler(len(train_rows), cfg.seed)
    prompt_sampler = Sampler(len(prompts), cfg.seed + 1)
    known = run.restore(student, optimizer, sampler, prompt_sampler)
    if not known:
        names = [f"teacher {name}" for name in cfg.folders]
        for name, model in zip([*names, "before"], [*models, student]):
            known[name] = measure(cfg, model, tokenizer, tests, val_rows)[0]

    while run.step < cfg.steps:
        begun = cfg.method == "on_policy" and run.step >= ON_POLICY_START * cfg.steps
        if begun and random.random() < cfg.on_policy_share:
            numbers = prompt_sampler.take(2 * cfg.batch_size)  # about as many tokens as in rows
            chosen, seed = [prompts[i] for i in numbers], cfg.seed + run.step
            rows = own_completions(cfg, rt, student, tokenizer, chosen, seed)
        else:
            rows = train_rows[sampler.take(cfg.batch_size)[share]]
        rows = rows.to(rt.device)
        masks = rows.mask, rows.labelled, rows.rationale
        counts = [rt.sum(mask.sum()) for mask in masks]  # tokens of each kind in the whole batch
        loss = 0.0
        for part in rt.micro_batches(rows, cfg.accumulate, ddp_model):
            loss += rt.backward(distillation_loss(cfg, ddp_model, models, part, *counts))
        grad_norm = optimizer.step(schedule(run.step, cfg.steps, cfg.warmup), cfg.grad_clip)
        run.advance(counts[0], loss=rt.sum(loss), grad_norm=grad_norm, lr=optimizer.lr)

        if run.due(cfg.eval_every):
            known["after"], sample = measure(cfg, student, tokenizer, tests, val_rows)
            accuracy = mean_accuracy(known["after"]["tasks"])
            run.evaluated(val_loss=known["after"]["val_loss"], val_accuracy=accuracy)
            run.write_sample(sample)
            run.export(save_model, student, tokenizer)
            run.checkpoint(**known)
    run.close("loss", "val_loss", "val_accuracy", y_label="nats per token, or share")
    finish(rt, run, known, models, student)


def finish(rt, run, known, models, student):
    """Print what the student has learnt, and keep it in result.json."""
    parameters, *of_teachers = (count_parameters(model)[0] for model in (student, *models))
    sizes = {"parameters": parameters, "teacher_parameters": sum(of_teachers)}
    rt.print("{parameters:,} parameters, the teacher has {teacher_parameters:,}".format(**sizes))
    accuracy = {name: mean_accuracy(each["tasks"]) for name, each in known.items()}
    before, after = accuracy.pop("before"), accuracy.pop("after")
    if after is None:  # nothing to ask
        losses = known["before"]["val_loss"], known["after"]["val_loss"]
        effects = [effect("loss on held-out labels", *losses, "nats per token", False)]
    else:
        rt.print(accuracy_table({name: each["tasks"] for name, each in known.items()}))
        effects = [effect("right answers to held-out questions", before, after, "share")]
    if best := max(filter(None, accuracy.values()), default=None):
        shares = before / best, after / best
        effects.append(effect("share of the teacher's accuracy", *shares, "share"))
    run.write_result(effects, method=run.cfg.method, **sizes, **known)
    rt.close()


if __name__ == "__main__":
    cli(main, Config, PRESETS)
