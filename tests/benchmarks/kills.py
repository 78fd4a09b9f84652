"""A run killed at random moments and resumed, compared byte for byte with one that was left alone.

    make kills KILLS="--recipe everything --count 50"

The model is a small CNN for the digits of scikit-learn, untrained; times differ from run to run, so the files that hold
them (timings.json, report.md, report.html) are left out. Moments are uniform over the time of an undisturbed run. One
process imports everything and forks a child per run, which is why nothing is computed before.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime  # noqa: F401  before the first fork
import torch

import surgery
from surgery import Data
from surgery.demo import digits, digits_cnn

TIMED = ("timings.json", "report.md", "report.html")


def run(recipe: str, out: Path, resume: bool = False) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = digits()
    data = Data(calibration=images[:256].split(64), evaluation=[(images[256:512], labels[256:512])])
    surgery.operate(digits_cnn().eval(), images[:1], recipe, data=data, out=out, resume=resume, latency_rounds=3)


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def succeeded(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(work: Callable[[], None], after: float) -> bool:
    """Whether the child was still running after so many seconds, and so died of it."""
    child = forked(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="everything")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        start = time.perf_counter()
        if not succeeded(forked(partial(run, options.recipe, folder / "undisturbed"))):
            sys.exit("the undisturbed run failed")
        duration = time.perf_counter() - start
        expected = contents(folder / "undisturbed")
        print(f"undisturbed: {duration:.1f} s, {len(expected)} files", flush=True)
        wrong = 0
        for number in range(options.count):
            out, after = folder / f"{number}", chance.uniform(0, duration)
            died = killed(partial(run, options.recipe, out), after)
            steps = sorted(path.name for path in (out / "steps").glob("*")) if out.exists() else []
            same = succeeded(forked(partial(run, options.recipe, out, resume=True))) and contents(out) == expected
            wrong += not same
            state = f"killed after {after:.2f} s, {len(steps)} steps there" if died else "ended before the kill"
            print(f"{number}: {state}; resumed: {'the same bytes' if same else 'DIFFERENT'}", flush=True)
    print(f"{options.count} kills, {wrong} different")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
