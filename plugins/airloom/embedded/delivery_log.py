"""Takes what the receiver of push events notes, and brings it into the ledger of pushes.

The receiver writes into its own database and goes on; a thread brings that to the store, as soon as it answers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from airloom.contract.push import PushDelivery
from airloom.embedded.forge.state import State
from airloom.errors import AirloomError

log = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0
_AT_ONCE = 100


class DeliveryLog:
    """A queue on disk and the thread that empties it.

    Args:
        write: brings one record to the ledger; a record that is there already is no error.
    """

    def __init__(self, state: State, write: Callable[[PushDelivery], None]) -> None:
        self._state = state
        self._write = write
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="delivery-log", daemon=True)
        self._failing = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what is left is brought after the next start."""
        self._stopped.set()
        self._wake.set()

    def note(self, entry: PushDelivery) -> None:
        """Keep a record until the ledger has it."""
        self._state.add_receipt(entry.model_dump_json())
        self._wake.set()

    def _work(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            done = self._empty()
            self._wake.wait(None if done else _WAIT_SECONDS)

    def _empty(self) -> bool:
        """Whether nothing is left."""
        while rows := self._state.receipts(_AT_ONCE):
            for row in rows:
                if self._stopped.is_set():
                    return False
                try:
                    self._write(PushDelivery.model_validate_json(row["value"]))
                except ValueError as error:  # of another version
                    log.warning("a delivery cannot be brought into the ledger of pushes: %s", error)
                except AirloomError as error:
                    if not self._failing:
                        log.warning("deliveries wait for the ledger of pushes: %s", error.message)
                    self._failing = True
                    return False
                if self._failing:
                    log.info("the ledger of pushes takes deliveries again")
                self._failing = False
                self._state.remove_receipt(row["id"])
        return True
