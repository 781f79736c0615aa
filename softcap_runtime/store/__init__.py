"""The cache on disk: bytes by key, verified before use, built once per machine, in one diskcache database.

Nothing read from disk is unpickled or evaluated. A network filesystem is as safe as its locks: NFS with its lock
service keeps SQLite's and flock's locks between hosts; with ``nolock`` two hosts may write at once and damage the
database, which is found, moved into quarantine and made anew. A folder per host avoids it.
"""

from softcap_runtime.store.fingerprint import fingerprint
from softcap_runtime.store.key import Key
from softcap_runtime.store.store import Loaded, Store

__all__ = ["Key", "Loaded", "Store", "fingerprint"]
