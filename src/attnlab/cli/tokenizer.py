"""The command tokenizer: learn a tokenizer from text, or show one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..errors import UserError
from ..ranges import Count, Long
from .options import Json, split_commas
from .prepare import described, show, told


def tokenizer(
    action: Annotated[Positional[Literal["train", "show"]], arg(metavar="train|show")],
    name: Annotated[Positional[str], arg(metavar="SOURCE|TOKENIZER")],
    *,
    vocab_size: Count = 4096,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    special: Annotated[str, arg(metavar="NAME[,NAME]")] = "",
    documents: Annotated[str | None, arg(metavar="RULE")] = None,
    max_documents: Annotated[Long | None, arg(metavar="COUNT")] = None,
    text: Annotated[str | None, arg(metavar="TEXT")] = None,
    json_: Json = False,
) -> int:
    """Learn a tokenizer from text, or show one.

    Args:
        action: train: learn byte-pair encoding from a source, into a tokenizer.json that transformers reads too; show:
            say what a tokenizer is.
        name: For train a source, as for attnlab prepare; for show byte, gpt2, a tokenizer.json or a folder with one.
        vocab_size: For train: how many tokens, the 256 bytes and the special ones among them.
        out: For train: the file to write.
        special: For train: special tokens of your own, besides <|endoftext|>.
        documents: For train: what a document is, as for attnlab prepare.
        max_documents: For train: learn from so many documents.
        text: For show: text to cut into tokens.
        json_: For show: print JSON.
    """
    from .. import data
    from ..files import check_target, write_json

    if action == "show":
        return show(data.tokenizer(name), text, json_)
    if out is None:
        raise UserError("attnlab tokenizer train needs --out FILE: where to write the tokenizer, such as bpe.json")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out} is not a file in a folder that exists; name one such as bpe.json")
    check_target(out)
    from ..data import bpe, sources
    from ..data.document_rules import first_documents
    from ..data.encoding import pieces_of
    from ..terminal.progress import Progress

    split = sources.open_source(name, documents).splits["train"]
    lengths: list[int] = []  # characters of each piece
    with Progress() as bars:
        tell = told(bars)

        def texts() -> Iterator[str]:
            blocks = split.read(0)
            blocks = blocks if max_documents is None else first_documents(blocks, max_documents)
            for piece in pieces_of(blocks, bpe.SEAM):  # no word is cut in two
                lengths.append(len(piece.text))
                if piece.text:
                    tell({"split": "reading", "done": piece.done, "of": split.total, "unit": split.unit})
                yield piece.text

        made = bpe.train_bpe(texts(), vocab_size, split_commas(special))
    characters = sum(lengths)
    if not characters:
        raise UserError(f"{name} has no text in it; give a source that has")
    write_json(out, made.to_json())
    print(f"{out}: {described(vars(made))}, learned from {characters:,} characters")
    if made.vocab_size < vocab_size:
        print(f"fewer than {vocab_size:,}, because the text has no pair left that occurs twice")
    return 0
