"""Text in, text out: streams, chats, ends of texts, and the products that decoding is made of."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from attnlab import attention, data, pretrained
from attnlab.cli import main as cli
from attnlab.config import ModelConfig
from attnlab.data import bpe
from attnlab.data.tokenizer import ByteTokenizer
from attnlab.errors import UserError
from attnlab.inference import chat
from attnlab.inference.generate import Sampling, generate
from attnlab.inference.text import Stream, continue_texts, weight_bytes
from attnlab.layers import Linear, _one_row, linear
from attnlab.measure.counters import counted_flops, read_speed
from attnlab.model import Decoder

TEXTS = ["Übermäßig schöne Grüße, ", "日本語 и русский 🦊🦊 ", "plain words, and then some more plain words. "] * 20
SPECIAL = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{- bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST = (
    "{% for m in messages %}{% if loop.first and m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m | tojson }}{% endfor %}"
)


def make(vocab_size: int, mechanism: str = "mha", **fields: Any) -> Decoder:
    settings = {"context": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "mechanisms": (mechanism,)}
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        model = Decoder(ModelConfig(vocab_size=vocab_size, **{**settings, **fields})).double().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.4)
    return model


def loaded(
    tokenizer: data.Tokenizer | None, vocab_size: int, about: dict[str, Any] | None = None, **fields: Any
) -> Any:
    return pretrained.Loaded(make(vocab_size, **fields), tokenizer, "here", "attnlab", about or {})


@pytest.fixture(scope="module")
def words() -> bpe.BPETokenizer:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install 'attnlab[data]'")
    return bpe.train_bpe(TEXTS, 320, SPECIAL)


def test_what_was_streamed_is_the_text(words):
    """Random models write random bytes, most of them not UTF-8; real text is written in pieces of characters."""
    for tokenizer in (ByteTokenizer(), words):
        given = loaded(tokenizer, tokenizer.vocab_size)
        pieces: list[str] = ["", "", ""]

        def hear(number: int, piece: str, pieces: list[str] = pieces) -> None:
            assert piece
            pieces[number] += piece

        found = continue_texts(given, ["a", "bcd", "日"], Sampling(40, 1.5, seed=3), on_text=hear)
        assert found.texts == pieces
        for text in TEXTS[:3]:
            stream = Stream(tokenizer)
            said = [stream.add(token) for token in tokenizer.encode(text)]
            assert "".join(said) == text and "\ufffd" not in "".join(said) and stream.rest() == ""
        assert sum(map(bool, said)) > 3, "it does not wait for the end"
    stream = Stream(ByteTokenizer())
    assert [stream.add(byte) for byte in "🦊".encode()] == ["", "", "", "🦊"]
    assert [stream.add(byte) for byte in b"\xf0\x9f!"] == ["", "", "\ufffd!"]
    assert [stream.add(0xF0), stream.rest(), stream.rest()] == ["", "\ufffd", ""]


@pytest.mark.parametrize("mechanism", ["mha", "msla"])
def test_a_ragged_batch_gives_what_each_prompt_gives(mechanism):
    given = loaded(ByteTokenizer(), 257, mechanism=mechanism)
    prompts = ["a", "longer than that", "in between"]
    for temperature in (0.0, 1.0):
        together = continue_texts(given, prompts, Sampling(12, temperature, seed=1))
        alone = [continue_texts(given, [prompt], Sampling(12, temperature, seed=1)) for prompt in prompts]
        assert together.texts == [each.texts[0] for each in alone]
        assert together.cache_bytes == sum(each.cache_bytes for each in alone)
        assert together.tokens == sum(each.tokens for each in alone) and together.prompt_tokens == 27


def test_a_row_ends_where_it_says_so():
    model, prompts = make(11), [[1], [2, 3, 4], [5, 6]]
    free = generate(model, prompts, 30, seed=2)
    for stop in (free[0][4], free[1][-1]):
        told: list[list[int]] = [[], [], []]
        rows = generate(model, prompts, 30, seed=2, stop={stop}, on_token=lambda i, t, told=told: told[i].append(t))
        for row, whole in zip(rows, free, strict=True):
            assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert rows == told
    everything = generate(model, prompts, 30, seed=2, stop=range(11))
    assert everything == [row[:1] for row in free]


def test_ends_are_the_models_and_the_tokenizers(words):
    free = continue_texts(loaded(words, words.vocab_size), ["the"], Sampling(60, 1.5, seed=4))
    ids = generate(make(words.vocab_size), [words.encode("the")], 60, temperature=1.5, seed=4)[0]
    assert words.end not in ids and free.tokens == 60
    for said in (ids[20], [9999, ids[20]]):
        found = continue_texts(
            loaded(words, words.vocab_size, {"config": {"eos_token_id": said}}), ["the"], Sampling(60, 1.5, seed=4)
        )
        assert found.tokens == ids.index(ids[20]) + 1 and found.texts == [words.decode(ids[: found.tokens])]


@pytest.mark.parametrize("template", [CHATML, LAST], ids=["chatml", "last"])
def test_a_chat_reads_as_transformers_renders_it(words, template, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(words.to_json()), "utf-8")
    names = {"bos_token": bpe.END, "eos_token": SPECIAL[1]}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
    theirs.chat_template = template
    special = chat.special_tokens(words)
    for system in (None, "Grüße & <b>kisses</b>"):
        messages = [{"role": "user", "content": " is 日本 <far>? "}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = chat.render_chat(template, messages, names)
        assert text == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.encode(words, text) == ids
        about = {"chat_template": template, "config": {"bos_token_id": special[bpe.END], "eos_token_id": [300, 301]}}
        given = loaded(words, words.vocab_size, about, context=128)
        found = continue_texts(given, [messages[-1]["content"]], Sampling(5, 0.0), chatting=True, system=system)
        assert found.prompt_tokens == len(ids)
        assert found.texts == [words.decode(generate(given.model, [ids], 5, temperature=0, stop=[300, 301])[0])]


def test_a_name_in_a_users_text_is_text(words):
    assert SPECIAL[0] in words.decode(words.encode(SPECIAL[0])), "as encode has it"
    special = chat.special_tokens(words)[SPECIAL[0]]
    assert chat.encode(words, f"a{SPECIAL[0]}b") == [*words.encode("a"), special, *words.encode("b")]
    assert chat.encode(ByteTokenizer(), SPECIAL[0]) == list(SPECIAL[0].encode())


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only tools') }}",
        "{% for m in messages %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ strftime_now(5) }}",
    ],
)
def test_a_template_that_does_not_work_is_refused(template):
    with pytest.raises(UserError, match="the chat template of this model"):
        chat.render_chat(template, [{"role": "user", "content": "x"}], {})


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0 seconds"),
        ("{% for a in range(9) %}{{ 'ab' * 10**9 }}{% endfor %}", "too large"),
        ("{{ 10000000 * 'abc' }}", "too large"),
        ("{{ ([0] * 2000000)|length }}", "too large"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
    ],
)
def test_a_template_comes_to_an_end(template, said, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=f"the chat template of this model does not take these messages .*{said}"):
        chat.render_chat(template, [{"role": "user", "content": "x"}], {})
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert chat.render_chat("{{ '-' * 3 }}{{ 2 * 3 }}", [], {}) == "---6"


@pytest.mark.parametrize(
    ("about", "prompts", "how", "said"),
    [
        ({}, ["x"], {"chatting": True}, "no chat template"),
        ({"chat_template": CHATML}, [""], {"chatting": True}, "give a --prompt"),
        ({}, ["x"], {"system": "be kind"}, "add --chat"),
        ({}, ["x", ""], {}, "prompt 2 is empty"),
        ({}, ["x" * 60], {}, "prompt 1 has 60 tokens and 10 are to follow"),
        ({}, [], {}, "0 prompts"),
    ],
)
def test_bad_input_is_one_sentence(about, prompts, how, said):
    with pytest.raises(UserError, match=said) as error:
        continue_texts(
            loaded(ByteTokenizer(), 257, about, positions="learned"), prompts, **{"sampling": Sampling(10), **how}
        )
    assert "\n" not in str(error.value)


def test_a_way_to_sample_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match=r"temperature is -1\.0: it must be at least 0"):
        Sampling(10, -1.0)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"here has no tokenizer .*tokenizer\.json"):
        continue_texts(loaded(None, 257), ["x"], Sampling(3))


def test_the_command(words, tmp_path, monkeypatch, capsys):
    """On an exported folder: streams, batches, chats, JSON, refusals."""
    about = {"chat_template": CHATML, "config": {"eos_token_id": words.vocab_size - 1}}
    monkeypatch.chdir(tmp_path)
    given = loaded(words, words.vocab_size, about)
    pretrained.save(pretrained.Loaded(given.model.float(), words, "here", "attnlab", about), "mine")
    pretrained.save(pretrained.Loaded(given.model, None, "here", "attnlab", {}), "mute")

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnlab", "infer", *options])
        code = cli.main()
        return code, *capsys.readouterr()

    how = ["--tokens", "9", "--seed", "5", "--temperature", "1.2"]
    code, out, err = run("mine", "--prompt", "the Grüße", *how)
    assert code == 0, err
    assert "tokens/s" in err and "bytes" in err and "of the" in err and "float32" in err
    code, said, _ = run("mine", "--prompt", "the Grüße", "--prompt", "日", *how, "--json")
    found = json.loads(said)
    assert out == f"the Grüße{found['texts'][0]}\n" and found["tokens"] == 18
    code, out, err = run("mine", "--prompt", "so", "--chat", "--system", "be kind", *how, "--dtype", "bf16")
    assert code == 0 and out.startswith("so\n") and "bfloat16" in err
    for options, word in (
        (["mute", "--prompt", "x"], "no tokenizer"),
        (["nowhere/at/all"], "nowhere"),
        (["mine", "--prompt", ""], "empty"),
        (["mine", "--chat"], "0 prompts"),
        (["mine", "--checkpoint", "3"], "checkpoint"),
    ):
        code, out, err = run(*options)
        assert (code, out) == (2, "") and word in err and err.count("\n") == 1, err


COMPILE = """
import json, torch
from attnlab.config import ModelConfig
from attnlab.inference.generate import generate
from attnlab.model import Decoder
torch.manual_seed(0)
model = Decoder(ModelConfig(vocab_size=97, context=64, n_layers=3, d_model=32, positions="learned", bias=True,
    mechanisms=("mha", "mla"))).eval()
plain = generate(model, [[1, 2, 3]], 12, temperature=0)
compiled = generate(model, [[1, 2, 3]], 12, temperature=0, compile=True)
left = [name for name, part in model.named_modules() if part._compiled_call_impl is not None]
print(json.dumps([plain, compiled, left]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_steps_choose_the_same_tokens():
    """In a process of its own: the checks of shapes that the tests switch on cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    plain, compiled, left = json.loads(done.stdout)
    assert compiled == plain and left == [], "and the model is left as it was"


SHAPES = [(1, 5, 7), (1, 64, 33), (2, 5, 7), (9, 31, 65), (130, 48, 16), (0, 5, 7)]


@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_products(rows, inner, outer, biased):
    """Against float64: within what rounding each of `inner` products costs, on strided rows and slices of weights."""
    generator = torch.Generator().manual_seed(rows + inner)
    x = torch.randn(3, rows, inner, generator=generator)[:, ::2].transpose(0, 1)
    weight = torch.randn(outer + 2, inner, generator=generator, requires_grad=True)[2:]
    bias = torch.randn(outer, generator=generator) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), weight.double().abs()).amax() if x.numel() else 0
    with torch.inference_mode():
        y = linear(x, weight, bias)
        assert y.shape == exact.shape and y.dtype == x.dtype
        assert not len(x) or (y - exact).abs().max() <= torch.finfo(y.dtype).eps * inner * (size + 1)
        if x[..., 0].numel() == 1 or rows == 1:
            one = x[:1, :1]
            found, want = _one_row(one, weight, bias), exact[:1, :1]
            assert found.shape == want.shape
            assert (found - want).abs().max() <= torch.finfo(y.dtype).eps * inner * (size + 1)
            narrow = _one_row(one.bfloat16(), weight.bfloat16(), None)
            rounded = F.linear(one.bfloat16().double(), weight.bfloat16().double())
            assert (narrow - rounded).abs().max() <= torch.finfo(torch.bfloat16).eps * rounded.abs().max()


def test_products_have_gradients_and_are_counted():
    layer, x = Linear(6, 4), torch.randn(2, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 6))
    with torch.inference_mode():
        assert counted_flops(lambda: layer(x)) == 2 * 2 * 6 * 4
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", attention.names())
def test_every_mechanism_decodes_through_them(name):
    """All its projections are ours: a plain nn.Linear would read its weights slowly."""
    for module in make(13, name).modules():
        assert not isinstance(module, torch.nn.Linear) or isinstance(module, Linear)


def test_what_a_step_reads():
    """Weights once; no table of which it takes a row; of the experts those that answer."""
    tied, untied = make(50, positions="learned"), make(50, tied=False)
    parameters = sum(p.numel() for p in tied.parameters())
    assert weight_bytes(tied) == 8 * (parameters - 64 * 32)
    assert weight_bytes(untied) == 8 * (untied.parameter_count() - 50 * 32)
    mixture = make(50, ff="moe", n_experts=4, experts_per_token=1)
    experts = sum(p.numel() for name, p in mixture.named_parameters() if name.endswith((".into", ".out")))
    assert weight_bytes(mixture) == 8 * (mixture.parameter_count() - experts * 3 // 4)
    assert read_speed(1) > 1e6


def test_the_folder_says_how_to_chat(words, tmp_path):
    about = {"chat_template": CHATML, "config": {"bos_token_id": words.end}}
    pretrained.save(pretrained.Loaded(make(words.vocab_size), words, "here", "attnlab", about), tmp_path / "mine")
    again = pretrained.load(tmp_path / "mine", dtype=torch.float64)
    mine, theirs = (
        continue_texts(each, ["hello"], Sampling(6, 0.0), chatting=True).texts
        for each in (again, pretrained.Loaded(make(words.vocab_size), words, "here", "attnlab", about))
    )
    assert mine == theirs and Path(tmp_path / "mine" / "chat_template.jinja").is_file()
