"""Distillation: its losses against trl and slow loops, and whole runs on small data: what students
learn, resume, share between processes and refuse.
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import (
    ON_CPU,
    TINY,
    WORDS,
    assert_resumes,
    close,
    in_new_folder,
    moments_of_two_processes,
    refused,
    result,
    run,
    say,
    turns,
)
from trl.experimental.gkd import GKDTrainer

import distill
import train_pretrain
import train_sft
from data.village import examples as village
from distill import coarse, generalised_jsd, kl, tempered
from nanollm.distillation import (
    ask_teacher,
    filtered,
    pack_labelled,
    rationale_mask,
    read_completions,
    tokenize,
    write_completions,
)
from nanollm.endpoint import Endpoint
from nanollm.formats import write_jsonl
from nanollm.gpt import document_mask
from nanollm.hub import load_model
from nanollm.records import read_chats, read_examples
from nanollm.run import read_metrics
from nanollm.runtime import Runtime


def logits(seed=0, shape=(3, 7, 11), spread=2.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logp(*probabilities):
    return torch.tensor(probabilities).log()


def asked(prompt, *completion, **more):
    return {"messages": turns(prompt), **more, **dict(zip(["completion"], completion))}


# --- divergences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("temperature", [0.7, 2.5])
def test_jsd_and_its_gradients_equal_trls_with_masks_and_temperature(beta, temperature):
    teacher, student, mask = logits(2), logits(1).requires_grad_(), logits(3)[..., 0] < 0.5
    both = tempered(student, temperature), tempered(teacher, temperature)
    ours = (generalised_jsd(*both, beta) * mask).sum() / mask.sum()
    labels = torch.where(mask, 5, -100)
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, temperature)
    close(ours, theirs)
    close(*(torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)))


def test_forward_and_reverse_kl_by_hand():
    student, teacher = logp(0.25, 0.75), logp(0.5, 0.5)
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert generalised_jsd(student, teacher, 0).item() == pytest.approx(forward)
    assert generalised_jsd(student, teacher, 1).item() == pytest.approx(reverse)
    sure = tempered(torch.tensor([100.0, 0.0]))  # an undecided student is a bit away
    assert kl(sure, logp(0.5, 0.5)).item() == pytest.approx(math.log(2))


def test_jsd_is_symmetric_zero_between_equals_and_towards_its_ends_becomes_the_two_kls():
    a, b = (logits(seed, (6, 5)).double().log_softmax(-1) for seed in (1, 2))
    close(generalised_jsd(a, b), generalised_jsd(b, a))
    close(generalised_jsd(a, a), 0 * a[:, 0], 1e-6, 0)
    for beta, limit in ((1e-4, kl(b, a)), (1 - 1e-4, kl(a, b))):
        scaled = generalised_jsd(a, b, beta) / (beta * (1 - beta))
        close(scaled, limit, atol=1e-3, rtol=0.01)
        close(generalised_jsd(a, b, round(beta)), limit, 1e-7, 1e-7)


# --- the losses of a batch -----------------------------------------------------------------------


def test_temperature_squared_keeps_the_size_of_gradients():
    """At a high temperature tau^2 times the gradient of KL is (z_S - z_T) / V for logits of mean
    zero, whatever tau (Hinton et al. 2015, eq. 4).
    """
    student, teacher = (logits(seed, (1, 8), 1.0).double() for seed in (1, 2))
    student, teacher, none = student - student.mean(), teacher - teacher.mean(), torch.zeros(1)
    for temperature in (1e3, 3e3):
        wanted = student.clone().requires_grad_()
        log_ps, log_pt = ((x / temperature).log_softmax(-1) for x in (wanted, teacher))
        distill.soft_loss(kl(log_pt, log_ps), none, none, 1, 0, 1.0, temperature).backward()
        close(wanted.grad, (student - teacher) / 8, 1e-3, 0)


def test_losses_by_hand():
    divergence, ce = torch.tensor([0.1, 0.3]), torch.tensor([1.0, 3.0])
    labelled = torch.tensor([True, False])
    soft = distill.soft_loss(divergence, ce, labelled, 2, 1, alpha=0.75, temperature=2.0)
    assert soft.item() == pytest.approx(0.75 * 4 * 0.2 + 0.25 * 1.0)
    assert distill.masked_mean(ce, labelled, 1).item() == 1.0
    assert distill.masked_mean(ce, labelled & False, 0).item() == 0.0
    ce, rationale = torch.tensor([1.0, 2.0, 3.0, 7.0]), torch.tensor([True, True, True, False])
    for weight, total in ((0.0, 7.0), (1.0, 9.0), (0.5, 8.0)):  # however long the rationale is
        assert distill.step_by_step_loss(ce, rationale, 1, 3, weight).item() == pytest.approx(total)


def test_cosine_loss_equals_torchs():
    a, b = logits(1, (5, 8)), logits(2, (5, 8))
    theirs = torch.nn.CosineEmbeddingLoss(reduction="none")(a, b, torch.ones(5))
    close(distill.hidden_cosine_loss(a, b), theirs, 1e-6)


# --- the teacher's most likely tokens ------------------------------------------------------------


def test_coarse_probabilities_sum_to_one_and_keep_the_chosen():
    logprobs, ids = logp(0.5, 0.2, 0.2, 0.1)[None], torch.tensor([[0, 3]])
    assert coarse(logprobs, ids).exp()[0].tolist() == pytest.approx([0.5, 0.1, 0.4])


def test_coarse_kl_never_exceeds_the_whole_reaches_it_with_k_and_keeps_all_gradients():
    student, teacher = logits(1, (50, 30)).requires_grad_(), tempered(logits(2, (50, 30)))
    whole, before = kl(teacher, tempered(student)), torch.zeros(50)
    for K in (1, 4, 16, 29):
        ids = teacher.topk(K).indices
        part = kl(coarse(teacher, ids), coarse(tempered(student), ids))
        assert (part >= before - 1e-5).all() and (part <= whole + 1e-5).all()
        before = part
        [grad] = torch.autograd.grad(part.sum(), student, retain_graph=True)
        assert grad.isfinite().all() and (grad != 0).all()
    close(before, whole)


def test_several_teachers_say_the_mean_of_their_probabilities_beforehand_too(
    tokenizer, random_model
):
    teachers = [random_model(), random_model()]
    with torch.no_grad():
        teachers[1].model.embed_tokens.weight.mul_(-3)
    examples = [asked(word, word * 2) for word in ("abc", "def", "g", "hi")]
    rows = pack_labelled(tokenize(examples, True, tokenizer, 32), 32, tokenizer)
    assert len(rows) > 1
    each = [
        teacher(rows.tokens, rows.positions, document_mask(rows.documents))[rows.where()]
        for teacher in teachers
    ]
    probabilities = [(logits / 2).softmax(-1) for logits in each]
    assert (probabilities[0] - probabilities[1]).abs().max() > 0.1
    both = distill.mean_of(teachers, rows, 270, 2.0)[0]
    close(both.exp(), (probabilities[0] + probabilities[1]) / 2)
    close(distill.mean_of(teachers[:1], rows, 270, 2.0)[0].exp(), probabilities[0])
    cached = distill.with_top_k(rows, teachers, 5, 270, 2.0, batch=1)
    for numbers in (torch.arange(len(rows)), torch.tensor([1, 0])):
        part = cached[numbers]
        wanted, kept = distill.mean_of(teachers, part, 270, 2.0)[0], part.where()
        assert part.top_ids[kept].shape == (len(wanted), 5)
        close(part.top_logprobs[kept], coarse(wanted, part.top_ids[kept].long()))


# --- examples and rows ---------------------------------------------------------------------------


def test_a_rationale_is_what_stands_between_the_marks(tokenizer):
    tokenized = tokenize([asked("q", "<think>ab</think>c")], True, tokenizer, 64)
    [(_, completion, _)] = tokenized
    assert rationale_mask(completion, tokenizer) == [True] * 4 + [False] * 2  # the answer, its end
    rows = pack_labelled(tokenized, 64, tokenizer)
    assert rows.rationale.sum() == 4 and rows.mask.sum() == 6 and rows.labelled.equal(rows.mask)


def test_only_labels_are_labelled_and_only_completions_trained_on(tokenizer):
    label = {"messages": turns("a", "first", "b"), "completion": "yes"}
    tokenized = tokenize([label], True, tokenizer, 64)
    tokenized += tokenize([asked("q", "no"), asked("q", "long " * 20)], False, tokenizer, 64)
    rows = pack_labelled(tokenized, 64, tokenizer)
    for labelled, text in ((True, "yes<|end|>"), (False, "no<|end|>")):
        assert tokenizer.decode(rows.tokens[rows.mask & (rows.labelled == labelled)]) == text


def test_the_checker_filters_and_every_completion_is_counted():
    found = [("1", True), ("1", True), ("2", False), ("?", None)]
    examples = [asked("q", text, right=right) for text, right in found]
    kept, counts = filtered(examples, checked=True)
    assert [example["completion"] for example in kept] == ["1", "?"]
    assert counts == (
        "1 equal to another, 1 found wrong by the checker, 2 kept, 1 of them unchecked: no answer "
        "is known"
    )
    kept, _ = filtered(examples, checked=False)
    assert [example["completion"] for example in kept] == ["1", "2", "?"]


def test_completions_are_read_again_as_they_were_written(tmp_path):
    path, lines = tmp_path / "a.jsonl", [{"instruction": "q", "output": "old"}]
    lines.append({"conversations": [{"from": "human", "value": "q"}]})
    lines.append(asked("q", answer="1", check="number"))
    write_jsonl(path, lines)
    examples = read_completions(path)
    assert [example.get("completion") for example in examples] == ["old", None, None]
    told = [{**example, "completion": "<think>x</think>1", "right": True} for example in examples]
    write_completions(told, path)
    assert read_completions(path) == told


def test_a_teacher_writes_the_same_however_many_processes_ask(
    tokenizer, random_model, capsys, monkeypatch
):
    teacher, found = random_model(), []
    prompts = [asked("ab" * n, answer="a", check="contains") for n in (1, 40, 2, 3)]

    def gather(rt, ids):  # keeps what this process was told; all of them get one completion
        found[-1].extend(ids)
        return [[97, tokenizer.end_id], [98, tokenizer.end_id], [98]] * 2

    monkeypatch.setattr(Runtime, "gather", gather)
    for world in (1, 2, 5):  # of five processes two have nothing to ask
        found.append([])
        for rank in range(world):
            rt = Runtime(torch.device("cpu"), torch.float32, rank, world)
            completed = ask_teacher(rt, teacher, tokenizer, prompts, 12, samples=2, seed=1)
    assert found[0] == found[1] == found[2] and len(found[0]) == 6  # one is beyond the context
    assert [(e["completion"], e["right"]) for e in completed] == [("a", True), ("b", False)] * 2
    assert "2 of 6 completions don't end within 12 tokens" in capsys.readouterr().out


def test_questions_about_people_are_worded_as_no_test_example_is(tmp_path):
    folder = village.prepare(megabytes=0.1, root=tmp_path)
    prompts = village.prompts_about_people(folder)
    new = [each for each in prompts if each.get("task") == "fact_never_asked"]
    asked = {each["messages"][-1]["content"] for each in new}
    tests = {each["messages"][-1]["content"] for each in read_examples(folder / "sft_test.jsonl")}
    assert len(new) == 1500 and not asked & tests and all("answer" in each for each in new)
    assert len(prompts) > 3000 and prompts == village.prompts_about_people(folder)


# --- students ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_compressed_student_has_every_other_layer(tied, random_model):
    teacher = random_model(num_hidden_layers=5, tie_word_embeddings=tied)
    student = distill.every_other_layer(teacher)
    assert student.cfg.num_hidden_layers == 3
    other = teacher.state_dict()
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(2 * int(parts[2]))
        assert torch.equal(value, other[".".join(parts)])


def test_a_compiled_student_gives_its_hidden_states_too(tokenizer, random_model):
    """Without a hook, which torch.compile might never call."""
    student = random_model()
    rows = pack_labelled(tokenize([asked("q", "abc")], True, tokenizer, 32), 32, tokenizer)
    found, hidden = torch.compile(distill.Outputs(student), backend="aot_eager")(rows)
    for ours, plain in zip((found, hidden), distill.Outputs(student)(rows), strict=True):
        close(ours, plain)
    close(student.head(hidden), found, rtol=1e-6)
    distill.hidden_cosine_loss(hidden, logits(1, hidden.shape)).sum().backward()
    assert student.model.layers[0].mlp.down_proj.weight.grad.norm() > 0


# --- whole runs ----------------------------------------------------------------------------------

FAST = "--muon_lr 0.02 --lr 0.01".split()
OWN = [
    *ON_CPU,
    *"--teacher runs/sft --data examples.jsonl --test_data test.jsonl --labels 4".split(),
    *"--max_new_tokens 24 --context 48 --layers 1 --channels 32 --heads 2 --mlp 64".split(),
    *"--cache_top_k 8 --eval_every 400 --sample_temperature 0.5 --temperature 1".split(),
]
METHODS = ("both", "on_policy", "step_by_step", "compress")  # the others learn more, below


def spelt(word):
    return f"<think>{'-'.join(word)}</think>{word.upper()}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher that spells sixteen words and then says them in capitals."""
    with in_new_folder(tmp_path_factory) as folder:
        known = {w: {"answer": w.upper(), "check": "contains"} for w in WORDS}
        examples = [say(w, spelt(w), **known[w]) for w in WORDS]
        files = {
            "chats": [say(w, spelt(w)) for w in WORDS * 4],
            "examples": [*examples, examples[5]],  # the last is held out, to measure the loss
            "test": [asked(f"say {w}", **known[w]) for w in WORDS],
            "prompts": [{"prompt": "say owl"}] * 40,
            "plain": [say("owl", "OWL")],
        }
        for name, records in files.items():
            write_jsonl(f"{name}.jsonl", records)
        steps = ["--steps", 40, "--eval_every", 40, "--layers", 2]
        run(train_pretrain, *TINY, *steps, out="runs/pretrain")
        flags = [*ON_CPU, *FAST, *"--data chats.jsonl --replay 0 --context 48 --steps 300".split()]
        flags += ["--init", "runs/pretrain", "--eval_every", 300]
        run(train_sft, *flags, out="runs/sft")
    return folder


def distil(*flags, out="runs/distill"):
    run(distill, *OWN, *flags, out=out)
    return result(out)


def right(result):
    """The student's accuracy at the end."""
    return result["effects"][0]["after"]


def test_a_student_says_words_that_only_the_teacher_knows(here):
    """Four of the sixteen words have a label, so labels alone can't give more than a quarter."""
    labels = distil("--method", "labels", "--steps", 150)
    assert labels["teacher runs/sft"]["tasks"]["all"]["accuracy"] == 1.0 and right(labels) <= 0.3
    for method in ("hard", "soft"):  # soft by the teacher's eight most likely tokens alone
        taught = distil("--method", method, "--steps", 150, "--samples", 2)
        share = taught["effects"][1]
        assert right(taught) >= 0.9 and share["after"] == right(taught)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss(method, here):
    after = distil("--method", method, "--steps", 40)
    losses = [m["loss"] for m in read_metrics("runs/distill") if "loss" in m]
    assert losses[-1] < 0.7 * losses[0]
    if method != "step_by_step":  # which has not seen the held-out word
        assert after["after"]["val_loss"] < after["before"]["val_loss"]
    assert after["method"] == method and Path("runs/distill/curves.svg").exists()
    if method == "compress":
        student, _ = load_model("runs/distill")
        assert student.cfg.num_hidden_layers == 1 and student.cfg.hidden_size == 32
        assert after["parameters"] < after["teacher_parameters"]


def test_the_teachers_completions_are_dialogues_that_other_runs_read(here, capsys):
    distil("--method", "hard", "--steps", 2, "--samples", 3)
    said = capsys.readouterr().out
    kept = read_chats("runs/distill/teacher.jsonl")
    assert f"{len(kept)} kept" in said and "equal to another" in said
    assert all(chat["right"] for chat in kept)
    flags = [*ON_CPU, *"--init runs/pretrain --data runs/distill/teacher.jsonl".split()]
    flags += "--val_data chats.jsonl --replay 0 --steps 1 --context 48".split()
    run(train_sft, *flags, out="runs/again")
    flags = "--method both --steps 1 --completions runs/distill/teacher.jsonl".split()
    distil(*flags, out="runs/b")
    assert f"completions: {len(kept)} kept" in capsys.readouterr().out
    assert read_chats("runs/b/teacher.jsonl") == kept


def test_every_teacher_completes_every_prompt_and_is_measured(here):
    first = distil("--steps", 60, out="runs/first")
    flags = "--teacher runs/sft,runs/first --prompts prompts.jsonl --samples 4 --steps 1"
    after = distil(*flags.split(), "--labels", 2, "--sample_temperature", 1)
    for name, known in ("runs/sft", first["teacher runs/sft"]), ("runs/first", first["after"]):
        assert after[f"teacher {name}"]["tasks"] == known["tasks"]
    sizes = first["teacher_parameters"] + first["parameters"]
    assert after["teacher_parameters"] == sizes
    kept = read_chats("runs/distill/teacher.jsonl")
    assert {chat["messages"][0]["content"] for chat in kept} == {"say owl"} and len(kept) > 1
    config = json.loads(Path("runs/distill/train_config.json").read_text())
    assert config["began_from"]["out"] == "runs/sft"
    state = torch.load("runs/distill/state.pt", weights_only=True)
    assert len(state["inputs"]["teacher"].split()) == 2


def test_a_student_learns_from_an_endpoint_whose_key_no_file_holds(here, monkeypatch):
    def fetch(self, path, read, body):
        text = spelt(body["messages"][0]["content"].removeprefix("say "))
        return read({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    monkeypatch.setattr(Endpoint, "fetch", fetch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    flags = "--teacher http://127.0.0.1:1/v1#owl --init runs/pretrain --method hard --steps 150"
    taught = distil(*flags.split())
    assert right(taught) >= 0.9 and len(taught["effects"]) == 1
    for file in Path("runs/distill").iterdir():
        assert b"sk-secret" not in file.read_bytes()


def test_a_model_writes_the_prompts_that_the_teacher_completes(here, monkeypatch):
    words = itertools.cycle(WORDS)

    def fetch(self, path, read, body):
        said = {"message": {"content": f"say {next(words)}"}, "finish_reason": "stop"}
        return read({"choices": [said]})

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "fetch", fetch)
        flags = "--prompts http://127.0.0.1:1/v1#owl --labels 8 --unlabelled 3 --steps 1"
        distil(*flags.split())
    kept = read_chats("runs/distill/teacher.jsonl")
    asked = {chat["messages"][0]["content"] for chat in kept}
    assert len(asked) <= 3 and asked < {f"say {word}" for word in WORDS[8:]}
    run(distill, "--resume", "--steps", 2, out="runs/distill")  # and doesn't ask again


def test_a_student_that_exists_goes_on_from_where_it_is(here):
    first = distil("--steps", 60, out="runs/first")
    after = distil("--init", "runs/first", "--steps", 2)
    assert after["before"]["val_loss"] == pytest.approx(first["after"]["val_loss"])


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(here):
    """With on_policy, which has most to remember: noise, whose turn it is to write."""
    flags = "--method on_policy --on_policy_share 0.7 --steps 16 --eval_every 4".split()
    assert_resumes("distill.py", [*OWN, *flags], last=14)


@pytest.mark.parametrize("method", ["on_policy", "compress"])
def test_two_processes_and_parts_give_the_gradients_of_one(method, here):
    """With on_policy of a step on given completions and one on the student's own: at a learning
    rate of zero the optimizer's first moments are a weighted sum of their gradients.
    """
    flags = [*OWN, "--method", method, "--steps", "2", "--grad_clip", "0", "--on_policy_share", "1"]
    flags += ["--optimizer", "adamw", "--lr", "0", "--accumulate", "2"]
    one, two = moments_of_two_processes("distill.py", flags, "runs/one", "runs/two")
    assert len(one) > 5
    assert read_chats("runs/one/teacher.jsonl") == read_chats("runs/two/teacher.jsonl")
    for a, b in zip(one, two):
        close(a, b, 1e-6, 1e-3)


# --- bad input -----------------------------------------------------------------------------------

REFUSED = [
    ("--context 8", "raise --context"),  # completions longer than the rows
    ("--init runs/other", "another tokenizer"),
    ("--teacher runs/none", "runs/none"),
    ("--method labels --data prompts.jsonl", "0 labelled examples"),
    ("--heads 5", "--heads 5"),
    ("--method step_by_step --max_new_tokens 2", "raise --context, --max_new_tokens"),  # none ends
    ("--method step_by_step --completions plain.jsonl", "gives no rationale, <think>...</think>"),
    ("--out runs/sft", "would replace"),
    ("--teacher runs/sft,runs/first --out runs/first", "would replace"),
    ("--teacher runs/sft,runs/other", "their tokenizers differ"),
    ("--teacher http://127.0.0.1:1/v1 --init runs/sft", "an endpoint gives text alone"),
    ("--teacher http://127.0.0.1:1/v1 --method hard", "add --method hard or step_by_step, and"),
    ("--teacher http://127.0.0.1:1/v1 --method hard --init runs/sft", "/models"),
    ("--prompts none.jsonl", "none.jsonl is not a folder"),
]


@pytest.mark.parametrize("flags, sentence", REFUSED)
def test_what_distillation_cannot_do_is_refused(flags, sentence, here, capsys):
    if not Path("runs/other").exists():
        other = ["--steps", 1, "--tokenizer", "train", "--vocab_size", 280]
        run(train_pretrain, *TINY, *other, out="runs/other")
    capsys.readouterr()
    said = refused(capsys, distill, *OWN, "--out", "runs/refused", *flags.split())
    assert sentence in said and not Path("runs/refused").exists()
