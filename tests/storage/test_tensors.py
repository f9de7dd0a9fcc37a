"""The bytes of tensors: exact, the same every time, refused when anything is odd."""

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise.storage.tensors import DTYPES, decode, encode


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def file_of(tensors: dict[str, torch.Tensor]) -> bytearray:
    return bytearray(b"".join(encode(tensors).chunks))


def with_header(header: object, data: bytes = b"") -> bytearray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text + data)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9._/-]{0,10}", fullmatch=True).filter(lambda name: ".." not in name),
        st.tuples(
            st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31)
        ),
        max_size=6,
    )
)
def test_every_dtype_and_shape_comes_back_bit_for_bit_here_and_in_safetensors(description):
    tensors = {}
    for name, (dtype, shape, seed) in description.items():
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        raw = torch.randint(
            0, 2 if dtype == "BOOL" else 256, (size,), dtype=torch.uint8, generator=torch.manual_seed(seed)
        )
        tensors[name] = raw.view(DTYPES[dtype]).reshape(shape)
    buffer = file_of(tensors)
    for loaded in (decode(buffer), safetensors.torch.load(bytes(buffer))):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert bits(loaded[name]) == bits(tensor)


def test_special_values_keep_their_bits():
    payload = torch.tensor([0x7FC00001, 0x7F800001, -1, 1], dtype=torch.int32).view(torch.float32)
    tensors = {
        "nan": payload,
        "zero": torch.tensor(-0.0),
        "bf16": torch.tensor([float("inf"), -0.0, float("nan")], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3, dtype=torch.float16),
    }
    loaded = decode(file_of(tensors))
    assert all(bits(loaded[name]) == bits(tensor) for name, tensor in tensors.items())
    assert loaded["scalar"].shape == ()
    assert loaded["empty"].shape == (0, 3)


def test_bytes_depend_on_names_and_values_only():
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(5, dtype=torch.uint8)
    transposed = a.t().contiguous().t()
    assert encode({"a": a, "b": b}).sha256 == encode({"b": b.clone(), "a": transposed}).sha256
    assert encode({"a": a}).sha256 != encode({"a": a + 1}).sha256
    assert encode({"a": a}).sha256 != encode({"c": a}).sha256


def test_another_process_writes_the_same_bytes():
    program = (
        "import torch; from stackwise.storage.tensors import encode;"
        "print(encode({'a': torch.arange(6.0), 'b': torch.arange(5)}).sha256)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == encode({"b": torch.arange(5), "a": torch.arange(6.0)}).sha256


def test_loaded_tensors_can_be_changed_apart():
    loaded = decode(file_of({"a": torch.zeros(3), "b": torch.zeros(3)}))
    loaded["a"].add_(1)
    assert loaded["b"].sum() == 0


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("../x", torch.zeros(1)),
        ("", torch.zeros(1)),
        ("a b", torch.zeros(1)),
        ("a\x1b", torch.zeros(1)),
        ("__metadata__", torch.zeros(1)),
        ("complex", torch.zeros(1, dtype=torch.complex64)),
        ("sparse", torch.zeros(2, 2).to_sparse()),
        ("meta", torch.zeros(1, device="meta")),
        ("rank", torch.zeros([1] * 9)),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(name, tensor):
    with pytest.raises(ValueError):
        encode({name: tensor})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(),
        bytearray(b"1234567"),
        bytearray((2**62).to_bytes(8, "little") + b"{}      "),
        with_header(b"[]"),
        with_header(b"{"),
        with_header(b"\xff\xfe"),
        with_header(b'{"a":' * 100_000),
        with_header({"a": {**ENTRY, "dtype": "F31"}}, bytes(8)),
        with_header({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8)),
        with_header({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
        with_header({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
        with_header({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)),
        with_header({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
        with_header({"a": {**ENTRY, "shape": [2**40, 0], "data_offsets": [0, 0]}}),
        with_header({"a": {**ENTRY, "shape": [1] * 9 + [2]}}, bytes(8)),
        with_header({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)),
        with_header({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, bytes(8)),
        with_header({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)),
        with_header({"a": {**ENTRY, "extra": 1}}, bytes(8)),
        with_header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        with_header({"a": 1}),
        with_header({"a": ENTRY}, bytes(9)),
        with_header({"a": ENTRY}, bytes(7)),
        with_header({"a": ENTRY, "b": ENTRY}, bytes(8)),
        with_header({"../a": ENTRY}, bytes(8)),
        with_header({"__metadata__": {"a": 1}}),
        with_header(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)),
    ],
)
def test_malformed_files_are_refused(buffer):
    with pytest.raises(ValueError):
        decode(buffer)
