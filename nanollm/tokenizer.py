"""Text to token ids and back: byte-level BPE, special tokens, chat templates and their loss mask.

train_bpe     learns the merges                          Sennrich et al. 2016, arXiv:1508.07909
to_json       what they become: a tokenizer.json, as Hugging Face's libraries read it too
Tokenizer     encodes what a tokenizer.json, ours or a downloaded one, says: tiktoken merges the
              adjacent pair of lowest rank first; the rank of a token is its id. A chat becomes text
              by the model's own template (Jinja), or by one of ours where it has none

Ids are those of transformers.AutoTokenizer and its apply_chat_template. What would encode
differently is refused.
"""

import functools
import hashlib
import heapq
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
from tqdm import tqdm

from nanollm import templates
from nanollm.config import UserError, atomic_write, read_json
from nanollm.formats import Unusable
from nanollm.templates import BREAK

# What the content of an assistant or tool message may hold as special tokens.
RESULT_TOKENS = ("<tool_result>", "</tool_result>")
CONTENT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", *RESULT_TOKENS)
# In our own tokenizers these come after the ordinary tokens, in this order.
ROLE_TOKENS = tuple(f"<|{role}|>" for role in templates.ROLES)
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", *ROLE_TOKENS, "<|end|>", *CONTENT_TOKENS, "<image>")
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
PAD_NAMES = ("<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<pad>", *EOT_NAMES, "<unk>")

# Text is cut into pieces, and no token crosses a cut. Every character must fall in some piece, for
# tiktoken drops what no alternative matches. {0,64} bounds the backtracking on long blanks.
PATTERN = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])",  # it's, we'll; but not 'tis
        r" ?[\p{L}\p{M}]+",  # a word, with the space before it
        r"\p{N}",  # digits one by one, so that columns line up
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation, with the line end behind it
        r"\s{0,64}[\r\n]+",  # line ends, with the blanks before them
        r"\s{1,64}(?!\S)",  # blanks, but the last one opens the next word
        r"\s",
    )
)


# --- training ------------------------------------------------------------------------------------


# The standard library knows no classes of Unicode. It cuts, in the same places, a text of the same
# kinds of characters that are all ASCII.
ASCII_PATTERN = PATTERN.replace(r"\p{L}\p{M}", "A-Za-z").replace(r"\p{N}", r"\d")


@functools.cache
def ascii_kind(char):
    """An ASCII character of the same kind: letter or mark, number, blank, anything else."""
    shown = {"L": "Z", "M": "Z", "N": "0", "Z": "\t"} | ({"C": "\t"} if char == "\x85" else {})
    return char if char.isascii() else shown.get(unicodedata.category(char)[0], ".")


def cut(text):
    """The pieces of a text, as PATTERN has them for characters that Python's Unicode knows."""
    kinds = text if text.isascii() else "".join(map(ascii_kind, text))
    found = re.finditer(ASCII_PATTERN, kinds, re.ASCII)
    return [text[match.start() : match.end()] for match in found]


def merge_pair(word, pair, new):
    """Replace each adjacent `pair` in the list of ids `word` by the id `new`, left to right."""
    merged, i = [], 0
    while i < len(word):
        found = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        merged.append(new if found else word[i])
        i += 1 + found
    return merged


def train_bpe(texts, vocab_size):
    """Learn byte-level BPE: from the 256 bytes on, make the most frequent adjacent pair a token.

    Of equally frequent pairs the one with the smaller (left id, right id) goes first. A merge
    recounts only the words that hold the pair (Sennrich et al. 2016, algorithm 1, incremental).
    Returns {token bytes: rank}, shorter than `vocab_size` where the texts hold no further pair.
    """
    pieces = Counter()
    for text in [texts] if isinstance(texts, str) else texts:
        pieces.update(cut(text))
    words = [list(piece.encode()) for piece in pieces]
    freqs = list(pieces.values())
    counts, where = Counter(), defaultdict(set)  # pair -> occurrences, pair -> indices into words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += freqs[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in range(256)]
    bar = tqdm(total=vocab_size - 256, desc="bpe", disable=None, leave=False)
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # out of date: counts fall without telling the heap
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, touched = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in where.pop(pair):
            old, word = words[i], merge_pair(words[i], pair, new)
            for each in zip(old, old[1:]):
                counts[each] -= freqs[i]
            for each in zip(word, word[1:]):
                counts[each] += freqs[i]
                if new in each:
                    where[each].add(i)
                    touched.add(each)
            words[i] = word
        for each in touched:
            heapq.heappush(heap, (-counts[each], each))
        bar.update()
    bar.close()
    return {token: rank for rank, token in enumerate(tokens)}


# --- tokenizer.json ------------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after cuts around each digit (SmolLM2): there, blanks go up to the cut.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# It shows bytes as characters (GPT-2): printable ones as themselves, the others, in their order, as
# the characters from U+0100 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {b: b for b in PRINTABLE} | {b: 256 + n for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_json(ranks, pattern=PATTERN):
    """What tokenizer.json holds for ranks {token bytes: id} and the regex that cuts text. Its
    `ignore_merges` takes a whole piece first, as tiktoken does.
    """
    shown = {token: token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ranks}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split |= {"invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bytes_ |= {"use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": None,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {shown[token]: ranks[token] for token in sorted(ranks, key=ranks.get)},
            "merges": [[shown[left], shown[right]] for left, right in list_merges(ranks)],
        },
    }


def list_merges(ranks):
    """The pairs of tokens that spell a token, in the order (id made, left id, right id)."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def add_tokens(source, texts):
    """A tokenizer.json with these tokens after its last id. All added tokens then stand in the
    vocabulary, too: to those that don't, transformers gives the ids that follow it.
    """
    added, vocab = [*source["added_tokens"]], dict(source["model"]["vocab"])
    vocab |= {token["content"]: token["id"] for token in added}
    for id, text in enumerate(texts, 1 + max(vocab.values())):
        vocab[text] = id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": id, "content": text} | flags | {"special": text.startswith("<|")})
    return source | {"added_tokens": added, "model": source["model"] | {"vocab": vocab}}


def with_markers(source, eos=None):
    """A tokenizer.json with our special tokens, where it has the marks of no chat layout."""
    known = {token["content"] for token in source["added_tokens"]}
    if any({mark, end} <= known for mark, end, _ in templates.LAYOUTS):
        return source
    known |= {"<|endoftext|>"} if known & {eos, *EOT_NAMES} else set()
    return add_tokens(source, [token for token in SPECIAL_TOKENS if token not in known])


def read_added(tokens):
    """{text: what tokenizer.json says of it} of the added tokens."""
    for token in tokens:
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise UserError(f"its token {token['content']!r} is {option}: not implemented")
    return {token["content"]: token for token in tokens}


def read_model(model, special):
    """The ranks {token bytes: id} of tokenizer.json's `model`, without the added tokens."""
    unknown = "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    foreign = [key for key in unknown if model.get(key)]
    if model["type"] != "BPE" or foreign:
        raise UserError(f"its model is {' with '.join([model['type'], *foreign])}")
    names = {name: id for name, id in model["vocab"].items() if special.get(name) != id}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [names.get(left + right, -1) for left, right in merges]
    # tiktoken merges by id, tokenizer.json by place in the list: they must say the same
    if -1 in made or made != sorted(made):
        raise UserError("its merges are not in the order of the ids that they make")
    # tiktoken finds a whole piece even where no merge makes it
    unmade = {id for name, id in names.items() if len(name) > 1}.difference(made)
    if unmade and not model.get("ignore_merges"):
        raise UserError(f"its token {min(unmade)} is made by no merge")
    return {bytes(CHAR_TO_BYTE[ord(char)] for char in name): id for name, id in names.items()}


def read_pattern(pre):
    """The one pattern that cuts text as tokenizer.json's `pre_tokenizer` does."""
    *before, last = pre.get("pretokenizers", [pre])
    by_regex = last.get("use_regex", True)
    if last["type"] == "ByteLevel" and last["add_prefix_space"] is False:
        match before:
            case [] if by_regex:
                return GPT2_PATTERN
            case [{"type": "Digits", "individual_digits": True}] if by_regex:
                return DIGITS_PATTERN
            case [{"type": "Split", "pattern": {"Regex": pattern}} as split] if not by_regex:
                if split["behavior"] == "Isolated" and not split["invert"]:
                    return pattern
    raise UserError(f"its pre-tokenizer ({last['type']}) is of an unknown kind")


def read_normalizer(normalizer):
    """Whether tokenizer.json brings text to Unicode's NFC first (Qwen), or leaves it as it is."""
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(f"its normalizer ({normalizer['type']}) is of an unknown kind")
    return normalizer is not None


def read_post_processor(processor):
    """The ids that transformers writes before a plain text."""
    ids = []
    for step in processor.get("processors", [processor]) if processor else []:
        match step:
            case {"type": "TemplateProcessing", "single": [*before, {"Sequence": _}]}:
                for piece in before:
                    ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            case {"type": kind} if kind != "ByteLevel":
                raise UserError(f"its post-processor ({kind}) is of an unknown kind")
    return ids


def read_configs(folder):
    """(what is kept of tokenizer_config.json: names of tokens and the chat template;
    generation_config.json, where config.json may say what ends a completion) of a model folder.
    """

    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    kept = "chat_template", *(f"{name}_token" for name in templates.NAMED_TOKENS)
    config = {key: x for key, x in read("tokenizer_config.json").items() if key in kept}
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    generation = read("generation_config.json")
    if generation.get("eos_token_id") is None:
        generation["eos_token_id"] = read("config.json").get("eos_token_id")
    return config, generation


# --- the tokenizer -------------------------------------------------------------------------------


class Tokenizer:
    """Byte-level BPE with added tokens.

    source      what tokenizer.json says, as `to_json` makes it or downloaded
    config      the tokenizer_config.json beside it: names of tokens, the chat template
    generation  the generation_config.json beside it: what ends a completion; the rest is kept

    Markers are the tokens that only a template writes: special ones, and what the template spells.
    Other added tokens are words, found in any text. `end_id` ends a turn of the assistant, and the
    template writes the ids `turn_end` behind it. A document is `begin` (what the post-processor
    puts first, or `eot_id`) and its text. `vocab_size` is the highest id + 1. Where a foreign
    vocabulary lacks a byte, text with that byte raises UserError.
    """

    def __init__(self, source, config=None, generation=None):
        self.source, self.config, self.generation = source, config or {}, generation or {}
        added = read_added(source["added_tokens"])
        self.special = {text: token["id"] for text, token in added.items()}
        self.ranks = read_model(source["model"], self.special)
        self.nfc = read_normalizer(source["normalizer"])
        self.vocab_size = 1 + max(*self.ranks.values(), *self.special.values())
        self._bytes = {id: token for token, id in self.ranks.items()}
        self._bytes |= {id: text.encode() for text, id in self.special.items()}
        # tiktoken needs all 256 bytes: those that a vocabulary lacks get ids that `encode` refuses
        absent = {bytes([byte]) for byte in range(256)} - self.ranks.keys()
        pattern = read_pattern(source["pre_tokenizer"])
        self.encoding = tiktoken.Encoding(
            "nanollm",
            pat_str=rf"{pattern}|(?:(?!{pattern})[\s\S])+",  # it drops what no alternative matches
            mergeable_ranks=self.ranks | {b: self.vocab_size + n for n, b in enumerate(absent)},
            special_tokens={},
        )
        before = read_post_processor(source["post_processor"])
        self.names = templates.names_of(self.config)
        layout = templates.layout_template(self.special, self.decode(before))
        self.template = templates.own_template(self.config) or layout
        self.is_layout, self._compiled = self.template == layout, templates.compiled(self.template)
        self._find_markers(added)
        self._find_ends(before)

    def _find_markers(self, added):
        """Which added tokens are markers, and how they and words are found in a text."""
        ours = {*self.names.values(), *SPECIAL_TOKENS}
        self._markers = frozenset(
            text
            for text, token in added.items()
            if text in ours or token["special"] or (text in self.template and not text[0].isalnum())
        )
        # split() puts the added tokens at the odd places
        words = frozenset(added) - self._markers
        self._found = re.compile(f"({templates.any_of(frozenset(added)).pattern})(?!{BREAK})")
        self._words = re.compile(f"({templates.any_of(words).pattern})(?!{BREAK})")

    def _find_ends(self, before):
        """The ids that end a turn, a text and a completion, and that of padding."""
        special = self.special
        eot = next((special[name] for name in EOT_NAMES if name in special), None)
        eos = special.get(self.names.get("eos_token"), eot)
        self.end_id, self.turn_end = self._end_of_turn(eos)
        self.eot_id = next(id for id in (eot, eos, self.end_id) if id is not None)
        self.begin = before or [self.eot_id]
        stops = self.generation.get("eos_token_id")
        stops = self.eot_id if stops is None else stops
        self.stop_ids = {*(stops if isinstance(stops, list) else [stops]), self.end_id}
        pads = [special.get(name) for name in (self.names.get("pad_token"), *PAD_NAMES)]
        ends = None, self.end_id, *self.turn_end  # which transformers would take for padding
        self.pad_id = next((id for id in pads if id not in ends), self.end_id)
        spelt = {id: text for text, id in special.items()}
        self.config = {"eos_token": spelt[self.end_id]} | self.config
        self.config |= {"pad_token": spelt[self.pad_id]}  # as config.json will say it

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a tokenizer of `vocab_size` tokens in all, the special tokens included."""
        ordinary = vocab_size - len(SPECIAL_TOKENS)
        ranks = train_bpe(texts, ordinary) if ordinary >= 256 else {}
        if not ranks or len(ranks) < ordinary:
            least, most = 256 + len(SPECIAL_TOKENS), len(ranks) + len(SPECIAL_TOKENS)
            bound = f"at most {most} for so little text" if ranks else f"at least {least}"
            raise UserError(f"the vocab_size must be {bound}, not {vocab_size}")
        return cls(with_markers(to_json(ranks)))

    @classmethod
    def from_bytes(cls):
        """The tokenizer that needs no training: a token per byte, and the special tokens."""
        return cls.train([], 256 + len(SPECIAL_TOKENS))

    @classmethod
    def from_gpt2(cls):
        """GPT-2's, which tiktoken downloads once, and our special tokens behind its own."""
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failed = f"could not download the tokenizer gpt2 ({type(error).__name__})"
            raise UserError(f'{failed}: go online once, or use "bytes" or a directory') from None
        source = to_json(encoding._mergeable_ranks, encoding._pat_str)
        return cls(with_markers(add_tokens(source, encoding._special_tokens)))

    @classmethod
    def load(cls, folder):
        """From a folder with a byte-level BPE tokenizer.json, ours or foreign; or "bytes", "gpt2".

        A vocabulary without a chat template and without the tokens of a known layout gets ours
        after its last id, so it grows. Raises UserError where nothing is found, or what is found
        would encode differently.
        """
        if folder in ("bytes", "gpt2"):
            return cls.from_bytes() if folder == "bytes" else cls.from_gpt2()
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            known = "a directory with a tokenizer.json, bytes or gpt2"
            raise UserError(f"the tokenizer {folder} must be {known}")
        source, (config, generation) = read_json(file), read_configs(Path(folder))
        try:
            if not templates.own_template(config):
                source = with_markers(source, templates.names_of(config).get("eos_token"))
            return cls(source, config, generation)
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = error if isinstance(error, UserError) else f"it is malformed ({error!r})"
            known = "a byte-level BPE tokenizer.json (as of GPT-2, Llama-3, Qwen3, SmolLM2)"
            raise UserError(f"{file}: {why}; use {known}, or train one") from None

    def with_tokens(self, names):
        """This tokenizer, with those of the tokens `names` that it lacks after its last id."""
        source = add_tokens(self.source, [name for name in names if name not in self.special])
        return Tokenizer(source, self.config, self.generation)

    # -- text and ids

    def encode(self, text, special=False):
        """Token ids of `text`. Markers in it stay plain text, so that no user can forge a role,
        unless `special` is true.
        """
        ids = []
        for n, part in enumerate((self._found if special else self._words).split(text)):
            if n % 2:
                ids.append(self.special[part])
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            ids += self.encoding.encode_ordinary(part.replace(BREAK, "") if special else part)
        if max(ids, default=0) >= self.vocab_size:
            raise UserError("this tokenizer has no tokens for some characters of the text")
        return ids

    def documents(self, texts):
        """The ids of each text of a list as a document, on all cores."""

        def document(text):
            return [*self.begin, *self.encode(text)]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(document, texts))

    def decode(self, ids):
        """The text that the ids stand for, special tokens included; U+FFFD where it isn't UTF-8."""
        return b"".join(self._bytes.get(int(id), b"\xff") for id in ids).decode("utf-8", "replace")

    # -- chat

    def render(self, messages, generation_prompt=False, image_tokens=0):
        """A chat as (ids, mask), the ids of transformers' apply_chat_template.

        mask is True on what the assistant writes: what a message adds to the prompt that the
        messages before it make, up to the end of its turn; not in a message with "loss": false, and
        not in what tools have answered in between. Such a completion is made into ids on its own,
        as it is sampled. `generation_prompt` adds the begin of the assistant's turn; that is a
        prompt, and nothing in it is trained on.

        Markers in a content are plain text, but for <think>, <tool_call> and their like in what the
        assistant and the tools say, and <image>, which becomes `image_tokens` placeholders, where
        that is not 0. Raises UserError on a malformed message, and Unusable on one that the
        template refuses or leaves out, and an answer to train on that it writes otherwise in the
        whole chat.
        """
        if image_tokens and "<image>" not in self.special:
            raise UserError("this tokenizer has no token <image>, as a vision-language model's has")
        messages = [self._read(message, image_tokens) for message in messages]
        text = self._text(messages, generation_prompt)
        self._check_shown(messages, text, generation_prompt)
        ids, mask, at = [], [], 0
        for n, message in enumerate(messages):
            trained = message["role"] == "assistant" and message.get("loss") is not False
            if generation_prompt or not trained:
                continue
            prompt, said = self._turn(messages, n)
            if not text.startswith(prompt + said):
                raise Unusable(
                    "the model's chat template writes this answer otherwise when more follows "
                    "(without its thoughts, perhaps), so it can't be trained on here: end the "
                    'dialogue with it, or give it "loss": false'
                )
            before, own = (self.encode(part, True) for part in (text[at : len(prompt)], said))
            ids += before + own
            mask += [False] * len(before) + [*self.written(own[:-1]), True]
            at = len(prompt + said)
        rest = self.encode(text[at:], True)
        return ids + rest, mask + [False] * len(rest)

    def completion(self, messages, text):
        """(prompt ids, completion ids): the messages up to where the assistant begins, and what it
        writes then, `text` and the end of its turn. Together they begin the ids of `render`.
        """
        messages = [message | {"loss": False} for message in messages]
        ids, mask = self.render([*messages, {"role": "assistant", "content": text}])
        begin, end = mask.index(True), len(mask) - mask[::-1].index(True)
        return ids[:begin], ids[begin:end]

    def _read(self, message, image_tokens):
        """A message as the template is given it, in which no text spells a marker."""
        message = {key: value for key, value in message.items() if value is not None}
        if "tool_calls" in message:
            message["tool_calls"] = [*map(templates.with_arguments, message["tool_calls"])]
        free = CONTENT_TOKENS if message["role"] in ("assistant", "tool") else ()
        if image_tokens:
            free += ("<image>",)
            message["content"] = message["content"].replace("<image>", "<image>" * image_tokens)
        return templates.broken(message, templates.any_of(self._markers - {*free}))

    def _text(self, messages, generation_prompt=False):
        """What the template makes of messages that `_read` has read."""
        how = {"tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return self._compiled.render(messages=messages, **self.names, **how)
        except Exception as error:  # a program from elsewhere: it may raise anything
            why = f"the model's chat template refuses this dialogue: {error}".replace(BREAK, "")
            raise Unusable(why) from None

    def _check_shown(self, messages, text, generation_prompt=False):
        """Raise Unusable where the model's own template leaves out, of `text`, what a message says:
        a system prompt, a tool's result or call, or the thoughts of an answer to train on. What it
        shows, it shows otherwise when it is empty.
        """
        for n, message in enumerate([] if self.is_layout else messages):
            parts = ["tool_calls"]
            if message["role"] in ("system", "tool") and message["content"].strip():
                parts.append("content")
            if message.get("loss") is not False and not generation_prompt:
                parts.append("reasoning_content")
            for part in filter(message.get, parts):
                empty = message | {part: type(message[part])()}
                changed = [*messages[:n], empty, *messages[n + 1 :]]
                try:
                    without = self._text(changed, generation_prompt)
                except Unusable:  # what it can't do without, it shows
                    continue
                if without == text:
                    said = f"the {message['role']}'s {part}"
                    raise Unusable(f"the model's chat template leaves out {said}")

    def _turn(self, messages, n):
        """(prompt, completion) as texts: what the first n messages make, and what the next one adds
        to that, up to its end of turn.
        """
        prompt, whole = self._text(messages[:n], True), self._text(messages[: n + 1])
        if not whole.startswith(prompt):
            raise Unusable(
                "the model's chat template begins this answer otherwise than it prompts for one "
                f"({prompt[-30:].replace(BREAK, '')!r}), so that it can't be trained on"
            )
        for found in self._found.finditer(whole, len(prompt)):
            if self.special[found[0]] in self.stop_ids:
                return prompt, whole[len(prompt) : found.end()]
        never = "writes no token that ends an answer, so that none can be trained on"
        raise Unusable(f"the model's chat template {never}")

    def _end_of_turn(self, eos):
        """(id that ends the assistant's turn, the ids behind it), as the template ends a dialogue;
        (eos, []) where it writes no such token.
        """
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "xyzzy"}]
        try:
            after = self._text(turns).rpartition("xyzzy")[2]
        except UserError:  # it wants other turns
            after = ""
        for found in self._found.finditer(after):
            if found[0] in self._markers:
                return self.special[found[0]], self.encode(after[found.end() :], True)
        if eos is None:
            raise UserError("its chat template ends no turn, and it has no eos_token")
        return eos, []

    def begun(self, prompt):
        """The thought that a prompt's ids begin for the assistant, as a reasoning model's template
        does, which is a part of what the completion says; "" where it writes that itself.
        """
        _, begun, after = self.decode(prompt[-16:]).rpartition("<think>")
        return "" if after.strip() else begun + after

    def written(self, ids):
        """True for each id that an assistant writes itself, False from <tool_result> to
        </tool_result>: that comes from the tool (nanollm/tools.py), and nobody learns it.
        """
        start, end = (self.special.get(token) for token in RESULT_TOKENS)
        own, inside = [], False
        for id in ids:
            inside = inside or id == start
            own.append(not inside)
            inside = inside and id != end
        return own

    # -- identity and files

    @functools.cached_property
    def _json(self):  # kept: a large vocabulary takes seconds, and every checkpoint saves it
        return json.dumps(self.source, ensure_ascii=False) + "\n"

    def fingerprint(self):
        """SHA-256, in hex, of all that decides the ids."""
        return hashlib.sha256((self._json + self.template).encode()).hexdigest()

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.fingerprint() == other.fingerprint()

    def save(self, folder):
        """Write tokenizer.json, and tokenizer_config.json with the chat template."""
        config = {"chat_template": self.template} | self.config
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        config["clean_up_tokenization_spaces"] = False
        atomic_write(Path(folder) / "tokenizer.json", self._json)
        text = json.dumps(config, ensure_ascii=False) + "\n"
        atomic_write(Path(folder) / "tokenizer_config.json", text)
