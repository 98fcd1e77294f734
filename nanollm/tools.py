"""Tools that a model may call while it writes: a calculator, search in a small knowledge base, and
queries to a small database.

    <tool_call>calculator(4821 * 736)</tool_call><tool_result>3548256</tool_result>The answer is ...

The model writes the call; when it has closed it, the engine (generate.py) runs it and writes the
result behind it. Whatever the model writes, a tool answers in bounded time and with a short text.
What can't be done gives "error: ...", which the model can read, and never an exception.
"""

import ast
import math
import operator
import re
import sqlite3
import warnings
from collections import Counter, defaultdict
from fractions import Fraction

from nanollm.config import UserError
from nanollm.formats import need, read_records

NOTHING = "nothing found"
LONGEST = 200  # characters of a call's argument, and the largest power
LARGEST = 10**40  # of any number on the way
LONGEST_RESULT = 48  # tokens that a result may have; the rest is cut


# --- calculator ----------------------------------------------------------------------------------

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(expression):
    """The value of an arithmetic expression as text: exact for integers, else rounded to six
    places, or between -1 and 1 to six digits.

    The text, of at most LONGEST characters, is parsed, never run. Numbers beyond LARGEST are
    errors, so that 9**9**9 and its like end at once.
    """
    source = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", expression.strip())  # 1,000
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, about odd expressions
            tree = ast.parse(source, mode="eval")
        value = value_of(tree.body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: too large"
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return "error: not arithmetic"
    if value.denominator == 1:
        return str(value)
    if abs(value) < 1:
        return f"{float(value):.6g}"
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def value_of(node):
    """The Fraction that a syntax tree stands for."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))  # 0.1 is a tenth
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](value_of(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = value_of(node.left), value_of(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1:
                raise ValueError("a power that isn't a whole number")
            if abs(right) > LONGEST:
                raise OverflowError
        value = Fraction(OPERATORS[type(node.op)](left, right))
    else:
        raise ValueError("not arithmetic")
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise OverflowError
    return value


# --- search --------------------------------------------------------------------------------------


class KnowledgeBase:
    """Entries {"title", "text"}, found by the words that they share with a query."""

    def __init__(self, entries):
        self.texts = [entry["text"] for entry in entries]
        self.titles = [words(entry["title"]) for entry in entries]
        self.index = defaultdict(list)  # word -> numbers of the entries that hold it
        for number, entry in enumerate(entries):
            for word in words(f"{entry['title']} {entry['text']}"):
                self.index[word].append(number)

    @classmethod
    def load(cls, path):
        """From JSONL; raises UserError where an entry has no "title" or no "text"."""
        entries = read_records(path)
        for entry in entries:
            textual = all(isinstance(entry.get(key), str) for key in ("title", "text"))
            need(textual, entry.where, 'an entry needs a "title" and a "text"')
        return cls(entries)

    def search(self, query):
        """The text of the entry that holds most of the query's weight, if that is half or more; of
        several the one whose title holds most of its words, then the first. A word's weight is its
        inverse document frequency (Spärck Jones 1972): rare words say most.
        """
        found, total, asked = Counter(), 0.0, words(query)
        for word in sorted(asked):
            holders = self.index.get(word, ())
            weight = math.log((1 + len(self.texts)) / (1 + len(holders)))
            found.update(dict.fromkeys(holders, weight))
            total += weight
        most = max(found.values(), default=0.0)
        if not found or most < total / 2:
            return NOTHING
        best = [number for number in found if found[number] == most]
        return self.texts[max(best, key=lambda n: (len(asked & self.titles[n]), -n))]


def words(text):
    return set(re.findall(r"\w+", text.lower()))


# --- sql -----------------------------------------------------------------------------------------

FUNCTIONS = "count sum total avg min max abs round length lower upper".split()
STEPS = 500_000  # of SQLite's virtual machine, for one query
WIDEST = 2000  # bytes of a value, or of a row
ROWS = 10  # of a result; the rest is "..."


class Database:
    """The table `people` in memory, {column: text} for each row; one SELECT at a time may read it.

    SQLite asks `allows` about all that a query would do when it compiles it; what isn't listed
    there is refused before it runs. The work of what runs is bounded by STEPS and WIDEST.
    """

    def __init__(self, people):
        # no statement is kept: SQLite would go on counting the steps of one that is used again
        self.connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, WIDEST)
        self.connection.execute("PRAGMA temp_store = MEMORY")  # sorting writes no file either
        self.connection.execute(f"CREATE TABLE people ({', '.join(people[0])})")
        values = ", ".join(f":{column}" for column in people[0])
        self.connection.executemany(f"INSERT INTO people VALUES ({values})", people)
        self.connection.set_progress_handler(lambda: True, STEPS)  # True: stop
        self.connection.set_authorizer(self.allows)

    def allows(self, action, first, second, *_):
        """SQLite's question about a query: may it do this? `first` and `second` say to what."""
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and first == "people":
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    def query(self, text):
        """The rows that a SELECT gives, as "a, b; c, d"; behind it may stand what its "?" are:
        "SELECT job FROM people WHERE name = ? | Ann".
        """
        text, *values = text.split(" | ")
        try:
            found = self.connection.execute(text, values).fetchmany(ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as e:
            return f"error: {e}"[:LONGEST]
        rows = [", ".join(map(str, row)) for row in found[:ROWS]]
        result = "; ".join(rows + ["..."] * (len(found) > ROWS))
        return result[:LONGEST] or NOTHING


# --- calls in a stream of tokens -----------------------------------------------------------------


class Toolbox:
    """Functions from text to text by name, and how a tokenizer writes their calls."""

    def __init__(self, tools, tokenizer):
        markers = "<tool_call>", "</tool_call>", "<tool_result>", "</tool_result>"
        if not {*markers} <= tokenizer.special.keys():
            raise UserError("this tokenizer has no <tool_result>: start from a model of ours")
        self.tools, self.tokenizer = tools, tokenizer
        self.call, self.call_end, self.result, self.result_end = map(tokenizer.special.get, markers)

    @classmethod
    def with_knowledge(cls, paths, tokenizer):
        """Calculator; search in the first of the files; sql in the second, where there is one."""
        tools = {"calculator": calculator, "search": KnowledgeBase.load(paths[0]).search}
        if len(paths) > 1:
            tools["sql"] = Database(read_records(paths[1])).query
        return cls(tools, tokenizer)

    def run(self, text):
        """The result of a call such as "calculator(2 + 2)"."""
        name, bracket, argument = text.strip().partition("(")
        if not bracket or not argument.endswith(")"):
            return "error: a call looks like name(argument)"
        if name not in self.tools:
            return f"error: no tool of that name; there are {', '.join(self.tools)}"
        if len(argument) > LONGEST:
            return f"error: longer than {LONGEST} characters"
        return self.tools[name](argument[:-1])

    def respond(self, ids):
        """The ids of the result that follows `ids`, a completion up to its </tool_call>."""
        last = {id: place for place, id in enumerate(ids[:-1])}  # where each id stands last
        begin, end = last.get(self.call, -1), last.get(self.call_end, -1)
        text = self.tokenizer.decode(ids[begin + 1 : -1]) if begin > end else ""
        content = self.tokenizer.encode(self.run(text))[:LONGEST_RESULT]
        return [self.result, *content, self.result_end]
