"""What the documents show is run, and what a machine can make in them, a machine made."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnlab import attention, catalogue, laws
from attnlab.cli import COMMANDS
from attnlab.cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"<!-- ([\w: .-]+) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def blocks(kind: str, mark: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of this kind under a comment with this mark."""
    found = []
    for page in PAGES:
        for marked, language, text in FENCE.findall(page.read_text("utf-8")):
            if language == kind and marked == mark:
                found.append((page.name, text))
    return found


CONSOLE, PYTHON = blocks("console", "test"), blocks("python", "test")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(
    audited_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str]]:
    """Run a command line that begins with attnlab; its exit code and what it printed."""

    def run(command: str) -> tuple[int, str]:
        words = shlex.split(command)
        assert words[0] == "attnlab"
        monkeypatch.setattr(sys, "argv", words)
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.mark.parametrize("page, text", CONSOLE, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CONSOLE)])
def test_commands_work_as_written(page: str, text: str, elsewhere: Path, run: Callable[[str], tuple[int, str]]) -> None:
    for command in text.strip().splitlines():
        code, said = run(command)
        assert code == 0, f"{page}: {command}\n{said}"


@pytest.mark.parametrize("page, text", PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_works_as_pasted(page: str, text: str, elsewhere: Path) -> None:
    exec(compile(text, page, "exec"), {"__name__": "pasted"})


def test_the_recurrent_example_works_as_pasted(elsewhere: Path, run: Callable[[str], tuple[int, str]]) -> None:
    [(_, text)] = blocks("python", "file: retention.py")
    (elsewhere / "retention.py").write_text(text)
    code, said = run("attnlab audit retention.py:Attention")
    assert code == 0, said
    assert "pads anywhere" in said and "obeys all" in said


def test_the_readmes_mechanism_works_as_pasted(
    elsewhere: Path, run: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    [(_, text)] = blocks("python", "file: shared_kv.py")
    (elsewhere / "shared_kv.py").write_text(text)
    code, said = run("attnlab audit shared_kv.py:Attention")
    assert code == 0, said
    assert "obeys all" in said

    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(elsewhere)])  # as if it lay in the folder
    attention._own.cache_clear()
    try:
        assert "shared_kv" in attention.names()
        short = "--train.steps 4 --train.eval-every 2 --train.eval-batches 1"
        code, said = run(f"attnlab train quick --mechanism shared_kv --out runs/mine {short}")
        assert code == 0, said
        code, said = run("attnlab sample runs/mine --prompt 'ROMEO:' --tokens 5")
        assert code == 0, said
        code, said = run("attnlab heads runs/mine --json")
        assert code == 0, said
    finally:
        attention._own.cache_clear()
        sys.modules.pop("attnlab.attention.shared_kv", None)


def generated(page: str, mark: str) -> str:
    text = (ROOT / "docs" / page).read_text("utf-8")
    found = re.search(rf"<!-- {re.escape(mark)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"docs/{page} has lost its <!-- {mark} --> marks"
    return found.group(1)


def test_the_table_of_mechanisms_is_fresh() -> None:
    records = [r for r in catalogue.listing() if r.get("package") == "attnlab" and r["name"] in named()]
    assert generated("mechanisms.md", "attnlab list --markdown") == catalogue.markdown(records), (
        "docs/mechanisms.md is out of date: put the output of 'attnlab list --markdown' between its marks"
    )


def named() -> set[str]:
    """The mechanisms in the table of docs/mechanisms.md."""
    table = generated("mechanisms.md", "attnlab list --markdown")
    return set(re.findall(r"^\| \*\*(\w+)\*\* \|", table, re.MULTILINE))


def test_every_mechanism_that_is_committed_is_in_the_table() -> None:
    """A file that lies in the folder and that git does not know yet is somebody's first attempt, and needs no row."""
    listed = subprocess.run(
        ["git", "ls-files", "src/attnlab/attention"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    committed = {Path(line).stem for line in listed.stdout.split()}
    missing = (attention._own() & committed) - named()
    assert not missing, f"{', '.join(sorted(missing))}: put the output of 'attnlab list --markdown' into the table"


def test_the_table_of_laws_is_fresh() -> None:
    rows = [f"| {law.name} | {law.statement} |\n" for law in laws.LAWS.values()]
    table = "| law | what it says |\n| --- | --- |\n" + "".join(rows)
    assert generated("laws.md", "laws") == table, f"docs/laws.md is out of date; it should hold:\n{table}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_verb_and_no_other_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"^\| `attnlab (\w+)", readme, re.MULTILINE))
    assert named == set(COMMANDS)


def test_options_in_the_documents_exist(run: Callable[[str], tuple[int, str]]) -> None:
    """Every --option that stands beside an attnlab command is in that command's help."""
    verbs = "|".join(COMMANDS)
    helps: dict[str, str] = {}
    for page in PAGES:
        for verb, rest in re.findall(rf"attnlab ({verbs})\b([^`\n]*)", page.read_text("utf-8")):
            if verb not in helps:
                helps[verb] = f"{run(f'attnlab {verb} --help')[1]} --help --debug"
            for option in re.findall(r"(?<!\S)--[a-z][\w.-]*", rest):
                assert option in helps[verb], f"{page.name}: attnlab {verb} has no {option}"
