"""Chat templates come with a download: whatever they do, they end, small, in text or one error."""

import random
import time

import pytest

from mlx_lfm2vl import ConfigError, PromptError
from mlx_lfm2vl.prompts import sandbox
from mlx_lfm2vl.prompts.template import compile_template, render_template

MESSAGES = [{"role": "user", "content": "Hi" * 50}, {"role": "assistant", "content": "Yes."}]
HOSTILE = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = messages|string|replace('i', 'j') %}{% endfor %}",
    "{{ lipsum(n=100000) }}",
    "{{ messages|string|striptags }}",
    "{{ messages|string|urlize }}",
    "{{ range(10**9)|list }}",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10**13 }}",
    "{{ [1] * 10**10 }}",
    "{{ 10 ** 10 ** 8 }}",
    "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s|replace('', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.join(ns.s) %}"
    "{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.center(999999999) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a\nb'|indent(10**10) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "{% for a in messages recursive %}{{ loop([a, a]) }}{% endfor %}",
    "{{ messages[0].content[5].x.y }}",
    "{{ messages[99].role + 1 }}",
    "{{ (1).__class__.__mro__ }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now(5) }}",
    "{% include 'a' %}",
    "{{ messages|sort }}",
    "{{ messages|map('nothing')|list }}",
    "{{ range(99999)|map('string')|join(messages|string * 99) }}",
    "{% for i in range(99999) %}{{ messages|tojson }}{% endfor %}",
]
BROKEN = [
    *("{% break %}", "{% for %}", "{{ 1 +", "{% endif %}", "{{ x|nofilter }}", "{" * 5000),
    *("{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{% if a is nothing %}{% endif %}"),
]


def render(source: str) -> str | None:
    """The text, or None if the template was refused."""
    try:
        template = compile_template(source)
        return render_template(
            template,
            {"messages": MESSAGES, "tools": None, "strftime_now": lambda form: "today"},
        )
    except (PromptError, ConfigError) as error:
        line = str(error)
    assert line.count("\n") == 0
    assert len(line) < 500
    return None


@pytest.mark.parametrize("source", [*HOSTILE, *BROKEN])
def test_hostile_templates_end(source):
    start = time.process_time()
    text = render(source)
    assert text is None or len(text) < 11_000_000
    # a bound, not a speed: without it these would run for hours
    assert time.process_time() - start < 9


def test_200_templates_of_hostile_parts(monkeypatch):
    """Parts of templates in each other's loops, conditions and macros."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    chance = random.Random(1)
    refused = 0
    for _ in range(200):
        inner = "".join(chance.sample(HOSTILE, chance.randint(1, 3)))
        around = chance.choice(
            [
                "{}",
                "{{% for q in range({0}) %}}{{}}{{% endfor %}}",
                "{{% if messages %}}{{}}{{% endif %}}",
            ]
        ).replace("{0}", str(chance.choice([1, 3, 1000])))
        source = around.replace("{{}}", "{}").replace("{{%", "{%").replace("%}}", "%}")
        source = source.replace("{}", inner, 1)
        if chance.random() < 0.3:
            cut = chance.randrange(len(source))
            source = source[:cut] + source[cut + chance.randint(1, 4) :]
        refused += render(source) is None
    assert refused > 100


def test_what_chat_templates_need_is_there():
    source = (
        "{%- set ns = namespace(n=0) -%}"
        "{%- for m in messages if m.role != 'tool' -%}"
        "{%- if loop.first -%}<{%- endif -%}{{ loop.index }}/{{ loop.length }}{{ m.role|upper }}"
        "{%- set ns.n = ns.n + m.content|trim|length -%}"
        "{%- if loop.last -%}>{%- endif -%}{%- if ns.n > 1000 -%}{% break %}{%- endif -%}"
        "{%- endfor -%}{{ ns.n }}{{ {'a': [1, 'x']}|tojson }}{{ 'a' ~ 1 ~ none }}"
        "{{ messages|map(attribute='role')|join(', ') }}{{ strftime_now('%Y') }}"
        "{{ 'ab'.split('b')[0] }}{{ 'x'.strip().replace('x', 'y') }}{{ 7 % 4 }}{{ '%s!' % 'hi' }}"
        "{% for key, value in {'k': 'v'}.items() %}{{ key }}={{ value }}{% endfor %}"
        "{{ messages[::-1][0].content.startswith('Y') }}{{ range(3)|list }}"
    )
    assert render(source) == (
        '<1/2USER2/2ASSISTANT>104{"a": [1, "x"]}a1Noneuser, assistanttodayay3hi!k=vTrue[0, 1, 2]'
    )
