"""Chat templates come with a download: whatever they do, they end, small, in text or one error."""

import random
import resource
import sys
import time
from pathlib import Path

import pytest

from mlx_lfm2vl import ConfigError, PromptError
from mlx_lfm2vl.prompts import sandbox
from mlx_lfm2vl.prompts.template import compile_template, render_template

LINUX = sys.platform == "linux"  # elsewhere the memory of a process has no limit
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


def doubled(first: str, grown: str, use: str) -> str:
    """A value made of two of its predecessors, sixty times over, and what reads all of it."""
    step = grown if grown.startswith("{% set") else f"{{% set ns.x = {grown} %}}"
    return (
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
        f"{{% set ns = namespace(x={first}, y={first}) %}}"
        f"{{% for i in range(60) %}}{step}{{% set ns.y = ns.x %}}{{% endfor %}}{use}"
    )


HOSTILE += [
    *(
        doubled("[1]", "[ns.x, ns.y]", use)
        for use in (
            *("{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == [ns.y, ns.y] }}", "{{ '' ~ ns.x }}"),
            *("{{ [ns.x, ns.y]|sort }}", "{{ ns.x in [ns.y] }}", "{{ '%s' % [ns.x] }}"),
            *("{{ '{}'.format(ns.x) }}", "{{ [ns.x].index(ns.y) }}", "{{ ns.x is eq(ns.y) }}"),
        )
    ),
    doubled("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    doubled("(1,)", "ns.x + ns.x", "{{ {ns.x: 1} }}"),
    doubled("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    doubled("namespace()", "namespace(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    doubled("'ab'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}", "{{ ns.x }}"),
    doubled("'ab'", "twice(ns.x)", "{{ ns.x }}"),
    doubled("'ab'", "'{0}{0}'.format(ns.x)", "{{ ns.x }}"),
    doubled("'ab'", "[ns.x, ns.x]|join", "{{ ns.x }}"),
    doubled("((1,),)", "(ns.x,)", "{{ {ns.x: 1} }}") * 9,
    "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ m(60, 1) }}",
    "{% macro m() %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endmacro %}"
    "{{ m()|length }}",
    "{% macro m(b) %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endmacro %}"
    "{{ m('a' * 4000000) }}",
    *(
        "{% set a = 'a' * 3000000 %}{% for i in range(9999) %}" + use + "{% endfor %}"
        for use in (
            *("{{ a.strip('b' * 3000000 ~ 'a') }}", "{{ a|trim('b' * 3000000 ~ 'a') }}"),
            *("{{ a.rfind('b' ~ 'a' * 1000000) }}", "{% if 'b' in a %}{% endif %}"),
            *("{% set b = a.split('a') %}", "{{ a.translate({97: a}) }}", "{{ a|list|length }}"),
            *("{{ a.encode('punycode') }}", "{% set c = a[1:] %}", "{{ a|upper == a|lower }}"),
            *("{{ a|int(base=16) }}", "{{ a|tojson(indent=999) }}", "{{ a.expandtabs(999999) }}"),
        )
    ),
    "{{ ('ü' * 3000000).encode('idna') }}",
    "{{ 1.5|round(10000000, 'floor') }}",
    "{{ 2|round(100000000, 'ceil') }}",
    "{{ (7).to_bytes(10**10, 'big') }}",
    "{{ [[1] * 1000] * 1000 * 1000 }}",
    "{{ ([[1] * 1000] * 9999)|sum(start=[]) }}",
    "{{ [1]|tojson(indent=10**10) }}",
    "{{ ([1] * 99999)|tojson(separators=('a' * 99999, 'b')) }}",
    "{{ {}.fromkeys(range(99999), 'a' * 99999)|tojson }}",
    "{{ 'a' }}" * 200_000,
    "{% if a %}b{% endif %}" * 100_000,
    "{% if 'a' * 8000000 == 'a' * 7999999 ~ 'a' %}{% endif %}" * 200,
    "{% for a in [[1]] recursive %}{% for b in range(99999) %}{% endfor %}{{ loop([a]) }}"
    "{{ loop([a]) }}{% endfor %}",
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
    assert "MemoryError" not in line, source
    assert len(line) < 500
    return None


def test_hostile_templates_end(monkeypatch):
    """Within the memory of the test, too: what goes over the bounds is never made."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(sandbox, "SECONDS", 0.02)
    if LINUX:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (3 << 29)
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        for source in [*HOSTILE, *BROKEN]:
            start = time.process_time()
            text = render(source)
            assert text is None or len(text) <= sandbox.MOST_CHARACTERS, source
            # a bound, not a speed: without it these would run for hours
            assert time.process_time() - start < 9, source
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_templates_of_hostile_parts(count, monkeypatch):
    """Parts of templates in each other's loops, conditions and macros."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.02)
    chance = random.Random(1)
    refused = 0
    for _ in range(count):
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
    assert refused > count / 2


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
