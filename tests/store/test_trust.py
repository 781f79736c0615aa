"""Which folders are used: owners, modes, links; and folders that can only be read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from softcap_runtime.store import Key, Store, inspection, trust

KEY = Key({"name": "a"}, {"cpu": "x"})
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A used cache."""
    store = Store(tmp_path / "cache", 2**20)
    store.load_or_build(KEY, lambda: b"payload")
    store.close()
    return tmp_path / "cache"


def assert_refused(folder: Path, *words: str) -> None:
    store = Store(folder, 2**20)
    assert store.load(KEY) is None
    assert store.load_or_build(KEY, lambda: b"built").source == "built"
    assert store.load_or_build(KEY, lambda: b"no").data == b"built"
    assert store.fault is not None
    assert "\n" not in store.fault
    for word in words:
        assert word in store.fault
    assert inspection.status(store).fault == store.fault
    assert not inspection.status(store).trusted
    assert inspection.status(store).held_in_memory == 1


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_everything_is_created_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "a" / "b" / "cache", 2**20)
        store.load_or_build(KEY, lambda: b"payload")
        store.close()
    finally:
        os.umask(before)
    assert store.fault is None
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("place", ["", "cache.db", "locks", f"locks/{KEY.digest}.lock"])
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_writable_by_others(folder: Path, place: str, bit: int) -> None:
    path = folder / place
    path.chmod(path.stat().st_mode | bit)
    assert_refused(folder, f"{path} ", "owner ", f"mode {stat.S_IMODE(path.stat().st_mode):04o}", "chmod go-w ")
    path.chmod(path.stat().st_mode & ~bit)
    assert Store(folder, 2**20).load(KEY) == b"payload"


def test_parent_writable_by_others(folder: Path) -> None:
    folder.parent.chmod(0o777)
    assert_refused(folder, str(folder.parent), "chmod go-w")
    folder.parent.chmod(0o1777)
    assert Store(folder, 2**20).load(KEY) == b"payload"


@needs_root
@pytest.mark.parametrize("place", ["", "cache.db"])
def test_owned_by_another(folder: Path, place: str) -> None:
    os.chown(folder / place, NOBODY, -1)
    assert_refused(folder, f"{folder / place} ", "belongs to another user", "chown ")


@pytest.mark.parametrize("place", ["cache.db", "cache.db-journal", "locks", "quarantine", "other"])
def test_links_inside(folder: Path, tmp_path: Path, place: str) -> None:
    target = tmp_path / "target"
    if (folder / place).exists():
        (folder / place).rename(target)
    (folder / place).symlink_to(target)
    assert_refused(folder, str(folder / place), "symbolic link", "rm ")


def test_fifo_inside(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    assert_refused(folder, "neither file nor folder")


def test_a_folder_under_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """As where a volume is not mounted."""
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    store = Store(tmp_path / "link" / "cache", 2**20)
    assert not store.database.can_write()
    assert store.fault is not None
    assert f"{tmp_path / 'link'} is a link that leads nowhere" in store.fault


def test_a_link_to_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert Store(link, 2**20).load(KEY) == b"payload"


def test_links_to_links_are_followed_one_by_one(folder: Path, tmp_path: Path) -> None:
    """Who may write where a second link lies can turn it to a folder of theirs after the check."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "second").symlink_to("../cache/../cache")
    (tmp_path / "first").symlink_to("theirs/second/.")
    assert Store(tmp_path / "first", 2**20).load(KEY) == b"payload"
    theirs.chmod(0o777)
    assert_refused(tmp_path / "first", str(theirs), "writable by others")
    theirs.chmod(0o1777)
    assert Store(tmp_path / "first", 2**20).load(KEY) == b"payload"


def test_a_link_inside_that_leads_to_the_folder_itself(folder: Path) -> None:
    """No sticky bit helps the folder that holds the cache, whatever the way to it."""
    (folder / "locks" / "here").symlink_to(folder)
    folder.chmod(0o1777)
    assert_refused(folder / "locks" / "here", "writable by others")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert_refused(tmp_path / "cache", "is a file, expected a folder")
    assert (tmp_path / "cache").read_text() == "not a folder"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file" / "cache", str(tmp_path / "file"))


@needs_root
def test_private_group_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    user = type("user", (), {"pw_name": "someone"})
    group = type("group", (), {"gr_mem": ["someone"]})
    monkeypatch.setattr("pwd.getpwuid", lambda _: user)
    monkeypatch.setattr("grp.getgrgid", lambda _: group)

    def lstat(path: str) -> os.stat_result:
        mine = (0o040775, 0, 0, 1, 1234, 1234, 0, 0, 0, 0)
        return os.stat_result(mine) if path == str(tmp_path) else os.lstat(path)

    assert trust.check(tmp_path, lstat).problem is None
    group.gr_mem = ["someone", "else"]  # type: ignore[attr-defined]
    assert "writable by others" in str(trust.check(tmp_path, lstat).problem)


AS_NOBODY = """
import os, sys
import filelock, softcap_runtime.store.bundle, softcap_runtime.store.index  # while they can be read
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
from softcap_runtime.store import Key, Store, inspection
store = Store({folder!r}, 2**20)
key = Key({{"name": "a"}}, {{"cpu": "x"}})
other = Key({{"name": "b"}}, {{"cpu": "x"}})
{body}
"""


@pytest.fixture
def as_nobody(folder: Path) -> Callable[[str], str]:
    """Run code as a user who is not the owner; pytest's folders are opened for reading."""
    for parent in [folder, *folder.parents]:
        if parent.stat().st_mode & 0o5 != 0o5:
            parent.chmod(parent.stat().st_mode | 0o5)
    (folder / "cache.db").chmod(0o644)

    def run(body: str) -> str:
        code = AS_NOBODY.format(nobody=NOBODY, folder=str(folder), body=body)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@needs_root
def test_a_cache_of_root_is_read_by_others(folder: Path, as_nobody: Callable[[str], str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    out = as_nobody(
        "assert store.load(key) == b'payload', store.fault\n"
        "assert store.fault is None\n"
        "assert store.load_or_build(other, lambda: b'new').source == 'built'\n"
        "assert store.load_or_build(other, lambda: b'no').source == 'memory'\n"
        "store.counters.use(key.digest)\n"
        "store.close()\n"
        "status = inspection.status(store)\n"
        "assert status.trusted and not status.writable and status.counters['write_failures'] == 1\n"
        "assert [info.fields for info in inspection.entries(store)] == [{'name': 'a'}]\n"
        "assert inspection.verify(store, repair=True) == [] and store.clear() == 1\n"
        "print('done')"
    )
    assert out == "done\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@needs_root
def test_a_bad_cache_of_root_is_not_used_and_not_touched(folder: Path, as_nobody: Callable[[str], str]) -> None:
    (folder / "cache.db").write_bytes(os.urandom(8192))
    as_nobody(
        "assert store.load(key) is None\n"
        "assert store.load_or_build(key, lambda: b'new').data == b'new'\n"
        "assert 'read-only' in store.fault, store.fault\n"
        "assert inspection.status(store).counters['corrupt'] >= 1"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["cache.db", "locks"]


@needs_root
def test_a_folder_that_this_user_cannot_make(folder: Path, tmp_path: Path, as_nobody: Callable[[str], str]) -> None:
    """As in a container whose user has HOME=/."""
    told = f"cache folder {tmp_path}/a/b cannot be made in {tmp_path}: it is read-only; set another SOFTCAP_CACHE_DIR"
    as_nobody(
        f"store = Store({str(tmp_path / 'a' / 'b')!r}, 2**20)\n"
        "assert store.load_or_build(key, lambda: b'new').data == b'new'\n"
        f"assert store.fault == {told!r}, store.fault"
    )


@needs_root
def test_an_empty_read_only_folder(folder: Path, as_nobody: Callable[[str], str]) -> None:
    (folder / "cache.db").unlink()
    as_nobody(
        "assert store.load_or_build(key, lambda: b'new').data == b'new'\n"
        "assert 'read-only and empty' in store.fault, store.fault"
    )


@pytest.mark.parametrize("inside", [False, True], ids=["on the host", "in a container"])
def test_folders_above_of_owners_outside_of_the_container(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A user namespace shows such owners as the overflow user; what lies below must still be the user's own."""
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    real = Path.read_text
    uid_map = "0 1000 1\n" if inside else "         0          0 4294967295\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path, **k: uid_map if str(path) == "/proc/self/uid_map" else real(path, **k)
    )

    def lstat(path: str) -> os.stat_result:
        status = list(os.lstat(path))
        if path in owned:
            status[4] = overflow
        return os.stat_result(status)

    owned = {"/"}
    assert (trust.check(folder, lstat).problem is None) == inside
    owned = {str(folder)}
    assert "belongs to another user" in str(trust.check(folder, lstat).problem)
