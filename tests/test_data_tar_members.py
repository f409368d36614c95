"""What a tar holds: of whole ones what tarfile says, of all others a sentence, and never more than its bytes."""

import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm_dist.data.index import index_shard
from eqm_dist.data.sources import ImageTars
from eqm_dist.data.tar_members import TarMember, read_members
from eqm_dist.errors import DataError
from eqm_dist.evaluate.images import open_images
from tests.images import pixels, png


def everything(_name: str) -> bool:
    return True


def members(content: bytes, wanted: Callable[[str], bool] = everything) -> list[TarMember]:
    return list(read_members(io.BytesIO(content), wanted))


def packed(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return content.getvalue()


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with any 12 bytes as its size."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


MINUS_512 = b"\xff" * 10 + struct.pack(">H", 65536 - 512)
LONG = "n" * 150


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@settings(max_examples=20)
@given(names=st.lists(st.sampled_from(["a.png", f"d/{LONG[:90]}.png", f"{'d/' * 40}x", "é ü/图.jpg"]), unique=True))
def test_a_whole_tar_is_read_as_tarfile_reads_it(kind: int, names: list[str]) -> None:
    names = [*names, "z"] + ([f"{LONG}/{LONG}.png"] if kind != tarfile.USTAR_FORMAT else [])
    content = packed({name: name.encode() * 40 for name in names}, kind)
    found = members(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    assert [content[m.offset : m.offset + m.size] for m in found] == [name.encode() * 40 for name in names]


def test_links_are_the_files_that_they_name() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, kind, target in (
            ("d/a.png", tarfile.REGTYPE, ""),
            ("b.png", tarfile.LNKTYPE, "d/a.png"),
            ("d/c.png", tarfile.SYMTYPE, "./a.png"),
            ("d/folder", tarfile.DIRTYPE, ""),
            ("e.txt", tarfile.SYMTYPE, "/etc/passwd"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"abc"))
    found = members(content.getvalue(), lambda name: name.endswith(".png"))
    assert [m.name for m in found] == ["d/a.png", "b.png", "d/c.png"]
    assert len({(m.offset, m.size) for m in found}) == 1
    with pytest.raises(ValueError, match=r"e\.txt is a link to /etc/passwd, which does not come before it"):
        members(content.getvalue())


WHOLE = packed({"a.png": b"a" * 600, "b.png": b"b"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (WHOLE[:700], "600 bytes by its header, and 188 follow"),
        (WHOLE[:1536], "ends without the empty block"),
        (WHOLE[:1700], "ends within a header"),
        (WHOLE[:1536] + b"x" + WHOLE[1537:], "header at byte 1,536 is damaged"),
        (WHOLE + WHOLE, "something follows its end"),
        (header("a", b"0" * 11 + b"\0") + header("b", MINUS_512) + bytes(10240), "b has -512 bytes"),
        (header("a", b"\x80" + b"\xff" * 11) + bytes(10240), "bytes by its header, and 10,240 follow"),
        (header("a", b"00040000000\0", tarfile.GNUTYPE_LONGNAME) + bytes(1024), "at most 65,536 are read"),
        (header("a", MINUS_512, tarfile.XHDTYPE) + bytes(1024), "at most 65,536 are read"),
        (header("a", b"00000000004\0", tarfile.XHDTYPE) + b"9 ab" + bytes(1532), "pax header is damaged"),
        (header("a", b"00000000014\0", tarfile.XHDTYPE) + b"12 size=-5x\n" + bytes(500) + WHOLE, "the size '-5x'"),
        (header("a.png", b"0" * 11 + b"\0", tarfile.GNUTYPE_SPARSE) + bytes(1024), "sparse"),
    ],
    ids=range(13),
)
def test_what_is_no_whole_tar_is_a_sentence(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        members(content)


@settings(max_examples=40)
@given(st.binary(max_size=40), st.integers(0, len(WHOLE)))
def test_damage_anywhere_ends(damage: bytes, at: int) -> None:
    """Each step goes forward, whatever the headers say."""
    try:
        found = members(WHOLE[:at] + damage + WHOLE[at + len(damage) :])
    except ValueError:
        return
    assert all(0 <= m.offset <= m.offset + m.size <= len(WHOLE) + len(damage) for m in found)


def test_a_negative_size_is_refused_wherever_a_tar_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(packed({"0.png": png(pixels(0)), "0.cls": b"0"})[:-10240] + header("b", MINUS_512) + bytes(10240))
    for read in (index_shard, ImageTars, lambda path: open_images(str(path))):
        with pytest.raises(DataError, match=r"x\.tar must be a whole tar .*-512 bytes"):
            read(path)
