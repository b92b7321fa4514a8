"""A stand-in for a Python on PATH: writes down its calls, pretends venv and pip, runs launch.py for real.

Called as `real-python -I stand_in_python.py WORLD STAND_IN ARGUMENTS...`; WORLD/answers.json says which calls
fail or hang: a list of [part of the call, exit status, what is printed].
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from pathlib import Path


def main(world: Path, stand_in: Path, arguments: list[str]) -> int:
    call = " ".join([stand_in.name, *arguments])
    with (world / "calls.txt").open("a", encoding="utf-8") as calls:
        calls.write(call + "\n")
    for part, status, says in json.loads((world / "answers.json").read_text(encoding="utf-8")):
        if part in call:
            print(says, flush=True)
            if status == "hang":
                wait_for(world / "go-on")
                return 0
            return int(status)
    if "venv" in arguments:
        (Path(arguments[-1]) / "bin").mkdir()
        shutil.copy(stand_in, Path(arguments[-1]) / "bin/python")
    elif any(argument.endswith("launch.py") for argument in arguments):
        sys.executable = str(stand_in)
        sys.argv = arguments[3:]  # after -I -X utf8
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif "pip" not in arguments and "-c" not in arguments:  # app.py or pytest
        seen = {"arguments": arguments, "cwd": os.getcwd()}
        print(json.dumps(seen | {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}))
    return 0


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
