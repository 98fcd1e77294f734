"""What stands beside an example changes nothing about it: neighbours, batch, order and padding, in
sampling, scoring, judging, evaluation and logprobs.
"""

import random
from functools import partial

import pytest
import torch
from conftest import SMALL, randomise
from helpers import some_prompts, turns

from nanollm import preferences
from nanollm.batches import Completions, pad_completions
from nanollm.generate import generate, sample_completions
from nanollm.gpt import GPTConfig, ScalarGPT
from nanollm.logprobs import batched_logprobs, completion_logprobs
from nanollm.metrics import accuracy_by_task
from nanollm.preferences import in_batches, measure_completions, scores

N = 7
EXAMPLES = [
    {
        "messages": turns("x" * (5 * n % 13) + str(n)),
        "task": str(n),
        "answer": "a",
        "check": "exact",
    }
    for n in range(N)
]
PROMPTS = some_prompts([5 * n % 19 + 1 for n in range(N)])
COMPLETIONS = some_prompts([3 * n % 11 + 2 for n in range(N)])
NOISE = torch.rand(N, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ROWS = pad_completions(PROMPTS, COMPLETIONS, 0)


def drawn(numbers, batch, model, tokenizer, **_):
    """Ids that each prompt is continued with, by its own noise."""
    how = {"stop_ids": tokenizer.stop_ids}
    parts = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
    made = (generate(model, [PROMPTS[i] for i in p], 12, noise=NOISE[p], **how) for p in parts)
    return [ids for out in made for ids in out.lists()]


def sampled(numbers, batch, model, tokenizer, **_):
    """Two samples of each prompt, by a seed alone."""
    how = {"samples": 2, "batch_size": 2 * batch, "generator": torch.Generator().manual_seed(3)}
    ids = sample_completions(model, tokenizer, [PROMPTS[i] for i in numbers], 12, **how)
    return [ids[i : i + 2] for i in range(0, len(ids), 2)]


def scored(numbers, batch, scalar, **_):
    rows = pad_completions([PROMPTS[i] for i in numbers], [COMPLETIONS[i] for i in numbers], 0)
    return in_batches(scores, scalar, rows, batch).tolist()


def judged(numbers, batch, model, tokenizer, scalar, monkeypatch, **_):
    """The best of three completions, by a reward model, and its gold."""
    monkeypatch.setattr(preferences, "in_batches", partial(in_batches, batch=batch))
    examples = [EXAMPLES[i] for i in numbers]
    how = {"gold": lambda _, text: {"gold": len(text)}, "reward_model": scalar, "best_of": 3}
    _, completions, golds = measure_completions(
        model, tokenizer, examples, max_new_tokens=12, **how
    )
    return list(zip(completions, golds))


def evaluated(numbers, batch, model, tokenizer, temperature, **_):
    how = {"temperature": temperature, "generator": torch.Generator().manual_seed(3)}
    examples = [EXAMPLES[i] for i in numbers]
    tasks, texts = accuracy_by_task(model, tokenizer, examples, 12, batch_size=batch, **how)
    return [(tasks[str(i)]["accuracy"], text) for i, text in zip(numbers, texts)]


def logprobs(numbers, batch, model, **_):
    """Of each completion's tokens, at temperature 0.7."""
    found = batched_logprobs(model, ROWS[torch.tensor(numbers)], all_in(numbers, batch), 0.7)
    return [row[row != 0].tolist() for row in found]


def all_in(numbers, batch):
    return torch.arange(len(numbers)).split(batch)


MEASURES = {
    "sampling by given noise": drawn,
    "sampling": sampled,
    "scoring": scored,
    "judging": judged,
    "evaluation": partial(evaluated, temperature=0.0),
    "evaluation, sampled": partial(evaluated, temperature=1.0),
    "logprobs": logprobs,
}


def nearly(result):
    """Numbers may differ in the last bits, by the order in which a longer row is summed."""
    numeric = isinstance(result, float) or isinstance(result, list) and isinstance(result[0], float)
    return pytest.approx(result, abs=1e-4) if numeric else result


@pytest.mark.parametrize("name", MEASURES)
def test_what_stands_beside_an_example_changes_nothing_about_it(
    name, random_model, tokenizer, monkeypatch
):
    scalar = randomise(ScalarGPT(GPTConfig(**SMALL)).eval(), seed=5)
    things = {"model": random_model(), "scalar": scalar, "tokenizer": tokenizer}
    measure = partial(MEASURES[name], **things, monkeypatch=monkeypatch)
    with torch.no_grad():
        alone = [measure([i], 1)[0] for i in range(N)]
        assert len({str(each) for each in alone}) > N - 2  # else nothing would be seen
        chance = random.Random(0)
        for batch in (1, 2, 3, N, N):
            numbers = chance.sample(range(N), chance.randint(2, N))
            for i, found in zip(numbers, measure(numbers, batch)):
                assert found == nearly(alone[i]), (numbers, batch, i)


def moved_left(rows):
    """The same rows, padded on the left."""
    shift = (~rows.real).sum(1)
    columns = (torch.arange(rows.real.shape[1]) - shift[:, None]) % rows.real.shape[1]
    return Completions(*(x.gather(1, columns) for x in (rows.tokens, rows.mask, rows.real)))


def test_padding_changes_no_logprob_and_no_score(random_model):
    scalar, model = randomise(ScalarGPT(GPTConfig(**SMALL)).eval(), seed=5), random_model()
    wide = pad_completions([*PROMPTS, [1] * 30], [*COMPLETIONS, [1] * 30], 0)[torch.arange(N)]
    with torch.no_grad():
        for function in (partial(scores, scalar), partial(completion_logprobs, model)):
            narrow, *padded = function(ROWS), function(wide), function(moved_left(ROWS))
            for found in padded:
                torch.testing.assert_close(
                    found[found != 0], narrow[narrow != 0], atol=1e-4, rtol=0
                )
