"""Transports: communication between the ranks of a group."""

from distflash.transport.alone import Alone
from distflash.transport.base import Message, Pending, PointToPoint, Transport
from distflash.transport.copy_engine import CopyEngine
from distflash.transport.distributed import Distributed
from distflash.transport.failures import RankFailure
from distflash.transport.guarded import Direction, Guarded, during, preparing
from distflash.transport.silent import Silent
from distflash.transport.simulated import SimulatedTransport, SimulationError, Simulator, Traffic
from distflash.transport.subset import Subset

__all__ = [
    "Alone",
    "CopyEngine",
    "Direction",
    "Distributed",
    "PointToPoint",
    "Guarded",
    "Message",
    "Pending",
    "RankFailure",
    "Silent",
    "SimulatedTransport",
    "SimulationError",
    "Simulator",
    "Subset",
    "Traffic",
    "Transport",
    "during",
    "preparing",
]
