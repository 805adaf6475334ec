"""The command prepare: turn text into a folder of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..errors import UserError
from ..ranges import Fraction, Long, Threads
from .options import this_command, tokens_of


def prepare(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    *,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None,
    val: Annotated[str | None, arg(metavar="SOURCE")] = None,
    test: Annotated[str | None, arg(metavar="SOURCE")] = None,
    val_fraction: Annotated[Fraction | None, arg(metavar="SHARE")] = None,
    documents: Annotated[str | None, arg(metavar="RULE")] = None,
    tokens: Annotated[str | None, arg(metavar="COUNT")] = None,
    max_documents: Annotated[Long | None, arg(metavar="COUNT")] = None,
    end: bool = True,
    format: Literal["shards", "nanogpt"] = "shards",
    shard_tokens: Annotated[str, arg(metavar="COUNT")] = "100M",
    revision: Annotated[str | None, arg(metavar="REV")] = None,
    workers: Annotated[Threads | None, arg(metavar="COUNT")] = None,
) -> int:
    """Turn text into a folder of token ids to train on: --data prepared:DIR.

    Interrupted, it goes on where it stopped; given again, it compares every byte.

    Args:
        source: shakespeare-char, shakespeare, tinystories, wikitext-2, wikitext-103, openwebtext, fineweb-edu,
            hf:NAME[/CONFIG] (of the Hugging Face hub, or a folder that datasets reads), text:PATH, jsonl:PATH#FIELD or
            parquet:PATH#FIELD; text and jsonl may be compressed (.gz, .xz, .bz2, .zst).
        out: The folder to make (data/SOURCE if left out, for a source with a name).
        tokenizer: char, byte, gpt2, a tokenizer.json or a folder with one (what the source is known by, or gpt2).
        val: Another source to validate on (the source's own part, or the end of its training part).
        test: Another source to test on.
        val_fraction: What share of the documents to keep for validation where the source has no part for it (0.1).
        documents: What a document is: each (file or record), line, blank (between empty lines), wikitext (article), or
            a delimiter between documents, such as '<|endoftext|>'.
        tokens: Stop after the document that reaches so many training tokens: 100M, 1.5B.
        max_documents: Stop after so many training documents.
        end: Put the end-of-document token after each document, where the tokenizer has one.
        format: shards, or nanogpt: train.bin, val.bin and meta.pkl, on which nanoGPT's train.py trains.
        shard_tokens: Tokens in one file.
        revision: Of the hub's data set: a commit, a branch or refs/pr/N (the newest commit).
        workers: Threads that encode (one for each core).
    """
    from ..data import prepare as preparing
    from ..data.sources import NAMES
    from ..terminal.progress import Progress

    if out is None:
        if source not in NAMES:
            raise UserError(f"--out is needed for {source}: name the folder to make, such as --out data/mine")
        out = Path("data") / source
    recipe = preparing.Recipe(
        source=source,
        val=val,
        test=test,
        tokenizer=tokenizer,
        documents=documents,
        val_fraction=val_fraction,
        max_tokens=None if tokens is None else tokens_of("--tokens", tokens),
        max_documents=max_documents,
        shard_tokens=tokens_of("--shard-tokens", shard_tokens),
        layout=format,
        end=end,
        revision=revision,
    )
    try:
        with Progress() as bars:
            made = preparing.prepare(recipe, out, command=this_command(), workers=workers, progress=told(bars))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on with {out}") from None
    print(f"{out}: {described(made.manifest['tokenizer'])}")
    for name, split in made.manifest["splits"].items():
        print(f"  {name:<5} {split['tokens']:>14,} tokens {split['documents']:>11,} documents  ({split['rule']})")
    for name, split in made.manifest["splits"].items():
        if said := unknown_text(split):
            print(f"  {name}: {said}")
    print(f"train on it with --data prepared:{out}")
    return 0


def unknown_text(split: Mapping[str, Any]) -> str:
    """Return a sentence about the text of a part that the tokenizer does not know; empty where it knows all."""
    text = split.get("text")
    if text is None:
        unclear = split.get("unknown")
        return f"the tokenizer does not know some characters of this text, such as {unclear!r}" if unclear else ""
    if not text["unknown"]:
        return ""
    share = text["unknown"] / text["characters"]
    return (
        f"the tokenizer does not know {text['unknown']:,} of {text['characters']:,} characters ({share:.2%}), such as "
        f"{split['unknown']!r}: they are lost, or one token stands for all of them"
    )


def show(made: Any, text: str | None, json_: bool) -> int:
    """Print what a tokenizer is, and `text` cut into its tokens. Return the exit code."""
    ids = None if text is None else made.encode(text)
    pieces = None if ids is None else [made.decode([i]) for i in ids]
    about = {name: getattr(made, name) for name in ("kind", "vocab_size", "end", "fingerprint")}
    if json_:
        print(json.dumps({**about, "ids": ids, "pieces": pieces}))
        return 0
    print(f"{described(about)}, fingerprint {made.fingerprint[:12]}")
    if ids is not None and pieces is not None:
        print(" ".join(f"{i}:{piece!r}" for i, piece in zip(ids, pieces, strict=True)))
        print(f"{len(ids)} tokens")
    return 0


def described(about: Mapping[str, Any]) -> str:
    """Return one line about a tokenizer, from its kind, vocab_size and end."""
    ends = "no end of document" if about["end"] is None else f"end of document {about['end']}"
    return f"{about['kind']} tokenizer, {about['vocab_size']:,} tokens, {ends}"


def told(bars: Any) -> Callable[[Mapping[str, Any]], None]:
    """Return a listener for the events of `prepare`, with a bar for each part."""
    tells: dict[str, Callable[[Mapping[str, Any]], None]] = {}

    def tell(event: Mapping[str, Any]) -> None:
        name = event["split"]
        if name not in tells:
            tells[name] = bars.begin(name, event["of"], event["unit"])
        tells[name]({"step": event["done"], "tokens_per_s": event.get("tokens_per_s")})

    return tell
