"""Shards, windows, samplers, packing and padding: nothing is lost, and nothing is counted twice."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanollm import batches
from nanollm.batches import (
    Completions,
    Sampler,
    TokenShards,
    Windows,
    fit_chat,
    load_shards,
    pack,
    pack_chats,
    pad_completions,
    row_length,
    write_shards,
)
from nanollm.config import UserError
from nanollm.formats import Unusable
from nanollm.runtime import Runtime
from nanollm.tokenizer import Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# --- shards --------------------------------------------------------------------------------------


def written(documents, tokenizer, folder):
    write_shards(documents, tokenizer, folder)
    return TokenShards.open(folder, tokenizer)


def test_shards_hold_every_token_and_end_of_text_before_each_document(tokenizer, tmp_path):
    shards, eot = written(["ab", "", "né"], tokenizer, tmp_path / "s"), tokenizer.eot_id
    assert np.concatenate(shards.arrays).tolist() == [eot, 97, 98, eot, eot, 110, 195, 169]
    assert (shards.tokens, shards.text_bytes, shards.documents) == (8, 5, 3)


@pytest.mark.parametrize("count, files", [(2500, 3), (2048, 2), (1, 1), (0, 0)])
def test_long_corpora_go_on_in_further_files(count, files, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARD_TOKENS", 1000)  # documents are tokenised 1024 at a time
    documents = [f"text {n}" for n in range(count)]
    shards = written(iter(documents), tokenizer, tmp_path / "s")
    wanted = [id for text in documents for id in (tokenizer.eot_id, *tokenizer.encode(text))]
    assert len(shards.arrays) == files and shards.documents == count
    assert [id for array in shards.arrays for id in array.tolist()] == wanted


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_beyond_two_bytes_get_four(vocab_size, dtype, tmp_path):
    large = SimpleNamespace(
        vocab_size=vocab_size,
        fingerprint=lambda: "large",
        documents=lambda texts: [[vocab_size - 1, 0, vocab_size - 1] for _ in texts],
    )
    shards = written(["a"], large, tmp_path / "s")
    assert shards.arrays[0].dtype == np.dtype(dtype)
    assert Windows(shards, 2)[[0]].tolist() == [[vocab_size - 1, 0, vocab_size - 1]]


def test_tokens_made_once_are_found_again_and_another_source_or_tokenizer_is_tokenised_anew(
    tokenizer, cache
):
    first = load_shards(lambda: ["Once upon a time"], ["a.txt", 16], tokenizer)
    again = load_shards(lambda: pytest.fail("read again"), ["a.txt", 16], tokenizer)
    assert np.array_equal(first.arrays[0], again.arrays[0]) and again.text_bytes == 16
    trained = Tokenizer.train(["aaaa bbbb aaaa"], 272)
    others = (["b.txt", 16], tokenizer), (["a.txt", 17], tokenizer), (["a.txt", 16], trained)
    for source, other in others:
        assert load_shards(lambda: ["Twice"], source, other).text_bytes == 5
    assert len(list(cache.iterdir())) == 4


def meta(**changes):
    def edit(folder):
        path = folder / "meta.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return edit


def cut(size):
    def edit(folder):
        path = folder / "shard_00000.bin"
        path.write_bytes(path.read_bytes()[:size])

    return edit


ANEW = "must be a directory of token shards; delete it"


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (meta(tokenizer="other"), "were made with another tokenizer"),
        (cut(20), "is truncated; delete it"),
        (cut(21), ANEW),
        (cut(0), ANEW),
        (lambda folder: (folder / "shard_00000.bin").unlink(), ANEW),
        (lambda folder: (folder / "meta.json").unlink(), ANEW),
        (lambda folder: (folder / "meta.json").write_text("{"), ANEW),
        (lambda folder: (folder / "meta.json").write_text("[]"), ANEW),
        (meta(dtype="<zz"), ANEW),
        *((meta(**{k: ...}), ANEW) for k in ("shards", "tokens", "text_bytes", "documents")),
    ],
)
def test_damaged_shards_are_refused(spoil, sentence, tokenizer, tmp_path):
    write_shards(["Once upon a time"], tokenizer, tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(UserError, match=sentence) as error:
        TokenShards.open(tmp_path / "s", tokenizer)
    assert str(tmp_path / "s") in str(error.value) and "\n" not in str(error.value)


def test_a_tokenisation_that_fails_leaves_nothing_behind(tokenizer, cache):
    def documents():
        yield from ["text"] * 2000
        raise UserError("line 2001: broken")

    with pytest.raises(UserError):
        load_shards(documents, ["a"], tokenizer)
    assert not cache.exists() or not list(cache.iterdir())


# --- windows -------------------------------------------------------------------------------------


def shards_of(*lengths):
    """Arrays of consecutive numbers, 0, 1, 2 ..., the second array from 1000 on."""
    arrays = [np.arange(1000 * i, 1000 * i + n, dtype="<u2") for i, n in enumerate(lengths)]
    return TokenShards(arrays, tokens=sum(lengths), text_bytes=0, documents=len(lengths))


def test_windows_by_hand():
    windows = Windows(shards_of(9), 4)
    assert len(windows) == 2
    assert windows[[1, 0]].tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert windows[torch.tensor([0])].dtype == torch.int64


@pytest.mark.parametrize("lengths", [(41,), (21, 41), (5, 3, 9), (41, 1, 6)])
def test_windows_predict_every_token_exactly_once(lengths):
    windows = Windows(shards_of(*lengths), T := 4)
    targets = windows[range(len(windows))][:, 1:].flatten().tolist()
    wanted = [1000 * i + t for i, n in enumerate(lengths) for t in range(1, 1 + (n - 1) // T * T)]
    assert targets == wanted  # all but the first of a file, and a rest shorter than T


@pytest.mark.parametrize("lengths", [(4,), (4, 4), ()])
def test_too_few_tokens_for_one_row_are_refused(lengths):
    with pytest.raises(UserError, match="too few for one row of 5"):
        Windows(shards_of(*lengths), 4)


def test_a_token_beyond_32767_stays_positive():
    shards = TokenShards([np.array([65535, 40000, 1], dtype="<u2")], 3, 0, 1)
    assert Windows(shards, 2)[[0]].tolist() == [[65535, 40000, 1]]


@pytest.mark.parametrize("context, limit, T", [(None, 512, 256), (None, 64, 64), (512, 512, 512)])
def test_a_row_is_as_long_as_asked_for_or_as_the_model_can_read(context, limit, T):
    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=limit))
    assert row_length(context, model) == T
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


@pytest.mark.parametrize("seed, T, longest", [(0, 64, 64), (1, 64, 10), (2, 256, 100), (3, 8, 8)])
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


def test_rows_are_well_filled():
    generator = random.Random(0)
    lengths = [generator.randint(10, 200) for _ in range(1000)]
    rows = pack([example(n, 0) for n in lengths], 512, pad_id=9)
    assert sum(lengths) / rows.tokens.numel() > 0.97


def test_packed_rows_are_chosen_by_number_and_joined():
    rows = pack([example(8, start) for start in (100, 200, 300)], 8, 9, images=[[], [0], [1, 2]])
    chosen = rows[torch.tensor([2, 0])]
    assert chosen.tokens[:, 0].tolist() == [300, 100] and chosen.images == [[1, 2], []]
    assert rows[slice(0, 1)].mask.shape == (1, 8)
    text = pack([example(8, 400)], 8, pad_id=9)
    both = text.join(rows)
    assert both.tokens[:, 0].tolist() == [400, 100, 200, 300] and both.image_numbers() == [0, 1, 2]
    assert text.join(text).images is None


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


@pytest.mark.parametrize(
    "chat, T, turns, shortened",
    [
        (TWO, 12, [4], 0),
        (TWO, 11, [2], 1),
        (TWO, 6, [2], 1),
        (dialogue("user", "assistant", "user"), 12, [2], 0),  # an open question is no loss
    ],
)
def test_a_dialogue_is_cut_after_the_last_answer_that_fits(chat, T, turns, shortened):
    kept, (ids, _), cut = fit_chat(T, BY_THREES, 0, chat, "")
    assert [len(kept["messages"])] == turns and cut == shortened
    assert [len(ids)] == [3 * n for n in turns]
    assert kept["from"] == "a file" and len(TWO["messages"]) == 4


@pytest.mark.parametrize(
    "chat, T, learnt, reason",
    [
        (TWO, 5, True, "its first answer ends beyond 5 tokens"),
        (dialogue("user"), 12, True, "no answer that is trained on"),
        (TWO, 12, False, "no answer that is trained on"),
    ],
)
def test_a_dialogue_without_anything_to_learn_is_unusable(chat, T, learnt, reason):
    masked = SimpleNamespace(render=lambda m, **_: (render(m)[0], [learnt] * 3 * len(m)))
    with pytest.raises(Unusable, match=reason):
        fit_chat(T, masked, 0, chat, "")


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


@pytest.mark.parametrize(
    "lengths, limit, T",
    [([90] * 99 + [900], 1024, 256), ([90] * 98 + [300, 900], 1024, 320), ([3000], 4096, 2048)]
    + [([300], 310, 310), ([300], 256, 256)],
)
def test_a_row_holds_ninety_nine_of_a_hundred_dialogues(lengths, limit, T):
    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=limit))
    assert row_length(None, model, lengths) == T


def test_rows_are_as_long_as_the_dialogues_say_and_each_is_rendered_once():
    calls = []
    counted = SimpleNamespace(render=lambda m, **_: calls.append(m) or render(m), pad_id=0)
    rows = pack_chats([TWO, TWO], counted, lambda lengths: max(lengths) + 1, "training", CPU)
    assert rows.tokens.shape == (2, 13) and len(calls) == 2
