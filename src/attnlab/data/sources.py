"""A source of text: files of text, JSON lines or Parquet, or a data set of the Hugging Face hub.

A source has splits, and a split is read as blocks of text (`document_rules`).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, need
from ..files import expanded, regular
from .compressed import kind_inside, lines, opened, read_chunks
from .document_rules import (
    EACH,
    TextBlock,
    Texts,
    checked_rule,
    documents_of,
    documents_of_records,
    without_first_documents,
)
from .texts import shakespeare, visible_files

BLOCK = 1 << 20  # bytes that are read at a time
ROWS = 500  # records that are read at a time
VAL_NAMES = ("validation", "valid", "val", "dev")
TEST_NAMES = ("test",)


@dataclass(frozen=True)
class Split:
    """A part of a source, such as the text to train on."""

    read: Callable[[int], Iterator[TextBlock]]  # (documents to leave out at the beginning) -> the rest
    total: int | None  # size in `unit`; None: unknown
    unit: str = "bytes"  # of `total` and of `TextBlock.done`


@dataclass(frozen=True)
class Source:
    """An opened source."""

    splits: Mapping[str, Split]  # "train", and "val" and "test" where the source has them
    about: Mapping[str, Any]  # for the manifest: kind, revision, licence, ...
    tokenizer: str = "gpt2"  # if no other is asked for
    val_fraction: float = 0.1  # if no other is asked for
    uncut: Split | None = None  # train and val as one, where the cut between them was a choice


@dataclass(frozen=True)
class HubDataSet:
    """A data set that the package datasets reads, and how to read it."""

    id: str  # on the hub, or a local folder
    config: str | None = None  # of the data set; None: it has one
    field: str = "text"  # of a record: the text
    licence: str = ""  # empty: ask the hub
    documents: str = EACH  # the rule
    streaming: bool = False  # read while it downloads, because the whole is large
    val_fraction: float = 0.1  # share of the documents, where it has no validation split


KNOWN = {
    "tinystories": HubDataSet(id="roneneldan/TinyStories", licence="cdla-sharing-1.0"),
    "wikitext-2": HubDataSet(
        id="Salesforce/wikitext", config="wikitext-2-raw-v1", licence="cc-by-sa-3.0, gfdl", documents="wikitext"
    ),
    "wikitext-103": HubDataSet(
        id="Salesforce/wikitext", config="wikitext-103-raw-v1", licence="cc-by-sa-3.0, gfdl", documents="wikitext"
    ),
    "openwebtext": HubDataSet(id="Skylion007/openwebtext", licence="cc0-1.0", streaming=True, val_fraction=0.0005),
    "fineweb-edu": HubDataSet(
        id="HuggingFaceFW/fineweb-edu", config="sample-10BT", licence="odc-by", streaming=True, val_fraction=0.005
    ),
}
PACKAGED = {"shakespeare-char": "char", "shakespeare": "gpt2"}  # name -> tokenizer
NAMES = (*PACKAGED, *KNOWN)


def open_source(name: str, documents: str | None = None, revision: str | None = None) -> Source:
    """Open one of NAMES, hf:NAME[/CONFIG], text:PATH, jsonl:PATH or parquet:PATH; all but text may end in #FIELD.

    documents: a rule of `document_rules`; None: the source's own. revision: the hub's commit, branch or refs/pr/N;
    None: the newest commit. UserError where the source or the rule is unknown, or cannot be read.
    """
    if documents is not None:
        documents = checked_rule(documents)
    if name in PACKAGED:
        return _packaged(name, documents or EACH)
    if name in KNOWN:
        return _hub(KNOWN[name], documents or KNOWN[name].documents, revision)
    kind, _, rest = name.partition(":")
    path, _, field = rest.rpartition("#") if "#" in rest else (rest, "", "text")
    if kind == "text" and rest:
        return _files(kind, Path(rest), documents or EACH, _text_of, {})
    if kind in RECORDS and path and field:
        read = RECORDS[kind]
        return _files(kind, Path(path), documents or EACH, lambda file: read(file, field), {"field": field})
    if kind == "hf" and path and field:
        return _hub(HubDataSet(*_id_and_config(path), field=field, streaming=True), documents or EACH, revision)
    raise UserError(
        f"data source {name!r} is unknown; allowed are {', '.join(NAMES)}, hf:NAME[/CONFIG], text:PATH, "
        "jsonl:PATH#FIELD and parquet:PATH#FIELD"
    )


def read_documents(name: str) -> list[str]:
    """Return the documents of a source's training part, all of which fits into memory; empty ones are left out.

    UserError where there is none, and as `open_source` has it.
    """
    documents: list[str] = []
    pieces: list[str] = []
    for text, last, _ in open_source(name).splits["train"].read(0):
        pieces.append(text)
        if last:
            documents.append("".join(pieces))
            pieces.clear()
    found = [text for text in (*documents, "".join(pieces)) if text]
    if not found:
        raise UserError(f"{name} has no text in it: give records with text")
    return found


# files


def _files(kind: str, path: Path, rule: str, read: Callable[[Path], Texts], about: Mapping[str, Any]) -> Source:
    path = expanded(path)
    if not regular(path).exists():
        raise UserError(f"{path} does not exist; {kind}:PATH needs a file or a folder of such files")
    found = [path] if path.is_file() else sorted(visible_files(path), key=lambda file: file.relative_to(path).parts)
    files = [file for file in found if kind == "text" or path.is_file() or kind_inside(file) == f".{kind}"]
    if not files:
        raise UserError(f"{path} holds no {'' if kind == 'text' else f'.{kind} '}file; name another folder or a file")
    cut = documents_of if kind == "text" else documents_of_records
    sizes = [file.stat().st_size for file in files]

    def blocks() -> Iterator[TextBlock]:
        before = 0
        for file, size in zip(files, sizes, strict=True):
            for text, last, done in cut(read(file), rule):
                yield TextBlock(text, last, before + done)
            before += size

    listed = [{"name": file.name, "bytes": size} for file, size in zip(files, sizes, strict=True)]
    split = Split(lambda skip: without_first_documents(blocks(), skip), sum(sizes))
    return Source({"train": split}, {"kind": kind, "documents": rule, **about, "files": listed})


def _text_of(file: Path) -> Texts:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    first = True
    with opened(file) as (stream, raw):
        for chunk in read_chunks(stream, BLOCK):
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise UserError(
                    f"{file} is not UTF-8: byte {error.object[error.start]:#04x} in line {line}; save it as UTF-8, or "
                    "take it out of the folder if it is not text"
                ) from None
            yield text.removeprefix("\ufeff") if first else text, raw.tell()
            line += chunk.count(b"\n")
            first = False


def _jsonl(file: Path, field: str) -> Texts:
    with opened(file) as (stream, raw):
        for number, line in enumerate(lines(stream, BLOCK), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file} line {number} is not JSON in UTF-8 ({error}); mend it or leave it out"
                ) from None
            yield _field(record, field, f"{file} line {number}"), raw.tell()


def _parquet(file: Path, field: str) -> Texts:
    parquet = need("pyarrow.parquet", "data")
    size = file.stat().st_size
    done = 0
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


def _known_field(field: str, fields: Iterable[str], where: str) -> None:
    fields = list(fields)
    if field not in fields:
        raise UserError(
            f"{where} has no field {field!r}; it has {', '.join(fields) or 'none'}: add #FIELD to the source"
        )


def _field(record: Any, field: str, where: str) -> str:
    """Return the text of a record; an empty one where it is null."""
    _known_field(field, record if isinstance(record, dict) else (), where)
    text = record[field]
    if not isinstance(text, str | None):
        raise UserError(
            f"{where} holds {type(text).__name__} in {field!r} and not text; name another field with #FIELD"
        )
    return text or ""


# the hub, and the packaged text


def _id_and_config(name: str) -> tuple[str, str | None]:
    """Return a data set's name and config. A folder's path is a name; on the hub, it is OWNER/NAME[/CONFIG]."""
    if expanded(name).is_dir():
        return name, None
    parts = name.split("/", 2)
    config = parts[2] if len(parts) > 2 else None
    return "/".join(parts[:2]), config


def _hub(known: HubDataSet, rule: str, revision: str | None) -> Source:
    datasets = need("datasets", "data")
    folder = expanded(known.id)
    licence = known.licence
    try:
        if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            if not folder.is_dir():
                info = need("huggingface_hub", "data").HfApi().dataset_info(known.id, revision=revision)
                revision = info.sha
                licence = licence or str((info.card_data or {}).get("license") or "")
            loaded = datasets.load_dataset(known.id, known.config, revision=revision, streaming=known.streaming)
    except Exception as error:  # the packages raise what they like: no network, no such name, no such config
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{known.id} cannot be loaded by datasets {datasets.__version__} ({said}); check the network, the name, "
            "the config (hf:NAME/CONFIG) and --revision"
        ) from None
    held = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits = {}
    for ours, theirs in {"train": ("train",), "val": VAL_NAMES, "test": TEST_NAMES}.items():
        name = next((name for name in theirs if name in held), None)
        if name is not None:
            splits[ours] = _rows(known, held[name], name, rule)
        elif ours == "train":
            raise UserError(
                f"{known.id} has no split train, only {', '.join(held)}; name a data set with text to train on"
            )
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


def _rows(known: HubDataSet, rows: Any, name: str, rule: str) -> Split:
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

    def read(skip: int) -> Iterator[TextBlock]:
        if rule == EACH:  # a document is a record
            return documents_of_records(texts(skip), rule)
        return without_first_documents(documents_of_records(texts(0), rule), skip)

    told = (rows.info.splits or {}).get(name)
    return Split(read, getattr(rows, "num_rows", None) or (told.num_examples if told else None), "records")


def _packaged(name: str, rule: str) -> Source:
    """Return Shakespeare in nanoGPT's split: the first nine tenths of the characters train, the rest validate."""
    text = shakespeare()
    cut = int(len(text) * 0.9)

    def split(part: str) -> Split:
        def read(skip: int) -> Iterator[TextBlock]:
            return without_first_documents(documents_of(iter([(part, len(part))]), rule), skip)

        return Split(read, len(part))

    about = {"kind": "packaged", "documents": rule, "name": name, "licence": "public domain"}
    parts = {"train": split(text[:cut]), "val": split(text[cut:])}
    return Source(parts, about, PACKAGED[name], uncut=split(text))
