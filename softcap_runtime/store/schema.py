"""The one schema that a ``cache.db`` may have, and the checks that a database must pass before it is used.

The tables are those of diskcache 5.6; a test compares this text with what diskcache creates.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

DBNAME = "cache.db"
USER_VERSION = 1  # the next must differ in two bits or more: a single one is taken for a flipped bit

_TABLES = {
    "Settings": "CREATE TABLE Settings ( key TEXT NOT NULL UNIQUE, value)",
    "Cache": (
        "CREATE TABLE Cache ( rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL,"
        " expire_time REAL, access_time REAL, access_count INTEGER DEFAULT 0, tag BLOB,"
        " size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0, filename TEXT, value BLOB)"
    ),
    "Cache_key_raw": "CREATE UNIQUE INDEX Cache_key_raw ON Cache(key, raw)",
    "Cache_expire_time": "CREATE INDEX Cache_expire_time ON Cache (expire_time)",
}
_TRIGGERS = {
    "Settings_count_insert": ("INSERT", 'value + 1 WHERE key = "count"'),
    "Settings_count_delete": ("DELETE", 'value - 1 WHERE key = "count"'),
    "Settings_size_insert": ("INSERT", 'value + NEW.size WHERE key = "size"'),
    "Settings_size_update": ("UPDATE", 'value + NEW.size - OLD.size WHERE key = "size"'),
    "Settings_size_delete": ("DELETE", 'value - OLD.size WHERE key = "size"'),
}
STATEMENTS = _TABLES | {
    name: (f"CREATE TRIGGER {name} AFTER {event} ON Cache FOR EACH ROW BEGIN UPDATE Settings SET value = {change}; END")
    for name, (event, change) in _TRIGGERS.items()
}

# We evict by last use, in the transaction that publishes: diskcache's own eviction would write on every read, and
# removes files by names that it finds in the database.
SETTINGS: dict[str, int | str] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "none",
    "size_limit": 2**40,
    "cull_limit": 0,
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**11,
    # A rollback journal, not WAL: WAL's shared memory is a mapped file, and a mapped file (the database too) that is
    # truncated, or on a full disk, kills the process with SIGBUS. WAL also fails on network filesystems, and needs
    # write access even to read.
    "sqlite_journal_mode": "delete",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**62,  # values stay inside the database: no entry ever names a file
    "disk_pickle_protocol": 0,
}
METADATA = ("count", "size", "hits", "misses")

_SUPER_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


class Foreign(Exception):
    """The database is not exactly what we would create; it is moved into quarantine, never used."""


class OtherVersion(Exception):
    """The database was made by another version of this package; it is left alone."""


def inode(folder: Path) -> tuple[int, int]:
    """The identity of the database file: device and inode. Raises FileNotFoundError."""
    status = os.stat(folder / DBNAME)
    return status.st_dev, status.st_ino


def check_journal(folder: Path) -> None:
    """Refuse a rollback journal that names another file: SQLite would remove that file.

    Raises Foreign, OSError.
    """
    try:
        with open(folder / f"{DBNAME}-journal", "rb") as journal:
            journal.seek(0, os.SEEK_END)
            journal.seek(max(0, journal.tell() - 8))
            if journal.read(8) == _SUPER_JOURNAL_MAGIC:
                raise Foreign("its journal names another file")
    except FileNotFoundError:
        return


def check_header(folder: Path) -> None:
    """Refuse header fields that SQLite takes for a newer format, as it would never write to, or never open, the file.

    Raises sqlite3.DatabaseError, OSError. Offsets: "Database File Format" in SQLite's documentation.
    """
    with open(folder / DBNAME, "rb") as database:
        header = database.read(100)
    write_version, schema_format = header[18:19], header[44:48]
    if write_version > b"\x02" or schema_format > b"\x00\x00\x00\x04":
        raise sqlite3.DatabaseError("its header is damaged")


def check_schema(connection: sqlite3.Connection) -> None:
    """Raise Foreign unless tables, indexes, triggers and Settings are exactly the expected ones.

    Raises OtherVersion for a newer version's database, sqlite3.DatabaseError for a damaged file.
    """
    ((version,),) = connection.execute("PRAGMA user_version")
    found = {
        name: sql
        for name, sql in connection.execute("SELECT name, sql FROM sqlite_master LIMIT 100")
        if name != "sqlite_autoindex_Settings_1"
    }
    newer = isinstance(version, int) and USER_VERSION < version <= USER_VERSION + 1000
    if newer and (version ^ USER_VERSION).bit_count() > 1 and "Cache" in found:
        raise OtherVersion(
            f"made by a newer version of this package (schema {version}, ours is {USER_VERSION}); set another "
            "SOFTCAP_CACHE_DIR or remove this folder"
        )
    if version != USER_VERSION or found != STATEMENTS:
        names = found.keys() | STATEMENTS  # a damaged name may be no text
        odd = sorted(str(name) for name in names if found.get(name) != STATEMENTS.get(name))
        raise Foreign(f"its schema is not ours ({', '.join(odd)[:100] or f'version {version}'})")
    settings = dict(connection.execute("SELECT key, value FROM Settings LIMIT 100"))
    for name in METADATA:
        if type(settings.pop(name, None)) is not int:
            raise Foreign(f"its Settings row {name!r} is not a number")
    if settings != SETTINGS or any(type(settings[name]) is not type(SETTINGS[name]) for name in SETTINGS):
        raise Foreign("its Settings rows are not ours")


def create(folder: Path) -> None:
    """Create an empty database in ``folder``, complete before it becomes visible.

    Raises OSError, sqlite3.Error.
    """
    temporary = folder / f"{DBNAME}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        temporary.chmod(0o600)  # the umask may have taken from it; SQLite gives its journal the same mode
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("PRAGMA auto_vacuum = 1")
            connection.execute("BEGIN")
            for statement in STATEMENTS.values():
                connection.execute(statement)
            rows = [*SETTINGS.items(), *((name, 0) for name in METADATA)]
            connection.executemany("INSERT INTO Settings VALUES (?, ?)", rows)
            connection.execute(f"PRAGMA user_version = {USER_VERSION}")
            connection.execute("COMMIT")
        finally:
            connection.close()
        os.rename(temporary, folder / DBNAME)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
