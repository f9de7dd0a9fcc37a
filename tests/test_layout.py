"""What holds for every file of the project."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCE}
WRITTEN = [
    path
    for folder in ("src", "tests", "docs", "benchmarks", "recipes")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".yaml", ".toml", ".css"}
    and not any(p.startswith(".") for p in path.parts)
] + [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", ".ci/run")
]

LONGEST = 450
"""Lines; about 300 is where to look for a seam."""

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def test_nothing_pickles() -> None:
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ):
                names = {"pickle"} if node.attr in ("load", "save") else set()
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                names = {"pickle"} if ast.unparse(node.value) != "False" else set()
            else:
                continue
            if names & PICKLES:
                found.append(place(path, node))
    assert found == []


def test_an_error_of_any_kind_is_never_swallowed() -> None:
    swallowed = [
        place(path, node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) == "BaseException")
        and not (node.type and isinstance(node.body[-1], ast.Raise))
    ]
    assert swallowed == []


def test_only_the_command_line_prints() -> None:
    prints = [
        place(path, node)
        for path, tree in TREES.items()
        if "cli" not in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


def test_files_can_be_read_in_one_sitting() -> None:
    sizes = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in SOURCE}
    assert {name: size for name, size in sizes.items() if size > LONGEST} == {}


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    homes = re.compile(r"(?:/home/|/Users/|/root/|[A-Z]:\\Users\\)\w+")
    found = {str(path.relative_to(ROOT)): homes.findall(path.read_text("utf-8")) for path in WRITTEN}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_every_module_and_every_public_class_says_what_it_is() -> None:
    silent = [
        place(path, node)
        for path, tree in TREES.items()
        for node in [tree, *tree.body]
        if isinstance(node, ast.Module) or (isinstance(node, ast.ClassDef) and not node.name.startswith("_"))
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_a_room_is_a_package_whose_init_holds_its_description_only() -> None:
    for room in sorted(
        path for path in (ROOT / "src/stackwise").iterdir() if (path / "__init__.py").exists()
    ):
        body = TREES[room / "__init__.py"].body
        assert len(body) == 1, f"{room.name}/__init__.py imports or defines something"


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE_READERS = {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
    "torch.load",
}
SAFE_LOADERS = {"_Loader", "yaml.SafeLoader"}
ARCHIVES = {"zipfile", "tarfile", "gzip", "bz2", "lzma"}


def code_that_is_read(tree: ast.AST) -> list[ast.AST]:
    """Places where text or a file could become code, or an archive is unpacked."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            loaders = [ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"]
            if (
                (isinstance(node.func, ast.Name) and name in RUNS_CODE)
                or name in UNSAFE_READERS
                or (name.startswith("yaml.") and any(loader not in SAFE_LOADERS for loader in loaders))
                or any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
            ):
                found.append(node)
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and ast.unparse(node.value) != "False"
        ):
            found.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else {node.module or ""}
            found += [node] if {name.partition(".")[0] for name in names} & ARCHIVES else []
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.system", "os.popen"):
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            found += [node] if bases & {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"} else []
    return found


def test_nothing_that_is_read_becomes_code() -> None:
    assert [place(path, node) for path, tree in TREES.items() for node in code_that_is_read(tree)] == []


def test_what_would_become_code_is_noticed() -> None:
    for line in (
        *(
            "eval(text)",
            "exec(text)",
            "compile(a, b, c)",
            "__import__(name)",
            "os.system(x)",
            "import zipfile",
        ),
        *("yaml.load(text)", "yaml.unsafe_load(x)", "yaml.compose(x, Loader=yaml.Loader)", "np.load(x)"),
        *(
            "f(trust_remote_code=True)",
            "run(x, shell=True)",
            "class L(yaml.Loader): pass",
            "from tarfile import open",
        ),
    ):
        assert code_that_is_read(ast.parse(line)), line
    for line in (
        "model.eval()",
        "re.compile(x)",
        "yaml.compose(x, Loader=_Loader)",
        "torch.compile(m)",
        "f(trust_remote_code=False)",
    ):
        assert not code_that_is_read(ast.parse(line)), line


def test_the_library_opens_no_file_whose_header_was_not_read_first() -> None:
    opening = [
        str(path.relative_to(ROOT / "src/stackwise"))
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("safetensors")
        and {alias.name for alias in node.names} & {"safe_open", "load_file", "load"}
    ]
    assert opening == ["model/files.py"]
