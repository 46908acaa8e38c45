"""The report's plots, as SVG text that takes the colour of the page around it, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from regard.bench.rows import Row, workload_of

# Okabe and Ito's palette, told apart by the colour-blind and legible on white and on black; yellow and black left out.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
_MARKERS = "osD^vPX*"
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_FAINT = "#040506"  # for its grid lines
# of files: on the page they take its colour
_STANDALONE = "<style>svg{color:#1a1a1a}@media(prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"
_MAX_PANELS = 12


def all_plots(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """(caption, SVG) of every plot that the rows have data for, by name."""
    timed = [row for row in rows if row["status"] == "ok" and "workload" in row]
    makers: dict[str, tuple[str, Callable[[Sequence[Row]], str | None]]] = {
        "speedup": ("Speed relative to the reference: green is faster, red is slower", speedup_map),
        "throughput": ("Achieved rate over the length; dotted: a large matrix product in the same run", throughput),
        "roofline": ("Achieved rate over operations per byte, under the ceilings measured in the same run", roofline),
        "memory": ("Memory at a call's peak, inputs included, over the length; dotted: inputs and results", memory),
        "choice": ("What automatic selection chooses; green where nothing of ours was faster", choice_map),
    }  # fmt: skip
    made = {}
    for name, (caption, maker) in makers.items():
        svg = maker(timed)
        if svg is not None:
            made[name] = (caption, svg)
    return made


def standalone(svg: str) -> str:
    """The SVG as a file of its own, which must bring its text colours."""
    opening = re.search(r"<svg[^>]*>", svg)
    assert opening is not None
    return svg[: opening.end()] + _STANDALONE + svg[opening.end() :]


def colours(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each implementation, the same in every plot."""
    return {
        name: (_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
        for index, name in enumerate(dict.fromkeys(names))
    }


# --- Maps over (everything but the length) x length


def speedup_map(rows: Sequence[Row]) -> str | None:
    """A panel for each implementation other than the reference."""
    compared = [row for row in rows if row.get("speedup") and row["implementation"] != row["reference"]]
    names = list(dict.fromkeys(row["implementation"] for row in compared))
    places = _places(compared)
    panels = {}
    for name in names:
        references = "/".join(dict.fromkeys(row["reference"] for row in compared if row["implementation"] == name))
        cells = {places[row["case"]]: row["speedup"] for row in compared if row["implementation"] == name}
        panels[f"{name} / {references}"] = {
            place: (f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}", math.log2(ratio) / 2)
            for place, ratio in cells.items()
        }
    return _maps(panels)


def choice_map(rows: Sequence[Row]) -> str | None:
    """The chosen backend, coloured by how much faster the fastest backend of ours is."""
    from regard.bench.peers import is_ours

    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if is_ours(row["implementation"]) and row.get("chosen"):
            by_case.setdefault(row["case"], []).append(row)
    places = _places(rows)
    cells = {}
    for ours in by_case.values():
        best = min(ours, key=lambda row: row["ms"])
        chosen = next((row for row in ours if row["implementation"] == row["chosen"]), None)
        loss = 0.0 if chosen is None else chosen["ms"] / best["ms"] - 1
        text = best["chosen"] if loss < 0.05 else f"{best['chosen']}\n{best['implementation']} {1 + loss:.2f}x"
        cells[places[best["case"]]] = (text, 0.5 if loss < 0.05 else -min(1.0, loss))
    return _maps({"": cells}, cell_width=1.1) if cells else None


_Place = tuple[str, int]


def _places(rows: Sequence[Row]) -> dict[str, _Place]:
    """Line and column of each case in a map: its name without its lengths, and its key length.

    The batch stays in the name only where a length is there with several: in a grid of as many tokens for each length
    it follows from the length.
    """
    batches: dict[_Place, set[str]] = {}
    found = {}
    for row in rows:
        words = [word for word in row["case"].split("-") if not re.fullmatch(r"[sk]\d+", word)]
        rest = "-".join(word for word in words if not re.fullmatch(r"b\d+", word))
        found[row["case"]] = rest, "-".join(words), int(row["workload"]["seqlen_k"])
        batches.setdefault((rest, found[row["case"]][2]), set()).add("-".join(words))
    several = {rest for (rest, _), lines in batches.items() if len(lines) > 1}
    return {case: (line if rest in several else rest, length) for case, (rest, line, length) in found.items()}


def _maps(panels: Mapping[str, Mapping[_Place, tuple[str, float]]], cell_width: float = 0.62) -> str | None:
    """Panels of coloured cells with texts; a value of 1 is the strongest green, -1 the strongest red."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    panels = {name: cells for name, cells in panels.items() if cells}
    if not panels:
        return None
    lines = list(dict.fromkeys(line for cells in panels.values() for line, _ in cells))
    columns = sorted({column for cells in panels.values() for _, column in cells})
    label_width = 0.085 * max(map(len, lines)) + 0.3
    width = label_width + len(panels) * (cell_width * len(columns) + 0.25)
    figure, axes = _figure(1, len(panels), (width, 0.27 * len(lines) + 0.9))
    palette = colormaps["RdYlGn"]
    for index, (name, cells) in enumerate(panels.items()):
        axis = axes[index]
        for (line, column), (text, value) in cells.items():
            at = columns.index(column), lines.index(line)
            fill = palette(0.5 + 0.45 * max(-1.0, min(1.0, value)))
            axis.add_patch(Rectangle((at[0] + 0.02, at[1] + 0.03), 0.96, 0.94, facecolor=fill))
            ink = "#111111" if sum(fill[:3]) > 1.25 else "#ffffff"
            middle = at[0] + 0.5, at[1] + 0.5
            axis.text(*middle, text, ha="center", va="center", fontsize=7, color=ink, linespacing=0.95)
        axis.set(xlim=(0, len(columns)), ylim=(len(lines), 0), title=name)
        axis.set_xticks([i + 0.5 for i in range(len(columns))], [_length(c) for c in columns], fontsize=8)
        axis.set_yticks([i + 0.5 for i in range(len(lines))], lines if index == 0 else [], fontsize=8)
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(left=label_width / width, right=0.995, wspace=0.05)
    return _svg(figure, "map" + "".join(panels), tight=False)


# --- Curves over the length


def throughput(rows: Sequence[Row]) -> str | None:
    """TFLOP/s, a panel for each head dim and kind of call."""
    factor, unit = _rate_unit(rows)

    def draw(axis: Any, panel: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
        _lines(axis, panel, styles, lambda row: factor * row["tflops"])
        axis.axhline(factor * panel[0]["matmul_tflops"], color=_INK, linestyle=":", linewidth=1)
        axis.set_ylim(bottom=0)

    return _panels(rows, draw, unit)


def _rate_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """What to multiply TFLOP/s by, and the unit this gives."""
    return (1, "TFLOP/s") if max((row["tflops"] for row in rows), default=1) >= 1 else (1e3, "GFLOP/s")


def memory(rows: Sequence[Row]) -> str | None:
    """Peak memory of a call, a panel for each head dim and kind of call."""
    from matplotlib.ticker import LogLocator

    def draw(axis: Any, panel: Sequence[Row], styles: Mapping[str, tuple[str, str]]) -> None:
        _lines(axis, panel, styles, lambda row: (row["input_bytes"] + row["peak_bytes"]) / 2**20)
        own = sorted(
            {(row["workload"]["seqlen_k"], (row["input_bytes"] + row["result_bytes"]) / 2**20) for row in panel}
        )
        axis.plot(*zip(*own, strict=True), color=_INK, linestyle=":", linewidth=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.minorticks_off()

    return _panels([row for row in rows if row.get("peak_bytes")], draw, "MiB")


def _panels(rows: Sequence[Row], draw: Callable[[Any, Sequence[Row], Mapping[str, tuple[str, str]]], None],
            unit: str) -> str | None:  # fmt: skip
    groups = _series(rows)
    if not groups:
        return None
    styles = colours(row["implementation"] for row in rows)
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    figure, axes = _figure(down, across, (3.6 * across, 2.6 * down + 0.5))
    for axis, (name, panel) in zip(axes, groups.items(), strict=False):
        draw(axis, panel, styles)
        lengths = sorted({row["workload"]["seqlen_k"] for row in panel})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [_length(length) for length in lengths], fontsize=8)
        axis.xaxis.minorticks_off()
        axis.set_title(name, fontsize=9)
    for index, axis in enumerate(axes):
        axis.set_visible(index < len(groups))
        if index % across == 0:
            axis.set_ylabel(unit)
    _legend(figure, {row["implementation"] for panel in groups.values() for row in panel}, styles)
    return _svg(figure, unit)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in length only, by what they share; of several batches at a length the largest."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        workload = workload_of(row)
        shared = [workload.mode] if workload.mode != "fwd" else []
        if workload.heads_q != workload.heads_kv:
            shared.append(f"h{workload.heads_q}/{workload.heads_kv}")
        shared += [f"d{workload.head_dim}", workload.dtype, *workload.features()]
        if workload.seqlen_q != workload.seqlen_k:
            shared.append(f"q{workload.seqlen_q}")
        groups.setdefault(" ".join(shared), []).append(row)
    found = {}
    for name, group in groups.items():
        largest: dict[tuple[str, int], Row] = {}
        for row in group:
            key = row["implementation"], row["workload"]["seqlen_k"]
            if key not in largest or largest[key]["workload"]["batch"] < row["workload"]["batch"]:
                largest[key] = row
        if len({length for _, length in largest}) > 1:
            found[name] = sorted(largest.values(), key=lambda row: int(row["workload"]["seqlen_k"]))
    return dict(list(found.items())[:_MAX_PANELS])


def _lines(axis: Any, panel: Sequence[Row], styles: Mapping[str, tuple[str, str]],
           value: Callable[[Row], float]) -> None:  # fmt: skip
    for name in dict.fromkeys(row["implementation"] for row in panel):
        points = [(row["workload"]["seqlen_k"], value(row)) for row in panel if row["implementation"] == name]
        colour, marker = styles[name]
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, linewidth=1.4)


def roofline(rows: Sequence[Row]) -> str | None:
    """Every case as a point under the roof of its dtype."""
    if not rows:
        return None
    styles = colours(row["implementation"] for row in rows)
    factor, unit = _rate_unit(rows)
    figure, (axis,) = _figure(1, 1, (7.2, 4.2))
    for name, (colour, marker) in styles.items():
        own = [row for row in rows if row["implementation"] == name]
        places = [row["flops"] / row["bytes"] for row in own], [factor * row["tflops"] for row in own]
        axis.plot(*places, color=colour, marker=marker, markersize=4, alpha=0.75, linestyle="")
    intensities = sorted(row["flops"] / row["bytes"] for row in rows)
    span = [0.7 * intensities[0] * (2 * intensities[-1] / intensities[0]) ** (i / 200) for i in range(201)]
    roofs = {row["workload"]["dtype"]: (factor * row["matmul_tflops"], factor * row["copy_gbs"] / 1e3) for row in rows}
    for dtype, (product, copy) in roofs.items():
        axis.plot(span, [min(product, copy * x) for x in span], color=_INK, linewidth=1, linestyle=":")
        axis.annotate(dtype, (span[-1], product), fontsize=8, ha="right", va="bottom", color=_INK)
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel=unit)
    _legend(figure, set(styles), styles)
    return _svg(figure, "roofline")


# --- Drawing


def _figure(down: int, across: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
        "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9, "axes.grid": True, "axes.linewidth": 0.6,
        "grid.linewidth": 0.5, "grid.color": _FAINT, "axes.facecolor": "none", "figure.facecolor": "none",
        "savefig.facecolor": "none", "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
                         "ytick.color"), _INK),
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=size)
        axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    return figure, axes


def _legend(figure: Any, names: set[str], styles: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=name)
        for name, (colour, marker) in styles.items()
        if name in names
    ]
    legend = figure.legend(handles=handles, loc="upper center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(_INK)


def _svg(figure: Any, salt: str, tight: bool = True) -> str:
    import matplotlib as mpl

    if tight:
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(written, format="svg", metadata=metadata, bbox_inches=None if tight else "tight")
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_FAINT, "rgba(128,128,128,0.35)")
    # several plots stand on one page: only the ids that something refers to are kept, and those are salted
    text = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_\d+"', "", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _length(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)
