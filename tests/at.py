"""Run a script and, at a chosen call of a chosen function, a shell command: to kill it, to fill its disk, at that very moment.

    python tests/at.py torch.save 2 during "kill -KILL $PID" forget.py model_family=tiny ...

WHEN is `before` the call, `after` it, or `during` (the command starts when the call does). PID is the script's process.
"""

import functools
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests with `&` has Ctrl-C ignored
name, nth, when, command, script, *arguments = sys.argv[1:]
sys.path.insert(0, str(Path(script).resolve().parent))
owner_name, _, attribute = name.rpartition(".")
owner = pkgutil.resolve_name(owner_name)
function = getattr(owner, attribute)
environment = os.environ | {"PID": str(os.getpid())}
calls = 0


@functools.wraps(function)
def watched(*args: Any, **kwargs: Any) -> Any:
    global calls
    calls += 1
    if calls != int(nth):
        return function(*args, **kwargs)
    if when == "before":
        subprocess.run(command, shell=True, env=environment)
    elif when == "during":
        subprocess.Popen(command, shell=True, env=environment)
    result = function(*args, **kwargs)
    if when == "after":
        subprocess.run(command, shell=True, env=environment)
    return result


setattr(owner, attribute, watched)
for module in [module for module in sys.modules.values() if vars(module).get(attribute) is function]:
    setattr(module, attribute, watched)  # it was imported by its name before
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
