"""Sampling: parity with transformers and our own uncached forward, and the laws of samplers."""

import pytest
import torch
from helpers import same, slow_greedy, some_prompts, watch_batches

from nanollm.config import UserError
from nanollm.generate import complete, generate, keep_top_k, keep_top_p, sample, stream
from nanollm.hub import save_model
from nanollm.logprobs import token_logprobs

INF = float("inf")
SHAPES = [{}, {"qk_norm": False, "tie_word_embeddings": False}, {"num_key_value_heads": 4}]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def differences(model, out, samples=1, temperature=1.0):
    """Of each row's logprobs from those of one uncached forward on its whole sequence, unpadded."""
    for r in range(len(out.tokens)):
        prompt, new = torch.tensor(some_prompts()[r // samples]), out.tokens[r][out.mask[r]]
        ids = torch.cat([prompt, new])[None]
        with torch.no_grad():
            fresh = token_logprobs(model(ids[:, :-1]).float() / temperature, ids[:, 1:])[0]
        yield (out.logprobs[r][out.mask[r]] - fresh[len(prompt) - 1 :]).abs()


# --- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_an_uncached_loop_and_transformers_generate(
    shape, random_model, tokenizer, tmp_path
):
    transformers = pytest.importorskip("transformers")
    model, prompts = random_model(**shape), some_prompts()
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    slow = [slow_greedy(model, p, 12)[0] for p in prompts]
    padded = torch.tensor([[257] * (9 - len(p)) + p for p in prompts])
    for stops in (tokenizer.stop_ids, {slow[0][3]}):
        how = {"stop_ids": stops, "pad_id": tokenizer.pad_id}
        ours = generate(model, prompts, 12, temperature=0, **how)
        assert ours.lists() == [slow_greedy(model, p, 12, stops)[0] for p in prompts]
        how = {"attention_mask": (padded != 257).long(), "eos_token_id": list(stops)}
        tokens = theirs.generate(padded, max_new_tokens=12, **how)
        assert torch.equal(ours.tokens, tokens[:, 9:])
    assert ours.mask[0].sum() <= 4


# --- the shape of the result ---------------------------------------------------------------------


def test_each_prompt_is_continued_by_its_own_samples(random_model):
    model, prompts = random_model(), some_prompts()
    out = generate(model, prompts, 6, samples=3, temperature=0, pad_id=3)
    assert out.tokens.shape == (12, 6)
    assert out.lists() == [slow_greedy(model, p, 6)[0] for p in prompts for _ in range(3)]


def test_samples_differ_by_seed_and_within_a_prompt(random_model):
    def once(seed):
        return generate(random_model(), some_prompts(), 8, samples=6, generator=seeded(seed))

    assert torch.equal(once(1).tokens, once(1).tokens)
    assert not torch.equal(once(1).tokens, once(2).tokens)
    assert len({tuple(row) for row in once(1).lists()}) == 24


def test_a_row_ends_with_its_stop_token_and_is_padding_after_it(random_model):
    stops = set(range(8))  # 3% of the tokens or so
    how = {"stop_ids": stops, "pad_id": 257, "generator": seeded()}
    out, ended = generate(random_model(), some_prompts(), 40, samples=8, **how), 0
    for tokens, mask, logprobs in zip(*(x.tolist() for x in (out.tokens, out.mask, out.logprobs))):
        length = sum(mask)
        padding = len(mask) - length
        assert mask == [True] * length + [False] * padding
        assert not stops & set(tokens[: length - 1])
        assert tokens[length:] == [257] * padding and logprobs[length:] == [0.0] * padding
        ended += tokens[length - 1] in stops
    assert 10 < ended < 32  # some by stop token, some by the limit


# --- rows don't depend on their neighbours -------------------------------------------------------


def test_one_long_prompt_shortens_no_other_completion(random_model, tokenizer):
    model, short = random_model(), some_prompts((3, 5, 4, 6, 2, 3, 7, 4))
    [long] = some_prompts((61,))  # leaves room for three tokens
    alone = complete(model, tokenizer, short, 20)
    assert complete(model, tokenizer, [*short, long], 20)[:8] == alone
    assert complete(model, tokenizer, [long, *short], 20)[1:] == alone
    [row] = generate(model, [long], 20, temperature=0).lists()
    assert row == slow_greedy(model, long, 3)[0]  # until the context is full
    assert [list(stream(model, long, 20, temperature=0))] == [row]


# --- logprobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("how", [{"samples": 3}, {"top_k": 3, "top_p": 0.8}])
def test_logprobs_are_those_of_a_fresh_forward(how, temperature, random_model):
    """Of the full distribution, where samples are drawn from a part of it, too."""
    model, samples = random_model(), how.get("samples", 1)
    out = generate(model, some_prompts(), 10, temperature=temperature, generator=seeded(), **how)
    assert torch.cat([*differences(model, out, samples, temperature)]).max() < 1e-4
    assert not out.logprobs.requires_grad


def test_logprobs_stay_right_after_finished_rows_have_left_the_batch(random_model, monkeypatch):
    batches = watch_batches(monkeypatch)
    model, how = random_model(), {"samples": 8, "stop_ids": set(range(30))}
    out = generate(model, some_prompts(), 40, generator=seeded(3), **how)
    assert len(batches) >= 4 and batches == sorted(batches, reverse=True) and batches[1] <= 16
    assert torch.cat([*differences(model, out, samples=8)]).max() < 1e-4


def test_in_bf16_logprobs_are_near_those_of_a_fresh_forward_and_weights_stay_fp32(random_model):
    model, before = random_model(), random_model().state_dict()
    model.compute_dtype = torch.bfloat16
    out = generate(model, some_prompts(), 10, generator=seeded())
    assert all(difference.mean() < 0.05 for difference in differences(model, out))
    assert same(model.state_dict(), before)


# --- samplers ----------------------------------------------------------------------------------
P = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor([P]).log()


def test_top_k_and_top_p_equal_transformers():
    theirs = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(8, 100, generator=seeded())
    for k in (1, 5, 50):
        assert torch.equal(keep_top_k(logits, k), theirs.TopKLogitsWarper(k)(None, logits))
    for p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(keep_top_p(logits, p), theirs.TopPLogitsWarper(p)(None, logits))


def random_numbers(n):
    return torch.rand(n, dtype=torch.float64, generator=seeded())


SQUARES = [1 / 30, 16 / 30, 4 / 30, 9 / 30]


@pytest.mark.parametrize(
    "settings, probabilities",
    [
        ({}, P),
        ({"temperature": 0.5}, SQUARES),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 50}, P),  # beyond the vocabulary
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9, 2/9: two reach 0.7
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(settings, probabilities):
    n = 20_000
    tokens, logprobs = sample(LOGITS.expand(n, 4), random_numbers(n), **settings)
    counts = tokens.bincount(minlength=4).tolist()
    assert all(c == 0 for c, p in zip(counts, probabilities) if p == 0)
    chi_square = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probabilities) if p)
    assert chi_square < 16.3  # exceeded by one seed in a thousand, at 3 degrees of freedom
    full = torch.tensor(SQUARES if "temperature" in settings else P)  # before top-k and top-p
    assert torch.allclose(logprobs.exp(), full[tokens], atol=1e-6)


def test_temperature_zero_takes_the_largest():
    tokens, logprobs = sample(LOGITS.expand(5, 4), temperature=0)
    assert tokens.tolist() == [1] * 5
    assert logprobs.exp().tolist() == pytest.approx([0.4] * 5)


def test_a_token_of_zero_probability_is_never_drawn():
    logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]]).expand(5000, 5)
    for u in (random_numbers(5000), torch.zeros(5000)):
        assert set(sample(logits, u)[0].tolist()) <= {1, 3}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, sentence",
    [
        ([[1], [1] * 64], "1 of 2 prompts, the longest of 64 tokens, don't fit the model"),
        ([[1] * 70], "context of 64 with a token to write; shorten or drop them"),
        ([[1, 2], []], "give at least one token as a prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_the_users_error(prompts, sentence, random_model):
    with pytest.raises(UserError, match=sentence) as error:
        generate(random_model(), prompts, 4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        list(stream(random_model(), prompts[-1], 4))


# --- stream ------------------------------------------------------------------------------------
def test_stream_yields_what_generate_returns_up_to_the_stop_token(random_model):
    model, prompt = random_model(), some_prompts()[0]
    for temperature in (0, 0.9):
        [row] = generate(model, [prompt], 10, 1, temperature, generator=seeded()).lists()
        for stops in (set(), {row[6]}):
            how = {"temperature": temperature, "generator": seeded(), "stop_ids": stops}
            until = row.index(row[6]) if stops else 10
            assert list(stream(model, prompt, 10, **how)) == row[:until]
