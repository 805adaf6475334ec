"""Rules that cut text into documents.

each      a file of text, or a record of anything else (the rule where none is given)
line      a line
blank     the lines between empty lines
wikitext  an article, which begins with a line such as " = Title = " after an empty one

Any other rule is a delimiter: documents are what stands between it and the next, such as <|endoftext|>.

No rule loses a character: joined, the documents are the text again, but for the delimiters. A document with nothing in
it is left out; between delimiters, so is one with nothing but white space.

A split is read in blocks, each of which says whether it ends its document. So a document may be longer than memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..errors import choose

EACH = "each"
TITLE = re.compile(r" = (?!=).*(?<!=) = \n?")
RULES: dict[str, Callable[[str, str], bool]] = {  # (the line before, a line) -> whether the line begins a document
    "line": lambda before, line: True,
    "blank": lambda before, line: not before.strip() and bool(line.strip()),
    "wikitext": lambda before, line: not before.strip() and TITLE.fullmatch(line) is not None,
}
LONGEST = 1 << 20  # characters that are held until a document ends; a longer one is several blocks

Texts = Iterator[tuple[str, int]]  # parts of a text in order, each with how much of the file or split was read by then


class TextBlock(NamedTuple):
    """A document, or a part of one."""

    text: str
    last: bool  # it ends its document
    done: int  # how much of the split was read by then, in `sources.Split.unit`


def checked_rule(rule: str) -> str:
    """Return a rule: EACH, one of RULES, or a delimiter, in which \\n and \\t are a line feed and a tab.

    Raises `UserError` for an empty one, and for a word of small letters, which is a misspelt name.
    """
    if not rule or (rule.isascii() and rule.isalpha() and rule.islower()):
        choose("rule for --documents (a delimiter has a sign or a capital letter in it)", rule, [EACH, *RULES])
    return rule.replace("\\n", "\n").replace("\\t", "\t")


def is_delimiter(rule: str) -> bool:
    """Return whether a rule is a delimiter."""
    return rule != EACH and rule not in RULES


def documents_of(texts: Texts, rule: str) -> Iterator[TextBlock]:
    """Yield one text, which comes in parts, as the documents that `rule` makes of it."""
    if is_delimiter(rule):
        yield from _documents_between(texts, rule)
        return
    if rule != EACH:
        yield from _documents_of_lines(texts, RULES[rule])
        return
    done = 0
    for text, done in texts:
        yield TextBlock(text, False, done)
    yield TextBlock("", True, done)


def documents_of_records(records: Texts, rule: str) -> Iterator[TextBlock]:
    """Yield records as documents or, by another rule than EACH, as the lines of one text."""
    if rule != EACH:
        yield from documents_of(records, rule)
        return
    for text, done in records:
        yield TextBlock(text, True, done)


def _documents_of_lines(texts: Texts, begins: Callable[[str, str], bool]) -> Iterator[TextBlock]:
    before = ""
    done = 0
    held: list[str] = []  # lines of the document that are in no block yet
    size = 0  # their characters
    full = False  # whether the document has something in it: empty lines alone are none, and stay with what follows
    for line, done in _lines(texts):
        if full and begins(before, line):
            yield TextBlock("".join(held), True, done)
            held = []
            size = 0
            full = False
        if size > LONGEST:
            yield TextBlock("".join(held), False, done)
            held = []
            size = 0
        held.append(line)
        size += len(line)
        full = full or bool(line.strip())
        before = line
    yield TextBlock("".join(held), True, done)


def _documents_between(texts: Texts, delimiter: str) -> Iterator[TextBlock]:
    held = ""  # text of the document that is in no block yet
    begun = False  # whether a block of it was given
    done = 0
    for text, done in texts:
        *parts, held = (held + text).split(delimiter)
        for part in parts:
            if begun or part.strip():
                yield TextBlock(part, True, done)
            begun = False
        safe = len(held) - len(delimiter) + 1  # behind it a delimiter may have begun
        if safe > LONGEST and (begun or held[:safe].strip()):
            yield TextBlock(held[:safe], False, done)
            held = held[safe:]
            begun = True
    if begun or held.strip():
        yield TextBlock(held, True, done)


def _lines(texts: Texts) -> Texts:
    """Yield lines with their line feeds, which alone end a line: other signs that may end one stay inside."""
    rest = ""
    done = 0
    for text, done in texts:
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield f"{line}\n", done
    if rest:
        yield rest, done


def first_documents(blocks: Iterable[TextBlock], documents: int) -> Iterator[TextBlock]:
    """Yield the blocks of the first `documents` documents."""
    if documents <= 0:
        return
    for block in blocks:
        yield block
        if block.last:
            documents -= 1
        if not documents:
            return


def without_first_documents(blocks: Iterator[TextBlock], documents: int) -> Iterator[TextBlock]:
    """Return the blocks after the first `documents` documents."""
    if not documents:
        return blocks
    for block in blocks:
        if block.last:
            documents -= 1
        if not documents:
            break
    return blocks
