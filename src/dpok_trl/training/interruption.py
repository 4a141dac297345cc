"""Ctrl-C and SIGTERM: the run finishes its epoch, saves, and stops; on all processes together."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from dpok_trl.training.processes import largest


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within it the first Ctrl-C or SIGTERM is a wish, which [`requested`] tells of; a Ctrl-C after it raises `KeyboardInterrupt` at once.

    A checkpoint is only whole between two epochs: the samples and draws of a half-done one are in no file. Several SIGTERMs are one wish, for a
    scheduler and a launcher may each send one.

    Handlers are set in the main thread only, where Python allows it, and not for a signal that is ignored (as under `nohup`) or handled outside
    of Python.

    Args:
        accelerator (`Accelerator`)
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt("stopped in the middle of an epoch; the newest checkpoint is whole")
            return
        self.received = signal.Signals(number)
        if self.accelerator.is_main_process:
            # not `print`: the signal may have come while another one was printing
            os.write(
                2,
                f"\n{self.received.name}: the running epoch is finished and saved first, then the run stops. Ctrl-C once more stops at once, and loses "
                "this epoch; the newest checkpoint stays whole.\n".encode(),
            )

    def requested(self) -> bool:
        """Whether any process was asked to stop. Called on all processes."""
        own = torch.tensor([float(self.received is not None)], device=self.accelerator.device)
        return largest(self.accelerator, own) > 0
