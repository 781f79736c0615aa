"""Whether a cache folder may be used: who owns it, and who else could write to it.

The folder, every folder above it, and everything in it must belong to the user or to root and be writable by
nobody else. Above it a sticky folder such as /tmp is allowed, and in a container a folder of an owner outside of it.
Symbolic links inside are refused.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LStat = Callable[[str], os.stat_result]
SUBFOLDERS = ("locks", "quarantine")
_MOST_LINKS = 40  # as in the kernel


class Verdict(NamedTuple):
    """``problem``: why the folder must not be used, in one line with the remedy; None when it may.

    ``owner`` (a uid) and ``mode`` are the folder's; None when it is not there.
    """

    problem: str | None
    writable: bool
    owner: int | None = None
    mode: int | None = None


def check(folder: Path, lstat: LStat = os.lstat) -> Verdict:
    """The verdict on ``folder``, an absolute path. Reads only names, owners and modes; never raises."""
    user = os.geteuid()
    try:
        status = os.stat(folder)
    except OSError as error:
        return Verdict(f"cache folder {folder}: {error.strerror or error}", False)
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        return Verdict(
            f"cache folder {folder} is a file, expected a folder; remove it or set another SOFTCAP_CACHE_DIR", False
        )
    try:
        problem = _chain_problem(folder, user, lstat) or _content_problem(folder, user, lstat)
    except OSError as error:
        problem = f"cache folder {folder}: {error}"
    return Verdict(problem, os.access(folder, os.W_OK | os.X_OK, effective_ids=True), owner, mode)


def probe(folder: Path) -> str | None:
    """Why ``folder``, which need not exist, cannot be used, in one line; None if it can. Never raises or creates."""
    if os.path.lexists(folder):
        return check(folder).problem
    above = next(path for path in folder.parents if os.path.lexists(path))
    remedy = "set another SOFTCAP_CACHE_DIR"
    if not above.exists():
        return f"cache folder {folder}: {above} is a link that leads nowhere; repair it or {remedy}"
    if not above.is_dir():
        return f"cache folder {folder}: {above} is a file, expected a folder; remove it or {remedy}"
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        return f"cache folder {folder} cannot be made in {above}: it is read-only; {remedy}"
    return None


def make_private(folder: Path) -> None:
    """Create ``folder`` and its missing parents with mode 0700, whatever the umask. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue  # another process was faster
        path.chmod(0o700)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder")


def _chain_problem(folder: Path, user: int, lstat: LStat) -> str | None:
    passed, real = _looked_up(folder)
    for path in dict.fromkeys(passed):
        problem = _problem(path, lstat(str(path)), user, above=path != real)
        if problem:
            return problem
    return None


def _looked_up(folder: Path) -> tuple[list[Path], Path]:
    """Every folder and link that a look-up of ``folder`` passes, links followed, and the real path that it ends at."""
    place = Path("/")
    passed = [place]
    ahead = [*reversed(folder.parts[1:])]
    links = 0
    while ahead:
        step = ahead.pop()
        if step == "..":
            place = place.parent
        elif (place / step).is_symlink():
            passed.append(place / step)
            links += 1
            if links > _MOST_LINKS:  # a loop, or somebody is changing them
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
            target = place / os.readlink(place / step)
            place = Path("/")
            ahead += reversed(target.parts[1:])
        else:
            place /= step
        passed.append(place)
    return passed, place


def _content_problem(folder: Path, user: int, lstat: LStat) -> str | None:
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        try:
            paths = list(place.iterdir())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # not there, or private to its owner, who was checked: this process cannot use its contents
        for path in paths:
            try:
                status = lstat(str(path))
            except FileNotFoundError:
                continue  # another process removed it
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "neither file nor folder"
                return f"cache folder not used: {path} is {kind}; remove it: rm {shlex.quote(str(path))}"
            problem = _problem(path, status, user, above=False)
            if problem:
                return problem
    return None


def _problem(path: Path, status: os.stat_result, user: int, *, above: bool) -> str | None:
    mode = stat.S_IMODE(status.st_mode)
    shown = f"cache folder not used: {path} (owner {owner_name(status.st_uid)}, mode {mode:04o})"
    if status.st_uid not in (user, 0) and not (above and _is_host_root(status.st_uid)):
        chown = f"chown {owner_name(user)} {shlex.quote(str(path))}"
        return f"{shown} belongs to another user; set another SOFTCAP_CACHE_DIR or run: {chown}"
    if stat.S_ISLNK(status.st_mode) or not mode & 0o022:
        return None
    if above and mode & stat.S_ISVTX:
        return None
    if not mode & 0o002 and _private_group(status, user):
        return None
    return f"{shown} is writable by others; run: chmod go-w {shlex.quote(str(path))}"


def _private_group(status: os.stat_result, user: int) -> bool:
    """Whether the group is the user's private one: the same number, and no other member."""
    if user == 0 or status.st_gid != user:
        return False
    import grp
    import pwd

    try:
        members = set(grp.getgrgid(status.st_gid).gr_mem)
        return members <= {pwd.getpwuid(user).pw_name}
    except KeyError:
        return False


def _is_host_root(uid: int) -> bool:
    """Whether ``uid`` stands for owners outside this user namespace, as that of ``/`` does in containers."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
        mapped = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False
    return uid == overflow and mapped != ["0", "0", "4294967295"]


def owner_name(uid: int) -> str:
    """The user's name, or the number if it has none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
