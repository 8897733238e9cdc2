"""What a checkpoint must keep of a guard, as JSON takes it; snapshots are not among it."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from stability.verdict import Event

if TYPE_CHECKING:  # which uses this
    from stability.guard import Guard


def guard_state(guard: Guard) -> dict[str, Any]:
    """The state of ``guard``."""
    newest = guard.newest
    return {
        "steps": guard.steps,
        "loss": guard.loss.state_dict(),
        "clips": {name: clip.state_dict() for name, clip in guard.clips.items()},
        "rates": [guard.rates.count, guard.rates.largest],
        "updates": guard.updates.state_dict(),
        # Of weights that are spread each process knows the norm of its own part.
        "weights": None if guard.monitor.spread else guard.weights.state_dict(),
        "fixed_text": [guard.collapse.most, guard.collapse.loss],
        "information": guard.information,
        "fine_at": guard.fine_at,
        "turn": guard.monitor.turn,
        "skipped": [guard.row, *guard.skipped],
        "tries": [guard.tries, guard.alarm],
        "lowered": [guard.lowered, guard.since],
        "careful": [guard.careful_until, guard.careful_turns, guard.reference],
        "blamed": sorted(guard.blamed.items()),
        "set_aside": sorted(guard.set_aside),
        "newest": newest and [newest.step, newest.action, newest.signal, newest.words],
    }


def restore_guard(guard: Guard, state: dict[str, Any]) -> None:
    """The inverse of ``guard_state``.

    Raises:
        KeyError, TypeError, ValueError: this is no such state.
    """
    guard.steps = int(state["steps"])
    guard.loss.load_state_dict(state["loss"])
    for name, clip in guard.clips.items():
        clip.load_state_dict(state["clips"][name])
    guard.rates.count, guard.rates.largest = state["rates"]
    guard.updates.load_state_dict(state["updates"])
    if state["weights"] is not None and not guard.monitor.spread:
        guard.weights.load_state_dict(state["weights"])
    guard.collapse.most, guard.collapse.loss = state["fixed_text"]
    guard.information, guard.fine_at = state["information"], int(state["fine_at"])
    guard.monitor.turn = int(state["turn"])
    guard.monitor.forget()
    guard.row, *skipped = map(int, state["skipped"])
    guard.skipped = deque(skipped)
    guard.tries, guard.alarm = map(int, state["tries"])
    guard.lowered, guard.since = float(state["lowered"][0]), int(state["lowered"][1])
    guard.careful_until, guard.careful_turns, guard.reference = state["careful"]
    guard.blamed = Counter({int(step): int(count) for step, count in state["blamed"]})
    guard.set_aside = set(map(int, state["set_aside"]))
    guard.newest = Event(*state["newest"]) if state.get("newest") else None
