"""Scripts in processes of their own, as `python -c` runs them, without the seconds of the imports.

A server imports what nearly all of them do, and each script is a fork of it, with arguments, an
environment and a working directory of its own. TileLang is not among the imports, as tests ask what
happens while it is imported: scripts that take it as given are forks of a second server.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 300

SERVER = """
import contextlib, importlib, json, os, signal, sys
for name in ("click", "rich.console", "rich.progress", "rich.table", *sys.argv[1:]):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
import tile_mhc.jit

script = None
while script is None and (line := sys.stdin.readline()):
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            script = request
            break
    print(json.dumps(answer), flush=True)
if script is not None:
    signal.alarm(script["seconds"])
    for stream, path in enumerate((os.devnull, script["out"], script["err"])):
        os.dup2(os.open(path, os.O_RDWR), stream)
    os.environ.clear()
    os.environ.update(script["env"])
    os.chdir(script["cwd"])
    sys.argv[1:] = script["arguments"]
    exec(script["code"], {"__name__": "__main__"})
"""


class Script:
    """A process that runs `code`, from now on; with `tilelang` it has TileLang imported already."""

    def __init__(
        self, code: str, *arguments: Any, cwd: str | Path = "/", tilelang: bool = False, **env: str
    ) -> None:
        self.server = _server(tilelang)
        self.folder = tempfile.TemporaryDirectory()
        files = {name: Path(self.folder.name, name) for name in ("out", "err")}
        for file in files.values():
            file.touch()
        self.process = _ask(
            self.server,
            code=code,
            arguments=[str(argument) for argument in arguments],
            cwd=str(cwd),
            env=os.environ | env,
            seconds=SECONDS,
            **{name: str(file) for name, file in files.items()},
        )

    def finish(self) -> tuple[int, str, str]:
        """Wait for it: the exit status and what it printed on stdout and stderr."""
        with self.folder:
            status = _ask(self.server, wait=self.process)
            return status, *(Path(self.folder.name, name).read_text() for name in ("out", "err"))


def run(code: str, *arguments: Any, **options: Any) -> tuple[int, str, str]:
    """The outcome of `Script(code, *arguments, **options)`."""
    return Script(code, *arguments, **options).finish()


def _ask(server: "subprocess.Popen[str]", **request: Any) -> int:
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        raise RuntimeError("the server of scripts has ended")
    return json.loads(line)


@functools.cache
def _server(tilelang: bool) -> "subprocess.Popen[str]":
    """It ends with its stdin, and so with this process."""
    folder = tempfile.TemporaryDirectory()
    # TileLang makes its cache's folders as it is imported, and then asks the variable each time.
    atexit.register(folder.cleanup)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, *(["tilelang"] if tilelang else [])],
        cwd="/",
        env=os.environ | {"TILELANG_CACHE_DIR": folder.name},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    # Waited for, so that its time counts as this process's.
    atexit.register(server.communicate)
    return server
