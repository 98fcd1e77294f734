"""Rewards that rules give: small functions of a prompt's record and the reply's text.

`item` has "answer" and "check" (data/README.md). Whatever the text holds, they return a number in
time that grows with its length only.
"""

from data.village_tasks import check_answer, last_number


def final_answer(reply):
    """What a reply says after thinking and calling: the text behind the last </think> or
    </tool_result>; "" where one of them was begun and never closed.
    """
    for begin, end in ("<think>", "</think>"), ("<tool_call>", "</tool_result>"):
        before, closed, after = reply.rpartition(end)
        reply = after if closed else before + after
        if begin in reply:
            return ""
    return reply


def accuracy(item, reply):
    """1 for a right final answer, else 0."""
    return float(check_answer(item, final_answer(reply)))


def is_right(item, reply):
    """Is it the right answer to a test item? That of a cloze item, which has no "check", has to go
    on with the answer.
    """
    if "check" in item:
        return bool(accuracy(item, reply))
    follows = reply[len(item["answer"]) :][:1]
    return reply.startswith(item["answer"]) and not follows.isalpha()


def think_format(item, reply):
    """1 for <think>, some text, </think>, some text, once and in this order; else 0.

    The format reward of DeepSeek-R1 (Guo et al. 2025, arXiv:2501.12948), section 2.2.2.
    """
    thought, closed, answer = reply.strip().removeprefix("<think>").partition("</think>")
    once = "<think>" not in thought + answer and "</think>" not in answer
    begins = reply.strip().startswith("<think>")
    return float(begins and once and bool(closed and thought.strip() and answer.strip()))


def reft_reward(item, reply):
    """1 for a right answer, 0.1 where an answer could at least be extracted, else 0.

    Luong et al. 2024 (ReFT, arXiv:2401.08967), section 3.2.
    """
    if accuracy(item, reply):
        return 1.0
    answer = final_answer(reply)
    given = last_number(answer) is not None if item["check"] == "number" else answer.strip()
    return 0.1 if given else 0.0


# --- several answers to one problem --------------------------------------------------------------


def pass_at_k(n, right, k):
    """Chance that one of k answers is right, estimated without bias from n answers of which
    `right` are: 1 - C(n - right, k) / C(n, k)  (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    chance_of_none = 1.0
    for i in range(k):
        chance_of_none *= max(0, n - right - i) / (n - i)
    return 1.0 - chance_of_none


def majority(item, replies):
    """The reply whose final answer most others share; the first of them where several lead.

    Self-consistency (Wang et al. 2022, arXiv:2203.11171). Replies without an answer don't vote.
    """
    votes = {}
    for reply in replies:
        vote = vote_of(item, reply)
        if vote not in (None, ""):
            votes.setdefault(vote, []).append(reply)
    return max(votes.values(), key=len)[0] if votes else ""


def vote_of(item, reply):
    """What a reply votes for: its number, or its text; for a cloze item the rest of the sentence.
    """
    if "check" not in item:
        return reply.partition(".")[0].strip().lower()
    answer = final_answer(reply)
    return last_number(answer) if item["check"] == "number" else answer.strip().lower()
