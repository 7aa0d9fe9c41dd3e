"""Which ways are tried, verified and timed, within a budget of seconds.

A way's time counts once its answer was verified in float64 (`Example.judge`), with the solver as it
will run. First every way is screened with a few samples, the most promising first: programs that
spill registers are out before they are timed, whatever raises is out with what it says. Then the
fastest, those with the layer's own solver and the default are timed in rounds that interleave them
and rotate, so that a busy moment slows all alike; medians decide, and only among these: times taken
in another moment do not compare. Who is first there still is not kept in place of the default if it
is within the noise: it must be faster in nearly all rounds, and in the median by a margin
(`deqfusion.tuning.result.Gain.sure`). Where time is short fewer ways are held against the default,
rather than in fewer rounds than can tell.

On a GPU a sample is the time of a call up to the end of the device's work, once after a buffer
larger than the L2 cache was written (cold, which decides: a layer seldom runs alone) and once right
after (warm).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from deqfusion.kernels.tuning import SOLVES, Choice, Host
from deqfusion.reference.iterate import COMPACT_BELOW
from deqfusion.reference.solve import LADDER_WIDTH, bfloat16_instructions
from deqfusion.solvers import Anderson
from deqfusion.tuning.example import Example, Way
from deqfusion.tuning.predict import MEMORIES, on_device, ranked
from deqfusion.tuning.result import FEWEST, Gain, Trial, gain, settled, told, words

__all__ = ["Search", "clock"]

COMPACTIONS = (0.5, 0.9, 1.0)

SCREENED, SCREENED_LEAST = 0.75, 0.5
"""Of the budget, for screening: at most, and where a solve takes long at least."""

SAMPLES, ROUNDS, FINALISTS = 3, 15, 4
PROMISING = 4.0
"""Ways predicted to take longer than the best by this factor are not tried."""

KERNELS = {s: f"{s if 'adjoint' in s else f'{s} solve'} kernel".replace(" ", "_") for s in SOLVES}
"""The program of each solve. Others are launched with it, that pack or sum up, whatever the config:
what they need says nothing about it."""

clock = time.perf_counter


class Search:
    """A search over the ways to solve an example.

    Args:
        example: what to solve.
        budget: seconds from `begin` on.
        begin: by `clock`.
        progress: called with the seconds passed and a line on what is being done.
        stored: by solve what was found before, which is tried after the default, so that a short
            search does not lose what a long one found.

    Attributes:
        trials: of every way so far, the default of every solve first.
    """

    def __init__(
        self, example: Example, budget: float, begin: float,
        progress: Callable[[float, str], object], stored: Mapping[str, Choice] | None = None,
    ) -> None:  # fmt: skip
        self.example, self.budget, self.begin, self.progress = example, budget, begin, progress
        self.stored = stored or {}
        self.trials: list[Trial] = []
        self._calls: dict[int, Callable[[], Any]] = {}
        self._flush: torch.Tensor | None = None
        if example.device.type == "cuda":
            properties = torch.cuda.get_device_properties(example.device)
            size = 2 * max(getattr(properties, "L2_cache_size", 0), 1 << 26)
            self._flush = torch.empty(size, dtype=torch.uint8, device=example.device)

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return clock() - self.begin

    def of(self, solve: str) -> list[Trial]:
        """Trials of a solve that count, the fastest first; those of the finals before others."""
        found = [t for t in self.trials if t.way.solve == solve and t.counts]
        return sorted(found, key=lambda t: (not t.final, t.seconds or 0.0))

    def by(self, solve: str, memory: int, ladder: bool) -> list[Trial]:
        """Those of `of` with this solver; of an adjoint all, as it has its own."""
        found = self.of(solve)
        if "adjoint" in solve:
            return found
        return [t for t in found if (t.way.memory, t.way.ladder) == (memory, ladder)]

    def own(self, solve: str) -> list[Trial]:
        """Those of `of` with the layer's solver as it is."""
        return self.by(solve, *self.example.own)

    def kept(self, solve: str, memory: int, ladder: bool) -> list[Trial]:
        """Those of `by`, what is to be kept first: not another than the default for noise."""
        default = next(
            (t.way.config for t in self.trials if t.default and t.way.solve == solve), None
        )
        found = self.by(solve, memory, ladder)
        return settled(found, next((t for t in found if t.way.config == default), None))

    # --- one way ---------------------------------------------------------------------------------

    def screen(self, way: Way, default: bool = False) -> Trial:
        """Tries one way, and times it if it is right."""
        trial = Trial(way, default)
        self.trials.append(trial)
        best = next(iter(self.of(way.solve)), None)
        so_far = "" if best is None else f", best {1e6 * (best.seconds or 0):.0f} us"
        self.progress(self.passed, f"{way.solve}: {words(way)}{so_far}")
        try:
            self._verify(trial)
            if trial.fault is None:
                self.sample([trial], SAMPLES)
        except KeyboardInterrupt:
            trial.fault = "interrupted"
            raise
        except Exception as error:
            # A candidate that does not compile or does not fit is no reason to end the search.
            self._out(trial, error)
        return trial

    def _out(self, trial: Trial, error: Exception) -> None:
        """A trial that raised does not count, and what it shared with others is made anew."""
        trial.fault = told(error)
        self.example.forget()

    def _known(self, solve: str, default: Choice, memory: int, ladder: bool) -> None:
        """Screens the default and what was found before, whatever the time."""
        self.screen(Way(solve, default, memory, ladder), default=True)
        stored = self.stored.get(solve, default)
        if stored != default:
            self.screen(Way(solve, stored, memory, ladder))

    def _verify(self, trial: Trial) -> None:
        call = self.example.call(trial.way)
        with self._watching() as (compiled, configs):
            answers = call()
        if any(config != trial.way.config for config in configs):
            trial.fault = "more programs than can be resident: ran in schedule row"
            return
        kernel = KERNELS.get(trial.way.solve)
        spills = sum(program.spills for program in compiled if program.name == kernel)
        # The default runs whatever it needs, and is what others are held against.
        if spills and not trial.default:
            trial.fault = f"spills {spills} registers"
            return
        trial.residual, trial.fault = self.example.judge(answers)
        if trial.fault is None:
            self._calls[id(trial)] = call

    @contextmanager
    def _watching(self) -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        """What the programs launched meanwhile need and ran in; on the reference there are none."""
        if isinstance(self.trials[-1].way.config, Host):
            yield (), ()
            return
        from deqfusion.kernels.launch import ran, watching

        with watching() as compiled, ran() as configs:
            yield compiled, configs

    def sample(self, trials: Sequence[Trial], rounds: int, until: float | None = None) -> None:
        """Times trials in turn; after `SAMPLES` rounds their medians replace the times they have.

        What raises is out, and ends the rounds.

        until: of finals, seconds from the beginning after which no round begins.
        """
        cold: dict[int, list[float]] = {id(trial): [] for trial in trials}
        warm: dict[int, list[float]] = {id(trial): [] for trial in trials}
        order, whole = list(trials), 0
        try:
            for number in range(rounds):
                if until is not None and self.passed > until:
                    break
                for trial in order:
                    try:
                        cold[id(trial)].append(self._time(self._calls[id(trial)], self._flush))
                        if self._flush is not None:
                            warm[id(trial)].append(self._time(self._calls[id(trial)], None))
                    except Exception as error:
                        return self._out(trial, error)
                whole, order = whole + 1, order[1:] + order[:1]
                if until is not None:
                    self.progress(
                        self.passed, f"{order[0].way.solve}: the best, round {number + 1}"
                    )
        finally:
            # Whatever ended them: as many samples of each, and never one in place of a median.
            for trial in trials if whole >= SAMPLES else ():
                trial.samples = tuple(cold[id(trial)][:whole])
                trial.seconds = statistics.median(trial.samples)
                trial.warm = statistics.median((warm[id(trial)] or cold[id(trial)])[:whole])
                trial.final = until is not None

    def _time(self, call: Callable[[], Any], flush: torch.Tensor | None) -> float:
        if flush is not None:
            flush.zero_()
        self._wait()
        begin = clock()
        call()
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.example.device.type == "cuda":
            torch.cuda.synchronize(self.example.device)

    def finals(self, solve: str, fastest: Sequence[Trial], until: float) -> bool:
        """Times the fastest, those with the layer's own solver and the default together.

        Of the fastest's solver what would run untuned is among them: that gives way to it, or not.

        Returns:
            Whether there is no reason to leave further ones: False after one raised, as on a device
            that failed all would.
        """
        own, left = self.own(solve), until - self.passed
        default = [t for t in own if t.default]
        alike = [t for f in fastest[:1] for t in self.by(solve, f.way.memory, f.way.ladder)]
        plain = [t for t in alike if default and t.way.config == default[0].way.config]
        chosen = {id(t): t for t in (*fastest[:1], *own[:1], *default, *plain)}
        for t in (*fastest[1:FINALISTS], *own[1:FINALISTS]):
            more = {**chosen, id(t): t}
            if FEWEST * sum(c.sample_seconds for c in more.values()) <= left:
                chosen = more
        if len(chosen) > 1:
            self.sample(list(chosen.values()), ROUNDS, until)
        return all(t.fault is None for t in chosen.values())

    def best_solver(self) -> tuple[int, bool]:
        """Memory and ladder of the best so far; the layer's own where nothing counts."""
        if self.of("host"):
            best = self.of("host")[0].way
            return best.memory, best.ladder
        return self._best_memory(), self.example.own[1]

    def solver_gain(self, solver: tuple[int, bool]) -> Gain | None:
        """Of a memory and ladder over the layer's own, in the forward solves; None: one of them
        solves nothing."""
        solves = [s for s in dict.fromkeys(t.way.solve for t in self.trials) if "adjoint" not in s]
        found = [(self.kept(s, *self.example.own), self.kept(s, *solver)) for s in solves]
        return gain([(a[0], b[0]) for a, b in found]) if all(a and b for a, b in found) else None

    # --- on a CPU, by the reference --------------------------------------------------------------

    def host(self) -> None:
        """Memory, ladder and compaction of the CPU implementation, one after the other."""
        own = self.example.own
        self._known("host", Host(COMPACT_BELOW), *own)
        # Finals of two ways at least, which take more where a solve does.
        finals = 2 * FEWEST * (self.trials[0].seconds or 0.0)
        until = max(min(SCREENED * self.budget, self.budget - finals), SCREENED_LEAST * self.budget)
        for stage in (self._memories, self._ladders, self._compactions):
            for way in stage(self._best_on_host()):
                if self.passed > until:
                    break
                if all(way != trial.way for trial in self.trials):
                    self.screen(way)
        self.finals("host", self.of("host"), self.budget)

    def _best_on_host(self) -> Way:
        """The fastest so far, or the default."""
        return next((t.way for t in self.of("host")), self.trials[0].way)

    def _memories(self, best: Way) -> Iterator[Way]:
        if isinstance(self.example.solver, Anderson):
            yield from (Way("host", best.config, m, best.ladder) for m in MEMORIES)

    def _ladders(self, best: Way) -> Iterator[Way]:
        e = self.example
        effective = e.x.dtype != torch.float64 and e.layout.dim >= LADDER_WIDTH
        if isinstance(e.solver, Anderson) and effective and bfloat16_instructions() is not None:
            memories = dict.fromkeys([best.memory, *(t.way.memory for t in self.of("host")[:2])])
            yield from (Way("host", best.config, m, not best.ladder) for m in memories)

    def _compactions(self, best: Way) -> Iterator[Way]:
        # With the layer's own solver, too: that is what runs, until somebody gives it the best.
        solvers = dict.fromkeys([self.example.own, (best.memory, best.ladder)])
        yield from (Way("host", Host(c), *solver) for c in COMPACTIONS for solver in solvers)

    # --- on a GPU, by the programs ---------------------------------------------------------------

    def programs(self) -> None:
        """Configurations of the programs and the memory, solve by solve."""
        e = self.example
        device, shared = on_device(e.device)
        queues, memories = ranked(e, device, shared)
        for index, solve in enumerate(e.solves):
            until = SCREENED * self.budget * (index + 1) / len(e.solves)
            memory, ladder = e.own_of(solve)
            self._known(solve, self._default(solve), memory, ladder)
            queue = queues[solve]
            # One of every memory first: all are to be compared.
            first = [next(c for c in queue if c.memory == m) for m in memories[solve]]
            for candidate in (*first, *queue):
                if self.passed > until or candidate.rank > PROMISING * queue[0].rank:
                    break
                way = Way(solve, candidate.config, candidate.memory, ladder)
                if all(way != trial.way for trial in self.trials):
                    self.screen(way)
        memory, ladder = self.best_solver()
        for index, solve in enumerate(e.solves):
            share = (index + 1) / len(e.solves)
            until = self.budget * (SCREENED + (1 - SCREENED) * share)
            if not self.finals(solve, self.by(solve, memory, ladder), until):
                break

    def _best_memory(self) -> int:
        """The memory with which the forward solves take least together.

        Among those of the finals, where they were held.
        """
        own = self.example.own[0]
        times: dict[int, float] = {}
        for memory in sorted({own, *MEMORIES}):
            best = []
            for solve in SOLVES[:2]:
                found = self.of(solve)
                found = [t for t in found if t.final] or found
                best.append(next((t for t in found if t.way.memory == memory), None))
            if all(t is not None for t in best):
                times[memory] = sum(t.seconds or 0.0 for t in best if t is not None)
        # Of equals the layer's own: nothing is gained by another.
        return min(times, key=lambda m: (times[m], m != own)) if times else own

    def _default(self, solve: str) -> Any:
        from deqfusion.kernels.launch import untuned

        e = self.example
        blocks = e.modalities if solve.startswith("modality") else 1
        config = untuned(e.rows, e.layout, blocks, e.device, solve, e.options(solve))
        # What a launch makes of it, so that the same is not tried twice.
        return replace(config, depth=min(config.depth, max(16, e.layout.padded)))
