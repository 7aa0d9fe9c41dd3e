"""What a result is shown as: pictures beside the file, and one page with all of them inside."""

from __future__ import annotations

import html
import json
import tempfile
from pathlib import Path
from typing import Any

from deqfusion.plots import save_png, to_base64

from . import pictures, report, results

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.35 }
img { max-width: 100%; height: auto }
.note { color: #555; font-size: .9rem }
"""
TITLES = {
    "speedup": "Speed",
    "batch": "Time against batch",
    "dim": "Time against width",
    "num_modalities": "Time against modalities",
    "residual": "Time to a residual",
    "memory": "Memory",
    "roofline": "Roofline",
}


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws a result into a folder that exists.

    Args:
        result: of `runner.run`, or read from a file.
        folder: gets SUITE-PICTURE.png for every picture there is something for, and index.html.

    Returns:
        The files, in the order in which they were written.
    """
    name = str(result["suite"].get("name", "bench"))
    written, parts = [], []
    for key, figure in pictures.figures(result).items():
        # The name comes from the file: no folder of its choosing.
        path = folder / f"{Path(name).name}-{key}.png"
        save_png(figure, path)
        written.append(path)
        parts.append(_section(TITLES[key], pictures.CAPTIONS[key], to_base64(figure)))
    path = folder / "index.html"
    results.write_text(page(result, parts), path)
    return [*written, path]


def page(result: dict[str, Any], parts: list[str]) -> str:
    """The page: what was measured where, the pictures, the table, and the record.

    Args:
        result: of `runner.run`, or read from a file.
        parts: HTML of the pictures.
    """
    name = html.escape(str(result["suite"].get("name", "bench")))
    environment = html.escape(json.dumps(result["environment"], indent=1))
    absent = report.absent(result)
    failed = [f"{contender}: {reason}" for contender, reason in absent.items()]
    for case in result["cases"]:
        title, everybody = report.title(case), report.untimed(case, absent)
        failed += (
            [f"{title}: {everybody}"]
            if everybody
            else [
                f"{title}: {contender}: {entry['status']}: {entry['reason']}"
                for contender, entry in case["contenders"].items()
                if entry["seconds"] is None and contender not in absent
            ]
        )
    missing = "".join(f"<li>{html.escape(line)}</li>" for line in dict.fromkeys(failed))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>deqfusion bench: {name}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<h1>deqfusion bench: {name}</h1>\n<p>{html.escape(results.describe(result))}. Every "
        "time is that of an answer whose residual was verified in fp64 in the same run.</p>\n"
        + "\n".join(parts)
        + (f"\n<h2>Not measured</h2>\n<ul class=note>{missing}</ul>" if missing else "")
        + f"\n<h2>Table</h2>\n<pre>{html.escape(report.table(result))}</pre>"
        + f"\n<h2>Environment</h2>\n<pre>{environment}</pre>\n</body></html>\n"
    )


def _section(title: str, caption: str, picture: str) -> str:
    return (
        f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{picture}">\n<p class=note>{html.escape(caption)}</p>'
    )


def writable(folder: Path) -> Path:
    """Creates the folder and tries it, before minutes of measuring.

    Raises:
        OSError: if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"{folder}: cannot be written ({error.strerror}), expected a folder for results"
        ) from error
    return folder
