"""Where text comes from: files of text, JSON lines or Parquet, and data sets of the Hugging Face hub.

A source has splits; a split is read as blocks of text, of which each says whether it ends its document, so that a
document may be longer than memory. `--documents` says what a document is:

    each      a file of text, or a record of anything else (the rule where none is given)
    line      a line
    blank     what stands between empty lines
    wikitext  an article, which begins with a line such as " = Title = " after an empty one

Whatever the rule, no character is lost: joined, the documents are the text again. A document with nothing in it is
left out.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, choose, need
from .texts import shakespeare, visible_files

BLOCK = 1 << 20  # characters or bytes that are read at a time
ROWS = 500  # records that are read at a time
TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")
RULES: dict[str, Callable[[str, str], bool]] = {  # whether a document begins with a line, given the line before
    "line": lambda before, line: True,
    "blank": lambda before, line: not before.strip() and bool(line.strip()),
    "wikitext": lambda before, line: not before.strip() and TITLE.fullmatch(line) is not None,
}
EACH = "each"
VAL_NAMES, TEST_NAMES = ("validation", "valid", "val", "dev"), ("test",)


class Block(NamedTuple):
    text: str
    last: bool  # it ends its document
    done: int  # how much of the split has been read by now, in units of `Split.total`


@dataclass(frozen=True)
class Split:
    read: Callable[[int], Iterator[Block]]  # without so many documents at the beginning
    total: int | None  # where that is known
    unit: str = "bytes"


@dataclass(frozen=True)
class Source:
    splits: Mapping[str, Split]  # "train", and "val" and "test" where the source has them
    about: Mapping[str, Any]  # for the manifest: kind, revision, licence, ...
    tokenizer: str = "gpt2"  # where none is asked for
    val_fraction: float = 0.1  # the same
    uncut: Split | None = None  # train and val in one, where the cut between them was a choice


@dataclass(frozen=True)
class Known:
    """A data set for `datasets`."""

    id: str  # on the hub, or a local folder
    config: str | None = None
    field: str = "text"
    licence: str = ""
    documents: str = EACH
    streaming: bool = False  # read as it is downloaded, because the whole is large
    val_fraction: float = 0.1  # where it has no validation split


KNOWN = {
    "tinystories": Known(id="roneneldan/TinyStories", licence="cdla-sharing-1.0"),
    "wikitext-2": Known(
        id="Salesforce/wikitext", config="wikitext-2-raw-v1", licence="cc-by-sa-3.0, gfdl", documents="wikitext"
    ),
    "wikitext-103": Known(
        id="Salesforce/wikitext", config="wikitext-103-raw-v1", licence="cc-by-sa-3.0, gfdl", documents="wikitext"
    ),
    "openwebtext": Known(id="Skylion007/openwebtext", licence="cc0-1.0", streaming=True, val_fraction=0.0005),
    "fineweb-edu": Known(
        id="HuggingFaceFW/fineweb-edu", config="sample-10BT", licence="odc-by", streaming=True, val_fraction=0.005
    ),
}
PACKAGED = {"shakespeare-char": "char", "shakespeare": "gpt2"}  # and their tokenizers
NAMES = (*PACKAGED, *KNOWN)


def open_source(name: str, documents: str | None = None, revision: str | None = None) -> Source:
    """One of NAMES, hf:NAME[/CONFIG], text:PATH, jsonl:PATH or parquet:PATH; all but text may end in #FIELD.

    `revision` is the hub's commit, branch or refs/pr/N; the newest commit if None. UserError where there is no such
    thing.
    """
    if documents is not None:
        choose("rule for --documents", documents, [EACH, *RULES])
    if name in PACKAGED:
        return _packaged(name, documents or EACH)
    if name in KNOWN:
        return _hub(KNOWN[name], documents or KNOWN[name].documents, revision)
    kind, _, rest = name.partition(":")
    path, _, field = rest.rpartition("#") if "#" in rest else (rest, "", "text")
    if kind == "text" and rest:
        return _files(kind, Path(rest), documents or EACH, _text_of, {})
    if kind in RECORDS and path and field:
        read, about = RECORDS[kind], {"field": field}
        return _files(kind, Path(path), documents or EACH, lambda file: read(file, field), about)
    if kind == "hf" and path and field:
        return _hub(Known(*_id_and_config(path), field=field, streaming=True), documents or EACH, revision)
    raise UserError(
        f"data source {name!r} is unknown; allowed are {', '.join(NAMES)}, hf:NAME[/CONFIG], text:PATH, "
        "jsonl:PATH#FIELD and parquet:PATH#FIELD"
    )


def first(blocks: Iterable[Block], documents: int) -> Iterator[Block]:
    """The blocks of the first so many documents."""
    for block in blocks if documents > 0 else ():
        yield block
        documents -= block.last
        if not documents:
            return


# rules


Texts = Iterator[tuple[str, int]]  # pieces of text in order, and how much has been read by then


def documents_of(texts: Texts, rule: str) -> Iterator[Block]:
    """One text, which came in pieces, as the documents that `rule` makes of it."""
    if rule == EACH:
        done = 0
        for text, done in texts:
            yield Block(text, False, done)
        yield Block("", True, done)
        return
    begins, before, done, size = RULES[rule], "", 0, 0
    held: list[str] = []
    full = False  # whether the document has something in it: empty lines alone are none, and stay with what follows
    for line, done in _lines(texts):
        if full and begins(before, line):
            yield Block("".join(held), True, done)
            held, size, full = [], 0, False
        if size > BLOCK:
            yield Block("".join(held), False, done)
            held, size = [], 0
        held.append(line)
        size += len(line)
        full, before = full or bool(line.strip()), line
    yield Block("".join(held), True, done)


def _lines(texts: Texts) -> Texts:
    """With their line feeds, which alone end a line: other signs that may end one stay inside."""
    rest, done = "", 0
    for text, done in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n", done
    if rest:
        yield rest, done


def _records(rows: Texts, rule: str) -> Iterator[Block]:
    """Records are documents, or, by any other rule, the lines of one text."""
    if rule != EACH:
        yield from documents_of(rows, rule)
        return
    for text, done in rows:
        yield Block(text, True, done)


def _without(blocks: Iterator[Block], documents: int) -> Iterator[Block]:
    for block in blocks if documents else ():
        documents -= block.last
        if not documents:
            break
    return blocks


# files


def _files(kind: str, path: Path, rule: str, read: Callable[[Path], Texts], about: Mapping[str, Any]) -> Source:
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; {kind}:PATH needs a file or a folder of such files")
    found = [path] if path.is_file() else sorted(visible_files(path), key=lambda file: file.relative_to(path).parts)
    files = [file for file in found if kind == "text" or path.is_file() or file.suffix == f".{kind}"]
    if not files:
        raise UserError(f"{path} holds no {'' if kind == 'text' else f'.{kind} '}file; name another folder or a file")
    cut = documents_of if kind == "text" else _records
    sizes = [file.stat().st_size for file in files]

    def blocks() -> Iterator[Block]:
        before = 0
        for file, size in zip(files, sizes, strict=True):
            for text, last, done in cut(read(file), rule):
                yield Block(text, last, before + done)
            before += size

    listed = [{"name": file.name, "bytes": size} for file, size in zip(files, sizes, strict=True)]
    split = Split(lambda skip: _without(blocks(), skip), sum(sizes))
    return Source({"train": split}, {"kind": kind, "documents": rule, **about, "files": listed})


def _text_of(file: Path) -> Texts:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, done, chunk = 1, 0, b"-"
    with _opened(file) as opened:
        while chunk:
            chunk = opened.read(BLOCK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise UserError(
                    f"{file} is not UTF-8: byte {error.object[error.start]:#04x} in line {line}; save it as UTF-8, or "
                    "take it out of the folder if it is not text"
                ) from None
            yield text if done else text.removeprefix("\ufeff"), done + len(chunk)
            line += chunk.count(b"\n")
            done += len(chunk)


def _jsonl(file: Path, field: str) -> Texts:
    done = 0
    with _opened(file) as opened:
        for number, line in enumerate(opened, 1):
            done += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file} line {number} is not JSON in UTF-8 ({error}); mend it or leave it out"
                ) from None
            yield _field(record, field, f"{file} line {number}"), done


def _parquet(file: Path, field: str) -> Texts:
    parquet = need("pyarrow.parquet", "data")
    size, done = file.stat().st_size, 0
    try:
        with parquet.ParquetFile(file) as opened:
            _known_field(field, opened.schema_arrow.names, str(file))
            rows = opened.metadata.num_rows
            for batch in opened.iter_batches(ROWS, columns=[field]):
                for record in batch.to_pylist():
                    done += 1
                    yield _field(record, field, f"{file} record {done}"), size * done // rows
    except need("pyarrow", "data").ArrowInvalid as error:
        raise UserError(f"{file} is not a whole Parquet file ({error}); bring it back or leave it out") from None


RECORDS = {"jsonl": _jsonl, "parquet": _parquet}


def _opened(file: Path) -> Any:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); make it readable or leave it out") from None


def _known_field(field: str, fields: Iterable[str], where: str) -> None:
    fields = list(fields)
    if field not in fields:
        raise UserError(
            f"{where} has no field {field!r}; it has {', '.join(fields) or 'none'}: add #FIELD to the source"
        )


def _field(record: Any, field: str, where: str) -> str:
    """The text of a record; none where it is null."""
    _known_field(field, record if isinstance(record, dict) else (), where)
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(
            f"{where} holds {type(text).__name__} in {field!r} and not text; name another field with #FIELD"
        )
    return text or ""


# the hub, and the packaged text


def _id_and_config(name: str) -> tuple[str, str | None]:
    """A folder's path is a name as it stands; on the hub, OWNER/NAME, and what follows is the config."""
    if Path(name).expanduser().is_dir():
        return name, None
    owner, *rest = name.split("/", 2)
    return "/".join([owner, *rest[:1]]), rest[1] if len(rest) > 1 else None


def _hub(known: Known, rule: str, revision: str | None) -> Source:
    datasets = need("datasets", "data")
    folder = Path(known.id).expanduser()
    licence = known.licence
    try:
        if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            if not folder.is_dir():
                info = need("huggingface_hub", "data").HfApi().dataset_info(known.id, revision=revision)
                revision, licence = info.sha, licence or str((info.card_data or {}).get("license") or "")
            loaded = datasets.load_dataset(known.id, known.config, revision=revision, streaming=known.streaming)
    except Exception as error:  # the packages raise what they like: no network, no such name, no such config
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{known.id} cannot be loaded by datasets {datasets.__version__} ({said}); check the network, the name, "
            "the config (hf:NAME/CONFIG) and --revision"
        ) from None
    held = loaded if isinstance(loaded, dict) else {"train": loaded}
    names = {"train": ("train",), "val": VAL_NAMES, "test": TEST_NAMES}
    found = {ours: next((name for name in theirs if name in held), None) for ours, theirs in names.items()}
    if found["train"] is None:
        raise UserError(f"{known.id} has no split train, only {', '.join(held)}; name a data set with text to train on")
    splits = {ours: _rows(known, held[name], name, rule) for ours, name in found.items() if name is not None}
    about = {
        "kind": "hf",
        "documents": rule,
        "id": folder.name if folder.is_dir() else known.id,
        "config": known.config,
        "revision": revision,
        "licence": licence or None,
        "field": known.field,
    }
    return Source(splits, about, val_fraction=known.val_fraction)


def _rows(known: Known, rows: Any, name: str, rule: str) -> Split:
    where = f"{known.id}, split {name},"
    fields = rows.column_names or list(next(iter(rows), {}))
    _known_field(known.field, fields, where)
    rows = rows.select_columns([known.field])

    def texts(skip: int) -> Texts:
        number = skip
        try:
            for batch in (rows.skip(skip) if skip else rows).iter(ROWS):
                for text in batch[known.field]:
                    number += 1
                    yield _field({known.field: text}, known.field, f"{where} record {number}"), number
        except UserError:
            raise
        except Exception as error:  # of the network or of a file, from whichever package was at work
            raise UserError(
                f"{where} could not be read after record {number} ({error}); run the same command again to go on"
            ) from None

    def read(skip: int) -> Iterator[Block]:
        return _records(texts(skip), rule) if rule == EACH else _without(_records(texts(0), rule), skip)

    told = (rows.info.splits or {}).get(name)
    return Split(read, getattr(rows, "num_rows", None) or (told.num_examples if told else None), "records")


def _packaged(name: str, rule: str) -> Source:
    """nanoGPT's split: the first nine tenths of the characters train, the rest validate."""
    text = shakespeare()
    cut = int(len(text) * 0.9)

    def split(part: str) -> Split:
        return Split(lambda skip: _without(documents_of(iter([(part, len(part))]), rule), skip), len(part))

    about = {"kind": "packaged", "documents": rule, "name": name, "licence": "public domain"}
    parts = {"train": split(text[:cut]), "val": split(text[cut:])}
    return Source(parts, about, PACKAGED[name], uncut=split(text))
