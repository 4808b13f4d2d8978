"""The interface of a tuning method: a user's parameters, and how they become a prefix.

Nothing here depends on a training loop: the plain and the packed trainer call the same functions,
`initial` and `compile`, with U = 1 or U = the pack's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor

from ptuning.data.layout import Layout, front
from ptuning.errors import ConfigError, MethodError, WrongMethod
from ptuning.model.batch import EMBEDDINGS, Visibility
from ptuning.model.facts import DECODER, Facts, stack_of
from ptuning.types import Config

# The source of the ids whose activations or embeddings start a training: none, init words, tokens
# drawn from the vocabulary, or the user's distinct completions.
StartIds = Literal["none", "words", "vocab", "labels"]
# How an ensemble answers: by the mean of its members' log-probabilities, or by a vote.
Combine = Literal["mean", "vote"]

MAX_VIRTUAL_TOKENS = 1000  # of one prefix; Li and Liang use up to 200


@dataclass
class Parameters:
    """One user's parameters by name. `fixed` tensors take no gradient; they are added, so zeros
    mean the same as none: in one pack some users may have a start and others not."""

    trained: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftForm:
    """How a method's prefixes are stored in PEFT's files: PEFT's name of the method, and the
    adapter's settings other than sizes."""

    peft_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A tuning method, and everything that depends on it in its prefixes: their visibility, how
    ensemble members are combined, the placement of virtual tokens, the PEFT format."""

    @property
    def type(self) -> str:
        """The method's name in `method.type` and in prefix files."""
        ...

    @property
    def num_virtual_tokens(self) -> int: ...

    @property
    def dropout(self) -> float: ...

    @property
    def start_ids(self) -> StartIds: ...

    @property
    def init_text(self) -> str | None:
        """The init words of users whose rows have none."""
        ...

    @property
    def layout(self) -> Layout | None:
        """The placement of virtual tokens at the input; None: they are only keys and values."""
        ...

    @property
    def visibility(self) -> Visibility: ...

    @property
    def members(self) -> int:
        """Prefixes per user: an ensemble's members are trained separately and answer together."""
        ...

    @property
    def combination(self) -> Combine:
        """How the members' answers are combined."""
        ...

    @property
    def default_learning_rate(self) -> float: ...

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """The settings, `type` included."""
        ...

    def check(self, facts: Facts) -> None:
        """Raise MethodError if the settings do not fit the backbone."""

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        """Shapes of a prefix's tensors: keys and values by group, as from `Facts.kv_shapes`, or
        `{"embeddings": (P, E)}`."""
        ...

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """One user's parameters before training, fp32.

        `start` is the initial prefix (activations of init words, or a trained prefix): keys and
        values of all layers or only of those that the method trains, and `start["embeddings"]`
        `[P, E]`. None: initialise at random.
        """
        ...

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """The prefixes of U users: tensors of `shapes` with a leading U, from parameters with a
        leading U; differentiable."""
        ...

    def to_peft(self, facts: Facts) -> PeftForm:
        """How its prefixes are stored in PEFT's files. Raises WrongMethod if they cannot be."""
        ...


class Tuning(Config):
    """Settings and defaults that all methods share."""

    SECTION: ClassVar[str] = "method"
    ERROR: ClassVar[type[ConfigError]] = MethodError

    if TYPE_CHECKING:  # every method defines these, as fields, properties or methods

        @property
        def type(self) -> str: ...

        @property
        def num_virtual_tokens(self) -> int: ...

        @property
        def start_ids(self) -> StartIds: ...

        @property
        def default_learning_rate(self) -> float: ...

        def check(self, facts: Facts) -> None: ...

        def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]: ...

        def initial(
            self, facts: Facts, start: dict[str, Tensor] | None, seed: int
        ) -> Parameters: ...

        def compile(
            self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
        ) -> dict[str, Tensor]: ...

    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="dropout on the prefix's values in training, drawn separately for each row",
    )
    init_text: str | None = Field(
        None,
        description="init words of users whose rows have no init_words; "
        "none: words of the user's train rows",
    )

    @property
    def layout(self) -> Layout | None:
        return None

    @property
    def visibility(self) -> Visibility:
        return Visibility()

    @property
    def members(self) -> int:
        return 1

    @property
    def combination(self) -> Combine:
        return "mean"

    def to_peft(self, facts: Facts) -> PeftForm:
        raise peft_refusal("prefixes of this method", f"method.type={self.type}", "PEFT's methods")

    @classmethod
    def from_peft(cls, peft_type: str, num_virtual_tokens: int, facts: Facts) -> Self | None:
        """This method, as PEFT configures it, for an adapter of type `peft_type`; None if the type
        is another method's."""
        return None


class InputTuning(Tuning):
    """Base of methods whose virtual tokens are only at the input."""

    @property
    def visibility(self) -> Visibility:
        return Visibility(windowed=True)  # virtual tokens at the input are tokens like others

    def check(self, facts: Facts) -> None:
        check_virtual_tokens(self, facts)
        check_embeddings(facts)

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (self.num_virtual_tokens, facts.hidden_size)}


class KeysAndValuesTuning(Tuning):
    """Base of methods whose prefixes are keys and values. By default the keys and values of every
    layer are trained directly."""

    num_virtual_tokens: int = Field(
        16, ge=1, le=MAX_VIRTUAL_TOKENS, description="P, virtual tokens of a prefix (1-1000)"
    )
    init: Literal["words", "random"] = Field(
        "words",
        description="words: start from the activations of init words (init_words of the user's "
        "rows, or method.init_text, or words of their train rows); random: start at random",
    )

    @property
    def start_ids(self) -> StartIds:
        return "words" if self.init == "words" else "none"

    @property
    def default_learning_rate(self) -> float:
        return 2e-2

    def check(self, facts: Facts) -> None:
        check_virtual_tokens(self, facts)

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        return facts.kv_shapes(self.num_virtual_tokens)

    def start_values(
        self, facts: Facts, start: dict[str, Tensor] | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Initial keys and values, fp32: those of `start`, or random with standard deviation 0.02.
        With deviation 1 (as torch's Embedding) the loss would start far above the base model's."""
        check_start(self, start)
        shapes = self.shapes(facts)
        if start is None:
            return {
                name: 0.02 * torch.randn(shape, generator=generator)
                for name, shape in shapes.items()
            }
        # `start` may have all layers of a group; take the top ones.
        return {
            name: start[name][-shape[0] :].detach().float().cpu().clone()
            for name, shape in shapes.items()
        }

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """See `Method.initial`."""
        generator = torch.Generator().manual_seed(seed)
        return Parameters(self.start_values(facts, start, generator))

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        return {name: trained[name] for name in self.shapes(facts)}

    def to_peft(self, facts: Facts) -> PeftForm:
        check_peft_keys(self, facts)
        return PeftForm(PEFT_PREFIX, {"prefix_projection": False})


def check_start(method: Method, start: dict[str, Tensor] | None) -> None:
    """Raise MethodError if a method that starts from words was given none."""
    if start is None and method.start_ids != "none":
        raise MethodError(
            "the training starts from words, but none were given",
            seen="no init words",
            expected="activations of init words, or method.init=random",
            fix="set method.init_text, give the user train rows, or set method.init=random",
        )


def check_virtual_tokens(method: Method, facts: Facts) -> None:
    """Raise MethodError if the virtual tokens leave none of the backbone's positions free."""
    limit, count = facts.max_positions, method.num_virtual_tokens
    if limit is not None and count >= limit:
        raise MethodError(
            "more virtual tokens than the backbone has positions",
            seen=count,
            expected=f"fewer than {limit}",
            fix="use fewer: method.num_virtual_tokens, or {p:N} in method.template",
        )


def check_embeddings(facts: Facts) -> None:
    """Raise MethodError if the backbone does not accept virtual tokens at its input."""
    if not facts.takes_embeddings:
        raise MethodError(
            "the backbone accepts no input embeddings, so it cannot take virtual tokens there",
            seen="a model whose forward has no `inputs_embeds`",
            expected="method.type=prefix, whose virtual tokens are keys and values",
            fix="use method.type=prefix or another backbone",
        )


# PEFT's names of its methods.
PEFT_PREFIX, PEFT_PROMPT, PEFT_PTUNING = "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"


def check_peft_keys(method: Method, facts: Facts) -> None:
    """Raise WrongMethod unless PEFT can store this method's keys and values: they must be of every
    layer of the decoder's self-attention, all of the same shape, and visible to the full prompt."""
    shapes, groups = method.shapes(facts), facts.stacks[DECODER].groups
    stacks = sorted({stack_of(name) for name in shapes})
    if stacks != [DECODER]:
        raise peft_refusal(
            "a prefix beyond a decoder's self-attention",
            f"stacks {', '.join(stacks)}",
            f"stacks {DECODER}",
            "method.stacks=[decoder]",
        )
    if len(groups) != 1 or groups[0].key_width != groups[0].value_width:
        what = "keys and values of several shapes"
        raise peft_refusal(what, sorted(shapes.values()), "one shape")
    if shapes != facts.kv_shapes(method.num_virtual_tokens, [DECODER]):
        raise peft_refusal(
            "a prefix on some layers only",
            f"method.layers={next(iter(shapes.values()))[0]}",
            f"all {facts.stacks[DECODER].layers}",
            "method.layers=all",
        )
    if method.visibility.infix:
        raise peft_refusal(
            "virtual tokens that the prompt does not attend to",
            "method.placement=infix",
            "prefix",
            "method.placement=prefix",
        )


def check_peft_embeddings(method: Method) -> None:
    """Raise WrongMethod unless PEFT can store this method's virtual tokens at the input: they must
    all come first, without text among them, and without an ensemble."""
    if method.members > 1:
        raise peft_refusal(
            "an ensemble", f"method.ensemble={method.members}", 1, "method.ensemble=1"
        )
    layout = method.layout
    if layout is None or layout.after or any(isinstance(part, str) for part in layout.before):
        raise peft_refusal(
            "virtual tokens that are not all in front, or text beside them",
            None if layout is None else layout.text,
            front(method.num_virtual_tokens).text,
            "that template",
        )


def peft_refusal(what: str, seen: object, expected: object, fix: str = "") -> WrongMethod:
    """The error for something that PEFT's files cannot store."""
    return WrongMethod(
        f"PEFT cannot hold {what}",
        seen=seen,
        expected=expected,
        fix=f"train with {fix}, or keep the prefix in its own file"
        if fix
        else "keep the prefix in its own file",
    )
