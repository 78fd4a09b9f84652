"""Hold any pass to the contract, on any network.

@pytest.mark.parametrize(("step", "network"), contract_cases([MyPass(), MyPass(rank=4)]))
def test_contract(step, network):
    check_pass(step, network)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from torch import nn

from ..captured import CapturedModel, capture
from ..context import Context
from ..data import Data
from ..errors import ModelError
from ..passes import Pass, PassReport
from .definition import DEFINITION
from .network import Network
from .networks import NETWORKS
from .outcome import OUTCOME
from .result import RESULT
from .trial import Trial, description, first_difference, state_of


def check_pass(step: Pass, network: Network, *, calibration: Sequence[Any] | None = None, seed: int = 0) -> PassReport:
    """Apply `step` to `network` and hold it to every rule of the contract; the report comes back for further questions.

    `calibration`: batches without labels; by default random ones that fit the network. What the rules are stands in
    `surgery.testing.RULES`. A pass that makes no edit on this network is not asked for exports, reloading and training;
    one that refuses it with a `ModelError` must say what to do, and must have left everything as it was.

    Raises:
        AssertionError: a rule is broken; the message names the pass, the network, the rule and what was found.
    """
    for definition in DEFINITION:
        with _rule(step, network, definition):
            definition(step)
    model, before = _prepared(network)
    batches = list(network.calibration() if calibration is None else calibration)
    untouched = _watched(model, before)
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        with _rule(step, network, keeps_the_contract):
            result, remedy = _outcome(step, before, Context(before, Data.of(batches), seed=seed))
            assert result or remedy, "it refuses the network and does not say what to do"
        after, report = result or (before, PassReport())
        trial = Trial(step, network, model, before, after, report, batches, seed, Path(folder))
        asked = (*OUTCOME, *(RESULT if report.modified else ())) if result else ()
        for rule in (untouched, *asked, untouched):
            with _rule(step, network, rule):
                rule(trial)
    return report


def _outcome(
    step: Pass, before: CapturedModel, context: Context
) -> tuple[tuple[CapturedModel, PassReport] | None, str]:
    """What the pass gives, or None and the remedy it names where it refuses the model."""
    try:
        return step(before, context), ""
    except ModelError as refusal:
        return None, refusal.fix


def keeps_the_contract() -> None:
    """it runs and `surgery.Pass` finds no fault with what it returns, or it refuses with a `ModelError` and a remedy"""


def leaves_its_input_alone() -> None:
    """the caller's model and the captured model before the pass are bit-identical afterwards"""


RULES: tuple[Callable[..., None], ...] = (*DEFINITION, keeps_the_contract, leaves_its_input_alone, *OUTCOME, *RESULT)
"""Every rule, as the function that asserts it; its docstring is the rule in words."""


def contract_cases(steps: Iterable[Pass], networks: Iterable[Network] = tuple(NETWORKS.values())) -> list[Any]:
    """Every pass on every network, as cases of `pytest.mark.parametrize(("step", "network"), …)`."""
    import pytest

    networks = tuple(networks)
    return [pytest.param(step, network, id=f"{_label(step)}-{network}") for step in steps for network in networks]


def edited_networks(step: Pass, networks: Iterable[Network] = tuple(NETWORKS.values())) -> Iterator[str]:
    """Names of the networks on which `step` makes an edit. A pass that edits none of them has not been tested."""
    for network in networks:
        _, before = _prepared(network)
        with suppress(ModelError):
            if step(before, Context(before, Data.of(network.calibration())))[1].modified:
                yield network.name


def _label(step: Pass) -> str:
    """The recipe key, and the options that are not at their default."""
    fields = type(step).__dataclass_fields__
    changed = [f"{name}={value}" for name, value in step.options.items() if value != fields[name].default]
    return step.name() + (f"[{','.join(changed)}]" if changed else "")


@lru_cache(maxsize=64)
def _prepared(network: Network) -> tuple[nn.Module, CapturedModel]:
    """The model and its capture, made once: rules see to it that nobody changes them."""
    model = network.model()
    return model, capture(model, network.inputs())


@contextmanager
def _rule(step: Pass, network: Network, rule: Callable[..., None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _prepared.cache_clear()
        what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(
            f"{step!r} on network {network} breaks the rule {rule.__name__!r}: {rule.__doc__}.\n{what}"
        ) from error


def _watched(model: nn.Module, before: CapturedModel) -> Callable[[Trial], None]:
    """`leaves_its_input_alone` for models in the state they have now."""
    states, text = (state_of(model), state_of(before)), description(before)

    @wraps(leaves_its_input_alone)
    def rule(trial: Trial) -> None:
        for now, then in zip((model, before), states, strict=True):
            difference = first_difference(state_of(now), then)
            assert difference is None, f"{difference} was changed"
        assert description(before) == text, "the graph or a module of the captured model was changed"

    return rule
