"""A part of these tests, in a time: for `bench/gpu_check.sh`, which runs parts side by side.

    DEQFUSION_SHARD=K/OF   every OF-th from the K-th on (from 0): compiling takes most of the time
    DEQFUSION_SECONDS=S    none begins after S seconds, those left are skipped and say so

With the latter, what ends the process by SIGTERM meanwhile (`timeout`) interrupts the test that
runs, so that pytest still writes what the others gave.
"""

import os
import signal
import time

import pytest


class Deadline:
    """A plugin, as hooks of this file would see the tests of this folder alone."""

    def __init__(self, seconds):
        self.seconds, self.begin = seconds, time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if time.monotonic() - self.begin > self.seconds:
            pytest.skip(f"no time left: {self.seconds:g} s (DEQFUSION_SECONDS) were over before it")


def pytest_configure(config):
    seconds = os.environ.get("DEQFUSION_SECONDS")
    if seconds:
        config.pluginmanager.register(Deadline(float(seconds)))
        # In the background of a shell SIGINT is ignored, so that `timeout` cannot send that.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    shard = os.environ.get("DEQFUSION_SHARD")
    if shard:
        part, parts = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % parts != part])
        items[:] = items[part::parts]
