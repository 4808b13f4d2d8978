"""Sampling the next token of one row."""

from __future__ import annotations

import torch

from serve.engine.sampling import choose, generator_of


def draw(
    logits: torch.Tensor, count: int, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    generator = generator_of(7)
    drawn = [choose(logits, temperature, top_p, generator) for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


def test_temperature_zero_takes_the_largest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.9])
    assert choose(logits, 0.0, 1.0, None) == 1
    assert choose(logits, 0.0, 0.1, generator_of(1)) == 1


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (0.7, 1.0, 1.5):
        expected = torch.softmax(logits / temperature, 0)
        seen = draw(logits, 4000, temperature=temperature)
        assert torch.allclose(seen, expected, atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    seen = draw(logits, 3000, top_p=0.75)
    assert torch.allclose(seen, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.04)
    assert draw(logits, 50, top_p=1e-6).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_top_p_reaches_beyond_the_likely_tokens_of_a_flat_distribution() -> None:
    logits = torch.zeros(2000)
    generator = generator_of(3)
    drawn = {choose(logits, 1.0, 0.9, generator) for _ in range(1800)}
    assert len(drawn) > 1024


def test_equal_seeds_give_equal_streams_and_others_do_not() -> None:
    logits = torch.zeros(1000)
    streams = [
        [choose(logits, 1.0, 1.0, generator) for _ in range(20)]
        for generator in (generator_of(5), generator_of(5), generator_of(6), generator_of(-5))
    ]
    assert streams[0] == streams[1]
    assert streams[0] != streams[2]
    assert streams[0] != streams[3]
