"""Sources read every document in a fixed order, and name the file and the place of everything they cannot read."""

import hashlib
import json
import sys
import types

import pytest

from stackwise.data.errors import DamagedDataError, DataError
from stackwise.data.files import find_files
from stackwise.data.settings import DataSettings
from stackwise.data.sources import open_eval_source, open_source


def texts(settings):
    return [document.text for document in open_source(settings).documents()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_text_files_are_read_byte_for_byte_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second\r\n")
    (tmp_path / "a.txt").write_bytes("first\u00e9\n".encode())
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("third")
    assert texts(DataSettings(source="text", path=f"{tmp_path}/*.txt")) == ["first\u00e9\n", "second\r\n"]
    assert len(texts(DataSettings(source="text", path=f"{tmp_path}/**/*.txt"))) == 3


def test_a_file_named_twice_is_read_once_and_lists_keep_their_order(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    names = [str(tmp_path / "b"), str(tmp_path / "*")]
    assert texts(DataSettings(source="text", path=names)) == ["b", "a"]


def test_a_path_with_glob_characters_that_exists_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert texts(DataSettings(source="text", path=str(tmp_path / "a[1].txt"))) == ["x"]


def test_jsonl_rows_are_documents_and_blank_lines_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two"}')
    assert texts(DataSettings(source="jsonl", path=str(path), text_key="body")) == ["one", "two"]


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"text": ["one", "two", "three"], "n": [1, 2, 3]}), path, row_group_size=2
    )
    assert texts(DataSettings(source="parquet", path=str(path))) == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"no key 'txt'.*did you mean 'text'\? present: text, n"):
        texts(DataSettings(source="parquet", path=str(path), text_key="txt"))
    with pytest.raises(DataError, match=r"a\.parquet: row 1: the value of 'n' is 1, not text"):
        texts(DataSettings(source="parquet", path=str(path), text_key="n"))
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DamagedDataError, match=r"a\.parquet: this is not a Parquet file"):
        texts(DataSettings(source="parquet", path=str(path)))


@pytest.mark.parametrize(
    ("module", "settings", "extra"),
    [
        ("pyarrow", {"source": "parquet", "path": "{file}"}, "stackwise[parquet]"),
        ("datasets", {"source": "hf", "path": "some/name"}, "stackwise[hf]"),
    ],
)
def test_a_missing_optional_package_is_named_with_its_extra(tmp_path, monkeypatch, module, settings, extra):
    monkeypatch.setitem(sys.modules, module, None)
    file = tmp_path / "a.parquet"
    file.touch()
    settings["path"] = settings["path"].format(file=file)
    with pytest.raises(DataError) as caught:
        texts(DataSettings(**settings))
    assert module in str(caught.value)
    assert extra in str(caught.value)


def test_hub_datasets_are_streamed_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*name, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}] if split == "train" else [{"text": "held out"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    settings = DataSettings(source="hf", path=["org/name", "config"], eval_path="validation")
    assert texts(settings) == ["one", "two"]
    assert [document.text for document in open_eval_source(settings).documents()] == ["held out"]
    assert asked == [(("org/name", "config"), "train", True), (("org/name", "config"), "validation", True)]


def test_a_hub_dataset_that_cannot_be_loaded_names_the_key_and_the_reason(monkeypatch):
    def load_dataset(*name, split, streaming):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"data\.path: .*'org/name' cannot be loaded \(no network\)"):
        texts(DataSettings(source="hf", path="org/name"))


def test_the_standard_library_is_a_capped_selection_in_a_fixed_order():
    settings = DataSettings(max_bytes=200_000)
    source = open_source(settings)
    names = [file["name"] for file in source.recipe()["files"]]
    assert names == [file["name"] for file in open_source(settings).recipe()["files"]]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "idlelib", "site-packages"} & set(name.split("/")) for name in names)
    assert sum(len(document.text.encode()) for document in source.documents()) <= 200_000
    larger = [file["name"] for file in open_source(DataSettings(max_bytes=400_000)).recipe()["files"]]
    assert larger[: len(names)] == names


def test_the_standard_library_has_a_cap_of_its_own():
    total = sum(len(document.text.encode()) for document in open_source(DataSettings()).documents())
    assert 3_900_000 < total <= 4_000_000


def test_max_bytes_ends_the_text_at_the_last_whole_character(tmp_path):
    (tmp_path / "a.txt").write_text("ab\u00e9\u00e9", encoding="utf-8")
    (tmp_path / "b.txt").write_text("never read")
    settings = DataSettings(source="text", path=f"{tmp_path}/*", max_bytes=5)
    assert texts(settings) == ["ab\u00e9"]
    assert [file["name"] for file in open_source(settings).recipe()["files"]] == ["a.txt"]


def test_a_recipe_does_not_depend_on_the_folder(tmp_path):
    recipes = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
        recipes.append(open_source(DataSettings(source="text", path=f"{tmp_path}/{folder}/*")).recipe())
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.tx", r"data\.path: there is no file '.*notes\.tx'; did you mean 'notes\.txt\?*'?"),
        ("nowhere/deeper/a.txt", r"nowhere/deeper' does not exist, '.*' holds notes\.txt"),
        ("*.md", r"data\.path: no file matches '.*\*\.md'; .* holds notes\.txt"),
    ],
)
def test_a_missing_path_names_the_key_and_what_is_nearby(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=message):
        open_source(DataSettings(source="text", path=str(tmp_path / name)))


def test_a_missing_eval_path_names_its_own_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.eval_path"):
        open_eval_source(DataSettings(eval_path=str(tmp_path / "none.txt")))


def test_a_folder_is_refused_with_the_pattern_to_write(tmp_path):
    with pytest.raises(DataError, match=r"names the folder .*\*\.txt"):
        find_files("data.path", [str(tmp_path)])


def test_a_source_without_a_path_is_refused():
    with pytest.raises(DataError, match=r"data\.path is null, but data\.source jsonl reads from it"):
        open_source(DataSettings(source="jsonl"))


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ('{"text": "a"', DamagedDataError, r"a\.jsonl:2: this line is not JSON"),
        ("[1, 2]", DataError, r"a\.jsonl:2: this row is \[1, 2\], not an object"),
        ('{"txt": "a"}', DataError, r"a\.jsonl:2: there is no key 'text'.*did you mean 'txt'\? present: txt"),
        ('{"text": 7}', DataError, r"a\.jsonl:2: the value of 'text' is 7, not text"),
        ('{"text": null}', DataError, r"a\.jsonl:2: the value of 'text' is null, not text"),
        (
            '{"text": "ab\\ud800"}',
            DamagedDataError,
            r"a\.jsonl:2: character 2 of 'text' is half of a surrogate",
        ),
        ("[" * 100_000, DamagedDataError, r"a\.jsonl:2: this line is not JSON"),
    ],
)
def test_a_bad_jsonl_row_is_named_by_file_and_line(tmp_path, line, kind, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(kind, match=message):
        texts(DataSettings(source="jsonl", path=str(path)))


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_invalid_utf8_is_named_by_file_and_byte(tmp_path, source):
    path = tmp_path / "a.txt"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DamagedDataError, match=r"a\.txt: byte 27: 0xe9 is not valid UTF-8.*iconv"):
        texts(DataSettings(source=source, path=str(path)))
