"""A part of these tests: `DEQFUSION_SHARD=K/OF` keeps every OF-th from the K-th on (from 0).

Compiling takes most of their time, so `bench/gpu_check.sh` runs the parts side by side.
"""

import os


def pytest_collection_modifyitems(config, items):
    shard = os.environ.get("DEQFUSION_SHARD")
    if shard:
        part, parts = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % parts != part])
        items[:] = items[part::parts]
