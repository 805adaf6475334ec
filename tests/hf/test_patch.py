"""Models of transformers with another attention in them. transformers itself is the witness: what a patch promises to
leave alone must stay equal to it, and its `generate` must not notice whose cache it carries."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from attnlab import attention, pretrained
from attnlab.cli import main as cli
from attnlab.errors import UserError
from attnlab.hf.hosts import Adapter
from attnlab.hf.patch import patch
from attnlab.laws.subject import Broken
from attnlab.presets import PATCHES

TOKENS = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
LLAMAS = {"hidden_size": 32, "num_hidden_layers": 3, **GROUPED, **TOKENS}
HOSTS = {
    "gpt2": transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, n_positions=128, **TOKENS),
    "llama": transformers.LlamaConfig(
        **LLAMAS, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    ),
    "mistral": transformers.MistralConfig(**LLAMAS, sliding_window=9),
    "qwen2": transformers.Qwen2Config(**LLAMAS),
    "qwen3": transformers.Qwen3Config(**LLAMAS, head_dim=16),
}
SMALL = {"msla": {"top_k": 6}, "sliding": {"window": 7}, "mka": {"chunk": 4}}  # so that 30 tokens are many


def host(kind: str, seed: int = 0):
    """A tiny model whose every parameter matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(HOSTS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def patched(kind: str, name: str, **kwargs):
    model = host(kind)
    patch(model, name, options=SMALL.get(name), drop_window=True, **kwargs)
    return model


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens padded on the left, and the mask."""
    width = max(lengths)
    tokens = torch.randint(50, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    return tokens, (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def test_the_published_patch_has_the_published_counts(capsys):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    counts = patch(model, **PATCHES["published-msla"])
    assert capsys.readouterr().out == "30,707,712/133,886,208 (22.94 %)\n"
    assert counts == (30_707_712, 133_886_208)
    assert {p.requires_grad for name, p in model.named_parameters() if ".after." in name} == {False}  # c_proj stays


@torch.no_grad()
def test_a_kept_output_projection_follows_and_stays(tmp_path):
    model = host("gpt2")
    kept = model.transformer.h[1].attn.c_proj
    patch(model, **PATCHES["published-msla"] | {"options": {"n_latents": 9, "top_k": 3}})
    adapter = model.transformer.h[1].attn
    assert adapter.after[0] is kept and not kept.weight.requires_grad and "o.weight" not in adapter.patch.carried
    model.save_pretrained(tmp_path)
    tokens, _ = prompts(9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
    with pytest.raises(UserError, match="a Decoder has no place"):
        pretrained.load(tmp_path)


SAME = [
    ("gpt2", "mha", {}),
    ("llama", "mha", {}),
    ("llama", "gqa", {}),
    ("llama", "gqa", {"n_kv_heads": 2}),
    ("mistral", "sliding", {}),
    ("mistral", "sliding", {"n_kv_heads": 4}),
    ("qwen2", "mka", {"chunk": 99}),
    ("qwen3", "sliding", {"window": 99}),
]


@pytest.mark.parametrize("kind, name, options", SAME)
@torch.no_grad()
def test_what_means_the_same_computes_the_same(kind, name, options):
    model = host(kind)
    tokens, mask = prompts(31, 20)
    before = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    patch(model, name, options=options, train="new")
    after = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(after[mask > 0], before[mask > 0], rtol=1e-5, atol=1e-5)


ALONE = [name for name in attention.names() if not attention.config(name).gives]  # layers that share no rows


@pytest.mark.parametrize("name, kind", [*zip(ALONE, itertools.cycle(HOSTS), strict=False)])
@torch.no_grad()
def test_a_patched_model_survives_a_round_trip_and_generates_as_without_a_cache(name, kind, tmp_path):
    model = patched(kind, name, train="attention")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, mask = prompts(23, 9)
    assert type(again) is type(model)
    assert again.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    logits = model(tokens, attention_mask=mask).logits
    assert torch.equal(again(tokens, attention_mask=mask).logits, logits)
    ours, _ = pretrained.load(tmp_path).model(tokens, (mask.cumsum(1) * mask) - 1)  # attnlab's own commands read it too
    torch.testing.assert_close(ours[mask > 0], logits[mask > 0], rtol=1e-5, atol=1e-5)

    settings = {"max_new_tokens": 7, "pad_token_id": 0, "do_sample": False}
    greedy = again.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(again.generate(tokens, attention_mask=mask, use_cache=False, **settings), greedy)
    assert torch.equal(again.generate(tokens[1:, 14:], **settings), greedy[1:, 14:])
    beams = {
        **settings,
        "num_beams": 3,
        "num_return_sequences": 2,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    found = again.generate(tokens, attention_mask=mask, **beams)
    mask = torch.cat([mask.repeat_interleave(2, 0), mask.new_ones(4, 7)], 1)
    scores = again(found.sequences, attention_mask=mask).logits.log_softmax(-1)[:, 22:-1]
    scores = scores.gather(2, found.sequences[:, 23:, None]).mean((1, 2))
    torch.testing.assert_close(scores, found.sequences_scores)  # not the tokens: equal scores may change places


@torch.no_grad()
def test_sampling_is_the_same_with_and_without_a_cache():
    model = patched("qwen3", "mla", layers=[1])
    tokens, mask = prompts(12, 5)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(
                tokens, attention_mask=mask, do_sample=True, max_new_tokens=20, pad_token_id=0, use_cache=use_cache
            )
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
@torch.no_grad()
def test_some_layers_may_stay_as_they_were(kind, tmp_path):
    model = patched(kind, "msla", layers=[2, 0])
    patch(model, "sliding", layers=[1], options={"window": 4}, train="new")
    assert [entry["mechanism"] for entry in model.config.attnlab] == ["msla", "sliding"]
    model.save_pretrained(tmp_path / "all")
    assert pretrained.load(tmp_path / "all").model.config.layers == ["msla", "sliding", "msla"]
    tokens, mask = prompts(19, 6, 11)
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    greedy = model.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(model.generate(tokens, attention_mask=mask, use_cache=False, **settings), greedy)
    partly = patched(kind, "mqa", layers=[1])
    partly.save_pretrained(tmp_path / "some")
    ours = pretrained.load(tmp_path / "some").model
    torch.testing.assert_close(ours(tokens[:1])[0], partly(tokens[:1]).logits, rtol=1e-5, atol=1e-5)
    greedy = partly.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(partly.generate(tokens, attention_mask=mask, use_cache=False, **settings), greedy)


@torch.no_grad()
def test_a_cache_is_fed_in_chunks_reordered_repeated_and_taken_back():
    model = patched("llama", "mla")
    tokens, mask = prompts(17, 10)
    whole = model(tokens, attention_mask=mask).logits
    past = DynamicCache()
    for start, stop in ((0, 6), (6, 7), (7, 17)):
        out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past)
        torch.testing.assert_close(out.logits[mask[:, start:stop] > 0], whole[:, start:stop][mask[:, start:stop] > 0])
    assert past.get_seq_length() == 17 and out.past_key_values is past
    past.crop(-5)
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([3, 3, 0]))
    order = torch.tensor([1, 1, 0])
    out = model(tokens[order, 12:], attention_mask=mask[order], past_key_values=past)
    torch.testing.assert_close(out.logits, whole[order, 12:])
    with pytest.raises(UserError, match="attention_mask with the new tokens"):
        model(tokens[order, :1], past_key_values=past)
    past.reset()
    torch.testing.assert_close(model(tokens[:1], past_key_values=past).logits, whole[:1])


@torch.no_grad()
def test_speculation_takes_back_what_can_be_taken_back():
    tokens = torch.tensor([[7, 8, 9] * 6])
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    model = patched("gpt2", "mla")
    assert torch.equal(
        model.generate(tokens, prompt_lookup_num_tokens=4, **settings), model.generate(tokens, **settings)
    )
    with pytest.raises(UserError, match="cannot go back"):
        patched("gpt2", "fast_mka").generate(tokens, prompt_lookup_num_tokens=4, **settings)


@pytest.mark.parametrize("train", ["all", "attention", "new"])
def test_only_what_was_chosen_trains(train):
    model = patched("gpt2", "fast_mka", train=train)
    tokens, _ = prompts(13, 13)
    model(tokens, labels=tokens).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    mechanism = {name for name in moved if ".mechanism." in name}
    new = {name for name in mechanism if "gate" in name or "decay" in name}
    assert len(new) == 3 * 5
    assert moved == {"all": moved, "attention": mechanism, "new": new}[train]
    assert (len(moved - mechanism) > 0) == (train == "all")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for name, p in model.named_parameters() if name in moved)


def test_gradients_come_through_checkpointing_and_the_loss_falls():
    model = patched("llama", "mka").train()
    model.activation_checkpointing_enable()
    tokens, mask = prompts(24, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens, attention_mask=mask, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


SHARED = """
from dataclasses import dataclass
from attnlab.attention import mha

@dataclass(frozen=True, kw_only=True)
class Config(mha.Config):
    breaks = {breaks}

class Attention(mha.Attention):
    one = None
    def __init__(self, config):
        super().__init__(config)
        Attention.one = self.o = Attention.one or self.o
    def forward(self, x, positions, cache=None, mask=None):
        if {looks_ahead}:
            x = x.flip(1)
        return super().forward(x, positions, cache, mask)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Put a mechanism into the folder, for one test."""

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])
        attention._own.cache_clear()

    yield add
    attention._own.cache_clear()
    for name in [name for name in sys.modules if name.startswith("attnlab.attention.bad_")]:
        del sys.modules[name]


@torch.no_grad()
def test_a_patch_that_breaks_a_law_is_undone_and_says_so(plugin):
    plugin("bad_shared", SHARED.format(breaks=(), looks_ahead=False))
    plugin("bad_ahead", SHARED.format(breaks=("own layers",), looks_ahead=True))
    model = host("gpt2")
    tokens, _ = prompts(9)
    names, logits, config = [*model.state_dict()], model(tokens).logits, model.config
    with pytest.raises(Broken, match=r"layer 1 has no mechanism\.o\.weight of its own: it is layer 0's"):
        patch(model, "bad_shared")
    with pytest.raises(Broken, match="when token 1 and those after it change"):
        patch(model, "bad_ahead")
    assert type(model) is transformers.GPT2LMHeadModel and model.config is config and [*model.state_dict()] == names
    assert torch.equal(model(tokens).logits, logits) and all(p.requires_grad for p in model.parameters())


def test_layers_are_fresh_and_the_config_of_the_original_is_left_alone():
    shared = transformers.GPT2Config(**HOSTS["gpt2"].to_dict())
    one, two = transformers.GPT2LMHeadModel(shared).eval(), transformers.GPT2LMHeadModel(shared).eval()
    patch(one, "mla", seed=3)
    assert two.config is shared and not hasattr(shared, "attnlab") and shared.model_type == "gpt2"
    adapters = [m for m in one.modules() if isinstance(m, Adapter)]
    rows = {tuple(a.mechanism.down.weight[0, :4].tolist()) for a in adapters}
    assert len(rows) == 3  # no two layers begin alike
    patch(two, "mla", seed=3)
    assert torch.equal(
        two.state_dict()["transformer.h.2.attn.mechanism.down.weight"], adapters[2].mechanism.down.weight
    )


def test_half_precision_and_devices_are_the_models():
    model = host("llama").to(torch.bfloat16)
    patch(model, "msla", options={"top_k": 4})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokens, _ = prompts(12)
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    assert model.generate(tokens, **settings).shape == (1, 17)


@torch.no_grad()
def test_what_cannot_be_done_is_one_sentence():
    tokens, mask = prompts(8, 5)
    with pytest.raises(UserError, match="Linear cannot be patched: give one of GPT2LMHeadModel"):
        patch(torch.nn.Linear(2, 2), "mla")
    with pytest.raises(UserError, match="unknown mechanism 'mlaa'"):
        patch(host("gpt2"), "mlaa")
    with pytest.raises(UserError, match="cla shares rows between layers"):
        patch(host("gpt2"), "cla")
    with pytest.raises(UserError, match="unknown train 'some'"):
        patch(host("gpt2"), "mla", train="some")
    with pytest.raises(UserError, match="unknown option of mla 'rank'"):
        patch(host("gpt2"), "mla", options={"rank": 3})
    with pytest.raises(UserError, match="give some of 0 to 2"):
        patch(host("gpt2"), "mla", layers=[3])
    model = patched("gpt2", "mla", layers=[1])
    with pytest.raises(UserError, match="layer 1 holds mla already"):
        patch(model, "mha")
    with pytest.raises(UserError, match="past_key_values is StaticCache"):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2, pad_token_id=0)
    with pytest.raises(UserError, match="position_ids do not count"):
        model(tokens, position_ids=torch.arange(8) % 4)
    with pytest.raises(UserError, match=r"attention_mask has shape \[2, 7\]"):
        model(tokens, attention_mask=mask[:, 1:])
    with pytest.raises(UserError, match="output_attentions was given"):
        model(tokens, output_attentions=True)
    with pytest.raises(UserError, match="call the whole model"):
        model.transformer(tokens)
    filled = host("gpt2")(tokens, use_cache=True).past_key_values
    with pytest.raises(UserError, match="filled by another model"):
        model(tokens[:, :1], past_key_values=filled)


def test_one_import_is_all_that_loading_needs(tmp_path):
    model = patched("qwen2", "gqa")
    model.save_pretrained(tmp_path)
    tokens, _ = prompts(7)
    code = (
        "import sys, torch, attnlab.hf; from transformers import AutoModelForCausalLM as Auto\n"
        f"print(Auto.from_pretrained(sys.argv[1])(torch.tensor({tokens.tolist()})).logits.double().sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(run.stdout) == pytest.approx(model(tokens).logits.double().sum().item(), abs=1e-3)


def run(command: list[object], capsys) -> tuple[int, str]:
    code = cli.main([str(word) for word in command])
    said = capsys.readouterr()
    return code, said.out + said.err


@torch.no_grad()
def test_the_command_writes_a_whole_folder_or_says_why_not(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    model = host("qwen3")
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    command = ["patch", source, "--mechanism", "mla", "--options", '{"kv_rank": 8}', "--layers", "0,2", "--out", out]
    code, said = run([*command, "--train", "new"], capsys)
    assert code == 0 and " %)" in said, said
    patch(model, "mla", options={"kv_rank": 8}, layers=[0, 2])
    tokens, _ = prompts(9)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(tokens).logits, model(tokens).logits)
    card = (out / "README.md").read_text()
    assert (
        "source with mla attention" in card and f"{2 * (8 + 8):,} floats" in card and (out / "tokenizer.json").exists()
    )

    code, said = run(command, capsys)
    assert code == 2 and "exists already" in said
    command[-1] = tmp_path / "none"
    weights = load_file(source / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    code, said = run(command, capsys)
    assert code == 2 and "lacks the tensor model.layers.1.mlp.up_proj.weight" in said
    save_file(
        {**weights, "model.layers.1.mlp.up_proj.weight": gone[1:]}, source / "model.safetensors", {"format": "pt"}
    )
    code, said = run(command, capsys)
    assert code == 2 and "does not hold the weights" in said
    (source / "config.json").write_text('{"model_type": "bert"}')
    code, said = run(command, capsys)
    assert code == 2 and "unknown model_type" in said and "'bert'" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_dry_run_counts_and_needs_no_weights(tmp_path, capsys):
    code, said = run(["patch", "gpt2", "--preset", "published-msla", "--dry-run"], capsys)
    assert (code, said) == (0, "30,707,712/133,886,208 (22.94 %)\n")
    HOSTS["llama"].save_pretrained(tmp_path)
    code, said = run(["patch", tmp_path, "--mechanism", "gqa", "--train", "attention", "--dry-run"], capsys)
    assert (code, said.split("/")[0]) == (0, f"{3 * 32 * 8 * (4 + 2 + 2 + 4):,}")
    for words, answer in {
        ("--mechanism", "mla", "--preset", "published-msla"): "one of the two",
        ("--preset", "published"): "did you mean 'published-msla'",
        ("--mechanism", "mla"): "--out DIR, or --dry-run",
        ("--mechanism", "mla", "--layers", "0,x"): "whole numbers",
    }.items():
        code, said = run(["patch", tmp_path, *words], capsys)
        assert code == 2 and answer in said and said.count("\n") == 1, said
    code, said = run(["patch", "gtp2", "--mechanism", "mla", "--dry-run"], capsys)
    assert code == 2 and "did you mean 'gpt2'" in said
