"""A model that no pass can work on is refused before the first one, by the name of the tensor or module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.captured import capture
from surgery.errors import ModelError


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.zeros(4).masked_fill(torch.arange(4) > 1, -torch.inf))

    def forward(self, x):
        return torch.softmax(self.norm(self.linear(x)) + self.mask, -1)


def refused(model, x=None):
    """The error of a whole run, which does no more than look at the model."""
    steps, recipe = [], {"name": "fold", "passes": ["fold_batchnorm"]}
    x = torch.randn(2, 4) if x is None else x
    with pytest.raises(ModelError) as caught:
        surgery.operate(model, x, recipe, progress=lambda what, *_: steps.append(what))
    assert caught.value.fix
    assert "fold_batchnorm" not in steps
    return caught.value


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        ("linear.weight", torch.nan, "linear.weight holds NaN"),
        ("linear.bias", -torch.inf, "linear.bias holds infinity"),
        ("norm.running_mean", -torch.inf, "norm.running_mean holds infinity"),
        ("norm.running_var", torch.nan, "norm.running_var holds NaN"),
        ("norm.running_var", -0.5, "norm.running_var is a variance and holds -0.5"),
        ("mask", torch.nan, "mask holds NaN"),
        ("mask", torch.inf, "mask holds infinity"),
    ],
)
def test_what_is_not_finite_is_named(tensor, value, problem):
    model = Masked()
    surgery.tensors(model)[tensor].data.flatten()[0] = value
    assert refused(model).problem == problem


def test_a_mask_of_minus_infinity_is_no_fault():
    model, x = Masked().eval(), torch.randn(3, 4)
    assert torch.equal(capture(model, x)(x), model(x))


def test_denormal_weights_are_a_note():
    model = Masked()
    model.linear.weight.data.mul_(1e-42)
    (note,) = [note for note in capture(model, torch.randn(2, 4)).notes if "denormal" in note]
    assert note == "16 weights are denormal numbers, next to zero: in linear.weight"
    assert not any("denormal" in note for note in capture(Masked(), torch.randn(2, 4)).notes)


class Summed(nn.Module):
    """A linear layer beside others that are added to it."""

    def __init__(self, **others):
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x):
        return self.base_layer(x)


class Packed(nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x):
        return x


def with_weight(weight):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


class Wrapped(torch.Tensor):
    """A tensor that computes by itself, as those of quantising libraries do."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(args[0].held)


def quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})


def prepared():
    model = nn.Sequential(nn.Linear(4, 4)).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model)


CHECKPOINTS = {
    "LoRA": (lambda: nn.Sequential(Summed(lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())), "0 .* holds an adapter"),
    "LoRA by parameters": (lambda: Summed(lora_A=nn.Parameter(torch.ones(1, 4))), "Summed .* holds an adapter"),
    "GPTQ": (lambda: nn.Sequential(Packed(qweight=torch.ones(4, 1, dtype=torch.int32))), "0 .*quantised already"),
    "bitsandbytes": (lambda: nn.Sequential(Packed(SCB=torch.ones(4))), "0 .*quantised already"),
    "torch.ao": (quantized, r"0 \(torch\.ao.*Linear\) is quantised already"),
    "torch.ao's training": (prepared, "quantised already"),
    "int8": (
        lambda: with_weight(torch.ones(4, 4, dtype=torch.int8)),
        r"0\.weight is quantised already, in torch\.int8",
    ),
    "float8": (lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)), "float8"),
    "tensor subclass": (lambda: with_weight(Wrapped(torch.ones(4, 4))), "no ordinary tensor"),
    "sparse": (lambda: Packed(table=torch.eye(4).to_sparse()), r"table is sparse or packed \(sparse_coo\)"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"0\.weight has no shape yet"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_of_another_kind_is_refused_by_name_with_what_to_do(kind):
    build, words = CHECKPOINTS[kind]
    error = refused(build())
    assert pytest.raises(ModelError, match=words).matches(error)
    remedies = {"LoRA": "merge_and_unload", "sparse": "to_dense", "lazy": "call the model once", "GPTQ": "float model"}
    assert remedies.get(kind, "") in error.fix


class Quantizable(nn.Module):
    """What torch.ao wants a float model to carry until it is quantised there."""

    def __init__(self):
        super().__init__()
        self.begin, self.end = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.linear, self.plus = nn.Linear(4, 4), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        x = self.begin(x)
        return self.end(self.plus.add(x, self.linear(x)))


def test_what_a_float_model_carries_to_be_quantised_later_is_no_fault():
    assert capture(Quantizable(), torch.randn(2, 4)).capture_error == 0


class Turned(nn.Module):
    def forward(self, x):
        return torch.view_as_complex(x) * 1j


def test_complex_outputs_are_named_with_the_way_out():
    error = refused(Turned(), torch.randn(2, 3, 2))
    assert error.problem.startswith("output 0 of the model")
    assert "complex64" in error.problem
    assert "torch.view_as_real" in error.fix


def test_a_model_data_and_a_run_of_inference_mode_give_one_that_can_be_trained():
    passes = [{"prune_filters": {"ratio": 0.5}}, {"finetune": {"epochs": 1}}]
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        batches = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (16, 1)]
        data = surgery.Data(calibration=[x for x, _ in batches], training=batches)
        operation = surgery.operate(
            model, torch.randn(2, 4), {"name": "r", "passes": passes}, data=data, latency_rounds=0
        )
    operation.model(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in operation.model.parameters())
