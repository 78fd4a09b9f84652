"""Training after surgery: what it gives back on the digits and on CIFAR-10, and what hoisting saves.

    make finetuning FINETUNING=hoisting     a step of the hashed 4096×1024 layer, before and after
    make finetuning FINETUNING=digits       passes, quantisers and integers, without a label
    make finetuning FINETUNING=dsd          dense-sparse-dense training of ResNet-20 on CIFAR-10

One thread. `digits`: the CNN of the demo after five epochs; 1,024 training images without labels, top-1 on 360 others.
`dsd`: the `resnet20_jpeg` weights, top-1 on the 10,000 test images; `--images` of the training images and their labels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy import SHARED, load
from torch import nn

import surgery
from surgery import CapturedModel, Context, Data, Registry, capture, data_from
from surgery.demo import digits, digits_cnn, train
from surgery.recipe import resolve

REGISTRY = Registry.load()
OPERATED: list[tuple[str, dict[str, Any]]] = [
    ("prune_weights", {"sparsity": 0.9, "criterion": "magnitude"}),
    ("kmeans", {"bits": 1, "metric": "weight"}),
    ("hashed", {"factor": 1 / 16, "metric": "weight"}),
]
INTEGERS = [(2, 8), (2, 4), (2, 3), (2, 2)]


def apply(model: CapturedModel, context: Context, name: str, **options: Any) -> CapturedModel:
    return REGISTRY.find_pass(name)(**options)(model, context)[0]


def accuracy(model: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in batches]
    return 100 * float(torch.cat(right).mean())


def hoisting(rounds: int = 15) -> Iterator[str]:
    model = capture(nn.Linear(1024, 4096), torch.rand(2, 1024))
    model = apply(model, Context(model), "hashed", factor=1 / 64)
    twin, x = surgery.hoisted(model), torch.randn(64, 1024)
    times: dict[str, list[float]] = {"as it is": [], "hoisted": []}
    for _ in range(rounds):
        for (_, own), network in zip(times.items(), (model, twin), strict=True):
            start = time.perf_counter()
            network(x).square().sum().backward()
            own.append(time.perf_counter() - start)
    yield from (f"| {name} | {1000 * statistics.median(own):.1f} ms |" for name, own in times.items())


def on_digits() -> Iterator[str]:
    torch.manual_seed(0)
    images, labels = digits()
    network = train(digits_cnn(), images[360:], labels[360:], 5, lambda *_: None)
    original, data = capture(network, images[:2]), data_from("digits?calibration=1024")
    judged, context = [(images[:360], labels[:360])], Context(original, Data(calibration=data.calibration))
    yield f"| as it was | {accuracy(original, judged):.1f} | – |"
    for name, options in OPERATED:
        model = apply(original, context, name, **options)
        trained = apply(model, context, "finetune")
        yield f"| `{name}` {options} | {accuracy(model, judged):.1f} | {accuracy(trained, judged):.1f} |"
    for name, cls in REGISTRY.weight_quantizers.items():
        for options in [{}] if cls.spares_ends else [{"bits": 2}, {"bits": 4}]:
            trained = apply(original, context, "finetune", quantizer=name, **options)
            yield f"| `quantizer: {name}` {options} | – | {accuracy(trained, judged):.1f} |"
    for weights, activations in INTEGERS:
        bits = {"weight_bits": weights, "activation_bits": activations}
        plain, aware = (apply(original, context, "quantize", **bits, training=t) for t in (None, {}))
        yield f"| `quantize` {bits} | {accuracy(plain, judged):.1f} | {accuracy(aware, judged):.1f} |"


def dense_sparse_dense(shared: Path, images: int, epochs: int) -> Iterator[str]:
    networks = load(shared / "models/resnet_cifar.py")
    model = capture(networks.resnet(20, "resnet20_jpeg"), torch.rand(2, 3, 32, 32))
    data = data_from(f"cifar10:{shared}/data/cifar10_jpeg?training={images}&calibration=1024&batch=128", model.inputs)
    judged, context = list(data.evaluation or ()), Context(model, data)
    yield f"| as it was | {accuracy(model, judged):.2f} | |"
    settings = {"passes.1.epochs": epochs, "passes.3.epochs": epochs}
    steps = resolve("dense_sparse_dense", REGISTRY, settings).steps
    for name, chain in (("recipe", steps), ("without the pruning", [s for s in steps if s.name() == "finetune"])):
        result = model
        for step in chain:
            start = time.perf_counter()
            result, _ = step(result, context)
            seconds = time.perf_counter() - start
            yield f"| {name}: `{step.name()}` | {accuracy(result, judged):.2f} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("hoisting", "digits", "dsd"))
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    parser.add_argument("--images", type=int, default=5120)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dsd = dense_sparse_dense(options.shared, options.images, options.epochs)
    for line in {"hoisting": hoisting(), "digits": on_digits(), "dsd": dsd}[options.what]:
        print(line, flush=True)


if __name__ == "__main__":
    main()
