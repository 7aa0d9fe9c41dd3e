"""What the engine's tests share with those of the tasks."""

from tests.tasks.conftest import folder

__all__ = ["folder"]
