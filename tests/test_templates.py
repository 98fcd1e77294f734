"""Chat templates of others, as transformers renders them: ids, loss masks, folders and stops."""

import functools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SMALL, randomise
from helpers import turns
from jinja2 import TemplateError
from test_tokenizer import CHATML, QWEN_PATTERN, byte_level

from nanollm.config import UserError
from nanollm.formats import Unusable
from nanollm.gpt import GPTConfig, ScalarGPT
from nanollm.hub import save_model
from nanollm.preferences import completion_rows, dialogue_rows, scores
from nanollm.rewards import is_right
from nanollm.rollouts import TEMPLATES as PROMPTS
from nanollm.rollouts import prompt_of
from nanollm.tokenizer import CONTENT_TOKENS, Tokenizer

transformers = pytest.importorskip("transformers")
AutoModelForSequenceClassification = transformers.AutoModelForSequenceClassification
AutoTokenizer = transformers.AutoTokenizer

TEMPLATES = Path(__file__).parent / "templates"
TEXT = "the cat sat on the mat, and the user asked: what is 2 + 3? assistant: café 5.\n\n" * 3
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3 += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
SENTENCES = ["<s>", "</s>", "<unk>"]
THOUGHTS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()
R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
END, IM_END = "<|endoftext|>", "<|im_end|>"

# templates/NAME.jinja has the constructs of a real family:
# NAME: (special tokens, other added tokens, bos_token, eos_token)
FAMILIES = {
    "qwen2": (CHATML, THOUGHTS[2:4], None, END),  # a default system prompt; the base model's eos
    "qwen3": (CHATML, THOUGHTS, None, IM_END),  # drops the thoughts of earlier turns
    "qwen3_thinking": (CHATML, THOUGHTS[:2], None, IM_END),  # <think> in the generation prompt
    "r1": (R1[:2], [*R1[2:], *THOUGHTS[:2]], *R1[:2]),  # there, and thoughts are dropped
    "llama3": (LLAMA3, [], "<|begin_of_text|>", "<|eot_id|>"),  # the date, ipython, trim
    "mistral": ([*SENTENCES, "[INST]", "[/INST]"], [], "<s>", "</s>"),  # system in the last turn
    "smollm3": (CHATML, THOUGHTS[:2], None, IM_END),  # generation marks, a macro, continue
}

CALL = {"type": "function", "function": {"name": "add", "arguments": {"what": "2 + 3 – é"}}}
DIALOGUES = [
    turns("what is 2 + 3?", "5."),
    [{"role": "system", "content": "be brief. "}, *turns("  the cat\n\n", "sat")],
    turns("a", "b", "what is 2?\n", "2", "and é?", "5 \n"),
    turns("a", "<think>\nthe cat\n</think>\n\n5.\n"),
    turns("a", "<think>no</think>b", "c", "<think>yes</think>d"),
    [*turns("a"), {"role": "assistant", "content": "5", "reasoning_content": "2 + 3\n"}],
    [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "content": "5\n"}, {"role": "assistant", "content": "it is 5"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def base():
    """tokenizer.json of a byte-level BPE without added tokens."""
    return byte_level(QWEN_PATTERN, size=330, text=TEXT, nfc=True).to_str()


def write(folder, base, special=(), words=(), own=None, spec=None, **files):
    """A downloaded folder."""
    source = json.loads(base)
    first, plain = (
        len(source["model"]["vocab"]),
        dict.fromkeys("single_word lstrip rstrip".split(), False),
    )
    for n, text in enumerate([*special, *words]):
        is_word = n >= len(special)
        token = {"id": first + n, "content": text, "special": not is_word}
        source["added_tokens"].append(plain | token | {"normalized": is_word})
    folder.mkdir(exist_ok=True)
    files["tokenizer"] = source | (spec or {})
    files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **(own or {})}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def downloaded(folder, base, family):
    special, words, bos, eos = FAMILIES[family]
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    named = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    return write(folder, base, special, words, named)


peer_of = functools.cache(AutoTokenizer.from_pretrained)


def theirs(folder, messages, generation_prompt=False):
    """The ids of transformers, or None where it refuses."""
    how = {"tokenize": True, "return_dict": False, "add_generation_prompt": generation_prompt}
    try:
        return peer_of(folder).apply_chat_template(messages, **how)
    except (TemplateError, TypeError):
        return None


def ours(tokenizer, messages, generation_prompt=False):
    try:
        return tokenizer.render(messages, generation_prompt)[0]
    except UserError:
        return None


def learnt(tokenizer, messages):
    """What is trained on, as text."""
    ids, mask = tokenizer.render(messages)
    return tokenizer.decode([id for id, trained in zip(ids, mask) if trained])


def less(folder, messages):
    """transformers' prompts of a dialogue without one of its parts."""
    lists = [messages[:n] + messages[n + 1 :] for n in range(len(messages))]
    for n, message in enumerate(messages):
        bare = {key: value for key, value in message.items() if key != "tool_calls"}
        lists.append([*messages[:n], bare | {"content": message["content"] or ""}])
        lists[-1] += messages[n + 1 :]
    return [theirs(folder, each, True) for each in lists if each]


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_template_gives_transformers_ids_and_so_does_what_we_save(
    family, base, tmp_path
):
    folder = downloaded(tmp_path / "a", base, family)
    tokenizer = Tokenizer.load(folder)
    own = FAMILIES[family][0] + FAMILIES[family][1]
    assert tokenizer.vocab_size == len(json.loads(base)["model"]["vocab"]) + len(own)
    tokenizer.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours") == tokenizer
    for chat in DIALOGUES:
        for end in range(1, len(chat) + 1):
            prompt = theirs(folder, chat[:end], True)
            said = ours(tokenizer, chat[:end], True)
            left_out = said is None and prompt in less(folder, chat[:end])
            assert said == prompt or left_out, chat[:end]
            assert theirs(tmp_path / "ours", chat[:end], True) == prompt
        whole = theirs(folder, chat)
        assert theirs(tmp_path / "ours", chat) == whole
        assert ours(tokenizer, chat) in (whole, None)  # which of them are refused: see below


def test_our_own_template_gives_transformers_ids_too(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for chat in DIALOGUES:
        for prompt in (True, False):
            assert tokenizer.render(chat, prompt)[0] == theirs(tmp_path, chat, prompt)


@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_no_text_that_spells_a_marker_becomes_one(family, base, tokenizer, tmp_path):
    if family:
        tokenizer = Tokenizer.load(downloaded(tmp_path, base, family))
    noise, pieces = random.Random(0), [*tokenizer.special, *"<|>/ \n", "im_", "end|>", "think", "a"]
    markers = {*tokenizer.special.values()}
    free = {tokenizer.special.get(text) for text in CONTENT_TOKENS}
    for _ in range(100):
        texts = ["".join(noise.choices(pieces, k=noise.randrange(1, 9))) for _ in range(3)]
        user, said = texts[0] + "a", "b" + texts[1] + "b"
        prompt, _ = tokenizer.render(turns(user), True)
        found = Counter(id for id in prompt if id in markers)
        wanted = tokenizer.render(turns("a"), True)[0]
        assert found == Counter(id for id in wanted if id in markers), user
        if family != "r1":  # which takes no answers to train on
            ids = tokenizer.completion(turns("a"), said)[1]
            assert sum(id in markers - free for id in ids) == 1 and ids[-1] == tokenizer.end_id
        assert not markers & set(tokenizer.encode(user))


# --- what is trained on --------------------------------------------------------------------------

SUM = '{"what": "2 + 3 – é"}'
Q3, THINK = "<think>\n%s\n</think>\n\n%s<|im_end|>", "begins this answer otherwise"
TRAINED = [  # family, number of the dialogue, what is trained on, or why it isn't
    ("qwen2", 2, "b<|im_end|>2<|im_end|>5 \n<|im_end|>"),
    ("qwen3", 0, Q3 % ("", "5.")),
    ("qwen3", 3, Q3 % ("the cat", "5.\n")),
    ("qwen3", 5, Q3 % ("2 + 3", "5")),
    ("qwen3", 4, "writes this answer otherwise when more follows"),
    ("qwen3_thinking", 3, "the cat\n</think>\n\n5.\n<|im_end|>"),
    ("r1", 3, THINK),
    ("llama3", 6, f'{{"name": "add", "parameters": {SUM}}}<|eot_id|>it is 5<|eot_id|>'),
    ("mistral", 0, "5.</s>"),
    ("mistral", 1, "leaves out the system's content"),  # unless the user's turn is the last
    ("smollm3", 4, "<think>no</think>b<|im_end|><think>yes</think>d<|im_end|>"),
]


@pytest.mark.parametrize("family, number, wanted", TRAINED)
def test_what_the_template_adds_to_its_prompt_is_trained_on(family, number, wanted, base, tmp_path):
    tokenizer, chat = Tokenizer.load(downloaded(tmp_path, base, family)), DIALOGUES[number]
    if ours(tokenizer, chat) is None:
        with pytest.raises(UserError, match=wanted):
            tokenizer.render(chat)
    else:
        assert learnt(tokenizer, chat) == wanted
        text, ids = chat[-1]["content"], tokenizer.render(chat)[0]
        if "reasoning_content" not in chat[-1]:
            prompt, completion = tokenizer.completion(chat[:-1], text)
            assert prompt == tokenizer.render(chat[:-1], True)[0]
            assert ids == prompt + completion + tokenizer.turn_end


PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
)
PLAIN += "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
SILENT = PLAIN.replace("%}{{ '<|im", "if m.role in ('user', 'assistant') %}{{ '<|im", 1)


@pytest.mark.parametrize(
    "template, number, lost",
    [
        (PLAIN, 5, "the assistant's reasoning_content"),
        (PLAIN.replace("m.content", "(m.content or '')"), 6, "the assistant's tool_calls"),
        (SILENT, 1, "the system's content"),
    ],
)
def test_what_a_template_leaves_out_is_never_left_out_silently(
    template, number, lost, base, tmp_path
):
    own = {"chat_template": template, "eos_token": "<|im_end|>"}
    tokenizer, chat = Tokenizer.load(write(tmp_path, base, CHATML, own=own)), DIALOGUES[number]
    with pytest.raises(Unusable, match=f"leaves out {lost}"):
        tokenizer.render(chat)
    assert tokenizer.render(DIALOGUES[2])[1].count(True) > 0


@pytest.mark.parametrize("family", ["r1", "qwen3_thinking", "qwen3"])
def test_a_thought_that_the_prompt_begins_is_a_part_of_the_completion(family, base, tmp_path):
    tokenizer = Tokenizer.load(downloaded(tmp_path, base, family))
    prompt, problem = tokenizer.render(turns("a"), True)[0], {"answer": "5", "check": "number"}
    begun = tokenizer.begun(prompt)
    assert begun == ("" if family == "qwen3" else "<think>\n")
    assert is_right(problem, begun + "it is 5, no wait") == (family == "qwen3")
    assert is_right(problem, begun + "2 + 3</think>5")
    assert tokenizer.begun(tokenizer.encode("a")) == ""


@pytest.mark.parametrize("name", ["zero", "think"])
def test_a_template_for_a_question_alone_takes_no_more(name, tokenizer):
    assert "what is 2 + 3?" in tokenizer.decode(
        PROMPTS[name]({"messages": turns("what is 2 + 3?")}, tokenizer)
    )
    for chat in (DIALOGUES[1][:2], DIALOGUES[2][:3]):
        with pytest.raises(Unusable, match="no place for what comes before it"):
            PROMPTS[name]({"messages": chat}, tokenizer)


def test_earlier_answers_that_are_not_trained_on_need_not_be_written_alike(base, tmp_path):
    tokenizer = Tokenizer.load(downloaded(tmp_path, base, "qwen3"))
    chat = [dict(turn) for turn in DIALOGUES[4]]
    chat[1]["loss"] = False
    assert learnt(tokenizer, chat) == Q3 % ("yes", "d")
    assert tokenizer.decode(tokenizer.render(chat)[0]).count("no") == 0  # as the makers meant it


def test_a_completion_is_made_into_ids_on_its_own_as_it_is_sampled(base, tmp_path):
    tokenizer = Tokenizer.load(downloaded(tmp_path, base, "qwen2"))
    prompt, completion = tokenizer.completion(turns("a"), "\n\nb")  # "\n\n\n" would be one piece
    assert tokenizer.render(turns("a", "\n\nb"))[0][: len(prompt)] == prompt
    assert tokenizer.decode(completion) == "\n\nb<|im_end|>"


@pytest.mark.parametrize(
    "arguments, written",
    [({"e": "2 + 2"}, "(2 + 2)"), ('{"e": 4}', "(4)"), ({"a": 1, "b": 2}, None), ("5", None)],
)
def test_thoughts_and_calls_are_written_as_our_tools_read_them(arguments, written, tokenizer):
    call = {"type": "function", "function": {"name": "calculator", "arguments": arguments}}
    said = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call], "content": None}
    if written is None:
        with pytest.raises(UserError, match="a tool call"):
            tokenizer.render([*turns("a"), said])
    else:
        text = f"<think>hm</think><tool_call>calculator{written}</tool_call><|end|>"
        assert learnt(tokenizer, [*turns("a"), said]) == text
        assert tokenizer.render([*turns("a"), said])[0][4:] == tokenizer.encode(text, special=True)


# --- templates in files --------------------------------------------------------------------------


def test_a_template_in_its_own_file_and_the_default_of_several_are_found(base, tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "a{{ 1 }}"}]
    folder = write(tmp_path, base, CHATML, own={"chat_template": several, "eos_token": "</s>"})
    assert Tokenizer.load(folder).template == "a{{ 1 }}"
    (folder / "chat_template.jinja").write_text("b")
    assert Tokenizer.load(folder).template == "b"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="malformed"):
        Tokenizer.load(write(tmp_path, base, CHATML, own={"chat_template": several[:1]}))


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% for m in messages %}", 5])
def test_a_broken_template_is_one_clear_line(template, base, tmp_path):
    with pytest.raises(UserError, match="tokenizer.json: .*malformed"):
        Tokenizer.load(write(tmp_path, base, CHATML, own={"chat_template": template}))


@pytest.mark.parametrize("attack", ["''.__class__.__mro__", "messages.append(1)", "1 // 0"])
def test_a_template_runs_in_a_sandbox(attack, base, tmp_path):
    folder = write(tmp_path, base, CHATML, own={"chat_template": "{{" + attack + "}}"})
    with pytest.raises(UserError, match="refuses this dialogue"):
        Tokenizer.load(folder).render(turns("a"))


# --- stops, begins, added tokens -----------------------------------------------------------------

CHATML_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_TEMPLATE += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    "generation, config, stops",
    [
        ({"eos_token_id": [0, 7]}, {"eos_token_id": 1}, {0, 7}),
        ({"eos_token_id": 7}, {}, {7}),
        ({}, {"eos_token_id": [5]}, {5}),
        ({}, {}, {"<|endoftext|>"}),
    ],
)
def test_what_stops_a_completion_is_what_the_folder_says_and_the_end_of_turn(
    generation, config, stops, base, tmp_path
):
    own = {"chat_template": CHATML_TEMPLATE, "eos_token": "<|im_end|>"}
    files = {"generation_config": generation, "config": config}
    tokenizer = Tokenizer.load(write(tmp_path, base, CHATML, own=own, **files))
    stops = {tokenizer.special.get(stop, stop) for stop in stops}
    assert tokenizer.stop_ids == stops | {tokenizer.special["<|im_end|>"]}


def bos(*pieces, base):
    """A post-processor of these texts around a text "A"."""
    first = len(json.loads(base)["model"]["vocab"])
    ids = {
        text: {"id": text, "ids": [first + n], "tokens": [text]} for n, text in enumerate(SENTENCES)
    }
    kinds = [{"Sequence" if p == "A" else "SpecialToken": {"id": p, "type_id": 0}} for p in pieces]
    return {"type": "TemplateProcessing", "single": kinds, "pair": kinds, "special_tokens": ids}


@pytest.mark.parametrize("pieces", [["<s>", "A"], ["A"]])
def test_a_document_and_a_cloze_prompt_begin_as_the_post_processor_wants(pieces, base, tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": "A" == pieces[0]}  # ignored
    spec = {"post_processor": bos(*pieces, base=base)}
    folder = write(tmp_path / "a", base, SENTENCES, own=config, spec=spec)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "ours")
    for place in (folder, tmp_path / "ours"):
        own, peer = Tokenizer.load(place), AutoTokenizer.from_pretrained(place)
        wanted = peer("the cat")["input_ids"]
        begins = wanted[0] == own.special["<s>"]
        assert own.documents(["the cat"])[0][not begins :] == wanted
        begin = own.special["<s>" if begins else "</s>"]
        assert prompt_of({"prompt": "the"}, None, own)[0] == begin
    assert "<|endoftext|>" not in tokenizer.special  # </s> is trained, a new token is not
    chat = tokenizer.decode(tokenizer.render(turns("a"), True)[0])
    assert chat == "<s>" * begins + "<|user|>a<|end|><|assistant|>"


@pytest.mark.parametrize("nfc", [True, False])
def test_words_that_were_added_are_found_in_any_text(nfc, base, tmp_path):
    words = ["<sep>", "dog", "dog house"]
    spec = {"normalizer": {"type": "NFC"} if nfc else None}
    tokenizer = Tokenizer.load(write(tmp_path / "a", base, ["<|x|>"], words, spec=spec))
    tokenizer.save(tmp_path / "ours")
    peer, after = map(AutoTokenizer.from_pretrained, (tmp_path / "a", tmp_path / "ours"))
    noise, pieces = (
        random.Random(1),
        [*words, "<|x|>", *" \n\xa0\x1cao", "o\u0306", "house", "sep>"],
    )
    for _ in range(150):
        text = "".join(noise.choices(pieces, k=noise.randrange(1, 12)))
        wanted = peer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=True) == wanted, text
        assert after(text, add_special_tokens=False)["input_ids"] == wanted, text
        assert "<|x|>" in text or tokenizer.encode(text) == wanted


def test_tokens_are_added_behind_the_last_id_and_only_where_they_lack(base, tmp_path):
    tokenizer = Tokenizer.load(downloaded(tmp_path / "a", base, "qwen2"))
    more = tokenizer.with_tokens(["<image>", "<|im_end|>"])
    assert more.special == tokenizer.special | {"<image>": tokenizer.vocab_size}
    assert (more.template, more.stop_ids) == (tokenizer.template, tokenizer.stop_ids)
    shown = [{"role": "user", "content": "<image>a"}]
    assert more.render(shown, True, 3)[0].count(more.special["<image>"]) == 3
    assert more.render(shown, True)[0] == tokenizer.render(shown, True)[0]  # in letters
    more.save(tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours") == more
    peer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "a<image>b<tool_call><|im_end|>"
    assert peer(text)["input_ids"] == more.encode(text, special=True)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "mistral", "llama3"])
def test_a_reward_is_read_where_transformers_reads_it_after_its_chat_template(
    family, base, tmp_path
):
    folder = downloaded(tmp_path / "a", base, family)
    tokenizer, chat = Tokenizer.load(folder), DIALOGUES[0]
    cfg = GPTConfig(**SMALL | {"vocab_size": 400, "max_position_embeddings": 128})
    model = randomise(ScalarGPT(cfg)).eval()
    save_model(model, tokenizer, tmp_path / "ours")
    peer = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    assert peer_of(tmp_path / "ours").pad_token_id == peer.config.pad_token_id  # found by it
    ids = torch.tensor([theirs(folder, chat)])
    wanted = peer(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
    record = {"messages": chat[:1], "completions": [chat[1]["content"], "a"]}
    _, rows, _ = completion_rows([record], tokenizer)
    torch.testing.assert_close(scores(model, rows)[:1], wanted, atol=1e-5, rtol=1e-5)
    assert rows.tokens[0][rows.mask[0]][-1] == tokenizer.end_id  # policies learn to end there
    prompt, sampled = tokenizer.completion(chat[:1], chat[1]["content"])
    for stop in tokenizer.stop_ids:  # however it has ended
        ended, full = [*sampled[:-1], stop], len(prompt + sampled)
        reward = scores(model, dialogue_rows([prompt], [ended], tokenizer))
        torch.testing.assert_close(reward, wanted, atol=1e-5, rtol=1e-5)
        # a context that holds nothing behind the turn
        assert dialogue_rows([prompt], [ended], tokenizer, full).last().tolist() == [full - 1]
