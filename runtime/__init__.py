"""Executes plans: shards at rest, collectives, programs, and agreement between ranks."""

from zgraph.runtime.executor import link
from zgraph.runtime.host import HostMemory
from zgraph.runtime.session import Session
from zgraph.runtime.shards import ShardStore, Slot

__all__ = ["HostMemory", "Session", "ShardStore", "Slot", "link"]
