"""Losses and estimators of reward model, DPO and PPO, beside trl and beside slow, obvious loops."""

import math
import random
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SMALL, randomise
from helpers import close, some_prompts, turns
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

import train_dpo
import train_ppo
import train_rm
from data.village.preferences import (
    annotate,
    composed_completion,
    gold_parts,
    preference_prompts,
    rank_completions,
    temperature_for,
    wrong_completion,
)
from data.village.tasks import instructions, user_turns
from data.village.world import build_world
from nanollm.batches import pad_completions
from nanollm.gpt import GPTConfig, ScalarGPT
from nanollm.hub import load_scalar, save_model
from nanollm.logprobs import completion_logprobs
from nanollm.preferences import completion_rows, pair_index, scores, win_rate
from nanollm.rewards import check_answer
from nanollm.rollouts import whiten

LOG2 = math.log(2)


def trainer(**attributes):
    """Stands in for `self` in an unbound method of trl."""
    alone = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    metrics = defaultdict(lambda: defaultdict(list))
    me = MagicMock(accelerator=alone, _metrics=metrics, **attributes)
    me.model.training = False
    return me


# --- reward model --------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [False, True])
def test_bradley_terry_margin_and_centering_equal_trl(margin):
    chosen, rejected, m = torch.randn(3, 7)
    model = MagicMock(return_value=SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]))
    me = trainer(args=SimpleNamespace(center_rewards_coefficient=0.01))
    theirs = RewardTrainer.compute_loss(me, model, {"margin": m} if margin else {})
    ours = train_rm.bradley_terry_loss(chosen, rejected, m if margin else 0.0)
    rewards = torch.stack([chosen, rejected], 1)
    centering = train_rm.centering_loss(rewards, torch.ones(7, 2, dtype=torch.bool))
    close((ours + 0.01 * centering).mean(), theirs)


def test_ranking_loss_equals_a_loop_over_pairs_and_for_two_completions_bradley_terry():
    rewards, sizes = torch.randn(5, 4), [4, 2, 3, 4, 2]
    real = torch.arange(4) < torch.tensor(sizes)[:, None]
    for row, K, loss in zip(rewards, sizes, train_rm.ranking_loss(rewards, real, torch.zeros(5))):
        pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
        close(loss, -sum(F.logsigmoid(row[i] - row[j]) for i, j in pairs) / len(pairs))
    two, margins = torch.ones(5, 2, dtype=torch.bool), torch.rand(5)
    losses = train_rm.ranking_loss(rewards[:, :2], two, margins)
    close(losses, train_rm.bradley_terry_loss(rewards[:, 0], rewards[:, 1], margins))


def test_pair_metrics_count_by_annotators_and_by_gold():
    rewards, golds = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([1, 0, 0.5])
    metrics = train_rm.pair_metrics(rewards, pair_index(torch.tensor([[0, 1, 2]])), golds)
    assert metrics["accuracy"] == pytest.approx(1 / 3)  # of 2 > 1, 2 > 3, 1 > 3 the first
    assert metrics["gold_accuracy"] == pytest.approx(2 / 3)  # 0 > 1, 0 > 2, 2 > 1: 2 > 1, 3 > 1
    assert metrics["annotators_accuracy"] == pytest.approx(2 / 3)


def scalar_model(**changes):
    return randomise(ScalarGPT(GPTConfig(**SMALL | changes))).eval()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_rewards_are_read_where_transformers_reads_them_and_survive_a_folder(
    qk_norm, tokenizer, tmp_path
):
    model = scalar_model(qk_norm=qk_norm)
    model.shift = 0.75
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    rows = pad_completions([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]], tokenizer.pad_id)
    mine = scores(model, rows)
    close(mine + 0.75, theirs(rows.tokens, attention_mask=rows.real.long()).logits[:, 0])
    close(scores(load_scalar(tmp_path)[0], rows), mine)


RANKINGS = [
    {"messages": turns("a"), "completions": ["b", "c"]},
    {"messages": turns("b"), "completions": ["d", "e", "f"]},
]


def test_rankings_become_rows_and_pairs(tokenizer):
    _, rows, index = completion_rows(RANKINGS, tokenizer)
    assert index.tolist() == [[0, 1, -1], [2, 3, 4]] and len(rows) == 5
    assert tokenizer.decode(rows.tokens[3][rows.mask[3]].tolist()[:-1]) == "e"
    assert pair_index(index).tolist() == [[0, 1], [2, 3], [2, 4], [3, 4]]
    assert train_dpo.best_and_worst(index).tolist() == [[0, 1], [2, 4]]


def test_margins_are_the_records_or_follow_from_its_ratings():
    records = [RANKINGS[0] | {"margin": 2.0}, RANKINGS[1] | {"ratings": [7, 1, 4]}]
    assert train_rm.margins_of(records).tolist() == [2.0, 1.0, 0.5, 0.0]


def test_in_kto_a_prompt_meets_the_completions_of_another_as_far_as_the_context_holds_them():
    rows = pad_completions([[1], [1], [2, 2], [2, 2]], [[3], [4, 5, 6], [7], [8, 9]], pad_id=0)
    mismatched = train_dpo.mismatched_rows(rows, K=2, context=4)
    assert mismatched.tokens.tolist() == [[1, 7, 0, 0], [1, 8, 9, 0], [2, 2, 3, 0], [2, 2, 4, 5]]
    assert mismatched.mask.sum(1).tolist() == [1, 2, 1, 2]


# --- DPO and its relatives -----------------------------------------------------------------------

P = 6
N_W, N_L = torch.tensor([3, 5, 2, 7, 4, 1]), torch.tensor([4, 2, 6, 1, 3, 5])


def four_logps():
    """Of the policy and of the reference, chosen and rejected each."""
    return -10 * torch.rand(4, P)


def our_loss(loss, logps, kl=0.0, **settings):
    cfg = train_dpo.Config(loss=loss, **settings)
    return train_dpo.LOSSES[loss](train_dpo.Logps(*logps, N_W, N_L, kl), cfg)


def per_token_of(logps):
    """Logprobs of the tokens of all chosen, then of all rejected completions, here of the last."""
    per_token = torch.zeros(2 * P, 7)
    per_token[:, -1] = torch.cat([logps[0], logps[1]])
    return per_token


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo"])
def test_dpo_losses_equal_trl(loss):
    logps = four_logps()
    lengths, per_token = torch.cat([N_W, N_L])[:, None], per_token_of(logps)
    ones = torch.ones(2 * P, 8, dtype=torch.long)
    outputs = {"entropy": 0 * per_token, "mean_logits": 0 * per_token, "is_top1": per_token > 0}
    model = MagicMock(return_value=SimpleNamespace(log_probs=per_token, **outputs))
    me = trainer(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        beta=0.1,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        label_smoothing=0.15 if loss == "robust" else 0.0,
        use_weighting=False,
    )
    inputs = {
        "input_ids": ones,
        "completion_mask": (torch.arange(8) >= 8 - lengths).long(),
        "attention_mask": ones,
        "ref_chosen_logps": logps[2],
        "ref_rejected_logps": logps[3],
    }
    theirs = DPOTrainer._compute_loss(me, model, inputs, return_outputs=False)
    close(our_loss(loss, logps, beta=0.1).mean(), theirs)


def test_cdpo_and_simpo_equal_trls_cpo_loss():
    logps = c, j, ref_c, ref_j = four_logps()
    me = trainer(alpha=0.0, beta=0.1, label_smoothing=0.15, loss_type="sigmoid")
    close(our_loss("cdpo", logps, beta=0.1), CPOTrainer.cpo_loss(me, c - ref_c, j - ref_j)[0])
    me = trainer(alpha=0.0, beta=2.0, label_smoothing=0.0, loss_type="simpo", simpo_gamma=0.5)
    close(our_loss("simpo", logps, beta=2.0), CPOTrainer.cpo_loss(me, c / N_W, j / N_L)[0])


def test_orpo_equals_trls_odds_ratio_beside_the_likelihood():
    logps = four_logps()
    c, j = logps[0] / N_W, logps[1] / N_L
    theirs = ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), c, j)[0]  # + lambda log sigmoid
    close(our_loss("orpo", logps), -c - theirs)


def test_kto_and_its_kl_equal_trl(monkeypatch):
    logps, (ref_kl, policy_kl) = four_logps(), (-10 * torch.rand(2, 2 * P)).sort(0)[0]
    model = MagicMock(return_value=MagicMock(log_probs=per_token_of(logps)))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    ones = torch.ones(2 * P, 8, dtype=torch.long)
    me = trainer(
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.1,
        _compute_kl_logps=lambda model, batch: policy_kl,
        **weights,
    )
    inputs = {
        "label": torch.tensor([True] * P + [False] * P),
        "ref_KL_logps": ref_kl,
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": ones,
        "ref_logps": torch.cat([logps[2], logps[3]]),
    }
    theirs = KTOTrainer._compute_loss(me, model, inputs, return_outputs=False)
    rows = pad_completions([[]] * 2 * P, [[i] for i in range(2 * P)], pad_id=0)
    monkeypatch.setattr(train_dpo, "summed_logps", lambda _, rows: policy_kl[rows.tokens[:, 0]])
    index = torch.arange(2 * P).view(P, 2)
    pairs, policy = train_dpo.Pairs(rows, index, None, rows, ref_kl), SimpleNamespace(device="cpu")
    kl = train_dpo.kto_z(policy, pairs)
    close(our_loss("kto", logps, kl, beta=0.1, **weights).mean() / 2, theirs)


# --- PPO -----------------------------------------------------------------------------------------


def test_rewards_gae_and_whitening_equal_slow_loops():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    logprobs, ref, values = torch.randn(3, *mask.shape)
    score, beta, gamma, lam = torch.randn(len(mask)), 0.3, 0.9, 0.8
    rewards = train_ppo.token_rewards(logprobs, ref, score, mask, beta)
    advantages, returns = train_ppo.gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        columns = mask[b].nonzero()[:, 0].tolist()
        R = [-beta * (logprobs[b, t] - ref[b, t]) for t in columns]
        R[-1] = R[-1] + score[b]
        close(rewards[b, columns], torch.stack(R))
        V = [values[b, t] for t in columns] + [torch.tensor(0.0)]
        delta = [R[n] + gamma * V[n + 1] - V[n] for n in range(len(columns))]
        for k, t in enumerate(columns):
            A = sum((gamma * lam) ** (n - k) * delta[n] for n in range(k, len(columns)))
            close(advantages[b, t], A)
            close(returns[b, t], A + V[k])
    assert (rewards[~mask] == 0).all() and (advantages[~mask] == 0).all()
    seen, white = advantages[mask], whiten(advantages, mask)
    close(white[mask], (seen - seen.mean()) / seen.std(unbiased=False), 1e-4)


def test_without_a_critic_the_baseline_is_the_mean_of_the_others():
    rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0], [0.0, 5.0]]), torch.ones(4, 2)
    whole = train_ppo.baseline_advantages(rewards, mask.bool(), 1)
    close(whole[:, 1], [1 - 13 / 3, 3 - 11 / 3, 5 - 3.0, 5 - 3.0])
    groups = train_ppo.baseline_advantages(rewards, mask.bool(), 2)
    close(groups[:, 0], [-2.0, 2.0, 0.0, 0.0])
    twice = train_ppo.baseline_advantages(rewards, mask.bool(), 1, lambda x: 2 * x)  # two processes
    close(twice[:, 1], [1 - 27 / 7, 3 - 25 / 7, 5 - 23 / 7, 5 - 23 / 7])


def test_policy_and_value_losses_by_hand():
    rho = torch.tensor([1.5, 1.5, 0.5, 0.5])
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    close(train_ppo.policy_loss(rho.log(), torch.zeros(4), A, 0.2), [-1.2, 1.5, -0.5, 0.8])
    assert train_ppo.policy_loss(A, A, A, 0.2).tolist() == (-A).tolist()  # ratio 1, exactly
    V, old, G = torch.tensor([2.0, 0.1]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0])
    close(train_ppo.value_loss(V, old, G, 0.2), [0.5 * 1.8**2, 0.5 * 0.9**2])


def test_the_kl_controller_by_hand():
    # 10% too much: beta * (1 + 0.1 * 100 / 1000); clipped at 20%; without a target
    close(train_ppo.adapted_beta(0.1, 6.6, 100, 6.0, 1000), 0.101)
    close(train_ppo.adapted_beta(0.1, 60.0, 100, 6.0, 1000), 0.102)
    assert train_ppo.adapted_beta(0.1, 60.0, 100, 0.0, 1000) == 0.1


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    G, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    close(train_ppo.explained_variance(G, G, mask), 1.0)
    close(train_ppo.explained_variance(torch.zeros(3, 4), G, mask), 0.0)


def test_entropy_comes_with_the_logprobs_and_where_nothing_is_said_both_are_zero(random_model):
    policy = random_model()
    rows = pad_completions(some_prompts((3, 6, 2, 5)), some_prompts((4, 2, 9, 5)), pad_id=0)
    logprobs, entropy = completion_logprobs(policy, rows, temperature=0.7, with_entropy=True)
    trained = rows.mask[:, 1:]
    logp = (policy(rows.tokens)[:, :-1] / 0.7).log_softmax(-1)
    close(entropy[trained], -(logp.exp() * logp).sum(-1)[trained])
    close(logprobs[trained], logp.gather(-1, rows.tokens[:, 1:, None])[..., 0][trained])
    assert (logprobs[~trained] == 0).all() and (entropy[~trained] == 0).all()


# --- the village's preferences -------------------------------------------------------------------

WORLD = build_world(32, 0)
EXAMPLE = {
    "answer": "goat",
    "check": "contains",
    "not": ["cat", "hen"],
    "attribute": "pet",
    "reference": "Mira keeps a goat.",
}


@pytest.mark.parametrize(
    "completion, gold",
    [
        ("Mira keeps a goat. I hope that helps.", 1.0),
        ("Mira keeps a goat.", 0.7),
        ("Mira keeps a goat. Now leave me alone.", 0.4),
        ("Gladly! Mira keeps a hen.", 0.5),
        ("Mira keeps a hen. Stop asking.", -0.1),
        ("Mira keeps a goat. " + "I like to talk. " * 9, 0.5),
    ],
)
def test_gold_by_hand(completion, gold):
    assert gold_parts(EXAMPLE, completion)["gold"] == pytest.approx(gold)


def test_annotators_prefer_as_often_as_the_model_says_and_disagree_at_the_stated_rate():
    golds, temperature, rng = [0.9, 0.4, 0.7], 0.3, random.Random(0)
    orders = [annotate(golds, temperature, rng)[0] for _ in range(4000)]
    for i, j in ((0, 1), (0, 2), (2, 1)):
        share = sum(order.index(i) < order.index(j) for order in orders) / len(orders)
        p = 1 / (1 + math.exp(-(golds[i] - golds[j]) / temperature))
        assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / len(orders))
    rows = [[rng.random() for _ in range(4)] for _ in range(500)]
    temperature, wrong, pairs = temperature_for(rows, 0.15), 0, 0
    for row in rows:
        order, _ = annotate(row, temperature, rng)
        wrong += sum(row[a] < row[b] for k, a in enumerate(order) for b in order[k + 1 :])
        pairs += 6
    assert wrong / pairs == pytest.approx(0.15, abs=0.02)


def test_no_held_out_prompt_is_in_training():
    examples = instructions(WORLD, "train") + preference_prompts(WORLD, "train", 3000)
    held_out = set(map(user_turns, preference_prompts(WORLD, "test", 400)))
    assert len(held_out) == 400 and not held_out & set(map(user_turns, examples))


def test_references_are_right_and_wrong_completions_are_wrong():
    rng = random.Random(0)
    for example in preference_prompts(WORLD, "test", 200):
        assert check_answer(example, example["reference"])
        assert not check_answer(example, wrong_completion(example, rng))
        assert -0.11 <= gold_parts(example, composed_completion(example, rng))["gold"] <= 1


def test_annotators_rank_what_a_model_says_beside_composed_completions():
    prompts = preference_prompts(WORLD, "test", 20)
    said = [["I don't know. ", "I don't know.", "", "so"]] * 10 + [[]] * 10
    rankings = rank_completions(prompts, said, 4, 0.15, "seed")
    assert rankings == rank_completions(prompts, said, 4, 0.15, "seed")
    for prompt, own, ranking in zip(prompts, said, rankings):
        texts = ranking["ranking"]
        assert len({*texts}) == 4 and {text.strip() for text in own} - {""} <= {*texts}
        golds = [gold_parts(prompt, text)["gold"] for text in texts]
        assert ranking["gold"] == pytest.approx(golds, abs=1e-4)
        assert max(ranking["ratings"]) <= 7 and ranking["messages"] == prompt["messages"]


def test_win_rates_of_both_orders_add_up_to_one():
    a, b = [0.7, 1.0, 0.4, 0.4], [0.7, 0.4, 1.0, 0.1]
    assert win_rate(a, b) == 0.625 and win_rate(a, b) + win_rate(b, a) == 1
