"""The plot and the report of `label_noise.py`."""

import dataclasses
import html
from pathlib import Path

import matplotlib as mpl
import numpy as np
from _plots import LOOK
from _report import picture, write_page
from matplotlib.figure import Figure

COLOURS = {
    "plain": "#3b3b3b",
    "global": "#0072b2",
    "per_example": "#d55e00",
    "trim": "#009e73",
    "phuber": "#b0569a",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One training run."""

    method: str
    noise: float
    seed: int
    curve: np.ndarray
    """Test accuracy at each evaluation."""

    @property
    def accuracy(self) -> float:
        """At the end."""
        return float(self.curve[-1])


def write_noise_report(
    outcomes: list[Outcome], titles: dict[str, str], every: int, how: str, out: Path
) -> None:
    """report.html and label_noise.png."""
    with mpl.rc_context(LOOK):
        figure = _figure(outcomes, titles, every)
        figure.savefig(out / "label_noise.png", dpi=110)
        body = [
            "<h1>Wrong labels and clipping</h1>",
            f"<p class=lead>{html.escape(how)}</p>",
            *_said(outcomes),
            picture(
                figure,
                "Left: test accuracy at the end against the share of wrong labels; bars are one"
                " standard deviation over seeds. The others: during training, mean over seeds. A"
                " model first learns what most labels agree on, and the wrong ones later.",
            ),
            _table(outcomes, titles),
        ]
    write_page("Wrong labels and clipping", "\n".join(body), out / "report.html")


PAGE = """# Wrong labels

{how}

<!-- table -->

{table}

Test accuracy at the end, %: mean and standard deviation over seeds.

<!-- end -->

![Accuracy against the share of wrong labels](label_noise.png)

The same with standardised pixels, which such a model learns by heart sooner: as many steps undo
all that clipping example by example had gained.

{aside}

Written by `examples/label_noise.py --markdown`, which also draws the picture.
"""


def write_noise_page(
    outcomes: list[Outcome], aside: list[Outcome], titles: dict[str, str], how: str, path: Path
) -> None:
    """The documentation's page; aside are runs with standardised pixels."""
    tables = {"table": _markdown(outcomes, titles), "aside": _markdown(aside, titles)}
    path.write_text(PAGE.format(how=how, **tables), encoding="utf-8")


def _markdown(outcomes: list[Outcome], titles: dict[str, str]) -> str:
    noises = sorted({x.noise for x in outcomes})
    lines = [
        f"| | {' | '.join(f'{100 * noise:.0f} % wrong' for noise in noises)} |",
        f"| --- |{' ---: |' * len(noises)}",
    ]
    for method in dict.fromkeys(x.method for x in outcomes):
        cells = ["{:.1f} ± {:.1f}".format(*_final(outcomes, method, noise)) for noise in noises]
        lines.append(f"| {titles[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(outcomes: list[Outcome], titles: dict[str, str], every: int) -> Figure:
    noises = sorted({x.noise for x in outcomes})
    shown = [noise for noise in noises if noise > 0][-2:] or noises[-1:]
    figure = Figure(figsize=(4 * (1 + len(shown)), 3.9), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    for k, method in enumerate(titles):
        means, stds = np.array([_final(outcomes, method, noise) for noise in noises]).T
        at = 100 * np.array(noises) + 0.5 * (k - len(titles) / 2)
        left.errorbar(at, means, stds, fmt="o-", color=COLOURS[method], ms=4, capsize=2, lw=1.3)
        for ax, noise in zip(others, shown, strict=True):
            curve = 100 * np.mean(_curves(outcomes, method, noise), axis=0)
            ax.plot(every * np.arange(1, len(curve) + 1), curve, color=COLOURS[method], lw=1.4)
    left.set(title="At the end of training", xlabel="wrong labels, %", ylabel="test accuracy, %")
    left.set_xticks([100 * noise for noise in noises])
    for ax, noise in zip(others, shown, strict=True):
        ax.set(title=f"{100 * noise:.0f} % of the labels wrong", xlabel="step")
    lines = [mpl.lines.Line2D([], [], color=COLOURS[m], lw=2.5) for m in titles]
    figure.legend(lines, titles.values(), loc="outside lower center", ncols=len(titles))
    return figure


def _said(outcomes: list[Outcome]) -> list[str]:
    """What the numbers say of clipping one by one against clipping the batch."""
    if not {"global", "per_example"} <= {x.method for x in outcomes}:
        return []
    lines = []
    for noise in sorted({x.noise for x in outcomes}):
        (single, _), (batch, _) = (
            _final(outcomes, method, noise) for method in ("per_example", "global")
        )
        lines.append(
            f"<li>{100 * noise:.0f} % wrong labels: per-example clipping {single:.1f} %, global"
            f" clipping {batch:.1f} %, a difference of {single - batch:+.1f} points.</li>"
        )
    return ["<h2>What the results show</h2><ul>", *lines, "</ul>"]


def _table(outcomes: list[Outcome], titles: dict[str, str]) -> str:
    noises = sorted({x.noise for x in outcomes})
    best = {n: max(_final(outcomes, m, n)[0] for m in titles) for n in noises}
    head = "".join(f"<th>{100 * noise:.0f} % wrong" for noise in noises)
    lines = [f"<table><tr><th>Test accuracy, %{head}</tr>"]
    for method, title in titles.items():
        cells = ""
        for noise in noises:
            mean, std = _final(outcomes, method, noise)
            text = f"{mean:.1f} ± {std:.1f}"
            cells += f"<td><b>{text}</b>" if mean == best[noise] else f"<td>{text}"
        dot = f'<i style="background:{COLOURS[method]}"></i>'
        lines.append(f"<tr><td>{dot}{html.escape(title)}{cells}</tr>")
    note = "Mean and standard deviation over seeds; the best of each column is bold."
    return "\n".join(lines) + f"</table><p class=note>{note}</p>"


def _curves(outcomes: list[Outcome], method: str, noise: float) -> list[np.ndarray]:
    return [x.curve for x in outcomes if (x.method, x.noise) == (method, noise)]


def _final(outcomes: list[Outcome], method: str, noise: float) -> tuple[float, float]:
    """Accuracy at the end in percent: mean and standard deviation over seeds."""
    ends = [100 * curve[-1] for curve in _curves(outcomes, method, noise)]
    return float(np.mean(ends)), float(np.std(ends))
