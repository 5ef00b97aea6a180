"""The way to this machine alone, on which a page is asked."""

from tests.demo.conftest import no_network

__all__ = ["no_network"]
