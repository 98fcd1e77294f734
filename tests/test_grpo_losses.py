"""Losses and advantages of GRPO and its relatives, beside trl and beside slow, obvious loops."""

import copy
import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SMALL
from helpers import close, turns
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

import train_grpo
from nanollm.batches import pad_completions
from nanollm.formats import write_jsonl
from nanollm.gpt import GPT, GPTConfig
from nanollm.optim import Optimizer
from nanollm.rollouts import TEMPLATES
from nanollm.runtime import Runtime
from train_grpo import VARIANTS, Config, Prompts, Rollout, Sizes, sample_rollout

LOSSES = list(VARIANTS)
IN_THE_LOSS = [name for name in LOSSES if not VARIANTS[name].kl_in_reward]
CPU = Runtime(torch.device("cpu"), torch.float32)


def tiny():
    model = GPT(GPTConfig(**SMALL)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    return model


def ragged(B=16, T=9):
    """A mask with one run of True per row; in the first row a tool has written in between."""
    start = torch.randint(0, T // 2, (B, 1))
    length = torch.randint(1, T // 2 + 1, (B, 1))
    columns = torch.arange(T)
    mask = (columns >= start) & (columns < start + length)
    mask[0] = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    return mask


def batch(spread):
    """Logprobs, those of sampling, an advantage per answer, a mask, what to divide by; a reference.

    What stands where the mask is False is no zero, so that nothing can lean on it.
    """
    mask = ragged()
    old, ref = -3 * torch.rand(2, *mask.shape)
    logprobs = (old + spread * torch.randn(mask.shape)).requires_grad_()
    sizes = Sizes(len(mask), mask.sum().item(), 9)
    return logprobs, old, torch.randn(len(mask), 1), mask, sizes, ref


def loss_of(name, logprobs, old, A, mask, sizes, penalty=0.0, clip=None):
    """The loss of a variant, with its paper's clip range where no other is given."""
    variant = VARIANTS[name]
    rho = variant.ratio(logprobs - old, mask)
    return variant.loss(logprobs, rho, A, mask, sizes, clip or variant.clip, penalty)


def equal(ours, theirs, logprobs):
    """The same value, and the same gradient of the logprobs."""
    close(ours, theirs)
    gradients = (torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (ours, theirs))
    close(*gradients)


# --- beside trl ----------------------------------------------------------------------------------


def loss_of_trl(trainer, logprobs, mask, tensors, **attributes):
    """trl's loss, its method unbound, where the model gives these logprobs."""
    alone = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    me = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, logprobs.detach(), None),
        accelerator=alone,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **attributes,
    )
    ids = torch.ones(mask.shape, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1]}
    inputs |= {"completion_ids": ids, "completion_mask": mask.long()} | tensors
    return trainer._compute_loss(me, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.1, 1.5])
@pytest.mark.parametrize("loss", IN_THE_LOSS)
def test_value_and_gradient_equal_trls(loss, spread, beta):
    logprobs, old, A, mask, sizes, ref = batch(spread)
    low, high = VARIANTS[loss].clip
    tensors = {"advantages": A[:, 0], "old_per_token_logps": old, "ref_per_token_logps": ref}
    theirs = loss_of_trl(
        GRPOTrainer,
        logprobs,
        mask,
        tensors | {"num_items_in_batch": mask.sum()},
        loss_type="grpo" if loss == "gspo" else loss,
        beta=beta,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        epsilon_low=low,
        epsilon_high=high + (loss == "cispo"),  # where trl means the weight itself
        max_completion_length=sizes.max_new_tokens,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        _entropy_bonus_enabled=False,
    )
    penalty = beta * train_grpo.kl_k3(logprobs, ref)
    equal(loss_of(loss, logprobs, old, A, mask, sizes, penalty), theirs, logprobs)


@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_value_and_gradient_of_rloo_equal_trls(spread):
    logprobs, old, A, mask, sizes, _ = batch(spread)
    tensors = {"advantages": A[:, 0], "old_logps": (old * mask).sum(1)}
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    theirs = loss_of_trl(RLOOTrainer, logprobs, mask, tensors, **clip)
    equal(loss_of("rloo", logprobs, old, A, mask, sizes), theirs, logprobs)


@pytest.mark.parametrize("longest, buffer", [(100, 20), (10, 10), (5, 1), (8, 0)])
def test_the_overlong_penalty_equals_trls(longest, buffer):
    theirs = get_soft_overlong_punishment(longest, buffer)
    for n in range(longest + 1):
        assert train_grpo.overlong_penalty(n, longest, buffer) == theirs([[1] * n])[0]


# --- advantages ----------------------------------------------------------------------------------


mean, std = statistics.fmean, statistics.stdev
ADVANTAGES = {  # function: (the same for a list, what 1 is worth among 1, 0, 0, 1)
    train_grpo.group_advantages: (
        lambda r: [(x - mean(r)) / (std(r) + 1e-4) for x in r],
        0.5 / (math.sqrt(1 / 3) + 1e-4),  # std: G - 1
    ),
    train_grpo.centred: (lambda r: [x - mean(r) for x in r], 0.5),
    train_grpo.leave_one_out: (
        lambda r: [x - mean(r[:i] + r[i + 1 :]) for i, x in enumerate(r)],
        2 / 3,  # 1 less the mean of 0, 0 and 1
    ),
}


@pytest.mark.parametrize("function", ADVANTAGES)
def test_advantages_equal_hand_numbers_and_a_loop_over_each_group(function):
    by_loop, first = ADVANTAGES[function]
    got = function(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))
    close(got, [[first, -first, -first, first], [0.0] * 4])
    rewards = torch.randn(5, 7)
    close(function(rewards), [by_loop(group) for group in rewards.tolist()])


@pytest.mark.parametrize("function", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1.1])  # wrong or right, in format or not
def test_equal_rewards_give_exactly_zero_advantage_and_are_counted(reward, function):
    for G in (2, 3, 4, 7, 8, 10, 16):
        assert function(torch.full((1, G), reward)).tolist() == [[0.0] * G]
        rollout = rollout_of([[3]] * 2 * G, [[END]] * 2 * G, [reward] * 2 * G)
        assert train_grpo.rollout_stats(rollout, G)["equal_groups"] == 1.0


def reinforce_pp_by_loop(rewards, old, ref, mask, beta):
    """Advantages: reward less beta k1 of what is still to come, whitened."""
    returns = {}
    for b, t in mask.nonzero().tolist():
        columns = mask[b].nonzero()[:, 0].tolist()
        to_come = sum(float(old[b, n] - ref[b, n]) for n in columns if n >= t)
        returns[b, t] = float(rewards[b]) - beta * to_come
    middle, spread = mean(returns.values()), statistics.pstdev(returns.values())
    A = torch.zeros(mask.shape)
    for place, value in returns.items():
        A[place] = (value - middle) / spread
    return A


# --- KL ------------------------------------------------------------------------------------------


def test_k3_is_never_negative_and_zero_where_policy_and_reference_agree():
    logprobs, ref = -5 * torch.rand(2, 1000)
    assert (train_grpo.kl_k3(logprobs, ref) >= 0).all()
    assert (train_grpo.kl_k3(ref, ref) == 0).all()
    close(train_grpo.kl_k3(torch.tensor(0.25).log(), torch.tensor(0.5).log()), 1 - math.log(2))
    logpi, logref = torch.randn(2, 5).log_softmax(-1)  # its mean is the reverse KL
    kl = F.kl_div(logref, logpi, log_target=True, reduction="sum")
    close((logpi.exp() * train_grpo.kl_k3(logpi, logref)).sum(), kl)


def test_k3_in_the_loss_has_the_forward_kls_gradient_and_k1_in_the_reward_the_reverse_kls():
    logits, logref = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(-1)
    logpi = logits.log_softmax(-1)
    pi, ref = logpi.exp().detach(), logref.exp()  # pi is what samples, and has no gradient
    k1, k3 = logpi.detach() - logref, train_grpo.kl_k3(logpi, logref)
    forward = (ref * (logref - logpi)).sum()
    reverse = (logpi.exp() * (logpi - logref)).sum()
    for ours, kl in ((pi * k3).sum(), forward), ((pi * k1 * logpi).sum(), reverse):
        close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, kl)))


# --- losses --------------------------------------------------------------------------------------


# --- update: a tiny policy and answers made up ---------------------------------------------------

N, G, END = 2, 4, SMALL["vocab_size"] - 1


def answers(lengths):
    """Random ids, and the end of the turn."""
    return [[*torch.randint(1, END, (n - 1,)).tolist(), END] for n in lengths]


def rollout_of(prompts, completions, rewards, own=None):
    rows, rewards = pad_completions(prompts, completions, 0, own), torch.tensor(rewards)
    return Rollout(rows, rewards, rewards, torch.ones(len(rows), dtype=torch.bool))


def made_up(rewards=(1.1, 0.0, 0.1, 0.1, 0.0, 1.0, 1.0, 0.1)):
    """Two problems with four answers each, of 1 to 9 tokens; in one a tool has written two ids."""
    prompts = [[3, 4, 5]] * G + [[6, 7, 8, 9, 10]] * G
    completions = answers([4, 9, 1, 6, 7, 3, 8, 2])
    own = [[True] * len(completion) for completion in completions]
    own[1][3:5] = [False, False]
    return rollout_of(prompts, completions, list(rewards), own)


class Watched(Optimizer):
    """SGD that keeps the gradient of every step, all parameters' as one vector."""

    def __init__(self, model, lr):
        super().__init__(torch.optim.SGD(model.parameters(), lr=lr))
        self.model, self.gradients = model, []

    def step(self, factor, grad_clip):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        return super().step(factor, grad_clip)


def update(policy, rollout, ref=None, lr=0.05, **flags):
    """(the updated copy of the policy, gradients of its steps, what was seen, with its tokens)."""
    policy = copy.deepcopy(policy)
    flags = {"samples": G, "max_new_tokens": 9, "grad_clip": 0.0, "accumulate": 1} | flags
    watched = Watched(policy, lr)
    rollout = Rollout(rollout.rows, rollout.rewards, rollout.correct, rollout.ended)  # as new
    with torch.random.fork_rng():
        seen, num_tokens = train_grpo.update(Config(**flags), CPU, policy, ref, watched, rollout)
    return policy, watched.gradients, seen | {"tokens": num_tokens}


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def two_models():
    """A policy, and a reference that differs a little."""
    policy = tiny()
    ref = copy.deepcopy(policy)
    for p in ref.parameters():
        p.data += 0.03 * torch.randn(p.shape)
    return policy, ref


def weights(loss, mask, sizes):
    """What REINFORCE weighs -A grad log pi of each token with, (B, 1)."""
    per_sequence = torch.full((len(mask), 1), 1 / sizes.num_sequences)
    if loss == "dr_grpo":
        return per_sequence / sizes.max_new_tokens
    if loss in ("grpo", "gspo"):
        return per_sequence / mask.sum(1, keepdim=True)
    return per_sequence if loss == "rloo" else torch.full((len(mask), 1), 1 / sizes.num_tokens)


def gradient_by_loop(loss, policy, ref, rollout, beta, temperature, longest=9):
    """REINFORCE's gradient with the advantages of the variant, answer by answer."""
    rows, mask = rollout.rows, rollout.mask
    logprobs, fixed = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for b, n in enumerate(rows.real.sum(1)):
        row = rows.tokens[b : b + 1, :n]
        for model, out in (policy, logprobs), (ref, fixed):
            logp = (model(row)[0, :-1] / temperature).log_softmax(-1)
            out[b, : n - 1] = logp[torch.arange(n - 1), row[0, 1:]]
    old, fixed, rewards = logprobs.detach(), fixed.detach(), rollout.rewards
    if loss == "rloo":
        rewards = rewards - beta * ((old - fixed) * mask).sum(1)
    if loss == "reinforce_pp":
        A = reinforce_pp_by_loop(rewards, old, fixed, mask, beta)
    else:
        by_loop = ADVANTAGES[VARIANTS[loss].advantages][0]
        A = torch.tensor([by_loop(group) for group in rewards.view(N, G).tolist()]).view(-1, 1)
    per_token = -A * logprobs
    if loss in IN_THE_LOSS:
        per_token = per_token + beta * ((fixed - logprobs).exp() - (fixed - logprobs) - 1)
    sizes = Sizes(len(rows), mask.sum().item(), longest)
    total = (weights(loss, mask, sizes) * per_token * mask).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.parameters()))])


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_update_follows_reinforces_gradient(loss, beta):
    (policy, ref), rollout = two_models(), made_up()
    wanted = gradient_by_loop(loss, policy, ref, rollout, beta, 0.7)
    flags = {"loss": loss, "kl_coef": beta, "temperature": 0.7}
    _, gradients, seen = update(policy, rollout, ref if beta else None, **flags)
    close(gradients[0], wanted, 1e-4 * wanted.abs().max().item())
    assert seen["clip_fraction"] == 0.0
    assert seen["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulating_over_parts_changes_nothing(loss):
    (policy, ref), rollout = two_models(), made_up()
    flags = {"loss": loss, "kl_coef": 0.1, "inner_updates": 2, "lr": 0.01}
    whole, gradients, seen = update(policy, rollout, ref, **flags)
    parts, others, seen_in_parts = update(policy, rollout, ref, accumulate=5, **flags)
    for g, other in zip(gradients, others, strict=True):
        close(other, g, 1e-6 * max(1, g.abs().max().item()))
    close(vector(parts), vector(whole), 1e-6)
    assert seen_in_parts == pytest.approx(seen, rel=1e-4, abs=1e-6)
    assert not torch.equal(gradients[0], gradients[1])


SUM = {"messages": [{"role": "user", "content": "2 + 5?"}], "answer": "7", "check": "number"}


@pytest.fixture
def sampled(random_model, tokenizer, monkeypatch):
    """A rollout of a random policy, whose completions are all worth this reward; and the prompt."""

    def make(reward):
        monkeypatch.setattr(train_grpo, "REWARDS", ((1.0, lambda problem, text: reward),))
        cfg = Config(samples=8, max_new_tokens=40)
        policy = random_model(max_position_embeddings=128)
        prompts = Prompts(cfg, CPU, policy, tokenizer, [SUM])
        return sample_rollout(cfg, prompts, [SUM] * 4), prompts.ids(SUM)

    return make


def test_the_end_token_belongs_to_the_completion_and_without_one_there_is_no_reward(
    sampled, tokenizer
):
    rollout, prompt = sampled(1.0)
    rows, each, last = rollout.rows, torch.arange(32), rollout.rows.last()
    assert rows.mask[each, last].all()
    ended = torch.isin(rows.tokens[each, last], torch.tensor(sorted(tokenizer.stop_ids)))
    assert 0 < ended.sum() < 32
    assert rollout.ended.tolist() == ended.tolist() == rollout.rewards.bool().tolist()
    assert not rows.mask[:, : len(prompt)].any()
    assert set(sampled(-1.0)[0].rewards.tolist()) == {-1.0}  # not to end is no way out


def test_what_a_tool_writes_into_a_completion_is_left_out_of_the_mask(random_model, tokenizer):
    prompts = Prompts(Config(samples=4, max_new_tokens=12), CPU, random_model(), tokenizer, [SUM])
    first, state = len(prompts.ids(SUM)), torch.get_rng_state()
    call_end = prompts.sample([SUM]).rows.tokens[0, first].item()  # taken for a call's end
    prompts.tools = SimpleNamespace(call_end=call_end, respond=lambda ids: [65, 66])
    torch.set_rng_state(state)
    rows = prompts.sample([SUM]).rows
    assert rows.tokens[0, first : first + 3].tolist() == [call_end, 65, 66]
    assert rows.mask[0, first : first + 4].tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "loss, ratios, share",
    [
        ("grpo", [[1.5, 1.0], [0.7, 1.1]], 0.5),
        ("dapo", [[1.25, 1.3], [0.9, 1.1]], 0.25),
        ("reinforce_pp", [[1.25, 1.3], [0.7, 1.1]], 0.75),
        ("cispo", [[5.5, 0.1], [7.0, 4.0]], 0.5),  # weights of at most 5
        ("gspo", [[2.0, 0.5], [1.5, 1.5]], 0.5),  # geometric means 1 and 1.5
        ("rloo", [[1.15, 1.15], [1.1, 1.1]], 1.0),  # products 1.32 and 1.21
    ],
)
def test_the_clip_fraction_is_the_share_of_tokens_whose_ratio_the_loss_clips(loss, ratios, share):
    mask, variant = torch.ones(2, 2, dtype=torch.bool), VARIANTS[loss]
    part = SimpleNamespace(mask=mask, ref_logprobs=None)
    rho = variant.ratio(torch.tensor(ratios).log(), mask)
    stats = train_grpo.update_stats(part, 0.0 * mask, rho, Sizes(2, 4, 2), variant.clip)
    assert stats["clip_fraction"] == pytest.approx(share)


def test_entropy_and_kl_are_read_off_the_sampled_tokens():
    (policy, ref), rollout = two_models(), made_up()
    _, _, seen = update(policy, rollout, ref, kl_coef=0.1)
    parts = [torch.arange(8)]
    old, fixed = (train_grpo.batched_logprobs(m, rollout.rows, parts, 1.0) for m in (policy, ref))
    assert seen["entropy"] == pytest.approx(-old[rollout.mask].mean().item(), rel=1e-5)
    assert seen["kl"] == pytest.approx((old - fixed).sum().item() / 8, rel=1e-4)
    assert seen["tokens"] == rollout.mask.sum() == 38


# --- problems ------------------------------------------------------------------------------------


def tasks(count=40):
    names = "add", "subtract", "count", None
    return [
        {"prompt": f"{n}?", "answer": n} | ({"task": names[n % 4]} if names[n % 4] else {})
        for n in range(count)
    ]


@pytest.mark.parametrize("wanted", ["add,subtract,count,all", "add"])
def test_only_the_wanted_tasks_are_kept_and_no_problem_is_in_both_parts(wanted, tmp_path):
    write_jsonl(tmp_path / "p.jsonl", tasks())
    cfg = Config(data=str(tmp_path / "p.jsonl"), tasks=wanted, val_fraction=0.25)
    train, val = train_grpo.load_problems(cfg)
    for part in train, val:
        assert {example["task"] for example in part} == {*wanted.split(",")}
    train, val = ({int(example["answer"]) for example in part} for part in (train, val))
    assert not train & val and max(train) < min(val)


@pytest.mark.parametrize("data", ["village", "tools", "images"])
def test_the_villages_own_problems_come_in_two_files(data, tmp_path, monkeypatch):
    for place in ("examples", "images"):
        monkeypatch.setattr(f"data.village.{place}.of_run", lambda run_folder: tmp_path)
    for part, answer in ("train", "3"), ("test", "4"):
        record = {"prompt": "?", "answer": answer, "task": "sum"}
        write_jsonl(
            tmp_path / f"{'tools' if data == 'tools' else 'problems'}_{part}.jsonl", [record]
        )
    train, val = train_grpo.load_problems(Config(data=data))
    assert [example["answer"] for example in train + val] == ["3", "4"]


# --- templates ------------------------------------------------------------------------------------


def asked(template, tokenizer, question="What is 7 - 3?"):
    return TEMPLATES[template]({"messages": turns(question)}, tokenizer)


def test_a_base_model_reads_a_document_with_an_example_and_the_problem(tokenizer):
    first, *rest = asked("zero", tokenizer)
    assert first == tokenizer.eot_id
    assert tokenizer.decode(rest) == "What is 2 + 3? 2 + 3 = 5. What is 7 - 3?"


def test_the_think_template_describes_the_tags_and_a_question_cannot_forge_them(tokenizer):
    think, ids = tokenizer.special["<think>"], asked("think", tokenizer)
    assert tokenizer.decode(ids).endswith("\nUser: What is 7 - 3?\nAssistant:")
    assert ids.count(think) == asked("think", tokenizer, "What is <think>?").count(think) == 1


def test_the_chat_template_ends_where_the_assistant_begins(tokenizer):
    prompt, _ = tokenizer.render(turns("What is 7 - 3?"), generation_prompt=True)
    assert asked("chat", tokenizer) == prompt
