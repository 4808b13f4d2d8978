"""Text to tokens: what is supervised, what may be cut, and how templates behave."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import make_tokenizer
from tokenizers import processors

from ptuning.data.encode import IGNORE, Encoded, Template
from ptuning.errors import DataError, TemplateError
from ptuning.types import Example, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML
DATED_OTHERWISE = DATED.replace("strftime_now('%d %b %Y')", "date_string")
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)


def chat_tokenizer(template: str = CHATML) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat_template(template: str = CHATML) -> Template:
    return Template.of(chat_tokenizer(template))


def plain_template() -> Template:
    return Template.of(make_tokenizer())


def supervised_ids(row: Encoded) -> list[int]:
    return [label for label in row.labels if label != IGNORE]


def make_turns(*contents: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple(Message(role=roles[n % 2], content=text) for n, text in enumerate(contents))


def decode_all(template: Template, ids: list[int]) -> str:
    return template.tokenizer.decode(ids, skip_special_tokens=False)


def test_auto_is_chat_where_the_tokenizer_has_a_template_else_plain() -> None:
    assert chat_template().kind == "chat"
    assert plain_template().kind == "plain"
    assert Template.of(chat_tokenizer(), "plain").kind == "plain"
    with pytest.raises(TemplateError):
        Template.of(make_tokenizer(), "chat")


def test_a_chat_prompt_is_one_user_turn_with_the_generation_prompt() -> None:
    row = chat_template().encode(Example(prompt="hello there", completion="how are you"))
    assert decode_all(chat_template(), row.input_ids) == (
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nhow are you<|im_end|>"
    )


def test_a_plain_prompt_is_its_text_after_a_beginning_token() -> None:
    row = plain_template().encode(Example(prompt="hello there", completion=" how are you"))
    assert decode_all(plain_template(), row.input_ids) == "<s>hello there how are you</s>"
    assert row.input_ids[0] == plain_template().tokenizer.bos_token_id
    assert row.input_ids.count(plain_template().tokenizer.bos_token_id) == 1


def test_no_beginning_token_where_the_tokenizer_adds_none() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    template = Template.of(tokenizer)
    row = template.encode(Example(prompt="hello", completion=" you"))
    assert decode_all(template, row.input_ids) == "hello you</s>"
    assert template.digest != plain_template().digest


@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_only_the_completion_and_its_end_are_supervised(template: Template) -> None:
    row = template.encode(Example(prompt="hello there", completion="how are you today"))
    answer = [*template.ids("how are you today"), template.end_token_id]
    assert len(row.input_ids) == len(row.labels)
    assert supervised_ids(row) == answer
    assert row.supervised == len(answer)
    assert row.input_ids[-len(answer) :] == answer == row.labels[-len(answer) :]
    assert set(row.labels[: -len(answer)]) == {IGNORE}


def test_the_end_token_is_the_end_of_turn_in_chat_and_of_text_in_plain() -> None:
    assert decode_all(chat_template(), [chat_template().end_token_id]) == "<|im_end|>"
    assert plain_template().end_token_id == plain_template().tokenizer.eos_token_id
    # A template that ends turns with no special token falls back to the end of text.
    bare = chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert bare.end_token_id == bare.tokenizer.eos_token_id


def test_a_tokenizer_without_any_end_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="end"):
        Template.of(tokenizer).encode(Example(prompt="a", completion="b"))


@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_the_completion_is_tokenised_apart_from_the_prompt(template: Template) -> None:
    """ "hel" + "lo" must not become the single token "hello"."""
    joint = template.encode(Example(prompt="hello", completion="x")).input_ids
    apart = template.encode(Example(prompt="hel", completion="lo"))
    assert supervised_ids(apart)[:-1] == template.ids("lo")
    assert len(template.ids("hel") + template.ids("lo")) > len(template.ids("hello"))
    assert apart.input_ids != joint


def test_special_token_text_in_a_completion_does_not_add_special_tokens_of_ours() -> None:
    row = plain_template().encode(Example(prompt="a", completion="b"))
    assert row.input_ids.count(plain_template().tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    "template", [chat_template(), chat_template(SYSTEM), chat_template(TRIMMING)]
)
def test_cutting_removes_the_oldest_prompt_tokens_and_nothing_else(template: Template) -> None:
    text, completion = "".join(f"{n} " for n in range(60)).strip(), "how are you"
    example = Example(prompt=text, completion=completion)
    full = template.encode(example, 10_000)
    shortest = len(full.input_ids) - len(template.ids(text))
    for length in (len(full.input_ids), len(full.input_ids) - 1, shortest + 17, shortest):
        row = template.encode(example, length)
        assert len(row.input_ids) == length
        assert supervised_ids(row) == supervised_ids(full)
        start, end = decode_all(template, full.input_ids).split(text)
        written = decode_all(template, row.input_ids)
        assert written.startswith(start)
        assert written.endswith(end)
        assert text.endswith(written[len(start) : len(written) - len(end)])
    with pytest.raises(DataError):
        template.encode(example, shortest - 1)


def test_cutting_a_plain_prompt_keeps_the_beginning_token() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    full = plain_template().encode(Example(prompt=text, completion=" yes"))
    row = plain_template().encode(Example(prompt=text, completion=" yes"), len(full.input_ids) - 4)
    assert row.input_ids == [full.input_ids[0], *full.input_ids[5:]]
    assert row.labels == [full.labels[0], *full.labels[5:]]


def test_messages_are_rendered_up_to_the_last_answer() -> None:
    example = Example(messages=make_turns("hi", "hello", "how are you?", "fine"))
    row = chat_template().encode(example)
    assert decode_all(chat_template(), row.input_ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nhow are you?<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>"
    )
    assert supervised_ids(row) == [*chat_template().ids("fine"), chat_template().end_token_id]


def test_a_template_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TemplateError, match="auto, chat, plain"):
        Template.of(make_tokenizer(), "alpaca")  # type: ignore[arg-type]


def test_messages_without_a_chat_template_are_one_line_each() -> None:
    row = plain_template().encode(
        Example(messages=make_turns("hi", "hello", "how are you?", "fine"))
    )
    expected = "<s>user: hi\nassistant: hello\nuser: how are you?\nassistant:fine</s>"
    assert decode_all(plain_template(), row.input_ids) == expected


def test_a_prompt_and_the_same_text_as_messages_are_the_same_row() -> None:
    assert chat_template().encode(Example(prompt="hi", completion="yes")) == chat_template().encode(
        Example(messages=make_turns("hi", "yes"))
    )


def test_cutting_a_conversation_takes_the_oldest_turns_text_first() -> None:
    example = Example(messages=make_turns("a a a a a a", "b b b b", "c c c c", "end"))
    full = chat_template().encode(example)
    row = chat_template().encode(
        example, len(full.input_ids) - len(chat_template().ids("a a a a a a")) - 2
    )
    written = decode_all(chat_template(), row.input_ids)
    assert "a a" not in written
    assert "c c c c" in written
    assert written.count("<|im_start|>") == 4, "tokens of the template must not be cut"
    assert written.endswith("<|im_start|>assistant\nend<|im_end|>")
    assert "b" in written
    assert "b b b b" not in written


def test_a_completion_that_does_not_fit_is_an_error() -> None:
    for template in (chat_template(), plain_template()):
        with pytest.raises(DataError, match="maximum length"):
            template.encode(Example(prompt="hi", completion="word " * 100), 50)


def test_a_completion_that_just_fits_costs_the_whole_prompt() -> None:
    row = plain_template().encode(Example(prompt="hello there", completion=" you"), 3)
    assert decode_all(plain_template(), row.input_ids) == "<s> you</s>"


@pytest.mark.parametrize("example", [Example(prompt="a", completion=""), Example(prompt="a")])
def test_a_row_without_anything_to_learn_is_an_error(example: Example) -> None:
    with pytest.raises(DataError):
        plain_template().encode(example)


@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_an_empty_prompt_is_a_prompt(template: Template) -> None:
    row = template.encode(Example(prompt="", completion="yes"))
    assert supervised_ids(row) == [*template.ids("yes"), template.end_token_id]
    assert len(row.input_ids) > len(supervised_ids(row))


def test_a_template_that_trims_still_knows_which_tokens_may_go() -> None:
    template = chat_template(TRIMMING)
    text = "  the quick brown fox jumps over the lazy dog \n"
    full = template.encode(Example(prompt=text, completion="yes"))
    row = template.encode(Example(prompt=text, completion="yes"), len(full.input_ids) - 5)
    assert decode_all(template, row.input_ids).startswith("<|im_start|>user\n")
    assert decode_all(template, row.input_ids).endswith(
        "dog<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert "the quick" not in decode_all(template, row.input_ids)


def test_a_template_that_rewrites_texts_is_used_but_never_cut() -> None:
    template = chat_template(CHATML.replace("m.content", "m.content | upper"))
    full = template.encode(Example(prompt="hello there", completion="yes"))
    assert "HELLO THERE" in decode_all(template, full.input_ids)
    with pytest.raises(DataError):
        template.encode(Example(prompt="hello there", completion="yes"), len(full.input_ids) - 1)


def test_template_tokens_that_contain_a_texts_first_letters_are_not_cut() -> None:
    """ "user: " and "the" share the token " the": cutting the text would cut the template."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    for trim in (True, False):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        template = Template.of(tokenizer)
        full = template.encode(Example(prompt="the lazy dog, how are you", completion="yes"))
        row = template.encode(
            Example(prompt="the lazy dog, how are you", completion="yes"), len(full.input_ids) - 3
        )
        assert decode_all(template, row.input_ids).startswith("user: "), trim


@pytest.mark.parametrize("source", [DATED, DATED_OTHERWISE], ids=["strftime_now", "date_string"])
def test_the_day_changes_no_token(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = chat_template(source).encode(Example(prompt="hi", completion="yes"))
    day = "01 Jan 2025" if source is DATED else "1 January 2025"
    assert decode_all(chat_template(source), first.input_ids).startswith(
        f"<|im_start|>system\nToday is {day}.<|im_end|>\n<|im_start|>user\nhi"
    )
    real = time.strftime
    monkeypatch.setattr(time, "strftime", lambda fmt, *a: real(fmt, time.gmtime(4e9)))
    assert chat_template(source).encode(Example(prompt="hi", completion="yes")) == first
    assert chat_template(source).digest == chat_template(source).digest


def test_a_fixed_day_changes_nothing_else_of_a_template() -> None:
    """Including line breaks at the beginning of a template."""
    begun = "\n\n{{ '' if strftime_now is defined else 'no dates' }}" + CHATML
    written = decode_all(
        chat_template(begun),
        chat_template(begun).encode(Example(prompt="hi", completion="y")).input_ids,
    )
    assert written.startswith("\n\n<|im_start|>user\nhi<|im_end|>")


def test_a_template_that_refuses_the_roles_is_an_error_that_says_which() -> None:
    template = chat_template(STRICT)
    template.encode(Example(prompt="hi", completion="yes"))
    wrong = (Message(role="assistant", content="a"), Message(role="assistant", content="b"))
    with pytest.raises(TemplateError, match="roles must alternate") as caught:
        template.encode(Example(messages=wrong))
    assert "assistant" in str(caught.value.seen)
    assert isinstance(caught.value, DataError), "such a row can be quarantined"


def test_whatever_changes_the_tokens_changes_the_digest() -> None:
    digests = [
        chat_template().digest,
        chat_template(TRIMMING).digest,
        plain_template().digest,
        Template.of(chat_tokenizer(), "plain").digest,
    ]
    other_end = make_tokenizer()
    other_end.eos_token = "<pad>"
    digests.append(Template.of(other_end).digest)
    more_tokens = make_tokenizer()
    more_tokens.add_tokens(["quick brown"])
    digests.append(Template.of(more_tokens).digest)
    assert len(set(digests)) == len(digests)
    assert chat_template().digest == chat_template().digest


def test_the_digest_is_that_of_the_files_whatever_was_encoded_before() -> None:
    """Padding and truncation that a caller enables are part of the fast tokenizer's state."""
    used = plain_template()
    used.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert used.digest == plain_template().digest


def test_a_callers_padding_and_truncation_change_no_ids() -> None:
    template = plain_template()
    expected = template.encode(Example(prompt="hello there", completion=" yes"))
    template.tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=3)
    assert template.encode(Example(prompt="hello there", completion=" yes")) == expected


UNICODE = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "\u202eright to left",
    "a\u0301 é",
    "\x00\x07",
    "line\r\nline\ttab",
]


@pytest.mark.parametrize("text", UNICODE)
@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_any_unicode_comes_back_from_its_tokens(template: Template, text: str) -> None:
    row = template.encode(Example(prompt=text, completion=text))
    assert template.decode(supervised_ids(row)) == text
    assert decode_all(template, row.input_ids).count(text) == 2


@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_half_a_surrogate_pair_is_an_error_of_the_row(template: Template) -> None:
    for example in (
        Example(prompt="\ud83d", completion="x"),
        Example(prompt="x", completion="\ud83d"),
        Example(messages=(Message(role="user", content="\ud83d"), *make_turns("", "x")[1:])),
    ):
        with pytest.raises(DataError, match="Unicode"):
            template.encode(example)


@given(
    prompt=st.text(max_size=60), completion=st.text(min_size=1, max_size=20), cut=st.integers(0, 80)
)
@pytest.mark.parametrize("template", [chat_template(), plain_template()], ids=["chat", "plain"])
def test_a_cut_row_keeps_its_answer_and_a_subsequence_of_the_whole(
    template: Template, prompt: str, completion: str, cut: int
) -> None:
    example = Example(prompt=prompt, completion=completion)
    full = template.encode(example, 10_000)
    try:
        row = template.encode(example, max(1, len(full.input_ids) - cut))
    except DataError:
        return
    assert len(row.input_ids) == max(1, len(full.input_ids) - cut)
    assert supervised_ids(row) == supervised_ids(full)
    rest = iter(full.input_ids)
    assert all(token in rest for token in row.input_ids), "tokens were added or reordered"
    start = template.encode_prompt("", 10_000)
    kept = row.input_ids[: len(row.input_ids) - len(supervised_ids(row))]
    assert len(kept) >= len(start) if template.kind == "chat" else kept[0] == start[0]


def test_a_prompt_alone_is_the_beginning_of_its_training_row() -> None:
    """The service encodes a request like a training row's prompt."""
    for template in (chat_template(), plain_template()):
        row = template.encode(Example(prompt="hello there", completion="yes"))
        asked = template.encode_prompt("hello there")
        assert row.input_ids[: len(asked)] == asked
        assert supervised_ids(row) == row.input_ids[len(asked) :]


@pytest.mark.parametrize(
    ("make", "digest"),
    [
        (plain_template, "81122ab80585ae55e0ff89b6d05e13501ddaddbc043914983aa9449cba17a1bd"),
        (chat_template, "00b436a85b2d6dfe8480cf865549c92961aabc031d736c0c95427352884ac2a4"),
    ],
    ids=["plain", "chat"],
)
def test_the_digest_of_a_known_template_never_changes_by_itself(
    make: Callable[[], Template], digest: str
) -> None:
    """Every stored prefix contains it, and a change makes all prefixes unusable. If a new release
    of a library changes these, find out what it does differently before you write new values."""
    assert make().digest == digest


def test_a_new_field_in_the_tokenizers_file_does_not_change_the_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, serialised = plain_template(), plain_template().tokenizer.backend_tokenizer.to_str()
    newer = json.loads(serialised) | {"version": "9.9", "a_new_field": False}

    class Newer:
        def to_str(self) -> str:
            return json.dumps(newer)

    class Wrapped(type(template.tokenizer)):  # type: ignore[misc]
        backend_tokenizer = Newer()

    same = copy.copy(template.tokenizer)
    same.__class__ = Wrapped
    assert Template.of(same, "plain").digest == template.digest


PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p['text'] }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_chat_template(text: object) -> Any:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.chat_template = text
    return tokenizer


def test_a_template_that_expects_content_parts_gets_them() -> None:
    """Given a string, such a template loops over its letters and renders nothing."""
    template = Template.of(with_chat_template(PARTS))
    ids = template.encode_prompt("What is the capital of France?")
    assert "capital of France" in template.tokenizer.decode(ids)
    assert ids != template.encode_prompt("Sing!")
    long = template.encode_prompt("old " * 50 + "new", 30)
    assert len(long) == 30
    assert template.tokenizer.decode(long).endswith("new</s><|assistant|>")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", "leaves out"),
        ("{{ raise_exception('no tools given') }}", "no tools given"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ({"rag": "{{ messages }}", "tool_use": "{{ messages }}"}, "chosen"),
    ],
    ids=["drops the text", "needs tools", "broken", "none is the default"],
)
def test_a_chat_template_that_cannot_show_a_message_is_refused(template: object, says: str) -> None:
    with pytest.raises(TemplateError, match=says) as caught:
        Template.of(with_chat_template(template))
    assert "plain" in str(caught.value.fix)


def test_a_token_without_an_embedding_is_refused_in_prompts_and_completions() -> None:
    tokenizer = copy.deepcopy(make_tokenizer())
    known = len(tokenizer)
    tokenizer.add_tokens(["<ann>"])
    template = Template.of(tokenizer, "plain", vocab_size=known)
    assert template.exceeds_vocabulary
    for row in (
        Example(prompt="hi <ann>", completion="ok"),
        Example(prompt="hi", completion="<ann>"),
    ):
        with pytest.raises(DataError, match="embedding") as caught:
            template.encode(row)
        assert "<ann>" in str(caught.value.seen)
    assert template.encode(Example(prompt="hi", completion="ok"))
    assert not Template.of(tokenizer, "plain", vocab_size=len(tokenizer)).exceeds_vocabulary
