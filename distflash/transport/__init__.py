"""Transports: how the ranks of a ring reach one another."""

from distflash.transport.alone import Alone
from distflash.transport.base import Message, Pending, Transport
from distflash.transport.distributed import Distributed
from distflash.transport.failures import RankFailure
from distflash.transport.guarded import Guarded, during
from distflash.transport.simulated import SimulatedTransport, SimulationError, Simulator, Traffic

__all__ = [
    "Alone",
    "Distributed",
    "Guarded",
    "Message",
    "Pending",
    "RankFailure",
    "SimulatedTransport",
    "SimulationError",
    "Simulator",
    "Traffic",
    "Transport",
    "during",
]
