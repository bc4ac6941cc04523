"""The resilience room: checkpoints that are whole or absent.

    save(directory, step, state, keep=2)        load_latest(directory) -> (step, state)

Tensors, numbers and text go in; the state of a run comes back bit for bit.
"""

from dsv3.resilience.checkpoint import Found, found, load_latest, require_writable, save

__all__ = ["Found", "found", "load_latest", "require_writable", "save"]
