"""Slabs of class scores: in memory up to a number of bytes, beyond it in a temporary file."""

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

ITEM = 4
"""Bytes of a score, float32."""


class Slab:
    """A tensor of zeros at first, float32, that lies in memory or in the file of its storage.

    Attributes:
        shape: Shape of the tensor.
        slot: Position of its bytes in the file, in slots; None in memory.
    """

    def __init__(self, storage: "SlabStorage", shape: Sequence[int], slot: int | None) -> None:
        self.storage, self.shape, self.slot = storage, tuple(shape), slot
        self.in_memory = torch.zeros(self.shape) if slot is None else None
        if slot is not None:
            self.open().zero_()

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return ITEM * math.prod(self.shape)

    def open(self) -> Tensor:
        """Return the tensor to read and write; one in the file is mapped as long as it is referred to."""
        return self.storage.map(self) if self.in_memory is None else self.in_memory

    def release(self) -> None:
        """Give the bytes back to the storage; the tensor is not opened again."""
        self.in_memory = None
        self.storage.take_back(self)


class SlabStorage:
    """Room for slabs; a context manager that removes its file. The file has no name, so no crash leaves it behind.

    Attributes:
        budget: Bytes of slabs in memory; further ones lie in the file.
        folder: Where the file is made when the first slab needs it.
        used: Bytes of slabs in memory.
        num_slots: Slots of the file.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self.used = self.num_slots = self.slot_bytes = 0
        self.free_slots: list[int] = []
        self.file: IO[bytes] | None = None

    def __enter__(self) -> "SlabStorage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file:
            self.file.close()

    @property
    def largest(self) -> int:
        """Bytes that a slab should not exceed, so that some fit into memory and one can be mapped."""
        return max(1, self.budget // 16)

    def zeros(self, shape: Sequence[int]) -> Slab:
        """Make a slab. All slabs in the file take the room of the first of them, or less.

        Raises:
            OSError: The disk has no room for the file.
        """
        size = ITEM * math.prod(shape)
        if self.used + size <= self.budget:
            self.used += size
            return Slab(self, shape, None)
        return Slab(self, shape, self.free_slots.pop() if self.free_slots else self.add_slot(size))

    def add_slot(self, size: int) -> int:
        """Lengthen the file by a slot with disk space: a mapped file without it crashes when it is written to."""
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self.slot_bytes = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        start = self.num_slots * self.slot_bytes
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), start, self.slot_bytes)
            else:
                self.file.seek(start)
                self.file.write(bytes(self.slot_bytes))
                self.file.flush()
        except OSError as error:
            raise OSError(
                f"{self.folder}: no room for a temporary file of class scores ({error.strerror}); make room, choose "
                "another folder with --out, or allow more memory with --memory",
            ) from error
        self.num_slots += 1
        return self.num_slots - 1

    def map(self, slab: Slab) -> Tensor:
        """Map the bytes of a slab in the file as a tensor."""
        assert self.file is not None
        assert slab.slot is not None
        start = slab.slot * self.slot_bytes
        return torch.from_numpy(np.memmap(self.file, np.float32, "r+", start, slab.shape))

    def take_back(self, slab: Slab) -> None:
        """Take the bytes of a slab back, for others."""
        if slab.slot is None:
            self.used -= slab.num_bytes
        else:
            self.free_slots.append(slab.slot)
