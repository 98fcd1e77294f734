"""The house itself: imports go down only, text needs no image code, settings are read, functions
that several scripts show in full are the same, and text is UTF-8 everywhere.
"""

import ast
import functools
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "train_pretrain train_sft train_rm train_ppo train_dpo train_grpo distill lora train_vlm"
SCRIPTS = SCRIPTS.split()
COMMANDS = {"__main__", "report", "chat", "evaluate", "bench", "compare", "toolformer"}
COMMANDS = {
    f"nanollm.{name}" for name in COMMANDS | {"image_teacher", "scaling", "annotate", "red_team"}
}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("nanollm/**/*.py"), *ROOT.glob("data/**/*.py")]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path.read_text(encoding="utf-8") for path in FILES}


@functools.cache
def imports_of(module, top_only=False):
    """The project's modules that one imports, those inside of functions as well."""
    tree, found = ast.parse(SOURCES[module]), set()
    for node in tree.body if top_only else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [node.module] * (not any(name in SOURCES for name in names))
        for name in names:
            while name and name not in SOURCES:
                name = name.rpartition(".")[0]
            found |= {name} - {"", module}
    return found


def everything_behind(module, **how):
    found, todo = set(), [module]
    while todo:
        new = imports_of(todo.pop(), **how) - found
        found |= new
        todo += new
    return found


def test_no_module_imports_itself_in_a_circle():
    assert [m for m in SOURCES if m in everything_behind(m)] == []


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "train_vlm"])
def test_a_text_only_script_loads_nothing_about_images(script):
    behind = everything_behind(script, top_only=True)
    assert [m for m in behind if re.search("vision|image|scenes", m)] == []


def test_the_library_imports_neither_scripts_nor_data_and_nobody_imports_a_command():
    for module in SOURCES:
        imported = imports_of(module)
        if module.startswith("nanollm") and module not in COMMANDS:
            assert [m for m in imported if m.split(".")[0] in ("data", *SCRIPTS)] == [], module
        if module != "nanollm.__main__":
            assert imported & COMMANDS == set(), module
        if module.startswith("data"):
            allowed = "config download formats records rewards tools run".split()
            used = [m for m in imported if m.startswith("nanollm")]
            assert {m.split(".")[1] for m in used} <= {*allowed}, module


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_read(script):
    """By the script itself, or by the library, or by a script whose functions it shares."""
    config, shared = import_module(script).Config, imports_of(script) & {*SCRIPTS}
    library = "".join(SOURCES[m] for m in SOURCES if m.startswith("nanollm") or m in shared)
    for field in fields(config):
        read = re.compile(rf"\b(cfg|config|settings)\.{field.name}\b|\"{field.name}\"")
        assert field.name == "preset" or read.search(SOURCES[script] + library), field.name


def test_functions_that_several_scripts_show_in_full_are_the_same():
    """Those of one name and the same parameters."""
    shown = {}
    for script in SCRIPTS:
        for node in ast.parse(SOURCES[script]).body:
            if isinstance(node, ast.FunctionDef) and node.name not in ("main", "finish", "measure"):
                key = node.name, ast.unparse(node.args)
                shown.setdefault(key, set()).add(ast.get_source_segment(SOURCES[script], node))
    assert [key for key, sources in shown.items() if len(sources) > 1] == []


def test_every_text_file_is_opened_as_utf8():
    for module, source in SOURCES.items():
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            said, method = ast.unparse(call), getattr(call.func, "attr", "")
            opens = getattr(call.func, "id", "") == "open" and not re.search(
                r"'([rwa]b|r\+b)'", said
            )
            if opens or method in ("read_text", "write_text"):
                assert "encoding='utf-8" in said, f"{module}, line {call.lineno}"
