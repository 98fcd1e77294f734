"""Figures of many answers: accuracy by family, maj@k and pass@k, and the tables that show them."""

from collections import defaultdict

from nanollm.rewards import is_right, majority, pass_at_k


def sampled_figures(items, greedy, sampled=None):
    """{family: figures}, and "all" for their mean.

    Figures are "n", "greedy" (accuracy of the greedy replies), and where `sampled` holds k replies
    per item, in order, "sampled" (accuracy of one of them), "maj" (of a vote among k: maj@k) and
    "pass" (share of items with a right one among k: pass@k).
    """
    k = len(sampled) // len(items) if sampled else 0
    by_family = defaultdict(list)
    for n, (item, reply) in enumerate(zip(items, greedy)):
        figures = {"greedy": float(is_right(item, reply))}
        if k:
            replies = sampled[n * k : (n + 1) * k]
            right = sum(is_right(item, each) for each in replies)
            vote = float(is_right(item, majority(item, replies)))
            figures |= {"sampled": right / k, "maj": vote, "pass": pass_at_k(k, right, k)}
        by_family[item["family"]].append(figures)
    by_family["all"] = [figures for rows in list(by_family.values()) for figures in rows]
    return {
        name: {"n": len(rows), "k": k}
        | {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        for name, rows in by_family.items()
    }


def figures_table(columns):
    """Text table of {column name: what sampled_figures gives}."""
    heads = {"greedy": "greedy", "sampled": "sampled", "maj": "maj@", "pass": "pass@"}
    shown = [
        (name, key) for name, result in columns.items() for key in heads if key in result["all"]
    ]
    titles = [
        heads[key] + (str(columns[name]["all"]["k"]) if key in ("maj", "pass") else "")
        for name, key in shown
    ]
    lines = [" " * 18 + "".join(f"{name:>10}" for name, _ in shown)] if len(columns) > 1 else []
    lines.append(f"{'family':18}" + "".join(f"{title:>10}" for title in titles) + f"{'n':>7}")
    first = next(iter(columns.values()))
    for family in first:
        cells = "".join(f"{columns[name][family][key]:>10.1%}" for name, key in shown)
        lines.append(f"{family:18}{cells}{first[family]['n']:>7}")
    return "\n".join(lines)


def first_of_each_family(items, limit):
    """At most `limit` items per family; 0 for all."""
    seen, kept = defaultdict(int), []
    for item in items:
        seen[item["family"]] += 1
        if not limit or seen[item["family"]] <= limit:
            kept.append(item)
    return kept


def sample_by_family(items, replies):
    """The first item of each family with its reply, for samples.txt."""
    first = {item["family"]: (item, reply) for item, reply in zip(items[::-1], replies[::-1])}
    return "\n".join(
        f"{item['messages'][-1]['content']}\n    {reply}" for item, reply in first.values()
    )


def table(columns):
    """Text table of {column name: {family: {"accuracy", "n"}}}, a line per family."""
    families = list(dict.fromkeys(family for result in columns.values() for family in result))
    lines = [f"{'family':18}" + "".join(f"{name:>12}" for name in columns) + f"{'n':>7}"]
    for family in families:
        cells = [result.get(family) for result in columns.values()]
        shown = "".join(f"{c['accuracy']:>11.1%} " if c else f"{'-':>11} " for c in cells)
        lines.append(f"{family:18}{shown}{counts(cells):>7}")
    return "\n".join(lines)


def counts(cells):
    """How many items the cells {"accuracy", "n"} of a row are of: one number, or one for each cell
    where they differ; a cell may be None.
    """
    numbers = [str(cell["n"]) if cell else "-" for cell in cells]
    known = {*numbers} - {"-"}
    return known.pop() if len(known) == 1 else ", ".join(numbers)
