"""The kernel's walls around sandboxed code: namespaces with a root of their own, or Landlock.

Runs in a bare interpreter (standard library only; see `sandbox_child`). Every function raises
`OSError` where the kernel, or what it runs in, does not allow the wall.
"""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

libc = ctypes.CDLL(None, use_errno=True)

NOBODY = 65534
FOLDER = "/tmp"
"""The code's own folder, as it sees it, where it has a root of its own."""
FOLDER_FILES = 4096

# <linux/sched.h>
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
# <sys/mount.h>
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_DETACH = 2
# System calls; the latter have the same number on every machine.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_AT_RECURSIVE = 0x8000
# <linux/prctl.h>
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38

SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def no_new_privileges() -> None:
    """No program started from here on gains rights; no other process looks into this one."""
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def enter_namespaces() -> None:
    """A user, network, mount and IPC namespace, and a pid namespace for the next child.

    Root is mapped beside `NOBODY`, because its files may be where only root can go; any other user
    becomes `NOBODY`.
    """
    uid, gid = os.geteuid(), os.getegid()
    ready = os.pipe()
    outside = os.fork()  # who writes the map must still be outside
    if outside == 0:
        code = 1
        try:
            os.close(ready[1])
            os.read(ready[0], 1)
            _write_maps(os.getppid(), uid, gid)
            code = 0
        finally:
            os._exit(code)
    try:
        check(libc.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWPID | _NEWIPC), "unshare")
    finally:
        for end in ready:
            os.close(end)
        _, status = os.waitpid(outside, 0)
    if status:
        raise OSError("the user namespace's map cannot be written")


def _write_maps(pid: int, uid: int, gid: int) -> None:
    if uid == 0:
        maps = {"uid_map": f"0 0 1\n{NOBODY} {NOBODY} 1", "gid_map": f"0 0 1\n{NOBODY} {NOBODY} 1"}
    else:
        maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {uid} 1", "gid_map": f"{NOBODY} {gid} 1"}
    for name, text in maps.items():
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def enter_root(readable: Sequence[str], folder_bytes: int) -> None:
    """A root that holds only `readable` and the system's libraries, read-only, and one folder to
    write in, in memory, of that size. There is no /proc."""
    links: list[tuple[str, str]] = []
    sources: dict[str, int] = {}
    for path in dict.fromkeys((*SYSTEM, *readable, *DEVICES)):
        if os.path.islink(path):
            links.append((os.readlink(path), path))
        elif os.path.exists(path) and not any(_inside(path, other) for other in sources):
            # Opened now: what is in FOLDER is out of sight once that is covered.
            sources[path] = os.open(path, os.O_PATH)
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", FOLDER, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(FOLDER + FOLDER)
    options = f"size={folder_bytes},nr_inodes={FOLDER_FILES},mode=700,uid={NOBODY},gid={NOBODY}"
    _mount("tmpfs", FOLDER + FOLDER, "tmpfs", _NOSUID | _NODEV, options)
    for target, path in links:
        os.makedirs(os.path.dirname(FOLDER + path), exist_ok=True)
        os.symlink(target, FOLDER + path)
    for path, source in sources.items():
        _mirror(path, source)
    os.chdir(FOLDER)
    pivot = _PIVOT_ROOT.get(os.uname().machine, -1)
    check(libc.syscall(pivot, b".", b"."), "pivot_root")
    check(libc.umount2(b".", _DETACH), "umount2")
    os.chdir("/")
    _read_only("/", recursive=False)
    os.chdir(FOLDER)


def _inside(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _mirror(path: str, source: int) -> None:
    """Bind what is open as `source` to its path in the new root."""
    target = FOLDER + path
    if os.path.isdir(f"/proc/self/fd/{source}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(f"/proc/self/fd/{source}", target, None, _BIND | _REC)
    os.close(source)
    if path not in DEVICES:
        _read_only(target)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    source_b, target_b, kind_b, options_b = encoded
    check(
        libc.mount(source_b, target_b, kind_b, ctypes.c_ulong(flags), options_b), f"mount {target}"
    )


def _read_only(path: str, recursive: bool = True) -> None:
    attributes = struct.pack("=QQQQ", 1 | 2 | 4, 0, 0, 0)  # read-only, no set-uid, no devices
    flags = _AT_RECURSIVE if recursive else 0
    result = libc.syscall(_MOUNT_SETATTR, -100, path.encode(), flags, attributes, len(attributes))
    check(result, f"mount_setattr {path}")


def drop_rights() -> None:
    """Become `NOBODY` without capabilities."""
    if os.geteuid() == 0:
        os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    drop_capabilities()


def drop_capabilities() -> None:
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, none), "capset")


def landlock(readable: Sequence[str], writable: str) -> None:
    """Only `readable` and the system's libraries can be read, only `writable` written.

    Raises:
        OSError: Landlock is not there, or older than version 3 (Linux 6.2), which cannot keep
            files from being truncated.
    """
    version = check(libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    if version < 3:
        raise OSError(f"Landlock is of version {version}, older than 3 (Linux 6.2)")
    everything = (1 << 15) - 1
    execute, write_file, read_file, read_dir = 1, 2, 4, 8
    of_files = execute | write_file | read_file | 1 << 14
    rules = struct.pack("=Q", everything)
    ruleset = check(libc.syscall(_LANDLOCK_CREATE, rules, len(rules), 0), "Landlock")
    grants = dict.fromkeys((*SYSTEM, *readable), execute | read_file | read_dir)
    grants |= dict.fromkeys(DEVICES, read_file | write_file) | {writable: everything}
    for path, allowed in grants.items():
        if not os.path.exists(path):
            continue
        opened = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & of_files, opened)
        check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"Landlock {path}")
        os.close(opened)
    check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)
