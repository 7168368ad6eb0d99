"""Run the parts one after the other, each in a process of its own with a limit of time, and print one table.

    python -m benchmarks.gpu [--out runs/gpu] [--limit 480] [--smoke] [PART ...]

A part whose JSON exists is not run again; one that fails or outlasts its limit does not stop the others, and where it
keeps what it has done, the next call goes on from there. See README.md in this folder for what to carry to the machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.gpu.figures import table, write
from benchmarks.gpu.parts import PARTS, ROOT, Setup

LIMIT = 480
PATHS = ("DATA", "MINILM", "LM")


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def lacking(part: str, environment: Mapping[str, str], smoke: bool) -> list[str]:
    """Return the environment variables that a part needs and that are not set; in smoke mode nothing is needed."""
    return [] if smoke else [name for name in PARTS[part].needs if not environment.get(name)]


def run_child(part: str, chosen: argparse.Namespace) -> str:
    """Run one part in a process of its own; return what became of it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(chosen.out), "--alone", part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with (chosen.out / f"{part}.log").open("a", encoding="utf-8") as log:
        # A group of its own, so that what the part starts ends with it.
        child = subprocess.Popen(
            command + ["--smoke"] * chosen.smoke,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(chosen.limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {chosen.limit:g} s; run it again to go on"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    spent = time.monotonic() - start
    return f"done in {spent:.0f} s" if code == 0 else f"failed after {spent:.0f} s: see {part}.log"


def run_alone(part: str, chosen: argparse.Namespace) -> None:
    """Run one part in this process and write its JSON."""
    transformers.utils.logging.disable_progress_bar()
    paths = {name: Path(os.environ[name]) for name in PATHS if os.environ.get(name)}
    setup = Setup(chosen.out, chosen.smoke, paths)
    write(chosen.out / f"{part}.json", part, {**machine(), "smoke": chosen.smoke}, PARTS[part].run(setup))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see this file's head. Return 1 if a part failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"all by default: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where JSON files and logs are kept")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; always so without a GPU")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; the parts are {', '.join(PARTS)}")
    chosen.out = chosen.out.resolve()
    chosen.smoke = chosen.smoke or not torch.cuda.is_available()
    if chosen.smoke and not chosen.alone:
        chosen.out = chosen.out / "smoke"  # or these files would stand in for those of a GPU
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.alone:
        run_alone(chosen.alone, chosen)
        return 0
    # As an exception, so that the part that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []
    for part in chosen.parts or PARTS:
        if (chosen.out / f"{part}.json").exists():
            outcome = "has its JSON, not run again"
        elif missing := lacking(part, os.environ, chosen.smoke):
            outcome = f"left out: set {' and '.join(missing)}"
        else:
            outcome = run_child(part, chosen)
            failed += [] if outcome.startswith("done") else [part]
        print(f"{part}: {outcome}", flush=True)
    print(f"\n{', '.join(map(str, machine().values()))}{', smoke: no figure counts' if chosen.smoke else ''}")
    print(table(chosen.out, PARTS, verdicts=not chosen.smoke))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
