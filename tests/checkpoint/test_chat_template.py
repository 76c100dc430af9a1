"""Chat templates: the prompts that transformers makes of them, and programs that end whatever they try."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fewer.checkpoint.chat_template import MAX_SOURCE, ChatTemplate
from fewer.errors import CheckpointError, FewerError, UsageError
from tests.tiny_model import CHATML

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello,\n  <b>world</b> & {{ 7 * 7 }}"},
    {"role": "assistant", "content": "Hi! 'quoted' \"twice\" ünïcode"},
    {"role": "user", "content": "  trim me  "},
]
LLAMA3 = """{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""  # noqa: E501
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + (first if loop.first else '') }}
{{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""  # noqa: E501
FEATURES = """{% macro say(role, text) %}[{{ role|upper }}] {{ text }}{% endmacro %}
{%- set seen = namespace(users=0, text='') %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}{% endif %}
{%- if loop.index > 2 %}{% continue %}{% endif %}
{%- set seen.text = seen.text ~ message.content[:5] ~ '|' %}
{{ say(message.role, message.content) }}
{%- endfor %}
{{ seen.users }} {{ seen.text }} {{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}
{{ messages | map(attribute='role') | join(',') }} {{ 'a,b'.split(',')[-1] }} {{ messages[::-1][0].content.strip() }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ range(3) | list }} {{ none is none }}
{% generation %}{{ dict(a=1) }}{% endgeneration %}"""


@pytest.mark.parametrize("source", [CHATML, LLAMA3, GEMMA, FEATURES], ids=["chatml", "llama3", "gemma", "features"])
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_equal_those_of_transformers(source: str, prompt: bool) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=prompt, **names)
    assert ChatTemplate(source).render(MESSAGES, prompt, names) == expected[0]


def test_a_template_that_refuses_the_messages_is_a_wrong_request() -> None:
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        ChatTemplate(GEMMA).render([MESSAGES[2]], names={"bos_token": ""})


def test_what_a_message_says_is_never_run() -> None:
    text = "{{ 7 * 7 }}{% for x in y %}"
    assert ChatTemplate("{{ messages[0].content }}").render([{"role": "user", "content": text}]) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '%s'.__mod__ }}",
        "{{ messages | attr('__class__') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_nothing_outside_the_sandbox_is_reached(source: str) -> None:
    try:
        shown = ChatTemplate(source).render(MESSAGES)
    except CheckpointError as fault:
        assert str(fault).count("\n") == 0
    else:  # an undefined name may print as nothing
        assert shown == ""


HUNGRY = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for a in range(10**12) %}{% endfor %}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "doubling by tilde": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "nested lists": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}",
    "multiplying text": "{{ 'a' * 10**10 }}",
    "multiplying lists": "{{ ([0] * 10**10) | length }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "centring": "{{ 'a' | center(10**10) }}",
    "formatting": "{{ '%1000000000d' % 1 }}",
    "star width": "{{ '%*d' % (10**9, 1) }}",
    "a power": "{{ 10**(10**8) }}",
    "joining": "{{ range(99999) | join('x' * 99999) }}",
    "replacing": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "indenting": "{{ ('a\n' * 99999) | indent(10**6) }}",
    "json": "{{ messages | tojson(indent=10**9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wordwrap": "{{ 'a b' | wordwrap(10**9) }}",
    "slices": "{{ [1] | batch(10**9, 0) | list }}",
    "much output": "{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "much output of a macro": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 5000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "much output in a block": "{% set s %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}",
    "a deep expression": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "a long source": "x" * (MAX_SOURCE + 1),
}


@pytest.mark.parametrize("source", HUNGRY.values(), ids=HUNGRY)
def test_a_hungry_template_ends_soon_and_small(source: str) -> None:
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(CheckpointError) as fault:
            ChatTemplate(source).render(MESSAGES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 10 and peak < 100e6
    assert "chat template" in str(fault.value) and "\n" not in str(fault.value)


def test_long_messages_are_allowed_their_own_length() -> None:
    long = "word " * 200_000  # a megabyte
    assert long in ChatTemplate(CHATML).render([{"role": "user", "content": long}])


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% endif %}", "{{", "{% bogus %}"])
def test_a_mistake_in_a_template_is_one_sentence(source: str) -> None:
    with pytest.raises(FewerError, match="^the chat template"):
        ChatTemplate(source).render(MESSAGES)
