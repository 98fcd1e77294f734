"""Sampling: parity with transformers and with our own uncached forward, and the laws of samplers."""

import math

import pytest
import torch

from nanollm import generate as module
from nanollm.config import UserError
from nanollm.generate import generate, keep_top_k, keep_top_p, sample, stream
from nanollm.hub import save_model
from nanollm.logprobs import token_logprobs

INF = float("inf")
SHAPES = [{}, {"qk_norm": False, "tie_word_embeddings": False}, {"num_key_value_heads": 4}]


def some_prompts(lengths=(5, 9, 1, 7), V=250, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def slow_greedy(model, prompt, n, stop_ids=()):
    """The obvious loop: the whole sequence anew for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


def fresh_logprobs(model, out, temperature=1.0):
    """Of each row's new tokens, from one uncached forward on its whole sequence without padding."""
    rows = []
    for r in range(len(out.tokens)):
        prompt, new = out.prompts[r][out.prompt_mask[r]], out.tokens[r][out.mask[r]]
        ids = torch.cat([prompt, new])[None]
        with torch.no_grad():
            logprobs = token_logprobs(model(ids[:, :-1]).float() / temperature, ids[:, 1:])[0]
        rows.append(logprobs[len(prompt) - 1 :])
    return rows


# --- greedy ------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_an_uncached_loop_for_prompts_of_different_lengths(shape, random_model):
    model, prompts = random_model(**shape), some_prompts()
    assert generate(model, prompts, 12, temperature=0).lists() == [
        slow_greedy(model, p, 12) for p in prompts
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_transformers_generate(shape, random_model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, prompts = random_model(**shape), some_prompts()
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = generate(
        model, prompts, 12, temperature=0, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
    )
    tokens = theirs.generate(
        ours.prompts, attention_mask=ours.prompt_mask.long(), max_new_tokens=12
    )
    assert torch.equal(ours.tokens, tokens[:, ours.prompts.shape[1] :])


def test_a_stop_token_in_greedy_decoding_pads_as_transformers_does(
    random_model, tokenizer, tmp_path
):
    transformers = pytest.importorskip("transformers")
    model, prompts = random_model(), some_prompts()
    stop = slow_greedy(model, prompts[0], 4)[-1]
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = generate(model, prompts, 12, temperature=0, stop_ids={stop}, pad_id=tokenizer.pad_id)
    tokens = theirs.generate(
        ours.prompts, attention_mask=ours.prompt_mask.long(), max_new_tokens=12, eos_token_id=stop
    )
    assert torch.equal(ours.tokens, tokens[:, ours.prompts.shape[1] :])
    assert ours.mask[0].sum() <= 4


# --- the shape of the result -------------------------------------------------------------------
def test_prompts_are_padded_on_the_left_and_masked(random_model):
    out = generate(random_model(), [[5, 6, 7], [8]], 2, temperature=0, pad_id=3)
    assert out.prompts.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert out.prompt_mask.tolist() == [[True, True, True], [False, False, True]]


def test_each_prompt_is_continued_by_its_own_samples(random_model):
    model, prompts = random_model(), some_prompts()
    out = generate(model, prompts, 6, samples=3, temperature=0)
    assert out.tokens.shape == (12, 6)
    greedy = [slow_greedy(model, p, 6) for p in prompts]
    assert out.lists() == [g for g in greedy for _ in range(3)]
    assert [row[m].tolist() for row, m in zip(out.prompts, out.prompt_mask)] == [
        p for p in prompts for _ in range(3)
    ]


def test_the_samples_of_a_prompt_differ(random_model):
    out = generate(random_model(), [[1, 2]], 8, samples=6, generator=seeded())
    assert len({tuple(row) for row in out.lists()}) == 6


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(random_model):
    def once(seed):
        return generate(random_model(), some_prompts(), 8, samples=2, generator=seeded(seed)).tokens

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


def test_a_row_ends_with_its_stop_token_and_is_padding_after_it(random_model):
    stops = set(range(8))  # 3% of the tokens or so
    out = generate(
        random_model(),
        some_prompts(),
        40,
        samples=8,
        stop_ids=stops,
        pad_id=257,
        generator=seeded(),
    )
    ended = 0
    for tokens, mask, logprobs in zip(
        out.tokens.tolist(), out.mask.tolist(), out.logprobs.tolist()
    ):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert not stops & set(tokens[: length - 1])
        assert tokens[length:] == [257] * (len(tokens) - length)
        assert logprobs[length:] == [0.0] * (len(tokens) - length)
        ended += tokens[length - 1] in stops
    assert 10 < ended < 32  # some by stop token, some by the limit


def test_decoding_ends_when_all_rows_have(random_model):
    model = random_model()
    first = slow_greedy(model, [1, 2, 3], 5)
    out = generate(model, [[1, 2, 3]], 40, samples=2, temperature=0, stop_ids={first[-1]})
    assert out.tokens.shape == (2, 1 + first.index(first[-1]))
    assert out.mask.all()


# --- logprobs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("samples", [1, 3])
def test_logprobs_are_those_of_a_fresh_forward(samples, temperature, random_model):
    model = random_model()
    out = generate(
        model, some_prompts(), 10, samples=samples, temperature=temperature, generator=seeded()
    )
    for ours, mask, fresh in zip(out.logprobs, out.mask, fresh_logprobs(model, out, temperature)):
        assert torch.allclose(ours[mask], fresh, atol=1e-4)


def test_logprobs_stay_right_after_finished_rows_have_left_the_batch(random_model, monkeypatch):
    batches, keep = [], module.Engine.keep
    monkeypatch.setattr(
        module.Engine, "keep", lambda self, rows: (batches.append(len(rows)), keep(self, rows))[1]
    )
    model = random_model()
    out = generate(
        model, some_prompts(), 40, samples=8, stop_ids=set(range(30)), generator=seeded(3)
    )
    assert len(batches) >= 3 and batches == sorted(batches, reverse=True) and batches[0] <= 16
    for ours, mask, fresh in zip(out.logprobs, out.mask, fresh_logprobs(model, out)):
        assert torch.allclose(ours[mask], fresh, atol=1e-4)


def test_logprobs_are_of_the_full_distribution_even_with_top_k(random_model):
    model = random_model()
    out = generate(model, some_prompts(), 6, top_k=3, top_p=0.8, generator=seeded())
    for ours, fresh in zip(out.logprobs, fresh_logprobs(model, out)):
        assert torch.allclose(ours, fresh, atol=1e-4)


def test_in_bf16_logprobs_are_near_those_of_a_fresh_forward_and_weights_stay_fp32(random_model):
    model = random_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.compute_dtype = torch.bfloat16
    out = generate(model, some_prompts(), 10, generator=seeded())
    for ours, fresh in zip(out.logprobs, fresh_logprobs(model, out)):
        assert (ours - fresh).abs().mean() < 0.05
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_generating_leaves_no_graph_behind(random_model):
    assert not generate(random_model(), [[1]], 3).logprobs.requires_grad


# --- samplers ----------------------------------------------------------------------------------
LOGITS = [[math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]]


@pytest.mark.parametrize("k, kept", [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_largest(k, kept):
    logits = keep_top_k(torch.tensor(LOGITS), k)
    assert [i for i, x in enumerate(logits[0]) if x > -INF] == kept


@pytest.mark.parametrize(
    "p, kept", [(0.3, [1]), (0.6, [1, 3]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p, kept):
    logits = keep_top_p(torch.tensor(LOGITS), p)
    assert [i for i, x in enumerate(logits[0]) if x > -INF] == kept
    assert logits[0, kept].tolist() == torch.tensor(LOGITS)[0, kept].tolist()


@pytest.mark.parametrize("k", [1, 5, 50])
def test_top_k_equals_transformers(k):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(8, 100, generator=seeded())
    assert torch.equal(keep_top_k(logits, k), warpers.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_transformers(p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(8, 100, generator=seeded())
    assert torch.equal(keep_top_p(logits, p), warpers.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize(
    "settings, probabilities",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        (
            {"top_k": 3, "top_p": 0.7},
            [0, 4 / 7, 0, 3 / 7],
        ),  # of 4/9, 3/9, 2/9 the first two reach 0.7
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings, probabilities):
    n = 20_000
    tokens, _ = sample(torch.tensor(LOGITS).expand(n, 4), generator=seeded(), **settings)
    counts = tokens.bincount(minlength=4).tolist()
    assert all(c == 0 for c, p in zip(counts, probabilities) if p == 0)
    chi_square = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probabilities) if p)
    assert chi_square < 16.3  # exceeded by one seed in a thousand, at 3 degrees of freedom


def test_temperature_zero_takes_the_largest():
    tokens, logprobs = sample(torch.tensor(LOGITS).expand(5, 4), temperature=0)
    assert tokens.tolist() == [1] * 5
    assert logprobs.exp().tolist() == pytest.approx([0.4] * 5)


@pytest.mark.parametrize(
    "temperature, p", [(1.0, [0.1, 0.4, 0.2, 0.3]), (0.5, [1 / 30, 16 / 30, 4 / 30, 9 / 30])]
)
def test_sample_reports_the_logprob_at_its_temperature(temperature, p):
    tokens, logprobs = sample(torch.tensor(LOGITS).expand(50, 4), temperature, generator=seeded())
    assert logprobs.exp().tolist() == pytest.approx([p[i] for i in tokens.tolist()], abs=1e-6)


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    tokens, _ = sample(torch.tensor(LOGITS).expand(200, 4), top_k=50, generator=seeded())
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_a_token_of_zero_probability_is_never_drawn():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).expand(5000, 5)
    assert set(sample(logits, generator=seeded())[0].tolist()) == {1, 3}


# --- errors ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompts, new, sentence",
    [
        ([[1] * 60], 5, "60 tokens and 5 new ones don't fit the model's context of 64"),
        ([[1], [1] * 65], 1, "65 tokens and 1 new ones"),
        ([[1, 2], []], 4, "empty prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_the_users_error(prompts, new, sentence, random_model):
    with pytest.raises(UserError, match=sentence) as error:
        generate(random_model(), prompts, new)
    assert "\n" not in str(error.value)


def test_prompt_and_answer_may_fill_the_context_exactly(random_model):
    model = random_model()
    prompts = some_prompts((60, 12))
    assert generate(model, prompts, 4, temperature=0).lists() == [
        slow_greedy(model, p, 4) for p in prompts
    ]


# --- stream ------------------------------------------------------------------------------------
def test_stream_yields_what_generate_returns(random_model):
    model, prompt = random_model(), some_prompts()[0]
    assert (
        list(stream(model, prompt, 10, temperature=0))
        == generate(model, [prompt], 10, temperature=0).lists()[0]
    )
    streamed = list(stream(model, prompt, 10, temperature=0.9, generator=seeded()))
    assert streamed == generate(model, [prompt], 10, temperature=0.9, generator=seeded()).lists()[0]


def test_stream_ends_before_the_stop_token(random_model):
    model, prompt = random_model(), some_prompts()[0]
    tokens = slow_greedy(model, prompt, 10)
    until = tokens.index(tokens[6])
    assert list(stream(model, prompt, 10, temperature=0, stop_ids={tokens[6]})) == tokens[:until]


def test_stream_refuses_a_prompt_that_does_not_fit(random_model):
    with pytest.raises(UserError, match="context of 64"):
        list(stream(random_model(), [1] * 60, 5))
