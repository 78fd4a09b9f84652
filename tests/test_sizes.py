"""A captured model refuses inputs that it was not captured for, by name, wherever it has got to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery import InputError
from surgery.captured import capture
from surgery.contract import snapshot
from surgery.inputs import Inputs
from surgery.sizes import expected_inputs
from surgery.state import load_state, save_state


class Resized(nn.Module):
    """Its output's size is computed from its input's."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, image):
        return F.interpolate(self.up(self.down(image).relu()), size=image.shape[-2:]).mean(1)


class Masked(nn.Module):
    """Tokens with a mask, in a nested argument, and a number."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, text, scale=1.0):
        x = self.embed(text["tokens"]) * scale
        mask = text["mask"]
        mask = torch.where(mask, 0.0, -1e4) if mask.dtype == torch.bool else mask
        return (x + mask[:, :, None]).sum(1) / text["tokens"].shape[1]


def text(batch=1, length=6, **others):
    tokens, mask = torch.ones(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.bool)
    return {"text": {"tokens": tokens, "mask": mask}, "scale": 2.0} | others


@pytest.fixture(scope="module")
def resized():
    return capture(Resized(), torch.rand(1, 3, 16, 16))


@pytest.fixture(scope="module")
def masked():
    return capture(Masked(), text())


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 3, 32, 16), "height is fixed at 16, and input image has 32 in dimension 2"),
        ((1, 3, 16, 20), "width is fixed at 16, and input image has 20 in dimension 3"),
        ((1, 1, 16, 16), "channels is fixed at 3, and input image has 1 in dimension 1"),
        ((3, 16, 16), "input image is fixed at 4 dimensions, and has 3"),
    ],
)
def test_another_size_is_refused_by_name(resized, shape, problem):
    with pytest.raises(InputError) as caught:
        resized(torch.rand(shape))
    assert caught.value.problem == problem
    assert "capture the model with an example" in caught.value.fix


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_free_batch_takes_any_number_of_samples(resized, masked, batch):
    assert resized(torch.rand(batch, 3, 16, 16)).shape == (batch, 16, 16)
    assert masked(**text(batch)).shape == (batch, 4)


def test_inputs_of_different_batches_are_refused(masked):
    given = text(3)
    given["text"]["mask"] = given["text"]["mask"][:1]
    with pytest.raises(InputError, match=r"batch is 3 in another input, and input text\['mask'\] has 1 in dimension 0"):
        masked(**given)


def test_a_kind_of_number_that_the_forward_asked_for_is_fixed(masked):
    given = text()
    given["text"]["mask"] = torch.zeros(1, 6)
    with pytest.raises(InputError, match=r"input text\['mask'\] is fixed at torch.bool, and is torch.float32"):
        masked(**given)


def test_a_constant_argument_is_fixed(masked):
    masked(**text(scale=2.0))
    with pytest.raises(InputError, match=r"input scale is fixed at 2\.0"):
        masked(**text(scale=3.0))


def test_nothing_stands_for_a_tensor(masked):
    given = text()
    given["text"]["mask"] = None
    with pytest.raises(InputError, match=r"is fixed at torch\.bool, and is NoneType"):
        masked(**given)


def test_a_fixed_batch_is_refused_too():
    class Paired(nn.Module):
        def forward(self, x):
            return x.view(2, 3, 4).sum(0) * torch.ones(3, 4)

    model = capture(Paired(), torch.rand(6, 4))
    assert not model.dynamic_batch
    with pytest.raises(InputError, match="batch is fixed at 6, and input x has 5"):
        model(torch.rand(5, 4))


def test_a_model_moved_to_another_type_takes_inputs_of_that_type(resized):
    moved = copy.deepcopy(resized).double()
    assert moved(torch.rand(2, 3, 16, 16).double()).dtype is torch.float64


def test_a_pass_state_source_and_pack_keep_the_check(resized, tmp_path):
    none = {"name": "none", "passes": ["fold_batchnorm"], "export": ["source", "pack"]}
    operation = surgery.operate(Resized(), torch.rand(1, 3, 16, 16), none, out=tmp_path / "run")
    save_state(resized, tmp_path / "state")
    assert operation.folder is not None
    from_source, from_pack = surgery.load(operation.folder), surgery.load(operation.folder / "model.surgery")
    for model in (snapshot(resized), load_state(tmp_path / "state"), operation.model, from_source, from_pack):
        model(torch.rand(3, 3, 16, 16))
        with pytest.raises((InputError, ValueError), match="height is fixed at 16, and input image has 24"):
            model(torch.rand(1, 3, 24, 16))


def test_the_source_checks_nested_inputs_and_constants(masked, tmp_path):
    surgery.export_source(masked, tmp_path)
    model = surgery.load(tmp_path, trust=True)
    assert torch.equal(model(**text(2)), masked(**text(2)))
    with pytest.raises(ValueError, match="length is fixed at 6"):
        model(**text(length=5))
    with pytest.raises(ValueError, match="scale is fixed"):
        model(**text(scale=1.0))


def test_onnx_runtime_refuses_other_sizes_too(resized, tmp_path):
    import onnxruntime

    path = surgery.export_onnx(resized, resized.inputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path)
    assert session.run(None, {"image": torch.rand(5, 3, 16, 16).numpy()})[0].shape == (5, 16, 16)
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"image": torch.rand(1, 3, 32, 32).numpy()})


@pytest.mark.parametrize("strict", [False, True])
def test_a_captured_model_can_be_exported_again_with_a_free_batch(resized, strict):
    dim = {0: torch.export.Dim("batch")}
    program = torch.export.export(resized, (torch.rand(4, 3, 16, 16),), dynamic_shapes=(dim,), strict=strict)
    image = torch.rand(9, 3, 16, 16)
    assert torch.equal(program.module()(image), resized(image))


def test_gradients_flow_through_the_check(resized):
    image = torch.rand(2, 3, 16, 16, requires_grad=True)
    resized(image).sum().backward()
    assert image.grad is not None
    assert bool(image.grad.any())


def test_dimensions_are_named_by_their_meaning_only_where_it_is_known():
    example = {"video": torch.rand(2, 3, 4, 5, 6), "sound": torch.rand(2, 3, 9), "grid": torch.rand(4, 2)}
    inputs = Inputs((), example)
    found = expected_inputs(inputs, free_batch=True)
    assert list(found["video"][1]) == ["batch", "channels", "depth", "height", "width"]
    assert found["sound"][1] == {"batch": "batch", "dimension 1": 3, "dimension 2": 9}
    assert found["grid"][1] == {"dimension 0": 4, "dimension 1": 2}
