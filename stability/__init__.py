"""A guard for any training loop; start with ``Guard``."""

from stability.events import Event, GaveUp, GuardSettings, Hooks, Limit, Verdict
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
    "Hooks",
    "Limit",
    "ModuleProbe",
    "Monitor",
    "ProbeReading",
    "Verdict",
]
