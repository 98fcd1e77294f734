"""Questions that a text model writes about images: what is kept, the counts, the file."""

import json
from collections import Counter

import pytest
from PIL import Image

import train_sft
import train_vlm
from data.village import images as village_images
from data.village.image_questions import names_held_out
from data.village.scenes import SEASONS, Group, Scene
from nanollm import image_teacher
from nanollm.config import UserError, cli, parse
from nanollm.formats import read_examples, read_image_chats
from nanollm.gpt import GPTConfig
from nanollm.hub import save_model
from nanollm.image_teacher import Pair, agreeing, dialogues, sift, summary
from nanollm.tokenizer import Tokenizer
from nanollm.vision.vit import VisionConfig, ViT
from nanollm.vision.vlm import VLM, image_id_of

GARDEN = Scene(
    "autumn",
    "day",
    (Group("cup", "red", "big", "left", 1), Group("bell", "blue", "small", "right", 3)),
    7,
)
PICTURE = {"image": "a.png", "caption": "A red cup on the left and 3 blue bells on the right."}


def pair(question, answer):
    return f"Question: {question}\nAnswer: {answer}"


RIGHT = pair("How many bells are there?", "There are 3 bells.")
SAME = pair("Count the bells.", "There are 3 bells.")
FALSE = pair("What colour is the cup?", "The cup is blue.")
HELD_OUT = pair("Are there any purple bells?", "No, there is no purple bell.")
OTHER = pair("Are there any dogs?", "No.")


def reasons(*completions, scene=GARDEN):
    """What becomes of each completion, in order, all about one image."""
    scenes, found, before = {"a.png": scene} if scene else None, [], Counter()
    for n in range(1, len(completions) + 1):
        counts = sift([(PICTURE, completion) for completion in completions[:n]], scenes)[1]
        after = sum(counts.values(), Counter())
        found += after - before
        before = after
    return found


def tool(*arguments):
    image_teacher.main(parse(image_teacher.Config, argv=[*map(str, arguments)]))


@pytest.fixture
def teacher(random_model, tokenizer, tmp_path):
    """Folder of a teacher that knows nothing, with room for a caption."""
    save_model(random_model(max_position_embeddings=512), tokenizer, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def captions(tmp_path):
    """A file of captions for two images, in a folder of its own."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = []
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
        lines.append(json.dumps({"image": name, "caption": PICTURE["caption"]}) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder / "captions.jsonl"


@pytest.fixture
def says(monkeypatch):
    """Puts words into the teacher's mouth: the same completions to every prompt, one per sample."""

    def put(*completions, again=()):
        def sampled(model, tokenizer, prompts, longest, samples, generator):
            words = completions if not again or samples == len(completions) else again
            end = next(iter(tokenizer.stop_ids))
            return [[*tokenizer.encode(text), end] for _ in prompts for text in words[:samples]]

        monkeypatch.setattr(image_teacher, "sample_completions", sampled)

    return put


# --- what is kept --------------------------------------------------------------------------------


def test_a_true_pair_is_kept_and_what_is_wrong_with_the_others_is_counted():
    completions = [RIGHT, FALSE, HELD_OUT, "Is there a bell? Yes.", SAME, OTHER]
    assert reasons(*completions) == ["kept", "false", "held out", "unreadable", "twice", "false"]
    pairs, counts = sift([(PICTURE, completion) for completion in completions], {"a.png": GARDEN})
    assert pairs == [Pair(PICTURE, "How many bells are there?", "There are 3 bells.")]
    assert counts == {
        "count": {"kept": 1, "twice": 1},
        "colour": {"false": 1},
        "existence": {"held out": 1},
        "other": {"false": 1},
        "unreadable": {"unreadable": 1},
    }


@pytest.mark.parametrize(
    "completion",
    [
        None,  # it didn't end
        "",
        "Question: How many bells are there?",
        "Question: \nAnswer: There are 3 bells.",
        "Question: How many bells are there?\nAnswer:",
        f"{RIGHT}\n{RIGHT}",
        f"Look. {RIGHT}",
        pair("<image> How many bells are there?", "There are 3 bells."),
    ],
)
def test_what_is_no_question_with_one_answer_is_unreadable(completion):
    assert reasons(completion) == reasons(completion, scene=None) == ["unreadable"]


def test_a_false_pair_does_not_keep_the_true_one_out():
    lie = pair("How many bells are there?", "There are 2 bells.")
    assert reasons(lie, RIGHT) == ["false", "kept"]


def test_the_same_thing_may_be_asked_of_another_image():
    other = {**PICTURE, "image": "b.png"}
    pairs, _ = sift([(PICTURE, RIGHT), (other, RIGHT)], {"a.png": GARDEN, "b.png": GARDEN})
    assert [each.record["image"] for each in pairs] == ["a.png", "b.png"]


def test_more_and_fewer_are_not_the_same_thing():
    more = pair("Are there more bells than cups?", "Yes, there are more bells than cups.")
    fewer = pair("Are there fewer bells than cups?", "No, there are not fewer bells than cups.")
    assert reasons(more, fewer) == ["kept", "kept"]


@pytest.mark.parametrize(
    "text, names",
    [
        ("A red basket.", True),
        ("No, there are no BLUE candles", True),
        ("The basket is red.", False),
        ("a blue basket and a red candle", False),
        ("a red lantern, a boathouse", False),
    ],
)
def test_pairs_that_training_never_sees_are_found_by_name(text, names):
    assert names_held_out(text) == names


def test_without_the_truth_nothing_is_false_and_the_same_words_count_once():
    spaced = RIGHT.replace("How many", "how  many")
    assert reasons(RIGHT, spaced, SAME, FALSE, OTHER, scene=None) == [
        "kept",
        "twice",
        "kept",
        "kept",
        "kept",
    ]


def test_only_an_answer_that_most_further_samples_repeat_is_believed(tokenizer, says):
    written = [(PICTURE, RIGHT), (PICTURE, FALSE)]
    pairs, counts = sift(written)
    says(" There are 3 bells.", " there are 3  bells.", " There are 2 bells.", " The cup")
    assert agreeing(None, tokenizer, pairs, counts, votes=3) == pairs[:1]
    assert counts["count"]["kept"] == counts["colour"]["contradicted"] == 1
    assert counts["colour"]["kept"] == 0
    pairs, counts = sift(written)
    assert agreeing(None, tokenizer, pairs, counts, votes=4) == [], "2 of 4 are not more than half"


def test_the_summary_says_which_share_is_readable_true_and_kept():
    completions = [RIGHT, SAME, FALSE, "nothing"]
    said = summary(sift([(PICTURE, r) for r in completions], {"a.png": GARDEN})[1], 2.0, True)
    assert "4 written in 2 s, 3 readable (75.0%), 2 of these true (66.7%), 1 kept (25.0%" in said
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:]}
    assert rows["count"] == ["0", "0", "1", "1"]  # unreadable, false, twice, kept
    assert rows["-"] == ["1", "0", "0", "0"]


# --- the file ------------------------------------------------------------------------------------


def test_a_dialogue_has_four_questions_at_most_and_shows_its_image_first(tmp_path):
    made = dialogues([Pair(PICTURE, f"Q{n}?", f"A{n}.") for n in range(7)], tmp_path)
    assert [len(each["messages"]) for each in made] == [8, 6]
    assert made[1]["messages"][0] == {"role": "user", "content": "<image>\nQ4?"}
    assert made[1]["messages"][-1] == {"role": "assistant", "content": "A6."}


def test_own_captions_become_dialogues_that_open_from_anywhere(
    teacher, captions, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(captions.parent)
    says(RIGHT, FALSE, again=[" There are 3 bells."] * 3)
    out = tmp_path / "far" / "away" / "made.jsonl"
    flags = ["--samples", 2, "--agree", 3, "--device", "cpu"]
    tool(teacher, "--data", captions.name, "--out", out, *flags)
    monkeypatch.chdir("/")
    chats = read_image_chats(out)
    assert [len(chat["messages"]) for chat in chats] == [2, 2]
    assert chats[0]["messages"][1]["content"] == "There are 3 bells."
    assert "nothing says what is true" in (said := capsys.readouterr().out)
    assert "4 readable (100.0%), 2 kept" in said
    tool(teacher, "--data", captions, "--out", out, "--limit", 1, *flags[:2], "--agree", 0)
    assert [len(chat["messages"]) for chat in read_image_chats(out)] == [4]


def test_the_villages_captions_are_checked_against_its_scenes(
    teacher, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(village_images, "SIZES", {"val": 2, "test": 2, "combos": 2})
    prepare = village_images.prepare
    monkeypatch.setattr(
        village_images, "prepare", lambda size: prepare(0, tmp_path / "cache", size, n_train=4)
    )
    says(*(pair("Which season is it?", f"It is {season}.") for season in SEASONS))
    out = tmp_path / "made.jsonl"
    tool(teacher, "--out", out, "--samples", 4, "--device", "cpu")
    scenes = json.loads(next((tmp_path / "cache").glob("*/scenes_train.json")).read_text())
    truths = {each["image"]: each["season"] for each in scenes}
    chats = read_image_chats(out)
    assert len(chats) == 4, "two captions of each image, and one of four answers is true"
    for chat in chats:
        image = "/".join(chat["images"][0].split("/")[-2:])
        assert chat["messages"][1]["content"] == f"It is {truths[image]}."
    assert "32 readable (100.0%), 8 of these true (25.0%), 4 kept (12.5%" in capsys.readouterr().out


def test_a_teacher_that_knows_nothing_writes_no_file_and_one_line_says_so(
    teacher, captions, tmp_path, capsys
):
    out = tmp_path / "made.jsonl"
    arguments = [str(teacher), "--data", str(captions), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        cli(image_teacher.main, image_teacher.Config, argv=arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "can be kept" in error and "--preset reader" in error
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out", "."], "is a folder"),
        (["--agree", "-1"], "--agree must be at least 0"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--data", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_one_clear_sentence(flags, message, teacher, captions, tmp_path):
    out = ["--data", captions, "--out", tmp_path / "made.jsonl"]
    with pytest.raises(UserError, match=message):
        tool(teacher, *out, *flags)


def test_captions_beyond_the_teachers_context_are_refused(
    random_model, tokenizer, captions, tmp_path
):
    save_model(random_model(max_position_embeddings=128), tokenizer, tmp_path / "short")
    with pytest.raises(UserError, match="no caption of .* context of 128"):
        tool(tmp_path / "short", "--data", captions, "--out", tmp_path / "made.jsonl")


# --- what the scripts make of it -----------------------------------------------------------------


def test_the_preset_reader_learns_from_captions_in_the_teachers_form(tmp_path, monkeypatch):
    prepare = village_images.prepare
    monkeypatch.setattr(village_images, "prepare", lambda: prepare(0, tmp_path, 32, n_train=3))
    cfg = parse(train_sft.Config, train_sft.PRESETS, ["--preset", "reader"])
    train, val, examples = train_sft.load_chats(cfg)
    assert 0 < len(train) <= 3 and len(val) > 100 and examples == []
    for chat in train:
        assert "<image>" not in chat["messages"][0]["content"]
        assert image_teacher.parse(chat["messages"][1]["content"])


def test_own_dialogues_are_tested_on_the_villages_examples_where_asked(tmp_path, monkeypatch):
    prepare = village_images.prepare
    monkeypatch.setattr(
        village_images, "prepare", lambda size, n_train: prepare(0, tmp_path, 32, n_train=3)
    )
    flags = ["--stage", "instruct", "--data", "made.jsonl", "--text_data", "none.jsonl"]

    tokenizer = Tokenizer.from_bytes()
    cfg = GPTConfig(tokenizer.vocab_size, 32, 32, 1, 1, 1, 32, 2048)
    vision = ViT(VisionConfig(32, 16, 32, 32, 1, 1))
    model = VLM(cfg, vision, "mlp", image_id_of(tokenizer))

    def examples(*more):
        cfg = parse(train_vlm.Config, train_vlm.PRESETS, [*flags, *more])
        return train_vlm.load_examples(cfg, model, tokenizer)

    assert not any(examples().values())
    asked = examples("--test_data", "village", "--test_examples", "2")
    assert {example["task"] for example in asked["images"]} >= {"count", "season"}
    assert asked["combos"] and not asked["texts"]
    folder = next(tmp_path.glob("images-*"))
    own = str(folder / "combos_test.jsonl")
    assert examples("--test_data", own, "--test_examples", "0")["images"] == read_examples(own)
    assert not examples("--test_data", own)["combos"]
