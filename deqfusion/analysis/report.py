"""Tables of analyses in Markdown, from their result files alone.

    python -m deqfusion.analysis.report OUT/fusions.json OUT/ablation.json --write docs/results.md

With `--write` the text between the results' markers is replaced; a file that is not there is made.
With `--records` the records of all files go into one, a line each, of which the same page follows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine.runs import write_atomically
from . import ANALYSES, get_analysis
from .records import FORMAT, VERSION, Record, RecordError, check_record

BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->\n"


def read_results(path: Path) -> list[Record]:
    """Read the records of a result file, such as `OUT/fusions.json`.

    Raises:
        RecordError: it is missing, damaged, without records, or not one of an analysis.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise RecordError(f"{path}: cannot be read ({reason}), expected results") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordError(f'{path}: expected a JSON object with "format": "{FORMAT}"')
    records = content.get("records")
    if content.get("version") != VERSION or not isinstance(records, list) or not records:
        raise RecordError(f"{path}: expected version {VERSION} with a list of records")
    for number, record in enumerate(records):
        check_record(f"{path}: records[{number}]", record)
        if record["analysis"] not in ANALYSES:
            raise RecordError(
                f"{path}: records[{number}]: analysis: got {record['analysis']!r}, expected one of "
                f"{', '.join(ANALYSES)}"
            )
    return list(records)


def markdown(records: Sequence[Record]) -> str:
    """Return every table of every analysis, under headings, and what they were measured on."""
    parts = []
    for name in ANALYSES:
        own = [record for record in records if record["analysis"] == name]
        if not any(record["splits"] for record in own):
            continue
        analysis = get_analysis(name)
        tables = analysis.tables(own)
        summary = analysis.summary(tables)
        parts.append(f"## {analysis.name.capitalize()}\n")
        parts += [f"{text}\n" for text in (summary, _measured_on(own)) if text]
        parts += [f"### {t.title}\n\n{t.markdown()}" for t in tables]
    return "\n".join(parts)


def replace(text: str, tables: str) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"got a text without the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}{tables}{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m deqfusion.analysis.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="results of analyses")
    parser.add_argument("--write", type=Path, metavar="MARKDOWN", help="file to put them into")
    parser.add_argument("--records", type=Path, metavar="JSON", help="file of all records to write")
    args = parser.parse_args(arguments)
    try:
        records = [record for path in args.files for record in read_results(path)]
        text = markdown(records)
        if args.records is not None:
            write_atomically(args.records, lambda path: _write_records(path, records))
        if args.write is None:
            print(text, end="")
        else:
            old = f"# Results\n\n{BEGIN}{END}"
            if args.write.exists():
                old = args.write.read_text(encoding="utf-8")
            new = replace(old, text)
            write_atomically(args.write, lambda path: path.write_text(new, encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _write_records(path: Path, records: Sequence[Record]) -> None:
    lines = ",\n".join(json.dumps(record, sort_keys=True) for record in records)
    head = f'{{"format": "{FORMAT}", "version": {VERSION}, "records": [\n'
    path.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


def _measured_on(records: Sequence[Record]) -> str:
    """Machines, versions and commits of records, and what else the machines did, in sentences."""
    found: dict[str, set[Any]] = {}
    loads = []
    busy = 0
    for record in records:
        of = record["environment"]
        versions = of.get("versions") or {}
        cores, threads, load = of.get("cores"), of.get("threads"), of.get("load_average")
        several = "s" if threads != 1 else ""
        found.setdefault("cpu", set()).add(f"{of.get('cpu')}, {threads} thread{several}")
        found.setdefault("torch", set()).add(versions.get("torch"))
        found.setdefault("commit", set()).add(str(of.get("commit"))[:12])
        if load is not None and cores:
            loads.append(load / cores)
            busy += load > cores
    cpus, torches, commits = ("; ".join(sorted(map(str, values))) for values in found.values())
    text = f"Measured on {cpus}; torch {torches}; commit {commits}."
    if busy:
        text += (
            f" Load averages at the ends of runs were {min(loads):.1f} to {max(loads):.1f} per "
            f"core, above 1 at {busy} of {len(records)}: other programs ran beside them, so that "
            "seconds of training are too many, and not equally so."
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
