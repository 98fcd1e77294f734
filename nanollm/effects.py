"""What each stage's section of the report shows: the effect, measured on held-out items."""

from nanollm.checkpoint import read_json
from nanollm.metrics import counts
from nanollm.report import ReportImage
from nanollm.run import read_metrics
from nanollm.vlm_figures import BEGINS, mean


def pretraining(section, result, folder):
    cloze = read_json(folder / "evaluation.json")["tasks"]["cloze"]
    section.table(
        ["held-out text", "bits per byte"],
        [
            ["the model", f"{result['bits_per_byte']:.3f}"],
            ["xz -9, given the training text as a prefix", f"{result['xz_bits_per_byte']:.3f}"],
        ],
    )
    section.text(
        f"Completing sentences about the villagers, such as “By trade Nora is a …”, it is right in "
        f"{cloze['accuracy']:.1%} of {cloze['n']} cases; chance is about 6%."
    )
    section.code((folder / "samples.txt").read_text().strip())


def sft(section, result, folder):
    folders = folder.parent / "pretrain", folder
    before, after = (read_json(each / "evaluation.json")["tasks"] for each in folders)
    accuracy_table(section, "held-out questions", EXPLAINED, before=before, after=after)
    section.text(
        f"Forgetting: held-out text went from {result['before']['bits_per_byte']:.4f} to "
        f"{result['after']['bits_per_byte']:.4f} bits per byte."
    )


def rm(section, result, folder):
    section.table(
        ["held-out pairs in the right order", "share"],
        [
            ["reward model, by the gold score", f"{result['gold_accuracy']:.1%}"],
            ["reward model, by the annotators", f"{result['accuracy']:.1%}"],
            ["annotators, by the gold score", f"{result['annotators_accuracy']:.1%}"],
        ],
    )
    section.text(
        f"Log-loss {result['log_loss']:.3f}, calibration error {result['calibration_error']:.3f}. "
        "The gold score is the village's truth: 0.5 for right, 0.3 for polite, 0.2 for short; no "
        "model ever sees it."
    )
    chart = folder / "score_against_gold.svg"
    caption = "Scores of held-out completions over their gold."
    section.figure("rm/score_against_gold.svg", chart.read_text(), caption)


def policy(section, result, folder):
    name = folder.name
    now = read_json(folder / "preferences.json")["figures"]
    before = now["against"]
    rows = [
        [label, f"{before[key]:.3f}", f"{now[key]:.3f}"]
        for key, label in PREFERENCE_FIGURES.items()
        if key in before
    ]
    section.table(["held-out prompts, sampled answers", "fine-tuned", name], rows)
    section.text(
        f"Better than the fine-tuned model's answer in {now['win_rate']:.1%} of the prompts, by "
        f"gold; a tie counts half. KL to it: {now['kl']:.2f} nats per answer. "
        f"{now['gap_closed']:.0%} of the way to the best possible gold score, 1."
    )
    if name == "dpo":
        was, after = result["before"], result["after"]
        section.text(
            "Log-probability of held-out chosen answers: "
            f"{was['val_logp_chosen']:.2f} to {after['val_logp_chosen']:.2f}; of rejected ones: "
            f"{was['val_logp_rejected']:.2f} to {after['val_logp_rejected']:.2f}."
        )
    else:
        chart = folder / "reward_over_kl.svg"
        section.figure(
            "ppo/reward_over_kl.svg",
            chart.read_text(),
            "Where the two part, the policy has learnt the reward model's errors.",
        )


PREFERENCE_FIGURES = {
    "gold": "gold score",
    "correct": "right",
    "polite": "polite (-1 rude, 1 courteous)",
    "concise": "short",
    "reward": "score of the reward model",
    "length": "tokens",
}
EXPLAINED = {
    "cloze": "completing sentences about villagers",
    "fact": "facts, villagers of the training dialogues, new wording",
    "fact_never_asked": "facts, villagers never asked about",
    "two_hop": "facts about somebody's best friend",
    "unknown": "\"I don't know\" for people who don't exist",
    "formatting": "formatting words as told",
    "arithmetic": "sums with written steps",
    "multi_turn": "follow-up questions",
}
PROBLEMS = {
    "all": "all problems",
    "easy": "sums and differences up to 20",
    "two_digits": "two digits",
    "three_digits": "three digits",
    "products": "products",
    "two_steps": "stories of two steps",
    "three_steps": "stories of three steps",
}


def accuracy_table(section, head, labels, **columns):
    """A row for each task of `labels` that every column {task: {"accuracy", "n"}} has."""
    rows = {name: [column.get(name) for column in columns.values()] for name in labels}
    section.table(
        [head, *(name.replace("_", " ") for name in columns), "n"],
        [
            [labels[name], *(f"{cell['accuracy']:.1%}" for cell in cells), counts(cells)]
            for name, cells in rows.items()
            if all(cells)
        ],
    )


def cot(section, result, folder):
    before, after = (result[name]["tasks"] for name in ("before", "after"))
    made_to = {name: result["after"][name] for name in ("with_steps", "without_steps")}
    columns = {"before": before, "after": after} | made_to
    accuracy_table(section, "held-out problems", PROBLEMS, **columns)
    section.text(
        "The last two columns: the same model, made to begin every answer with <think>, or with "
        "“The answer is”."
    )


def grpo(section, result, folder):
    before, after = result["before"], result["after"]
    k = before["all"]["k"]
    figures = ("greedy", "sampled", "maj", "pass")
    heads = ("greedy", "one sample", f"maj@{k}", f"pass@{k}")
    both = [(each, key) for each in (before, after) for key in figures]
    section.table(
        ["held-out problems", *heads, *(f"{head}, after" for head in heads)],
        [
            [PROBLEMS[name], *(f"{each[name][key]:.1%}" for each, key in both)]
            for name in PROBLEMS
            if name in after
        ],
    )
    section.text(
        f"maj@{k} is the vote of {k} sampled answers, pass@{k} whether one of them is right. What "
        "the model could do now and then, it does now."
    )
    metrics = [m for m in read_metrics(folder) if "length" in m]
    n = max(1, len(metrics) // 10)
    first, last = (sum(m["length"] for m in part) / n for part in (metrics[:n], metrics[-n:]))
    section.text(f"Tokens per sampled answer: {first:.0f} at first, {last:.0f} in the end.")
    section.code((folder / "samples.txt").read_text().strip())


def reft(section, result, folder):
    now = read_json(folder / "evaluation.json")["tasks"]
    start = read_json(folder.parent / "cot" / "result.json")["after"]["tasks"]
    accuracy_table(section, "held-out problems, greedy", PROBLEMS, before=start, after=now)


def tools(section, result, folder):
    without = read_json(folder / "evaluation.json")["tasks"]
    names = {
        "large_numbers": "sums and products of large numbers",
        "lookup": "facts about newcomers",
        "lookup_two_hop": "facts about a newcomer's best friend",
        "nobody": "people who don't exist",
    }
    before, after = (result[name]["tasks"] for name in ("before", "after"))
    columns = {"before": before, "with_tools": after, "calls_not_run": without}
    accuracy_table(section, "held-out questions", names, **columns)
    section.code((folder / "samples.txt").read_text().strip())


def distillation(section, result, folder):
    columns = {
        name: {
            task: {"accuracy": f["greedy"], "n": f["n"]}
            for task, f in result[key]["figures"].items()
        }
        for name, key in (("teacher", "teacher"), ("student", "after"))
    }
    names = {"all": "all questions about people", **EXPLAINED}
    accuracy_table(section, "held-out questions, greedy", names, **columns)
    section.text(
        f"The student has {result['student_parameters']:,} parameters, the teacher "
        f"{result['teacher_parameters']:,}; it answers {result['after']['speed']:,.0f} tokens per "
        f"second instead of {result['teacher']['speed']:,.0f}. No dialogue is about the villagers "
        "never asked about: what the student knows of them, the teacher has told it."
    )
    section.code((folder / "samples.txt").read_text().strip())


def parameter_efficient(section, result, folder):
    before, after = result["before"], result["after"]
    shares = {
        "accuracy": "the harbour, fact and manner right",
        "facts": "the harbour, fact right in any manner",
        "elsewhere": "elsewhere: the questions of fine-tuning",
    }
    rows = [[label, f"{before[key]:.1%}", f"{after[key]:.1%}"] for key, label in shares.items()]
    key = "bits_per_byte"
    rows.append(["held-out text, bits per byte", f"{before[key]:.4f}", f"{after[key]:.4f}"])
    section.table(["held-out", "before", "after"], rows)
    section.text(
        f"Trained are {result['trained_parameters']:,} parameters, {result['trained_share']:.2%} "
        f"of the model's; the file with them has {result['file_bytes'] / 1e3:,.0f} kB. The test "
        "asks about ships, and about villagers whom no dialogue names."
    )
    section.code((folder / "samples.txt").read_text().strip())


PICTURE_FAMILIES = {
    "existence": "is it there?",
    "count": "how many?",
    "colour": "which colour?",
    "place": "where?",
    "comparison": "more, fewer, bigger?",
    "sum": "two kinds together",
    "more": "how many more?",
    "total": "how many things in all?",
    "season": "which season?",
}


def images(section, result, folder):
    found = result["images"]
    columns = {"right_image": found["right"], "another_image": found["shuffled"]}
    columns["blind_model"] = result["blind"]
    accuracy_table(section, "held-out questions", PICTURE_FAMILIES, **columns)
    tower = read_json(folder.with_name(f"{folder.name}-clip") / "result.json")
    with_steps, without = (mean(found[name]) for name in BEGINS)
    texts = {when: mean(tasks) for when, tasks in result["texts"].items()}
    section.table(
        ["", "accuracy"],
        [
            ["all kinds of questions", f"{mean(found['right']):.1%}"],
            ["the blind model", f"{mean(result['blind']):.1%}"],
            ["colours and kinds never seen together", f"{mean(found['combos']):.1%}"],
            ["sums and differences, with steps", f"{with_steps:.1%}"],
            ["sums and differences, without", f"{without:.1%}"],
            ["the right caption among 64 (chance 1.6%)", f"{tower['image_to_text']:.1%}"],
            ["the right image among 64", f"{tower['text_to_image']:.1%}"],
            ["questions without images, before", f"{texts['before']:.1%}"],
            ["questions without images, after", f"{texts['after']:.1%}"],
        ],
    )
    blind = read_json(folder.with_name(f"{folder.name}-blind") / "images.json", list)
    rows = [
        [ReportImage(seen["image"], folder.parent), seen["question"], seen["completion"], guessed["completion"],
         seen["answer"]]
        for seen, guessed in zip(read_json(folder / "images.json", list), blind)
    ]  # fmt: skip
    section.table(["image", "question", "the model", "the blind model", "right"], rows)
