"""Watching a training run, and keeping it from being spoilt.

Works on any module and optimizer; knows nothing of teachers or SO8T. ``Guard`` is where to begin.
"""

from stability.guard import Guard
from stability.monitor import Monitor
from stability.probe import ModuleProbe, ProbeReading
from stability.snapshot import Extra
from stability.verdict import Event, GaveUp, GuardSettings, Limit, Verdict

__all__ = [
    "Event",
    "Extra",
    "GaveUp",
    "Guard",
    "GuardSettings",
    "Limit",
    "ModuleProbe",
    "Monitor",
    "ProbeReading",
    "Verdict",
]
