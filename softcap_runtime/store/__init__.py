"""The cache on disk: bytes by key, built once per machine and verified before use, in one diskcache database.

Nothing read from disk is unpickled or evaluated. A network filesystem is as safe as its locks: NFS with its lock
service locks between hosts; mounted with ``nolock``, two hosts can write at once and damage the database. The damage
is detected, the database moved into quarantine and a new one made. One folder per host avoids it.
"""

from softcap_runtime.store.fingerprint import fingerprint
from softcap_runtime.store.key import Key
from softcap_runtime.store.store import Loaded, Store

__all__ = ["Key", "Loaded", "Store", "fingerprint"]
