"""From records to batches: corpora on disk, windows, the sampler, packed rows, completions."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanollm import batches, formats
from nanollm.batches import (
    Completions,
    Corpus,
    MixedSampler,
    Packed,
    Sampler,
    Windows,
    by_share,
    fit_chat,
    open_corpus,
    pack,
    pack_chats,
    pad_completions,
    row_length,
    write_corpus,
)
from nanollm.config import UserError
from nanollm.formats import Unusable, write_jsonl
from nanollm.runtime import Runtime
from nanollm.tokenizer import DIGITS_PATTERN, GPT2_PATTERN, PATTERN, Tokenizer, add_tokens, to_json

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# --- corpora -------------------------------------------------------------------------------------


def test_a_corpus_holds_every_token_and_end_of_text_before_each_document(tokenizer, tmp_path):
    write_corpus(iter([("ab", True), ("", True), ("né", True)]), tokenizer, tmp_path / "s")
    corpus, eot = Corpus.open(tmp_path / "s"), tokenizer.eot_id
    assert corpus.tokens.tolist() == [eot, 97, 98, eot, eot, 110, 195, 169]
    assert (corpus.text_bytes, corpus.documents) == (5, 3)


PATTERNS = {
    "ours": PATTERN,
    "gpt2": GPT2_PATTERN,
    "digits": DIGITS_PATTERN,
    "o200k": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_text_has_the_same_ids_in_pieces_as_whole(pattern, tmp_path, monkeypatch):
    rng = random.Random(1)
    words = [*"owl it's 42 . /x é e\u0301 水".split(), " ", "\n", "\n\n", "\t", " " * 70]
    text = "".join(rng.choice(words) + rng.choice(["", "", " ", "\n"]) for _ in range(20_000))
    ranks = Tokenizer.train([text, "the owl\n\n\nit's"], 330).ranks
    source = add_tokens(to_json(ranks, PATTERNS[pattern]), ["<|endoftext|>", "<|end|>"])
    tokenizer = Tokenizer(source)
    monkeypatch.setattr(formats, "PIECE", 100)
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert len(list(formats.stream_pieces(tmp_path / "a.txt"))) > 100
    cut = int(0.7 * len(text))
    for source, kept in {(): text, ("train", 0.3): text[:cut], ("val", 0.3): text[cut:]}.items():
        corpus = open_corpus(tokenizer, tmp_path / "a.txt", *source)
        assert corpus.tokens.tolist() == tokenizer.documents([kept])[0]
        assert (corpus.documents, corpus.text_bytes) == (1, len(kept.encode()))


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_beyond_two_bytes_get_four(vocab_size, dtype, tmp_path):
    ids = [vocab_size - 1, 40000, 1]
    large = SimpleNamespace(vocab_size=vocab_size, documents=lambda texts: [ids for _ in texts])
    write_corpus(iter([("a", True)]), large, tmp_path / "s")
    corpus = Corpus.open(tmp_path / "s")
    assert corpus.tokens.dtype == np.dtype(dtype) and Windows(corpus, 2)[[0]].tolist() == [ids]


def test_tokens_made_once_are_found_again_until_file_part_or_tokenizer_change(
    tokenizer, cache, tmp_path, monkeypatch
):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "Once upon a time"}, {"text": "Twice"}])
    assert open_corpus(tokenizer, path).text_bytes == 21
    with monkeypatch.context() as patch:
        patch.setattr(batches, "stream_pieces", lambda path: pytest.fail("read again"))
        assert open_corpus(tokenizer, path).documents == 2
    assert open_corpus(tokenizer, path, "val", 0.5).text_bytes == 5
    trained = Tokenizer.train(["aaaa bbbb aaaa"], 272)
    assert open_corpus(trained, path, "train", 0.5).text_bytes == 16
    write_jsonl(path, [{"text": "Changed"}])
    assert open_corpus(tokenizer, path).text_bytes == 7 and len(list(cache.iterdir())) == 4
    with pytest.raises(UserError, match="too few texts to hold some out"):
        write_jsonl(path, [{"text": "a"}, {"text": "b"}])
        open_corpus(tokenizer, path, "train", 0.9)


# --- windows -------------------------------------------------------------------------------------


def count_to(n):
    return Corpus(np.arange(n, dtype="<u2"), text_bytes=0, documents=1)


def test_windows_tile_the_tokens_so_that_each_but_the_first_is_predicted_once():
    windows = Windows(count_to(11), 4)  # a rest shorter than T is left out
    assert len(windows) == 2
    assert windows[[1, 0]].tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert windows[torch.tensor([0])].dtype == torch.int64
    with pytest.raises(UserError, match="too few for one row of 5"):
        Windows(count_to(4), 4)


@pytest.mark.parametrize(
    "context, lengths, limit, T",
    [
        (512, (), 512, 512),
        (None, (), 64, 64),
        (None, [90] * 99 + [900], 1024, 256),  # 99% need so much
        (None, [90] * 98 + [300, 900], 1024, 320),
        (None, [3000], 4096, 2048),
        (None, [300], 310, 310),
    ],
)
def test_a_row_is_as_long_as_asked_for_or_holds_ninety_nine_of_a_hundred_dialogues(
    context, lengths, limit, T
):
    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=limit))
    assert row_length(context, model, lengths) == T
    beyond = f"--context {limit + 1} is beyond the model's context of {limit}"
    with pytest.raises(UserError, match=beyond):
        row_length(limit + 1, model)


# --- sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10, 25])
def test_a_sampler_draws_each_number_once_per_epoch(k):
    sampler = Sampler(10)
    drawn = torch.cat([sampler.take(k) for _ in range(-(-30 // k))])[:30].view(3, 10)
    assert [sorted(epoch) for epoch in drawn.tolist()] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in drawn.tolist()}) == 3  # each in an order of its own
    assert drawn.flatten().tolist() == Sampler(10).take(30).tolist()  # however many at a time
    assert drawn.flatten().tolist() != Sampler(10, seed=1).take(30).tolist()


@pytest.mark.parametrize("taken", [0, 4, 10, 13, 20])
def test_a_saved_position_continues_alike_in_the_same_data(taken):
    sampler, resumed = Sampler(10, seed=5), Sampler(10, seed=5)
    sampler.take(taken)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.take(25).tolist() == sampler.take(25).tolist()
    with pytest.raises(UserError, match="10 rows then, 11 now"):
        Sampler(11).load_state_dict(sampler.state_dict())


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(1,), (0.7, 0.3), (0.05, 0.9, 0.05), (1 / 3, 2 / 3)])
def test_every_source_gives_its_share_of_the_rows_and_each_row_once_per_epoch(shares):
    sources = [torch.arange(n) for n in (40, 300, 25)[: len(shares)]]
    sampler = MixedSampler(sources, shares, seed=3)
    batches = [sampler.take(8) for _ in range(100)]
    assert {sum(map(len, rows)) for rows in batches} == {8}
    for i, (source, share) in enumerate(zip(sources, shares)):
        own = torch.cat([rows[i] for rows in batches]).tolist()
        assert abs(len(own) - 800 * share) < 4
        assert own == Sampler(len(source), 3 + 1000 * i).take(len(own)).tolist()


def test_a_mixture_goes_on_from_a_saved_position():
    sources = torch.arange(9), torch.arange(4)
    sampler, resumed = (MixedSampler(sources, [0.6, 0.4]) for _ in range(2))
    sampler.take(17)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for ours, theirs in zip(resumed.take(30), sampler.take(30)):
        assert torch.equal(ours, theirs)


def test_several_sources_are_measured_by_share():
    shares = {"a": 0.75, "b": 0.25}
    assert by_share({"a": 1.0}, [{"loss": 1.0}]) == {"loss": 1.0}
    measured = by_share(shares, [{"loss": 1.0}, {"loss": 3.0}])
    assert measured == {"loss": 1.5, "loss of a": 1.0, "loss of b": 3.0}


# --- packed rows ---------------------------------------------------------------------------------


def example(n, start):
    """n ids from `start` on, of which the second half is trained on."""
    return list(range(start, start + n)), [i >= n // 2 for i in range(n)]


def test_two_examples_share_a_row_and_count_from_zero_each():
    rows = pack([example(3, 300), example(12, 100)], 24, pad_id=9)
    assert rows.tokens.tolist() == [[*range(100, 112), 300, 301, 302] + [9] * 9]
    assert rows.documents.tolist() == [[0] * 12 + [1] * 3 + [-1] * 9]
    assert rows.positions[0, :15].tolist() == [*range(12), 0, 1, 2]
    assert rows.mask.int().tolist() == [[0] * 6 + [1] * 6 + [0, 1, 1] + [0] * 9]


@pytest.mark.parametrize("seed, T, longest", [(0, 64, 64), (1, 64, 10), (2, 512, 200), (3, 8, 8)])
def test_packing_keeps_every_token_once_and_nothing_overflows(seed, T, longest):
    generator = random.Random(seed)
    lengths = [generator.randint(1, longest) for _ in range(300)]
    starts = [1000 + sum(lengths[:i]) for i in range(len(lengths))]
    examples = [example(n, start) for n, start in zip(lengths, starts)]
    rows = pack(examples, T, pad_id=9)
    assert rows.tokens.shape[1] == T
    padding, found = rows.documents < 0, []
    assert (rows.tokens[padding] == 9).all() and not rows.mask[padding].any()
    for r in range(len(rows)):
        for d in [d for d in rows.documents[r].unique().tolist() if d >= 0]:
            here = rows.documents[r] == d
            ids = rows.tokens[r][here].tolist()
            assert here.nonzero()[:, 0].diff().eq(1).all()  # in one piece
            assert rows.positions[r][here].tolist() == list(range(len(ids)))
            found.append((ids, rows.mask[r][here].tolist()))
    assert sorted(found) == sorted(examples)
    assert T < 512 or sum(lengths) / rows.tokens.numel() > 0.95  # well filled


def test_packed_rows_are_chosen_by_number_and_joined():
    rows = pack([example(8, start) for start in (100, 200, 300)], 8, 9, images=[[], [0], [1, 2]])
    chosen = rows[torch.tensor([2, 0])]
    assert chosen.tokens[:, 0].tolist() == [300, 100] and chosen.images == [[1, 2], []]
    assert rows[slice(0, 1)].mask.shape == (1, 8)
    text = pack([example(8, 400)], 8, pad_id=9)
    both = Packed.join([text, rows])
    assert both.tokens[:, 0].tolist() == [400, 100, 200, 300] and both.image_numbers() == [0, 1, 2]
    assert Packed.join([text, text]).images is None


# --- completions ---------------------------------------------------------------------------------


def test_completions_are_padded_on_the_right_and_masked_and_so_is_what_a_tool_has_written():
    own = [[True, True], [True, False, False, True]]
    for written, second in (None, [0, 1, 1, 1, 1]), (own, [0, 1, 0, 0, 1]):
        rows = pad_completions([[1, 2], [3]], [[4, 5], [6, 7, 8, 9]], 0, own=written)
        assert rows.tokens.tolist() == [[1, 2, 4, 5, 0], [3, 6, 7, 8, 9]]
        assert rows.mask.int().tolist() == [[0, 0, 1, 1, 0], second]
        assert rows.real.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert rows.last().tolist() == [3, 4] and rows.inputs()[1:] == (None, None)


def test_chosen_rows_lose_columns_that_are_padding_in_all_of_them():
    rows = pad_completions([[1, 2], [3]], [[4, 5], [6, 7, 8, 9]], 0, images=[None, "b"])
    assert rows[torch.tensor([0])].tokens.tolist() == [[1, 2, 4, 5]]
    assert rows[torch.tensor([0])].images == [None]
    joined = Completions.join([rows[torch.tensor([0])], rows])
    assert joined.tokens[0].tolist() == [1, 2, 4, 5, 0] and joined.images == [None, None, "b"]


def test_rows_padded_on_the_left_count_from_their_first_token():
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    _, positions, mask = Completions(torch.ones(2, 4).long(), real, real).inputs()
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert mask[0, 0].int().tolist()[2:] == [[0, 0, 1, 0], [0, 0, 1, 1]]


# --- dialogues that are too long -----------------------------------------------------------------


def render(messages, image_tokens=0):
    """Three tokens a turn, those of the assistant trained on."""
    roles = [message["role"] for message in messages for _ in range(3)]
    return list(range(len(roles))), [role == "assistant" for role in roles]


def dialogue(*roles):
    return {"messages": [{"role": role, "content": "hm"} for role in roles], "from": "a file"}


BY_THREES = SimpleNamespace(render=render, pad_id=0)
TWO = dialogue("user", "assistant", "user", "assistant")  # 12 tokens, 6 after the first answer


def fitted(chat, T, render=render):
    def arrays(messages):
        ids, mask = render(messages)
        return ids, np.array(mask)

    return fit_chat(T, arrays, chat | {"rendered": arrays(chat["messages"])})


def test_a_dialogue_is_cut_after_the_last_answer_that_fits():
    open_question = dialogue("user", "assistant", "user")  # the last turn is no loss
    for chat, T, turns in ((TWO, 12, 4), (TWO, 11, 2), (TWO, 6, 2), (open_question, 12, 2)):
        kept, (ids, _), cut = fitted(chat, T)
        assert len(kept["messages"]) == turns and len(ids) == 3 * turns
        assert cut == (chat is TWO and turns < 4)
        assert kept["from"] == "a file" and len(TWO["messages"]) == 4


def silent(messages):
    return render(messages)[0], [False] * 3 * len(messages)


@pytest.mark.parametrize(
    "chat, T, render, reason",
    [
        (TWO, 5, render, "its first answer ends beyond 5 tokens"),
        (dialogue("user"), 12, render, "no answer that is trained on"),
        (TWO, 12, silent, "no answer that is trained on"),
    ],
)
def test_a_dialogue_without_anything_to_learn_is_unusable(chat, T, render, reason):
    with pytest.raises(Unusable, match=reason):
        fitted(chat, T, render)


def test_what_was_cut_and_dropped_is_said_and_most_dropped_is_an_error(capsys):
    chats = [TWO, dialogue("user", "assistant"), dialogue("user", "user", "assistant")]
    rows = pack_chats(chats, BY_THREES, 8, "training", CPU)
    assert len(rows) == 2 and rows.images is None
    assert capsys.readouterr().out == (
        "training dialogues: 1 of 3 records can't be used: its first answer ends beyond 8 tokens "
        "(1: 'hm'); dropped\n"
        "training: 2 dialogues in 2 rows of 8 tokens, 6 trained on; 1 shortened, 1 dropped\n"
    )
    with pytest.raises(UserError, match="1 of 1 records can't be used: .*: raise --context"):
        pack_chats([TWO], BY_THREES, 5, "held-out", CPU)


def test_rows_are_as_long_as_the_dialogues_say_and_each_is_rendered_once():
    calls = []
    counted = SimpleNamespace(render=lambda m, **_: calls.append(m) or render(m), pad_id=0)
    rows = pack_chats([TWO, TWO], counted, lambda lengths: max(lengths) + 1, "training", CPU)
    assert rows.tokens.shape == (2, 13) and len(calls) == 2
