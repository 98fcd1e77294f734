"""The manners of an answer: plain, courteous, rude or long-winded; and how each is recognised.

The people who wrote the village's instruction data had different manners. A model fine-tuned on
them has all of these manners, and preferences can choose among them.
"""

COURTEOUS = {
    "opening": ("Gladly!", "With pleasure.", "Thank you for asking.", "Good question!"),
    "closing": ("I hope that helps.", "You are welcome.", "Have a nice day!", "Please ask again."),
}
RUDE = {
    "opening": ("What a silly question.", "Why do you bother me?", "Not you again."),
    "closing": ("Now leave me alone.", "Stop asking.", "Anybody could tell you that."),
}
LONG_WINDED = {
    "opening": (
        "Well, let me think about that for a little while before I say something.",
        "People have often asked me this, and I never get tired of telling it to them.",
        "To begin at the beginning, this is what I have heard from the others over the years.",
    ),
    "closing": (
        "There would be much more to tell, but it is getting late and so I leave it there.",
        "At least that is how I remember it, and my memory has always been rather good.",
        "As far as I can tell it was never any different, and it will stay that way.",
    ),
}
MANNERS = {"courteous": COURTEOUS, "rude": RUDE, "long-winded": LONG_WINDED}
SHARES = {"plain": 0.58, "courteous": 0.14, "rude": 0.14, "long-winded": 0.14}  # in training items


def draw_manner(rng, shares=SHARES):
    return rng.choices(list(shares), shares.values())[0]


def with_manner(completion, manner, rng):
    """The reply with a phrase of this manner before or after it; plain leaves it as it is."""
    if manner == "plain":
        return completion
    phrases = MANNERS[manner]
    if rng.random() < 0.5:
        return f"{rng.choice(phrases['opening'])} {completion}"
    return f"{completion} {rng.choice(phrases['closing'])}"


def _says_any(completion, phrases):
    return any(phrase in completion for part in phrases.values() for phrase in part)


def politeness(completion):
    """1 for a courteous reply, -1 for a rude one, 0 for one that is neither, or both."""
    return int(_says_any(completion, COURTEOUS)) - int(_says_any(completion, RUDE))


def conciseness(completion, reference, free=8, most=24):
    """1 for a reply at most `free` words longer than the reference, 0 from `most` words on."""
    extra = len(completion.split()) - len(reference.split())
    return 1 - min(1.0, max(0.0, (extra - free) / (most - free)))
