"""Chat templates: Jinja programs that make one text of a chat, the model's own or one of ours.

compiled            a template, rendered as transformers' apply_chat_template renders it
layout_template     the template for a vocabulary with the marks of a known layout, or ours
broken              a message in whose texts no marker is spelt, so that only a template writes one
"""

import datetime
import functools
import json
import re

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanollm.config import UserError

ROLES = ("system", "user", "assistant", "tool")
NAMED_TOKENS = ("bos", "eos", "unk", "pad")


# --- the models' own ---


@functools.cache
def compiled(template):
    """A template as transformers compiles it: in a sandbox, for it comes from anywhere."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **how):  # without Jinja's escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def strftime_now(form):
        return datetime.datetime.now().strftime(form)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        # by {% generation %} some templates mark answers, which are found otherwise here
        template = re.sub(r"({%[-+]?\s*)generation(?=\s*[-+]?%})", r"\1if true", template)
        template = re.sub(r"({%[-+]?\s*)endgeneration(?=\s*[-+]?%})", r"\1endif", template)
        return sandbox.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"its chat template is malformed ({error})") from None


def own_template(config):
    """The chat template in a tokenizer_config.json, or None; of several the default one."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}["default"]
    return template


def names_of(config):
    """The names that templates know tokens by: {"bos_token": text} and so on."""
    named = {f"{name}_token": config.get(f"{name}_token") for name in NAMED_TOKENS}
    named = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
    return {key: text for key, text in named.items() if text is not None}


# --- ours ---

# Chat layouts, role -> (prefix, suffix). The first one whose two marks the vocabulary has is used,
# where the model brings no template.
CHATML = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES}
CHATML["tool"] = ("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n")
LLAMA3 = {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}
LLAMA3["tool"] = ("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>")
OURS = {role: (f"<|{role}|>", "<|end|>") for role in ROLES}
LAYOUTS = (
    ("<|im_start|>", "<|im_end|>", CHATML),
    ("<|start_header_id|>", "<|eot_id|>", LLAMA3),
    ("<|user|>", "<|end|>", OURS),
)
# A layout in Jinja. A call is written as nanollm/tools.py reads it.
LAYOUT_TEMPLATE = """\
{%%- set affixes = %s -%%}
{{- %s -}}
{%%- for m in messages -%%}
    {{- affixes[m.role][0] -}}
    {{- '<think>' + m.reasoning_content + '</think>' if m.reasoning_content -}}
    {{- m.content or '' -}}
    {%%- for call in m.tool_calls or [] -%%}
        {%%- set arguments = call.function.arguments -%%}
        {%%- if arguments is not mapping or arguments | length != 1 -%%}
            {{- raise_exception('a tool call must have one argument, of any name') -}}
        {%%- endif -%%}
        {{- '<tool_call>' + call.function.name -}}
        {{- '(' + (arguments.values() | first | string) + ')</tool_call>' -}}
    {%%- endfor -%%}
    {{- affixes[m.role][1] -}}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{- affixes.assistant[0] -}}{%%- endif -%%}
"""


def layout_template(special, start):
    """The template of the layout whose marks are there, after a text `start`."""
    layout = next((table for mark, end, table in LAYOUTS if {mark, end} <= special.keys()), OURS)
    return LAYOUT_TEMPLATE % (json.dumps(layout), json.dumps(start))


def with_arguments(call):
    """A tool call as OpenAI writes it, {"function": {"name", "arguments"}}, in which the arguments
    are no JSON in a text any more, but what it stands for.
    """
    try:
        function = dict(call["function"])
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
        return {**call, "function": function}
    except (KeyError, TypeError, ValueError):
        raise UserError("a tool call needs a name, and arguments in JSON") from None


# --- contents ---

BREAK = "\udfff"  # half of a surrogate pair: no text holds it, after what `broken` does to it


@functools.cache
def any_of(texts):
    """A compiled pattern that finds each of the texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def broken(value, marks):
    """JSON with a BREAK behind every character of what the pattern `marks` finds in its texts, and
    U+FFFD for each half of a surrogate pair that stands alone, as tiktoken has it.
    """
    if isinstance(value, str):
        text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return marks.sub(lambda found: "".join(c + BREAK for c in found[0]), text)
    if isinstance(value, list):
        return [broken(each, marks) for each in value]
    if isinstance(value, dict):
        return {key: broken(each, marks) for key, each in value.items()}
    return value
