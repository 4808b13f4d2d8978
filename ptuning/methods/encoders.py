"""Reparameterising encoders of U users at once: every weight has a leading U.

Shapes and initial distributions are those of torch.nn.Linear, torch.nn.LSTM and
torch.nn.Embedding, except that weights are stored `[in, out]`, so one batched product serves all
users. Tests compare them with torch's modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], fan: int, generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(fan), 1/sqrt(fan)), as torch initialises Linear (fan_in) and LSTM (hidden size)."""
    bound = 1.0 / math.sqrt(fan)
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound


def initial_linear(
    name: str, size_in: int, size_out: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """`{w<name>: [in, out], b<name>: [out]}` of one user."""
    return {
        f"w{name}": uniform((size_in, size_out), size_in, generator),
        f"b{name}": uniform((size_out,), size_in, generator),
    }


def linear(parameters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Apply a linear layer: `x` `[U, P, in]` to `[U, P, out]`."""
    return torch.baddbmm(parameters[f"b{name}"].unsqueeze(1), x, parameters[f"w{name}"])


def initial_lstm(
    size_in: int, hidden: int, layers: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of one user's bidirectional LSTM of hidden size `hidden` per direction."""
    weights: dict[str, Tensor] = {}
    for layer in range(layers):
        width = size_in if layer == 0 else 2 * hidden
        for direction in ("forward", "backward"):
            key = f"lstm{layer}.{direction}"
            weights |= {
                f"{key}.w_ih": uniform((width, 4 * hidden), hidden, generator),
                f"{key}.w_hh": uniform((hidden, 4 * hidden), hidden, generator),
                f"{key}.b_ih": uniform((4 * hidden,), hidden, generator),
                f"{key}.b_hh": uniform((4 * hidden,), hidden, generator),
            }
    return weights


def lstm(parameters: dict[str, Tensor], layers: int, x: Tensor) -> Tensor:
    """Apply a bidirectional LSTM (Hochreiter and Schmidhuber 1997, with forget gates): `x`
    `[U, P, in]` to `[U, P, 2h]`."""
    for layer in range(layers):
        halves = [
            _direction(parameters, f"lstm{layer}.forward", x),
            _direction(parameters, f"lstm{layer}.backward", x.flip(1)).flip(1),
        ]
        x = torch.cat(halves, dim=-1)
    return x


def _direction(parameters: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    from_input = torch.baddbmm(
        parameters[f"{key}.b_ih"].unsqueeze(1), x, parameters[f"{key}.w_ih"]
    )  # [U, P, 4h]
    users, steps, four = from_input.shape
    hidden = cell = x.new_zeros((users, four // 4))
    outputs = []
    for step in range(steps):
        recurrent = torch.baddbmm(
            parameters[f"{key}.b_hh"].unsqueeze(1),
            hidden.unsqueeze(1),
            parameters[f"{key}.w_hh"],
        ).squeeze(1)
        input_gate, forget, new, output_gate = (from_input[:, step] + recurrent).chunk(4, dim=-1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(input_gate) * torch.tanh(new)
        hidden = torch.sigmoid(output_gate) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1)
