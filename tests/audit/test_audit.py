"""`attnlab audit` on other people's modules: found, built, called and judged, or refused in one sentence."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attnlab.audit import audit_target
from attnlab.audit.build import Settings
from attnlab.errors import UserError
from attnlab.laws import LAWS
from attnlab.laws.call import causal_mask
from attnlab.terminal.audit import table

HERE = Path(__file__).parents[1] / "foreign"
GPT, DICT, SMALL = HERE / "gpt_style.py", HERE / "dict_style.py", HERE / "library/models/small/modeling_small.py"
MHA = {"embed_dim": 32, "num_heads": 4, "batch_first": True}
ROTARY = "module(hidden_states=x, position_embeddings=rotary(8), attention_mask=mask)"
OF_ANY = [name for name, law in LAWS.items() if law.needs == "module"]


def said(audit):
    """What a person at an 80-column terminal reads."""
    console = Console(width=80, file=io.StringIO())
    console.print(table(audit))
    return console.file.getvalue()


def broken(audit):
    return {r.law: r.detail for r in audit.results if r.status == "broken"}


def test_the_known_floor_fails_exactly_mixing_and_dead_parameters():
    audit = audit_target("latent_lookup", laws=[law for law in LAWS if law != "compile"])
    results, code = audit
    assert code == 1 and len(results) == len(LAWS) - 1
    assert broken(audit) == {
        "mixing": "no output depends on any earlier token: output 36 moves only when token 36 does",
        "no dead parameters": "k.weight gets no gradient: the output does not depend on it",
    }
    text = said(audit)
    assert "latent_lookup breaks 2 of " in text.splitlines()[-2]
    assert "mixing: Outputs depend on earlier tokens." in text and "output 36 moves only when" in text


def test_a_mechanism_takes_its_fields():
    audit = audit_target("sliding", config={"window": 5}, laws=["mixing"])
    assert audit.results[0].detail == "output 36 depends on 4 earlier tokens: 32-35"
    with pytest.raises(UserError, match=r"unknown option of sliding 'windoww'.*did you mean 'window'"):
        audit_target("sliding", config={"windoww": 5})


def test_a_gpt_file_obeys_with_the_defaults_of_its_own_dataclass(capsys):
    audit = audit_target(f"{GPT}:CausalSelfAttention", config={"n_embd": 32, "n_head": 2})
    assert audit.exit_code == 0 and broken(audit) == {}
    assert [r.law for r in audit.results if r.status == "holds"] == OF_ANY
    assert audit.verdict == (
        f"CausalSelfAttention obeys all {len(OF_ANY)} laws that apply (tried up to 64 tokens; decoding was not tried)"
    )
    assert audit.notes[0] == "called as module(x), x [B T D], D = 32"
    assert capsys.readouterr().out == ""
    text = said(audit)
    interface = sum(law.needs == "interface" for law in LAWS.values())
    assert f"{interface} laws more are for modules with attnlab's interface" in text.replace("\n", " ")
    assert "compile" not in text


def test_a_leak_is_found_and_worded():
    audit = audit_target(f"{GPT}:LeakyAttention", config={"n_embd": 32, "n_head": 2}, laws=["causality"])
    assert audit.exit_code == 1
    assert broken(audit)["causality"].startswith("output 0 moves by ")
    assert broken(audit)["causality"].endswith("when token 1 changes (2 tokens)")
    data = json.loads(json.dumps(audit.to_dict()))
    assert data["exit_code"] == 1 and data["longest"] == 64
    assert data["verdict"] == "LeakyAttention breaks 1 of 1 laws: causality (tried up to 64 tokens)"
    assert data["laws"][0]["status"] == "broken" and data["laws"][0]["law"] == "causality"


def test_a_module_that_keeps_a_closure_over_its_parts_is_judged_itself_and_not_a_copy():
    assert broken(audit_target(f"{GPT}:Block", config={"n_embd": 32, "n_head": 2})) == {}


def test_torch_multihead_attention_with_its_mask_and_without():
    target, call = "torch.nn:MultiheadAttention", "module(x, x, x, attn_mask=mask)"
    assert broken(audit_target(target, kwargs=MHA, call=call)) == {}
    without = audit_target(target, kwargs=MHA, call="module(x,x,x)")
    assert list(broken(without)) == ["causality", "prefix"]
    assert "--call 'module(x,x,x, attn_mask=mask)'" in broken(without)["causality"]
    guessed = audit_target(target, kwargs=MHA, laws=["causality"])
    assert guessed.notes[0].startswith("called as module(x, x, x), ") and guessed.exit_code == 1


def test_sequence_first_modules_are_handed_x_that_way():
    audit = audit_target(
        "torch.nn:MultiheadAttention", kwargs={**MHA, "batch_first": False}, call="module(x, x, x, attn_mask=mask)"
    )
    assert broken(audit) == {} and "x [T B D]" in audit.notes[0]
    by_hand = "module(*[x.transpose(0, 1)] * 3, attn_mask=mask)[0].transpose(0, 1)"
    audit = audit_target("torch.nn:MultiheadAttention", kwargs={**MHA, "batch_first": False}, call=by_hand)
    assert broken(audit) == {} and "x [B T D]" in audit.notes[0]


@pytest.mark.parametrize(("style", "good"), [("additive", True), ("drop", True), ("keep", False)])
def test_mask_styles(style, good):
    call = "module(x, x, x, attn_mask=mask)"
    audit = audit_target("torch.nn:MultiheadAttention", kwargs=MHA, call=call, mask=style, laws=["causality", "mixing"])
    assert (broken(audit) == {}) == good  # handed "keep", it drops what it should keep
    named = audit_target(
        "torch.nn:MultiheadAttention", kwargs=MHA, call=f"module(x, x, x, attn_mask={style})", laws=["causality"]
    )
    assert (broken(named) == {}) == good


def test_masks_say_what_they_mean():
    keep = causal_mask(3, "keep", torch.float32)
    assert keep.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(~keep, causal_mask(3, "drop", torch.float32))
    additive = causal_mask(3, "additive", torch.float64)
    assert additive.dtype == torch.float64 and additive[0].tolist() == [0, -torch.inf, -torch.inf]


def test_a_file_of_a_library_whose_framework_is_missing():
    audit = audit_target(f"{SMALL}:SmallAttention", config={"hidden_size": 32}, kwargs={"layer_idx": 0}, call=ROTARY)
    assert broken(audit) == {}
    assert audit.notes[0].endswith("D = 32, mask additive [B 1 T T]")
    absent = audit.notes[-1]
    assert "a_framework_not_here" in absent and "missing_sibling" in absent
    assert not [name for name in sys.modules if "a_framework_not_here" in name or name.startswith("library")]


def test_a_library_module_without_its_mask_sees_the_future():
    call = "module(x, rotary(8), None)"
    audit = audit_target(f"{SMALL}:SmallAttention", config={}, kwargs={"layer_idx": 0}, call=call, laws=["causality"])
    assert broken(audit)["causality"].startswith("output 0 moves by")


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("FlashAttention", {"config": {}, "kwargs": {"layer_idx": 0}}, "flash_attention"),
        (
            "NeedsLogger",
            {"kwargs": {"size": 8}},
            "uses a_framework_not_here.utils.logging.get_logger.warning, but a_framework_not_here is not",
        ),
        ("SmallModel", {"config": {}}, "SmallModel, made from a_framework_not_here.modeling.PreTrainedModel"),
        ("ModuleAndMixin", {}, "ModuleAndMixin, made from a_framework_not_here.modeling.PreTrainedModel"),
    ],
)
def test_a_class_that_uses_what_is_missing_is_told_what(name, how, message):
    with pytest.raises(UserError) as caught:
        audit_target(f"{SMALL}:{name}", **how)
    assert message in str(caught.value)


def test_a_config_read_as_a_dictionary_and_a_neighbour_imported_as_scripts_do():
    config = {"emb_dim": 24, "n_heads": 3, "qkv_bias": False, "context_length": 40}
    assert broken(audit_target(f"{DICT}:MultiHeadAttention", config=config)) == {}
    assert "neighbour" not in sys.modules
    with pytest.raises(UserError, match="the class reads 'qkv_bias' of its config, which was not given: add it"):
        audit_target(f"{DICT}:MultiHeadAttention", config={"emb_dim": 24, "n_heads": 3})


def test_a_module_of_one_length_only():
    config = {"emb_dim": 24, "n_heads": 3, "qkv_bias": False, "context_length": 22}
    audit = audit_target(f"{DICT}:FixedLength", config=config)
    assert broken(audit) == {} and "tried 22 tokens" in " ".join(audit.notes)


def test_settings_are_read_as_attributes_and_as_keys():
    settings = Settings({"a": 1, "b": {"c": 2}})
    assert settings.a == settings["a"] == 1 and settings.b.c == 2 and settings.get("d", 3) == 3
    assert not hasattr(settings, "d") and getattr(settings, "d", 4) == 4 and "d" not in settings
    with pytest.raises(AttributeError, match="'d'"):
        settings.d  # noqa: B018
    with pytest.raises(KeyError):
        settings["d"]


def test_the_width_is_found_in_a_layer_or_asked_for():
    audit = audit_target(f"{GPT}:Plain", kwargs={"size": 16}, call="module(x, mask)", laws=["causality"])
    assert "D = 16" in audit.notes[0] and audit.exit_code == 0
    with pytest.raises(UserError, match=r"width of Identity's input .* give it with --d-model"):
        audit_target("torch.nn:Identity")
    audit = audit_target("torch.nn:Identity", d_model=8, laws=["mixing", "causality"])
    assert list(broken(audit)) == ["mixing"]


def test_somebodys_mechanism_on_our_interface_is_put_to_all_laws():
    laws = [law for law in LAWS if law not in ("compile", "given rows")]
    audit = audit_target(str(HERE / "own_interface.py"), laws=laws, config={"sharp": True})
    assert (
        broken(audit) == {}
        and audit.verdict == f"own_interface obeys all {len(laws)} laws that apply (tried up to 37 tokens)"
    )
    with pytest.raises(UserError, match=r"unknown field of Config 'shrap'.*did you mean 'sharp'"):
        audit_target(f"{HERE / 'own_interface.py'}:Attention", config={"shrap": True})


@pytest.mark.parametrize(
    ("target", "how", "message"),
    [
        ("mlaa", {}, r"unknown mechanism 'mlaa'.*did you mean 'mla'.*or give file.py:Class or package.module:Class"),
        ("nowhere.py:Attention", {}, r"there is no file nowhere.py: give an existing file.py:Class"),
        ("no_such_package.layers:Attention", {}, r"there is no package no_such_package: give file.py:Class"),
        (str(GPT), {}, r"defines CausalSelfAttention, .*: name the class, as in .*gpt_style.py:Class"),
        (f"{GPT}:CausalSelfAttn", {}, r"unknown class in .* 'CausalSelfAttn'.*did you mean 'CausalSelfAttention'"),
        (f"{GPT}:NotAModule", {}, r"NotAModule in .* is not a torch.nn.Module"),
        (
            f"{GPT}:Plain",
            {},
            r"Plain cannot be built from nothing: TypeError: .*'size'; its arguments are \(size, heads=2\)",
        ),
        (f"{GPT}:Plain", {"kwargs": {"size": 9}}, r"Plain cannot be built from size: AssertionError"),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "call": "module(x"}, r"--call 'module\(x' is not a Python expression"),
        (
            f"{GPT}:Plain",
            {"kwargs": {"size": 8}, "call": "module(y)"},
            r"name 'y' is not defined; the names it may use",
        ),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "d_model": 9}, r"cannot be called on x of shape \[2, T, 9\]: "),
        (
            f"{GPT}:Plain",
            {"kwargs": {"size": 8}, "mask": "both"},
            r"unknown mask style 'both': expected one of additive",
        ),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "laws": ["mixin"]}, r"unknown law 'mixin'.*did you mean 'mixing'"),
        (f"{GPT}:WantsMore", {"kwargs": {"size": 8}}, r"forward also wants 'gate'.*--call 'module\(x, gate=...\)'"),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "laws": []}, r"--laws names no law: give some of causality"),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "allow": ["prefx"]}, r"unknown law 'prefx'.*did you mean 'prefix'"),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "step": "module(x"}, r"--step 'module\(x' is not a Python expression"),
        (f"{GPT}:Plain", {"kwargs": {"size": 8}, "step": "module(x, past=cache)"}, r"--step .* does not run for Plain"),
        (f"{GPT}:attends", {"layout": "hbtd"}, r"unknown layout 'hbtd': expected one of bhtd"),
        (f"{GPT}:attends", {"call": "function(q, k)"}, r"attends cannot be called as function\(q, k\) with q, k, v of"),
    ],
)
def test_what_cannot_run_is_one_sentence(target, how, message):
    with pytest.raises(UserError, match=message) as caught:
        audit_target(target, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class A(:\n", r"is not a Python file that can be read: SyntaxError"),
        ("import sys\nsys.exit('usage: train.py --data')\n", r"cannot be imported: SystemExit: usage: train.py --data"),
        ("1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero"),
        ("import not_here_at_all\nnot_here_at_all.run() + 1 > 2\nx = [*not_here_at_all.things]\n", r"defines no torch"),
        ("from torch.nn import NoSuchLayer\n", r"defines no torch.nn.Module"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=message):
        audit_target(f"{tmp_path / 'wrong.py'}")


def test_the_command_line_gives_the_exit_codes(audited_here, capsys):
    from attnlab.cli.main import main

    some = ["--laws", "causality,prefix,modes"]
    assert (
        main(["audit", f"{GPT}:CausalSelfAttention", "--config", '{"n_embd": 32, "n_head": 2}', "--json", *some]) == 0
    )
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("CausalSelfAttention obeys all 3 laws")
    assert (
        main(["audit", f"{GPT}:LeakyAttention", "--config", '{"n_embd": 32, "n_head": 2}', "--laws", "causality"]) == 1
    )
    assert "LeakyAttention breaks 1 of 1 laws: causality" in capsys.readouterr().out
    assert main(["audit", f"{GPT}:Nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
