"""Slabs of class scores on their way from one thread to another."""

from collections import deque
from collections.abc import Iterable, Iterator
from threading import Condition

from torch import Tensor

NumberedSlab = tuple[int, Tensor]


class BrokenStreamError(Exception):
    """The sender failed before its last slab."""


class SlabStream:
    """A queue of few slabs, since they are large; each side learns of the other's end.

    Args:
        limit: Number of slabs that wait.
    """

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self.waiting: deque[NumberedSlab] = deque()
        self.changed = Condition()
        self.is_complete = self.has_ended = self.is_closed = False

    def send(self, slabs: Iterable[NumberedSlab]) -> None:
        """Send slabs, until the last or until the receiver has closed the stream."""
        try:
            for slab in slabs:
                with self.changed:
                    self.changed.wait_for(lambda: len(self.waiting) < self.limit or self.is_closed)
                    if self.is_closed:
                        return
                    self.waiting.append(slab)
                    self.changed.notify_all()
                del slab
            self.is_complete = True
        finally:
            with self.changed:
                self.has_ended = True
                self.changed.notify_all()

    def __iter__(self) -> Iterator[NumberedSlab]:
        """Receive the slabs.

        Raises:
            BrokenStreamError: The sender failed.
        """
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.has_ended)
                if not self.waiting:
                    if not self.is_complete:
                        raise BrokenStreamError
                    return
                slab = self.waiting.popleft()
                self.changed.notify_all()
            yield slab
            del slab

    def close(self) -> None:
        """Refuse further slabs."""
        with self.changed:
            self.is_closed = True
            self.waiting.clear()
            self.changed.notify_all()
