"""Reading, shards, windows, samplers and packing: nothing is lost, and errors name the line."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanollm.batches import (
    Sampler,
    TokenShards,
    Windows,
    load_shards,
    pack,
    row_length,
    write_shards,
    xz_bits_per_byte,
)
from nanollm.config import UserError
from nanollm.formats import (
    identity,
    read_chats,
    read_documents,
    read_jsonl,
    read_text,
    split_documents,
)
from nanollm.tokenizer import Tokenizer

SAMPLES = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """A file with this content, lines or bytes."""

    def make(content, name="data.jsonl"):
        path = tmp_path / name
        content = "\n".join(content) if isinstance(content, list) else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


# --- reading -----------------------------------------------------------------------------------
GOOD_TEXT, GOOD_CHAT = '{"text": "a"}', '{"messages": [{"role": "user", "content": "a"}]}'


def chat(*messages):
    return json.dumps({"messages": messages})


@pytest.mark.parametrize(
    "read, lines, sentence",
    [
        (read_jsonl, [GOOD_TEXT, '{"text": "b"'], "line 2: broken JSON"),
        (read_jsonl, [GOOD_TEXT, "", "oops"], "line 3: broken JSON"),
        (read_jsonl, [GOOD_TEXT, "[1]"], "line 2: a JSON object is wanted, not list"),
        (read_jsonl, ['"text"'], "line 1: a JSON object is wanted, not str"),
        (read_jsonl, ["[", GOOD_TEXT + ",", "oops]"], "line 3: broken JSON"),
        (read_jsonl, ["[1]"], "line 1: a JSON object is wanted, not int"),
        (read_documents, [GOOD_TEXT, '{"txt": "b"}'], 'line 2: a corpus record needs a "text"'),
        (
            read_documents,
            [GOOD_TEXT, GOOD_TEXT, '{"text": 3}'],
            'line 3: a corpus record needs a "text"',
        ),
        (read_chats, [GOOD_CHAT, "{}"], 'line 2: a chat record needs "messages"'),
        (read_chats, ['{"messages": []}'], 'line 1: a chat record needs "messages"'),
        (read_chats, ['{"messages": "hi"}'], 'line 1: a chat record needs "messages"'),
        (read_chats, [chat("hi")], 'line 1: message 0 has no "role"'),
        (read_chats, [chat({"content": "a"})], 'line 1: message 0 has no "role"'),
        (
            read_chats,
            [chat({"role": "user", "content": "a"}, {"role": "bot", "content": "b"})],
            "line 1: message 1 has the unknown role 'bot'",
        ),
        (
            read_chats,
            [chat({"role": ["user"], "content": "a"})],
            r"line 1: message 0 has the unknown role \['user'\]",
        ),
        (read_chats, [chat({"role": "user"})], 'line 1: message 0 has no text in "content"'),
        (
            read_chats,
            [chat({"role": "user", "content": None})],
            'line 1: message 0 has no text in "content"',
        ),
        (read_chats, ['{"conversations": "hi"}'], 'line 1: "conversations" must be a list'),
        (read_chats, ['{"conversations": ["hi"]}'], 'line 1: "conversations" must be a list'),
        (
            read_chats,
            ['{"conversations": [{"from": "cat", "value": "miau"}]}'],
            "line 1: message 0 has the unknown role 'cat'",
        ),
        (
            read_chats,
            ['{"conversations": [{"from": ["cat"], "value": "miau"}]}'],
            "line 1: message 0 has the unknown role",
        ),
        (
            read_chats,
            ['{"conversations": [{"from": "human"}]}'],
            'line 1: message 0 has no text in "content"',
        ),
        (read_chats, ['{"instruction": "Sing."}'], 'line 1: message 1 has no text in "content"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_record_is_named_by_file_and_line(read, lines, sentence, write):
    path = write(lines)
    with pytest.raises(UserError, match=sentence) as error:
        read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, sentence",
    [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"abc\xff", r"is not UTF-8 text \(byte 3\)")],
)
def test_a_file_without_text_is_refused(content, sentence, write):
    with pytest.raises(UserError, match=sentence):
        read_text(write(content, "a.txt"))


@pytest.mark.parametrize("name, sentence", [("nothing.txt", "does not exist"), ("", "is a folder")])
def test_a_path_without_file_is_refused(name, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        read_text(tmp_path / name)


def test_blank_lines_are_skipped_and_counted_and_line_separators_in_text_end_no_line(write):
    path = write([GOOD_TEXT, "", '{"text": "a\u2028b\x85c"}', ""])
    assert read_jsonl(path) == [(1, {"text": "a"}), (3, {"text": "a\u2028b\x85c"})]


def test_windows_line_ends_are_read(write):
    assert read_documents(write(b'{"text": "a"}\r\n{"text": "b"}\r\n')) == ["a", "b"]


def test_one_json_array_is_read_like_lines(write):
    assert read_documents(write('[{"text": "a"},\n {"text": "b"}]', "a.json")) == ["a", "b"]


def test_a_text_file_is_one_document(write):
    assert read_documents(write("Once.\nTwice.\n", "a.txt")) == ["Once.\nTwice.\n"]


def test_written_records_are_read_back(tmp_path):
    records = [{"text": "é\n\u2028"}, {"text": "b", "n": 1}]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert [record for _, record in read_jsonl(tmp_path / "a.jsonl")] == records


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"messages": MESSAGES}, MESSAGES),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            MESSAGES,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind"},
                    {"from": "user", "value": "Hi"},
                    {"from": "assistant", "value": "Hello"},
                    {"from": "tool", "value": "4"},
                ]
            },
            [{"role": "system", "content": "Be kind"}, *MESSAGES, {"role": "tool", "content": "4"}],
        ),
        ({"instruction": "Hi", "output": "Hello"}, MESSAGES),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, MESSAGES),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
    ],
)
def test_chats_of_three_formats_become_messages(record, messages, write):
    assert read_chats(write([json.dumps(record)]))[0]["messages"] == messages


def test_other_keys_of_a_chat_are_kept(write):
    assert (
        read_chats(write([json.dumps({"messages": MESSAGES, "kind": "greeting"})]))[0]["kind"]
        == "greeting"
    )


@pytest.mark.parametrize(
    "name, read", [("instructions.json", read_chats), ("tinystories.txt", read_documents)]
)
def test_real_samples_are_read(name, read):
    if not (SAMPLES / name).exists():
        pytest.skip("the samples are not here")
    assert len(read(SAMPLES / name)) >= 1


@pytest.mark.parametrize(
    "documents, train, val",
    [
        (["0123456789"], ["01234567"], ["89"]),
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "d"], ["e"]),
        (["a", "b", "c"], ["a", "b"], ["c"]),
    ],
)
def test_a_corpus_is_split_by_hand(documents, train, val):
    assert split_documents(documents, "train", 0.2) == train
    assert split_documents(documents, "val", 0.2) == val


# --- shards ------------------------------------------------------------------------------------
def test_shards_hold_every_token_and_end_of_text_before_each_document(tokenizer, tmp_path):
    documents = ["ab", "", "né"]
    write_shards(documents, tokenizer, tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s", tokenizer)
    eot = tokenizer.eot_id
    assert np.concatenate(shards.arrays).tolist() == [eot, 97, 98, eot, eot, 110, 195, 169]
    assert (shards.tokens, shards.text_bytes, shards.documents) == (8, 5, 3)


def test_long_corpora_go_on_in_further_files(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    documents = [f"text {n}" for n in range(2500)]
    write_shards(iter(documents), tokenizer, tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s", tokenizer)
    assert len(shards.arrays) == 3  # documents are tokenised 1024 at a time
    wanted = [id for text in documents for id in (tokenizer.eot_id, *tokenizer.encode(text))]
    assert np.concatenate(shards.arrays).tolist() == wanted


def test_lone_surrogates_count_their_three_bytes(tokenizer, tmp_path):
    write_shards(["\ud800"], tokenizer, tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s", tokenizer)
    assert (shards.tokens, shards.text_bytes) == (4, 3)


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_beyond_two_bytes_get_four(vocab_size, dtype, tmp_path):
    class Large:
        eot_id = vocab_size - 1
        fingerprint = staticmethod(lambda: "large")
        encode_batch = staticmethod(lambda texts: [[0, vocab_size - 1] for _ in texts])

    Large.vocab_size = vocab_size
    write_shards(["a"], Large, tmp_path / "s")
    shards = TokenShards.open(tmp_path / "s", Large)
    assert shards.arrays[0].dtype == np.dtype(dtype)
    assert shards.arrays[0].tolist() == [vocab_size - 1, 0, vocab_size - 1]


def test_tokens_made_once_are_found_again(tokenizer, monkeypatch):
    first = load_shards(lambda: ["Once upon a time"], ["a.txt", 16], tokenizer)
    monkeypatch.setattr(data, "write_shards", lambda *_: pytest.fail("tokenised again"))
    again = load_shards(lambda: pytest.fail("read again"), ["a.txt", 16], tokenizer)
    assert np.array_equal(first.arrays[0], again.arrays[0])
    assert again.text_bytes == 16


@pytest.mark.parametrize(
    "source, name", [(["b.txt", 16], "bytes"), (["a.txt", 17], "bytes"), (["a.txt", 16], "trained")]
)
def test_another_source_or_tokenizer_is_tokenised_anew(source, name, tokenizer, cache):
    load_shards(lambda: ["Once upon a time"], ["a.txt", 16], tokenizer)
    other = tokenizer if name == "bytes" else Tokenizer.train(["aaaa bbbb aaaa"], 272)
    load_shards(lambda: ["Twice"], source, other)
    assert len(list(cache.iterdir())) == 2


def test_a_changed_file_has_another_identity(write):
    before = identity(write("abc", "a.txt"))
    assert identity(write("abcd", "a.txt")) != before
    assert (
        identity(write("abc", "b.txt"))[1:2] == before[1:2]
        and identity(write("abc", "b.txt")) != before
    )


@pytest.fixture
def shard_folder(tokenizer, tmp_path):
    write_shards(["Once upon a time"], tokenizer, tmp_path / "s")
    return tmp_path / "s"


def edit_meta(**changes):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text()) | changes
        (folder / "meta.json").write_text(
            json.dumps({k: v for k, v in meta.items() if v is not ...})
        )

    return edit


def cut(size):
    return lambda folder: (folder / "shard_00000.bin").write_bytes(
        (folder / "shard_00000.bin").read_bytes()[:size]
    )


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (edit_meta(tokenizer="other"), "were made with another tokenizer"),
        (cut(20), "is truncated; delete it"),
        (cut(21), "no intact folder of token shards.*; delete it"),
        (cut(0), "no intact folder"),
        (lambda folder: (folder / "shard_00000.bin").unlink(), "no intact folder"),
        (lambda folder: (folder / "meta.json").unlink(), "no intact folder"),
        (lambda folder: (folder / "meta.json").write_text("{"), "no intact folder"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "no intact folder"),
        (edit_meta(dtype="<zz"), "no intact folder"),
        (edit_meta(shards=...), "no intact folder"),
        (edit_meta(tokens=...), "no intact folder"),
        (edit_meta(text_bytes=...), "no intact folder"),
        (edit_meta(documents=...), "no intact folder"),
    ],
)
def test_damaged_shards_are_refused(spoil, sentence, shard_folder, tokenizer):
    spoil(shard_folder)
    with pytest.raises(UserError, match=sentence) as error:
        TokenShards.open(shard_folder, tokenizer)
    assert str(shard_folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tokenisation_that_fails_leaves_nothing_behind(tokenizer, cache):
    def documents():
        yield from ["text"] * 2000
        raise UserError("line 2001: broken")

    with pytest.raises(UserError):
        load_shards(documents, ["a"], tokenizer)
    assert not cache.exists() or not list(cache.iterdir())


# --- windows -----------------------------------------------------------------------------------
def shards_of(*lengths):
    """Arrays of consecutive numbers, 0, 1, 2 ..., the second array from 1000 on."""
    arrays = [np.arange(1000 * i, 1000 * i + n, dtype="<u2") for i, n in enumerate(lengths)]
    return TokenShards(arrays, tokens=sum(lengths), text_bytes=0, documents=len(lengths))


def test_windows_by_hand():
    windows = Windows(shards_of(9), 4)
    assert windows.n == 2
    assert windows[[1, 0]].tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert windows[torch.tensor([0])].dtype == torch.int64


@pytest.mark.parametrize("lengths", [(41,), (21, 41), (5, 3, 9), (41, 1, 6)])
def test_windows_predict_every_token_exactly_once(lengths):
    T = 4
    windows = Windows(shards_of(*lengths), T)
    targets = windows[range(windows.n)][:, 1:].flatten().tolist()
    wanted = [1000 * i + t for i, n in enumerate(lengths) for t in range(1, 1 + (n - 1) // T * T)]
    assert targets == wanted  # all but the first of a file, and a rest shorter than T


@pytest.mark.parametrize("lengths", [(4,), (4, 4), ()])
def test_too_few_tokens_for_one_row_are_refused(lengths):
    with pytest.raises(UserError, match="too few for one row of 5"):
        Windows(shards_of(*lengths), 4)


def test_a_token_beyond_32767_stays_positive():
    shards = TokenShards(
        [np.array([65535, 40000, 1], dtype="<u2")], tokens=3, text_bytes=0, documents=1
    )
    assert Windows(shards, 2)[[0]].tolist() == [[65535, 40000, 1]]


# --- sampler -----------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 3, 10, 25])
def test_a_sampler_draws_each_number_once_per_epoch(k):
    sampler = Sampler(10)
    drawn = torch.cat([sampler.take(k) for _ in range(-(-30 // k))])[:30].view(3, 10)
    assert [sorted(epoch) for epoch in drawn.tolist()] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in drawn.tolist()}) == 3  # each in an order of its own


def test_how_many_are_taken_at_a_time_does_not_change_the_order():
    one, many = Sampler(7, seed=3), Sampler(7, seed=3)
    assert torch.cat([one.take(1) for _ in range(20)]).tolist() == many.take(20).tolist()


def test_another_seed_gives_another_order():
    assert Sampler(50, seed=0).take(50).tolist() != Sampler(50, seed=1).take(50).tolist()


@pytest.mark.parametrize("taken", [0, 4, 10, 13, 20])
def test_a_saved_position_continues_alike(taken):
    sampler, resumed = Sampler(10, seed=5), Sampler(10, seed=5)
    if taken:
        sampler.take(taken)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.take(25).tolist() == sampler.take(25).tolist()


def test_a_position_in_other_data_is_refused():
    with pytest.raises(UserError, match="10 rows then, 11 now"):
        Sampler(11).load_state_dict(Sampler(10).state_dict())


@pytest.mark.parametrize("context, limit, T", [(None, 512, 256), (None, 64, 64), (512, 512, 512)])
def test_a_row_is_as_long_as_asked_for_or_as_the_model_can_read(context, limit, T):
    assert row_length(*asked_of_model(context, limit)) == T


def test_a_row_beyond_the_models_context_is_refused():
    with pytest.raises(UserError, match="--context 65 is beyond the model's context of 64"):
        row_length(*asked_of_model(65, 64))


def asked_of_model(context, limit):
    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=limit))
    return SimpleNamespace(context=context), model


# --- packing -----------------------------------------------------------------------------------
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
    real = rows.documents >= 0
    assert sorted(rows.tokens[real].tolist()) == list(range(1000, 1000 + sum(lengths)))
    assert (rows.tokens[~real] == 9).all() and not rows.mask[~real].any()
    found = []
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


def test_packed_rows_are_chosen_by_number():
    rows = pack([example(8, start) for start in (100, 200, 300)], 8, pad_id=9)
    assert rows[torch.tensor([2, 0])].tokens[:, 0].tolist() == [300, 100]
    assert rows[slice(0, 1)].mask.shape == (1, 8)


def test_packed_rows_of_two_sources_are_joined():
    a, b = (pack([example(8, start)], 8, pad_id=9) for start in (100, 200))
    assert a.join(b).tokens[:, 0].tolist() == [100, 200]


# --- xz ----------------------------------------------------------------------------------------
def test_xz_needs_almost_nothing_for_what_it_has_seen():
    words = random.Random(0).choices("abcdefghijklmnop", k=20_000)
    text = "".join(words)
    assert xz_bits_per_byte([text], [text]) < 0.1


def test_xz_needs_four_bits_for_each_of_sixteen_equally_likely_letters():
    seen, unseen = (
        "".join(random.Random(seed).choices("abcdefghijklmnop", k=20_000)) for seed in (0, 1)
    )
    assert 4.0 <= xz_bits_per_byte([seen], [unseen]) < 4.6
