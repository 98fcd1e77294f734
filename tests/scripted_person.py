"""A person with a firm taste, who answers `python -m nanollm.annotate` through a pipe.

Run     python tests/scripted_person.py courteous 30 runs/sft --out choices.jsonl
"""

import subprocess
import sys

from data.village.tasks import STYLES

WORTH = {  # of a completion; where both are worth the same, the pair is skipped
    "courteous": lambda text: any(phrase in text for phrase in STYLES["courteous"]),
    "shorter": lambda text: -len(text.split()),
}


def answers(command, worth, most):
    """Let the person answer until `most` choices are made; returns what the command said."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipes) as process:
        said, shown, chosen = "", "", 0
        while character := process.stdout.read(1):
            shown += character
            if shown.endswith("q: end > "):
                a, b = (worth(shown.split(f"\n\n{n}  ")[-1].split("\n\n")[0]) for n in (1, 2))
                key = "q" if chosen == most else "s" if a == b else "1" if a > b else "2"
                chosen += key in "12"
                process.stdin.write(f"{key}\n")
                process.stdin.flush()
                said, shown = said + shown, ""
    return said + shown


if __name__ == "__main__":
    taste, most, *flags = sys.argv[1:]
    command = [sys.executable, "-m", "nanollm.annotate", *flags]
    print(answers(command, WORTH[taste], int(most))[-300:])
