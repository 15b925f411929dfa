"""Follows the KV events of every replica in the fleet, for a policy that makes use of them."""

from __future__ import annotations

from urllib.parse import urlsplit

from vllm_kvpool.router.event_index import EventIndex
from vllm_kvpool.router.fleet import Fleet
from vllm_kvpool.router.subscriber import Subscriber, endpoint_of_rank
from vllm_kvpool.router.types import Replica


class EventFeed:
    """`ports`: of events and of their replay, at the host of each replica. Belongs to one event loop."""

    def __init__(self, index: EventIndex, ports: tuple[int, int]) -> None:
        self._subscriber = Subscriber(index)
        self._ports = ports
        self._followed: dict[str, Replica] = {}

    def sync(self, fleet: Fleet) -> None:
        """Follow who is new, and no more who is gone."""
        here = {member.replica.id: member.replica for member in fleet}
        for replica_id, replica in list(self._followed.items()):
            if here.get(replica_id) != replica:
                self._subscriber.unfollow(replica_id)
                del self._followed[replica_id]
        for replica_id, replica in here.items():
            if replica_id not in self._followed:
                self._followed[replica_id] = replica
                self._subscriber.follow(replica_id, *self._endpoints(replica))

    def _endpoints(self, replica: Replica) -> tuple[str, str]:
        netloc = urlsplit(replica.url).netloc
        host = netloc.rpartition(":")[0] or netloc
        events, replay = (
            endpoint_of_rank(f"tcp://{host}:{port}", replica.dp_rank) for port in self._ports
        )
        return events, replay

    async def close(self) -> None:
        await self._subscriber.close()
