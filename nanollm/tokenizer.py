"""Text to token ids and back: byte-level BPE, special tokens, chat templates and their loss mask.

train_bpe     learns the merges                          Sennrich et al. 2016, arXiv:1508.07909
Tokenizer     encodes with tiktoken, which merges the adjacent pair of lowest rank first; the rank
              of a token, the order in which the trainer made it, is its id
templates     a chat becomes text by the model's own template (Jinja), or by one of ours where it
              has none, and ids are made from that text as transformers' apply_chat_template does
files         tokenizer.json and tokenizer_config.json are read and written as Hugging Face's
              libraries do: transformers.AutoTokenizer gives the same ids. What would encode
              differently is refused.
"""

import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
from tqdm import tqdm

from nanollm.config import UserError, atomic_write, read_json
from nanollm.formats import Unusable
from nanollm.templates import (
    BREAK,
    LAYOUTS,
    NAMED_TOKENS,
    ROLES,
    any_of,
    broken,
    compiled,
    layout_template,
    names_of,
    own_template,
    with_arguments,
)

# What the content of an assistant or tool message may hold as special tokens.
RESULT_TOKENS = ("<tool_result>", "</tool_result>")
CONTENT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", *RESULT_TOKENS)
# In our own tokenizers these come after the ordinary tokens, in this order.
ROLE_TOKENS = tuple(f"<|{role}|>" for role in ROLES)
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", *ROLE_TOKENS, "<|end|>", *CONTENT_TOKENS, "<image>")

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

EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
PAD_NAMES = ("<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<pad>", *EOT_NAMES, "<unk>")
# What is kept of a tokenizer_config.json, beside the names of tokens: the rest doesn't change ids.
KEPT = ("chat_template", "added_tokens_decoder", *(f"{name}_token" for name in NAMED_TOKENS))
NAMES = ("bytes", "gpt2", "cl100k_base", "o200k_base")


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


# --- the tokenizer -------------------------------------------------------------------------------


def with_markers(special, ranks, eos=None):
    """`special`, and ours after the last id where it has the marks of no chat layout."""
    if any(mark in special and end in special for mark, end, _ in LAYOUTS):
        return special
    first, known = 1 + max(*ranks.values(), *special.values()), {*special}
    known |= {"<|endoftext|>"} if known & {eos, *EOT_NAMES} else set()
    new = [token for token in SPECIAL_TOKENS if token not in known]
    return special | {token: first + n for n, token in enumerate(new)}


class Tokenizer:
    """Byte-level BPE with added tokens.

    ranks       {token bytes: id}; of two possible merges the one that makes the lower id goes first
    special     {text: id} of the added tokens, which are never cut, never merged
    pattern     regex that cuts text into pieces; what it does not match becomes pieces of its own
    nfc         bring text to Unicode's NFC first (Qwen); decoding then gives that form
    source      the tokenizer.json that it came from; its added tokens and post-processor are kept
    config      the tokenizer_config.json beside it: names of tokens, the chat template
    generation  the generation_config.json beside it: what ends a completion; the rest is kept

    Markers are the tokens that only a template writes: special ones, and what the template spells.
    Other added tokens are words, found in any text. `end_id` ends a turn of the assistant, and the
    template writes the ids `turn_end` behind it. A document is `begin` (what the post-processor
    puts first, or `eot_id`), its text, and `close`. `vocab_size` is the highest id + 1. Where a
    foreign vocabulary lacks a byte, text with that byte raises UserError.
    """

    def __init__(
        self, ranks, special, pattern=PATTERN, nfc=False, source=None, config=None, generation=None
    ):
        self.ranks, self.special, self.pattern, self.nfc = ranks, special, pattern, nfc
        self.source, self.config, self.generation = source or {}, config or {}, generation or {}
        self.vocab_size = 1 + max(*ranks.values(), *special.values())
        # Some foreign vocabularies lack bytes. tiktoken needs all 256: private ids, refused later.
        absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        self._absent = {self.vocab_size + n: byte for n, byte in enumerate(absent)}
        self._bytes = {id: token for token, id in ranks.items()}
        self._bytes |= {id: text.encode() for text, id in special.items()}
        self.encoding = tiktoken.Encoding(
            "nanollm",
            pat_str=rf"{pattern}|(?:(?!{pattern})[\s\S])+",
            mergeable_ranks=ranks | {byte: id for id, byte in self._absent.items()},
            special_tokens={},
        )
        self.names = names_of(self.config)
        before, self.close = read_post_processor(self.source)
        layout = layout_template(special, self.decode(before))
        self.template = own_template(self.config) or layout
        self.is_layout, self._compiled = self.template == layout, compiled(self.template)
        self._find_added()
        eot = next((special[n] for n in EOT_NAMES if n in special), None)
        eos = special.get(self.names.get("eos_token"), eot)
        self.end_id, self.turn_end = self._end_of_turn(eos)
        self.eot_id = next(id for id in (eot, eos, self.end_id) if id is not None)
        pads = [special.get(name) for name in (self.names.get("pad_token"), *PAD_NAMES)]
        ends = None, self.end_id, *self.turn_end  # which transformers would take for padding
        self.pad_id = next((id for id in pads if id not in ends), self.end_id)
        stops = self.generation.get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops] * (stops is not None)
        self.stop_ids = {*(stops or [self.eot_id]), self.end_id}
        self.begin = before or [self.eot_id]
        self.thought = self._begun_thought()
        spelt = {id: text for text, id in special.items()}
        if not self.config:
            self.config = {"eos_token": spelt[self.end_id]}
            self.names = {"eos_token": spelt[self.end_id], "pad_token": spelt[self.pad_id]}
        self.config = self.config | {"pad_token": spelt[self.pad_id]}  # as config.json says it

    def _find_added(self):
        """How each added token is found in a text, and which of them are markers."""
        tokens = added_tokens(self.special, self.source)
        named = {*self.names.values(), *SPECIAL_TOKENS}
        self._markers = frozenset(
            text
            for text, token in tokens.items()
            if text in named
            or token.get("special", True)
            or (text in self.template and not text[0].isalnum())
        )
        self._found, self._words = (  # split() puts the added tokens at the odd places
            re.compile(f"({any_of(texts).pattern})(?!{BREAK})")
            for texts in (frozenset(tokens), frozenset(tokens) - self._markers)
        )

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a tokenizer of `vocab_size` tokens in all, the special tokens included."""
        ordinary = vocab_size - len(SPECIAL_TOKENS)
        ranks = train_bpe(texts, ordinary) if ordinary >= 256 else {}
        if not ranks or len(ranks) < ordinary:
            least, most = 256 + len(SPECIAL_TOKENS), len(ranks) + len(SPECIAL_TOKENS)
            bound = f"at most {most} for so little text" if ranks else f"at least {least}"
            raise UserError(f"the vocab_size must be {bound}, not {vocab_size}")
        return cls(ranks, with_markers({}, ranks))

    @classmethod
    def from_bytes(cls):
        """The tokenizer that needs no training: a token per byte, and the special tokens."""
        return cls.train([], 256 + len(SPECIAL_TOKENS))

    @classmethod
    def load(cls, name):
        """From a name ("bytes", "gpt2", "cl100k_base", "o200k_base"), or from a folder (or file)
        with a byte-level BPE tokenizer.json, ours or foreign.

        A vocabulary without a chat template and without the tokens of a known layout gets ours
        after its last id, so it grows. Raises UserError where nothing is found, or what is found
        would encode differently.
        """
        if name in NAMES:
            return cls.from_bytes() if name == "bytes" else cls._from_tiktoken(name)
        file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
        raw = [p for p in (file, *Path(name).glob("*")) if p.suffix in (".model", ".tiktoken")]
        if raw and (file in raw or not file.exists()):
            raise UserError(
                f"{raw[0]} is a vocabulary in another form than tokenizer.json; write one with "
                "transformers' AutoTokenizer and save_pretrained, or take a newer release"
            )
        if not file.is_file():
            known = f"a directory with a tokenizer.json, or one of {', '.join(NAMES)}"
            raise UserError(f"the tokenizer {name} must be {known}")
        source, (config, generation) = read_json(file), read_config(file.parent)
        try:
            source["added_tokens"] = read_added(source, config)
            added = {token["content"]: token["id"] for token in source["added_tokens"]}
            ranks = read_model(source["model"], added)
            pattern = read_pattern(source.get("pre_tokenizer") or {})
            eos = names_of(config).get("eos_token")
            special = added if own_template(config) else with_markers(added, ranks, eos)
            return cls(ranks, special, pattern, read_nfc(source), source, config, generation)
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = error if isinstance(error, UserError) else f"it is malformed ({error!r})"
            known = "a byte-level BPE tokenizer.json (as of GPT-2, Llama-3, Qwen3, SmolLM2)"
            raise UserError(f"{file}: {why}; use {known}, or train one") from None

    @classmethod
    def _from_tiktoken(cls, name):
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failed = f"could not download the tokenizer {name} ({type(error).__name__})"
            raise UserError(f'{failed}: go online once, or use "bytes" or a directory') from None
        # Possessive {1,3}+ changes nothing there, and Oniguruma reads it otherwise.
        pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")
        ranks = encoding._mergeable_ranks
        return cls(ranks, with_markers(encoding._special_tokens, ranks), pattern)

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
        if self._absent and (absent := [self._absent[id] for id in ids if id in self._absent]):
            raise UserError(
                f"this tokenizer has no token for the byte {absent[0]!r}: remove the characters "
                "that hold it from the text, or use another tokenizer"
            )
        return ids

    def documents(self, texts):
        """The ids of each text of a list as a document, on all cores."""

        def document(text):
            return [*self.begin, *self.encode(text), *self.close]

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
        prompt, and nothing in it is trained on. In one, a message's "ids" are kept where the
        template keeps its content.

        Markers in a content are plain text, but for <think>, <tool_call> and their like in what the
        assistant and the tools say, and <image>, which becomes `image_tokens` placeholders, where
        that is not 0. Raises UserError on a malformed message, and Unusable on one that the
        template refuses or leaves out, and an answer to train on that it writes otherwise in the
        whole chat.
        """
        if image_tokens and "<image>" not in self.special:
            raise UserError("this tokenizer has no token <image>, as a vision-language model's has")
        messages = [self._read(m, f"message {n}", image_tokens) for n, m in enumerate(messages)]
        text = self._text(messages, generation_prompt)
        self._check_shown(messages, train=not generation_prompt)
        ids, mask, at = [], [], 0
        for n, message in enumerate(messages):
            trained = message.get("loss") is not False and not generation_prompt
            if message["role"] != "assistant" or not trained and "ids" not in message:
                continue
            if trained:
                whole = text if n == len(messages) - 1 else self._text(messages[: n + 1])
                start, said = self._turn(messages[:n], whole)
                own = self._ids(said, image_tokens)
            else:
                start, said = self._text(messages[:n], True), message["content"]
                own = message["ids"]
            if not text.startswith(start + said):
                if not trained:
                    continue
                raise Unusable(
                    "the model's chat template writes this answer otherwise when more follows "
                    "(without its thoughts, perhaps), so it can't be trained on here: end the "
                    'dialogue with it, or give it "loss": false'
                )
            before = self._ids(text[at : len(start)], image_tokens)
            ids += before + own
            mask += [False] * len(before)
            mask += [*self.written(own[:-1]), True] if trained else [False] * len(own)
            at = len(start) + len(said)
        rest = self._ids(text[at:], image_tokens)
        return ids + rest, mask + [False] * len(rest)

    def completion(self, messages, text):
        """(prompt ids, completion ids): the messages up to where the assistant begins, and what it
        writes then, `text` and the end of its turn. Together they begin the ids of `render`.
        """
        turns = [*messages, {"role": "assistant", "content": text}]
        turns = [self._read(turn, f"message {n}") for n, turn in enumerate(turns)]
        prompt, said = self._turn(turns[:-1], self._text(turns))
        self._check_shown(turns, train=True)
        return self._ids(prompt), self._ids(said)

    def with_tokens(self, names):
        """This tokenizer, with those of the tokens `names` that it lacks after its last id."""
        new = [name for name in names if name not in self.special]
        special = self.special | {name: self.vocab_size + n for n, name in enumerate(new)}
        kept = self.source, self.config | {"chat_template": self.template}, self.generation
        return Tokenizer(self.ranks, special, self.pattern, self.nfc, *kept)

    def _read(self, message, where, image_tokens=0):
        """A message as the template is given it, in which no text spells a marker."""
        message = {key: value for key, value in message.items() if value is not None}
        if self.is_layout and "tool_calls" in message:
            message["tool_calls"] = [with_arguments(call, where) for call in message["tool_calls"]]
        free = CONTENT_TOKENS if message["role"] in ("assistant", "tool") else ()
        free += ("<image>",) * bool(image_tokens)
        marks = any_of(self._markers - {*free})
        shown = broken(message, marks)
        if "ids" in message:  # what the assistant wrote: its markers are markers
            parts = itertools.groupby(message["ids"], {*self.special.values()}.__contains__)
            texts = [(self.decode(ids), marker) for marker, ids in parts]
            marks = any_of(self._markers)
            shown["content"] = "".join(t if own else broken(t, marks) for t, own in texts)
        return shown

    def _text(self, messages, generation_prompt=False):
        """What the template makes of messages that `_read` has read."""
        how = {"tools": None, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return self._compiled.render(messages=messages, **self.names, **how)
        except Exception as error:  # a program from elsewhere: it may raise anything
            why = str(error).replace(BREAK, "")
            raise Unusable(f"the model's chat template refuses this dialogue: {why}") from None

    def _check_shown(self, messages, train):
        """Raise Unusable where the model's own template leaves out what a message says: a system
        prompt, a tool's call or result, or the thoughts of an answer to `train` on, which it may
        leave out once more has followed.
        """
        for n, message in enumerate([] if self.is_layout else messages):
            learnt = train and message.get("loss") is not False
            if message["role"] in ("system", "tool") and message["content"].strip():
                parts = {f"what the {message['role']} says": (len(messages), [])}
            else:
                keys = ["reasoning_content"] * learnt + ["tool_calls"]
                less = {key: {k: message[k] for k in message if k != key} for key in keys}
                parts = {f"its {key}": (n + 1, [less[key]]) for key in keys if message.get(key)}
            for what, (end, instead) in parts.items():
                try:
                    without = self._text([*messages[:n], *instead, *messages[n + 1 : end]])
                except Unusable:  # what it can't do without, it shows
                    continue
                if without == self._text(messages[:end]):
                    raise Unusable(f"the model's chat template leaves out {what}")

    def _turn(self, messages, whole):
        """(prompt, completion) as texts: what the messages make, and what the next one, with which
        they make `whole`, adds up to its end of turn.
        """
        prompt = self._text(messages, True)
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

    def _begun_thought(self):
        """What a reasoning model's template begins its answer with, from <think> on; else ""."""
        try:
            prompt = self._text([{"role": "user", "content": "?"}], True)
        except UserError:  # it wants other turns
            return ""
        before, begun, after = prompt.rpartition("<think>")
        return "" if "</think>" in after else begun + after

    def begun(self, prompt):
        """The thought that a prompt's ids begin for the assistant, which is a part of what the
        completion says; "" where it writes that itself.
        """
        ends = self.thought and self.decode(prompt[-16:]).endswith(self.thought)
        return self.thought if ends else ""

    def _ids(self, text, image_tokens=0):
        """Token ids of what the template wrote."""
        ids, image = self.encode(text, special=True), self.special.get("<image>")
        if image_tokens:
            ids = [id for each in ids for id in [each] * (image_tokens if each == image else 1)]
        return ids

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
                return self.special[found[0]], self._ids(after[found.end() :])
        if eos is None:
            raise UserError("its chat template ends no turn, and it has no eos_token")
        return eos, []

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

    def fingerprint(self):
        """SHA-256, in hex, of all that decides the ids."""
        parts = sorted(self.ranks.items()), sorted(self.special.items()), self.pattern, self.nfc
        parts += sorted(self._markers), self.begin, self.close, self.template
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.fingerprint() == other.fingerprint()

    @functools.cached_property
    def _json(self):  # kept: a large vocabulary takes seconds, and every checkpoint saves it
        return json.dumps(to_json(self), ensure_ascii=False) + "\n"

    def save(self, folder):
        """Write tokenizer.json, and tokenizer_config.json with the chat template."""
        config = {"chat_template": self.template} | self.config
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        config["clean_up_tokenization_spaces"] = False
        atomic_write(Path(folder) / "tokenizer.json", self._json)
        text = json.dumps(config, ensure_ascii=False) + "\n"
        atomic_write(Path(folder) / "tokenizer_config.json", text)


# --- files of others -----------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after cuts around each digit, or run of digits: there, blanks go up to the cut.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# It shows bytes as characters (GPT-2): printable ones as themselves, the others, in their order, as
# the characters from U+0100 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {b: b for b in PRINTABLE} | {b: 256 + n for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def read_config(folder):
    """(what is kept of tokenizer_config.json, generation_config.json) of a model folder; where the
    latter doesn't say what ends a completion, config.json does.
    """

    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read("tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read("special_tokens_map.json")
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = {key: value for key, value in config.items() if key in KEPT}
    generation = read("generation_config.json")
    if generation.get("eos_token_id") is None:
        generation["eos_token_id"] = read("config.json").get("eos_token_id")
    return config, generation


def read_added(source, config):
    """The added tokens of tokenizer.json, and those that only tokenizer_config.json names."""
    added = {token["content"]: token for token in source.get("added_tokens") or ()}
    for id, token in (config.pop("added_tokens_decoder", None) or {}).items():
        added.setdefault(token["content"], {"id": int(id), "special": False, **token})
    for text in names_of(config).values():
        if text not in added and text in source["model"]["vocab"]:
            id = source["model"]["vocab"][text]
            added[text] = {"id": id, "content": text, "special": True, "normalized": False}
    nfc = read_nfc(source)
    for text, token in added.items():
        odd = [key for key in ("single_word", "lstrip", "rstrip") if token.get(key)]
        if nfc and token.get("normalized") and unicodedata.normalize("NFD", text) != text:
            odd.append("normalized")  # looked for after NFC
        if odd:
            raise UserError(f"its token {text!r} is {odd[0]}, which is not implemented")
    return list(added.values())


def read_post_processor(source):
    """The ids that transformers writes before and after a plain text."""
    processor = source.get("post_processor") or {"processors": []}
    ids = [], []
    for step in processor.get("processors", [processor]):
        if step["type"] == "TemplateProcessing":
            after = False
            for piece in step["single"]:
                after = after or "Sequence" in piece
                if "SpecialToken" in piece:
                    ids[after].extend(step["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
        elif step["type"] != "ByteLevel":
            raise UserError(f"its post-processor ({step['type']}) is of an unknown kind")
    return ids


def read_model(model, added):
    """The ranks {token bytes: id} of tokenizer.json's `model`, without the `added` tokens."""
    unknown = "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"
    foreign = [key for key in unknown if model.get(key)]
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
        by_regex = last.get("use_regex", True)
        if by_regex and len(kinds) == 1:
            return GPT2_PATTERN
        if by_regex and kinds == ["Digits", "ByteLevel"]:
            return DIGITS_PATTERN % (r"\p{N}" if first.get("individual_digits") else r"\p{N}+")
        if not by_regex and kinds == ["Split", "ByteLevel"]:
            pattern = first["pattern"].get("Regex")
            isolated = first.get("behavior") == "Isolated" and not first.get("invert")
            # Oniguruma reads {1,3}+ as a repeated repetition, tiktoken as a possessive one.
            if pattern and isolated and not re.search(r"\d\}\+", pattern):
                return pattern
    raise UserError(f"its pre-tokenizer ({', '.join(map(str, kinds))}) is of an unknown kind")


def read_nfc(source):
    """Whether tokenizer.json's normalizer is NFC (Qwen) rather than none."""
    normalizer = source.get("normalizer") or {"normalizers": []}
    kinds = {step["type"] for step in normalizer.get("normalizers", [normalizer])}
    if kinds - {"NFC"}:
        raise UserError(f"its normalizer ({', '.join(map(str, kinds))}) is of an unknown kind")
    return bool(kinds)


def added_tokens(special, source):
    """{text: what tokenizer.json says} of the added tokens, those that `source` lacks included."""
    known = {token["content"]: token for token in source.get("added_tokens") or ()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text, id in special.items():
        kind = {"special": text.startswith("<|") or text not in SPECIAL_TOKENS}
        known.setdefault(text, {"id": id, "content": text} | plain | kind)
    return {text: known[text] for text in special}


def list_merges(ranks):
    """The pairs of tokens that spell a token, in the order (id made, left id, right id)."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def to_json(tokenizer):
    """What tokenizer.json holds; `ignore_merges` takes a whole piece first, as tiktoken does."""
    ranks, special, source = tokenizer.ranks, tokenizer.special, tokenizer.source
    shown = {token: token.decode("latin-1").translate(BYTE_TO_CHAR) for token in ranks}
    # Special tokens are in the vocabulary too: so their ids may have gaps.
    vocab = {shown[token]: id for token, id in ranks.items()} | special
    added = added_tokens(special, source).values()
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bytes_ |= {"use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": source.get("post_processor"),
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": dict(sorted(vocab.items(), key=lambda pair: pair[1])),
            "merges": [[shown[left], shown[right]] for left, right in list_merges(ranks)],
        },
    }
