"""Arrays in .npy files: what NumPy writes is read as NumPy reads it, from many threads, and nothing else is."""

import ast
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eqm_dist.data.npy import MAX_HEADER_BYTES, read_array, read_header

ROOT = Path(__file__).parent.parent
RECORDS = np.dtype([("offset", "<u8"), ("label", "<i4")])
ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")
NUMBERS = [np.dtype(code).newbyteorder(order) for code in "?bhilqBHILQefdgFDG" for order in ORDERS]
OTHERS = [RECORDS, np.dtype([("it's", ">f4"), ("ä", "?")]), *map(np.dtype, ("<U3", "|S2", "<M8[25s]", "<m8", "|V4"))]
VERSIONS = [(1, 0), (2, 0), (3, 0)]


def written(array: np.ndarray, version: tuple[int, int]) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version)
    return content.getvalue()


def framed(header: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """A file with this header and no data."""
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header


def numpys_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """What NumPy reads. Of its readers of single headers none takes 3.0, which is 2.0 in UTF-8."""
    if content[6:8] == bytes((3, 0)):
        length = int.from_bytes(content[8:12], "little")
        content = framed(content[12 : 12 + length].decode().encode("latin1"), (2, 0))
    file = io.BytesIO(content)
    old = np.lib.format.read_magic(file) == (1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(file)


arrays = st.builds(
    lambda dtype, shape, order: np.arange(int(np.prod(shape))).reshape(shape).astype(dtype, order=order),
    st.sampled_from(NUMBERS),
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    st.sampled_from("CF"),
)


@given(arrays, st.sampled_from(VERSIONS))
@example(np.zeros((), ">f4"), (1, 0))
@example(np.zeros((3, 0, 2), "<c8", order="F"), (2, 0))
def test_what_numpy_writes_is_read_as_numpy_reads_it(array: np.ndarray, version: tuple[int, int]) -> None:
    content = written(array, version)
    file = io.BytesIO(content)
    found = read_header(file)
    assert tuple(found) == numpys_header(content)
    assert len(content) - file.tell() == array.nbytes
    loaded, expected = read_array(io.BytesIO(content)), np.load(io.BytesIO(content))
    assert loaded.dtype == array.dtype
    assert loaded.flags.writeable
    assert loaded.flags.f_contiguous == expected.flags.f_contiguous
    assert np.array_equal(loaded, expected)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_arrays_without_objects_are_read_too(dtype: np.dtype, version: tuple[int, int]) -> None:
    content = written(np.zeros((2, 3), dtype), version)
    assert tuple(read_header(io.BytesIO(content))) == ((2, 3), False, dtype)
    assert np.array_equal(read_array(io.BytesIO(content)), np.zeros((2, 3), dtype))


def test_objects_are_named_and_never_unpickled() -> None:
    content = written(np.array([{}, []], dtype=object), (1, 0))
    assert read_header(io.BytesIO(content)).dtype.hasobject
    with pytest.raises(ValueError, match="Python objects"):
        read_array(io.BytesIO(content))


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (2048L, 3L), }",  # of Python 2
        b'{"shape": ( 2048 ,3 ) ,\t"fortran_order":False,"descr" :"<f8"}\n',
    ],
)
def test_headers_of_other_writers_are_read(header: bytes) -> None:
    assert tuple(read_header(io.BytesIO(framed(header)))) == ((2048, 3), False, np.dtype("<f8"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "begins with b''"),
        (b"PK\x03\x04 and more", "begins with b'PK"),
        (b"\x93NUMPY\x01", "npy format 1 instead"),
        (framed(b"{}", (4, 0)), r"npy format 4\.0 instead"),
        (framed(b"{'descr': '<f8'}")[:-1], "ends within its header"),
        (framed(b"{" * (MAX_HEADER_BYTES + 1)), "10,001 bytes, more than 10,000"),
        (framed(b"\xff" * 3, (3, 0)), "can't decode"),
        (framed(b"[]"), "must have descr, fortran_order and shape"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (3), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'fortran_order': 0, 'shape': (3,), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': __import__('os'), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), 'more': (3,), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'descr': '<f8', 'shape': (3,), }"), "must have descr"),
        (framed(b"{'descr': '<f8', 'fortran_order': (3,), 'shape': False, }"), "values of the wrong kind"),
        (framed(b"{'descr': True, 'fortran_order': True, 'shape': (3,), }"), "values of the wrong kind"),
        (framed(b"{'descr': '(2,)f4', 'fortran_order': False, 'shape': (3,), }"), r"unknown dtype '\(2,\)f4'"),
        (framed(b"{'descr': '<f3', 'fortran_order': False, 'shape': (3,), }"), "no valid dtype"),
        (framed(b"{'descr': '<M8[foo]', 'fortran_order': False, 'shape': (3,), }"), "no valid dtype"),
        (framed(b"{'descr': [('a', '<f4'), ('a', '<f4')], 'fortran_order': False, 'shape': (3,), }"), "more than once"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000000,), }"), "has 0 bytes"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (0" + b", 100000000000000000" * 9 + b")}"), "big"),
        (framed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"0, " * 65 + b")}"), "maximum supported"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_array(io.BytesIO(content))


def test_an_array_cut_anywhere_is_refused() -> None:
    content = written(np.zeros((2, 3)), (1, 0))
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"^it "):
            read_array(io.BytesIO(content[:length]))


WORDS = ["descr", "fortran_order", "shape", "<f4", "|O", "[('a', '<f4')]", "True", "(3,)", *"'\"{}()[],: \n\t0aä<"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A header that NumPy wrote, with a few bytes replaced, put in or left out."""
    array = np.zeros((2, 3), draw(st.sampled_from([np.dtype("<f4"), RECORDS])))
    content = written(array, draw(st.sampled_from(VERSIONS)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        new = draw(st.binary(max_size=2) | st.sampled_from(WORDS).map(str.encode))
        content = content[:at] + new + content[at + draw(st.integers(0, 3)) :]
    return content


@given(
    st.binary(max_size=100)
    | st.builds(framed, st.binary(max_size=100), st.sampled_from(VERSIONS))
    | st.builds(lambda parts: framed("".join(parts).encode()), st.lists(st.sampled_from(WORDS), max_size=30))
    | damaged()
)
def test_garbage_is_a_value_error_or_what_numpy_takes_it_for(content: bytes) -> None:
    assume(b"L" not in content)  # NumPy takes the L of Python 2 in old versions of the format alone
    try:
        found = read_header(io.BytesIO(content))
    except ValueError:
        return
    assert tuple(found) == numpys_header(content)


def test_headers_are_read_by_many_threads_at_once() -> None:
    arrays = [np.zeros((number % 7, 3), dtype) for number, dtype in enumerate([*NUMBERS, *OTHERS])]
    contents = [(written(array, VERSIONS[number % 3]), array) for number, array in enumerate(arrays)]

    def read_all(thread: int) -> int:
        agreed = 0
        for _ in range(100):
            for content, array in contents:
                agreed += tuple(read_header(io.BytesIO(content))) == (array.shape, False, array.dtype)
        return agreed

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read_all, range(8))) == [100 * len(contents)] * 8


FORBIDDEN = {"numpy.load", "ast.literal_eval"} | {
    f"numpy.lib.{module}.{name}"
    for module, names in {
        "format": ["read_magic", "read_array", "read_array_header_1_0", "read_array_header_2_0", "open_memmap"],
        "npyio": ["NpzFile", "load"],
    }.items()
    for name in names
}


def names_used(source: str) -> set[str]:
    """Full names of all that a module takes from the modules that it imports."""
    full: dict[str, str] = {}
    found: set[str] = set()
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            full |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
            found |= {f"{node.module}.{name.name}" for name in node.names}
    for node in nodes:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            found.add(".".join([full.get(node.id, node.id), *reversed(parts)]))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.lib.format.open_memmap(path)",
        "import numpy.lib.format as npy\nnpy.read_magic(file)",
        "from numpy import load",
        "from numpy.lib import format as npy\nnpy.read_array(file)",
        "from numpy.lib.format import read_array_header_1_0 as header",
    ],
)
def test_the_search_for_numpys_readers_finds_them(source: str) -> None:
    assert names_used(source) & FORBIDDEN


@pytest.mark.parametrize("package", ["eqm_dist", "pipelines", "tuning"])
def test_no_module_lets_numpy_evaluate_a_header(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    assert {f"{file}: {name}" for file in files for name in names_used(file.read_text()) & FORBIDDEN} == set()
