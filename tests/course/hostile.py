"""Programs that mean harm, what may come of each, and a runner that needs nothing but the sandbox.

Each says LEAK where it got what it wanted. `{outside}` is a folder that everyone may read and write, with the file
"canary"; `{port}` has a listener; `{parent}` is the process that tests.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from qftlab_course.agent_edit.sandbox import run_code

NO = {"error", "refused"}
TIMEOUT, MEMORY, OUTPUT = 3.0, 128 << 20, 10_000
TRY = "try:\n    {}\n    print('LEAK')\nexcept OSError as error:\n    print(type(error))\n"
# name: (program, statuses that bwrap may give it); monty may also refuse each of them
PROGRAMS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", {"error", "timeout"}),
    "patient fork bomb": (
        "import os, time\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.01)",
        {"timeout"},
    ),
    "count of forks": (
        "import os, time\nfor n in range(100):\n    if os.fork() == 0:\n        time.sleep(60)\nprint('LEAK')",
        {"error"},
    ),
    "memory, one list": ("x = [0] * 10**10", {"memory"}),
    "memory, by and by": ("x = []\nwhile True:\n    x.append('a' * 10**6 + str(len(x)))", {"memory"}),
    "memory, caught": (
        "while True:\n    try:\n        x = [0] * 10**10\n    except MemoryError:\n        pass", {"timeout"},
    ),
    "memory, text": ("x = 'a' * 10**11", {"memory"}),
    "power tower": ("x = 9**9**9", {"memory", "timeout"}),
    "shift": ("x = 1 << (1 << 40)", {"memory", "error"}),
    "disk, one file": ("f = open('/tmp/big', 'wb')\nwhile True:\n    f.write(b'0' * 10**6)\n    f.flush()", {"error"}),
    "disk, many files": (
        "for n in range(10**9):\n    with open(f'/tmp/{n}', 'wb') as f:\n        f.write(b'0' * 10**6)", {"error"},
    ),
    "disk, root": (TRY.format("open('/big', 'wb').write(b'0')"), {"ok"}),
    "disk, devices": (TRY.format("open('/dev/shm/big', 'wb').write(b'0')"), {"ok"}),
    "network, local": (
        "import socket\n" + TRY.format("socket.create_connection(('127.0.0.1', {port}), 2)"), {"ok"},
    ),
    "network, outside": (
        "import socket\n" + TRY.format("socket.create_connection(('192.0.2.1', 80), 2)"), {"ok"},
    ),
    "network, a name": ("import urllib.request\n" + TRY.format("urllib.request.urlopen('http://localhost')"), {"ok"}),
    "network, abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\n" + TRY.format("s.connect('\\0qftlab-{port}')"), {"ok"},
    ),
    "passwords": (TRY.format("print(open('/etc/passwd').read())"), {"ok"}),
    "canary": (TRY.format("print(open('{outside}/canary').read())"), {"ok"}),
    "canary by a link": (
        "import os\n" + TRY.format("os.symlink('{outside}/canary', '/tmp/x'); print(open('/tmp/x').read())"), {"ok"},
    ),
    "canary by dots": (TRY.format("print(open('/tmp/../../../..{outside}/canary').read())"), {"ok"}),
    "write outside": (TRY.format("open('{outside}/left', 'w').write('x')"), {"ok"}),
    "write into the library": (TRY.format("open('/usr/lib/left', 'w').write('x')"), {"ok"}),
    "homes": ("import os\n" + TRY.format("print(os.listdir('/root'), os.listdir('/home'))"), {"ok"}),
    "walk for the canary": (
        "import os\nfor top, folders, names in os.walk('/'):\n    folders[:] = set(folders) - {'usr'}\n"
        "    if 'canary' in names:\n        print('LEAK', top)",
        {"ok"},
    ),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(0.2)", {"ok", "error"}),
    "kill all": ("import os\nos.kill(-1, 9)\nprint('alive')", {"ok", "error"}),
    "kill the tester": ("import os\n" + TRY.format("os.kill({parent}, 9)"), {"ok"}),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)",
        {"ok"},
    ),
    "daemon that writes on": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        print('x', flush=True)",
        {"ok", "output"},
    ),
    "endless output": ("while True:\n    print('x' * 100)", {"output"}),
    "endless errors": ("import sys\nwhile True:\n    sys.stderr.write('x' * 100)", {"output"}),
    "output, then fine": ("print('x' * 10**6)", {"output"}),
    "output, caught": (
        "while True:\n    try:\n        print('x' * 1000, flush=True)\n    except OSError:\n        pass", {"timeout"},
    ),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "loop": ("while True:\n    pass", {"timeout"}),
    "loop, errors caught": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        {"timeout"},
    ),
    "signals ignored": (
        "import signal\nfor s in signal.valid_signals() - {9, 19, 32, 33}:\n    signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n    pass",
        {"timeout"},
    ),
    "stopped": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", {"timeout"}),
    "threads": (
        "import threading, time\nfor n in range(1000):\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('LEAK')",
        {"error", "timeout"},
    ),
    "catastrophic pattern": ("import re\nre.match('(a|a)*b', 'a' * 60)", {"timeout", "ok"}),
    "limits lifted": (
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    print('LEAK')\n"
        "except ValueError:\n    pass",
        {"ok"},
    ),
    "segfault": ("import ctypes\nctypes.string_at(0)", {"error"}),
    "abort": ("import os\nos.abort()", {"error"}),
    "become root": ("import os\n" + TRY.format("os.setuid(0)"), {"ok"}),
    "mount": (
        "import ctypes\nprint(ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) and 'no' or 'LEAK')", {"ok"},
    ),
    "chroot": ("import os\n" + TRY.format("os.chroot('/tmp')"), {"ok"}),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return [f()]\nf()",
        {"error", "memory", "timeout"},
    ),
    "deep source": ("x = " + "[" * 5000 + "]" * 5000, {"error", "memory", "output"}),
    "close all": ("import os\nos.closerange(0, 100)\nprint('x')", {"ok", "error"}),
    "processes": ("import os\n" + TRY.format("print(os.listdir('/proc'))"), {"ok"}),
    "memory of another": (TRY.format("open('/proc/{parent}/environ', 'rb').read()"), {"ok"}),
    "terminal": (TRY.format("open('/dev/tty', 'w').write('x')"), {"ok"}),
    "zeros in a zip": (
        "import io, zipfile\nb = io.BytesIO()\nz = zipfile.ZipFile(b, 'w', 8)\n"
        "with z.open('x', 'w', force_zip64=True) as f:\n    for n in range(300):\n        f.write(bytes(10**6))\n"
        "z.close()\nzipfile.ZipFile(b).read('x')",
        {"memory", "timeout"},
    ),
    "import ours": ("try:\n    import qftlab\n    print('LEAK')\nexcept ImportError:\n    pass", {"ok"}),
    "import theirs": ("try:\n    import numpy\n    print('LEAK')\nexcept ImportError:\n    pass", {"ok"}),
    "environment": ("import os\nprint(dict(os.environ))", {"ok"}),
    "shell": (
        "import subprocess\nprint(subprocess.run('id; ls /; cat {outside}/canary', shell=True))",
        {"ok", "error"},
    ),
    "pip": (
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-m', 'pip', 'download', 'six'], timeout=2).returncode or 'LEAK')",
        {"ok", "error"},
    ),
    "exit code": ("import sys\nsys.exit(7)", {"error"}),
    "hidden exit": ("import os\nos._exit(0)", {"ok"}),
    "null byte": ("a\0b", {"error"}),
    "lone surrogate": ("x = '\ud800'", {"error"}),
    "write on itself": ("open('main.py', 'w').write('x')\n1 / 0", {"error"}),
}  # fmt: skip


def run_all(level: str, values: dict) -> dict[str, dict]:
    """For each program its status, what it wrote and how long it took, eight at once."""

    def one(item: tuple) -> tuple[str, dict]:
        code = item[1][0]
        for name, value in values.items():
            code = code.replace(f"{{{name}}}", str(value))
        began = time.monotonic()
        result = run_code(code, level=level, timeout=TIMEOUT, memory=MEMORY, output=OUTPUT)
        whole = {"status": result.status, "level": result.level, "wrote": result.stdout + result.stderr + result.error}
        return item[0], {**whole, "stdout": result.stdout, "seconds": time.monotonic() - began}

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, PROGRAMS.items()))


if __name__ == "__main__":
    import tempfile

    given = json.loads(sys.argv[1])
    tempfile.tempdir = given.pop("temporary")
    json.dump(run_all(given.pop("level"), given), sys.stdout)
