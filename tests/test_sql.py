"""SQL as a tool: a SELECT is answered by a short text in bounded time, nothing else is done; the
village's questions for it are true, and composed of what training never joined.
"""

import itertools
import random
import re
from collections import Counter, defaultdict

import pytest
from helpers import random_strings, seconds

from data.village import examples as village
from data.village import sql as village_sql
from data.village import tasks
from data.village.sql import QUERIES, QUESTIONS, SHARES, sql_examples, sql_lessons, table_of
from data.village.world import POOLS, build_world
from nanollm.formats import write_jsonl
from nanollm.rewards import accuracy
from nanollm.tools import LONGEST, NOTHING, Database, Toolbox

KEYS = ("name", "job", "town", "friend")
PEOPLE = [
    ("Ann", "baker", "Ashmoor", "Bob"), ("Bob", "miller", "Ashmoor", "Ann"),
    ("Cid", "baker", "Mossley", "Dan"), ("Dan", "baker", "Ashmoor", None),
]  # fmt: skip
PEOPLE = [dict(zip(KEYS, row)) for row in PEOPLE]
FRIENDS = "people a JOIN people b ON a.friend = b.name"


@pytest.fixture
def database():
    return Database(PEOPLE)


# --- the tool ------------------------------------------------------------------------------------

ANSWERED = [
    ("SELECT COUNT(*) FROM people WHERE job = 'baker' AND town = 'Ashmoor'", "2"),
    (" select\n name from PEOPLE where town='Mossley' ; ", "Cid"),
    (f"SELECT COUNT(*) FROM {FRIENDS} WHERE a.job = 'baker' AND b.job = 'baker'", "1"),
    ("SELECT job, COUNT(*) FROM people GROUP BY job ORDER BY 2 DESC", "baker, 3; miller, 1"),
    ("SELECT name FROM people WHERE job = ? AND town = ? | baker | Ashmoor", "Ann; Dan"),
    ("SELECT name FROM people WHERE name = ? | Ann' OR '1' = '1", NOTHING),
    ("SELECT friend FROM people WHERE name = 'Dan'", "None"),
    ("SELECT name FROM people WHERE name > (SELECT MIN(name) FROM people) LIMIT 1", "Bob"),
    ("", NOTHING),
    ("SELECT a.job FROM people a, people b, people c", "baker; " * 10 + "..."),
    (f"SELECT '{'a' * 120}', '{'a' * 120}'", "a" * 120 + ", " + "a" * 78),
]


@pytest.mark.parametrize("query, result", ANSWERED)
def test_a_select_is_answered_and_again_as_often_as_it_is_asked(query, result, database):
    assert {database.query(query) for _ in range(3)} == {result}


REFUSED = [
    "INSERT INTO people(name) VALUES('x')", "DELETE FROM people", "UPDATE people SET name = 'x'",
    "DROP TABLE people", "CREATE TABLE t(a)", "CREATE TEMP TABLE t AS SELECT 1", "BEGIN", "COMMIT",
    "SAVEPOINT a", "ATTACH 'written' AS x", "VACUUM INTO 'written'", "PRAGMA user_version = 1",
    "PRAGMA table_info(people)", "ALTER TABLE people RENAME TO t", "EXPLAIN DELETE FROM people",
    "SELECT load_extension('x')", "SELECT * FROM sqlite_master", "SELECT * FROM pragma_table_list",
    "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)", "SELECT printf('%999999d', 1)",
    "SELECT name FROM people WHERE name LIKE '%a%a%a%a%'", "SELECT random()", "SELECT date('now')",
    "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT COUNT(*) FROM t",
    "SELECT * FROM (WITH RECURSIVE t(x) AS (VALUES(1) UNION ALL SELECT x FROM t) SELECT x FROM t)",
]  # fmt: skip


def test_what_is_not_reading_is_refused_and_writes_nothing(database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for statement in REFUSED:
        assert re.match("error: .*(authoriz|prohibited)", database.query(statement)), statement
        assert not database.connection.in_transaction
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"
    assert not list(tmp_path.iterdir())


WRONG = [
    ("SELECT", "incomplete"), ("SELECT 1; SELECT 2", "one statement"), ("SELECT 1\0", "null"),
    ("SELECT 1; DROP TABLE people", "one statement"), ("SELECT '\ud800'", "surrogates"),
    ("SELECT ?", "bindings"), ("SELECT nobody FROM people", "no such column"),
    ("SELECT 1 FROM nowhere", "no such table"), ("SELECT CAST(x'ff' AS TEXT)", "decode"),
    ("SELECT SUM(9223372036854775807) FROM people", "overflow"), ("SELECT 'a", "unrecognized"),
    (f"SELECT '{'a' * 3000}'", "too big"), (f"SELECT {'a' * 1000}", "no such column"),
]  # fmt: skip


@pytest.mark.parametrize("query, why", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_said_in_a_short_line(query, why, database):
    result = database.query(query)
    assert result.startswith("error: ") and why in result and len(result) <= LONGEST


def test_a_loop_ends_a_million_rows_are_cut_and_no_text_grows_without_bound():
    database = Database([{"x": "a" * 100, "n": i} for i in range(1000)])
    for query, result in [
        ("SELECT COUNT(*) FROM people, people a, people b, people c", "error: interrupted"),
        ("SELECT a.x || b.x y, a.x FROM people a, people b ORDER BY y", "error: interrupted"),
        ("SELECT DISTINCT a.n, b.n FROM people a, people b ORDER BY 2", "error: interrupted"),
        ("SELECT 1 FROM people, people a, people b, people c", "1; " * 10 + "..."),
        ("SELECT COUNT(*) FROM people a JOIN people b ON a.n = b.n", "1000"),
        (f"SELECT {'x||' * 30}x FROM people", "error: string or blob too big"),
    ]:
        assert seconds(database.query, query) < 5, query
        assert database.query(query) == result


def test_random_strings_and_queries_of_random_words_are_answered_with_a_short_text(
    tokenizer, database, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rng, tools = random.Random(0), Toolbox({"sql": database.query}, tokenizer)
    words = " ".join(REFUSED + [query for query, _ in ANSWERED]).split()
    made = ["SELECT " + " ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(1000)]
    said = Counter()
    for text in [*random_strings(1000, seed=3), *made]:
        for result in (tools.run(f"sql({text})"), database.query("SELECT " + text)):
            assert isinstance(result, str) and 0 < len(result) <= LONGEST, repr(text)
            said[result.startswith("error: ")] += 1
    assert min(said.values()) > 20, said
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"
    assert not list(tmp_path.iterdir())


def test_a_run_looks_in_the_files_of_its_own_village_or_in_the_one_named(
    tmp_path, monkeypatch, tokenizer
):
    monkeypatch.setattr(village, "of_run", lambda run: tmp_path)
    write_jsonl(tmp_path / "people.jsonl", PEOPLE)
    write_jsonl(tmp_path / "knowledge.jsonl", [{"title": "a b", "text": "c"}])
    tools = Toolbox.with_knowledge(village.knowledge_of("runs/sql"), tokenizer)
    assert tools.run("sql(SELECT COUNT(*) FROM people)") == "4" and tools.run("search(b)") == "c"
    assert village.knowledge_of("runs/sql", "a.jsonl") == ["a.jsonl"]


# --- the village's questions ---------------------------------------------------------------------

CALL = re.compile(r"<tool_call>sql\((.*)\)</tool_call><tool_result>(.*)</tool_result>")


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def asked(world):
    """Examples by split, all with their completion and check."""

    def as_example(task, turns, check, split):
        return {"messages": tasks.chat(turns), "task": task, "completion": turns[-1], **check}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "as_example", as_example)
        patch.setitem(village_sql.SIZES, "train", 800)
        return {split: sql_examples(world, split) for split in ("train", "val", "test")}


def read(example):
    """(kind, A, a, B, b) of the query in a completion."""
    query, *values = CALL.search(example["completion"])[1].split(" | ")
    columns = re.findall(r"(\w+) = \?", query) + re.findall(r"GROUP BY (\w+)", query)
    marks = {"GROUP": "common", "JOIN": "befriended", "COUNT": "count", "SELECT": "friend"}
    kind = next(kind for mark, kind in marks.items() if mark in query)
    return kind, columns[0], values[0], columns[1], (*values, None)[1]


def truth(people, kind, A, a, B, b):
    """The answer by plain loops."""
    by_name, group = {p["name"]: p for p in people}, [p for p in people if p[A] == a]
    if kind == "count":
        return sum(p[B] == b for p in group)
    if kind == "befriended":
        return sum(by_name[p["friend"]][B] == b for p in group)
    if kind == "friend":
        (only,) = (p for p in group if p[B] == b)
        return only["friend"]
    (best, most), (_, second) = Counter(p[B] for p in group).most_common(2)
    assert most > second
    return best


def test_questions_and_answers_are_true_by_plain_loops_and_composed_completions_are_right(
    asked, world
):
    people = table_of(world)
    assert len(people) == 1032
    for example in itertools.chain(*asked.values()):
        kind, A, a, B, b = read(example)
        assert example["answer"] == str(truth(people, kind, A, a, B, b)), example
        assert kind == example["task"] or example["task"] == "new_pairs"
        assert accuracy(example, example["completion"]) == 1, example
        assert len(CALL.search(example["completion"])[1]) < LONGEST
        question = example["messages"][0]["content"].lower()
        assert all(value.lower() in question for value in (a, b) if value), example
        assert example["check"] == ("number" if "COUNT(*) FROM" in QUERIES[kind] else "contains")


def test_no_combination_is_trained_and_tested_and_new_pairs_join_what_training_never_does(asked):
    keys, joined, kinds = defaultdict(set), defaultdict(set), set()
    for split, examples in asked.items():
        for example in examples:
            kind, A, a, B, b = read(example)
            if example["task"] == "new_pairs":
                joined["new"].add(frozenset((A, B)))
                kinds.add(kind)
                continue
            joined["known"].add(frozenset((A, B)))
            pair = (A, a), (B, b)
            keys[split].add((kind, frozenset(pair) if kind in ("count", "friend") else pair))
    assert not any(keys[a] & keys[b] for a, b in itertools.combinations(keys, 2))
    assert len(joined["new"]) == 3 and len(joined["known"]) == 12 and kinds == {*QUESTIONS}
    assert not joined["new"] & joined["known"]


def test_there_are_as_many_examples_as_planned_and_values_of_every_kind(asked, world):
    assert Counter(e["task"] for e in asked["test"]) == dict.fromkeys(SHARES, 200)
    planned = {task: round(800 * share) for task, share in SHARES.items() if share}
    assert Counter(e["task"] for e in asked["train"]) == planned
    said = {value for e in asked["train"] for value in read(e)[1:] if value}
    assert said == {*POOLS, *itertools.chain(*POOLS.values())}
    counts = Counter(e["task"] for e in sql_lessons(world, "val", [{"task": "other"}] * 500))
    assert counts["other"] == sum(counts.values()) / 2
