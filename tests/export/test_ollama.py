"""Ollama's Modelfile: what its template writes is what the chat template writes."""

from __future__ import annotations

import re

import pytest

from lorafit.data.template import built_in, read_template
from lorafit.errors import DataError, ModelError
from lorafit.export import go_template, modelfile
from lorafit.export.turns import rendered
from tests import tiny
from tests.data.test_families import FAMILIES, Family

SYSTEM_IN_THE_LAST_QUESTION = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set ms = messages[1:] %}{% else %}"
    "{% set s = '' %}{% set ms = messages %}{% endif %}{% for m in ms %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and s %}{{ s + '\n\n' }}{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_IN_THE_FIRST_QUESTION = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set ms = messages[1:] %}{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}{% for m in ms %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ s if loop.first else '' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Text that means something to Go or in a Modelfile, or that a Modelfile would drop.
ODD = (
    '{% for m in messages %}{{ \'{{ \u00a0"""\' }}{{ m.role }}\u200d\U0001f600{-\n{{ m.content }}<|im_end|>{% endfor %}'
    "{a\n"
)
TEMPLATES = {
    **{name: family for name, family in FAMILIES.items() if name != "generation tags"},
    **{name: Family(read_template(name), "<|im_end|>", ()) for name in built_in()},
    "system in the last question": Family(SYSTEM_IN_THE_LAST_QUESTION, "</s>", ("[INST]", "[/INST]")),
    "system in the first question": Family(SYSTEM_IN_THE_FIRST_QUESTION, "<end_of_turn>", ("<bos>",), "<bos>"),
    "a system message of its own": Family(DEFAULT_SYSTEM, "<|im_end|>", ()),
    "odd texts": Family(ODD, "<|im_end|>", ()),
}


def tokenizer_of(family: Family):
    tokenizer = tiny.tokenizer(family.template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, family.eos]})
    tokenizer.eos_token = family.eos
    if family.bos:
        tokenizer.bos_token = family.bos
    return tokenizer


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_written_as_the_chat_template_does(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    made = modelfile.template_of(tokenizer)
    compared = 0
    for messages in (
        talk("Hello?"),
        talk("One", "two }} {{ .Role }}", "three\n\nfour", "five", "six"),
        talk("Hello?", system='Speak "Dutch".\nBriefly.'),
        talk("a", "b", "c", "d", "e", system="S"),
    ):
        try:
            expected = rendered(tokenizer, [dict(message) for message in messages])
        except DataError:
            assert not made.takes_system
            continue
        assert go_template.evaluate(made.text, messages) == expected
        compared += 1
    assert compared >= 2


def test_a_template_that_counts_is_refused():
    with pytest.raises(ModelError, match=r"cannot be said in Ollama's .* writes a second question otherwise\. Export"):
        modelfile.template_of(tokenizer_of(FAMILIES["generation tags"]))
    with pytest.raises(ModelError, match="moves the message of the user"):
        modelfile.template_of(tiny.tokenizer("{{ messages[-1].content }}{{ messages[0].content | upper }}"))


def test_a_model_without_a_chat_template_is_given_the_bare_prompt():
    made = modelfile.template_of(tiny.tokenizer(None))
    assert made.text == "{{ .Prompt }}" and "no chat template" in made.notes[0] and not made.takes_system


def test_what_the_language_cannot_say_is_told():
    notes = {name: " ".join(modelfile.template_of(tokenizer_of(TEMPLATES[name])).notes) for name in TEMPLATES}
    assert "trims messages" in notes["llama 3"] and "trims" not in notes["chatml"]
    assert "drops the reasoning" in notes["qwen 3"] and "reasoning" not in notes["chatml"]
    assert "date of the day" in notes["dated"]
    assert "no place for system messages" in notes["mistral"]
    assert "at the beginning of a conversation alone" in notes["system in the last question"]
    assert notes["chatml"] == ""


PLAIN = [*talk("a", "b", "c"), {"role": "user", "content": "d"}]
WITH_SYSTEM = talk("a", "b", system="s")
# What Go 1.19's text/template gives for these, run by hand.
BY_GO = [
    ("{{ range .Messages }}{{ .Role }}: {{ .Content }};{{ end }}", PLAIN, "user: a;assistant: b;user: c\n\nd;"),
    ("x \n{{- range .Messages }}\n {{- .Content }} {{ end -}} \n y", PLAIN, "xa b c\n\nd y"),
    (
        '{{ $l := "" }}{{ range .Messages }}{{ if eq $l "" }}<{{ else if ne $l "user" }}+{{ else }}-{{ end }}'
        "{{ $l = .Role }}{{ end }}",
        PLAIN,
        "<-+",
    ),
    (
        "{{ range $i, $_ := .Messages }}{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}{{ end }}"
        "{{ $i }}{{ end }}",
        WITH_SYSTEM,
        "01s2",
    ),
    (r'{{ "a\"\\\n\u00e9\U0001f600" }}{{ if .System }}!{{ end }}', WITH_SYSTEM, 'a"\\\n\u00e9\U0001f600!'),
]


@pytest.mark.parametrize(("template", "messages", "expected"), BY_GO)
def test_templates_are_evaluated_as_go_does(template, messages, expected):
    assert go_template.evaluate(template, messages) == expected


def test_other_syntax_is_refused():
    for template in ("{{ with .Messages }}{{ end }}", "{{ if .System }}", "{{ end }}", "{{ range .Messages }}"):
        with pytest.raises((ModelError, KeyError)):
            go_template.evaluate(template, talk("a"))


def commands(text: str) -> list[tuple[str, str]]:
    """As Ollama's parser reads a Modelfile: a word, then a value in three quotes, in one, or to the end of the line."""
    found = []
    while text.strip():
        word, text = text.lstrip("\n").split(" ", 1)
        if word == "PARAMETER":
            name, text = text.split(" ", 1)
            word += f" {name}"
        value = re.match(r'"""(.*?)"""\n|"([^"]*)"\n|(.*?)\n', text, re.DOTALL)
        assert value is not None
        found.append((word, next(group for group in value.groups() if group is not None)))
        text = text[value.end() :]
    return found


def test_a_modelfile_holds_template_stops_and_parameters():
    template = modelfile.template_of(tiny.tokenizer()).text
    text = modelfile.Modelfile("m.gguf", template, ["<|im_end|>", "\n\n"], 512, 'Be "brief".\n', "mit").render()
    assert commands(text) == [
        ("FROM", "./m.gguf"),
        ("TEMPLATE", template),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", "\n\n"),
        ("PARAMETER num_ctx", "512"),
        ("PARAMETER temperature", "0"),
        ("PARAMETER repeat_penalty", "1"),
        ("SYSTEM", 'Be "brief".\n'),
        ("LICENSE", "mit"),
    ]
    assert modelfile.stops_of(tokenizer_of(FAMILIES["llama 3"])) == ["<|eot_id|>"]
    assert modelfile.dropped('a\n é 😀 "" b') == []
    assert modelfile.dropped('a\u200d "" \u00a0 """') == ["U+00A0", "U+200D", '"""']
