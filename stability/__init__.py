"""Watching a training run, and keeping it from being spoilt.

Works on any module and optimizer; knows nothing of teachers or SO8T. ``Guard`` is where to begin.
"""

from stability.events import Event, GaveUp, GuardSettings, Limit, Verdict
from stability.guard import Guard
from stability.measures.monitor import Monitor
from stability.measures.probe import ModuleProbe, ProbeReading
from stability.snapshots import Extra

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
