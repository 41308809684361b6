"""What users see: names, imports, docstrings, and the code blocks of the documentation."""

import ast
import importlib
import re
import subprocess
import sys
import warnings
from fnmatch import fnmatch
from pathlib import Path

import pytest

import tqsearch

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "tqsearch").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = {"triton", "transformers", "h5py", "matplotlib", "tqdm", "faiss", "turbovec", "typer", "scipy"}


def test_names_are_explicit_and_sorted():
    assert tqsearch.__all__ == ["BitPlan", "TurboQuantIndex", "TurboQuantizer", "__version__"]
    assert all(hasattr(tqsearch, name) for name in tqsearch.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", tqsearch.__version__)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_packages_list_what_they_define_or_import(path):
    """A package's `__all__` is a literal, sorted, and names only what its file defines or imports."""
    tree = ast.parse(path.read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
    ]
    bound = {name for node in tree.body for name in names_bound(node)}
    for names in listed:
        assert len(names) == len(set(names))
        assert names == sorted(names) or names == sorted(names, key=str.casefold) or is_isort_order(names)
        assert set(names) <= bound
    if len(tree.body) > 1:
        assert listed, f"{path.relative_to(ROOT)} has no __all__"


def is_isort_order(names):
    """Constants, then classes, then the rest: what ruff's RUF022 writes."""
    return names == sorted(names, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, n))


def names_bound(node):
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def test_importing_the_package_imports_nothing_optional():
    """Beyond what the core dependencies load themselves (torch loads tqdm where it is installed)."""
    code = (
        "import sys, numpy, safetensors.torch; before = set(sys.modules); import tqsearch; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "tqsearch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (
            "raise ModuleNotFoundError('none here', name='transformers')",
            "needs transformers: pip install 'tqsearch[hf]'",
        ),
        ("__version__ = '5.16.9'", "needs transformers 5.17 or later, got 5.16.9: pip install 'tqsearch[hf]'"),
    ],
    ids=["missing", "too old"],
)
def test_the_cache_says_which_transformers_it_needs(tmp_path, module, says):
    (tmp_path / "transformers.py").write_text(module)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tqsearch.kvcache"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].endswith(f"Error: tqsearch.kvcache {says}")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "tqsearch")))
def test_everything_public_has_a_docstring(path):
    missing = list(undocumented(ast.parse(path.read_text()), path.stem))
    assert not missing


def undocumented(node, name):
    if not ast.get_docstring(node):
        yield name
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{name}.{child.name}")
            elif not ast.get_docstring(child):
                yield f"{name}.{child.name}"


def test_the_tour_names_every_file_and_no_other():
    """`docs/ARCHITECTURE.md` lists the modules, by name or by a pattern such as `attention_*.py`."""
    tour = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    listed = set(re.findall(r"[\w*]+\.py", tour[tour.index("## The folders") : tour.index("## Who may know whom")]))
    files = {path.name for path in [*MODULES, *(ROOT / "benchmarks").rglob("*.py")]} - {"__init__.py"}
    assert listed - {"__init__.py"}
    assert [name for name in sorted(files) if not any(fnmatch(name, pattern) for pattern in listed)] == []
    assert [
        pattern for pattern in sorted(listed - {"__init__.py"}) if not any(fnmatch(name, pattern) for name in files)
    ] == []


def python_blocks(page):
    """(line number, code) of each block fenced as python."""
    text = page.read_text() if page.exists() else ""
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 2, match.group(1)


RUN_ELSEWHERE = {"kvcache.md"}  # whose examples need a model in a folder: tests/kvcache/test_docs.py


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(python_blocks(p)) and p.name not in RUN_ELSEWHERE], ids=lambda p: p.name
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, in one namespace and an empty folder; errors name the page's line."""
    monkeypatch.chdir(tmp_path)
    if any("transformers" in code for _, code in python_blocks(page)):
        with warnings.catch_warnings():  # those of its own imports are not ours to mend
            warnings.simplefilter("ignore")
            importlib.import_module("torch.utils.mkldnn")
            importlib.import_module("transformers.generation.utils")
    namespace = {"__name__": "__page__"}
    for line, code in python_blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_a_fence_is_found_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 1\nb = 2\n```\n\n```bash\nls\n```\n```python\nc = a\n```\n")
    assert list(python_blocks(page)) == [(4, "a = 1\nb = 2\n"), (12, "c = a\n")]
