"""The process side of `sandbox`: builds the walls around itself, then runs the code it is sent.

Started in a bare interpreter, which imports this file and its two neighbours and nothing else of
Tinsmith. Three processes with namespaces: the one that was started enters them; its child is their
pid 1, the keeper; the keeper's child runs the code. When the keeper goes, the kernel kills
everything in its pid namespace, whatever it is. Without namespaces the started process is the
keeper, and the code's process cannot make others (with Landlock) or shares a process group with
what it makes (without isolation).
"""

# ruff: noqa: SIM105  contextlib, like what the first import says, costs time at every start

from __future__ import annotations

import _socket  # `socket`, `signal` and `typing` would double the time that starting takes
import marshal
import os
import resource
import select
import sys

from .sandbox_seccomp import refuse_system_calls
from .sandbox_walls import (
    drop_capabilities,
    drop_rights,
    enter_namespaces,
    enter_root,
    landlock,
    no_new_privileges,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NAME = "<python>"
_SIGKILL = 9


def main() -> None:
    settings = marshal.loads(bytes.fromhex(sys.argv[-1]))
    sys.argv = [""]
    status = _socket.socket(fileno=settings["status"])
    channel = _socket.socket(fileno=settings["channel"])
    code = 1
    try:
        if settings["isolation"] == "namespaces":
            code = _behind_namespaces(settings, status, channel)
        else:
            os.chdir(settings["folder"])
            _keep(settings, status, channel)
    except BaseException as error:
        _tell(status, f"failed {error or type(error).__name__}")
    finally:
        os._exit(code)


def _tell(status: _socket.socket, text: str) -> None:
    try:
        status.sendall(text.encode("utf-8", "replace"))
    except OSError:
        pass  # whom to tell is gone


def _behind_namespaces(
    settings: dict[str, Any], status: _socket.socket, channel: _socket.socket
) -> int:
    # As root, this process is not of the user that the sandbox's processes are counted for.
    settings["keepers"] = 1 if os.geteuid() == 0 else 2
    enter_namespaces()
    keeper = os.fork()
    if keeper == 0:
        enter_root(settings["readable"], settings["folder_bytes"])
        drop_rights()
        no_new_privileges()
        _keep(settings, status, channel)
    status.close()
    channel.close()
    for fd in (0, 1, 2):
        os.close(fd)
    os.waitpid(keeper, 0)
    return 0


def _keep(settings: dict[str, Any], status: _socket.socket, channel: _socket.socket) -> NoReturn:
    """Start the code's process, tell how it ended, and see that nothing outlives it or whoever
    asked for it."""
    pid = os.fork()
    if pid == 0:
        try:
            status.close()
            os.setpgid(0, 0)
            _wall_in(settings)
        except BaseException as error:
            channel.sendall(f"failed {error or type(error).__name__}".encode())
            os._exit(1)
        _serve(settings, channel)
    channel.close()
    for fd in (0, 1, 2):
        os.close(fd)
    watched = select.poll()
    watched.register(status, select.POLLIN)
    sees_its_end = hasattr(os, "pidfd_open")
    if sees_its_end:
        watched.register(os.pidfd_open(pid), select.POLLIN)
    # Now and then also for the folder on the disk, and for orphans, which are left to the keeper.
    pause = 200 if sees_its_end and settings["folder"] is None else 30
    ended: int | str | None = None
    while ended is None:
        ready = [fd for fd, _ in watched.poll(pause)]
        ended = _reaped(pid)
        if status.fileno() in ready:
            _kill_group(pid)
            os._exit(0)
        if ended is None and _overfull(settings):
            ended = "full"
    _kill_group(pid)
    _tell(status, f"ended {ended}")
    os._exit(0)


def _reaped(pid: int) -> int | None:
    try:
        while True:
            found, status = os.waitpid(-1, os.WNOHANG)
            if found == pid:
                return os.waitstatus_to_exitcode(status)
            if found == 0:
                return None
    except ChildProcessError:
        return None


def _overfull(settings: dict[str, Any]) -> bool:
    """Whether a folder on the disk, which has no size of its own, holds too much."""
    return settings["folder"] is not None and _size(settings["folder"]) > settings["folder_bytes"]


def _size(folder: str) -> int:
    total = 0
    try:
        for entry in os.scandir(folder):
            total += entry.stat(follow_symlinks=False).st_blocks * 512 + 4096
            if entry.is_dir(follow_symlinks=False):
                total += _size(entry.path)
    except OSError:
        pass  # gone in the meantime
    return total


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, _SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _wall_in(settings: dict[str, Any]) -> None:
    _limit(settings)
    if settings["isolation"] == "none":
        return
    alone = settings["isolation"] == "landlock"
    no_new_privileges()
    if alone:
        landlock(settings["readable"], settings["folder"])
        drop_capabilities()
    try:
        refuse_system_calls(alone)
    except OSError:
        if alone:  # nothing else keeps the network away
            raise


def _limit(settings: dict[str, Any]) -> None:
    cpu = settings["cpu_seconds"]
    limits = {
        "RLIMIT_AS": settings["memory_bytes"],
        "RLIMIT_CPU": cpu,
        "RLIMIT_FSIZE": settings["file_bytes"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    if settings["isolation"] == "namespaces":  # where they are counted for the sandbox alone
        limits["RLIMIT_NPROC"] = settings["processes"] + settings["keepers"]
    for name, wanted in limits.items():
        which = getattr(resource, name, None)
        if which is None:
            continue
        _, hard = resource.getrlimit(which)
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # A process may take no notice of the first signal of the CPU limit.
        above = wanted + 1 if name == "RLIMIT_CPU" else wanted
        try:
            resource.setrlimit(which, (wanted, min(above, hard) if hard >= 0 else above))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def _serve(settings: dict[str, Any], channel: _socket.socket) -> NoReturn:
    sys.path[:] = [*settings["stdlib"], *settings["packages"]]
    sys.executable = settings["python"]
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    # What runs is a module named __main__ of its own.
    main_module = type(sys)("__main__")
    sys.modules["__main__"] = main_module
    channel.sendall(b"ready")
    while True:
        size = int.from_bytes(_receive(channel, 4), "big")
        source = _receive(channel, size).decode("utf-8", "replace")
        if not settings["persistent"]:
            channel.close()
        code = _run(source, main_module.__dict__)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass  # closed by the code
        if code is not None or not settings["persistent"]:
            _leave(code or 0)
        channel.sendall(b"done")


def _receive(channel: _socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return parts


def _run(source: str, namespace: dict[str, Any]) -> int | None:
    """Run it as a notebook's cell: the value of a last expression is shown. An exit code if it
    asked to exit."""
    try:
        # ast.PyCF_ONLY_AST, without importing ast
        tree: Any = compile(source, NAME, "exec", 0x400, dont_inherit=True)
        body = tree.body
        shown = body[-1:] if body and type(body[-1]).__name__ == "Expr" else []
        if shown:
            import _ast

            del body[-1]
            last = compile(_ast.Interactive(shown), NAME, "single", dont_inherit=True)
        exec(compile(tree, NAME, "exec", dont_inherit=True), namespace)
        if shown:
            exec(last, namespace)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        _show(error, source)
    return None


def _show(error: BaseException, source: str) -> None:
    import linecache
    import traceback

    linecache.cache[NAME] = (len(source), None, source.splitlines(True), NAME)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != NAME:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except Exception:
        os.write(2, text.encode("utf-8", "replace"))  # stderr was closed or replaced by the code


def _leave(code: int) -> NoReturn:
    """As the interpreter does at its end: wait for threads, run what was registered."""
    import atexit

    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    os._exit(code & 0xFF)
