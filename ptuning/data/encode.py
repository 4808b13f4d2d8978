"""Text to tokens: the only place where a row becomes input ids and labels.

Training and serving both use it, so a request is encoded exactly like a training row's prompt. The
prompt and the completion are tokenised separately, so no token spans the boundary, at the cost of
a few more tokens than joint tokenisation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from ptuning.errors import DataError, TemplateError
from ptuning.types import Example, Message

IGNORE = -100  # label of an unsupervised position, as in torch.nn.functional.cross_entropy
TemplateKind = Literal["auto", "chat", "plain"]

# Texts whose ids are part of a tokenizer's digest. Together they exercise the special cases of
# normalizers and pre-tokenizers.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two leading blanks, two trailing  ",
    "tab\tline\nbreak\r\nblank line\n\n\nend",
    "I'm you're he'll we've they'd it's DON'T O'Neil",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 +8 1e-5 0x1F ½ ²",
    "UPPER lower CamelCase snake_case kebab-case dotted.name",
    "café cafe\u0301 ﬁ Å A\u030a ẞ ß İ ı",
    "日本語のテキスト 中文字符 한국어 텍스트",
    "русский ελληνικά עברית العربية हिन्दी ไทย",
    "👍 👩‍👩‍👧‍👦 🇩🇪 🏽 ☕️",
    "def f(x):\n    return x ** 2  # comment",
    '{"key": [1, 2.5, null], "s": "a\\n"}',
    "https://example.org/a?b=c&d=%20#e user@example.org @name #tag",
    "(a) [b] {c} <d> «e» “f” ‘g’ … – — ! ? ; : / \\ | ~ ^ ` $ % & * + =",
    "zero\u200bwidth no\u00a0break soft\u00adhyphen \ufeffmark",
    "<s> </s> <pad> <unk> <|endoftext|> <|im_start|> [CLS] [SEP] [MASK]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)

# Private-use characters that no chat template contains: they mark the position of a message's
# content in the rendered text.
_MARK = "\ue0a7{}\ue0a8"

# strftime's results on 1 January 2025, the fixed date for which every chat template is rendered.
_DAY = {
    "%A": "Wednesday",
    "%B": "January",
    "%H": "00",
    "%M": "00",
    "%S": "00",
    "%Y": "2025",
    "%a": "Wed",
    "%b": "Jan",
    "%d": "01",
    "%-d": "1",
    "%j": "001",
    "%m": "01",
    "%y": "25",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, and its labels, -100 where unsupervised. Both have length T."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return sum(label != IGNORE for label in self.labels)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first supervised one; all, if there is none."""
        return next(
            (at for at, label in enumerate(self.labels) if label != IGNORE), len(self.labels)
        )


@dataclass(frozen=True)
class Template:
    """A tokenizer with the format of its prompts (`chat` or `plain`).

    `encoder_decoder`: prompt and completion are separate texts, and the prompt gets the special
    tokens that the tokenizer adds to a text. `vocab_size`: the number of token ids that the model
    has embeddings for (None: unknown); a tokenizer may have more. `parts`: the chat template takes
    a message's content as a list of parts, not as text.
    """

    tokenizer: Any
    kind: Literal["chat", "plain"]
    encoder_decoder: bool = False
    vocab_size: int | None = None
    parts: bool = False

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        kind: TemplateKind = "auto",
        *,
        encoder_decoder: bool = False,
        vocab_size: int | None = None,
    ) -> Template:
        """Make a template; `auto` is `chat` if the tokenizer has a chat template, else `plain`.
        Raises TemplateError if the chat template cannot be used, or would drop what users say."""
        if kind not in get_args(TemplateKind):
            raise TemplateError(
                "data.template has no such value",
                seen=repr(kind),
                expected=", ".join(get_args(TemplateKind)),
                fix="leave data.template at auto",
            )
        has_chat = bool(getattr(tokenizer, "chat_template", None))
        if kind == "chat" and not has_chat:
            raise TemplateError(
                "data.template is 'chat' but the tokenizer has no chat template",
                fix="set data.template to 'plain' or 'auto'",
            )
        resolved: Literal["chat", "plain"] = "chat" if has_chat and kind != "plain" else "plain"
        template = cls(tokenizer, resolved, encoder_decoder, vocab_size)
        return template._choose_parts() if resolved == "chat" else template

    def _choose_parts(self) -> Template:
        """This template, or the same with `parts`: whichever renders messages.

        A chat template that expects parts would iterate over the characters of a text and silently
        render nothing, so every prompt would be the same.
        """
        mark = _MARK.format(0)
        for template in (self, replace(self, parts=True)):
            try:
                rendered = template._render([{"role": "user", "content": mark}], generation=True)
            except TemplateError:
                if template.parts:
                    raise
                continue
            if mark in rendered:
                return template
        raise TemplateError(
            "the chat template leaves out what a user says",
            seen=f"{mark!r} as a user's message is not in {rendered[:200]!r}",
            expected="a chat template that renders a message's content, as text or as parts",
            fix="fix the model's chat template, or set data.template to 'plain'",
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines how text becomes tokens.

        It covers what the tokenizer does (its vocabulary, merges or scores, and the ids of test
        texts), not how the `tokenizers` package serialises it: if a release adds a field to that
        file, users' prefixes must stay valid.
        """
        parts = {
            "kind": self.kind,
            "chat_template": self._fixed_date_template if self.kind == "chat" else None,
            "parts": self.parts,
            "begin": self._begin,
            "after_prompt": self._tail,
            "end": self.end_token_id,
            "vocabulary": self.tokenizer.get_vocab(),
            "pieces": _pieces(self.tokenizer),
            "probes": [
                self.tokenizer(text, add_special_tokens=False).input_ids for text in _PROBES
            ],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()

    @cached_property
    def end_token_id(self) -> int:
        """The token that ends a completion: end of turn (chat) or end of text (plain)."""
        token: int | None = self.tokenizer.eos_token_id
        if self.kind == "chat":
            mark = _MARK.format(0)
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
            tail = self._render(turns, generation=False).partition(mark)[2]
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            token = next((i for i in self.ids(tail) if i in special), token)
        if token is None:
            raise TemplateError(
                "the tokenizer has no end-of-text token, so a completion cannot end",
                fix="set the tokenizer's eos_token",
            )
        return int(token)

    @cached_property
    def _begin(self) -> list[int]:
        if self.kind == "chat":
            return []  # a chat template includes the first token
        if self.encoder_decoder:
            return self._special_tokens[0]
        begin = self.tokenizer.bos_token_id
        adds_one = self.tokenizer("x")["input_ids"][:1] == [begin]
        return [begin] if begin is not None and adds_one else []

    @cached_property
    def _tail(self) -> list[int]:
        """The special tokens at the end of an encoder's prompt."""
        return self._special_tokens[1] if self.encoder_decoder and self.kind == "plain" else []

    @cached_property
    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text."""
        text = self.ids("x")
        ids = list(self.tokenizer("x")["input_ids"])
        at = next((n for n in range(len(ids)) if ids[n : n + len(text)] == text), None)
        return ([], []) if at is None else (ids[:at], ids[at + len(text) :])

    def encode(self, example: Example, max_length: int = 512) -> Encoded:
        """Encode one row to at most `max_length` tokens (virtual tokens not counted).

        Only the prompt's text is cut, oldest tokens first; the template's tokens and the completion
        are kept. Raises DataError if these do not fit.
        """
        if example.completion is not None:
            completion, turns = example.completion, None
        elif example.messages:
            completion, turns = example.messages[-1].content, example.messages[:-1]
        else:
            raise DataError("the example has neither a completion nor messages")
        answer = self._check_ids([*self.ids(completion), self.end_token_id])
        if len(answer) == 1:
            raise DataError("the completion has no tokens", seen=repr(completion[:80]))
        prompt = self.encode_prompt(
            turns if turns is not None else example.prompt or "", max_length - len(answer)
        )
        if self.encoder_decoder and not prompt:
            raise DataError(
                "the prompt has no tokens, and this backbone's encoder needs one",
                seen=repr(example.prompt),
                fix="give the row a prompt",
            )
        return Encoded([*prompt, *answer], [IGNORE] * len(prompt) + answer)

    def encode_prompt(self, prompt: str | Sequence[Message], max_length: int = 512) -> list[int]:
        """Ids of a prompt (text, or the turns before the answer), at most `max_length` of them.
        Raises DataError if they do not fit, or if the model has no embedding for one of them."""
        if self.kind == "plain":
            text = self.ids(prompt if isinstance(prompt, str) else _plain_turns(prompt))
            ids = [*self._begin, *text, *self._tail]
            removable = [False] * len(self._begin) + [True] * len(text) + [False] * len(self._tail)
        else:
            turns = (
                [{"role": "user", "content": prompt}]
                if isinstance(prompt, str)
                else [{"role": turn.role, "content": turn.content} for turn in prompt]
            )
            ids, removable = self._chat_ids(turns)
        self._check_ids(ids)
        excess = len(ids) - max_length
        if excess <= 0:
            return ids
        if excess > sum(removable):
            raise DataError(
                "the row does not fit into the maximum length even without its prompt's text",
                seen=f"{len(ids) - sum(removable)} template tokens before the completion",
                expected=f"at most {max_length}",
                fix="raise data.max_length or shorten the completion",
            )
        kept = []
        for token, can_go in zip(ids, removable, strict=True):
            if can_go and excess:
                excess -= 1
            else:
                kept.append(token)
        return kept

    @cached_property
    def exceeds_vocabulary(self) -> bool:
        """Whether the tokenizer has ids for which the model has no embedding; text with such a
        token is refused. These tokens are usually added by hand and never used."""
        if self.vocab_size is None:
            return False
        return max(self.tokenizer.get_vocab().values(), default=0) >= self.vocab_size

    def _check_ids(self, ids: list[int]) -> list[int]:
        """The ids, after checking that the model has embeddings for them. On a GPU an id without
        one would crash the process, with every other user's request."""
        if self.exceeds_vocabulary and ids and max(ids) >= (self.vocab_size or 0):
            unknown = next(token for token in ids if token >= (self.vocab_size or 0))
            raise DataError(
                "the text has a token that the model has no embedding for",
                seen=f"{self.tokenizer.convert_ids_to_tokens(unknown)!r}, id {unknown}",
                expected=f"ids below {self.vocab_size}",
                fix="remove that token, or resize the model's embeddings to the tokenizer",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def ids(self, text: str) -> list[int]:
        """The token ids of a piece of text, without special tokens. Raises DataError if the text is
        not valid Unicode."""
        return list(self.tokenizer(_unicode(text), add_special_tokens=False)["input_ids"])

    def sample_ids(self, count: int, seed: int) -> list[int]:
        """Draw `count` ids from the first 5,000 of the vocabulary, special tokens excluded.

        Lester et al. (2021, section 3) draw from the 5,000 most common tokens; vocabularies made by
        merging or pruning list frequent pieces first.
        """
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        common = [i for i in range(len(self.tokenizer)) if i not in special][:5000]
        return random.Random(seed).choices(common, k=count)

    @cached_property
    def _fixed_date_template(self) -> str:
        """The chat template with a fixed date: some templates print today's.

        The date comes from a macro because Transformers passes no function to a template; `+%}`
        keeps a line break at the template's start.
        """
        try:
            template = str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them the default
            raise TemplateError(
                "the tokenizer's chat template cannot be chosen",
                seen=str(error),
                expected="one chat template, or one named 'default'",
                fix="name one of the model's templates 'default', or set data.template to 'plain'",
            ) from error
        if "strftime_now" not in template:
            return template
        text = "format" + "".join(f" | replace('{code}', '{it}')" for code, it in _DAY.items())
        return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro +%}}{template}"

    def _render(self, turns: list[dict[str, str]], *, generation: bool) -> str:
        conversation: list[Any] = list(turns)
        if self.parts:
            conversation = [
                turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns
            ]
        try:
            rendered = self.tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                chat_template=self._fixed_date_template,
                add_generation_prompt=generation,
                date_string="1 January 2025",
            )
        except Exception as error:  # a template can raise any exception
            raise TemplateError(
                "the chat template refuses these messages",
                seen=f"roles {[turn['role'] for turn in turns]}: {type(error).__name__}: {error}",
                expected="a chat template that renders these roles in this order",
                fix="use roles that the model's chat template supports, alternating user and "
                "assistant; if it refuses even a single user message, fix the chat template or set "
                "data.template to 'plain'",
            ) from error
        return str(rendered)

    def _chat_ids(self, turns: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids of a rendered conversation, and for each id whether it is text of a message."""
        rendered = _unicode(self._render(turns, generation=True))
        coded = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        spans = self._content_spans(turns, rendered)
        removable, position = [], 0
        for start, end in coded["offset_mapping"]:
            while position < len(spans) and spans[position][1] <= start:
                position += 1
            inside = position < len(spans) and spans[position][0] <= start < end
            removable.append(inside and end <= spans[position][1])
        return list(coded["input_ids"]), removable

    def _content_spans(self, turns: list[dict[str, str]], rendered: str) -> list[tuple[int, int]]:
        """The span of each message's text in the rendered conversation; [] if the template rewrites
        the text."""
        marked = [turn | {"content": _MARK.format(n)} for n, turn in enumerate(turns)]
        rest, spans, at = self._render(marked, generation=True), [], 0
        for n, turn in enumerate(turns):
            before, found, rest = rest.partition(_MARK.format(n))
            at += len(before)
            content = turn["content"]
            if found and not rendered.startswith(content, at):
                content = content.strip()  # many chat templates strip whitespace
            if not found or not rendered.startswith(content, at):
                return []
            spans.append((at, at + len(content)))
            at += len(content)
        return spans if rendered[at:] == rest else []


def _pieces(tokenizer: Any) -> list[str]:
    """A tokenizer's merges in order, or its pieces with their scores; [] if it has neither."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    model = json.loads(backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
    if merges or not isinstance(model.get("vocab"), list):
        return merges
    return [f"{piece} {score:.6g}" for piece, score in model["vocab"]]


def _unicode(text: str) -> str:
    """The text, after checking that it has no lone surrogate, which tokenizers reject."""
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "a text is not valid Unicode",
            seen=ascii(text[error.start : error.end]),
            fix="decode the input with errors='replace'",
        ) from None
    return text


def _plain_turns(turns: Sequence[Message]) -> str:
    """The prompt for a model without a chat template: one `role: text` line per turn."""
    lines = [f"{turn.role}: {turn.content}" for turn in turns]
    return "\n".join([*lines, "assistant:"])
