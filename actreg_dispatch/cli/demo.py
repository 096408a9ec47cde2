"""``actreg demo``: a sparse autoencoder of handwritten digits, trained with and without a penalty.

The network is one hidden layer of ReLU units and a linear decoder with features of unit length,
in plain NumPy. Each step adds the gradient of the penalty on the hidden activations by one call,
``regularization.apply(hidden, hidden_gradient)``. Imports what the extra ``demo`` installs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits  # which scikit-learn requires

from actreg_dispatch.norms import ActivityNorm
from actreg_dispatch.regularization import ActivityRegularization
from actreg_dispatch.statistics import ActivationStatistics

__all__ = ["Outcome", "Settings", "draw", "load_images", "main", "sweep", "tabulate", "train"]

Array = np.ndarray[Any, np.dtype[np.float32]]

STRENGTHS: dict[str, tuple[float, ...]] = {
    ActivityNorm.L1: (0.003, 0.01, 0.03, 0.1, 0.3),
    ActivityNorm.L2_SQUARED: (0.01, 0.03, 0.1, 0.3, 1.0),
    ActivityNorm.HOYER: (0.003, 0.01, 0.03, 0.1, 0.3),
}
LABELS: dict[str, str] = {
    ActivityNorm.L1: "L1",
    ActivityNorm.L2_SQUARED: "squared L2",
    ActivityNorm.HOYER: "Hoyer-square",
}
NUDGES: dict[str, tuple[int, int]] = {  # from a point to its number, in points
    ActivityNorm.L1: (4, 3),
    ActivityNorm.L2_SQUARED: (4, 4),
    ActivityNorm.HOYER: (-26, -6),
}


@dataclass(frozen=True)
class Settings:
    """How to train: the same for every λ, so that only λ differs."""

    units: int = 100
    epochs: int = 40
    batch: int = 96
    step: float = 3e-3
    seed: int = 0
    backend: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A trained network's figures on the digits that it was not trained on."""

    regularization: ActivityRegularization
    error: float  # mean squared error of a pixel, pixels being in [0, 1]
    penalty: float  # per digit
    hidden: Array  # activations, digit by unit
    active: np.ndarray[Any, np.dtype[np.int64]]  # for how many digits each unit is not zero
    features: Array  # what each unit draws, unit by pixel

    @property
    def zero_share(self) -> float:
        """Share of the hidden activations that are exactly zero."""
        return float(np.mean(self.hidden == 0))

    @property
    def active_units(self) -> float:
        """Mean number of units that are not zero for a digit."""
        return float(np.mean(np.count_nonzero(self.hidden, axis=1)))

    @property
    def dead_units(self) -> int:
        """Number of units that are zero for every digit."""
        return int(np.count_nonzero(self.active == 0))


def load_images(seed: int = 0) -> tuple[Array, Array]:
    """Return scikit-learn's 8×8 digits, shuffled: 1,437 to train on and 360 held out."""
    images = (load_digits().data / 16.0).astype(np.float32)
    np.random.default_rng(seed).shuffle(images)
    return images[:1437], images[1437:]


def train(
    regularization: ActivityRegularization,
    images: tuple[Array, Array],
    settings: Settings,
    after_epoch: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train one autoencoder (Adam, squared error plus penalty, per digit) and measure it."""
    shown, held_out = images
    rng = np.random.default_rng(settings.seed)
    pixels = shown.shape[1]
    encoder = rng.normal(0, pixels**-0.5, (pixels, settings.units)).astype(np.float32)
    decoder = _unit_rows(encoder.T.copy())
    weights = [encoder, np.zeros(settings.units, np.float32), decoder, shown.mean(axis=0)]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    # The penalty of a batch is a sum over its digits; λ is meant per digit, as the error is.
    per_batch = ActivityRegularization(
        regularization.lam / settings.batch, regularization.norm, backend=settings.backend
    )
    step = 0
    for _ in range(settings.epochs):
        order = rng.permutation(len(shown))
        for start in range(0, len(shown) - settings.batch + 1, settings.batch):
            x = shown[order[start : start + settings.batch]]
            before, hidden, output = _forward(weights, x)
            output_gradient = (2.0 / settings.batch) * (output - x)
            hidden_gradient = output_gradient @ weights[2].T
            per_batch.apply(hidden, hidden_gradient)
            before_gradient = hidden_gradient * (before > 0)
            gradients = [
                x.T @ before_gradient,
                before_gradient.sum(axis=0),
                hidden.T @ output_gradient,
                output_gradient.sum(axis=0),
            ]
            step += 1
            _adam(weights, gradients, moments, step, settings.step)
            weights[2] = _unit_rows(weights[2])
        after_epoch()
    _, hidden, output = _forward(weights, held_out)
    # By array type, whatever is asked for: the bits are the same, and CUDA cannot count.
    counting = ActivityRegularization(regularization.lam, regularization.norm, backend="auto")
    statistics = ActivationStatistics(per_feature=True)
    penalty = counting.penalty(hidden, statistics=statistics)
    active = statistics.active
    assert active is not None  # it has counted
    return Outcome(
        regularization,
        float(np.mean((output - held_out) ** 2)),
        float(penalty) / len(held_out),
        hidden,
        active,
        weights[2],
    )


def _forward(weights: Sequence[Array], x: Array) -> tuple[Array, Array, Array]:
    """Return the hidden layer before and after ReLU, and the output."""
    before = x @ weights[0] + weights[1]
    hidden = np.maximum(before, 0)
    return before, hidden, hidden @ weights[2] + weights[3]


def _unit_rows(decoder: Array) -> Array:
    """Return the features with length 1, or small activations could hide behind large features."""
    lengths = np.linalg.norm(decoder, axis=1, keepdims=True)
    rows: Array = decoder / np.maximum(lengths, np.float32(1e-8))
    return rows


def _adam(
    weights: list[Array],
    gradients: Sequence[Array],
    moments: Sequence[tuple[Array, Array]],
    step: int,
    rate: float,
) -> None:
    """Take one step of Adam (Kingma and Ba, 2015) with its usual constants, in place."""
    rate *= (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
    for weight, gradient, (mean, square) in zip(weights, gradients, moments, strict=True):
        mean += 0.1 * (gradient - mean)
        square += 0.001 * (gradient * gradient - square)
        weight -= rate * mean / (np.sqrt(square) + 1e-8)


def sweep(settings: Settings, after_epoch: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Train without a penalty, then with each norm and λ of :data:`STRENGTHS`."""
    images = load_images(settings.seed)
    regularizations = [ActivityRegularization.l1(0.0, backend=settings.backend)]
    for norm, strengths in STRENGTHS.items():
        for lam in strengths:
            regularizations.append(ActivityRegularization(lam, norm, backend=settings.backend))
    return [train(each, images, settings, after_epoch) for each in regularizations]


def runs() -> int:
    """Return how many networks :func:`sweep` trains."""
    return 1 + sum(map(len, STRENGTHS.values()))


def tabulate(outcomes: Sequence[Outcome]) -> Table:
    """Return the table that shows the effect of λ."""
    units = outcomes[0].hidden.shape[1]
    table = Table(
        title="Activity regularization of an autoencoder, on held-out digits",
        caption=f"error: mean square, of a pixel. at zero: of the activations of {units} hidden "
        f"units. active: not zero, on average for a digit. dead: zero for every digit.",
    )
    for heading in (
        "norm",
        "λ",
        "error ×10⁻³",
        "at zero",
        "active units",
        "dead units",
        "penalty per digit",
    ):
        is_name = heading == "norm"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    norm = None
    for outcome in outcomes:
        reg = outcome.regularization
        if reg.lam and reg.norm is not norm:
            norm = reg.norm
            table.add_section()
        table.add_row(
            LABELS[reg.norm] if reg.lam else "none",
            f"{reg.lam:g}",
            f"{1e3 * outcome.error:.2f}",
            f"{outcome.zero_share:.1%}",
            f"{outcome.active_units:.1f}",
            f"{outcome.dead_units}",
            f"{outcome.penalty:.4f}",
        )
    return table


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Return the picture: the trade-off; features, activations and units without and with L1.

    Of the units also those that remain at the last λ of the last norm.
    """
    plain = outcomes[0]
    sparse = _showcase(outcomes)
    figure = Figure(figsize=(12, 10), layout="constrained")
    figure.suptitle("What activity regularization does to an autoencoder of handwritten digits")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    left, right = halves
    trade_off, histogram, units = left.subplots(3, 1)

    for norm in STRENGTHS:
        chosen = [plain, *(o for o in outcomes[1:] if o.regularization.norm is norm)]
        points = [(o.active_units, 1e3 * o.error) for o in chosen]
        trade_off.plot(*zip(*points, strict=True), "o-", label=LABELS[norm])
        for outcome, point in zip(chosen[1:], points[1:], strict=True):
            trade_off.annotate(
                f"{outcome.regularization.lam:g}",
                point,
                xytext=NUDGES[norm],
                textcoords="offset points",
                fontsize=7,
            )
    plain_point = plain.active_units, 1e3 * plain.error
    trade_off.annotate("0", plain_point, xytext=(6, -3), textcoords="offset points", fontsize=7)
    trade_off.margins(x=0.12)  # for the numbers
    trade_off.set(
        title="Trade-off; the small numbers are λ",
        xlabel="active units per digit",
        ylabel="reconstruction error ×10⁻³",
        yscale="log",
    )
    trade_off.legend()

    edges = np.linspace(0, float(np.quantile(plain.hidden, 0.995)), 60).tolist()
    for outcome in (plain, sparse):
        label = f"{_title(outcome)}: {outcome.zero_share:.0%} at zero"
        histogram.hist(outcome.hidden.ravel(), edges, histtype="step", label=label)
    histogram.set(title="Hidden activations", xlabel="activation", ylabel="how many", yscale="log")
    histogram.legend()

    for outcome in (plain, sparse, outcomes[-1]):
        shares = np.sort(outcome.active)[::-1] / len(outcome.hidden)
        label = f"{_title(outcome)}: {outcome.dead_units} dead"
        units.plot(np.arange(1, len(shares) + 1), shares, ".-", lw=1, label=label)
    units.set(
        title="Each unit; dead ones are active for no digit",
        xlabel="unit, the busiest first",
        ylabel="share of digits it is active for",
    )
    units.legend(loc=(0.1, 0.65), fontsize=9)  # where no curve is

    for panel, outcome in zip(right.subfigures(2, 1), (plain, sparse), strict=True):
        panel.suptitle(f"Features of the busiest units, {_title(outcome)}")
        busiest = np.argsort(-outcome.hidden.sum(axis=0))
        axes = panel.subplots(5, 8).ravel()
        for axis, feature in zip(axes, outcome.features[busiest], strict=False):
            limit = float(np.abs(feature).max())
            axis.imshow(feature.reshape(8, 8), cmap="RdBu_r", vmin=-limit, vmax=limit)
        for axis in axes:
            axis.set_axis_off()
    return figure


def _showcase(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the L1 network with the largest λ but one: sparse, and still an autoencoder."""
    chosen = [o for o in outcomes[1:] if o.regularization.norm is ActivityNorm.L1]
    return chosen[-2]


def _title(outcome: Outcome) -> str:
    reg = outcome.regularization
    return f"{LABELS[reg.norm]} with λ = {reg.lam:g}" if reg.lam else "no penalty"


def main(settings: Settings, out: Path) -> None:
    """Train with progress shown, print the table, and write the picture to ``out``."""
    console = Console()
    # On a busy machine small products take ten times as long in several threads, which wait
    # for each other: 20 s became 190 s.
    with threadpool_limits(1, user_api="blas"), Progress(console=console) as progress:
        task = progress.add_task(f"training {runs()} autoencoders", total=runs() * settings.epochs)
        outcomes = sweep(settings, lambda: progress.advance(task))
    console.print(tabulate(outcomes))
    draw(outcomes).savefig(out, dpi=120)
    console.print(f"The same as a picture: {out}")
