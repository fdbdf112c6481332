"""A file's bytes as tensors, straight from the memory map: nothing is read before it is used, nothing twice.

The map is private and writable, so that a tensor that is written to (a host that patches weights in place)
gets pages of its own and the file stays as it is. Linux is told not to reserve memory for that: a 24 GB file
maps on a 16 GB machine.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

# Python names it from 3.13 on; the kernel's number is the same on every architecture but MIPS and Alpha.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """A whole file in the address space.

    Raises:
        ValueError: the file is missing, empty or cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise ValueError(f"{self.path}: the file is empty; download or copy it again.")
                if sys.platform == "linux":
                    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                    self.map = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                else:
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self.address = self.view(0, 1).data_ptr()
        except FileNotFoundError as error:
            raise ValueError(f"{self.path}: there is no such file.") from error
        except OSError as error:
            raise ValueError(f"{self.path}: the file cannot be read: {error.strerror or error}.") from error

    def bytes(self, start: int, count: int) -> bytes:
        """A copy of a few bytes; shorter at the file's end."""
        return self.map[start : start + count]

    def view(self, start: int, nbytes: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """One-dimensional tensor over the map itself; it keeps the map alive.

        Old files are not aligned to their numbers' size. Processors read such numbers all the same, and a copy
        would double what a large file takes.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=nbytes // dtype.itemsize, offset=start)

    def find(self, tensor: Tensor) -> tuple[int, int] | None:
        """(start, stop) of a tensor that lies in this map; None of any other."""
        if tensor.device.type != "cpu" or tensor.nbytes == 0:
            return None
        start = tensor.data_ptr() - self.address
        return (start, start + tensor.nbytes) if 0 <= start < self.size else None

    def release(self, start: int, count: int) -> None:
        """Gives the pages that lie wholly inside the range back; they are read again when next used.

        Pages that were written to would lose what was written, so this is for weights nobody has changed.
        """
        self._advise("MADV_DONTNEED", start, count, inside=True)

    def read_ahead(self, start: int, count: int) -> None:
        """Asks the system to start reading the range; returns at once."""
        self._advise("MADV_WILLNEED", start, count, inside=False)

    def _advise(self, name: str, start: int, count: int, *, inside: bool) -> None:
        option = getattr(mmap, name, None)
        if option is None or not hasattr(self.map, "madvise"):
            return
        page = mmap.PAGESIZE
        stop = min(start + count, self.size)
        if inside:
            start = -(-start // page) * page
            stop = stop if stop == self.size else stop // page * page
        else:
            start = start // page * page
        if stop > start:
            self.map.madvise(option, start, stop - start)
