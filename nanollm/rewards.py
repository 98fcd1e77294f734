"""Rewards that rules give: small functions of a prompt's record and the reply's text."""

import re

from data.village_tasks import check_answer


def reft_reward(item, reply):
    """1 for a right answer, 0.1 where an answer could at least be extracted, else 0.

    Luong et al. 2024 (ReFT, arXiv:2401.08967), section 3.2. `item` has "answer" and "check".
    """
    if check_answer(item, reply):
        return 1.0
    if item["check"] == "number":
        return 0.1 if re.search(r"\d", reply) else 0.0
    return 0.1 if reply.strip() else 0.0
