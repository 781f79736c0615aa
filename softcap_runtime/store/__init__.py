"""What lies on disk: bytes by key, verified before use, built once per machine, in one diskcache database.

Nothing read from disk is unpickled or evaluated. On a local filesystem every promise holds. On a network
filesystem they hold as far as its locks do: NFS with its lock service keeps SQLite's and flock's locks
between hosts; mounted with ``nolock`` (or another filesystem without them) two hosts may write at once and
damage the database, which is found, moved aside and rebuilt. A folder per host is the better choice there.
"""

from softcap_runtime.store.fingerprint import fingerprint
from softcap_runtime.store.key import Key
from softcap_runtime.store.store import Loaded, Store

__all__ = ["Key", "Loaded", "Store", "fingerprint"]
