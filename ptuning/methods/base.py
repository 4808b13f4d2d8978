"""What a tuning method is: parameters of one user, and what they become for the attention.

Nothing here knows of training loops: the plain and the packed trainer call the same two
functions, with U = 1 or U = the pack's size.
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

# Where the ids come from whose activations or embeddings a training starts from: nowhere, the
# user's words (or given ones), tokens drawn from the vocabulary, the user's distinct completions.
StartIds = Literal["none", "words", "vocab", "labels"]
# How an ensemble answers: by the mean of its members' log-probabilities, or by their vote.
Combine = Literal["mean", "vote"]

MAX_VIRTUAL_TOKENS = 1000  # of one prefix; Li and Liang use up to 200


@dataclass
class Parameters:
    """One user's parameters by name. `fixed` ones take no gradient; zeros mean the same as none,
    since users of one pack may differ in whether they begin from something."""

    trained: dict[str, Tensor]
    fixed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftForm:
    """What a method's prefixes are in PEFT's files: its name for the kind, and what the adapter's
    configuration says besides sizes."""

    peft_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to tune, and all that is asked of a prefix which it made: who visibility to it, how its
    members answer, where it stands, what it is in PEFT's files."""

    @property
    def type(self) -> str:
        """The name that `method.type` and prefix files give it."""
        ...

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
    def visibility(self) -> Visibility: ...

    @property
    def members(self) -> int:
        """Prefixes per user, trained apart and answering together."""
        ...

    @property
    def combination(self) -> Combine:
        """How the members answer together."""
        ...

    @property
    def default_learning_rate(self) -> float: ...

    def model_dump(self, *, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
        """The settings."""
        ...

    def check(self, facts: Facts) -> None:
        """Raise MethodError where the settings do not fit the backbone."""

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        """What a prefix of this method is: keys and values by group, as `Facts.kv_shapes` has
        them, or `{"embeddings": (P, E)}`."""
        ...

    def initial(self, facts: Facts, start: dict[str, Tensor] | None, seed: int) -> Parameters:
        """One user's parameters before training, fp32.

        `start` is what the prefix is to begin as (activations of words, or a trained prefix): keys
        and values of all layers or of those that the method has, and `start["embeddings"]`
        `[P, E]`; None: random.
        """
        ...

    def compile(
        self, trained: dict[str, Tensor], fixed: dict[str, Tensor], facts: Facts
    ) -> dict[str, Tensor]:
        """Tensors of `shapes` with a leading U, from parameters with one; differentiable."""
        ...

    def to_peft(self, facts: Facts) -> PeftForm:
        """What its prefixes are in PEFT's files. Raises WrongMethod where these have no place for
        them."""
        ...


class Tuning(Config):
    """Settings and answers that methods share."""

    SECTION: ClassVar[str] = "method"
    ERROR: ClassVar[type[ConfigError]] = MethodError

    if TYPE_CHECKING:  # each method's own, fields or properties

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
        description="share of a prefix's values that a training step drops, drawn for every row",
    )
    init_text: str | None = Field(
        None,
        description="text to start from where the user's rows have no init_words; "
        "none: words of the user's own train rows",
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
        raise peft_refusal("prefixes of this method", f"method.type={self.type}", "its own methods")

    @classmethod
    def from_peft(cls, peft_type: str, num_virtual_tokens: int, facts: Facts) -> Self | None:
        """The method of an adapter that PEFT made of this kind; None: another one's."""
        return None


class InputTuning(Tuning):
    """What methods share whose virtual tokens stand at the input only."""

    @property
    def visibility(self) -> Visibility:
        return Visibility(windowed=True)  # they are tokens like others

    def check(self, facts: Facts) -> None:
        check_virtual_tokens(self, facts)
        check_embeddings(facts)

    def shapes(self, facts: Facts) -> dict[str, tuple[int, ...]]:
        return {EMBEDDINGS: (self.num_virtual_tokens, facts.hidden_size)}


class KeysAndValuesTuning(Tuning):
    """What methods share whose prefixes are keys and values inside attention; as it stands, keys
    and values of every layer that are trained directly."""

    num_virtual_tokens: int = Field(
        16, ge=1, le=MAX_VIRTUAL_TOKENS, description="P, virtual tokens of a prefix (1-1000)"
    )
    init: Literal["words", "random"] = Field(
        "words",
        description="start from the activations of real words (init_words of the user's rows, "
        "else method.init_text, else words of their train rows) or at random",
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
        """What a prefix begins as, of its shapes, fp32: as `start`, else random with deviation
        0.02: unit deviation (as torch's Embedding) starts far above the base model's loss."""
        check_start(self, start)
        shapes = self.shapes(facts)
        if start is None:
            return {
                name: 0.02 * torch.randn(shape, generator=generator)
                for name, shape in shapes.items()
            }
        # The top layers of what may be all of a group's.
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


# PEFT's names of its kinds.
PEFT_PREFIX, PEFT_PROMPT, PEFT_PTUNING = "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"


def check_peft_keys(method: Method, facts: Facts) -> None:
    """Raise WrongMethod unless PEFT can hold keys and values as this method makes them: of every
    layer of the decoder's self-attention, all of one shape, which the whole prompt attends to."""
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
            "virtual tokens that the prompt does not see",
            "method.placement=infix",
            "prefix",
            "method.placement=prefix",
        )


def check_peft_embeddings(method: Method) -> None:
    """Raise WrongMethod unless PEFT can hold virtual tokens at the input as this method places
    them: all in front, none beside them, of one member."""
    if method.members > 1:
        raise peft_refusal(
            "an ensemble", f"method.ensemble={method.members}", 1, "method.ensemble=1"
        )
    layout = method.layout
    if layout is None or layout.after or any(isinstance(part, str) for part in layout.before):
        raise peft_refusal(
            "virtual tokens that are not all in front, nor words beside them",
            None if layout is None else layout.text,
            front(method.num_virtual_tokens).text,
            "that template",
        )


def peft_refusal(what: str, seen: object, expected: object, fix: str = "") -> WrongMethod:
    """PEFT's files have no place for something."""
    return WrongMethod(
        f"PEFT cannot hold {what}",
        seen=seen,
        expected=expected,
        fix=f"train with {fix}, or keep the prefix in its own file"
        if fix
        else "keep the prefix in its own file",
    )
