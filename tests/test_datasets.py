from __future__ import annotations

import builtins
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery import Data, InputError, data_from
from surgery.datasets.decoding import decoded
from surgery.datasets.pictures import Batches, Pixels, data_of

Image = pytest.importorskip("PIL.Image")
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
EXAMPLE = torch.zeros(1, 3, 32, 32)


def pixels_of(count: int, seed: int = 0) -> np.ndarray:
    """(count, 3, 32, 32), uint8, noise"""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), np.uint8)


def labels_of(count: int) -> np.ndarray:
    return np.arange(count) % 10


def binary(folder: Path, count: int = 20) -> Path:
    """The layout of the binary version; the test images are those of seed 9."""
    folder.mkdir()
    for seed, name in [*enumerate(["data_batch_1", "data_batch_2"]), (9, "test_batch")]:
        records = np.concatenate([labels_of(count)[:, None], pixels_of(count, seed).reshape(count, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.astype(np.uint8).tobytes())
    return folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


def image_folder(folder: Path, counts: dict[str, int], size: tuple[int, int] = (32, 32)) -> Path:
    """Folders of noise: `{"train/cat": 3}` makes three images (width, height)."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def refused(name: str, example=None) -> str:
    with pytest.raises(InputError) as caught:
        list(data_from(name, example).evaluation)
    assert caught.value.fix
    return str(caught.value)


# --- names and options ---


def test_digits_are_split_as_in_the_demo_and_calibration_has_no_labels():
    from surgery.demo import digits

    data, (images, labels) = data_from("digits", torch.zeros(1, 1, 8, 8)), digits()
    inputs, targets = joined(data.evaluation)
    assert torch.equal(inputs, images[:360])
    assert torch.equal(targets, labels[:360])
    calibration = torch.cat(list(data.calibration))
    assert calibration.shape == (256, 1, 8, 8)
    assert all(any(torch.equal(image, other) for other in images[360:]) for image in calibration[:5])


def test_a_function_gives_batches_or_data(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import surgery\ndef batches(): return [1, 2]\ndef data(): return surgery.Data(evaluation=[3])\n"
        "def broken(): raise OSError('disk on fire')\nconstant = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    assert data_from("own_data:batches").calibration == [1, 2]
    assert data_from("own_data:data") == Data(evaluation=[3])
    assert "disk on fire" in refused("own_data:broken")
    assert "int, no function" in refused("own_data:constant")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitz", "no data 'digitz'"),
        ("digits:here", "has a path"),
        ("cifar10", "has no path"),
        ("cifar10:x?bach=3", "unknown option 'bach' (did you mean batch"),
        ("cifar10:x?size=32", "unknown option 'size'"),
        ("cifar10:x?batch=0", "batch"),
        ("cifar10:x?batch=2&batch=3", "twice"),
        ("cifar10:x?batch", "'batch'"),
        ("cifar10:x?mean=a,b,c", "mean"),
        ("cifar10:x?std=1,0,1", "standard deviation of 0"),
        ("cifar10:x?normalise=imagenett", "normalise"),
        ("imagefolder:x?crop=1.5", "crop"),
    ],
)
def test_a_wrong_name_or_option_is_an_error_that_shows_it(name, message):
    assert message in refused(name)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(1, 3, 224, 224), "the images are 3×32×32, the model takes 3×224×224"),
        (torch.zeros(1, 1, 32, 32), "the model takes 1×32×32"),
        ({"image": EXAMPLE, "gain": torch.zeros(1)}, "not one batch of images"),
        (torch.zeros(1, 64), "not one batch of images"),
    ],
)
def test_a_model_that_does_not_take_the_images_is_told_so_at_once(tmp_path, example, message):
    with pytest.raises(InputError, match="image") as caught:
        data_from(f"cifar10:{binary(tmp_path / 'c')}", example)
    assert message in str(caught.value)


def test_images_come_in_the_type_of_the_models_example(tmp_path):
    name = f"cifar10:{binary(tmp_path / 'c')}"
    assert (
        next(iter(data_from(name, surgery.Inputs(kwargs={"x": EXAMPLE.double()})).calibration)).dtype == torch.float64
    )
    assert next(iter(data_from(name).calibration)).dtype == torch.float32


def test_run_and_verify_take_the_same_names(tmp_path, monkeypatch, capsys):
    from surgery.cli import main

    def call(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["surgery", *arguments, "--json"])
        main()
        return json.loads(capsys.readouterr().out)

    model = ("--model", "surgery.demo:digits_cnn", "--input", "1x1x8x8")
    ran = call("run", "fold_only", *model, "--data", "digits?limit=64", "--out", str(tmp_path / "run"))
    assert ran["verification"]["fidelity"]["samples"] == 64
    assert ran["verification"]["fidelity"]["accuracy_reference"] is not None
    files = str(tmp_path / "run" / "original.onnx"), str(tmp_path / "run")
    assert call("verify", *files, "--data", "digits?limit=32")["fidelity"]["samples"] == 32


# --- CIFAR-10 ---


def layouts(folder: Path) -> dict[str, str]:
    """The same 20 test images in every layout there is."""
    train, test, labels = pixels_of(20, 0), pixels_of(20, 9), labels_of(20)
    binary(folder / "binary")
    last = {"train_images": train.transpose(0, 2, 3, 1), "test_images": test.transpose(0, 2, 3, 1)}
    np.savez(folder / "both.npz", train_labels=labels, test_labels=labels, **last)
    for split, images in (("train", train), ("test", test)):
        files = [png(image) for image in images]
        ends = np.cumsum([len(file) for file in files])
        np.savez(folder / f"coded_{split}.npz", blob=np.frombuffer(b"".join(files), np.uint8), ends=ends, labels=labels)
        np.savez(folder / f"first_{split}.npz", images=images, labels=labels.astype(np.uint8))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / "files" / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:02}.png").write_bytes(png(image))
    return {name: f"cifar10:{folder / name}" for name in ("binary", "both", "coded", "first", "files", "both.npz")}


def test_every_layout_of_cifar10_gives_the_same_images(tmp_path):
    mean, std = IMAGENET
    expected = (torch.from_numpy(pixels_of(20, 9)).float() / 255 - mean) / std
    for layout, name in layouts(tmp_path).items():
        inputs, labels = joined(data_from(name, EXAMPLE).evaluation)
        order = torch.arange(20) if layout != "files" else torch.arange(20).view(2, 10).T.flatten()
        assert torch.equal(inputs, expected[order]), layout
        assert torch.equal(labels, torch.from_numpy(labels_of(20))[order]), layout


def test_normalisation_is_a_preset_or_numbers(tmp_path):
    name = f"cifar10:{binary(tmp_path / 'c')}?normalise=none"
    raw = joined(data_from(name).evaluation)[0]
    assert (float(raw.min()), float(raw.max())) == (0.0, 1.0)
    given = joined(data_from(f"{name}&mean=0.5,0.25,0&std=0.5").evaluation)[0]
    assert torch.equal(given, (raw - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / 0.5)
    with pytest.raises(InputError, match="2 numbers to normalise 3 channels"):
        data_from(f"{name}&mean=0.5,0.5")


def broken(folder: Path, kind: str) -> Path:
    """One damaged set of CIFAR-10."""
    images, labels = pixels_of(4).transpose(0, 2, 3, 1), labels_of(4)
    if kind.startswith("binary"):
        binary(folder)
        file = folder / "data_batch_2.bin"
        content = file.read_bytes()
        damaged = {"truncated": content[:-100], "label": b"\x0b" + content[1:], "empty": b""}
        file.write_bytes(damaged[kind.partition(" ")[2]])
        return folder
    folder.mkdir()
    arrays = {
        "count": {"images": images, "labels": labels[:3]},
        "range": {"images": images, "labels": labels + 7},
        "negative": {"images": images, "labels": labels - 1},
        "pickled": {"images": np.array([{}], object), "labels": labels},
        "float": {"images": images / 255, "labels": labels},
        "size": {"images": images[:, :16], "labels": labels},
        "unlabelled": {"images": images},
        "strange": {"labels": labels},
        "ends": {"blob": np.zeros(10, np.uint8), "ends": np.array([4, 3, 10, 12]), "labels": labels},
        "nothing": {"images": images[:0], "labels": labels[:0]},
    }[kind]
    np.savez(folder / "x_test.npz", **arrays)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("binary truncated", "61,360 bytes, no multiple of 3,073"),
        ("binary empty", "0 bytes"),
        ("binary label", "label 11 of image 0, there are 10 classes"),
        ("count", "4 images and 3 labels"),
        ("range", "label 10 of image 3"),
        ("negative", "label -1 of image 0"),
        ("pickled", "not opened"),
        ("float", "float64"),
        ("size", "(4, 3, 16, 32)"),
        ("unlabelled", "no array `labels`"),
        ("strange", "neither images nor blob"),
        ("ends", "do not divide 10 bytes"),
        ("nothing", "no images"),
    ],
)
def test_a_damaged_cifar10_names_file_and_fault(tmp_path, kind, message):
    told = refused(f"cifar10:{broken(tmp_path / 'c', kind)}")
    assert message in told
    assert ("data_batch_2.bin" if kind.startswith("binary") else "x_test.npz") in told


def test_the_pickled_version_is_refused_and_never_opened(tmp_path):
    marker = tmp_path / "opened"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(f"cbuiltins\nopen\n(V{marker}\nVw\ntR.".encode())
    for path in (folder, tmp_path):
        assert "binary version" in refused(f"cifar10:{path}")
    assert not marker.exists()


def test_places_without_cifar10_say_what_is_missing(tmp_path):
    assert "nothing of this name" in refused(f"cifar10:{tmp_path / 'none'}")
    assert "no CIFAR-10 in this folder" in refused(f"cifar10:{tmp_path}")
    for name in ("a_test", "b_test"):
        np.savez(tmp_path / f"{name}.npz", images=pixels_of(2), labels=labels_of(2))
    assert "several versions: a, b" in refused(f"cifar10:{tmp_path}")
    (binary(tmp_path / "c") / "test_batch.bin").unlink()
    assert "no test images" in refused(f"cifar10:{tmp_path / 'c'}")


def test_an_encoded_image_that_is_damaged_is_named(tmp_path):
    files = [png(image) for image in pixels_of(3)]
    blob, ends = (
        b"".join([files[0], files[1][:-400], files[2]]),
        np.cumsum([len(f) - 400 * (i == 1) for i, f in enumerate(files)]),
    )
    np.savez(tmp_path / "x_test.npz", blob=np.frombuffer(blob, np.uint8), ends=ends, labels=labels_of(3))
    with pytest.raises(InputError, match="image 1"):
        list(itertools.chain(data_from(f"cifar10:{tmp_path}").calibration, data_from(f"cifar10:{tmp_path}").evaluation))


@pytest.mark.parametrize(("version", "images"), [("cifar10_lossless", 846), ("cifar10_jpeg", 10_000)])
def test_the_images_of_the_benchmarks_are_read(shared, version, images):
    data = data_from(f"cifar10:{shared}/data/{version}?calibration=32&batch=250", EXAMPLE)
    assert len(list(data.evaluation)) == -(-images // 250)
    assert torch.cat(list(data.calibration)).shape == (32, 3, 32, 32)


# --- folders of images ---


def test_folders_are_classes_in_sorted_order_and_train_and_val_stay_apart(tmp_path):
    counts = {"train/zebra": 3, "train/ant": 4, "val/zebra": 2, "val/ant": 1, "train/.hidden": 1}
    folder = image_folder(tmp_path, counts)
    data = data_from(f"imagefolder:{folder}", EXAMPLE)
    assert joined(data.evaluation)[1].tolist() == [0, 1, 1]
    assert sorted(joined(data.training)[1].tolist()) == [0, 0, 0, 0, 1, 1, 1]
    assert torch.cat(list(data.calibration)).shape == (7, 3, 32, 32)


def test_one_folder_is_divided_and_no_image_serves_both(tmp_path):
    folder = image_folder(tmp_path, {"a": 6, "b": 5})
    data = data_from(f"imagefolder:{folder}?batch=4", EXAMPLE)
    calibration, evaluation = torch.cat(list(data.calibration)), joined(data.evaluation)[0]
    assert (len(calibration), len(evaluation)) == (5, 6)
    assert not any(torch.equal(a, b) for a in calibration for b in evaluation)


def test_a_file_orders_the_classes_as_the_models_outputs(tmp_path):
    folder = image_folder(tmp_path / "images", {"val/a": 1, "val/c": 1, "train/c": 2})
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    data = data_from(f"imagefolder:{folder}?classes={tmp_path / 'classes.txt'}", EXAMPLE)
    assert joined(data.evaluation)[1].tolist() == [2, 0]
    assert "folder 'a' in" in refused(f"imagefolder:{folder}", EXAMPLE)
    (tmp_path / "classes.txt").write_text("c\nc\n")
    assert "2 class names, 1 different" in refused(f"imagefolder:{folder}?classes={tmp_path / 'classes.txt'}", EXAMPLE)


def test_the_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path):
    ramp = np.broadcast_to(np.arange(160, dtype=np.uint8)[None, :, None], (80, 160, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "ramp.png")
    whole = decoded(tmp_path / "ramp.png", 3, "", (80, 80), crop=1.0)
    assert torch.equal(whole[0, 0], torch.arange(40, 120, dtype=torch.uint8))
    half = decoded(tmp_path / "ramp.png", 3, "", (40, 40), crop=0.5)
    assert torch.equal(half[1, 7], torch.arange(60, 100, dtype=torch.uint8))
    small = decoded(tmp_path / "ramp.png", 1, "", (20, 40), crop=1.0)
    assert small.shape == (1, 20, 40)
    assert (small[0, 9].float() - torch.arange(40) * 4 - 1.5).abs().max() <= 1


def test_images_of_the_right_size_are_taken_as_they_are(tmp_path):
    folder = image_folder(tmp_path, {"val/a": 1})
    pixels = joined(data_from(f"imagefolder:{folder}?normalise=none&size=32").evaluation)[0]
    with Image.open(folder / "val" / "a" / "0.png") as image:
        assert torch.equal((pixels[0] * 255).round().to(torch.uint8), torch.tensor(np.array(image)).permute(2, 0, 1))


def test_a_model_of_one_channel_gets_grey(tmp_path):
    folder = image_folder(tmp_path, {"val/a": 1})
    [(inputs, _)] = data_from(f"imagefolder:{folder}", torch.zeros(2, 1, 16, 24)).evaluation
    assert inputs.shape == (1, 1, 16, 24)


@pytest.mark.parametrize(
    ("counts", "example", "message"),
    [
        (None, EXAMPLE, "no such folder"),
        ({}, EXAMPLE, "no folder per class"),
        ({"a": 0}, EXAMPLE, "no images"),
        ({"train/a": 1, "val/a": 0}, EXAMPLE, "no images"),
        ({"train/cat": 1, "val/cats": 1}, EXAMPLE, "did you mean cat"),
        ({"a": 1}, None, "size of the images is unknown"),
        ({"a": 1}, torch.zeros(1, 4, 8, 8), "4 channels"),
    ],
)
def test_a_folder_without_the_images_of_a_model_says_why(tmp_path, counts, example, message):
    folder = tmp_path / "images"
    if counts is not None:
        folder.mkdir()
        image_folder(folder, counts)
    assert message in refused(f"imagefolder:{folder}", example)


def test_an_unreadable_image_is_named(tmp_path):
    folder = image_folder(tmp_path, {"train/a": 2, "val/a": 2})
    file = folder / "val" / "a" / "1.png"
    file.write_bytes(file.read_bytes()[:200])
    assert str(file) in refused(f"imagefolder:{folder}", EXAMPLE)
    file.write_text("no image at all")
    assert str(file) in refused(f"imagefolder:{folder}", EXAMPLE)


def test_without_pillow_the_remedy_is_the_extra(tmp_path, monkeypatch):
    folder, real = image_folder(tmp_path, {"a": 2}), builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "PIL":
            raise ImportError("no PIL")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "model-surgery[images]" in refused(f"imagefolder:{folder}", EXAMPLE)


# --- samples and memory ---


class Counted:
    """Pictures that are their index, and note what is read."""

    def __init__(self, count: int) -> None:
        self.labels, self.read = torch.arange(count), []

    def pixels(self, indices):
        self.read += indices
        return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)


def indices_of(batches) -> list[int]:
    return [round(float(v) * 255) for batch in batches for v in (batch[0] if isinstance(batch, tuple) else batch)]


@given(
    train=st.integers(0, 60),
    test=st.integers(0, 60),
    sample=st.integers(1, 80),
    limit=st.integers(1, 80),
    seed=st.integers(0, 9),
    trained=st.none() | st.integers(1, 80),
)
@settings(max_examples=60, deadline=None)
def test_samples_are_disjoint_seeded_and_of_the_size_asked_for(train, test, sample, limit, seed, trained):
    from surgery.datasets.options import Options

    splits = {name: Counted(n) for name, n in (("train", train), ("test", test)) if n}
    if not splits:
        return
    options = Options(calibration=sample, limit=limit, seed=seed, batch=7, training=trained)
    first, again = (data_of(splits, options, Pixels()) for _ in range(2))
    used, judged = indices_of(first.calibration), indices_of(first.evaluation)
    assert (used, judged) == (indices_of(again.calibration), indices_of(again.evaluation))
    learnt = indices_of(first.training)
    assert learnt[: len(used)] == used[: len(learnt)]
    wanted = sample if trained is None else trained
    assert judged == sorted(set(judged))
    assert len(set(used)) == len(used)
    if len(splits) == 2:
        assert (len(used), len(judged), len(learnt)) == (min(sample, train), min(limit, test), min(wanted, train))
    elif train + test > 1:
        assert not {*used, *learnt} & set(judged)
        assert [len(used), len(learnt)] == [min(n, (train + test) // 2) for n in (sample, wanted)]


def test_batches_are_read_when_they_are_needed_and_kept_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr("surgery.datasets.pictures.KEPT_BYTES", 5)
    pictures = Counted(10)
    batches = Batches(pictures, range(10), Pixels(), batch=3)
    next(iter(batches))
    assert pictures.read == [0, 1, 2]
    assert indices_of(batches) == indices_of(batches) == list(range(10))
    assert pictures.read == [*range(10), 3, 4, 5, 6, 7, 8]
    assert len(batches) == 4
    assert torch.equal(batches[-1], batches[3])
    assert [len(batch) for batch in batches[2:]] == [3, 1]
    with pytest.raises(IndexError):
        batches[4]


# --- labels of any data ---


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "label 3 in the evaluation data, the model's output has the classes 0 to 2"),
        (torch.tensor([0, -1]), "label -1"),
        (torch.tensor([0, 0.5]), "label 0.5"),
        (torch.tensor([0.0, float("nan")]), "label nan"),
        (torch.tensor([0, 1, 2]), "2 outputs and 3 labels"),
        (torch.tensor([0]), "2 outputs and 1 labels"),
        ([0, 1], "a target list"),
    ],
)
def test_labels_out_of_range_or_of_wrong_count_are_refused_whatever_the_data(labels, message):
    model = torch.nn.Linear(4, 3)
    data = Data(evaluation=[(torch.rand(2, 4), torch.tensor([0, 2])), (torch.rand(2, 4), labels)])
    with pytest.raises(InputError) as caught:
        surgery.verify(model, model, data.evaluation, labelled=True)
    assert message in str(caught.value)
    assert "batch 1" in str(caught.value)


def test_a_function_that_fails_is_shown_with_its_own_line(tmp_path, monkeypatch):
    (tmp_path / "own_batches.py").write_text("def data():\n    return [1 / 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"ZeroDivisionError(.|\n)*own_batches.py:2: return \[1 / 0\]"):
        data_from("own_batches:data")


# --- docs ---


def test_the_page_explains_every_name_and_option():
    from dataclasses import fields

    from surgery.datasets import _READERS

    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    for name, (_, options) in _READERS.items():
        assert f"`{name}" in text
        missing = [f.name for f in fields(options) if f"`{f.name}`" not in text]
        assert not missing, name
