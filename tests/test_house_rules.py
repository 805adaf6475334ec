"""Rules of the house that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attnlab

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "attnlab"
MODULES = sorted(SRC.rglob("*.py"))
TEXTS = [
    *MODULES,
    *sorted(ROOT.glob("tests/*.py")),
    *sorted(ROOT.glob("benchmarks/*")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run")),
]

# A module may import from its own row and from rows above it, never from a row below.
ORDER = [
    {"errors", "files", "spec", "config", "results", "stats", "formatting"},
    {"device", "layers", "recording"},
    {"kernels"},
    {"cache", "ops", "documents", "feed_forward"},
    {"attention"},
    {"laws", "presets"},
    {"audit", "catalogue"},
    {"data"},
    {"model"},
    {"measure", "runs"},
    {"pretrained"},
    {"training", "convert"},
    {"inference"},
    {"hf"},
    {"evaluation", "costs", "heads"},
    {"terminal"},
    {"comparison"},
    {"report"},
    {"cli"},
]
RANK = {name: row for row, names in enumerate(ORDER) for name in names}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def top(file: Path) -> str:
    """The module or package of attnlab that a file belongs to."""
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """The modules of attnlab that `file` imports, those inside functions included."""
    package = ("attnlab", *file.relative_to(SRC).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full[:1] == ("attnlab",):
                yield from [full[1]] if full[1:] else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("attnlab."))


@pytest.mark.parametrize("file", [f for f in MODULES if top(f) not in ("__init__", "__main__")], ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    assert top(file) in RANK, f"{top(file)} has no place in the import order: give it one in ORDER"
    wrong = [name for name in imports(file) if RANK.get(name, -1) > RANK[top(file)]]
    assert not wrong, f"{name_of(file)} imports {', '.join(wrong)}, which come after it"


def test_the_order_names_what_is_there() -> None:
    planned = {
        "tasks",
        "convert",
        "evaluate",
        "heads",
    }  # named by the architecture, not built yet
    assert set(RANK) - planned <= {top(file) for file in MODULES}


def loaded_by(code: str) -> set[str]:
    """The top-level modules in memory after `code` ran in a process of its own."""
    show = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


EXTRAS = {
    "jax",
    "flax",
    "triton",
    "accelerate",
    "plotly",
    "beartype",
    "transformers",
    "datasets",
    "tokenizers",
    "tiktoken",
    "ray",
    "submitit",
    "tensorboard",
    "wandb",
    "trackio",
}


def test_importing_attnlab_is_light() -> None:
    loaded = loaded_by("import attnlab; attnlab.UserError, attnlab.RunConfig, attnlab.presets")
    assert not loaded & {*EXTRAS, "torch", "numpy", "rich", "tyro"}


def test_help_needs_no_torch() -> None:
    loaded = loaded_by("from attnlab.cli import main as cli; cli.main(['--help']); cli.main(['train', '--help'])")
    assert not loaded & {*EXTRAS, "torch", "numpy"}


def test_a_misspelt_mechanism_needs_no_torch() -> None:
    loaded = loaded_by("from attnlab.cli import main as cli; cli.main(['train', 'quick', '--mechanism', 'mlaa'])")
    assert not loaded & {*EXTRAS, "torch"}


def test_mechanisms_and_laws_need_no_extras() -> None:
    names = "[attention.build(name) for name in attention.names()]"
    loaded = loaded_by(
        "from attnlab import attention, laws\n"
        f"import attnlab.runs.folder, attnlab.inference.generate, attnlab.costs.bench\n{names}"
    )
    assert "torch" in loaded
    assert not loaded & EXTRAS


def test_the_report_needs_no_framework() -> None:
    assert not loaded_by("import attnlab.report") & {"torch", "jax", "numpy", "accelerate", "plotly"}


def test_public_names() -> None:
    assert attnlab.__all__ == [
        "__version__",
        "attention",
        "laws",
        "ops",
        "presets",
        "spec",
        "AttentionConfig",
        "CAUSAL",
        "Cache",
        "CacheSpec",
        "DataConfig",
        "Decoder",
        "Mask",
        "ModelConfig",
        "RunConfig",
        "TrainConfig",
        "UserError",
        "attend",
        "check_attention",
        "extend",
        "generate",
        "load_model",
        "patch",
        "record_attention",
        "record_losses",
        "rope",
    ]
    for name in attnlab.__all__:
        assert getattr(attnlab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attnd'"):
        attnlab.attnd  # noqa: B018


NAMES = "|".join(sorted(f.stem for f in (SRC / "attention").glob("*.py") if f.stem != "__init__"))
ASKED_BY_NAME = re.compile(rf"""(==|!=|\bin) *[(\[{{]? *["']({NAMES})["']""")


@pytest.mark.parametrize("file", [f for f in MODULES if top(f) not in ("attention", "presets")], ids=name_of)
def test_nobody_asks_for_a_mechanism_by_name(file: Path) -> None:
    asked = [line.strip() for line in file.read_text("utf-8").splitlines() if ASKED_BY_NAME.search(line)]
    assert not asked, f"{name_of(file)} asks by name; let the mechanism's Config say it: {asked}"


@pytest.mark.parametrize("file", sorted((SRC / "attention").glob("*.py")), ids=name_of)
def test_a_mechanism_reads_like_an_essay(file: Path) -> None:
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 160
    assert ast.get_docstring(ast.parse(text)), "it begins with the formula, the source and what is cached"


PERSONAL = re.compile(r"(?<![\w.])(/home/|/Users/|/root/|[A-Z]:\\\\)\w")
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


@pytest.mark.parametrize("file", TEXTS, ids=name_of)
def test_nothing_personal_and_nothing_unfinished(file: Path) -> None:
    text = file.read_text("utf-8")
    found = [match.group() for pattern in (PERSONAL, UNFINISHED) for match in pattern.finditer(text)]
    assert not found or file == Path(__file__), f"{name_of(file)} contains {found}"


def test_every_pin_is_exact_and_torch_comes_first() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][\w.]*( ; .+)?", pin) for pin in pins), pins


def test_everything_that_gets_installed_is_pinned() -> None:
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {canonicalize_name(name) for name in pins}
    seen, queue = {"attnlab"}, [Requirement("attnlab[all]")]
    while queue:
        wanted = queue.pop()
        try:
            found = metadata.requires(wanted.name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for line in found:
            needed = Requirement(line)
            extras = [{"extra": extra} for extra in (*wanted.extras, "")]
            if needed.marker and not any(needed.marker.evaluate(extra) for extra in extras):
                continue
            if needed.extras or canonicalize_name(needed.name) not in seen:
                seen.add(canonicalize_name(needed.name))
                queue.append(needed)
    assert not seen - pinned - {"attnlab"}, "constraints.txt lacks these"


@pytest.mark.parametrize(
    "words",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy", "--no-error-summary"]],
    ids=["lint", "format", "types"],
)
def test_the_tools_agree(words: list[str]) -> None:
    pytest.importorskip(words[0], reason=f"{words[0]} is not installed: pip install 'attnlab[dev]'")
    run = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
