"""Memory that the two ranks of a pair on one machine share, in parts: of the host, or of one GPU.

The sender makes a ring and hands it over through the Unix socket between the two. Host memory goes
as an anonymous file. Memory of a GPU goes as a handle of CUDA's runtime (CUDA IPC, through
``ctypes``, since torch shares blocks of its own allocator only, which it keeps for as long as a
receiver that was killed does not give them back).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_TOKEN = b"\0"


class CannotShareError(OSError):
    """The other side's memory cannot be mapped here."""


class Ring(Protocol):
    """Owned by one side's thread."""

    @property
    def parts(self) -> Sequence[Tensor]:
        """uint8 tensors of equal size, the same memory on both sides."""
        ...

    def was_taken(self, connection: socket.socket) -> bool:
        """Sender: whether the other side could map it; waits for its word.

        Raises:
            OSError: nobody is there.
        """
        ...

    def settle(self) -> None:
        """Returns when what this thread has copied to or from a part is done."""
        ...

    def close(self) -> None:
        """Nobody on this side may touch a part any more. Idempotent."""
        ...


class HostRing:
    """A `Ring` in host memory."""

    PART_BYTES = 1 << 20
    """Some 0.1 ms of copying, several times what waking the other side takes."""
    NUM_PARTS = 8
    """So few that they stay in the processor's cache."""

    def __init__(self, file: int) -> None:
        """
        Args:
            file: descriptor of the shared bytes; the caller closes it.
        """
        memory = torch.frombuffer(mmap.mmap(file, _HOST_BYTES), dtype=torch.uint8)
        self.parts: Sequence[Tensor] = memory.split(self.PART_BYTES)  # type: ignore[no-untyped-call]

    @classmethod
    def hand_over(cls, connection: socket.socket) -> HostRing:
        """Make one, and send it to the other side.

        Raises:
            OSError: there is no memory, or nobody is there.
        """
        file = os.memfd_create("streamfill-kv")
        try:
            os.ftruncate(file, _HOST_BYTES)
            socket.send_fds(connection, [_TOKEN], [file])
            return cls(file)
        finally:
            os.close(file)

    @classmethod
    def take(cls, connection: socket.socket) -> HostRing:
        """What the other side hands over.

        Raises:
            OSError: it is no ring, or nobody is there.
        """
        _, files, _, _ = socket.recv_fds(connection, 1, 1)
        try:
            if len(files) != 1 or os.fstat(files[0]).st_size != _HOST_BYTES:
                raise ConnectionError(f"not a ring of {_HOST_BYTES} bytes")
            return cls(files[0])
        finally:
            for file in files:
                os.close(file)

    def was_taken(self, connection: socket.socket) -> bool:
        """See `Ring`."""
        del connection
        return True

    def settle(self) -> None:
        """See `Ring`."""

    def close(self) -> None:
        """See `Ring`."""
        self.parts = ()


_HOST_BYTES = HostRing.PART_BYTES * HostRing.NUM_PARTS


class GpuRing:
    """A `Ring` in the memory of a GPU that both sides use. Copies run on the stream of the thread,
    beside the forward pass, which has its own."""

    PART_BYTES = 16 << 20
    """Some 20 us of copying, about what waking the other side takes."""
    NUM_PARTS = 4

    def __init__(self, runtime: CudaRuntime, address: int, free: Callable[[int], None]) -> None:
        """Called by `hand_over` and `take`."""
        self._device = runtime.device
        self._free = weakref.finalize(self, free, address)
        memory = runtime.bytes_at(address, _GPU_BYTES)
        self.parts: Sequence[Tensor] = memory.split(self.PART_BYTES)  # type: ignore[no-untyped-call]

    @classmethod
    def hand_over(cls, connection: socket.socket, device: torch.device) -> GpuRing:
        """Make one, and send it to the other side.

        Raises:
            OSError: there is no memory, it cannot be shared, or nobody is there.
        """
        runtime = CudaRuntime(device)
        address = runtime.allocate(_GPU_BYTES)
        ring = cls(runtime, address, runtime.free)
        try:
            connection.sendall(runtime.handle_of(address))
        except OSError:
            ring.close()
            raise
        return ring

    @classmethod
    def take(cls, connection: socket.socket, device: torch.device) -> GpuRing:
        """What the other side hands over; it is told whether that can be mapped.

        Raises:
            CannotShareError: it cannot.
            OSError: nobody is there.
        """
        handle = bytearray()
        while len(handle) < _HANDLE_BYTES:
            some = connection.recv(_HANDLE_BYTES - len(handle))
            if not some:
                raise ConnectionError("the other side is gone")
            handle += some
        try:
            runtime = CudaRuntime(device)
            address = runtime.open(bytes(handle))
        except OSError as error:
            connection.sendall(_NOT_TAKEN)
            raise CannotShareError(str(error)) from error
        ring = cls(runtime, address, runtime.close)
        try:
            connection.sendall(_TAKEN)
        except OSError:
            ring.close()
            raise
        return ring

    def was_taken(self, connection: socket.socket) -> bool:
        """See `Ring`."""
        return connection.recv(1) == _TAKEN

    def settle(self) -> None:
        """See `Ring`."""
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """See `Ring`."""
        self.parts = ()
        self._free()


_GPU_BYTES = GpuRing.PART_BYTES * GpuRing.NUM_PARTS
_TAKEN, _NOT_TAKEN = b"\1", b"\0"
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    """``cudaIpcMemHandle_t``."""

    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


class _DeviceBytes:
    """Bytes of a GPU, as torch takes them without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CudaRuntime:
    """What of CUDA's runtime library torch does not offer, on one device.

    Source: CUDA Runtime API, "Device Management" and "Memory Management" (cudaMalloc,
    cudaIpcGetMemHandle, cudaIpcOpenMemHandle).
    """

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            OSError: the library that torch uses is not to be found.
        """
        self.device = device
        version = str(torch.version.cuda).partition(".")[0]
        self._library = ctypes.CDLL(f"libcudart.so.{version}")
        self._library.cudaIpcOpenMemHandle.argtypes = [
            ctypes.POINTER(ctypes.c_void_p),
            _Handle,
            ctypes.c_uint,
        ]
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate(self, num_bytes: int) -> int:
        """The address of so many bytes."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give back what `allocate` gave; waits for what the device does."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def handle_of(self, address: int) -> bytes:
        """By which another process opens the bytes at an address of `allocate`."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """The address of another process's bytes in this one."""
        address = ctypes.c_void_p()
        self._call(
            "cudaIpcOpenMemHandle",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            _LAZY_PEER_ACCESS,
        )
        return int(address.value or 0)

    def close(self, address: int) -> None:
        """Give back what `open` gave."""
        self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(address))

    def bytes_at(self, address: int, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], without a copy. Nobody keeps the memory for it."""
        return torch.as_tensor(_DeviceBytes(address, num_bytes), device=self.device)

    def _call(self, name: str, *arguments: Any) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.current_stream()  # this thread's context is made by the first use
            error = getattr(self._library, name)(*arguments)
        if error:
            reason = self._library.cudaGetErrorString(error).decode()
            self._library.cudaGetLastError()  # or the next check of torch's would find it
            raise OSError(f"{name} failed: {reason}")


def gpu_name(device: torch.device) -> str:
    """What tells the GPUs of all machines apart."""
    return str(torch.cuda.get_device_properties(device).uuid)
