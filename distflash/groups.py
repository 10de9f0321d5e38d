"""Which ranks: what users pass (process groups, meshes, transports) as transports, or the reason why not."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distflash.transport import Alone, Distributed, Guarded, SimulatedTransport, Transport

_ONE_OF_SEVERAL = 'pass one or two of them, such as mesh["context"]'


def transport_of(group: object, of_several: str = _ONE_OF_SEVERAL, meshes: bool = False) -> Transport:
    """The ranks of ``group``.

    Args:
        group: as in `ContextParallel`.
        of_several: what to do about a mesh of several dimensions.
        meshes: whether a mesh may have two dimensions; its ranks are numbered along the last one.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim > 1 + meshes:
            most = "one or two dimensions" if meshes else "one dimension"
            raise ValueError(
                f"group: expected a DeviceMesh of {most}, got dimensions {group.mesh_dim_names or group.ndim}; "
                + of_several
            )
        if group.get_coordinate() is None:
            raise ValueError(
                f"group: rank {dist.get_rank()} is not in the mesh, which holds ranks {group.mesh.tolist()} of "
                f"{dist.get_world_size()}; make a mesh of all ranks, whose dimensions multiply to their number"
            )
        group = group.get_group() if group.ndim == 1 else group._flatten().get_group()
    if isinstance(group, dist.ProcessGroup):
        return Distributed(group)
    if isinstance(group, Alone | SimulatedTransport):
        return group
    remedy = "pass dist.group.WORLD after dist.init_process_group(), dist.new_group(...) or a one-dimensional mesh"
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: this rank is not a member of it; {remedy} that this rank belongs to")
    if all(hasattr(group, name) for name in ("rank", "world_size", "exchange")) and not isinstance(group, type):
        return group  # type: ignore[return-value]
    raise ValueError(f"group: expected a ProcessGroup or a one-dimensional DeviceMesh, got {group!r}; {remedy}")


def shape_of(group: object, transport: Transport) -> tuple[int, ...]:
    """How many ranks there are along each dimension."""
    if isinstance(group, DeviceMesh):
        return tuple(group.mesh.shape)
    return getattr(group, "shape", None) or (transport.world_size,)


def guarded(transport: Transport, timeout: timedelta | None) -> Transport:
    """``transport``; where it is a process group of several ranks, they tell one another why they stop.

    Args:
        timeout: the longest wait for another rank.
    """
    if transport.world_size == 1:
        return transport
    if isinstance(transport, Distributed):
        return Guarded(transport if timeout is None else transport.within(timeout))
    if isinstance(transport, Guarded) and timeout is not None:
        return Guarded(transport.inner.within(timeout))
    if timeout is not None and not isinstance(transport, Guarded):
        raise ValueError(
            f"timeout: {type(transport).__name__} has none, only process groups do; leave it out (a simulator reports "
            "ranks that wait for nothing at once)"
        )
    return transport


def wider_transport(group: object, shared: Transport) -> Transport:
    """The ranks of ``group``, among which those that share a sequence must be."""
    wider = transport_of(
        group, 'flatten it: mesh["data", "context"]._flatten(), or dist.group.WORLD if it holds all ranks'
    )
    if isinstance(wider, Distributed) and isinstance(shared, Guarded):
        shared.require_sound()
        all_ranks, sharing = wider.members, shared.members
        if not set(sharing) <= set(all_ranks):
            raise ValueError(
                f"group: holds ranks {list(all_ranks)}, but ranks {list(sharing)} share a sequence and all of their "
                "tokens count; pass the group of data x context, not that of data alone"
            )
        return guarded(wider, shared.inner.timeout)
    return wider
