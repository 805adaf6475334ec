"""Every law on every mechanism (none is named here), and every law against the mistakes it is there to catch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken import any_module, interface
from torch import nn

import attnlab
from attnlab import attention
from attnlab.attention import gqa, mla, sliding
from attnlab.config import ModelConfig
from attnlab.errors import UserError
from attnlab.laws import LAWS, check_attention, check_class, check_mechanism, check_module, verdict
from attnlab.laws.counting import products
from attnlab.laws.interface import separate
from attnlab.laws.state import unchanged
from attnlab.laws.subject import Broken, ranges
from attnlab.model import Decoder

SMALL = interface.SMALL
OF_ANY_MODULE = [name for name, law in LAWS.items() if law.needs == "module"]


@pytest.mark.parametrize("law", [law for law in LAWS if law != "compile"])
@pytest.mark.parametrize("name", attention.names())
def test_every_mechanism_obeys_every_law_but_those_it_says_it_breaks(name, law):
    (result,) = check_mechanism(name, laws=[law])
    broken = law in attention.module(name).Config.breaks
    assert (result.status == "broken") == broken, result.detail
    assert result.detail and result.statement


COMPILE = """
import json, sys
from broken import interface
from attnlab import laws
from attnlab.attention import gqa
found = [result for name in sys.argv[1:] for result in laws.check_mechanism(name, laws=["compile"])]
found += laws.check_class("LooksAtData", gqa.Config, interface.LooksAtData, laws=["compile"])
print(json.dumps([result.to_dict() for result in found]))
"""
PARTS = 2  # processes, which workers of the tests can share


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_mechanism_compiles_and_what_does_not_is_caught(part):
    """In a process of its own: the checkers of shapes that conftest.py installs cannot be traced."""
    names = attention.names()[part::PARTS]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", COMPILE, *names]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    results = {result["mechanism"]: result for result in json.loads(run.stdout)}
    caught = results.pop("LooksAtData")
    assert caught["status"] == "broken" and "data-dependent expression" in caught["detail"]
    assert {name: result["detail"] for name, result in results.items() if result["status"] != "holds"} == {}
    assert set(results) == set(names)


def test_what_a_config_says_it_breaks_is_a_law():
    assert {law for name in attention.names() for law in attention.module(name).Config.breaks} <= set(LAWS)


@pytest.mark.parametrize("name", attention.names())
def test_mechanisms_obey_the_core_laws_with_learned_positions_and_biases(name):
    core = ["chunks", "kernels"]
    results = check_mechanism(name, laws=core, rope_theta=None, bias=True, **no_rope(name))
    assert [r.detail for r in results if r.status == "broken"] == []


def no_rope(name):
    """A mechanism whose variants name a rotary size has to be told that there is none."""
    return {"rope_dim": 0} if "rope_dim" in attention.module(name).Config.__dataclass_fields__ else {}


def test_the_layers_of_a_whole_decoder_are_their_own():
    names = tuple(attention.names())
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(n_layers=len(names), d_model=32, n_heads=4, mechanisms=names, options=short(names))
    ).double()
    model.eval()
    layers = [layer.attention for layer in model.layers]
    tokens = torch.arange(9)[None]
    said = separate(layers, lambda x: model(tokens)[0], torch.zeros(1))
    assert said == f"{len(names)} layers share nothing, and each acts once"


def short(names):
    """Chunks that complete within a few tokens, so that what is computed from them takes part."""
    return {n: {"chunk": 3} for n in names if "chunk" in attention.module(n).Config.__dataclass_fields__}


# -- what the laws catch -------------------------------------------------------------------------------------------

ANY_MODULE = [
    ("NoMask", "causality", r"output 0 moves by \S+ when token 1 changes \(2 tokens\)"),
    ("InvertedMask", "causality", r"output 0 moves by \S+ when token 1 changes \(2 tokens\)"),
    ("OneTooFar", "causality", r"output 0 moves by \S+ when token 1 changes \(2 tokens\)"),
    ("WholeSequenceMean", "causality", r"output 0 moves by \S+ when token 1 changes \(2 tokens\)"),
    ("ChoosesFromTheFuture", "causality", r"output \d+ moves by \S+ when token \d+ changes \(\d+ tokens\)"),
    ("LeaksInLongChunks", "causality", r"output \d+ moves by \S+ when token \d+ changes \(131 tokens\)"),
    ("TrainingStatistics", "causality", r"in training mode, output \d+ moves by \S+ when token \d+ changes"),
    ("TrainingStatistics", "batch independence", r"in training mode, sequence 0 moves by \S+ when sequences 1 and 2"),
    ("BatchStatistics", "batch independence", r"sequence 0 moves by \S+ when sequences 1 and 2 of its batch change"),
    ("ReadsRowZero", "batch independence", r"with the batch in reverse order, output 0 moves by"),
    ("PerToken", "mixing", r"no output depends on any earlier token: output 130 moves only when token 130 does"),
    ("InvertedMask", "mixing", r"no output depends on any earlier token"),
    ("Forgetful", "mixing", r"outputs 8-130 depend on no earlier token \(131 tokens\)"),
    ("UnusedProjection", "no dead parameters", r"k_proj.weight, k_proj.bias get no gradient"),
    (
        "DiscardedKeys",
        "no dead parameters",
        r"rows 24-47 of qkv.weight get no gradient: that part of the projection is",
    ),
    ("Detached", "no dead parameters", r"the output has no gradient at all"),
    ("Remembers", "determinism", r"asked the same twice in evaluation mode, output 0 moves by"),
    ("DropsAlways", "determinism", r"asked the same twice in evaluation mode, output \d+ moves by"),
    ("WritesIntoInput", "determinism", r"the module writes into its input: token 0 changes"),
    ("NormWithoutEpsilon", "finiteness", r"with zero input, output 0 is not a finite number \(131 of 131 are not\)"),
    ("Overflows", "finiteness", r"with a hundred times larger input, output \d+ is not a finite number"),
    ("HiddenLayers", "save and load", r"saved and loaded into a fresh module, output 0 moves by"),
    (
        "DividesByLength",
        "prefix",
        r"output 0 of the first 2 tokens moves by \S+ when 1 tokens are appended: y\(x\)\[:, :2\]",
    ),
    ("LogLength", "prefix", r"of the first \d+ tokens moves by \S+ when \d+ tokens are appended"),
    ("LeaksAtTiles", "causality", r"output \d+ moves by \S+ when token \d+ changes \(256 tokens\)"),
    ("LeaksAtTiles", "prefix", r"of the first 2 tokens moves by \S+ when 254 tokens are appended"),
    ("RemembersLongest", "determinism", r"2 tokens, asked again after a short input, output 0 moves by"),
    ("RemembersInItsClass", "determinism", r"2 tokens, asked again after a \w+ input, output 0 moves by"),
    ("RemembersInAList", "determinism", r"2 tokens, asked again after a short input, output 0 moves by"),
    ("KeepsItsFirstMask", "determinism", r"131 tokens, asked after 2 and asked of a fresh module, output \d+ moves by"),
    ("FiniteMask", "causality", r"for a hundred times larger input, output \d+ moves by \S+ when token \d+ changes"),
    ("MasksOnlyToLearn", "causality", r"without gradients, output \d+ moves by \S+ when token \d+ changes"),
    ("MasksOnlyToLearn", "modes", r"without gradients, output 0 moves by"),
    ("LeaksUnderAutocast", "causality", r"under autocast, output \d+ moves by \S+ when token \d+ changes"),
    ("NineTenthsOfAGradient", "gradients", r"for 13 tokens, the gradient of x is \S+, the difference in its direction"),
    ("WrongGradientInTraining", "gradients", r"in training mode, the gradient of x is"),
    ("WrongGradientOfLongCalls", "gradients", r"for 131 tokens, the gradient of x is"),
    ("Detached", "gradients", r"the output has no gradient at all"),
    ("AnglesInBfloat16", "bfloat16", r"the error in bfloat16 is \S+ of the output; the budget is"),
    (
        "GrowingBuffer",
        "save and load",
        r"its state, saved after 5 tokens, loads into no fresh module: .*size mismatch for seen",
    ),
    ("UnsavedStatistics", "save and load", r"after its state, after a call in training mode, .* output 0 moves by"),
    (
        "StopsInTraining",
        "modes",
        r"in training mode it stops with NotImplementedError: only for inference \(any_module.py",
    ),
    ("KeepsItsGraph", "modes", r"a second training step stops with RuntimeError: Trying to backward through"),
    ("AssumesItsLayout", "modes", r"for x that is a transposed view, output 0 moves by"),
]


@pytest.mark.parametrize("name", ["SpectralNorm", "MovingAverage", "SecondOutput", "SequenceFirst"])
def test_a_right_module_that_looks_suspicious_is_not_accused(name):
    build = getattr(any_module, name)
    torch.manual_seed(0)
    results = check_attention(build(), build=build)
    assert {r.law for r in results if r.status == "holds"} == set(OF_ANY_MODULE)


def test_what_has_no_gradients_is_asked_the_rest():
    results = check_attention(any_module.WithoutGradients(), laws=OF_ANY_MODULE)
    without = {r.law for r in results if r.status == "n/a"}
    assert without == {"no dead parameters", "gradients"} and {r.status for r in results} == {"holds", "n/a"}
    with pytest.raises(AssertionError, match="no law applies"):
        check_attention(any_module.WithoutGradients(), laws=["gradients"])


def test_a_gradient_that_passes_straight_through_a_choice_is_not_compared():
    torch.manual_seed(0)
    results = {r.law: r for r in check_attention(any_module.Codebook(), laws=OF_ANY_MODULE)}
    assert {law for law, r in results.items() if r.status != "holds"} == {"gradients"}
    assert re.match(r"outputs jump as qkv.weight changes \(row \d+\)", results["gradients"].detail)


def test_tables_made_in_inference_mode_are_told_and_no_finding():
    (result,) = check_attention(any_module.KeepsInferenceTensors(), laws=["modes"])
    assert "but after a call in inference mode a backward pass stops: RuntimeError: Inference" in result.detail


def test_what_is_allowed_is_told_and_no_finding():
    laws = ["causality", "prefix"]
    results = check_attention(any_module.DividesByLength(), laws=laws, allow=["prefix"])
    assert [r.status for r in results] == ["holds", "allowed"]
    assert verdict(results) == "DividesByLength obeys all 2 laws that apply but prefix, which may be broken"
    with pytest.raises(UserError, match=r"unknown law 'prefx'.*did you mean 'prefix'"):
        check_attention(any_module.Right(), allow=["prefx"])


def test_a_call_leaves_nothing_behind_in_buffers_lists_or_objects():
    class Holder:
        def __init__(self):
            self.seen = {"longest": 0}

    class Keeps(any_module.Right):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.items, self.table, self.holder, self.some = [1, torch.ones(2)], {"a": 1}, Holder(), {1}

        def forward(self, x):
            self.mean += 1
            self.items[1].mul_(2)
            self.items.append(3)
            self.table["b"] = 2
            self.holder.seen["longest"] = x.shape[1]
            self.holder.new = 1
            self.some.add(2)
            self.other = x
            with torch.no_grad():
                self.o.weight += 1
            return super().forward(x)

    module = Keeps()
    weight = module.o.weight.clone()
    with unchanged(module):
        module(torch.ones(1, 5, 24))
    assert module.mean.tolist() == [0, 0, 0] and torch.equal(module.o.weight, weight)
    assert module.items[0] == 1 and module.items[1].tolist() == [1, 1] and len(module.items) == 2
    assert module.table == {"a": 1} and vars(module.holder) == {"seen": {"longest": 0}} and module.some == {1}
    assert not hasattr(module, "other")


@pytest.mark.parametrize(("name", "law", "text"), ANY_MODULE)
def test_a_mistake_in_any_module_is_caught_with_a_counterexample(name, law, text):
    build = getattr(any_module, name)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=text) as caught:
        check_attention(build(), build=build, laws=[law])
    assert str(caught.value).startswith(f"{name} breaks 1 of 1 laws: {law}")
    assert LAWS[law].statement in str(caught.value)


def test_a_module_without_a_mistake_obeys_and_is_left_as_it_was():
    module = any_module.Right()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    results = check_attention(module)
    assert {r.law for r in results if r.status == "holds"} == set(OF_ANY_MODULE)
    assert {r.law for r in results if r.status == "n/a"} == set(LAWS) - set(OF_ANY_MODULE)
    assert verdict(results) == f"Right obeys all {len(OF_ANY_MODULE)} laws that apply (decoding was not tried)"
    assert module.training and all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.qkv.weight.dtype == torch.float32


def test_mixing_prints_what_the_last_output_depends_on():
    (result,) = check_mechanism("sliding", laws=["mixing"], window=5)
    assert result.detail == "output 36 depends on 4 earlier tokens: 32-35"


MECHANISMS = {
    "DropsItsState": (interface.fast_mka.Config, interface.DropsItsState),
    "TurnsByZero": (gqa.Config, interface.TurnsByZero),
    "TopLeftMask": (gqa.Config, interface.TopLeftMask),
    "EmptyRowsAreNaN": (gqa.Config, interface.EmptyRowsAreNaN),
    "AttendsToPads": (gqa.Config, interface.AttendsToPads),
    "PadsStandLeft": (gqa.Config, interface.PadsStandLeft),
    "SharesItsBatch": (gqa.Config, interface.SharesItsBatch),
    "Decompresses": (mla.Config, interface.Decompresses),
    "HidesTensors": (gqa.Config, interface.HidesTensors),
    "Understates": (interface.Understates, gqa.Attention),
    "ReadsTheCapacity": (gqa.Config, interface.ReadsTheCapacity),
    "BreaksPromises": (gqa.Config, interface.BreaksPromises),
    "ClaimsToRewind": (interface.ClaimsToRewind, sliding.Attention),
    "CountsFromOne": (gqa.Config, interface.CountsFromOne),
    "LowPrecisionAngles": (gqa.Config, interface.LowPrecisionAngles),
    "FlattersItself": (interface.FlattersItself, gqa.Attention),
    "WrongBackward": (gqa.Config, interface.WrongBackward),
    "DependsOnTheKernel": (gqa.Config, interface.DependsOnTheKernel),
    "SharedWeights": (gqa.Config, interface.SharedWeights),
    "RoundsItsState": (interface.linear.Config, interface.RoundsItsState),
    "SmugglesItsBias": (interface.mha.Config, interface.SmugglesItsBias),
    "TakesAPauseForZeros": (interface.KeepsOneToken, interface.TakesAPauseForZeros),
    "MultipliesOneTerm": (gqa.Config, interface.MultipliesOneTerm),
    "DrawsOtherMaps": (gqa.Config, interface.DrawsOtherMaps),
    "CountsTwice": (gqa.Config, interface.CountsTwice),
    "GivesMore": (interface.GivesMore, interface.cla.Attention),
    "MakesItsOwnValues": (interface.cla.Config, interface.MakesItsOwnValues),
}
INTERFACE = [
    ("DropsItsState", "chunks", r"decoding 2 tokens one token at a time, output 1 moves by"),
    ("TurnsByZero", "chunks", r"decoding 2 tokens one token at a time, output 1 moves by"),
    ("TopLeftMask", "chunks", r"decoding 2 tokens one token at a time, output 1 moves by"),
    ("EmptyRowsAreNaN", "masked rows", r"with pads of zeros, output 0 is not a finite number"),
    ("AttendsToPads", "left padding", r"\d+ pads of zeros before 30 tokens, .*output \d+ moves by"),
    ("PadsStandLeft", "isolated documents", r"document 1, of length 1, one of 7 in 3 rows, output 0 moves by"),
    ("SharesItsBatch", "isolated documents", r"document 0, of length 37, one of 7 in 3 rows, output 0 moves by"),
    ("Decompresses", "cache size", r"the cache holds rows k of shape \[4, 8\], which its spec does not declare"),
    ("HidesTensors", "cache size", r"the module keeps tensors of its own between calls: seen"),
    ("Understates", "cache size", r"after 1 tokens the cache holds 16 floats per sequence.*; declared are 8"),
    ("ReadsTheCapacity", "held rows", r"with the unused capacity full of not-a-number, output 0 is not a number"),
    ("BreaksPromises", "plain path", r"promised to be plain, 5 tokens, output 4 moves by"),
    ("ClaimsToRewind", "rewind", r"stops with UserError: this cache cannot go back"),
    ("CountsFromOne", "relative position", r"with all 2 positions shifted by 1234, output 1 moves by"),
    ("LowPrecisionAngles", "bfloat16", r"the error in bfloat16 is \S+ of the output; the budget is"),
    ("FlattersItself", "flops", r"37 new tokens of 37: counted 317312 FLOPs per sequence, declared 142080"),
    ("WrongBackward", "gradients", r"the gradient of \S+ is \S+, the difference in its direction"),
    ("DependsOnTheKernel", "kernels", r"sdpa: the plain output differs from the reference by"),
    ("DrawsOtherMaps", "attention maps", r"map 0 times its values, output \d+ moves by"),
    (
        "CountsTwice",
        "attention maps",
        r"a row of the layer sums to 2 over its 2 maps: give each call",
    ),
    (
        "RoundsItsState",
        "long bfloat16",
        r"the error of 192 tokens decoded after 832 is \S+ of the output; the budget is",
    ),
    ("SmugglesItsBias", "long bfloat16", r"the error over 1024 tokens is \S+ of the output; the budget is 0.031"),
    (
        "TakesAPauseForZeros",
        "pads anywhere",
        r"sequence 1 with 13 pads of not numbers between its tokens, in one pass, output \d+ moves by",
    ),
    ("MultipliesOneTerm", "flops", r"37 new tokens of 37: counted 319088 FLOPs per sequence, declared 317312"),
    ("GivesMore", "given rows", r"a layer gives at .*v \[2, 13, 1, 8\], and its Config declares .*v \[2, 13, 1, 16\]"),
    ("MakesItsOwnValues", "given rows", r"a layer declares that it takes v, and changing it changes nothing"),
    ("SharedWeights", "own layers", r"layer 1 has no mix.weight of its own: it is layer 0's mix.weight"),
]


@pytest.mark.parametrize(("name", "law", "text"), INTERFACE)
def test_a_mistake_behind_the_interface_is_caught_with_a_counterexample(name, law, text):
    (result,) = check_class(name, *MECHANISMS[name], laws=[law])
    assert result.status == "broken"
    assert re.search(text, result.detail), result.detail


@pytest.mark.parametrize(
    ("name", "law"),
    [("RoundsItsState", "bfloat16"), ("SmugglesItsBias", "bfloat16"), ("TakesAPauseForZeros", "left padding")],
)
def test_what_only_a_long_or_a_pausing_sequence_shows_passes_the_short_law(name, law):
    (result,) = check_class(name, *MECHANISMS[name], laws=[law])
    assert result.status == "holds", result.detail


def test_products_are_counted_alike_however_many_terms_their_sums_have():
    x = torch.randn(2, 5, 1)
    w = torch.randn(1, 3)
    for one_term in (lambda: x @ w, lambda: torch.einsum("bld,de->ble", x, w)):
        assert products(one_term) == 2 * 2 * 5 * 3
    assert products(lambda: torch.einsum("bld,de->ble", x.expand(2, 5, 4), w.expand(4, 3))) == 2 * 2 * 5 * 4 * 3
    assert products(lambda: torch.einsum("bl,e->ble", x[..., 0], w[0])) == 0  # nothing is summed


def test_a_closure_that_runs_the_last_layer_in_every_layer_is_caught():
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    right, wrong = interface.Stack(), interface.ClosureStack()
    assert separate(right.layers, right, x) == "3 layers share nothing, and each acts once"
    with pytest.raises(Broken, match="layer 0 of 3 runs never in one pass"):
        separate(wrong.layers, wrong, x)


def test_a_module_with_the_interface_is_put_to_all_laws():
    results = check_module(interface.right(), laws=[law for law in LAWS if law not in ("compile", "given rows")])
    assert [(r.law, r.detail) for r in results if r.status != "holds"] == []


def test_a_law_that_stops_is_broken_and_says_how():
    class Stops(gqa.Attention):
        def forward(self, x, positions, cache=None, mask=attnlab.CAUSAL):
            if cache is not None:
                raise RuntimeError("no cache here\nand more")
            return super().forward(x, positions, cache, mask)

    chunks, causality = check_module(Stops(gqa.Config(**SMALL)), laws=["chunks", "causality"])
    assert chunks.status == "broken" and chunks.detail.startswith(
        "stops with RuntimeError: no cache here and more (test_laws.py, line "
    )
    assert causality.status == "holds"


def test_what_cannot_be_called_is_a_sentence():
    with pytest.raises(UserError, match=r"width .* give d_model"):
        check_module(nn.Identity())
    with pytest.raises(UserError, match=r"cannot be called on x of shape \[2, T, 24\]: RuntimeError"):
        check_module(nn.Linear(7, 7), d_model=24)
    with pytest.raises(UserError, match=r"returned \[3\]: the laws need \[B T D\]"):
        check_module(nn.Linear(24, 24), d_model=24, call=lambda module, x: module(x).sum((1, 2)))
    with pytest.raises(UserError, match=r"unknown law 'causalty'.*did you mean 'causality'"):
        check_module(any_module.Right(), laws=["causalty"])


def test_modules_that_compute_in_float32_only_are_judged_in_float32():
    class Single(any_module.Right):
        def forward(self, x):
            return super().forward(x.float())

    results = check_module(Single(), laws=OF_ANY_MODULE)
    assert {r.status for r in results} == {"holds"}


def test_a_fixed_context_is_found():
    class Fixed(any_module.Right):
        block_size = 24

        def forward(self, x):
            return super().forward(x + torch.zeros(self.block_size, x.shape[2], dtype=x.dtype))

    results = check_module(Fixed(), laws=OF_ANY_MODULE)
    assert {r.law: r.status for r in results if r.status != "holds"} == {"prefix": "n/a"}
    assert "up to 24 tokens" in results[0].detail


def test_check_attention_is_public():
    assert attnlab.check_attention is check_attention


@pytest.mark.parametrize(("tokens", "text"), [([0], "0"), ([0, 1, 2, 5], "0-2, 5"), ([3, 4, 7, 8], "3-4, 7-8")])
def test_ranges(tokens, text):
    assert ranges(tokens) == text
