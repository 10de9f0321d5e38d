"""The rules of the house that import-linter and ruff cannot express: `python .ci/floors.py`.

- torch.distributed is used by transports and what stands above the engine, and by nothing else.
- The package reads no environment variables, its recipes excepted.
- Recipes and launch/ import what `import distflash` gives, recipes and integrations; no module behind them.
- Files and functions stay short enough to be read in one sitting.
- A row of a table in Markdown is one line.

Prints each violation as `path:line: text` and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("distflash", "launch", "benchmarks", "tests", "tools", ".ci")

NO_DISTRIBUTED = tuple(
    f"distflash/{room}" for room in ("masks", "layouts", "intervals", "partial", "kernels", "schedules", "engine")
)
RECIPES = ("distflash/recipes/", "launch/")  # users of the public API
PUBLIC = ("distflash.integrations", "distflash.recipes")
ENVIRONMENT = ("os.environ", "os.environb", "os.getenv", "os.putenv")

# A kernel stands beside its transpose, and a test beside its oracle: they may be longer.
LONG_ROOMS = ("distflash/kernels/", "tests/")
MAX_FILE_LINES, MAX_LONG_FILE_LINES = 400, 600
MAX_FUNCTION_LINES = 60

Found = tuple[int, str]  # line, text


def imported_names(tree: ast.AST) -> Iterator[Found]:
    """Every dotted name that the file imports or reads, as `a.b.c`, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def check_names(path: str, tree: ast.AST) -> Iterator[Found]:
    """Imports and attribute reads that the file's folder may not have."""
    for line, name in imported_names(tree):
        if path.startswith(NO_DISTRIBUTED) and is_under(name, "torch.distributed"):
            yield line, f"{name}: only transports and the floors above the engine know torch.distributed"
        if (
            path.startswith("distflash/")
            and not path.startswith(RECIPES)
            and any(is_under(name, read) for read in ENVIRONMENT)
        ):
            yield line, f"{name}: environment variables are read by recipes only"


def check_face(path: str, tree: ast.AST) -> Iterator[Found]:
    """Import statements of recipes and scripts that reach behind the public API."""
    if not path.startswith(RECIPES):
        return
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.startswith("distflash.") and not any(is_under(module, known) for known in PUBLIC):
                yield node.lineno, f"{module}: recipes use what `import distflash` gives, and the integrations"


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without its docstring: neither explaining more nor naming each argument is punished."""
    body = node.body if ast.get_docstring(node, clean=False) is None else node.body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def example_lines(tree: ast.AST) -> int:
    """Lines of the examples in docstrings, which end them: a name that shows how it is used is not punished either."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    return sum(len(doc[doc.index("\nExamples:") :].splitlines()) for doc in docs if "\nExamples:" in doc)


def check_lengths(path: str, source: str, tree: ast.AST) -> Iterator[Found]:
    """Files and functions that are too long."""
    limit = MAX_LONG_FILE_LINES if path.startswith(LONG_ROOMS) else MAX_FILE_LINES
    lines = len(source.splitlines()) - example_lines(tree)
    if lines > limit:
        yield lines, f"{lines} lines in the file, {limit} allowed"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = body_lines(node)
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}: {length} lines in the body, {MAX_FUNCTION_LINES} allowed"


def check_tables(text: str) -> Iterator[Found]:
    """Rows of tables that a line break ends: the rest would be a row of its own."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("| ") and not line.endswith("|"):
            yield number, "a row of a table goes on in the next line"


def violations(root: Path) -> Iterator[str]:
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            path, source = file.relative_to(root).as_posix(), file.read_text()
            tree = ast.parse(source, filename=path)
            found = [*check_names(path, tree), *check_face(path, tree), *check_lengths(path, source, tree)]
            yield from (f"{path}:{line}: {text}" for line, text in sorted(set(found)))
    for file in sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")]):
        for line, text in check_tables(file.read_text()):
            yield f"{file.relative_to(root).as_posix()}:{line}: {text}"


def main() -> int:
    found = list(violations(ROOT))
    print("\n".join(found) if found else "floors: nothing to report")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
