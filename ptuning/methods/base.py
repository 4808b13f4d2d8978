"""What a tuning method is: parameters of one user, and what they become for the attention.

Nothing here knows of training loops: the plain and the packed trainer call the same two
functions, with U = 1 or U = the pack's size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from torch import Tensor

from ptuning.data.layout import Layout
from ptuning.errors import MethodError
from ptuning.model.batch import EMBEDDINGS, Visibility
from ptuning.model.facts import Facts
from ptuning.types import Config

# Where the ids come from whose activations or embeddings a training starts from: nowhere, the
# user's words (or given ones), tokens drawn from the vocabulary, the user's distinct completions.
StartIds = Literal["none", "words", "vocab", "labels"]


MAX_VIRTUAL_TOKENS = 1000  # of one prefix; Li and Liang use up to 200


@dataclass
class Parameters:
    """One user's parameters by name. `fixed` ones take no gradient; zeros mean the same as none,
    since users of one pack may differ in whether they begin from something."""

    trained: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)


class Method(Protocol):
    """A way to tune. `compile` gives what `batch.PackPrefix` holds."""

    @property
    def type(self) -> str: ...

    @property
    def num_virtual_tokens(self) -> int: ...

    @property
    def dropout(self) -> float: ...

    @property
    def start_ids(self) -> StartIds: ...

    @property
    def init_text(self) -> str | None:
        """Words to start from where the user's rows give none."""
        ...

    @property
    def layout(self) -> Layout | None:
        """Where the virtual tokens stand at the input; None: they are keys and values only."""
        ...

    @property
    def seen(self) -> Visibility: ...

    @property
    def members(self) -> int:
        """Prefixes per user, trained apart and answering together."""
        ...

    @property
    def default_learning_rate(self) -> float: ...

    def model_dump(self) -> dict[str, Any]:
        """The settings."""
        ...

    def check(self, facts: Facts) -> None:
        """Raise MethodError where the settings do not fit the backbone."""

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        """What a prefix of this method is: `{stack: (K, 2, H, P, D)}` or
        `{"embeddings": (P, E)}`."""
        ...

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """One user's parameters before training, fp32.

        `start` is what the prefix is to begin as: `start[stack]` `[L, 2, H, P, D]`,
        `start["embeddings"]` `[P, E]` (activations of words, or a trained prefix); None: random.
        """
        ...

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """`{stack: [U, K, 2, H, P, D]}` or `{"embeddings": [U, P, E]}` from parameters with a
        leading U; differentiable."""
        ...


class Tuning(Config):
    """Settings and answers that methods share."""

    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of a prefix's values that a training step drops, drawn for every row",
    )
    init_text: str | None = Field(
        None,
        description="text to start from where the user's rows have no init_words; "
        "none: words of the user's own train rows",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, settings: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(settings)
        except ValidationError as error:
            raise _unfit(error, cls) from error

    @property
    def layout(self) -> Layout | None:
        return None

    @property
    def seen(self) -> Visibility:
        return Visibility()

    @property
    def members(self) -> int:
        return 1


def _unfit(error: ValidationError, method: type[BaseModel]) -> MethodError:
    """Pydantic's complaint about a setting as ours, which says what to change."""
    first, *more = error.errors()
    if not first["loc"]:
        return MethodError(
            "a tuning method's settings are no mapping",
            seen=repr(first["input"]),
            expected="settings by name",
            fix="see the method's fields",
        )
    key = str(first["loc"][0])
    if key not in method.model_fields:
        return MethodError(
            "this tuning method has no such setting",
            seen=f"method.{key}",
            expected=", ".join(sorted(method.model_fields)),
            fix="use one of these, or leave it out",
        )
    # A setting of several types is complained about once for each.
    same = [one for one in (first, *more) if one["loc"][0] == first["loc"][0]]
    wanted = dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in same)
    return MethodError(
        f"a setting of the tuning method cannot be used: {key}",
        seen=f"method.{key}={first['input']!r}",
        expected=" or ".join(wanted),
        fix=f"change method.{key}, or leave it out for {method.model_fields[key].default!r}",
    )


class InputTuning(Tuning):
    """What methods share whose virtual tokens stand at the input only."""

    @property
    def seen(self) -> Visibility:
        return Visibility(windowed=True)  # they are tokens like others

    def check(self: Method, facts: Facts) -> None:
        check_virtual_tokens(self, facts)
        check_embeddings(facts)

    def shapes(self: Method, facts: Facts) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (self.num_virtual_tokens, facts.hidden_size)}


def check_start(method: Method, start: dict[str, Tensor] | None) -> None:
    """Raise MethodError where a method that starts from words was given none."""
    if start is None and method.start_ids != "none":
        raise MethodError(
            "the training starts from words, but none were given",
            seen="no words",
            expected="activations of words, or method.init=random",
            fix="set method.init_text, give the user train rows, or set method.init=random",
        )


def check_virtual_tokens(method: Method, facts: Facts) -> None:
    """Raise MethodError where the backbone has no positions left beside the virtual tokens."""
    limit, count = facts.max_positions, method.num_virtual_tokens
    if limit is not None and count >= limit:
        raise MethodError(
            "more virtual tokens than the backbone has positions",
            seen=count,
            expected=f"fewer than {limit}",
            fix="use fewer: method.num_virtual_tokens, or {p:N} in method.template",
        )


def check_embeddings(facts: Facts) -> None:
    """Raise MethodError where virtual tokens cannot stand at the backbone's input."""
    if not facts.takes_embeddings:
        raise MethodError(
            "the backbone takes no embeddings, so virtual tokens cannot stand at its input",
            seen="a model whose forward has no `inputs_embeds`",
            expected="method.type=prefix, whose virtual tokens live inside attention",
            fix="use method.type=prefix or another backbone",
        )
