"""The table and the chart of a measurement with `--budget`, from its results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.document_table import write_table

COLUMNS = {"ours": "ours", "eager": "PyTorch", "compiled": "PyTorch, compiled"}
KERNELS = {
    "xla": "XLA",
    "chunked": "chunked",
    "cudnn": "cuDNN",
    "eager": "PyTorch",
    "compiled": "PyTorch, compiled",
}
PACKAGES = ("jax", "torch", "transformers", "diffusers")


def duration(seconds: float) -> str:
    """Returns a duration with three digits, in seconds or in milliseconds: "1.54 s", "48.8 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{1e3 * seconds:.3g} ms"


def ratio(row: dict[str, Any]) -> float | None:
    """Returns the seconds of PyTorch's faster side divided by ours; None if there is nothing to compare.

    A side whose result differs from ours is not compared.
    """
    columns = row["columns"]
    if "seconds" not in columns["ours"]:
        return None
    theirs = [
        columns[name]["seconds"]
        for name in ("eager", "compiled")
        if name in columns and "seconds" in columns[name] and not columns[name]["differs"]
    ]
    return min(theirs) / columns["ours"]["seconds"] if theirs else None


def share(row: dict[str, Any], environment: dict[str, Any]) -> str:
    """Returns what part of the hardware's peak ours reaches, such as "47.7 % MFU"; "" if it is not known."""
    cell = row["columns"]["ours"]
    for bound, peak, name in (
        ("flops", "peak_flops", "MFU"),
        ("bytes", "peak_bandwidth", "of the bandwidth"),
    ):
        if "seconds" in cell and bound in row and peak in environment:
            return f"{100 * row[bound] / cell['seconds'] / environment[peak]:.1f} % {name}"
    return ""


def text(cell: dict[str, Any] | None) -> str:
    """Returns what stands in a cell of the table."""
    if cell is None:
        return ""
    if "seconds" not in cell:
        return "not measured"
    parts = [duration(cell["seconds"])]
    if "peak_gib" in cell:
        parts.append(f"{cell['peak_gib']:.1f} GiB")
    if "micro_batches" in cell:
        parts.append(f"{cell['micro_batches']} micro-batches")
    return ", ".join(parts)


def split(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rows that have a column for ours, and those of the attention kernels."""
    rows = found["rows"]
    return (
        {name: row for name, row in rows.items() if "ours" in row["columns"]},
        {name: row for name, row in rows.items() if "ours" not in row["columns"]},
    )


def table(found: dict[str, Any]) -> list[str]:
    """Returns the lines of the Markdown tables, what was not measured and why, and the environment."""
    environment = found["environment"]
    mains, kernels = split(found)
    device = environment["device"] if "device" in environment else "no device: nothing began"
    lines: list[str] = []
    if mains:
        columns = {k: v for k, v in COLUMNS.items() if any(k in row["columns"] for row in mains.values())}
        lines += [
            f"| {device} | {' | '.join(columns.values())} | ratio | of the hardware |",
            "|---" * (len(columns) + 3) + "|",
        ]
    for name, row in mains.items():
        value = ratio(row)
        cells = [text(row["columns"].get(column)) for column in columns]
        cells += ["" if value is None else f"{value:.2f}", share(row, environment)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if kernels:
        columns = {k: v for k, v in KERNELS.items() if any(k in row["columns"] for row in kernels.values())}
        lines += ["", f"| {device} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in kernels.items():
        lines.append(f"| {name} | {' | '.join(text(row['columns'].get(column)) for column in columns)} |")
    return [*lines, *notes(found)]


def notes(found: dict[str, Any]) -> list[str]:
    """Returns the lines below the table: what differs, what was not measured, the command and versions."""
    lines = []
    for name, row in found["rows"].items():
        for column, cell in row["columns"].items():
            if "not_measured" in cell:
                lines.append(f"- Not measured: {name}, {column}: {cell['not_measured']}.")
            elif "differs" in cell and cell["differs"]:
                wrong = ", ".join(f"{kind} by {error:.2g}" for kind, error in cell["differs"].items())
                lines.append(f"- Not comparable: {name}, {column}: the result differs from ours ({wrong}).")
    environment = found["environment"]
    end = [f"`{environment['command']}`: {environment['dtype']}"]
    if "versions" in environment:
        end += [f"{name} {environment['versions'][name]}" for name in PACKAGES]
    return [*([""] if lines else []), *lines, "", ", ".join(end) + "."]


def faulty(found: dict[str, Any]) -> bool:
    """Returns whether a result differs from ours, or a process failed. Running out of time is not a fault."""
    cells = [cell for row in found["rows"].values() for cell in row["columns"].values()]
    return any("failed" in cell or ("differs" in cell and cell["differs"]) for cell in cells)


def chart(found: dict[str, Any], path: Path) -> bool:
    """Draws PyTorch's seconds divided by ours, row by row; returns False if there is nothing to draw."""
    rows = {
        name: row
        for name, row in split(found)[0].items()
        if "seconds" in row["columns"]["ours"] and any(c in bars(row) for c in ("eager", "compiled"))
    }
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"ours": "#1f5fa8", "eager": "#c9ccd1", "compiled": "#8d949e"}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.75 * len(rows)), layout="constrained")
    longest = max(length for row in rows.values() for length, _ in bars(row).values())
    for number, row in enumerate(rows.values()):
        found_bars = bars(row)
        height = 0.8 / len(COLUMNS)
        for i, (column, (length, label)) in enumerate(found_bars.items()):
            y = number + (i - (len(found_bars) - 1) / 2) * height
            axes.barh(y, length, height * 0.9, color=colors[column])
            box = {"color": "white", "pad": 0.0}  # the line at 1 ends before a label
            axes.text(length + 0.01 * longest, y, label, va="center", fontsize=8, bbox=box)
    axes.axvline(1, color=colors["ours"], linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * longest)
    axes.set_xlabel("seconds divided by ours: PyTorch's bars beyond 1 are slower than ours")
    axes.set_title(f"dreamllm_jax beside PyTorch: {found['environment']['device']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[column]) for column in COLUMNS]
    figure.legend(handles, list(COLUMNS.values()), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def bars(row: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Returns each measured and comparable column's seconds divided by ours, and its label."""
    columns = row["columns"]
    ours = columns["ours"]["seconds"]
    return {
        name: (columns[name]["seconds"] / ours, duration(columns[name]["seconds"]))
        for name in COLUMNS
        if name in columns
        and "seconds" in columns[name]
        and not ("differs" in columns[name] and columns[name]["differs"])
    }


def write(folder: Path, document: Path | None = None) -> bool:
    """Writes table.md and chart.png from the folder's results.json; returns whether all is well.

    The table goes into `document` too, between its marks `<!-- beside torch, gpu -->`.

    Raises:
      ValueError: the folder has no results.json, or the document lacks the marks.
    """
    source = folder / "results.json"
    if not source.is_file():
        raise ValueError(f"{folder} has no results.json; give the folder of a run with --budget.")
    found = json.loads(source.read_text(encoding="utf-8"))
    lines = table(found)
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    if document is not None:
        write_table(document, "beside torch, gpu", lines)
    if not chart(found, folder / "chart.png"):
        print("No row has both sides, so no chart was drawn.")
    return not faulty(found)
