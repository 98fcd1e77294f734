"""The files tokenizer.json and tokenizer_config.json, which Hugging Face's libraries read too.

    read_json              what a byte-level BPE tokenizer.json says, ours or foreign
    to_json, to_config     what the two files of a Tokenizer hold

What tiktoken would encode otherwise than Hugging Face's `tokenizers` is refused with UserError.
"""

import json
import re

from nanollm.config import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after cuts around each digit, or run of digits: there, blanks go up to the cut.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# tokenizer.json shows bytes as characters (GPT-2): printable ones as themselves, the others, in
# their order, as the characters from U+0100 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {b: b for b in PRINTABLE} | {b: 256 + n for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


# --- reading ----------------------------------------------------------------------------------


def read_model(model, added):
    """The ranks {token bytes: id} of tokenizer.json's `model`, without the `added` tokens."""
    foreign = [
        key
        for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if model.get("type") != "BPE" or foreign:
        raise UserError(f"its model is {' with '.join([str(model.get('type')), *foreign])}")
    names = {name: id for name, id in model["vocab"].items() if added.get(name) != id}
    for name in names:
        if not name or not CHAR_TO_BYTE.keys() >= set(map(ord, name)):
            raise UserError(f"its token {name!r} does not spell bytes")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [names.get(left + right, -1) for left, right in merges]
    # tiktoken merges by id, tokenizer.json by place in the list: they must say the same.
    if -1 in made or made != sorted(made):
        raise UserError("its merges are not in the order of the ids that they make")
    # tiktoken finds a whole piece even where no merge makes it.
    unmade = {id for name, id in names.items() if len(name) > 1}.difference(made)
    if unmade and not model.get("ignore_merges"):
        raise UserError(f"its token {min(unmade)} is made by no merge")
    return {name.translate(CHAR_TO_BYTE).encode("latin-1"): id for name, id in names.items()}


def read_pattern(pre):
    """The one pattern that cuts text as tokenizer.json's `pre_tokenizer` does."""
    steps = pre.get("pretokenizers", [pre])
    kinds, first, last = [step.get("type") for step in steps], steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", True):
        if last.get("use_regex", True):
            if len(kinds) == 1:
                return GPT2_PATTERN
            if kinds == ["Digits", "ByteLevel"]:
                return DIGITS_PATTERN % (r"\p{N}" if first.get("individual_digits") else r"\p{N}+")
        elif kinds == ["Split", "ByteLevel"]:
            pattern = first["pattern"].get("Regex")
            isolated = first.get("behavior") == "Isolated" and not first.get("invert")
            # Oniguruma reads {1,3}+ as a repeated repetition, tiktoken as a possessive one.
            if pattern and isolated and not re.search(r"\d\}\+", pattern):
                return pattern
    raise UserError(f"its pre-tokenizer ({', '.join(map(str, kinds))}) is of an unknown kind")


def read_nfc(normalizer):
    """Whether tokenizer.json's `normalizer` is NFC (Qwen) rather than none."""
    kinds = {step["type"] for step in normalizer.get("normalizers", [normalizer])}
    if kinds - {"NFC"}:
        raise UserError(f"its normalizer ({', '.join(map(str, kinds))}) is of an unknown kind")
    return bool(kinds)


def read_json(file):
    """(ranks, added tokens, pattern, nfc, all that it holds) of a tokenizer.json.

    Raises UserError where it is of another kind, and OSError, ValueError, LookupError, TypeError
    or AttributeError where it is malformed or missing.
    """
    source = json.loads(file.read_text(encoding="utf-8"))
    added = {token["content"]: token["id"] for token in source.get("added_tokens") or ()}
    ranks = read_model(source["model"], added)
    pattern = read_pattern(source.get("pre_tokenizer") or {})
    nfc = bool(source.get("normalizer")) and read_nfc(source["normalizer"])
    return ranks, added, pattern, nfc, source


# --- writing ----------------------------------------------------------------------------------


def list_merges(ranks):
    """The pairs of tokens that spell a token, in the order (id made, left id, right id)."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def to_json(tokenizer):
    """What tokenizer.json holds; `ignore_merges` takes a whole piece first, as tiktoken does."""
    ranks, special, source = tokenizer.ranks, tokenizer.special, tokenizer.source
    shown = {token: token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ranks}
    # Special tokens are in the vocabulary too: so their ids may have gaps.
    vocab = {shown[token]: id for token, id in ranks.items()} | special
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {
        text: {"id": id, "content": text, **flags, "special": text.startswith("<|")}
        for text, id in special.items()
    } | {token["content"]: token for token in source.get("added_tokens") or ()}
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": source.get("post_processor"),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": dict(sorted(vocab.items(), key=lambda example: example[1])),
            "merges": [[shown[left], shown[right]] for left, right in list_merges(ranks)],
        },
    }


def to_jinja(layout, start):
    """`Tokenizer.chat_template`: each message between the affixes of its role, after `start`."""
    return (
        "{% set affixes = " + json.dumps(layout) + " %}"
        "{{ " + json.dumps(start) + " }}{% for m in messages %}"
        "{{ affixes[m['role']][0] + m['content'] + affixes[m['role']][1] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ affixes['assistant'][0] }}{% endif %}"
    )


def to_config(tokenizer):
    """What tokenizer_config.json holds."""
    names = {id: text for text, id in tokenizer.special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": names[tokenizer.end_id],
        "pad_token": names[tokenizer.pad_id],
        "chat_template": tokenizer.chat_template,
    }
