"""Which ranks: what users pass (process groups, meshes, transports) as transports, or the reason why not."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distflash.transport import Alone, Distributed, SimulatedTransport, Transport


def transport_of(group: object, of_several: str = 'pass one of them, such as mesh["context"]') -> Transport:
    """The ranks of ``group``; ``of_several`` is what to do about a mesh of several dimensions."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a one-dimensional DeviceMesh, got dimensions {group.mesh_dim_names or group.ndim}; "
                + of_several
            )
        if group.get_coordinate() is None:
            raise ValueError(
                f"group: rank {dist.get_rank()} is not in the mesh, which holds ranks {group.mesh.tolist()} of "
                f"{dist.get_world_size()}; make a mesh of all ranks, whose dimensions multiply to their number"
            )
        group = group.get_group()
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


def wider_transport(group: object, shared: Transport) -> Transport:
    """The ranks of ``group``, among which those that share a sequence must be."""
    wider = transport_of(
        group, 'flatten it: mesh["data", "context"]._flatten(), or dist.group.WORLD if it holds all ranks'
    )
    if isinstance(wider, Distributed) and isinstance(shared, Distributed):
        all_ranks, sharing = wider.members, shared.members
        if not set(sharing) <= set(all_ranks):
            raise ValueError(
                f"group: holds ranks {list(all_ranks)}, but ranks {list(sharing)} share a sequence and all of their "
                "tokens count; pass the group of data x context, not that of data alone"
            )
    return wider
