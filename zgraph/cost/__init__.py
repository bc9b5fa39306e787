"""Costs of a plan: bytes over the step, bytes on the wire, time on given hardware. No torch here."""

from zgraph.cost.accuracy import Accuracy, Interval, bytes_text, time_text
from zgraph.cost.forms import NUM_RANKS, StepForm, closed_form
from zgraph.cost.hardware import Device, Hardware, Link, hardware, known
from zgraph.cost.intervals import memory_interval, time_interval
from zgraph.cost.memory import MemoryCurve, Moment, simulate_memory
from zgraph.cost.network import Network, Quote
from zgraph.cost.record import TimelineRecord
from zgraph.cost.replay import Replay
from zgraph.cost.simulator import Span, Stall, Timeline, simulate
from zgraph.cost.table import AlphaBeta, CostTable, load_table, save_table, signature
from zgraph.cost.wire import Traffic, traffic
from zgraph.cost.work import Work, work

__all__ = [
    "NUM_RANKS",
    "Accuracy",
    "AlphaBeta",
    "CostTable",
    "Device",
    "Hardware",
    "Interval",
    "Link",
    "MemoryCurve",
    "Moment",
    "Network",
    "Quote",
    "Replay",
    "Span",
    "Stall",
    "StepForm",
    "Timeline",
    "TimelineRecord",
    "Traffic",
    "Work",
    "bytes_text",
    "closed_form",
    "hardware",
    "known",
    "load_table",
    "memory_interval",
    "save_table",
    "signature",
    "simulate",
    "simulate_memory",
    "time_interval",
    "time_text",
    "traffic",
    "work",
]
