from __future__ import annotations

from dataclasses import replace

import pytest

from attnlab import attention
from attnlab.comparison.match import match
from attnlab.config import ModelConfig, RunConfig
from attnlab.errors import UserError
from attnlab.model import attention_configs, cache_floats, parameters
from attnlab.presets import variant

PRESET = RunConfig(model=ModelConfig(vocab_size=31, context=48, n_layers=2, d_model=64, n_heads=4))
MHA = variant(PRESET, "mha")


@pytest.mark.parametrize("ff", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", attention.names())
def test_parameters_are_matched_within_one_percent(name, ff):
    preset = replace(PRESET, model=replace(PRESET.model, ff=ff))
    baseline = variant(preset, "mha")
    config, found = match(variant(preset, name), baseline, "params")
    assert found is not None and found.equal and abs(found.off) <= 0.01
    assert parameters(config.model) == found.count
    assert abs(found.count / parameters(baseline.model) - 1) <= 0.01
    assert config.model.resolved_ff_dim == found.after and found.field == "ff_dim"
    if found.before != found.after:
        assert str(found) == f"ff_dim {found.before} -> {found.after}"
    assert replace(config.model, ff_dim=None) == variant(preset, name).model  # nothing else has changed


@pytest.mark.parametrize("name", attention.names())
def test_cache_is_matched_by_the_width_that_the_mechanism_names(name):
    config, found = match(variant(PRESET, name), MHA, "cache")
    assert found is not None
    assert found.count == cache_floats(config.model)
    width = attention.config(name).cache_width
    before = attention_configs(variant(PRESET, name).model)[0]
    if found.before != found.after:
        assert found.field == width
        assert getattr(attention_configs(config.model)[0], width) == found.after
        assert abs(found.off) < abs(cache_floats(variant(PRESET, name).model) / cache_floats(MHA.model) - 1)
    if not found.equal:
        assert f"still {found.off:+.1%}" in str(found)
        keeping = sum(bool(each.cache_spec.floats(48)) for each in attention_configs(variant(PRESET, name).model))
        nearest = min(distances(before, width, found.target / max(keeping, 1)), default=None)
        assert nearest is None or nearest >= abs(found.count - found.target) / keeping


def distances(config, width, target):
    """By brute force: how far each accepted width leaves one layer."""
    for value in range(1, 400) if width else ():
        try:
            yield abs(replace(config, **{width: value}).cache_spec.floats(48) - target)
        except UserError:
            pass


def test_mla_takes_the_rank_that_equals_the_baseline():
    gqa = variant(PRESET, "gqa", {"gqa": {"n_kv_heads": 2}})
    config, found = match(variant(PRESET, "mla", {"mla": {"rope_dim": 8}}), gqa, "cache")
    assert found is not None and found.off == 0
    assert str(found) == "kv_rank 64 -> 56"  # 2 * 2 * 16 - 8
    assert config.model.options["mla"] == {"rope_dim": 8, "kv_rank": 56}


def test_what_cannot_be_equal_says_so():
    _, found = match(variant(PRESET, "gqa"), variant(PRESET, "mla", {"mla": {"kv_rank": 87}}), "cache")
    assert found is not None and not found.equal
    assert str(found) == "n_kv_heads 1 -> 2, and still -32.6%: no n_kv_heads comes nearer"  # 3 does not divide 4


def test_hybrids_are_matched_too():
    config, found = match(variant(PRESET, "sliding+mla"), MHA, "cache")
    assert found is not None and found.count == cache_floats(config.model)
    assert config.model.mechanisms == ("sliding", "mla")
    config, found = match(variant(PRESET, "sliding+mla"), MHA, "params")
    assert found is not None and found.equal


def test_a_baseline_without_a_cache_is_refused():
    with pytest.raises(UserError, match="latent_lookup keeps no cache"):
        match(MHA, variant(PRESET, "latent_lookup"), "cache")


def test_none_changes_nothing_and_other_words_are_refused():
    assert match(variant(PRESET, "mla"), MHA, "none") == (variant(PRESET, "mla"), None)
    with pytest.raises(UserError, match=r"unknown match 'parms'.*did you mean 'params'"):
        match(MHA, MHA, "parms")  # type: ignore[arg-type]


def test_a_variant_keeps_the_options_it_uses():
    options = {"mla": {"kv_rank": 24}, "gqa": {"n_kv_heads": 2}}
    assert variant(PRESET, "mla", options).model.options == {"mla": {"kv_rank": 24}}
    assert variant(PRESET, "mha", options).model.options == {}
    with pytest.raises(UserError, match="unknown mechanism 'mls'"):
        variant(PRESET, "mls")
