"""Recorded traces: read, checked, written."""

from kvjax.lightzero.traces.record import record_trace

__all__ = ["record_trace"]
