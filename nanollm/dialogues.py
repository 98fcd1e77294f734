"""From dialogues to rows to train on: each is cut to what fits, rows are packed, and what was left
out is counted and printed.
"""

from nanollm.config import UserError
from nanollm.data import pack


def fit_chats(chats, T, render):
    """(dialogues as far as they fit, the (ids, mask) of each, how many were shortened).

    A dialogue is cut after the last assistant turn with which it has at most T tokens; without any
    it is dropped. `render` gives the (ids, mask) of messages.
    """
    kept, examples, shortened = [], [], 0
    for chat in chats:
        messages = chat["messages"]
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        for end in reversed(ends):
            ids, mask = render(messages[:end])
            if len(ids) <= T and any(mask):
                kept.append({**chat, "messages": messages[:end]})
                examples.append((ids, mask))
                shortened += end < ends[-1]
                break
    return kept, examples, shortened


def pack_chats(chats, tokenizer, T, name, rt, render=None, pictures_of=None, note=""):
    """data.Packed rows of T tokens; says what was cut. Raises UserError when nothing is left to
    train on.

    With pictures (picture_data.py): `render` in place of Tokenizer.render, `pictures_of` gives the
    numbers of a dialogue's pictures, and `note` says what else takes room in a row.
    """
    kept, examples, shortened = fit_chats(chats, T, render or tokenizer.render)
    if not kept:
        raise UserError(
            f"none of the {len(chats)} {name} dialogues has an answer within {T} tokens{note}; "
            "raise --context"
        )
    pictures, shown = None, ""
    if pictures_of:
        pictures = [pictures_of(chat) for chat in kept]
        shown = f" with {sum(map(len, pictures))} pictures"
    rows = pack(examples, T, tokenizer.pad_id, pictures)
    rt.print(
        f"{name}: {len(kept)} dialogues{shown} in {len(rows)} rows of {T} tokens, "
        f"{rows.mask.sum():,} trained on; {shortened} shortened, {len(chats) - len(kept)} dropped "
        "because they were longer"
    )
    return rows
