"""Chat templates: programs of others, which run in a sandbox."""

import pytest

from paged_kv import ArgumentError
from paged_kv.text.chat_template import ChatTemplate

pytest.importorskip("jinja2")

HI = [{"role": "user", "content": "Hi"}]


def test_blocks_leave_no_white_space_as_in_transformers():
    source = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(HI) == "user: Hi\n"


def test_a_template_sees_tokens_and_variables():
    source = "{{ bos_token }}|{{ tools | tojson }}|{{ add_generation_prompt }}|{{ mood }}|{{ absent }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(HI, add_generation_prompt=False, mood="é<") == "<s>|null|False|é<|"
    assert template.render(HI, tools=[{"a": "<é>"}]) == '<s>|[{"a": "<é>"}]|True||'


def test_loops_can_be_left():
    source = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(HI * 3) == "Hi"


def test_the_date_is_there():
    assert len(ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}).render(HI)) == 11


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('one question only') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[5].content + 'x' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_an_error(source):
    with pytest.raises(ArgumentError, match="refuses the messages"):
        ChatTemplate(source, {}).render(HI)


def test_a_template_that_is_none_is_named():
    with pytest.raises(ArgumentError, match="cannot be parsed"):
        ChatTemplate("{% for %}", {})
