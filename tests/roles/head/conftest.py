"""What tests of the head share."""

from tests.roles.head.head_harness import topology

__all__ = ["topology"]
