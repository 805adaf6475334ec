from __future__ import annotations

import pytest
import torch

from attnlab import attention
from attnlab.config import ModelConfig
from attnlab.errors import UserError
from attnlab.inference import generate as decoding
from attnlab.inference.generate import Sampling, generate, left_padded, prefill, step
from attnlab.model import Decoder

# every mechanism, as it comes and in each variant that its own Config names
SETTINGS = [
    pytest.param(name, dict(options), id=f"{name} {words}".strip())
    for name in attention.names()
    for words, options in {"": {}, **attention.module(name).Config.variants}.items()
]
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2, 7, 1, 8, 2, 8, 1], [1, 6, 1, 8, 0, 3, 3]]


def make(name: str = "mha", options: dict | None = None, **fields) -> Decoder:
    settings = {"vocab_size": 13, "context": 48, "n_layers": 2, "d_model": 32, "n_heads": 4, "mechanisms": (name,)}
    config = ModelConfig(**{**settings, **fields}, options={name: options} if options else {})
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = Decoder(config).double().eval()
        for parameter in model.parameters():  # an untrained model hardly reads its context; make it do so
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def recompute(model: Decoder, prompt: list[int], n: int) -> list[int]:
    """Greedy decoding with no cache at all."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("name", attention.names())
def test_cache_equals_recomputing(name, positions):
    model = make(name, positions=positions)
    for prompt in PROMPTS[:2]:
        assert generate(model, [prompt], 11, temperature=0) == [recompute(model, prompt, 11)]


@pytest.mark.parametrize(("name", "options"), [case for case in SETTINGS if case.values[1]])
def test_cache_equals_recomputing_in_every_variant(name, options):
    model = make(name, options)
    assert generate(model, [PROMPTS[1]], 9, temperature=0) == [recompute(model, PROMPTS[1], 9)]


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_neighbours_and_padding_change_nothing(name, options):
    model = make(name, options)
    together = generate(model, PROMPTS, 9, temperature=0)
    assert together == [generate(model, [prompt], 9, temperature=0)[0] for prompt in PROMPTS]
    how = {"temperature": 1.3, "top_k": 9, "top_p": 0.95, "seed": 5}
    sampled = generate(model, PROMPTS, 9, **how)
    assert sampled[::-1] == generate(model, PROMPTS[::-1], 9, **how)
    assert sampled[2:] == generate(model, PROMPTS[2:], 9, **how)  # equal lengths: no padding
    assert sampled[:1] == generate(model, PROMPTS[:1], 9, **how)


@pytest.mark.parametrize("name", attention.names())
def test_prefill_and_step_give_the_full_pass(name):
    """With explicit positions, to the last bits of float64, padding and all."""
    model = make(name)
    tokens, positions = left_padded(PROMPTS)
    more = torch.randint(0, 13, (len(PROMPTS), 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = model.empty_cache(len(PROMPTS), tokens.shape[1] + 5, ragged=True)
        logits, cache = prefill(model, tokens, cache, positions)
        for i in range(5):
            for row, prompt in enumerate(PROMPTS):
                full = model(torch.tensor([prompt + more[row, :i].tolist()]))[0][0, -1]
                torch.testing.assert_close(logits[row], full, rtol=0, atol=1e-11)
            logits, cache = step(model, more[:, i], cache, positions[:, -1] + 1 + i)
    assert sum(layer.floats() for layer in cache) == sum(
        layer.attention.config.cache_spec.floats(len(prompt) + 5) for layer in model.layers for prompt in PROMPTS
    )


@pytest.mark.parametrize("name", attention.names())
def test_a_sample_depends_on_seed_and_prompt(name):
    model = make(name)
    a, b = generate(model, [PROMPTS[2]] * 2, 24, seed=1)
    assert a != b  # the same prompt twice: two samples
    assert [a, b] == generate(model, [PROMPTS[2]] * 2, 24, seed=1)
    assert generate(model, [PROMPTS[2]], 24, seed=2) != [a]


def test_left_padding():
    tokens, positions = left_padded([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and positions.tolist() == [[0, 1, 2], [-1, -1, 0]]


def test_tokens_stream_in_order():
    told: list[tuple[int, int]] = []
    out = generate(make(), PROMPTS, 6, seed=4, on_token=lambda number, token: told.append((number, token)))
    assert told == [(number, out[number][i]) for i in range(6) for number in range(len(PROMPTS))]


def test_generate_leaves_the_model_as_it_was():
    model = make(dropout=0.5).train()
    assert generate(model, PROMPTS, 5, temperature=0) == generate(model.eval(), PROMPTS, 5, temperature=0)
    assert generate(model.train(), [], 5) == [] and generate(model, PROMPTS, 0) == [[]] * 4
    assert model.training
    state = torch.get_rng_state()
    generate(model, PROMPTS, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_choices_follow_the_probabilities():
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0, 0.5])
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000

    def shares(**how) -> torch.Tensor:
        sampling = Sampling(**{"temperature": 1.0, **how})
        tokens = decoding.choose_token(logits.expand(len(draws), -1), draws, sampling)
        return torch.bincount(tokens, minlength=5) / len(draws)

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)

    p = logits.softmax(0)
    close(shares(), p)
    close(shares(temperature=0.5), (logits / 0.5).softmax(0))
    close(shares(temperature=1e-300), torch.eye(5)[1])
    close(shares(top_k=2), p * torch.tensor([0, 1, 0, 1, 0]) / (p[1] + p[3]))
    close(shares(top_k=99), p)
    close(shares(top_p=float(p[1]) + 0.01), p * torch.tensor([0, 1, 0, 1, 0]) / (p[1] + p[3]))
    close(shares(top_p=1e-9), torch.eye(5)[1])
    close(shares(top_k=2, top_p=0.7), torch.eye(5)[1])  # top_p counts what top_k left: 0.73 of it is the first
    assert decoding.choose_token(logits[None], torch.tensor([1.0 - 2**-53]).double(), Sampling(temperature=1.0))[0] != 2


def test_longer_than_trained():
    rotary, learned = make(context=8), make(context=8, positions="learned")
    assert len(generate(rotary, [[1, 2, 3]], 12, temperature=0)[0]) == 12
    assert len(generate(learned, [[1, 2, 3]], 5, temperature=0)[0]) == 5
    with pytest.raises(UserError, match=r"prompt 2 has 4 tokens and 5 are to follow.* 8;"):
        generate(learned, [[1, 2, 3], [1, 2, 3, 4]], 5)


@pytest.mark.parametrize(
    ("prompts", "how", "said"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 13]], {}, "prompt 1 has a token outside 0 to 12"),
        ([[-1]], {}, "outside 0 to 12"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, r"top_p is 0\.0"),
        ([[1]], {"top_p": 1.5}, r"top_p is 1\.5"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"n": -1}, "n is -1"),
    ],
)
def test_bad_input(prompts, how, said):
    with pytest.raises(UserError, match=said):
        generate(make(), prompts, **{"n": 4, **how})
