"""Writing files: whole or not at all, through one module only."""

import ast
import errno
import os
import signal
import stat
from pathlib import Path

import pytest

import stackwise
from stackwise.storage import ops

HOME = Path(stackwise.__file__).parent
MODES = set("wax+")
METHODS = {
    "write_text",
    "write_bytes",
    "touch",
    "symlink_to",
    "hardlink_to",
    "mkdir",
    "rmdir",
    "unlink",
    "tofile",
}
FUNCTIONS = {
    "os": {
        *("write", "pwrite", "writev", "replace", "rename", "unlink", "remove", "mkdir", "makedirs", "rmdir"),
        *("truncate", "ftruncate", "fsync", "link", "symlink", "sendfile"),
    },
    "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copytree"},
    "np": {"save", "savez"},
}
LIBRARIES = {"save_file", "savefig"}
ALLOWED = {
    "storage/ops.py": None,
    "tracking/drawing.py": {"savefig"},  # into memory
    "cli/main.py": {"open"},  # /dev/null
    "checkpoint/files.py": {"open"},  # for reading
}


def changes_of(source: str) -> list[tuple[int, str]]:
    """Calls that change a disk: (line, name)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        home = (
            function.value.id
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            else ""
        )
        words = node.args if isinstance(function, ast.Attribute) else node.args[1:]
        texts = [a.value for a in (*words, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        if name == "open" and home != "os":
            modes = [text for text in texts if isinstance(text, str) and text and set(text) <= set("rwxabt+")]
            if any(MODES & set(mode) for mode in modes):
                found.append((node.lineno, name))
        elif home in FUNCTIONS:
            if name in FUNCTIONS[home]:
                found.append((node.lineno, f"{home}.{name}"))
        elif home != "ops" and (
            name in LIBRARIES or (isinstance(function, ast.Attribute) and name in METHODS)
        ):
            found.append((node.lineno, name))
        elif home != "ops" and name in ("rename", "replace") and isinstance(function, ast.Attribute):
            # text.replace takes two arguments, Path.replace and Path.rename one; dataclasses.replace has keywords
            if len(node.args) == 1 and not node.keywords:
                found.append((node.lineno, name))
        elif home == "os" and name == "open":
            found.append((node.lineno, "os.open"))
    return found


def test_nothing_else_in_the_project_writes_to_a_disk():
    offenders = [
        f"{path.relative_to(HOME)}:{line} {name}"
        for path in sorted(HOME.rglob("*.py"))
        for line, name in changes_of(path.read_text())
        if ALLOWED.get(str(path.relative_to(HOME)), set()) is not None
        and name not in (ALLOWED.get(str(path.relative_to(HOME))) or ())
    ]
    assert not offenders, f"use stackwise.storage.ops: {offenders}"


@pytest.mark.parametrize(
    "line",
    [
        'open("x", "w")',
        'path.open("ab")',
        'open("x", mode="r+b")',
        "path.write_text(text)",
        "os.replace(a, b)",
        "part.rename(target)",
        "part.replace(target)",
        "shutil.rmtree(folder)",
        "np.save(path, array)",
        "save_file(tensors, path)",
        "path.unlink(missing_ok=True)",
        "os.fsync(fd)",
    ],
)
def test_the_rule_sees(line):
    assert changes_of(line)


@pytest.mark.parametrize(
    "line",
    [
        'open("x")',
        'open("x", "rb")',
        'text.replace("a", "b")',
        "ops.unlink(path)",
        "replace(spec, a=1)",
        "log.write(x)",
    ],
)
def test_the_rule_passes_over(line):
    assert not changes_of(line)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    ops.replace_text(path, "before")
    for name in ("create", "write", "fsync", "rename"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            patch.setattr(ops, name, full)
            with pytest.raises(OSError, match="No space") as caught:
                ops.replace_text(path, "after")
        assert caught.value.filename == str(path)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]
    ops.replace_text(path, "after \ud800")
    assert path.read_text() == "after \\ud800"


def test_what_a_killed_writer_left_behind_does_not_stop_the_next(tmp_path, child, killed):
    path = tmp_path / "notes.txt"
    for moment in ("created", "partial", "written", "synced"):
        assert child(lambda: ops.replace_text(path, "torn"), crash_at=f"text.{moment}") == killed
        assert not path.exists()
    ops.replace_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / ".notes.txt.new").symlink_to(other)
    ops.replace_text(tmp_path / "notes.txt", "text")
    assert other.read_text() == "mine"
    with pytest.raises(OSError, match="symbolic links"):
        ops.open_to_change(_link(tmp_path, other))


def _link(folder: Path, target: Path) -> Path:
    link = folder / "link"
    link.symlink_to(target)
    return link


def test_short_writes_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "write", lambda fd, data: os.write(fd, data[:3]))
    monkeypatch.setattr(ops, "pwrite", lambda fd, data, at: os.pwrite(fd, data[:2], at))
    with ops.NewFile(tmp_path / "a", kind="export") as file:
        file.write(b"small ")
        file.write(bytes(100_000))
        file.write(b" end")
    assert (tmp_path / "a").read_bytes() == b"small " + bytes(100_000) + b" end"
    log = ops.Log(tmp_path / "log")
    log.append(b"one line\n")
    log.append(b"another\n")
    log.cut(9)
    log.append(b"third\n")
    log.close()
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one line\nthird\n"


def test_a_line_that_finds_no_room_leaves_no_half(tmp_path, monkeypatch):
    log = ops.Log(tmp_path / "log")
    log.append(b"first\n")

    def half(fd, data, at):
        if len(data) > 3:
            return os.pwrite(fd, data[:3], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ops, "pwrite", half)
        with pytest.raises(OSError, match="No space"):
            log.append(b"second\n")
    assert (tmp_path / "log").read_bytes() == b"first\n"
    log.append(b"third\n")
    assert (tmp_path / "log").read_bytes() == b"first\nthird\n"


def test_a_folder_appears_whole_or_not_at_all(tmp_path, child, killed):
    target = tmp_path / "deep" / "folder"

    def fill():
        with ops.appearing(target) as part:
            ops.write_new(part / "a", [b"1", b"2"], kind="export")
            ops.make_dir(part / "sub")
            ops.write_new(part / "sub" / "b", [b"3"], kind="export")

    def broken():
        with ops.appearing(target) as part:
            ops.write_new(part / "a", [b"1"], kind="export")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert list(target.parent.iterdir()) == []
    for point in ("export.created", "export.partial", "export.synced", "folder.filled"):
        assert child(fill, crash_at=point) == killed
        assert not target.exists()
    assert child(fill, crash_at="folder.renamed") == killed
    assert (target / "sub" / "b").read_bytes() == b"3"
    with pytest.raises(OSError, match=r"exists|not empty"):
        fill()
    assert (target / "a").read_bytes() == b"12"


def test_the_folder_is_synced_after_the_name(tmp_path, monkeypatch):
    calls = []

    def spy(name):
        original = getattr(ops, name)

        def call(*arguments):
            calls.append((name, stat.S_ISDIR(os.fstat(arguments[0]).st_mode) if name == "fsync" else None))
            return original(*arguments)

        monkeypatch.setattr(ops, name, call)

    for name in ("write", "fsync", "rename"):
        spy(name)
    ops.replace_text(tmp_path / "notes.txt", "text")
    assert calls == [("write", None), ("fsync", False), ("rename", None), ("fsync", True)]


def test_a_tree_is_removed_without_following_links(tmp_path):
    keep = tmp_path / "keep"
    ops.make_dir(keep)
    ops.replace_text(keep / "file", "mine")
    tree = tmp_path / "tree"
    ops.make_dir(tree / "deep")
    (tree / "deep" / "link").symlink_to(keep)
    ops.remove_tree(tree)
    assert not tree.exists()
    assert (keep / "file").read_text() == "mine"


def test_killed_means_by_signal(killed):
    assert killed == -signal.SIGKILL
