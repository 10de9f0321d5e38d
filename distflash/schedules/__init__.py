"""Schedules: in which order the owners' keys arrive."""

from distflash.schedules.base import Homecoming, Schedule, Step, Trip
from distflash.schedules.ring import Ring

__all__ = ["Homecoming", "Ring", "Schedule", "Step", "Trip"]
