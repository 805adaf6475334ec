"""Rules of the house that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
    *sorted(ROOT.glob("tests/**/*.py")),
    *sorted(ROOT.glob("benchmarks/*")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run")),
]

# A room or a module at the root imports from those above it, never from one below.
ORDER = [
    "errors",
    "ranges",
    "formatting",
    "stats",
    "spread",
    "results",
    "contrasts",
    "unfinished",
    "files",
    "spec",
    "plugins",
    "config",
    "device",
    "arguments",
    "layers",
    "normed_heads",
    "recording",
    "kernels",
    "cache",
    "documents",
    "ops",
    "scan",
    "recurrence",
    "feed_forward",
    "attention",
    "model",
    "hybrids",
    "presets",
    "catalogue",
    "laws",
    "audit",
    "data",
    "runs",
    "measure",
    "pretrained",
    "hub",
    "convert",
    "heads",
    "training",
    "inference",
    "hf",
    "evaluation",
    "costs",
    "terminal",
    "comparison",
    "report",
    "cli",
]

# Folders in which every file has the same doors, so that the listing is the registry.
LISTINGS = (
    "attention",
    "cli",
    "convert/targets",
    "kernels",
    "pretrained/families",
    "report/sections",
    "training/strategies",
)
NAMES = sorted(f.stem for f in (SRC / "attention").glob("*.py") if f.stem != "__init__")
HOMONYMS = {"linear"}  # a rule of rotary scaling and an operation of PyTorch have this name too
# These speak of mechanisms by name: presets, the default of a model, and what a model is converted into or read from.
NAME_MECHANISMS = ("attention/", "presets.py", "hybrids.py", "config.py", "convert/", "pretrained/families/")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def inside(file: Path, *folders: str) -> bool:
    """Whether a file of the package lies in one of `folders` or is one of these files."""
    return str(file.relative_to(SRC)).startswith(folders)


def top(file: Path) -> str:
    """The module or room of attnlab that a file belongs to."""
    return file.relative_to(SRC).parts[0].removesuffix(".py")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for file in MODULES:
        parts = ["attnlab", *file.relative_to(SRC).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path) -> Iterator[tuple[ast.ImportFrom, str, str]]:
    """Each name that `file` imports from attnlab: the statement, the module, the name. Those inside functions and
    under TYPE_CHECKING included."""
    package = ("attnlab", *file.relative_to(SRC).parts[:-1])
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if full[:1] == ("attnlab",):
                yield from ((node, ".".join(full), alias.name) for alias in node.names)


def needed(file: Path) -> set[str]:
    """The modules of attnlab that `file` imports, by dotted name."""
    known = modules()
    found = {f"{base}.{name}" if f"{base}.{name}" in known else base for _, base, name in imported(file)}
    return {name for name in found if known[name] != file}


@pytest.mark.parametrize("file", [f for f in MODULES if top(f) not in ("__init__", "__main__")], ids=name_of)
def test_imports_point_down(file: Path) -> None:
    assert top(file) in ORDER, f"{top(file)} has no place in the import order: give it one in ORDER"
    rooms = {name.split(".")[1] for name in needed(file) if "." in name}
    wrong = sorted(room for room in rooms - {top(file)} if ORDER.index(room) > ORDER.index(top(file)))
    assert not wrong, f"{name_of(file)} imports {', '.join(wrong)}, which come after it"


def test_the_order_names_what_is_there() -> None:
    assert set(ORDER) == {top(file) for file in MODULES} - {"__init__", "__main__"}
    assert len(set(ORDER)) == len(ORDER)


def test_no_file_imports_itself_through_others() -> None:
    graph = {name: needed(file) for name, file in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other in a circle: {' -> '.join(error.args[1])}")


def findings(rule: str) -> list[str]:
    """FILE:LINE: what breaks `rule`, over the whole package."""
    return [f"{name_of(file)}:{line}: {what}" for file in MODULES for line, what in RULES[rule](file)]


Found = Iterator[tuple[int, str]]


def foreign_underscores(file: Path) -> Found:
    known = modules()
    aliases = {name for _, base, name in imported(file) if f"{base}.{name}" in known}
    for node, _, name in imported(file):
        if name.startswith("_") and not name.startswith("__"):
            yield node.lineno, f"imports {name}"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                yield node.lineno, f"uses {node.value.id}.{node.attr}"


def nested_conditions(file: Path) -> Found:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.IfExp):
            if any(isinstance(part, ast.IfExp) for part in ast.walk(node) if part is not node):
                yield node.lineno, "a conditional expression inside another"


def hidden_statements(file: Path) -> Found:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(argument, ast.NamedExpr) for argument in arguments):
                yield node.lineno, "an assignment inside an argument"
        elif isinstance(node, ast.Nonlocal):
            yield node.lineno, "nonlocal: a class that has not been written"
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            if len(node.generators) > 2:
                yield node.lineno, "a comprehension with more than two 'for'"
        elif isinstance(node, ast.Assign) and several(node):
            yield node.lineno, "several statements in one assignment"


def several(node: ast.Assign) -> bool:
    """Whether `a, b = x, y` is two calls, or three values; a swap is neither."""
    target, value = node.targets[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return False
    if {ast.unparse(part) for part in target.elts} == {ast.unparse(part) for part in value.elts}:
        return False
    calls = sum(any(isinstance(part, ast.Call) for part in ast.walk(element)) for element in value.elts)
    return calls > 1 or len(value.elts) > 2


# Words that say neither what is done nor what is returned.
OPENINGS = set("What Of Whoever Where Who Whose Which How Whatever Wherever As By From To In On With At For".split())
OPENINGS |= set("Until Once If And Or So Nothing".split())


def docstring_openings(file: Path) -> Found:
    if inside(file, "laws/"):  # the first line of a law is the law
        return
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            said = ast.get_docstring(node)
            if said and said.split()[0].strip(",:;.`\"'") in OPENINGS:
                yield node.lineno, f"the docstring of {node.name} begins with {said.split()[0]!r}"


def lengths(file: Path) -> Found:
    lines = len(file.read_text("utf-8").splitlines())
    limit = 160 if inside(file, "attention/") else 400
    if lines > limit:
        yield 1, f"{lines} lines, and the limit is {limit}"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef) and not inside(file, "cli/"):
            own = (node.end_lineno or node.lineno) - node.lineno + 1
            if own > 60:
                yield node.lineno, f"{node.name} has {own} lines, and the limit is 60"


def names_of_mechanisms(file: Path) -> Found:
    """Strings that are a mechanism's name, be they keys, members of a tuple or compared; and its module."""
    if inside(file, *NAME_MECHANISMS):
        return
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Constant) and node.value in NAMES and node.value not in HOMONYMS:
            yield node.lineno, f"names the mechanism {node.value!r}"
    for node, base, name in imported(file):
        if base.startswith("attnlab.attention.") or (base == "attnlab.attention" and name in NAMES):
            yield node.lineno, f"imports the mechanism {base.rpartition('.')[2]}.{name}"


RULES = {
    "no underscore of another module": foreign_underscores,
    "no condition in a condition": nested_conditions,
    "one statement does one thing": hidden_statements,
    "a docstring begins with a verb or with what is returned": docstring_openings,
    "files and functions are short": lengths,
    "nobody asks for a mechanism by name": names_of_mechanisms,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str) -> None:
    found = findings(rule)
    assert not found, "\n".join([f"{rule}:", *found])


# Public names that are defined more than once, because the room says the rest: `data.load` and `pretrained.load`.
TWICE = {"load", "names", "table"}


def test_a_public_name_is_defined_once() -> None:
    places = defaultdict(list)
    for file in MODULES:
        if not inside(file, *(f"{folder}/" for folder in LISTINGS)):
            for node in tree_of(file).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name_of(file))
    found = {name: files for name, files in places.items() if len(files) > 1}
    assert not set(found) - TWICE, {name: files for name, files in found.items() if name not in TWICE}
    assert not TWICE - set(found), "these are defined once now: take them out of TWICE"


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
    "scipy",
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


@pytest.mark.parametrize("file", sorted((SRC / "attention").glob("*.py")), ids=name_of)
def test_a_mechanism_reads_like_an_essay(file: Path) -> None:
    assert ast.get_docstring(tree_of(file)), "it begins with the formula, the source and what is cached"


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
