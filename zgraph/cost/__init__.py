"""Costs of a plan: bytes over the step, bytes on the wire, time on given hardware. No torch here."""

from zgraph.cost.forms import NUM_RANKS, StepForm, closed_form
from zgraph.cost.hardware import Device, Hardware, Link, hardware, known
from zgraph.cost.memory import MemoryCurve, Moment, simulate_memory
from zgraph.cost.network import Network, Quote
from zgraph.cost.record import TimelineRecord
from zgraph.cost.simulator import Span, Stall, Timeline, simulate
from zgraph.cost.table import AlphaBeta, CostTable, load_table, save_table, signature
from zgraph.cost.wire import Traffic, traffic
from zgraph.cost.work import Work, work

__all__ = [
    "NUM_RANKS",
    "AlphaBeta",
    "CostTable",
    "Device",
    "Hardware",
    "Link",
    "MemoryCurve",
    "Moment",
    "Network",
    "Quote",
    "Span",
    "Stall",
    "StepForm",
    "Timeline",
    "TimelineRecord",
    "Traffic",
    "Work",
    "closed_form",
    "hardware",
    "known",
    "load_table",
    "save_table",
    "signature",
    "simulate",
    "simulate_memory",
    "traffic",
    "work",
]
