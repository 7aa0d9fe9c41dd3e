"""What is seen of a run while it goes: a progress bar, the CSV file, TensorBoard's events."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .runs import RunDirectory

# An epoch of fewer steps is over before a bar of its own could be read.
_LONG_EPOCH = 20
_UNLOGGED = ("epoch",)


class Log:
    """Bar, file and events of one run.

    Args:
        selection: the validation metric that the bar shows.
        run: where files are written; None for none.
        label: of the bar; None for no bar.
    """

    def __init__(self, selection: str, run: RunDirectory | None, label: str | None) -> None:
        self.selection, self.run, self.label = selection, run, label
        self._bar: Any = None
        self._events: Any = None

    @contextmanager
    def opened(
        self, columns: Sequence[str], history: Sequence[Sequence[float]], epochs: int
    ) -> Iterator[None]:
        """Begin with the epochs that there are already, and close everything at the end."""
        if self.run is not None:
            self.run.write_log(columns, history)
            if len(history) < epochs:
                self._events = _event_writer(self.run, len(history))
        self._bar = self._new_bar("epoch", epochs, self.label, initial=len(history))
        try:
            yield
        finally:
            self._bar.close()
            if self._events is not None:
                self._events.close()

    def batches(self, source: Iterable[Any], count: int) -> Iterator[Any]:
        """Pass an epoch's batches on, with a bar of their own where there are many."""
        if count < _LONG_EPOCH or self.label is None:
            yield from source
            return
        with self._new_bar("step", count, None, position=1, leave=False) as bar:
            for batch in source:
                yield batch
                bar.update()

    def add(self, columns: Sequence[str], row: Sequence[float]) -> None:
        """Show and write an epoch."""
        named = dict(zip(columns, row, strict=True))
        self._bar.set_postfix(_postfix(named, self.selection), refresh=False)
        self._bar.update()
        if self.run is not None:
            if named["epoch"] == 1:
                self.run.write_log(columns, [row])
            else:
                self.run.append_log(row)
        if self._events is not None:
            for name, value in named.items():
                if name not in _UNLOGGED and not math.isnan(value):
                    self._events.add_scalar(name, value, int(named["epoch"]))
            self._events.flush()

    def _new_bar(self, unit: str, total: int, label: str | None, **options: Any) -> Any:
        return tqdm(
            desc=label,
            total=total,
            unit=unit,
            disable=self.label is None,
            dynamic_ncols=True,
            # A log file needs fewer lines than a terminal.
            mininterval=0.1 if sys.stderr.isatty() else 10,
            **options,
        )


def writes_events() -> bool:
    """Whether TensorBoard's package is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def _event_writer(run: RunDirectory, epochs: int) -> Any:
    if not writes_events():
        return None
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run logged after its checkpoint is withdrawn.
    return SummaryWriter(str(run.events), purge_step=epochs + 1)


def _postfix(row: dict[str, float], selection: str) -> dict[str, str]:
    postfix = {
        "loss": f"{row['train_loss']:.3f}",
        f"val_{selection}": f"{row[f'validation_{selection}']:.3f}",
    }
    if not math.isnan(row["steps"]):
        postfix |= {"steps": f"{row['steps']:.1f}", "converged": f"{row['converged']:.0%}"}
    return postfix
