"""SQL as a tool: a SELECT is answered by a short text in bounded time, nothing else is done; the
village's questions for it are true, and composed of what training never joined.
"""

import itertools
import json
import random
import re
import sqlite3
from collections import Counter, defaultdict

import pytest
from helpers import random_strings, seconds

from data.village import examples as village
from data.village import sql as village_sql
from data.village import tasks
from data.village.sql import QUERIES, QUESTIONS, SHARES, sql_examples, sql_lessons, table_of
from data.village.world import POOLS, build_world
from nanollm.config import UserError
from nanollm.formats import write_jsonl
from nanollm.rewards import accuracy
from nanollm.tools import LONGEST, NOTHING, Database, Toolbox

KEYS = ("name", "job", "town", "age", "friend")
PEOPLE = [
    ("Ann", "baker", "Ashmoor", 30, "Bob"), ("Bob", "miller", "Ashmoor", 41, "Ann"),
    ("Cid", "baker", "Mossley", 25.5, "Dan"), ("Dan", "baker", "Ashmoor", None, "Cid"),
]  # fmt: skip
PEOPLE = [dict(zip(KEYS, row)) for row in PEOPLE]
FRIENDS = "people a JOIN people b ON a.friend = b.name"


@pytest.fixture
def database():
    return Database({"people": PEOPLE})


# --- the tool ------------------------------------------------------------------------------------

ANSWERED = [
    ("SELECT COUNT(*) FROM people WHERE job = 'baker' AND town = 'Ashmoor'", "2"),
    (" select\n name from PEOPLE where town='Mossley' ; ", "Cid"),
    (f"SELECT COUNT(*) FROM {FRIENDS} WHERE a.job = 'baker' AND b.job = 'baker'", "2"),
    (f"SELECT b.town FROM {FRIENDS} WHERE a.name = 'Dan'", "Mossley"),
    ("SELECT job, COUNT(*) FROM people GROUP BY job ORDER BY 2 DESC", "baker, 3; miller, 1"),
    ("SELECT name FROM people WHERE age > (SELECT MIN(age) FROM people) ORDER BY age", "Ann; Bob"),
    (
        "SELECT name FROM people WHERE job = ? AND town = ? ORDER BY name | baker | Ashmoor",
        "Ann; Dan",
    ),
    ("SELECT name FROM people WHERE age > ? | 40", "Bob"),  # bound to numbers, a number
    ("SELECT name FROM people WHERE name = ? | Ann' OR '1' = '1", NOTHING),
    ("SELECT AVG(age), SUM(age) FROM people", "32.166667, 96.5"),
    ("SELECT age FROM people WHERE name = 'Dan'", "NULL"),
    ("SELECT name FROM people WHERE name = 'Eve'", NOTHING),
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
    "PRAGMA table_info(people)", "ALTER TABLE people RENAME TO t",
    "SELECT load_extension('x')", "SELECT * FROM sqlite_master", "SELECT * FROM pragma_table_list",
    "SELECT randomblob(1000000000)", "SELECT zeroblob(1000000000)", "SELECT printf('%999999d', 1)",
    "SELECT name FROM people WHERE name LIKE '%a%a%a%a%'", "SELECT random()", "SELECT date('now')",
    "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT COUNT(*) FROM t",
    "SELECT * FROM (WITH RECURSIVE t(x) AS (VALUES(1) UNION ALL SELECT x FROM t) SELECT x FROM t)",
]  # fmt: skip


@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_not_reading_is_refused_and_writes_nothing(
    statement, database, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert database.query(statement).startswith("error: ")
    with pytest.raises(sqlite3.DatabaseError, match="authoriz|prohibited"):
        database.connection.execute(statement).fetchall()  # even if it were taken for a SELECT
    assert not list(tmp_path.iterdir()) and not database.connection.in_transaction
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"


WRONG = [
    ("", "only SELECT"), ("\0", "only SELECT"), ("EXPLAIN SELECT 1", "only SELECT"),
    ("SELECT", "incomplete"), ("SELECT 1; SELECT 2", "one statement"), ("SELECT 1\0", "null"),
    ("SELECT 1; DROP TABLE people", "one statement"), ("SELECT '\ud800'", "surrogates"),
    ("SELECT ?", "bindings"), ("SELECT nobody FROM people", "no such column"),
    ("SELECT 1 FROM nowhere", "no such table"), ("SELECT CAST(x'ff' AS TEXT)", "decode"),
    ("SELECT SUM(9223372036854775807) FROM people", "overflow"), ("SELECT 'a", "unrecognized"),
    ("SELECT " + "(" * 90 + "1" + ")" * 90, ""), (f"SELECT '{'a' * 3000}'", "too big"),
    ("SELECT n FROM (" * 5 + "SELECT name n FROM people" + ")" * 5, ""),
]  # fmt: skip


@pytest.mark.parametrize("query, why", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_said_in_a_short_line(query, why, database):
    result = database.query(query)
    assert (result.startswith("error: ") or not why) and why in result and len(result) <= LONGEST


def test_a_loop_ends_a_million_rows_are_cut_and_no_text_grows_without_bound():
    database = Database({"t": [{"x": "a" * 100, "n": i} for i in range(1000)]})
    for query, result in [
        ("SELECT COUNT(*) FROM t, t a, t b, t c", "error: interrupted"),
        ("SELECT a.x || b.x y, a.x FROM t a, t b ORDER BY y", "error: interrupted"),
        ("SELECT DISTINCT a.n, b.n FROM t a, t b ORDER BY 2", "error: interrupted"),
        ("SELECT 1 FROM t, t a, t b, t c", "1; " * 10 + "..."),
        ("SELECT COUNT(*) FROM t a JOIN t b ON a.n = b.n", "1000"),
        (f"SELECT {'x||' * 30}x FROM t", "error: string or blob too big"),
        ("SELECT COUNT(*) FROM " + ", ".join(["t"] * 65), "error: at most 64 tables in a join"),
    ]:
        assert seconds(database.query, query) < 5, query
        assert database.query(query) == result


def test_random_strings_and_queries_of_random_words_are_answered_with_a_short_text(
    tokenizer, database, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rng, tools = random.Random(0), Toolbox({"sql": database.query}, tokenizer)
    words = " ".join(REFUSED + [query for query, _ in ANSWERED]).split()
    made = ["SELECT " + " ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(1500)]
    said = Counter()
    for text in [*random_strings(1500, seed=3), *made]:
        for result in (tools.run(f"sql({text})"), database.query("SELECT " + text)):
            assert isinstance(result, str) and 0 < len(result) <= LONGEST, repr(text)
            said[result.startswith("error: ")] += 1
    assert min(said.values()) > 20, said
    assert database.query("SELECT COUNT(*), MAX(name) FROM people") == "4, Dan"
    assert not list(tmp_path.iterdir())


def test_a_toolbox_searches_in_texts_and_queries_tables(tokenizer, tmp_path):
    write_jsonl(tmp_path / "known.jsonl", [{"title": "hat of Ann", "text": "Ann's hat is red."}])
    write_jsonl(tmp_path / "pets.jsonl", [{"name": "Rex", "age": 7}, {"age": 12, "name": "007"}])
    write_jsonl(tmp_path / "people.jsonl", PEOPLE)
    paths = [tmp_path / name for name in ("known.jsonl", "pets.jsonl", "people.jsonl")]
    tools = Toolbox.with_knowledge(paths, tokenizer)
    assert tools.run("search(hat of Ann)") == "Ann's hat is red."
    assert tools.run("sql(SELECT name FROM pets WHERE age > 9)") == "007"
    assert tools.run("sql(SELECT COUNT(*) FROM people JOIN pets)") == "8"
    assert "sql" not in Toolbox.with_knowledge(paths[:1], tokenizer).tools


@pytest.mark.parametrize(
    "rows, why",
    [
        ([{"a": 1}, {"b": 1}], "line 2: the records of a table have the same keys"),
        ([{"a": [1]}], "no table"),
        ([{"a": 2**70}], "no table"),
        ([{"a": 1, "A": 1}], "duplicate column"),
        ([{"a": "x" * 5000}], "too big"),
    ],
)
def test_records_that_are_no_table_are_the_users_error(rows, why, tmp_path):
    write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=why):
        Database.load([tmp_path / "t.jsonl"])


def test_tables_of_one_name_and_tables_without_types_are_refused(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [{"a": 1}])
    with pytest.raises(UserError, match="a second table called t"):
        Database.load([tmp_path / "t.jsonl"] * 2)
    (tmp_path / "t.csv").write_text("name,age\nRex,7\n", encoding="utf-8")
    with pytest.raises(UserError, match="make it JSONL"):
        Database.load([tmp_path / "t.csv"])


# --- the village's questions ---------------------------------------------------------------------

CALL = re.compile(r"<tool_call>sql\((.*)\)</tool_call><tool_result>(.*)</tool_result>")


@pytest.fixture(scope="module")
def world():
    return build_world()


@pytest.fixture(scope="module")
def asked(world):
    """Examples by split, all with "completion" and their check."""
    as_example = tasks.as_example

    def with_completion(task, turns, check, split):
        return as_example(task, turns, check, split) | check | {"completion": turns[-1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "as_example", with_completion)
        patch.setitem(village_sql.SIZES, "train", 800)
        return {split: sql_examples(world, split) for split in ("train", "val", "test")}


def read(example):
    """(kind, A, a, B, b) of the query in a completion."""
    query = CALL.search(example["completion"])[1]
    for kind, pattern in QUERIES.items():
        pattern = re.escape(pattern).replace(r"\{B\}", r"(?P<B>\w+)", 1)
        for slot, of in ("A", r"\w+"), ("a", ".*"), ("b", ".*"):
            pattern = pattern.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{of})", 1)
        if found := re.fullmatch(pattern.replace(r"\{B\}", "(?P=B)"), query):
            slots = {"b": None, **found.groupdict()}
            return kind, *map(slots.get, "AaBb")
    raise AssertionError(query)


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
        (question, *_) = (m["content"] for m in example["messages"])
        assert all(value.lower() in question.lower() for value in (a, b) if value), example
        assert example["check"] == ("number" if "COUNT(*) FROM" in QUERIES[kind] else "contains")


def test_no_combination_is_trained_and_tested_and_new_pairs_join_what_training_never_does(asked):
    keys, joined = defaultdict(set), defaultdict(set)
    for split, examples in asked.items():
        for example in examples:
            kind, A, a, B, b = read(example)
            part = "new" if example["task"] == "new_pairs" else split
            joined[part].add(frozenset((A, B)))
            if part != "new":
                pair = (A, a), (B, b)
                keys[split].add((kind, frozenset(pair) if kind in ("count", "friend") else pair))
    assert not any(keys[a] & keys[b] for a, b in itertools.combinations(keys, 2))
    assert len(joined["new"]) == 3 and len(joined["train"]) == 12
    assert not joined["new"] & (joined["train"] | joined["val"] | joined["test"])


def test_there_are_as_many_examples_as_planned_and_values_of_every_kind(asked):
    assert Counter(e["task"] for e in asked["test"]) == dict.fromkeys(SHARES, 200)
    assert Counter(e["task"] for e in asked["train"]) == {
        task: round(800 * share) for task, share in SHARES.items() if share
    }
    said = {value for e in asked["train"] for value in read(e)[1:] if value}
    assert said == {*POOLS, *itertools.chain(*POOLS.values())}
    assert {read(e)[0] for e in asked["test"] if e["task"] == "new_pairs"} == {*QUESTIONS}
    assert all(len(CALL.search(e["completion"])[1]) < LONGEST for e in asked["train"])


def test_lessons_are_half_queries_and_half_what_they_are_mixed_with(world):
    others = [{"task": "other", "messages": []}] * 500
    counts = Counter(e["task"] for e in sql_lessons(world, "val", others))
    assert counts["other"] == sum(counts.values()) / 2


def test_a_run_asks_the_database_of_its_own_village(tmp_path, monkeypatch, tokenizer):
    folder = tmp_path / "village"
    monkeypatch.setattr(village, "of_run", lambda run: folder)
    for name, rows in ("people", PEOPLE), ("knowledge", [{"title": "a b", "text": "c"}]):
        write_jsonl(folder / f"{name}.jsonl", rows)
    tools = Toolbox.with_knowledge(village.knowledge_of("runs/sql"), tokenizer)
    assert tools.run("sql(SELECT COUNT(*) FROM people)") == "4" and tools.run("search(b)") == "c"
    assert village.knowledge_of("runs/sql", "a.jsonl,b.jsonl") == ["a.jsonl", "b.jsonl"]
    assert json.loads((folder / "people.jsonl").read_text().splitlines()[0]) == PEOPLE[0]
