"""Schedules: what ranks send to each other, and when."""

from distflash.schedules.all_gather import AllGather
from distflash.schedules.base import Schedule
from distflash.schedules.double_ring import DoubleRing
from distflash.schedules.pass_query import PassQuery
from distflash.schedules.reproducible import Reproducible
from distflash.schedules.ring import Ring
from distflash.schedules.ulysses import Ulysses

__all__ = ["AllGather", "DoubleRing", "PassQuery", "Reproducible", "Ring", "Schedule", "Ulysses"]
