"""Text to token ids and back: byte-level BPE, special tokens, the chat layout and its loss mask.

train_bpe     learns the merges                          Sennrich et al. 2016, arXiv:1508.07909
Tokenizer     encodes with tiktoken, which merges the adjacent pair of lowest rank first; the rank
              of a token, the order in which the trainer made it, is its id
files         tokenizer.json and tokenizer_config.json are read and written as Hugging Face's
              libraries do: transformers.AutoTokenizer gives the same ids, and its chat template
              the same ids as `Tokenizer.render`. What would encode differently is refused.
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

from nanollm.config import UserError, atomic_write

# What the content of an assistant or tool message may hold as special tokens.
RESULT_TOKENS = ("<tool_result>", "</tool_result>")
CONTENT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", *RESULT_TOKENS)
# In our own tokenizers these come after the ordinary tokens, in this order.
ROLES = ("system", "user", "assistant", "tool")
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

# Chat layouts, role -> (prefix, suffix). The first one whose two marks the vocabulary has is used.
CHATML = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES}
CHATML["tool"] = ("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n")
LLAMA3 = {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}
LLAMA3["tool"] = ("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>")
OURS = {role: (f"<|{role}|>", "<|end|>") for role in ROLES}
LAYOUTS = (
    ("<|im_start|>", "<|im_end|>", CHATML),
    ("<|start_header_id|>", "<|eot_id|>", LLAMA3),
    ("<|user|>", "<|end|>", OURS),
)
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>")
PAD_NAMES = ("<|pad|>", "<|finetune_right_pad_id|>", "<pad>", *EOT_NAMES)
NAMES = ("bytes", "gpt2", "cl100k_base", "o200k_base")


# --- training ------------------------------------------------------------------------------------


# The standard library knows no classes of Unicode. It cuts, in the same places, a text of the same
# kinds of characters that are all ASCII.
ASCII_PATTERN = PATTERN.replace(r"\p{L}\p{M}", "A-Za-z").replace(r"\p{N}", r"\d")


class AsciiKinds(dict):
    """{code point: ASCII character of its kind}: letter or mark, number, blank, anything else."""

    def __missing__(self, code):
        shown = {"L": "Z", "M": "Z", "N": "0", "Z": "\t"}
        kind = "Z" if code == 0x85 else unicodedata.category(chr(code))[0]
        self[code] = chr(code) if code < 128 else shown.get(kind, ".")
        return self[code]


KINDS = AsciiKinds()


def cut(text):
    """The pieces of a text, as PATTERN has them for characters that Python's Unicode knows."""
    kinds = re.finditer(ASCII_PATTERN, text.translate(KINDS), re.ASCII)
    return [text[match.start() : match.end()] for match in kinds]


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


def with_markers(special, ranks):
    """`special`, and ours after the last id where it has the marks of no chat layout."""
    if any(mark in special and end in special for mark, end, _ in LAYOUTS):
        return special
    first = 1 + max(*ranks.values(), *special.values())
    new = [token for token in SPECIAL_TOKENS if token not in special]
    return special | {token: first + n for n, token in enumerate(new)}


def text_of(message, where):
    """The content of a message, with its thoughts before and its calls behind it, as the layouts
    write them. Raises UserError, beginning with `where`, on a malformed message.
    """
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"{where}: role {role!r:.40} must be one of {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls") or []
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise UserError(f'{where}: needs a "content" that is text, in a JSON object')
    thoughts = message.get("reasoning_content")
    calls = "".join(f"<tool_call>{call_text(call, where)}</tool_call>" for call in calls)
    return (f"<think>{thoughts}</think>" if thoughts else "") + content + calls


def call_text(call, where):
    """OpenAI's {"function": {"name", "arguments"}} as nanollm/tools.py reads it."""
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        (argument,) = arguments.values()
        return f"{name}({argument})"
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{where}: a tool call needs a name and one argument") from None


@functools.cache
def splitter(tokens):
    """A compiled pattern whose split() puts the special `tokens` at the odd places."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


class Tokenizer:
    """Byte-level BPE with special tokens.

    ranks       {token bytes: id}; of two possible merges the one that makes the lower id goes first
    special     {text: id} of the tokens that stand for themselves, never cut, never merged
    pattern     regex that cuts text into pieces; what it does not match becomes pieces of its own
    nfc         bring text to Unicode's NFC first (Qwen); decoding then gives that form
    source      the tokenizer.json that it came from; its added tokens and post-processor are kept

    `vocab_size` is the highest id + 1. `eot_id` separates documents, `end_id` ends a turn of a
    chat, `stop_ids` holds both; foreign vocabularies name them <|im_end|>, <|eot_id|> and so on.
    Where a foreign vocabulary lacks a byte, text with that byte raises UserError.
    """

    def __init__(self, ranks, special, pattern=PATTERN, nfc=False, source=None):
        self.ranks, self.special, self.pattern, self.nfc = ranks, special, pattern, nfc
        self.source = source or {}
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
        end, self.layout = next(
            (end, layout) for mark, end, layout in LAYOUTS if mark in special and end in special
        )
        self.end_id = special[end]
        self.eot_id = next((special[name] for name in EOT_NAMES if name in special), self.end_id)
        self.pad_id = next((special[name] for name in PAD_NAMES if name in special), self.end_id)
        self.stop_ids = {self.eot_id, self.end_id}
        self.content_tokens = tuple(token for token in CONTENT_TOKENS if token in special)
        self.start = "<|begin_of_text|>" if "<|begin_of_text|>" in special else ""

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

        A vocabulary without the tokens of a known chat layout gets ours after its last id, so it
        grows. Raises UserError where nothing is found, or what is found would encode differently.
        """
        if name in NAMES:
            return cls.from_bytes() if name == "bytes" else cls._from_tiktoken(name)
        file = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
        try:
            source = json.loads(file.read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in source.get("added_tokens") or ()}
            ranks = read_model(source["model"], added)
            pattern = read_pattern(source.get("pre_tokenizer") or {})
            return cls(ranks, with_markers(added, ranks), pattern, read_nfc(source), source)
        except OSError:
            known = f"a directory with a tokenizer.json, or one of {', '.join(NAMES)}"
            raise UserError(f"the tokenizer {name} must be {known}") from None
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
        """Token ids of `text`. Special tokens in it stay plain text, so that no user can forge a
        role, unless `special` is true.
        """
        return self._encode(text, tuple(self.special) if special else ())

    def _encode(self, text, special):
        """Token ids of `text`, reading the tokens `special` in it as special tokens."""
        ids = []
        for n, part in enumerate(splitter(special).split(text) if special else [text]):
            if n % 2:
                ids.append(self.special[part])
            else:
                part = unicodedata.normalize("NFC", part) if self.nfc else part
                ids += self.encoding.encode_ordinary(part)
        if self._absent and (absent := [self._absent[id] for id in ids if id in self._absent]):
            raise UserError(
                f"this tokenizer has no token for the byte {absent[0]!r}: remove the characters "
                "that hold it from the text, or use another tokenizer"
            )
        return ids

    def encode_batch(self, texts):
        """`encode` of each text of a list, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """The text that the ids stand for, special tokens included; U+FFFD where it isn't UTF-8."""
        return b"".join(self._bytes.get(int(id), b"\xff") for id in ids).decode("utf-8", "replace")

    # -- chat

    @functools.cached_property
    def _affixes(self):
        """role -> (ids before the content, ids after it)."""
        return {
            role: tuple(self.encode(text, special=True) for text in affixes)
            for role, affixes in self.layout.items()
        }

    def render(self, messages, generation_prompt=False, image_tokens=0):
        """A chat as (ids, mask): per message the prefix of its role, the content, the suffix.

        mask is True on what the assistant writes, its content and the end of its turn, save in a
        message with "loss": false and in what tools have answered in between. Ids are put together
        turn by turn, and never made from the whole text again. Special tokens in a content are
        plain text, but for <think>, <tool_call> and their like in what the assistant and the tools
        say, and <image>, which becomes `image_tokens` placeholders, where that is not 0.
        `generation_prompt` adds the assistant's prefix. Raises UserError on a malformed message.
        """
        if image_tokens and "<image>" not in self.special:
            raise UserError(
                "this tokenizer has no token <image>: start from a model of this project, or one "
                "whose vocabulary has no chat tokens of its own"
            )
        ids = self.encode(self.start, special=True)
        mask = [False] * len(ids)
        for n, message in enumerate(messages):
            said = text_of(message, f"message {n}")
            role = message["role"]
            allowed = self.content_tokens if role in ("assistant", "tool") else ()
            content = self._encode(said, allowed + ("<image>",) * bool(image_tokens))
            if image_tokens:
                image = self.special["<image>"]
                repeated = ([id] * (image_tokens if id == image else 1) for id in content)
                content = [id for each in repeated for id in each]
            before, after = self._affixes[role]
            ids += before + content + after
            train = role == "assistant" and message.get("loss") is not False
            mask += [False] * len(before) + [train and own for own in self.written(content)]
            # In ChatML a line end follows the end of the turn; nobody needs to write it.
            mask += [train and id == self.end_id for id in after]
        if generation_prompt:
            before = self._affixes["assistant"][0]
            ids, mask = ids + before, mask + [False] * len(before)
        return ids, mask

    def completion(self, messages, text):
        """(prompt ids, completion ids): the messages up to where the assistant begins, and what it
        writes then, `text` and the end of its turn. Together they begin the ids of `render`.
        """
        prompt, _ = self.render(messages, generation_prompt=True)
        ids, _ = self.render([*messages, {"role": "assistant", "content": text}])
        return prompt, ids[len(prompt) : len(ids) - len(self.turn_end)]

    @functools.cached_property
    def turn_end(self):
        """Ids that the template writes behind the end of the assistant's turn, often none: with the
        last of them a dialogue ends.
        """
        after = self._affixes["assistant"][1]
        return after[after.index(self.end_id) + 1 :]

    def with_tokens(self, names):
        """This tokenizer, with those of the special tokens `names` that it lacks after its last
        id.
        """
        new = [name for name in names if name not in self.special]
        special = self.special | {name: self.vocab_size + n for n, name in enumerate(new)}
        return Tokenizer(self.ranks, special, self.pattern, self.nfc, self.source)

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

    @property
    def chat_template(self):
        """`render` in Jinja, except that it cannot tell special tokens from text that spells them.

        In foreign layouts ids may also differ where a content starts with a blank.
        """
        return (
            "{% set affixes = " + json.dumps(self.layout) + " %}"
            "{{ " + json.dumps(self.start) + " }}{% for m in messages %}"
            "{{ affixes[m['role']][0] + m['content'] + affixes[m['role']][1] }}{% endfor %}"
            "{% if add_generation_prompt %}{{ affixes['assistant'][0] }}{% endif %}"
        )

    # -- identity and files

    def fingerprint(self):
        """SHA-256, in hex, of all that decides the ids."""
        parts = sorted(self.ranks.items()), sorted(self.special.items()), self.pattern, self.nfc
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.fingerprint() == other.fingerprint()

    @functools.cached_property
    def _json(self):  # kept: a large vocabulary takes seconds, and every checkpoint saves it
        return json.dumps(to_json(self), ensure_ascii=False) + "\n"

    def save(self, folder):
        """Write tokenizer.json, and tokenizer_config.json with the chat template."""
        names = {id: text for text, id in self.special.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": names[self.end_id],
            "pad_token": names[self.pad_id],
            "chat_template": self.chat_template,
        }
        atomic_write(Path(folder) / "tokenizer.json", self._json)
        text = json.dumps(config, ensure_ascii=False) + "\n"
        atomic_write(Path(folder) / "tokenizer_config.json", text)


# --- tokenizer.json ------------------------------------------------------------------------------

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after cuts around each digit, or run of digits: there, blanks go up to the cut.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# It shows bytes as characters (GPT-2): printable ones as themselves, the others, in their order, as
# the characters from U+0100 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {b: b for b in PRINTABLE} | {b: 256 + n for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


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
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {
        text: {"id": id, "content": text, **flags, "special": text.startswith("<|")}
        for text, id in special.items()
    } | {token["content"]: token for token in source.get("added_tokens") or ()}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    split |= {"behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bytes_ |= {"use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": sorted(added.values(), key=lambda token: token["id"]),
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
