"""Streaming tokens as pieces of text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from serving import byte_tokenizer

from ptuning.data.encode import Template
from serve.engine.text import TextStream

TEMPLATE = Template.of(byte_tokenizer(), "chat")


def stream_text(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TEMPLATE.decode, stops)
    pieces = []
    for token in TEMPLATE.ids(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(st.text(max_size=40))
def test_the_pieces_of_any_text_are_whole_characters_and_add_up(text: str) -> None:
    pieces, _ = stream_text(text)
    assert "".join(pieces) == TEMPLATE.decode(TEMPLATE.ids(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    stream = TextStream(TEMPLATE.decode)
    first, *_ = TEMPLATE.ids("é")
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(
    text: str, stops: list[str]
) -> None:
    pieces, stream = stream_text(text, tuple(stops))
    shown = ""
    for end in range(len(text) + 1):  # a stop string counts as soon as it is complete
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            assert stream.stopped
            assert "".join(pieces) == text[: min(found)]
            return
        shown = text[:end]
    assert "".join(pieces) == shown
    assert not stream.stopped


def test_text_that_only_began_like_a_stop_string_is_sent_at_the_end() -> None:
    pieces, stream = stream_text("a STO", ("STOP",))
    assert pieces[-1] == "STO"
    assert not stream.stopped


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(TEMPLATE.decode)
    tokens = [*TEMPLATE.ids("a"), TEMPLATE.end_token_id, *TEMPLATE.ids("b")]
    assert "".join(map(stream.push, tokens)) + stream.finish() == "ab"
