"""Questions that a text model writes about images: what is kept, the counts, the file."""

import json
from pathlib import Path

import pytest
from helpers import refused
from PIL import Image

import train_sft
import train_vlm
from data.village import images as village_images
from data.village.scenes import SEASONS, Group, Scene
from nanollm import image_teacher
from nanollm.config import parse
from nanollm.formats import write_jsonl
from nanollm.gpt import GPTConfig
from nanollm.hub import save_model
from nanollm.image_teacher import FORM, dialogues, sift
from nanollm.records import read_examples, read_image_chats
from nanollm.tokenizer import Tokenizer
from nanollm.vision.images import ImageStore, Preprocessing
from nanollm.vision.vit import VisionConfig, ViT
from nanollm.vision.vlm import VLM

GARDEN = Scene(
    "autumn",
    "day",
    (Group("cup", "red", "big", "left", 1), Group("bell", "blue", "small", "right", 3)),
    7,
)
CAPTION = "A red cup on the left and 3 blue bells on the right."


def pair(question, answer):
    return f"Question: {question}\nAnswer: {answer}"


RIGHT = pair("How many bells are there?", "There are 3 bells.")
SAME = pair("Count the bells.", "There are 3 bells.")
FALSE = pair("What colour is the cup?", "The cup is blue.")
HELD_OUT = pair("Are there any purple bells?", "No, there is no purple bell.")
OTHER = pair("Are there any dogs?", "No.")
MORE = pair("Are there more bells than cups?", "Yes, there are more bells than cups.")
FEWER = pair("Are there fewer bells than cups?", "No, there are not fewer bells than cups.")


# --- what is kept --------------------------------------------------------------------------------


def counted(*texts, scene=GARDEN):
    return sift([("a.png", text) for text in texts], {"a.png": scene} if scene else {})[1]


def test_a_true_pair_is_kept_and_what_is_wrong_with_the_others_is_counted():
    lie = pair("How many bells are there?", "There are 2 bells.")  # keeps no true one out
    texts = [lie, RIGHT, FALSE, HELD_OUT, "Is there a bell? Yes.", SAME, OTHER, MORE, FEWER]
    kept, counts = sift([("a.png", text) for text in texts], {"a.png": GARDEN})
    assert kept[0] == ("a.png", "How many bells are there?", "There are 3 bells.")
    assert counts == {"kept": 3, "false": 3, "held out": 1, "unreadable": 1, "twice": 1}
    kept, _ = sift([("a.png", RIGHT), ("b.png", RIGHT)], {"a.png": GARDEN, "b.png": GARDEN})
    assert [image for image, *_ in kept] == ["a.png", "b.png"]


def test_what_is_no_question_with_one_answer_is_unreadable():
    texts = [
        "",  # it didn't end
        "Question: How many bells are there?",
        "Question: \nAnswer: There are 3 bells.",
        "Question: How many bells are there?\nAnswer:",
        f"{RIGHT}\n{RIGHT}",
        f"Look. {RIGHT}",
        pair("<image> How many bells are there?", "There are 3 bells."),
    ]
    assert counted(*texts) == counted(*texts, scene=None) == {"unreadable": len(texts)}


def test_without_the_truth_nothing_is_false_and_the_same_words_count_once():
    spaced = RIGHT.replace("How many", "how  many")
    assert counted(RIGHT, spaced, SAME, FALSE, OTHER, scene=None) == {"kept": 4, "twice": 1}


# --- the file ------------------------------------------------------------------------------------


def test_a_dialogue_has_four_questions_at_most_and_shows_its_image_first():
    made = dialogues([("a.png", f"Q{n}?", f"A{n}.") for n in range(7)])
    assert [len(each["messages"]) for each in made] == [8, 6]
    assert made[1]["messages"][0] == {"role": "user", "content": "<image>\nQ4?"}
    assert made[1]["messages"][-1] == {"role": "assistant", "content": "A6."}


def teach(*flags):
    image_teacher.main(parse(image_teacher.Config, argv=[*map(str, flags), "--device", "cpu"]))


@pytest.fixture
def here(random_model, tokenizer, tmp_path, monkeypatch):
    """A folder with a teacher that knows nothing, and captions of two images in another one."""
    monkeypatch.chdir(tmp_path)
    save_model(random_model(max_position_embeddings=512), tokenizer, "teacher")
    Path("mine").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(f"mine/{name}")
    captions = [("a.png", CAPTION), ("b.png", CAPTION), ("b.png", "a long story " * 50)]
    write_jsonl("mine/captions.jsonl", [{"image": i, "caption": text} for i, text in captions])


@pytest.fixture
def says(monkeypatch):
    """Puts words into the teacher's mouth: the same texts to every prompt, one per sample."""

    def put(*texts):
        def sampled(model, tokenizer, prompts, samples, **how):
            end = next(iter(tokenizer.stop_ids))
            return [[*tokenizer.encode(t), end] for _ in prompts for t in texts[:samples]]

        monkeypatch.setattr(image_teacher, "sample_completions", sampled)

    return put


def test_own_captions_become_dialogues_that_open_from_anywhere(here, says, monkeypatch, capsys):
    says(RIGHT, FALSE)
    out, flags = Path("far/away/made.jsonl").resolve(), ["--data", "mine/captions.jsonl"]
    teach("teacher", *flags, "--out", out, "--samples", 2)
    printed = capsys.readouterr().out.split()
    assert [printed[printed.index(word) + 1] for word in ("written", "kept")] == ["4", "4"]
    teach("teacher", *flags, "--out", "one.jsonl", "--limit", 1, "--samples", 1)
    assert [len(chat["messages"]) for chat in read_image_chats("one.jsonl")] == [2]
    monkeypatch.chdir("/")
    chats = read_image_chats(out)
    assert [len(chat["messages"]) for chat in chats] == [4, 4]
    assert chats[0]["messages"][1]["content"] == "There are 3 bells."


def test_the_villages_captions_are_checked_against_its_scenes(here, says, monkeypatch, capsys):
    monkeypatch.setattr(village_images, "SIZES", {"val": 2, "test": 2, "combos": 2})
    prepare = village_images.prepare
    monkeypatch.setattr(village_images, "prepare", lambda size: prepare(0, "cache", size, 4))
    says(*(pair("Which season is it?", f"It is {season}.") for season in SEASONS))
    teach("teacher", "--out", "made.jsonl", "--samples", 4)
    scenes = json.loads(next(Path("cache").glob("*/scenes_train.json")).read_text())
    truths = {each["image"]: each["season"] for each in scenes}
    chats = read_image_chats("made.jsonl")
    assert len(chats) == 4, "two captions of each image, and one of four answers is true"
    for chat in chats:
        image = "/".join(chat["images"][0].split("/")[-2:])
        assert chat["messages"][1]["content"] == f"It is {truths[image]}."
    printed = capsys.readouterr().out.split()
    assert printed[printed.index("false") + 1] == "24"


def test_a_teacher_that_knows_nothing_writes_no_file_and_one_line_says_so(here, capsys):
    said = refused(capsys, image_teacher, "teacher", "--data", "mine/captions.jsonl")
    assert "can be kept" in said and "--preset reader" in said
    assert not Path("teacher.jsonl").exists()


# --- what the scripts make of it -----------------------------------------------------------------


def test_the_preset_reader_learns_from_captions_in_the_teachers_form(tmp_path, monkeypatch):
    prepare = village_images.prepare
    monkeypatch.setattr(village_images, "prepare", lambda: prepare(0, tmp_path, 32, n_train=3))
    cfg = parse(train_sft.Config, train_sft.PRESETS, ["--preset", "reader"])
    [train], [val], examples = train_sft.load_chats(cfg)
    assert 0 < len(train) <= 3 and len(val) > 100 and examples == []
    for chat in train:
        assert "<image>" not in chat["messages"][0]["content"]
        assert FORM.fullmatch(chat["messages"][1]["content"])


def test_own_dialogues_are_tested_on_the_villages_examples_where_asked(tmp_path, monkeypatch):
    prepare = village_images.prepare
    monkeypatch.setattr(
        village_images, "prepare", lambda size, **how: prepare(0, tmp_path, 32, n_train=3)
    )
    flags = "--stage instruct --data made.jsonl --text_data none.jsonl --test_examples 2".split()
    tokenizer = Tokenizer.from_bytes()
    shape = GPTConfig(tokenizer.vocab_size, 32, 32, 1, 1, 1, 32, 2048)
    model = VLM(shape, ViT(VisionConfig(32, 16, 32, 32, 1, 1)), "mlp", tokenizer.special["<image>"])

    def examples(*more):
        cfg = parse(train_vlm.Config, train_vlm.PRESETS, [*flags, *more])
        return train_vlm.load_tests(cfg, model, tokenizer, ImageStore(Preprocessing(32)))

    assert not any(examples().values())
    asked = examples("--test_data", "village")
    assert {example["task"] for example in asked["images"]} >= {"count", "season"}
    assert asked["new_pairs"] and not asked["texts"]
    own = str(next(tmp_path.glob("*")) / "combos_test.jsonl")
    found = examples("--test_data", own, "--test_examples", "0")
    assert found["images"] == read_examples(own) and not found["new_pairs"]
