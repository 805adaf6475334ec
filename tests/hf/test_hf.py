"""Our Decoder as a model of transformers: what Auto classes, `generate`, pipelines and lm_eval make of a folder that
`pretrained.save` wrote must be what our own code makes of the model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline
from transformers.generation import BaseStreamer

import attnlab.hf
from attnlab import Decoder, ModelConfig, attention, pretrained
from attnlab.cli import main as cli
from attnlab.data.tokenizer import ByteTokenizer, CharTokenizer
from attnlab.errors import UserError
from attnlab.evaluation.perplexity import evaluate
from attnlab.hf.memory import Memory
from attnlab.inference import generate as decoding
from attnlab.pretrained.families import attnlab as attnlab_form

NAMES = attention.names()
OPTIONS = {"msla": {"top_k": 6}, "sliding": {"window": 7}, "mka": {"chunk": 4}}
EVERY = ModelConfig(  # one layer of each mechanism: rows, rings, running states and memories beside them in one cache
    vocab_size=50,
    context=128,
    n_layers=len(NAMES),
    d_model=32,
    n_heads=4,
    mechanisms=tuple(NAMES),
    options={name: OPTIONS[name] for name in NAMES if name in OPTIONS},
)
LEARNED = replace(
    EVERY, n_layers=3, mechanisms=("gqa", "fast_mka", "mla"), options={}, positions="learned", tied=False, ff="moe"
)
CONFIGS = {"every mechanism": EVERY, "learned positions": LEARNED}


def decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A tiny model whose every parameter matters."""
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def exported(model: Decoder, folder: Path, tokenizer=None) -> Path:
    return pretrained.save(pretrained.Loaded(model, tokenizer, "a test", "run", {}), folder)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """Ours, and what AutoModelForCausalLM makes of its export."""
    ours = decoder(CONFIGS[request.param])
    return ours, AutoModelForCausalLM.from_pretrained(exported(ours, tmp_path_factory.mktemp("m") / "export"))


def prompts(*lengths: int) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Random token lists; the same padded on the left; the mask."""
    generator = torch.Generator().manual_seed(1)
    lists = [torch.randint(50, (n,), generator=generator).tolist() for n in lengths]
    tokens, positions = decoding.left_padded(lists)
    return lists, tokens, (positions >= 0).long()


GREEDY = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}


@torch.no_grad()
def test_what_was_exported_is_loaded_and_what_is_saved_is_read_again(pair, tmp_path):
    ours, theirs = pair
    _, tokens, mask = prompts(31, 31)
    assert type(theirs) is attnlab.hf.AttnlabForCausalLM and theirs.config.model_config == ours.config
    want, _ = ours(tokens)
    assert torch.equal(theirs(tokens).logits, want)
    torch.testing.assert_close(theirs(tokens, attention_mask=mask, logits_to_keep=2).logits, want[:, -2:])

    theirs.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_config == ours.config
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, want)
    again = pretrained.load(tmp_path)
    assert again.model.config == ours.config and torch.equal(again.model(tokens)[0], want)
    assert (theirs.model.head.weight is theirs.model.embed.weight) == ours.config.tied


@torch.no_grad()
def test_generate_gives_what_our_own_decoding_gives(pair):
    ours, theirs = pair
    lists, tokens, mask = prompts(23, 9, 1)
    want = torch.tensor(decoding.generate(ours, lists, 9, temperature=0))
    for use_cache in (True, False):
        out = theirs.generate(tokens, attention_mask=mask, use_cache=use_cache, **GREEDY)
        assert torch.equal(out[:, tokens.shape[1] :], want)
    assert torch.equal(theirs.generate(tokens[:1], attention_mask=mask[:1], **GREEDY)[0, 23:], want[0])


@torch.no_grad()
def test_beams_carry_the_right_cache(pair):
    _, theirs = pair
    _, tokens, mask = prompts(17, 6)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    found = theirs.generate(tokens, attention_mask=mask, **beams, **GREEDY)
    mask = torch.cat([mask.repeat_interleave(2, 0), mask.new_ones(4, 9)], 1)
    scores = theirs(found.sequences, attention_mask=mask).logits.log_softmax(-1)[:, 16:-1]
    scores = scores.gather(2, found.sequences[:, 17:, None]).mean((1, 2))
    torch.testing.assert_close(scores, found.sequences_scores)
    assert all(isinstance(layer, Memory) for layer in found.past_key_values.layers)


class Heard(BaseStreamer):
    """A streamer that only listens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@torch.no_grad()
def test_sampling_streams_and_does_not_depend_on_the_cache(pair):
    _, theirs = pair
    _, tokens, _ = prompts(12)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        heard = Heard()
        out = theirs.generate(
            tokens, do_sample=True, top_k=20, max_new_tokens=14, pad_token_id=0, use_cache=use_cache, streamer=heard
        )
        assert heard.tokens == out[0].tolist() and heard.ended
        texts.append(heard.tokens)
    assert texts[0] == texts[1]


@torch.no_grad()
def test_a_cache_holds_what_the_mechanisms_declare_and_grows(pair):
    ours, theirs = pair
    _, tokens, _ = prompts(40, 40)
    want, past = ours(tokens)[0], DynamicCache()
    for start, stop in ((0, 3), (3, 4), (4, 30), (30, 40)):
        out = theirs(tokens[:, start:stop], past_key_values=past)
        torch.testing.assert_close(out.logits, want[:, start:stop])
    assert past.get_seq_length() == 40
    floats = [layer.cache.floats() for layer in past.layers]
    assert floats == [2 * block.attention.config.cache_spec.floats(40) for block in ours.blocks()]


def test_loss_and_gradients_are_ours(pair):
    ours, theirs = pair
    _, tokens, mask = prompts(20, 13)
    labels = tokens.masked_fill((mask.cumsum(1) < 2), -100)  # nothing stands before the first token
    out = theirs(tokens, attention_mask=mask, labels=labels)
    nats = [ours.loss(row[None, :-1], row[None, 1:]) * (len(row) - 1) for row in (tokens[0], tokens[1, 7:])]
    assert out.loss.item() == pytest.approx(sum(map(float, map(torch.detach, nats))) / (19 + 12), rel=1e-5)
    assert out.past_key_values is None  # caches written in place have no gradients
    out.loss.backward()
    dead = {name for name, p in theirs.named_parameters() if p.grad is None or not p.grad.any()}
    theirs.zero_grad()
    lookups = [
        i for i, name in enumerate(ours.config.layers) if "no dead parameters" in attention.module(name).Config.breaks
    ]
    assert dead == {f"model.layers.{i}.attention.k.weight" for i in lookups}


def test_a_larger_vocabulary_survives_a_round_trip(pair, tmp_path):
    ours, _ = pair
    model = AutoModelForCausalLM.from_pretrained(exported(ours, tmp_path / "export"))
    model.resize_token_embeddings(53, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    tokens = torch.tensor([[1, 52, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    assert again.config.model_config.vocab_size == 53
    written = json.loads((tmp_path / "resized" / "config.json").read_text())
    assert written["vocab_size"] == 53 and not set(written["attnlab"]) & {*attnlab_form.NAMES}
    read = pretrained.load(tmp_path / "resized").model
    assert read.config == again.config.model_config
    with torch.no_grad():
        torch.testing.assert_close(read(tokens)[0], again.eval()(tokens).logits)


def test_fields_that_stood_in_two_places(tmp_path):
    """Exports of earlier versions: what agrees is read, what transformers resized too, and what contradicts is not."""
    folder = exported(decoder(replace(EVERY, vocab_size=41)), tmp_path / "export")
    path = folder / "config.json"
    now = json.loads(path.read_text())
    twice = {name: now[theirs] for name, theirs in attnlab_form.NAMES.items()}
    path.write_text(json.dumps({**now, "attnlab": {**now["attnlab"], **twice}}))
    assert pretrained.load(folder).model.config.vocab_size == 41
    assert AutoConfig.from_pretrained(folder).model_config.vocab_size == 41
    path.write_text(json.dumps({**now, "attnlab": {**now["attnlab"], **twice, "vocab_size": 39}}))
    assert pretrained.load(folder).model.config.vocab_size == 41
    assert AutoConfig.from_pretrained(folder).model_config.vocab_size == 41
    for name, wrong in (("n_layers", 3), ("d_model", 64), ("context", 99), ("n_heads", 2), ("tied", False)):
        path.write_text(json.dumps({**now, "attnlab": {**now["attnlab"], **twice, name: wrong}}))
        with pytest.raises(UserError, match=rf"attnlab\.{name} = {wrong} is another"):
            pretrained.load(folder)
    changed = AutoConfig.from_pretrained(exported(decoder(EVERY), tmp_path / "other"), tie_word_embeddings=False)
    assert not changed.model_config.tied


def test_half_precision(tmp_path):
    folder = exported(decoder(EVERY), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    _, tokens, mask = prompts(12, 7)
    assert model.generate(tokens, attention_mask=mask, **GREEDY).shape == (2, 21)


@torch.no_grad()
def test_what_cannot_be_done_is_one_sentence(pair):
    ours, theirs = pair
    _, tokens, _ = prompts(8, 5)
    for name in ("output_attentions", "output_hidden_states", "inputs_embeds"):
        with pytest.raises(UserError, match=f"{name} was given"):
            theirs(tokens, **{name: torch.ones(2, 8, 32) if name == "inputs_embeds" else True})
    with pytest.raises(UserError, match="there are no input_ids"):
        theirs()
    with pytest.raises(UserError, match=r"give \[2, 8\]"):
        theirs(tokens, attention_mask=torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match="is StaticCache"):
        theirs.generate(tokens, cache_implementation="static", **GREEDY)
    if ours.config.positions == "learned":
        long = torch.zeros(2, 130, dtype=torch.long)
        theirs(long, attention_mask=(torch.arange(130) > 1).long().expand(2, -1))  # 128 of them are tokens
        with pytest.raises(UserError, match="longer than the 128 learned positions"):
            theirs(long, attention_mask=(torch.arange(130) > 0).long().expand(2, -1))


TEXT = "a text: the quick brown fox, jumping.\nOver the lazy dog\t!"


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of(TEXT), ByteTokenizer()], ids=["char", "byte"])
def test_a_pipeline_reads_and_writes_text(tokenizer, tmp_path):
    ours = decoder(replace(LEARNED, vocab_size=tokenizer.vocab_size))
    folder = exported(ours, tmp_path / "export", tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT) and theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == tokenizer.end
    assert pretrained.load(folder).tokenizer.fingerprint == tokenizer.fingerprint
    pipe = pipeline("text-generation", model=str(folder))
    found = pipe(["the fox", TEXT[:9]], max_new_tokens=6, do_sample=False, return_full_text=False)
    want = decoding.generate(ours, [tokenizer.encode("the fox"), tokenizer.encode(TEXT[:9])], 6, temperature=0)
    assert [each[0]["generated_text"] for each in found] == [tokenizer.decode(row) for row in want]


def test_lm_eval_finds_the_loss_that_we_find(tmp_path, monkeypatch):
    """With the task file of docs/huggingface.md."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'attnlab[test]'")
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    page = Path(__file__).parents[2] / "docs" / "huggingface.md"
    (task,) = re.findall(r"<!-- file: local_text.yaml -->\n```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    texts = [TEXT * 3, "Ünïcode, 文字", "ab" * 40]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "local_text.yaml").write_text(task)
    tokenizer = ByteTokenizer()
    ours = decoder(replace(LEARNED, vocab_size=tokenizer.vocab_size, context=32))
    folder = exported(ours, tmp_path / "export", tokenizer)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    settings = {"device": "cpu", "batch_size": 3, "bootstrap_iters": 0, "task_manager": tasks}
    model = {"pretrained": str(folder), "dtype": "float32"}
    found = lm_eval.simple_evaluate(model="hf", model_args=model, tasks=["local_text"], **settings)
    want = evaluate(ours, [tokenizer.encode(text) for text in texts], tokenizer=tokenizer)
    scores = found["results"]["local_text"]
    assert scores["bits_per_byte,none"] == pytest.approx(want.bits_per_byte, rel=1e-6)
    words = sum(len(text.split()) for text in texts)
    assert math.log(scores["word_perplexity,none"]) == pytest.approx(want.loss * want.tokens / words, rel=1e-6)


def test_the_command_exports_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = "--train.steps 2 --train.eval-every 2 --train.eval-batches 1 --model.d-model 32 --model.n-layers 2"
    assert cli.main(f"train quick --mechanism msla,sliding --out run {short}".split()) == 0
    result = {"loss": 2.5, "bits_per_byte": 1.25, "model": "run"}
    Path("eval.json").write_text(json.dumps(result))
    assert cli.main(["export", "run", "--out", "there", "--results", "eval.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "there"
    card = Path("there/README.md").read_text()
    assert "msla" in card and "sliding" in card and "| bits_per_byte | 1.2500 |" in card and "bytes" in card
    pipe = pipeline("text-generation", model="there")
    (found,) = pipe("ROMEO:", max_new_tokens=5, do_sample=False)
    run = pretrained.load("run")
    (ours,) = decoding.generate(run.model, [run.tokenizer.encode("ROMEO:")], 5, temperature=0)
    assert found["generated_text"] == "ROMEO:" + run.tokenizer.decode(ours)
    assert cli.main(["export", "run", "--out", "there"]) == 2
    assert "exists already" in capsys.readouterr().err
