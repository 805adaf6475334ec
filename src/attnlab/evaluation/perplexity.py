"""Perplexity of documents that a model was not trained on: each real token counts once, however it is batched.

A document is predicted in windows of at most C tokens. The first window predicts the token after each of its tokens.
Each later one ends S tokens (the stride) further on and predicts those S, with at least C - S tokens before each. The
last one begins earlier, so that it too is full. S = C reads every token once. A smaller stride costs C / S times as
much and shows more of the past to each token. lm_eval rolls like this with S = C. The strided perplexity of
transformers' guide is S < C with one token more of `max_length`, but its last window may be short.

Where the tokenizer has an end-of-document token, it stands before the first token, which is then predicted too. So does
the token with which a pretrained model's documents begin, where it has one. Neither is predicted: they are not text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import data, pretrained
from ..config import DataConfig
from ..data.load import WHOLE
from ..data.shards import SPLITS, Prepared
from ..data.tasks import task_of
from ..data.tokenizer import Tokenizer
from ..data.tokens import UNKNOWN, Tokens
from ..device import find_device
from ..errors import UserError, choose
from ..inference.generate import evaluating
from ..model import Decoder
from ..ranges import Count, Size, check_fields, checked
from ..results import EvalResult, Tell
from ..runs.folder import RunFolder
from ..runs.tensors import computed
from .overlap import seen_share
from .text_size import holds, text_bytes

SHELF = 1024  # windows that are sorted by length together, so that little is padded
LOGITS = 1 << 24  # numbers held at once: a long context times a large vocabulary would not fit

Ids = Sequence[int] | np.ndarray


class Window(NamedTuple):
    """The inputs `start` to `stop` of a document, and the number of targets that count: the last ones."""

    document: int
    start: int
    stop: int
    scored: int


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, scored) of the windows in which `length` tokens in a row are each predicted once."""
    done = 0
    while done < length:
        stop = min(done + (stride if done else context), length)
        yield max(0, stop - context), stop, stop - done
        done = stop


class ScoredDocuments:
    """Documents as they are predicted: a token in front, where there is one, and none that only ends them."""

    def __init__(self, documents: Tokens | Iterable[Ids], end: int | None = None, front: Size | None = None) -> None:
        self.tokens = tokens = documents if isinstance(documents, Tokens) else joined(documents)
        self.front = front
        self.starts = tokens.documents
        stops = np.append(tokens.documents[1:], len(tokens))
        if end is not None and len(tokens):
            stops = stops - (tokens.gather(np.maximum(stops - 1, 0), 1)[:, 0].numpy() == end)
        self.lengths = np.maximum(stops - self.starts - (front is None), 0)  # tokens to predict

    def inputs(self, document: int, start: int, stop: int) -> Tensor:
        """Return tokens `start` to `stop` of a document, counted from the one in front."""
        at = int(self.starts[document])
        if self.front is None:
            return self.tokens.read(at + start, at + stop)
        read = self.tokens.read(at + max(start - 1, 0), at + stop - 1)
        return read if start else torch.cat([torch.tensor([self.front]), read])

    def windows(self, context: int, stride: int) -> Iterator[Window]:
        """Yield the windows of all documents."""
        for document, length in enumerate(self.lengths.tolist()):
            for window in windows(length, context, stride):
                yield Window(document, *window)

    def bytes(self, tokenizer: Tokenizer) -> int | None:
        """Return the UTF-8 bytes of the text of all tokens that are predicted.

        They are those of the text as it was, with what the tokenizer does not know. None where nobody knows them.
        """
        first = self.starts + 1 if self.front is None else self.starts
        count = partial(text_bytes, tokenizer, self.tokens)
        known = self.tokens.text_bytes
        if known == UNKNOWN or (known is None and holds(self.tokens, tokenizer.unknown)):
            return None
        if known is not None:
            return known - sum(map(count, self.starts.tolist(), first.tolist()))
        return sum(map(count, first.tolist(), (first + self.lengths).tolist()))


def joined(documents: Iterable[Ids]) -> Tokens:
    """Return token lists as one row. Empty ones have nothing to predict, and are left out."""
    full = [row for row in map(np.asarray, documents) if row.size or row.ndim != 1]
    if not all(row.ndim == 1 and row.dtype.kind in "iu" for row in full):
        raise UserError("documents are no rows of token ids: give one row for each")
    return Tokens.of(np.concatenate(full), np.cumsum([0, *map(len, full[:-1])])) if full else Tokens([])


@torch.inference_mode()
@checked
def evaluate(
    model: Decoder,
    documents: Tokens | Iterable[Ids],
    *,
    context: Count | None = None,
    stride: Count | None = None,
    batch_size: Count = 8,
    tokenizer: Tokenizer | None = None,
    front: Size | None = None,
    progress: Tell = lambda what, done, of: None,
) -> EvalResult:
    """Return how well `model` predicts `documents`: token lists, or a row of tokens that knows where documents begin.

    `context` is the longest window (None: the model's), `stride` how far one ends from the next (None: the context).
    `tokenizer` names the end-of-document token and counts bytes; without it there is none, and `bits_per_byte` is None.
    `front` is the token before each document (None: the end-of-document token). `progress` is told (what, tokens done,
    tokens in all). Raises `UserError` for what does not fit the model, and where there is nothing to predict.

    One text as lm_eval's rolling log-likelihood sees it: `evaluate(model, [tokenizer.encode(text)],
    tokenizer=tokenizer)`, times -tokens.
    """
    context, stride = fitting(model, context, stride, batch_size)
    end = None if tokenizer is None else tokenizer.end
    scored = ScoredDocuments(documents, end, end if front is None else front)
    total = int(scored.lengths.sum())
    if not total:
        raise UserError("there is no token to predict: give text of at least two tokens")
    began = time.perf_counter()
    sums = LossSums(len(scored.lengths), context)
    with evaluating(model):
        for part in batches(scored.windows(context, stride), batch_size):
            sums.add(model, scored, part)
            progress("tokens predicted", sums.tokens, total)
    seconds = time.perf_counter() - began
    assert sums.tokens == total
    loss = float(sums.by_document.sum() / total)
    size = None if tokenizer is None else scored.bytes(tokenizer)
    return EvalResult(
        context=context,
        stride=stride,
        tokens=total,
        documents=int((scored.lengths > 0).sum()),
        bytes=size,
        loss=loss,
        stderr=ratio_error(sums.by_document, scored.lengths),
        perplexity=math.exp(min(loss, 700.0)),  # beyond, it is no longer a float
        bits_per_byte=loss * total / math.log(2) / size if size else None,
        by_position=binned(*sums.by_seen),
        seconds=seconds,
        tokens_per_s=total / seconds,
    )


class LossSums:
    """The sums of losses (nats) over the tokens that were predicted so far."""

    def __init__(self, documents: int, context: int) -> None:
        self.tokens = 0
        self.by_document = np.zeros(documents)
        self.by_seen = np.zeros((2, context))  # losses, and how many, of tokens that had 1, 2, ... tokens before them

    def add(self, model: Decoder, documents: ScoredDocuments, part: Sequence[Window]) -> None:
        """Predict the tokens of a batch of windows, and add their losses."""
        tokens, positions, targets = padded(documents, part, model)
        rows, columns = (at.numpy() for at in (targets >= 0).nonzero(as_tuple=True))
        losses = computed(token_losses(model, tokens, targets, positions)).numpy()
        np.add.at(self.by_document, np.array([window.document for window in part])[rows], losses)
        np.add.at(self.by_seen[0], columns, losses)
        np.add.at(self.by_seen[1], columns, 1)
        self.tokens += len(losses)


def fitting(model: Decoder, context: int | None, stride: int | None, batch_size: int) -> tuple[int, int]:
    """Return context and stride. Raises `UserError` where the model cannot have them, and for a bad batch size."""
    trained = model.config.context
    context = trained if context is None else context
    stride = context if stride is None else stride
    if context < 1 or (context > trained and model.place is not None):
        limit = f"from 1 to {trained}, its learned positions" if model.place is not None else "1 or more"
        raise UserError(f"the context is {context}: for this model give {limit}")
    if not 1 <= stride <= context:
        raise UserError(f"the stride is {stride}: give from 1 to the context, {context}")
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: give 1 or more")
    return context, stride


def batches(found: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Yield windows in batches of similar length."""
    found = iter(found)
    while shelf := list(islice(found, SHELF)):
        shelf.sort(key=lambda window: window.stop - window.start, reverse=True)
        yield from (shelf[i : i + size] for i in range(0, len(shelf), size))


def padded(documents: ScoredDocuments, part: Sequence[Window], model: Decoder) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return tokens, positions and targets, int64 [B L]: padding is on the right, at position -1.

    A target of -1 does not count. There are no positions where nothing is padded. Raises `UserError` for a token that
    the model's vocabulary lacks.
    """
    lengths = torch.tensor([window.stop - window.start for window in part])
    width = int(lengths.max())
    tokens = torch.zeros(len(part), width, dtype=torch.long)
    targets = torch.full((len(part), width), -1)
    for row, (document, start, stop, scored) in enumerate(part):
        ids = documents.inputs(document, start, stop + 1)
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, stop - start - scored : stop - start] = ids[-scored:]
    vocabulary = model.config.vocab_size
    if max(int(tokens.max()), int(targets.max())) >= vocabulary or int(tokens.min()) < 0:
        raise UserError(f"there are token ids that the model's vocabulary of {vocabulary} lacks: give text of its own")
    column = torch.arange(width).expand(len(part), -1)
    positions = None if (lengths == width).all() else torch.where(column < lengths[:, None], column, -1)
    return tokens, positions, targets


def token_losses(model: Decoder, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return -log p of every target that counts (not -1), in nats, row by row: float64 on the CPU."""
    device = model.embed.weight.device
    x, _ = model.hidden(tokens.to(device), None if positions is None else positions.to(device))
    counts = targets >= 0
    x = x[counts.to(device)]
    wanted = targets[counts].to(device)
    rows = max(1, LOGITS // model.config.vocab_size)
    losses = []
    for part, ids in zip(x.split(rows), wanted.split(rows), strict=True):
        logits = model.head(part)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(exact, ids, reduction="none").double().cpu())
    return torch.cat(losses)


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of sum(sums) / sum(counts) over documents; None for fewer than two documents.

    Documents are drawn whole, as neighbouring tokens are not independent: this is the ratio estimator (Cochran 1977,
    section 6.3).
    """
    number = int((counts > 0).sum())
    if number < 2:
        return None
    rest = sums - sums.sum() / counts.sum() * counts
    return float(math.sqrt(number / (number - 1) * (rest**2).sum()) / counts.sum())


def binned(losses: np.ndarray, counts: np.ndarray) -> list[list[float]]:
    """Return [first, last, tokens, loss] by the number of tokens before the one predicted: 1, 2, 3-4, 5-8, ..."""
    bins = []
    first = 0
    while first < len(losses):
        last = min(max(2 * first, 1), len(losses))
        if count := counts[first:last].sum():
            bins.append([first + 1, last, int(count), float(losses[first:last].sum() / count)])
        first = last
    return bins


@dataclass(frozen=True)
class Rolling:
    """The windows in which documents are predicted."""

    context: Count | None = None  # tokens of the longest window; None: the model's
    stride: Count | None = None  # tokens from the end of a window to the end of the next; None: the context
    batch_size: Count = 8  # windows side by side; it changes the speed and nothing else

    def __post_init__(self) -> None:
        check_fields(self)


@checked
def evaluate_source(
    source: str | Path,
    data_source: str | None = None,
    split: str = "val",
    *,
    rolling: Rolling = Rolling(),
    checkpoint: Size | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Tell = lambda what, done, of: None,
) -> EvalResult:
    """Return `evaluate` of the model that `pretrained.load` opens, on the text that `data_source` names.

    `data_source` None: what a run was trained on. `split` is "val", "test" or "train"; a text file that the run was not
    trained on has no parts and is taken whole. Raises `UserError` where most of the text is found in what the run was
    trained on, unless that was asked for.
    """
    choose("split", split, SPLITS)
    where = find_device(device)
    loaded = pretrained.load(source, checkpoint=checkpoint, device=where, trust=trust)
    if loaded.tokenizer is None:
        raise UserError(f"{source} has no tokenizer, so no text can be given to it: put its tokenizer.json beside it")
    folder = RunFolder.open(source) if loaded.family == pretrained.RUN else None
    config, own = data_of(source, folder, data_source)
    training = None if folder is None else trained_on(folder)
    if own and training is None:
        raise UserError(
            f"what {source} was trained on, {config.source!r}, is gone or has changed, so nobody knows what is held "
            "out: bring it back, or name a text with --data"
        )
    tokens, part = in_tokens(config, split, loaded.tokenizer, whole=not own)
    seen = None if training is None or split == "train" else seen_share(tokens, training)
    if seen is not None and seen > 0.5:
        raise UserError(
            f"{seen:.0%} of the passages looked for in {config.source!r} are in the training part of {source}: give "
            f"text that it was not trained on{', or say --split train' if own else ''}"
        )
    found = evaluate(
        loaded.model, tokens, **vars(rolling), tokenizer=loaded.tokenizer, front=loaded.front, progress=progress
    )
    return replace(
        found,
        model=str(source),
        mechanism="+".join(dict.fromkeys(loaded.model.config.mechanisms)),
        step=loaded.about.get("step"),
        data=config.source,
        split=part,
        seen=seen,
    )


def data_of(source: str | Path, folder: RunFolder | None, data_source: str | None) -> tuple[DataConfig, bool]:
    """Return the text to evaluate on, and whether it is the one that the run in `folder` was trained on.

    Raises `UserError` where nothing says which text, and for a synthetic task.
    """
    if data_source is None and folder is None:
        raise UserError(f"{source} does not say what it was trained on: say what to evaluate it on with --data")
    own = folder is not None and data_source in (None, folder.config.data.source)
    config = folder.config.data if folder and own else DataConfig(source=data_source or "")
    if (task := task_of(config)) is not None:
        raise UserError(f"{config.source!r} is a synthetic task and no text: attnlab compare {task.name} examines it")
    return config, own


def trained_on(folder: RunFolder) -> Tokens | None:
    """Return the training part of a run's corpus; None where it is gone or has changed."""
    try:
        corpus = data.load(folder.config.data)
    except UserError:
        return None
    return corpus.train if corpus.fingerprint == folder.about["data"]["fingerprint"] else None


def in_tokens(config: DataConfig, split: str, tokenizer: Tokenizer, whole: bool = False) -> tuple[Tokens, str]:
    """Return a part of the text that `config` names, in the tokens of `tokenizer`, and which part it is.

    `whole`: a text file has no parts, and all of it is returned. Raises `UserError` for a part that is not there.
    """
    kind, _, path = config.source.partition(":")
    if whole and kind in WHOLE:
        if split != "val":
            raise UserError(f"{config.source!r} has no parts, as the model was not trained on it: leave the split out")
        return encoded(WHOLE[kind](config.source), tokenizer), "all"
    corpus: Prepared | data.Corpus = Prepared.open(path) if kind == "prepared" else data.load(config)
    if isinstance(corpus, data.Corpus):
        choose(f"split of {config.source}", split, ("val", "train"))
    tokens = corpus.split(split)
    if corpus.tokenizer.fingerprint == tokenizer.fingerprint:
        return tokens, split
    bounds = zip(tokens.documents, [*tokens.documents[1:], len(tokens)], strict=True)
    texts = (corpus.tokenizer.decode(tokens.read(*at).tolist()) for at in bounds)
    return encoded(texts, tokenizer, tokens.text_bytes), split


def encoded(texts: Iterable[str], tokenizer: Tokenizer, text_bytes: int | None = None) -> Tokens:
    """Return texts as documents in a row. text_bytes: of these texts before they were tokens; None: as they are."""
    sizes: list[int] = []

    def ids() -> Iterator[np.ndarray]:
        for text in texts:
            sizes.append(len(text.encode("utf-8", "surrogatepass")))
            yield tokenizer.encode_array(text)

    found = joined(ids())
    if text_bytes is not None or not tokenizer.complete:
        found.text_bytes = sum(sizes) if text_bytes is None else text_bytes
    return found
