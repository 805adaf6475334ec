"""The laws of decoding, put to modules with caches of their own kind, and to bare functions of q, k and v."""

from __future__ import annotations

import re

import pytest
import torch
import transformers  # noqa: F401  modules in its manner are given its caches only where it is in use
from broken import cached
from torch import nn

from attnlab import attention
from attnlab.errors import UserError
from attnlab.laws import LAWS, check_attention, check_module
from attnlab.laws.call import Caller, causal_mask, given_step
from attnlab.laws.functions import FunctionCaller

DECODING = [name for name, law in LAWS.items() if law.needs == "decoding"]
IN_LIBRARY = Caller("module(x, rotary(8), mask)", four=True)


def statuses(module, **how):
    return {r.law: r.status for r in check_module(module, laws=DECODING, **how)}


def inside(build):
    torch.manual_seed(0)
    module = build()
    return module, given_step(module, Caller(), "module(x, start)", torch.randn(2, 13, 24))


def test_tuples_are_recognised_and_counted():
    results = {r.law: r for r in check_attention(cached.Tuples(), laws=DECODING)}
    assert {r.status for r in results.values()} == {"holds"}
    assert results["cache size"].detail == "6288 floats per sequence after 131 tokens, 48 a token"


@pytest.mark.parametrize(
    ("name", "law", "text"),
    [
        ("TopLeft", "chunks", r"decoding 2 tokens one token at a time, output 1 moves by"),
        ("ForgetsThePast", "chunks", r"decoding 2 tokens one token at a time, output 1 moves by"),
        ("SeesItsChunk", "chunks", r"decoding \d tokens in chunks of 1, 4, output 1 moves by"),
        ("SharesOneCache", "fork", r"after a fork at 127 tokens was written to, the original, output 0 moves by"),
        (
            "KeepsMaps",
            "cache size",
            r"the cache grows faster than the sequence: 85 floats a token after 37 tokens, 179",
        ),
    ],
)
def test_a_mistake_in_tuples_is_caught(name, law, text):
    torch.manual_seed(0)
    (result,) = check_module(getattr(cached, name)(), laws=[law])
    assert result.status == "broken" and re.search(text, result.detail), result.detail


def test_a_cache_in_the_manner_of_transformers():
    assert set(statuses(cached.Library(), call=IN_LIBRARY).values()) == {"holds"}
    (result,) = check_module(cached.LibraryTurnsByZero(), call=IN_LIBRARY, laws=["chunks"])
    assert result.status == "broken" and "one token at a time, output 1 moves by" in result.detail


def test_a_cache_inside_the_module_needs_a_step():
    module, step = inside(cached.Inside)
    assert set(statuses(module).values()) == {"n/a"}
    assert set(statuses(module, step=step).values()) == {"holds"}
    module, step = inside(cached.InsideFromZero)
    found = statuses(module, step=step)
    assert found["chunks"] == found["rewind"] == "broken"


def test_a_step_written_in_python():
    def step(module, x, cache, start):
        output = module(x, past_key_value=cache, use_cache=True)
        return output[0], output[2]

    assert set(statuses(cached.Tuples(), step=step).values()) == {"holds"}
    with pytest.raises(AssertionError, match="chunks: decoding 2 tokens one token at a time"):
        check_attention(cached.Tuples(), step=lambda module, x, cache, start: (module(x)[0], None), laws=["chunks"])


@pytest.mark.parametrize("build", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_networks_decode_by_their_state(build, batch_first):
    torch.manual_seed(0)
    results = {r.law: r for r in check_attention(build(24, 24, batch_first=batch_first), d_model=24, laws=DECODING)}
    assert [law for law, r in results.items() if r.status != "holds"] == ["rewind"]
    assert "a state of shape [1, 2, 24], which cannot be taken back" in results["rewind"].detail


def test_attention_weights_are_not_taken_for_a_cache():
    class ReturnsWeights(cached.Tuples):
        def forward(self, x, past_key_value=None):
            return super().forward(x)[0], torch.ones(len(x), 3, x.shape[1], x.shape[1])

    assert set(statuses(ReturnsWeights()).values()) == {"n/a"}


@pytest.mark.parametrize("name", ["bottom_right", "heads_last", "top_left"])
def test_a_bare_function_in_its_layout(name):
    results = check_attention(getattr(cached, name))
    assert {r.law for r in results if r.status == "holds"} == {n for n, law in LAWS.items() if law.needs == "module"}


def test_a_bare_function_that_sees_the_future():
    with pytest.raises(AssertionError, match="without_a_mask breaks 2 of 11 laws: causality, prefix"):
        check_attention(cached.without_a_mask)


def test_a_bare_function_decodes_with_few_queries_and_many_keys():
    step = FunctionCaller(Caller("function(q, k, v)")).step
    assert set(statuses(cached.bottom_right, step=step).values()) == {"holds"}
    assert statuses(cached.top_left, step=step)["chunks"] == "broken"


def test_masks_of_a_chunk_end_with_its_last_token():
    assert causal_mask(2, "keep", torch.float32, start=3).tolist() == [[True] * 4 + [False], [True] * 5]


def test_a_step_that_does_not_run_is_a_sentence():
    x = torch.randn(2, 13, 24)
    with pytest.raises(
        UserError, match=r"--step 'module\(x, chace\)': name 'chace' is not defined; the names .* start"
    ):
        given_step(cached.Tuples(), Caller(), "module(x, chace)", x)
    with pytest.raises(UserError, match=r"--step 'module\(x, past=cache\)' does not run for Tuples"):
        given_step(cached.Tuples(), Caller(), "module(x, past=cache)", x)


def test_our_own_mechanisms_are_not_taken_for_somebody_elses():
    module = attention.module("mqa")
    results = check_module(module.Attention(module.Config(d_model=24, n_heads=3)), laws=DECODING)
    assert {r.status for r in results} == {"holds"}
