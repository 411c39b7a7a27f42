"""Escapes are tried for real, against each kind of isolation that this machine has."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import tinsmith
from tinsmith.envs import PythonSandbox, SandboxLimits, ToolSet, check_env
from tinsmith.envs.fork_server import EnvSource
from tinsmith.envs.isolation import EnvPool
from tinsmith.primitives.errors import InvalidInput, Unavailable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="isolation is Linux's")
LIMITS = SandboxLimits(
    wall_seconds=20,
    cpu_seconds=10,
    memory_bytes=256 << 20,
    output_bytes=8000,
    file_bytes=1 << 20,
    folder_bytes=4 << 20,
    processes=6,
)


def made(isolation: str, limits: SandboxLimits = LIMITS, **options) -> PythonSandbox:
    try:
        return PythonSandbox(limits, isolation=isolation, **options)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request):
    with made(request.param) as sandbox:
        yield sandbox


def test_what_is_printed_and_the_value_of_the_last_line_come_back(sandbox):
    assert sandbox.run("print('a')\n2**100") == "a\n1267650600228229401496703205376"
    assert sandbox.run("x = 1") == ""
    text = sandbox.run("def f():\n    return 1 / 0\n\nf()")
    assert text.startswith('Traceback (most recent call last):\n  File "<python>", line 4')
    assert "    return 1 / 0" in text
    assert text.endswith("ZeroDivisionError: division by zero")
    assert "SyntaxError" in sandbox.run("1 +")
    assert "null bytes" in sandbox.run("print(1)\0")
    assert "NameError" in sandbox.run("x"), "every run starts afresh"
    assert sandbox.run("input()").endswith("EOFError: EOF when reading a line")
    assert sandbox.run("print('\\udcff ü'.encode('utf-8', 'replace'))") == "b'? \\xc3\\xbc'"
    assert "not run: the code is longer" in sandbox.run("#" * (2 << 20))


def test_how_it_ended_is_told(sandbox):
    assert sandbox.run("print('a')\nraise SystemExit(3)") == "a\n[exit code 3]"
    assert sandbox.run("import os; os._exit(5)") == "[exit code 5]"
    assert sandbox.run("import os; os.abort()").endswith("[killed by SIGABRT]")
    assert sandbox.run("import ctypes; ctypes.string_at(0)").endswith("[killed by SIGSEGV]")


def test_streams_may_be_closed_and_threads_finish(sandbox):
    assert sandbox.run("import sys; print(1); sys.stdout.close(); sys.stderr.close(); 1 / 0") != ""
    assert sandbox.run("import os; os.close(1); os.close(2)") == ""
    code = "import threading, time\n"
    code += "def late(): time.sleep(0.1); print('late')\n"
    code += "threading.Thread(target=late).start(); print('first')"
    assert sandbox.run(code) == "first\nlate"
    assert sandbox.run("import atexit; atexit.register(print, 'end'); None") == "end"


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')",
        "import socket; socket.socket(socket.AF_UNIX).connect('{path}')",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
        "import socket; socket.getaddrinfo('example.com', 80)",
        "import ctypes, os\nif ctypes.CDLL(None).socket(2, 1, 0) < 0: raise OSError('no')",
    ],
)
def test_there_is_no_network_and_no_socket_of_others(sandbox, code, tmp_path):
    name = f"tinsmith-{uuid.uuid4().hex}"
    path = str(tmp_path / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        abstract.bind(f"\0{name}")
        unix.bind(path)
        for server in (tcp, abstract, unix):
            server.listen()
            server.setblocking(False)
        text = sandbox.run(code.format(port=tcp.getsockname()[1], name=name, path=path))
        assert "rror" in text.splitlines()[-1]
        for server in (tcp, abstract, unix):
            with pytest.raises(BlockingIOError):
                server.accept()


def test_memory_is_limited(sandbox):
    assert sandbox.run("hoard = 'x' * (1 << 29)").endswith("MemoryError")
    assert "Error" in sandbox.run("import mmap; mmap.mmap(-1, 1 << 29)")
    assert "Error" in sandbox.run("import os; os.memfd_create('hoard')")
    lists = "hoard = []\nwhile True: hoard.append([0] * 10**6)"
    assert sandbox.run(lists).endswith("MemoryError")


def test_deep_recursion_costs_only_its_own_run(sandbox):
    assert "RecursionError" in sandbox.run("f = lambda n: f(n + 1)\nf(0)")
    deep = "import sys; sys.setrecursionlimit(10**9)\nclass A:\n"
    deep += "    def __getattr__(self, name): return getattr(self, name + 'a')\nA().b"
    assert sandbox.run(deep).splitlines()[-1] in ("MemoryError", "[killed by SIGSEGV]")
    assert sandbox.run("1") == "1"


LOOPS = {
    "plain": "while True: pass",
    "catching": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "deaf": "import signal\nfor s in range(1, 32):\n  if s not in (9, 19): "
    "signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("isolation", ["namespaces", "landlock"])
def test_endless_loops_end(isolation, loop):
    with made(isolation, SandboxLimits(wall_seconds=0.3)) as sandbox:
        text = sandbox.run(f"print(1, flush=True)\n{LOOPS[loop]}")
        assert text == "1\n[killed: not done within 0.3 s]"


@pytest.mark.parametrize(
    ("loop", "how"), [("plain", ": more than 1 s of CPU time"), ("deaf", " by SIGKILL")]
)
def test_cpu_time_is_limited(loop, how):
    with PythonSandbox(SandboxLimits(wall_seconds=60, cpu_seconds=1)) as sandbox:
        assert sandbox.run(LOOPS[loop]) == f"[killed{how}]"


def test_output_is_limited(sandbox):
    text = sandbox.run("while True: print('spam')")
    assert text.endswith("[killed: more than 8000 bytes of output]")
    assert len(text) < 8100
    assert len(sandbox.run("print('x' * 7000)")) == 7000


def test_files_are_limited_and_gone_afterwards(sandbox):
    assert sandbox.run("import os; os.listdir('.')") == "[]"
    assert "File too large" in sandbox.run("open('a', 'wb').write(bytes(2 << 20))")
    fill = "import time\nfor i in range(10**6):\n  open(str(i), 'wb').write(bytes(1 << 16))\n"
    fill += "  if i > 64: time.sleep(0.01)"
    told = ("No space left", "[killed: more than 4194304 bytes of files]")
    assert any(text in sandbox.run(fill).splitlines()[-1] for text in told)
    assert sandbox.run("import os; os.listdir('.')") == "[]"


def test_its_folder_on_the_disk_is_taken_away():
    with made("landlock") as sandbox:
        folder = sandbox.run("import os; open('a', 'w').write('a'); print(os.getcwd())").split()[0]
        assert "tinsmith-python-" in folder
        assert not Path(folder).exists()


def test_nothing_is_written_outside(sandbox, tmp_path):
    code = f"""
import os
for path in ({str(tmp_path / "new")!r}, '/usr/new', '/etc/new', '/dev/shm/new', '/new', '/var/tmp/new'):
    for how in ('w', 'a'):
        try:
            open(path, how).write('x')
            print('wrote', path)
        except OSError:
            pass
for path in ({str(tmp_path)!r}, '/usr/bin/env', '/usr', '/etc', os.__file__):
    for act in (lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.remove(path),
                lambda: os.rename(path, path + 'x'), lambda: os.truncate(path, 0),
                lambda: os.setxattr(path, 'user.a', b'a'), lambda: os.link(path, 'link')):
        try:
            act()
            print('changed', path)
        except OSError:
            pass
"""
    mode = tmp_path.stat().st_mode
    assert sandbox.run(code) == ""
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.stat().st_mode == mode


def test_secrets_stay_unread(sandbox, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "swordfish")
    secret = tmp_path / "secret.txt"
    secret.write_text("swordfish")
    pid, memory = os.getpid(), id(secret)
    code = f"""
import ctypes, os
def attempt(read):
    try:
        print(read())
    except (OSError, ValueError) as error:
        print(type(error).__name__)
attempt(lambda: dict(os.environ))
attempt(lambda: open({str(secret)!r}).read())
attempt(lambda: os.symlink({str(secret)!r}, 'link') or open('link').read())
attempt(lambda: open('../../../../..{secret}').read())
attempt(lambda: open('/proc/{pid}/environ').read())
attempt(lambda: open('/proc/{pid}/mem').read(1))
attempt(lambda: open('/proc/self/environ').read())
attempt(lambda: os.listdir('/proc/{pid}/fd'))
attempt(lambda: os.listdir('/home'))
attempt(lambda: open('/etc/shadow').read())
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(64)
class Vec(ctypes.Structure):
    _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
mine, theirs = Vec(ctypes.addressof(buffer), 64), Vec({memory}, 64)
print(libc.process_vm_readv({pid}, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
print(libc.ptrace(16, {pid}, 0, 0), libc.unshare(0x10000000), libc.mount(b'/', b'/', None, 4096, None))
for fd in range(3, 300):
    try:
        os.fstat(fd)
        print('open', fd)
    except OSError:
        pass
"""
    text = sandbox.run(code)
    assert "swordfish" not in text
    # All are refused but the first, which shows a clean environment.
    shown, *attempts, memory_read, others = text.splitlines()
    assert "PATH" in shown
    assert len(attempts) == 9
    assert set(attempts) <= {"FileNotFoundError", "PermissionError"}
    assert (memory_read, others) == ("-1", "-1 -1 -1")


def test_no_process_outside_can_be_signalled(sandbox):
    with subprocess.Popen(["sleep", "60"]) as other:
        code = f"import os\nfor pid in ({os.getpid()}, {other.pid}, -1):\n"
        code += "  try: os.kill(pid, 9)\n  except OSError as error: print(type(error).__name__)"
        sandbox.run(code)
        assert other.poll() is None
        other.kill()


def test_a_fork_bomb_goes_off_alone(sandbox):
    code = "import os\nmade = 0\ntry:\n  while True:\n    if os.fork() == 0:\n"
    code += "      import time; time.sleep(60)\n      os._exit(0)\n    made += 1\n"
    code += "except OSError as error: print(made, type(error).__name__)"
    alone = sandbox.isolation == "landlock"
    assert sandbox.run(code) == ("0 PermissionError" if alone else "5 BlockingIOError")
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    with made(sandbox.isolation, SandboxLimits(wall_seconds=0.5, processes=8)) as short:
        assert short.run(bomb) == "[killed: not done within 0.5 s]"
    many = "import threading, time\nfor _ in range(10**4): "
    many += "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    assert "can't start new thread" in sandbox.run(many)


def test_nothing_that_it_started_is_left():
    seconds = f"3600.{uuid.uuid4().int % 10**9}"
    code = f"import subprocess\nsubprocess.Popen(['sleep', '{seconds}'], start_new_session=True)\n"
    with made("namespaces") as sandbox:
        assert "Popen" in sandbox.run(code)
        assert "ZeroDivisionError" in sandbox.run(f"{code}1 / 0")
    assert not running(seconds)
    with PythonSandbox(isolation="none", allow_unisolated=True) as open_sandbox:
        open_sandbox.run(code.replace(", start_new_session=True", ""))
    wait_until_gone(seconds)


def running(word: str) -> bool:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in file.read_bytes():
                return True
        except OSError:
            continue
    return False


def wait_until_gone(word: str) -> None:
    deadline = time.monotonic() + 20
    while running(word):
        assert time.monotonic() < deadline, "what the code started still runs"
        time.sleep(0.02)


def test_tinsmith_is_out_of_reach_and_pickles_are_only_the_sandboxs_own(sandbox):
    assert "ModuleNotFoundError" in sandbox.run("import tinsmith")
    assert "ModuleNotFoundError" in sandbox.run("import _tinsmith_sandbox")
    trick = "import os, pickle\nclass A:\n  def __reduce__(self): return os.getpid, ()\n"
    assert sandbox.run(f"{trick}pickle.loads(pickle.dumps(A())) == os.getpid()") == "True"


def test_packages_can_be_imported_where_they_are_given():
    import numpy

    folder = Path(numpy.__file__).parents[1]
    with made("namespaces", packages=[folder]) as sandbox:
        assert sandbox.run("import numpy; int(numpy.arange(4).sum())") == "6"
        assert "Read-only" in sandbox.run(f"open({str(folder / 'new')!r}, 'w')")


@pytest.mark.parametrize("isolation", ["namespaces", "landlock"])
def test_a_persistent_sandbox_remembers_until_it_is_killed(isolation):
    with made(isolation, SandboxLimits(wall_seconds=0.5), persistent=True) as sandbox:
        assert sandbox.run("import os\nx = 20") == ""
        assert sandbox.run("def f(y): return x + y") == ""
        assert sandbox.run("open('a', 'w').write('a'); f(1)") == "21"
        assert "ZeroDivisionError" in sandbox.run("1 / 0")
        assert sandbox.run("os.listdir('.')") == "['a']"
        assert sandbox.run("while True: pass") == "[killed: not done within 0.5 s]"
        assert "NameError" in sandbox.run("x")
        assert sandbox.run("raise SystemExit(2)") == "[exit code 2]"
        assert sandbox.run("1") == "1"


# In a process that was itself denied namespaces, as in most containers; the second also has used
# up the layers of Landlock that a process may have.
WITHOUT_NAMESPACES = """
import sys
from tinsmith.envs import sandbox_walls as walls
from tinsmith.envs.sandbox_seccomp import refuse_system_calls
from tinsmith.envs import PythonSandbox
from tinsmith.primitives.errors import Unavailable
walls.no_new_privileges()
refuse_system_calls(alone=False)
for _ in range(int(sys.argv[1])):
    walls.landlock(["/"], "/tmp")
try:
    with PythonSandbox() as sandbox:
        print(sandbox.isolation, sandbox.run("6 * 7"))
except Unavailable as error:
    print(error)
with PythonSandbox(allow_unisolated=True) as sandbox:
    print(sandbox.isolation, sandbox.run("6 * 7"))
"""


def test_without_namespaces_landlock_is_taken_and_without_either_it_refuses():
    made("landlock").close()
    outcomes = []
    for layers in ("0", "16"):
        command = [sys.executable, "-c", WITHOUT_NAMESPACES, layers]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        outcomes.append(done.stdout.splitlines())
    assert outcomes[0] == ["landlock 42", "landlock 42"]
    assert "cannot be isolated here (namespaces: unshare:" in outcomes[1][0]
    assert "give allow_unisolated=True" in outcomes[1][0]
    assert outcomes[1][1] == "none 42"


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidInput, match="needs allow_unisolated"):
        PythonSandbox(isolation="none")
    with pytest.raises(InvalidInput, match="isolation must be one of"):
        PythonSandbox(isolation="vm")
    with pytest.raises(InvalidInput, match=r"SandboxLimits\.cpu_seconds must be above 0"):
        SandboxLimits(cpu_seconds=0)


AS_ANOTHER_USER = """
import sys, types
package = types.ModuleType("tinsmith")
package.__path__ = [sys.argv[1]]
sys.modules["tinsmith"] = package
from tinsmith.envs.sandbox import PythonSandbox
for isolation in ("namespaces", "landlock"):
    with PythonSandbox(isolation=isolation) as sandbox:
        print(sandbox.run("import os; print(6 * 7, os.getuid())"))
        print(sandbox.run("import socket; socket.socket()").splitlines()[-1])
"""


def test_an_ordinary_user_has_the_same_walls():
    python, setpriv = "/usr/bin/python3", shutil.which("setpriv")
    root = str(Path(tinsmith.__file__).parent)
    if os.geteuid() != 0 or setpriv is None or not Path(python).exists():
        pytest.skip("needs root, setpriv and a Python that every user can run")
    user = [setpriv, "--reuid=65533", "--regid=65533", "--clear-groups"]
    if subprocess.run(
        [*user, python, "-c", AS_ANOTHER_USER.splitlines()[1]], check=False
    ).returncode:
        pytest.skip("setpriv cannot become another user here")
    if subprocess.run([*user, "test", "-r", f"{root}/envs/sandbox.py"], check=False).returncode:
        pytest.skip("the checkout cannot be read by other users")
    command = [*user, python, "-c", AS_ANOTHER_USER, root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    refused = "PermissionError: [Errno 1] Operation not permitted"
    assert done.stdout.splitlines() == ["42 65534", refused, "42 65533", refused], done.stderr


async def test_a_model_calls_it_as_a_tool():
    with PythonSandbox() as sandbox:
        tools = ToolSet([sandbox.tool()], syntax="plain")
        assert tools.schemas[0]["function"]["parameters"]["required"] == ["code"]
        (result,) = await tools.run("python('print(6 * 7)')")
    assert (result.ok, result.text) == (True, "42")


def test_the_bundled_environment_keeps_to_the_interface():
    check_env("python", actions=('<tool_call>{"name": "python", "arguments": {"code": "1"}}', "12"))


async def test_the_bundled_environment_plays_in_its_own_process_and_leaves_nothing_behind():
    seconds = f"3600.{uuid.uuid4().int % 10**9}"
    run = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
    hang = f"import subprocess; subprocess.run(['sleep', '{seconds}'])"
    async with EnvPool() as pool:
        async with pool.open(EnvSource("python"), {"split": "eval"}) as env:
            messages, _ = await env.reset(5, None)
            step = await env.step(run % "print(6 * 7)")
            assert step.messages[-1] == {"role": "tool", "name": "python", "content": "42"}
            step = await env.step(f"It is {step.info['expected']}")
            assert (step.reward, step.terminated, step.info["success"]) == (1.0, True, True)
        async with pool.open(EnvSource("python"), {}, step_seconds=1.0) as env:
            again, _ = await env.reset(5, None)
            with pytest.raises(tinsmith.EnvironmentFailure, match="hung in step 1"):
                await env.step(run % hang)
    assert again != messages  # of another split
    wait_until_gone(seconds)
