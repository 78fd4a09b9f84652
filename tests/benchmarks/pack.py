"""The pack measured: speed, size, memory, and mutated files.

    make pack-bench PACK="speed"                       weights of the sizes of VGG-16-BN, in MB/s of float32
    make pack-bench PACK="size"                        real ResNets against the entropy of what was chosen
    make pack-bench PACK="memory"                      peak memory of a process that decodes
    make pack-bench PACK="fuzz --count 100000"         every mutated file: an error, or the right model

Speed and memory use random weights that are Laplacian, clustered by Lloyd's algorithm. `MB/s` counts 4 bytes for every
weight that is represented, whatever the tensor holds; it is the median of the rounds, in brackets by processor time
(one thread). `over the entropy`: bytes of all streams of symbols, code tables included, against the sum of their
zeroth-order entropies, block by block as they are coded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from pack_attacks import ATTACKS
from pack_mutations import LIMIT, WAYS, every_kind, outcome, write_model

import surgery
from surgery.packing.form import Raw, leaves

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def vgg16_shapes() -> dict[str, tuple[int, ...]]:
    """The weights of VGG-16-BN's convolutions and linear layers."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    shapes: dict[str, tuple[int, ...]] = {
        f"features.{k}.weight": (b, a, 3, 3) for k, (a, b) in enumerate(pairwise(channels))
    }
    return shapes | {
        "classifier.0.weight": (4096, 25088),
        "classifier.3.weight": (4096, 4096),
        "classifier.6.weight": (1000, 4096),
    }


def laplacian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = (torch.rand(shape, generator=generator) - 0.5).clamp(min=-0.4999999)  # no infinity
    return uniform.sign() * torch.log1p(-2 * uniform.abs()).neg() * 0.02


def clustered(weight: Tensor, bits: int, keep: float = 1.0) -> tuple[Tensor, Tensor]:
    """Indices and 2^bits levels: 0, and those that Lloyd's algorithm finds from evenly spaced ones on a sample of the
    largest share `keep` of the weights; all others have the index of 0."""
    some = weight.flatten()[:: max(1, weight.numel() // 50_000)]
    threshold = some.abs().quantile(1 - keep)
    some = some[some.abs() > threshold]
    levels = torch.linspace(float(some.min()), float(some.max()), (1 << bits) - 1)
    for _ in range(20):
        nearest = torch.bucketize(some, (levels[1:] + levels[:-1]) / 2)
        sums, counts = (torch.bincount(nearest, w, len(levels)) for w in (some, None))
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort().values
    levels = levels.float()
    indices = (torch.bucketize(weight, (levels[1:] + levels[:-1]) / 2) + 1).to(torch.uint8)
    return indices * (weight.abs() > threshold), torch.cat([torch.zeros(1), levels])


def packed(indices: Tensor) -> Tensor:
    flat = indices.reshape(-1)
    return flat[::2] | flat[1::2] << 4


KINDS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {}


def kind(function: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Tensor], dict[str, Tensor]]:
    KINDS[function.__name__] = function
    return function


@kind
def indices4(weight: Tensor) -> dict[str, Tensor]:
    """4 bits: two indices a byte, and the levels."""
    indices, levels = clustered(weight, 4)
    return {"indices": packed(indices), "codebook": levels}


@kind
def indices8(weight: Tensor) -> dict[str, Tensor]:
    """8 bits: an index a byte, and the levels."""
    indices, levels = clustered(weight, 8)
    return {"indices": indices, "codebook": levels}


@kind
def float4(weight: Tensor) -> dict[str, Tensor]:
    """float32 of 16 values."""
    indices, levels = clustered(weight, 4)
    return {"weight": levels[indices.long()]}


@kind
def sparse4(weight: Tensor) -> dict[str, Tensor]:
    """float32, 90 % zeros, the rest of 15 values."""
    indices, levels = clustered(weight, 4, 0.1)
    return {"weight": levels[indices.long()]}


@kind
def sparse_indices4(weight: Tensor) -> dict[str, Tensor]:
    """4 bits, two indices a byte, 90 % of them the index of zero."""
    indices, levels = clustered(weight, 4, 0.1)
    return {"indices": packed(indices), "codebook": levels}


@kind
def dense(weight: Tensor) -> dict[str, Tensor]:
    """float32 as trained."""
    return {"weight": weight}


def model_folder(folder: Path, name: str, largest: int) -> int:
    """A model.py with weights of the kind `name`; gives the number of weights represented."""
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, 0
    for layer, shape in vgg16_shapes().items():
        if np.prod(shape) > largest:
            continue
        weight = laplacian(shape, generator)
        weights += weight.numel()
        tensors |= {f"{layer}.{part}": tensor for part, tensor in KINDS[name](weight).items()}
    write_model(folder, tensors)
    return weights


def median(function: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds on the clock, and of processor time, which other programs disturb less."""
    clock, processor = [], []
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        function()
        clock.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return statistics.median(clock), statistics.median(processor)


def decode(path: Path) -> None:
    with surgery.Pack(path, limit_bytes=1 << 34) as pack:
        for _ in pack.tensors():
            pass


# --- speed ---


def speed(options: argparse.Namespace) -> None:
    print("| weights | represented | file | stored as | encode MB/s | decode MB/s | over the entropy |")
    print("|---|---|---|---|---|---|---|")
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            weights = model_folder(folder, name, options.largest)
            path = folder / "model.surgery"
            encoding = median(lambda folder=folder, path=path: surgery.pack(folder, path), options.encodings)
            decoding = median(lambda path=path: decode(path), options.rounds)
            with surgery.Pack(path) as pack:
                stored = Counter(entry.representation for entry in pack.entries.values()).most_common(2)
                coded, entropy = symbol_bytes(pack)
            print(
                f"| {name} | {weights * 4 / 1e6:.0f} MB | {path.stat().st_size / 1e6:.2f} MB"
                f" | {', '.join(text for text, _ in stored)} | {in_words(weights, encoding)}"
                f" | {in_words(weights, decoding)} | {coded / entropy - 1:+.2%} |",
                flush=True,
            )


def in_words(weights: int, seconds: tuple[float, float]) -> str:
    clock, processor = (weights * 4 / 1e6 / value for value in seconds)
    return f"{clock:.0f} ({processor:.0f})"


def symbol_bytes(pack: surgery.Pack) -> tuple[int, float]:
    """Bytes of all streams of symbols, and their entropies, block by block."""
    coded, entropy = 0, 0.0
    for symbols, size in symbol_blocks(pack):
        counts = np.bincount(symbols)
        counts = counts[counts > 0].astype(float)
        coded += size
        entropy += float(counts @ np.log2(counts.sum() / counts)) / 8
    return coded, max(entropy, 1e-9)


def symbol_blocks(pack: surgery.Pack) -> Iterator[tuple[np.ndarray, int]]:
    from surgery.packing.reading import block_places

    pack._find_codec()
    for record in pack._header.tensors:
        for place in block_places(record.part, pack._places[record.name]):
            yield pack._source.symbols(*place), place[1]


# --- size ---


def size(options: argparse.Namespace) -> None:
    print("| model | float32 | file | header | raw | symbols | over their entropy | all |")
    print("|---|---|---|---|---|---|---|---|")
    for file in sorted((options.shared / "models").glob("resnet*.safetensors")):
        if not any(f"resnet{depth}_" in file.name for depth in options.depth):
            continue
        for name, tensors in real_models(load_file(file)).items():
            with tempfile.TemporaryDirectory() as scratch:
                write_model(Path(scratch), tensors)
                path = surgery.pack(scratch)
                print(f"| {file.stem} {name} | {size_row(path, load_file(file))} |", flush=True)


def size_row(path: Path, original: dict[str, Tensor]) -> str:
    total = path.stat().st_size
    with surgery.Pack(path) as pack:
        coded, entropy = symbol_bytes(pack)
        raw = sum(
            leaf.stored(count, width)
            for record in pack._header.tensors
            for leaf, count, width in leaves(record.part)
            if isinstance(leaf, Raw)
        )
    dense_bytes = sum(tensor.numel() * 4 for tensor in original.values())
    return (
        f"{dense_bytes:,} | {total:,} ({dense_bytes / total:.1f}×) | {total - coded - raw:,} | {raw:,} | {coded:,}"
        f" | {coded / entropy - 1:+.2%} | {(coded + raw) / (entropy + raw) - 1:+.2%}"
    )


def real_models(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights as they are, and as pruning and clustering leave them."""
    result: dict[str, dict[str, Tensor]] = {"dense": weights}
    for name in ("indices4", "indices8", "float4", "sparse4", "sparse_indices4"):
        tensors: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            parts = KINDS[name](weight) if weight.ndim > 1 else {"": weight}
            tensors |= {f"{layer}.{part}".rstrip("."): tensor.contiguous() for part, tensor in parts.items()}
        result[name] = tensors
    return result


# --- memory ---

_CHILD = """
import resource, sys
import surgery, torch
surgery.load(sys.argv[2])  # whatever is taken once and for all
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = surgery.load(sys.argv[1], limit_bytes=1 << 34)
print(status("VmHWM") - before, sum(b.numel() * b.element_size() for b in model.buffers()))
"""


def memory(options: argparse.Namespace) -> None:
    print("| weights | decoded | peak above the start | beyond the decoded |")
    print("|---|---|---|---|")
    for name in options.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            model_folder(Path(scratch), name, options.largest)
            path = surgery.pack(scratch)
            few = (torch.arange(9000) ** 2 % 7).to(torch.uint8)
            tiny = surgery.pack(write_model(Path(scratch) / "tiny", {"few": few}))
            child = [sys.executable, "-c", _CHILD, str(path), str(tiny)]
            run = subprocess.run(child, capture_output=True, text=True, check=True)
            peak, decoded = map(int, run.stdout.split())
            print(f"| {name} | {decoded / 1e6:.1f} MB | {peak / 1e6:.1f} MB | {peak / decoded - 1:+.1%} |", flush=True)


# --- fuzz ---


def fuzz(options: argparse.Namespace) -> None:
    """Each mutation is tried in this process; the alarm ends one that hangs."""
    signal.signal(signal.SIGALRM, _too_long)
    registry, expected = surgery.Registry.load(), every_kind()
    counts: Counter[tuple[str, str]] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        original = surgery.pack(write_model(Path(scratch), expected)).read_bytes()
        target = Path(scratch) / "mutated.surgery"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(options.first, options.first + options.count):
            chance = random.Random(number)
            way = chance.choice([*WAYS])
            target.write_bytes(way(original, chance))
            start = time.perf_counter()
            signal.alarm(options.seconds)
            try:
                result = outcome(target, expected, registry, same=WAYS[way])
            except BaseException as error:
                print(f"mutation {number} ({way.__name__}): {type(error).__name__}: {error}", flush=True)
                result = "BROKEN"
            signal.alarm(0)
            longest = max(longest, time.perf_counter() - start)
            counts[way.__name__, result] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    for (name, result), count in sorted(counts.items()):
        print(f"{name:16} {result:8} {count:7}")
    print()
    attack(registry)
    print(f"longest {longest:.2f} s; memory grew by {grown / 1e6:.1f} MB under a limit of {LIMIT / 1e6:.1f} MB")
    if any(result == "BROKEN" for _, result in counts) or grown > 2 * LIMIT:
        sys.exit(1)


def attack(registry: surgery.Registry) -> None:
    """Small files that declare much, each in a process of its own."""
    print("| attack | bytes | ends as | seconds | memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for make in ATTACKS:
            path = Path(scratch) / "attack.surgery"
            path.write_bytes(make())
            print(f"| {make.__doc__} | {path.stat().st_size:,} | {' | '.join(_attacked(path, registry))} |", flush=True)


def _attacked(path: Path, registry: surgery.Registry) -> tuple[str, str, str]:
    """How reading ends, its seconds, and by how much its process grows: forked, so that nothing is imported first."""
    ours, theirs = multiprocessing.Pipe()

    def read() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        result = outcome(path, {}, registry, same=False)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        theirs.send((result, f"{time.perf_counter() - start:.2f}", f"{grown:.0f} MB"))

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(60)
    if process.is_alive():
        process.terminate()
    return ours.recv() if ours.poll() else ("BROKEN", "", "")


def _too_long(*_: object) -> None:
    raise TimeoutError("a mutated pack takes too long")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="command", required=True)
    on_speed, on_memory = kinds.add_parser("speed"), kinds.add_parser("memory")
    for one in (on_speed, on_memory):
        one.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
        one.add_argument("--largest", type=int, default=1 << 40, help="leave layers with more weights out")
    on_speed.add_argument("--rounds", type=int, default=3)
    on_speed.add_argument("--encodings", type=int, default=1)
    on_size = kinds.add_parser("size")
    on_size.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    on_size.add_argument("--shared", type=Path, default=SHARED, help="folder with models/")
    on_fuzz = kinds.add_parser("fuzz")
    on_fuzz.add_argument("--count", type=int, default=1000)
    on_fuzz.add_argument("--first", type=int, default=0, help="number of the first mutation, which decides it")
    on_fuzz.add_argument("--seconds", type=int, default=10, help="that a mutated pack may take")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit({"speed": speed, "size": size, "memory": memory, "fuzz": fuzz}[given.command](given))
