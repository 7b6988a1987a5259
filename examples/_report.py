"""The report of `compare_clippers.py`: words, plots and tables in one HTML file."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
from _plots import (
    COLOURS,
    LOOK,
    accuracy_figure,
    clip_rate_figure,
    loss_figure,
    norm_figure,
    overview_figure,
)
from _results import Results, Row
from _training import (
    BATCH_SIZE,
    CLIPPER_TITLES,
    EVAL_EVERY,
    OPTIMIZER_TITLES,
    SETTINGS,
    WORKLOADS,
)
from matplotlib.figure import Figure


def write_pictures(results: Results, out: Path) -> None:
    """overview.png, 1200 x 500, and accuracy.png."""
    with mpl.rc_context(LOOK):
        overview_figure(results).savefig(out / "overview.png")
        accuracy_figure(results).savefig(out / "accuracy.png", dpi=100)


def write_report(results: Results, path: Path) -> None:
    """One HTML file that needs no other."""
    with mpl.rc_context(LOOK):
        body = "\n".join(_body(results))
    write_page("Gradient clippers, compared", body, path)


def write_page(title: str, body: str, path: Path) -> None:
    """An HTML file in the style of the reports."""
    page = _PAGE.replace("{{title}}", html.escape(title)).replace("{{style}}", _STYLE)
    path.write_text(page.replace("{{body}}", body), encoding="utf-8")


def _body(results: Results) -> Iterator[str]:
    config = results.config
    yield "<h1>Gradient clippers, compared</h1>"
    yield f"<p class=lead>{html.escape(_how(results))}</p>"
    yield "<h2>What the results show</h2><ul>"
    for title, text in readings(results):
        yield f"<li><b>{html.escape(title)}.</b> {html.escape(text)}</li>"
    yield "</ul><p class=note>Clearly: by more than both standard deviations over seeds together."
    yield "In brackets the worst and the best clipper.</p>"
    yield picture(
        accuracy_figure(results),
        "Test accuracy at the end of training: mean over seeds, bars one standard deviation.",
    )
    for workload in config["workloads"]:
        yield f"<h2>{html.escape(WORKLOADS[workload].title)}</h2>"
        yield picture(
            loss_figure(results, workload),
            "Training loss: median over seeds, smoothed, log axes. A cross marks where the"
            " parameters turn into NaN.",
        )
        if results.clipping:
            yield picture(
                norm_figure(results, workload),
                "What each clipper measures before clipping (colour) against its bound (dashed),"
                " first seed, log axes; the bound stands in the title. Of several leaves, units"
                " or elements the one furthest beyond its bound is shown. AGC's bound follows"
                " the norm of the unit's parameters, so it is smallest for biases, which start"
                " at zero.",
            )
            yield picture(
                clip_rate_figure(results, workload),
                "How often each clipper clips. A step counts when any leaf, unit or element was"
                " beyond its bound; NaN is never within it.",
            )
        yield _table(results, workload)


def readings(results: Results) -> Iterator[tuple[str, str]]:
    """What each setting shows, in words and numbers that come from the results."""
    for setting in results.config["settings"]:
        rows = [r for r in results.rows if r.setting == setting]
        lost, total = sum(r.lost_runs for r in rows), sum(r.runs for r in rows)
        said = []
        if SETTINGS[setting].guarded:
            skipped = sum(r.skipped for r in results.runs if r.setting == setting)
            said.append(f"In {total} runs skip_nonfinite skipped {skipped} steps")
        if lost or SETTINGS[setting].nan:
            said.append(_losses(rows))
        if lost < total:
            said.extend(_verdict(results, setting))
            said.extend(_spread(results, w, setting) for w in results.config["workloads"])
        yield SETTINGS[setting].title, ". ".join(said) + "."


def _losses(rows: Sequence[Row]) -> str:
    """How many runs NaN has taken, with and without a clipper."""
    said = []
    for how, some in (
        ("without clipping", [r for r in rows if r.clipper == "none"]),
        ("with a clipper", [r for r in rows if r.clipper != "none"]),
    ):
        if some:
            lost, total = sum(r.lost_runs for r in some), sum(r.runs for r in some)
            said.append(f"{lost} of {total} runs {how}")
    return f"NaN has taken the parameters of {' and '.join(said)}"


def _verdict(results: Results, setting: str) -> Iterator[str]:
    """Whether the best clipper and no clipping differ by more than the seeds do."""
    workloads = results.config["workloads"]
    rows = [results.row(w, setting, "none") for w in workloads]
    if None in rows or not results.clipping or len(results.config["seeds"]) < 2:
        return
    gaps = []
    for bare, workload in zip(rows, workloads, strict=True):
        best = _ranked(results, workload, setting)[-1]
        noise = best.accuracy_std + bare.accuracy_std
        gaps.append((best.accuracy_mean - bare.accuracy_mean) / max(noise, 1e-9))
    for word, count in (("better", sum(g > 1 for g in gaps)), ("worse", sum(g < -1 for g in gaps))):
        if count:
            on = f"{count} of {len(gaps)} models"
            yield f"The best clipper is clearly {word} than no clipping on {on}"
    if all(abs(g) <= 1 for g in gaps):
        yield "No clear difference between no clipping and the best clipper"


def _spread(results: Results, workload: str, setting: str) -> str:
    """Accuracy without clipping, and from the worst clipper to the best."""
    bare, ranked = results.row(workload, setting, "none"), _ranked(results, workload, setting)
    said = [f"{100 * bare.accuracy_mean:.1f} % without clipping"] if bare else []
    if ranked:
        ends = ranked if len(ranked) == 1 else (ranked[0], ranked[-1])
        said.append(
            "with it "
            + " to ".join(
                f"{100 * r.accuracy_mean:.1f} % ({CLIPPER_TITLES[r.clipper]})" for r in ends
            )
        )
    return f"{WORKLOADS[workload].title}: {', '.join(said)}"


def _ranked(results: Results, workload: str, setting: str) -> list[Row]:
    clipped = [r for r in results.rows_of(workload, setting) if r.clipper != "none"]
    return sorted(clipped, key=lambda r: r.accuracy_mean)


def _how(results: Results) -> str:
    config = results.config
    return (
        f"{len(results.runs)} training runs: {len(config['seeds'])} seeds, {config['steps']} steps"
        f" each, {OPTIMIZER_TITLES[config['optimizer']]}, batches of {BATCH_SIZE}. The bound of a"
        f" clipper is the {config['bound_quantile']:g} quantile of what it measures in one clean,"
        " unclipped run with a seed of its own. Test accuracy is measured every"
        f" {EVAL_EVERY} steps on the quarter of the data held out; the tables give the last."
    )


def picture(figure: Figure, caption: str) -> str:
    """A figure that is part of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(results: Results, workload: str) -> str:
    lines = [
        "<table><tr><th>Setting<th>Clipper<th>Bound<th>Test accuracy, %<th>Clip rate"
        "<th>Steps to 90 %<th>µs per step</tr>"
    ]
    for setting in results.config["settings"]:
        rows = results.rows_of(workload, setting)
        best = max(rows, key=lambda r: r.accuracy_mean)
        for i, row in enumerate(rows):
            first = f"<td rowspan={len(rows)} class=setting>{SETTINGS[setting].title}"
            accuracy, *others = row.cells()
            if row is best and row.lost_runs < row.runs:
                accuracy = f"<b>{accuracy}</b>"
            bound = "-" if row.bound is None else f"{row.bound:g}"
            lines.append(
                f"<tr{' class=first' if i == 0 else ''}>{first if i == 0 else ''}"
                f'<td><i style="background:{COLOURS[row.clipper]}"></i>'
                f"{CLIPPER_TITLES[row.clipper]}<td>{bound}<td>{accuracy}"
                + "".join(f"<td>{cell}" for cell in others)
                + "</tr>"
            )
    note = (
        "Mean and standard deviation over seeds; the best of each block is bold, which says"
        " little where the deviations overlap. Steps to 90 % of the best accuracy that any"
        " clipper reached in the block, median over seeds. The time is that of a whole compiled"
        " run over its steps, compilation left out; it varies with what else the machine does."
    )
    return "\n".join(lines) + f"</table><p class=note>{note}</p>"


_STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
       color: #23282f; background: #fff; max-width: 1160px; margin: 40px auto; padding: 0 24px; }
h1 { font-size: 32px; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 22px; margin: 44px 0 12px; padding-top: 20px; border-top: 1px solid #e1e4e8; }
.lead { color: #4b525c; max-width: 820px; }
ul { padding-left: 20px; max-width: 960px; } li { margin: 8px 0; }
figure { margin: 20px 0 28px; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #666e79; font-size: 14px; max-width: 860px; }
table { border-collapse: collapse; font-size: 14px; margin-top: 12px;
        font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; padding: 6px 14px; border-bottom: 2px solid #aab1bb; }
th:nth-child(-n+2) { text-align: left; }
td { text-align: right; padding: 3px 14px; }
.setting { text-align: left; vertical-align: top; font-weight: 600; max-width: 170px; }
td:has(i) { text-align: left; }
tr.first td { border-top: 1px solid #d5d9df; padding-top: 7px; }
td i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{title}}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{{style}}</style></head><body>
{{body}}
</body></html>
"""
