"""Distillation's losses: against trl, against slow loops, and numbers that a person can check."""

import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from distill import (
    Counts,
    cache_top_k,
    coarse,
    every_other_layer,
    forward_kl,
    generalised_jsd,
    hidden_cosine_loss,
    label_loss,
    probabilities,
    reverse_kl,
    soft_loss,
    step_by_step_loss,
    tempered,
)
from nanollm.distillation import make_lessons, rationale_of, read_lessons, tokenize
from nanollm.gpt import document_mask
from nanollm.teacher import filtered, write_answers


def logits(seed=0, shape=(3, 7, 11), spread=2.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logp(*probabilities):
    return torch.tensor(probabilities).log()


# --- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_jsd_equals_trl_with_masks_and_temperature(beta, temperature):
    student, teacher = logits(1), logits(2)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    labels = torch.where(mask, 5, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)
    both = tempered(student, temperature), tempered(teacher, temperature)
    ours = (generalised_jsd(*both, beta) * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_gradients_of_jsd_equal_trls(beta):
    teacher, grads = logits(2), []
    for loss in (
        lambda x: GKDTrainer.generalized_jsd_loss(x, teacher, beta=beta, reduction="sum"),
        lambda x: generalised_jsd(tempered(x), tempered(teacher), beta).sum(),
    ):
        student = logits(1).requires_grad_()
        loss(student).backward()
        grads.append(student.grad)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_kl_of_a_sure_teacher_and_an_undecided_student_is_a_bit():
    student, teacher = logp(0.5, 0.5), tempered(torch.tensor([100.0, 0.0]))
    assert forward_kl(student, teacher).item() == pytest.approx(math.log(2))
    assert reverse_kl(teacher, student).item() == pytest.approx(math.log(2))


def test_forward_and_reverse_kl_by_hand():
    student, teacher = logp(0.25, 0.75), logp(0.5, 0.5)
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert forward_kl(student, teacher).item() == pytest.approx(forward)
    assert reverse_kl(student, teacher).item() == pytest.approx(reverse)


def test_kl_equals_a_slow_loop():
    student, teacher = tempered(logits(1, (4, 5))), tempered(logits(2, (4, 5)))
    for n in range(4):
        q, p = student[n].exp().tolist(), teacher[n].exp().tolist()
        loop = sum(b * math.log(b / a) for a, b in zip(q, p))
        assert forward_kl(student, teacher)[n].item() == pytest.approx(loop, abs=1e-5)


def test_nothing_diverges_from_itself():
    same = tempered(logits())
    for divergence in (forward_kl, reverse_kl, generalised_jsd):
        torch.testing.assert_close(divergence(same, same), torch.zeros(3, 7), atol=1e-6, rtol=0)


def test_jsd_is_symmetric_in_the_middle_and_at_most_a_bit():
    a, b = tempered(logits(1, spread=20.0)), tempered(logits(2, spread=20.0))
    torch.testing.assert_close(generalised_jsd(a, b), generalised_jsd(b, a))
    assert 0.3 < generalised_jsd(a, b).max() <= math.log(2) + 1e-6


def test_towards_its_ends_jsd_becomes_the_two_kls():
    a, b = (logits(seed, (6, 5)).double().log_softmax(-1) for seed in (1, 2))
    for beta, limit in ((1e-4, forward_kl), (1 - 1e-4, reverse_kl)):
        scaled = generalised_jsd(a, b, beta) / (beta * (1 - beta))
        torch.testing.assert_close(scaled, limit(a, b), rtol=0.01, atol=1e-3)
        end = generalised_jsd(a, b, round(beta))
        torch.testing.assert_close(end, limit(a, b))


# --- the losses of a batch -----------------------------------------------------------------------


def test_temperature_squared_keeps_the_size_of_gradients():
    """At a high temperature tau^2 times the gradient of KL is (z_S - z_T) / V for logits of mean
    zero, whatever tau (Hinton et al. 2015, eq. 4).
    """
    student, teacher = (x - x.mean() for x in (logits(1, (1, 8), 1.0), logits(2, (1, 8), 1.0)))
    for temperature in (1e3, 3e3):
        wanted = student.double().requires_grad_()
        log_ps, log_pt = ((x / temperature).log_softmax(-1) for x in (wanted, teacher.double()))
        none, counts = torch.zeros(1), Counts(1, 0, 0)
        loss = soft_loss(forward_kl(log_ps, log_pt), none, none, counts, 1.0, temperature)
        loss.backward()
        expected = (student - teacher).double() / 8
        torch.testing.assert_close(wanted.grad, expected, atol=1e-3, rtol=0)


def test_soft_loss_by_hand():
    divergence, ce = torch.tensor([0.1, 0.3]), torch.tensor([1.0, 3.0])
    labelled, counts = torch.tensor([True, False]), Counts(2, 1, 0)
    loss = soft_loss(divergence, ce, labelled, counts, alpha=0.75, temperature=2.0)
    assert loss.item() == pytest.approx(0.75 * 4 * 0.2 + 0.25 * 1.0)


def test_only_labels_count_as_labels():
    ce, labelled = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True])
    assert label_loss(ce, labelled, Counts(3, 2, 0)).item() == 2.0
    assert label_loss(ce, torch.zeros(3, dtype=torch.bool), Counts(3, 0, 0)).item() == 0.0


def test_a_rationale_weighs_as_much_as_its_weight_says_however_long_it_is():
    ce = torch.tensor([1.0, 2.0, 3.0, 7.0])
    labelled, rationale = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False])
    for weight, total in ((0.0, 7.0), (1.0, 9.0), (0.5, 8.0)):
        loss = step_by_step_loss(ce, labelled, rationale, Counts(4, 4, 3), weight)
        assert loss.item() == pytest.approx(total)


def test_parts_of_a_batch_add_up_to_the_whole():
    divergence, ce = torch.rand(6), torch.rand(6)
    labelled, counts = torch.tensor([True, True, False, False, True, False]), Counts(6, 3, 0)
    whole = soft_loss(divergence, ce, labelled, counts, 0.5, 2.0)
    parts = [
        soft_loss(divergence[p], ce[p], labelled[p], counts, 0.5, 2.0)
        for p in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_cosine_loss_sees_the_direction_alone():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[9.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert hidden_cosine_loss(a, b).tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_cosine_loss_equals_torchs():
    a, b = logits(1, (5, 8)), logits(2, (5, 8))
    theirs = torch.nn.CosineEmbeddingLoss(reduction="none")(a, b, torch.ones(5))
    torch.testing.assert_close(hidden_cosine_loss(a, b), theirs, atol=1e-6, rtol=1e-5)


# --- the cache -----------------------------------------------------------------------------------


def test_coarse_probabilities_sum_to_one_and_keep_the_chosen():
    logprobs, ids = logp(0.5, 0.2, 0.2, 0.1)[None], torch.tensor([[0, 3]])
    assert coarse(logprobs, ids).exp()[0].tolist() == pytest.approx([0.5, 0.1, 0.4])


def test_coarse_kl_never_exceeds_the_whole_and_reaches_it_with_k():
    student, teacher = tempered(logits(1, (50, 30))), tempered(logits(2, (50, 30)))
    whole, before = forward_kl(student, teacher), torch.zeros(50)
    for K in (1, 4, 16, 29):
        ids = teacher.topk(K).indices
        kl = forward_kl(coarse(student, ids), coarse(teacher, ids))
        assert (kl >= before - 1e-5).all() and (kl <= whole + 1e-5).all()
        before = kl
    torch.testing.assert_close(before, whole, atol=1e-5, rtol=1e-5)


def test_coarse_kl_keeps_a_gradient_for_every_token():
    student = logits(1, (4, 30)).requires_grad_()
    teacher = tempered(logits(2, (4, 30)))
    ids = teacher.topk(3).indices
    forward_kl(coarse(tempered(student), ids), coarse(teacher, ids)).sum().backward()
    assert student.grad.isfinite().all() and (student.grad != 0).all()


def test_the_cache_holds_what_the_teacher_says(tokenizer, random_model):
    teacher = random_model()
    words = ("abc", "def", "g", "hi")
    chats = [{"messages": [{"role": "user", "content": w}], "completion": w * 2} for w in words]
    lessons = make_lessons(tokenize(chats, True, tokenizer, 32), 32, tokenizer)
    assert len(lessons) > 1
    cache = cache_top_k(teacher, lessons, 5, 270, 2.0, batch=1)
    for numbers in (torch.arange(len(lessons)), torch.tensor([1, 0])):
        whole, _ = probabilities(teacher, lessons.select(numbers), 270, 2.0)
        kept, ids = cache.rows(numbers, "cpu")
        assert ids.shape == (len(whole), 5)
        torch.testing.assert_close(kept, coarse(whole, ids.long()))
    whole, _ = probabilities(teacher, lessons, 270, 2.0)
    rows = lessons.rows
    plain = teacher(rows.tokens, rows.positions, document_mask(rows.documents))
    expected = (plain[lessons.where()] / 2).log_softmax(-1)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


# --- data ----------------------------------------------------------------------------------------


def test_a_rationale_is_what_stands_between_the_marks(tokenizer):
    chat = {"messages": [{"role": "user", "content": "q"}], "completion": "<think>ab</think>c"}
    [(prompt, completion, _)] = tokenize([chat], True, tokenizer, 64)
    assert rationale_of(completion, tokenizer) == [True] * 4 + [False] * 2  # the answer, its end
    lessons = make_lessons([(prompt, completion, True)], 64, tokenizer)
    assert lessons.rationale.sum() == 4 and lessons.rows.mask.sum() == 6
    assert lessons.labelled.equal(lessons.rows.mask)


def test_answers_of_the_teacher_are_no_labels(tokenizer):
    chats = [
        {"messages": [{"role": "user", "content": "q"}], "completion": r} for r in ("yes", "no")
    ]
    examples = tokenize(chats[:1], True, tokenizer, 64) + tokenize(chats[1:], False, tokenizer, 64)
    lessons = make_lessons(examples, 64, tokenizer)
    said = {False: "no<|end|>", True: "yes<|end|>"}
    for labelled, text in said.items():
        chosen = lessons.rows.mask & (lessons.labelled == labelled)
        assert tokenizer.decode(lessons.rows.tokens[chosen]) == text


def test_a_dialogue_trains_on_its_last_answer_only(tokenizer):
    turns = [("user", "a"), ("assistant", "first"), ("user", "b")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns], "completion": "second"}
    [(prompt, completion, _)] = tokenize([record], True, tokenizer, 64)
    assert "first" in tokenizer.decode(prompt) and tokenizer.decode(completion) == "second<|end|>"


def test_the_checker_filters_and_every_answer_is_counted():
    def said(completion, right, prompt="q"):
        return {
            "messages": [{"role": "user", "content": prompt}],
            "completion": completion,
            "right": right,
        }

    answers = [said("1", True), said("1", True), said("2", False), said("?", None, "open")]
    kept, counts = filtered("hard", answers)
    assert [r["completion"] for r in kept] == ["1", "?"]
    assert counts == (
        "1 found wrong by the checker, 1 equal to another, 2 kept, 1 of them unchecked: no answer "
        "is known"
    )
    assert [r["completion"] for r in filtered("soft", answers)[0]] == ["1", "2", "?"]


def test_kept_answers_are_read_again_as_they_were_written(tmp_path):
    record = {"messages": [{"role": "user", "content": "q"}], "completion": "<think>x</think>1"}
    path = tmp_path / "teacher.jsonl"
    write_answers([record], path)
    assert read_lessons(path) == [record]


# --- compression ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_compressed_student_has_every_other_layer(tied, random_model):
    teacher = random_model(num_hidden_layers=5, tie_word_embeddings=tied)
    student = every_other_layer(teacher)
    assert student.cfg.num_hidden_layers == 3
    own, other = student.state_dict(), teacher.state_dict()
    for name, value in own.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(2 * int(parts[2]))
        torch.testing.assert_close(value, other[".".join(parts)], atol=0, rtol=0)
