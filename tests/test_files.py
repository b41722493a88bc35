"""Files are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from gn_detect.errors import UserError
from gn_detect.files import atomic_write, atomic_write_json, atomic_write_text, cannot_write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_json_and_bytes_are_written_into_new_folders(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a" / "b" / "text.txt", "Grüße\n")
    assert (tmp_path / "a" / "b" / "text.txt").read_bytes() == "Grüße\n".encode()
    atomic_write_json(tmp_path / "content.json", {"AP": [1.5, None]})
    assert json.loads((tmp_path / "content.json").read_text()) == {"AP": [1.5, None]}
    with atomic_write(tmp_path / "raw", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "raw").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a", "content.json", "raw"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    atomic_write_text(path, "old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "results.json"
    atomic_write_text(path, "old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_json_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    atomic_write_json(path, [1])
    with pytest.raises(TypeError):
        atomic_write_json(path, [1, object()])
    assert json.loads(path.read_text()) == [1]
    assert names(tmp_path) == ["results.json"]


def test_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    message = "cannot write .*model.pth: No space left on device; make room; nothing was changed"
    with pytest.raises(UserError, match=message), atomic_write(path, "wb"):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "can only be read"),
        (errno.EACCES, "rights"),
        (errno.ENOENT, "deleted"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "another folder"),
    ],
)
def test_the_remedy_fits_the_error(code: int, words: str) -> None:
    message = str(cannot_write("run/log.txt", OSError(code, os.strerror(code)), ", then --resume"))
    assert message.startswith(f"cannot write run/log.txt: {os.strerror(code)}; ")
    assert words in message
    assert message.endswith(", then --resume")
    assert ("make room" in message) == (words == "make room")


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*log.txt: .*a part of the path is a file") as caught:
        atomic_write_text(tmp_path / "file" / "log.txt", "text")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "shared.txt", "for the group")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "shared.txt").stat().st_mode) == 0o640
