"""The demonstration's page, self-contained, and its short table for the terminal.

Every sentence that judges is chosen by the figures of this run.
"""

from __future__ import annotations

import html
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data import DIGITS_MODALITIES
from ..plots import (
    accuracy_bars,
    convergence_traces,
    modality_weight_bars,
    timing_bars,
    to_base64,
)
from .comparison import Comparison

Timings = Sequence[Mapping[str, Any]]

_LABELS = {"deq": "DEQ", "concat": "concat", "sum": "sum", "gated": "gated"}
_CONTENDERS = {"ours": "deqfusion", "textbook": "eager PyTorch"}
_MODES = {"forward": "forward", "forward_backward": "forward + backward"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.deq td { font-weight: 600 }
img { width: 100%; height: auto }
.note { color: #555; font-size: .9rem }
"""


def page(comparison: Comparison, timings: Timings) -> str:
    """Return the page as HTML with its pictures inside.

    Args:
        comparison: what was trained and measured.
        timings: results of `deqfusion.bench.quick_comparison`; empty leaves the section out.
    """
    options = comparison.options
    seeds = len(options.seeds)
    bars = accuracy_bars(
        {_label(name): comparison.values(name, "accuracy") for name in options.fusions},
        highlight=_label("deq"),
    )
    sections = [
        "<h1>Deep equilibrium fusion on handwritten digits</h1>",
        "<p>1,797 real images of digits, seen as three modalities: "
        f"{', '.join(DIGITS_MODALITIES)}. For every image, one modality drawn at random is buried "
        f"in noise of {options.noise:g} standard deviations; a model is not told which. Encoders, "
        "head, data and epochs are the same for every fusion, learning rates are chosen from "
        f"{', '.join(f'{rate:g}' for rate in options.learning_rates)}; only the fusion differs, "
        "and DEQ's loss has the Jacobian penalty that keeps its map contracting. "
        f"{seeds} {'seed draws its' if seeds == 1 else 'seeds each draw their'} own split, noise "
        "and parameters; epoch and learning rate are chosen on validation rows, the figures are on "
        "test rows.</p>",
        "<h2>Accuracy</h2>",
        _picture(bars, "Test accuracy of each fusion, with standard deviation over seeds"),
        _accuracy_table(comparison),
        f"<p>{html.escape(verdict(comparison))}</p>",
        "<p class=note>Point: mean over seeds; whiskers: one standard deviation; small dots: single"
        " seeds. The axis does not start at 0.</p>",
    ]
    if comparison.traces:
        figure = convergence_traces(comparison.traces)
        sections += [
            "<h2>Convergence</h2>",
            _picture(figure, "Residual against evaluations of the cell"),
            f"<p>{html.escape(_convergence_sentence(comparison))}</p>",
            "<p class=note>The trained cell of the first seed, whole state as one problem, test"
            " rows; line: median row, band: 10% to 90% of rows. A row that has met the tolerance"
            " keeps its residual.</p>",
        ]
    if comparison.weights:
        figure = modality_weight_bars(comparison.weights, DIGITS_MODALITIES)
        sections += [
            "<h2>Modality weights</h2>",
            _picture(figure, "Mean gate weight by noisy modality, before and after training"),
            f"<p>{html.escape(_weights_sentence(comparison))}</p>",
            "<p class=note>Mean over test rows and seeds of the gates' share per modality"
            " (<code>fusion.modality_weights(eq)</code>), by which modality is noisy, as difference"
            " from equal shares.</p>",
        ]
    if timings:
        sections += ["<h2>Speed on this machine</h2>", *_timing_section(timings)]
    sections.append(
        f"<p class=note>{html.escape(platform.machine())}, Python {platform.python_version()}, "
        f"PyTorch {html.escape(torch.__version__)}; training on one "
        "thread. All figures were measured by the run that wrote this page; "
        "<code>results.json</code> beside it has them in full.</p>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>deqfusion: digits</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def table(comparison: Comparison, timings: Timings) -> str:
    """Return the short table for the terminal: accuracy by fusion, weights, speed."""
    lines = [f"{'fusion':<16}{'accuracy':>10}{'+-':>8}{'ms/step':>10}"]
    for name in comparison.options.fusions:
        mean, spread = _mean_and_spread(comparison.values(name, "accuracy"))
        milliseconds = 1e3 * np.median(comparison.values(name, "step_seconds"))
        lines.append(f"{_label(name):<16}{mean:>10.3f}{spread:>8.3f}{milliseconds:>10.1f}")
    lines.append(verdict(comparison))
    if comparison.weights:
        lines.append(_weights_sentence(comparison))
    lines += [_speed_sentence(timing) for timing in timings]
    return "\n".join(lines)


def verdict(comparison: Comparison) -> str:
    """Say where equilibrium fusion stands among the others, as measured."""
    names = [name for name in comparison.options.fusions if name != "deq"]
    if "deq" not in comparison.options.fusions or not names:
        return "Nothing to compare: equilibrium fusion and at least one other are needed."
    ours = np.array(comparison.values("deq", "accuracy"))
    best = max(names, key=lambda name: np.mean(comparison.values(name, "accuracy")))
    # Seeds are paired: the same split and noise for every fusion.
    differences = ours - np.array(comparison.values(best, "accuracy"))
    gap, spread = _mean_and_spread(differences)
    if abs(gap) <= spread:
        relation = "equal to it within the spread"
    else:
        relation = "better than it" if gap > 0 else "worse than it"
    return (
        f"DEQ fusion: {ours.mean():.3f}. Best of the others: {_label(best)}, "
        f"{np.mean(comparison.values(best, 'accuracy')):.3f}. DEQ is {relation}: difference "
        f"{gap:+.3f} +- {spread:.3f} (same seeds)."
    )


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("weight_tied:", "weight-tied "))


def _mean_and_spread(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def _picture(figure: Figure, description: str) -> str:
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{to_base64(figure)}">'


def _accuracy_table(comparison: Comparison) -> str:
    rows = [
        "<tr><th>fusion</th><th>accuracy</th><th>std. dev.</th><th>macro F1</th>"
        "<th>parameters of the fusion</th><th>ms per training step</th><th>steps</th>"
        "<th>converged</th></tr>"
    ]
    for name in comparison.options.fusions:
        mean, spread = _mean_and_spread(comparison.values(name, "accuracy"))
        f1 = np.mean(comparison.values(name, "f1_macro"))
        milliseconds = 1e3 * np.median(comparison.values(name, "step_seconds"))
        steps, converged = "", ""
        if not np.isnan(comparison.values(name, "steps")).any():
            steps = f"{np.mean(comparison.values(name, 'steps')):.1f}"
            converged = f"{np.mean(comparison.values(name, 'converged')):.1%}"
        rows.append(
            f"<tr{' class=deq' if name == 'deq' else ''}><td>{html.escape(_label(name))}</td>"
            f"<td>{mean:.3f}</td><td>{spread:.3f}</td><td>{f1:.3f}</td>"
            f"<td>{comparison.values(name, 'parameters')[0]:,}</td><td>{milliseconds:.1f}</td>"
            f"<td>{steps}</td><td>{converged}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _convergence_sentence(comparison: Comparison) -> str:
    parts = []
    for target in (1e-2, 1e-3, 1e-4):
        counts = []
        for name, trace in comparison.traces.items():
            reached = np.nanmin(trace, axis=1) <= target
            if reached.mean() < 0.5:
                counts.append(f"{name} not within {trace.shape[1]}")
                continue
            # A row that never reaches the target counts as the whole trace and more.
            first = np.where(reached, (trace <= target).argmax(axis=1) + 1, trace.shape[1] + 1)
            counts.append(f"{name} {np.median(first):g}")
        parts.append(f"to {target:g}: {', '.join(counts)}")
    return f"Evaluations of the cell until the median row's residual is down {'; '.join(parts)}."


def _weights_sentence(comparison: Comparison) -> str:
    parts = []
    for title, weights in comparison.weights.items():
        noisy = np.diag(weights).mean()
        clean = weights[~np.eye(len(weights), dtype=bool)].mean()
        parts.append(
            f"{title} {noisy:.3f} on the noisy modality and {clean:.3f} on a clean one "
            f"({100 * (noisy / clean - 1):+.1f}%)"
        )
    return f"Mean modality weight: {'; '.join(parts)}."


def _speed_sentence(timing: Mapping[str, Any]) -> str:
    shape = timing["shape"]
    threads = f"{timing['threads']} thread{'s' if timing['threads'] > 1 else ''}"
    head = f"B={shape['batch']}, d={shape['dim']}, N={shape['num_modalities']}, {threads}"
    failed = [
        f"{_CONTENDERS[name]} failed ({entry['reason']})"
        for name, entry in timing["contenders"].items()
        if not entry["ok"]
    ]
    ratios = [
        f"{label} {timing['ratios'][mode]['median']:.2f} times as fast as eager PyTorch"
        for mode, label in _MODES.items()
        if timing["ratios"].get(mode)
    ]
    return f"{head}: {', '.join(failed + ratios)}."


def _timing_section(timings: Timings) -> list[str]:
    bars: dict[str, dict[str, tuple[float, float, float]]] = {}
    for timing in timings:
        for mode, label in _MODES.items():
            group = f"{label}, {timing['threads']} thread{'s' if timing['threads'] > 1 else ''}"
            entries = {
                _CONTENDERS[name]: (entry[mode]["p20"], entry[mode]["median"], entry[mode]["p80"])
                for name, entry in timing["contenders"].items()
                if entry.get(mode)
            }
            if entries:
                bars[group] = entries
    parts = []
    if bars:
        figure = timing_bars(bars, highlight=_CONTENDERS["ours"])
        parts.append(_picture(figure, "Seconds per solve, equilibrium fusion and eager PyTorch"))
    parts += [f"<p>{html.escape(_speed_sentence(timing))}</p>" for timing in timings]
    parts.append(
        "<p class=note>Rounds interleaved; every answer's relative residual is verified to "
        f"{timings[0]['tol']:g} on every row and block, and a contender that misses it gets no "
        "time. Eager PyTorch: the same cell with the usual Anderson solver on the whole state.</p>"
    )
    return parts
