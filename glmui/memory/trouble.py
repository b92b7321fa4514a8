"""Errors of a process that computes, told apart: memory ran out (whose?), a card failed, or neither.

By their words: torch, CUDA, cuBLAS and their relatives have a dozen classes and codes for the same thing, and
a library in between may have wrapped them in one of its own.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

_CARD_MEMORY = re.compile(
    r"(CUDA|HIP|MPS backend) out of memory|(CUDA|HIP)( driver)? error: out of memory"
    r"|CU[A-Z]+_STATUS_ALLOC_FAILED|(HIP|ROC)BLAS_STATUS_(ALLOC_FAILED|MEMORY_ERROR)"
    r"|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate"  # there was no room for its handle
    r"|NVML_SUCCESS == .*CUDACachingAllocator"  # torch's, when it cannot even tell how full the card is
    r"|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|^out of memory$",  # the last in the driver's words
    re.IGNORECASE,
)
_RAM = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|std::bad_alloc|paging file is too small",
    re.IGNORECASE,
)
_FAULT = re.compile(
    r"device-side assert|illegal (memory access|address|instruction)|misaligned address|hardware stack error"
    r"|invalid program counter|unspecified launch failure|launch timed out|uncorrectable ECC"
    r"|CUBLAS_STATUS_EXECUTION_FAILED|GPU is lost"
    r"|context is destroyed|(CUDA|HIP) error: unknown error|^unknown error$",  # in the driver's words
    re.IGNORECASE,
)
_CARD_NUMBER = re.compile(r"GPU (\d+)")
_COMMIT_LIMIT = 1455  # Windows: the paging file is too small


def out_of_memory_on(error: BaseException, card: str) -> str:
    """The device whose memory ran out: "cpu" for the RAM, a card's name, or "" where it is another error.

    card: the name of the card that is used; an error may name another.
    """
    for cause in _causes(error):
        text = str(cause)
        if found := _CARD_MEMORY.search(text):
            number = _CARD_NUMBER.search(text)
            return f"cuda:{number[1]}" if number else "mps" if found[1] == "MPS backend" else card
        if isinstance(cause, MemoryError) or _is_ram(cause) or _RAM.search(text):
            return "cpu"
    return ""


def is_card_fault(error: BaseException) -> bool:
    """Whether a card has failed so that nothing on it can be trusted any more, in this process."""
    return any(_FAULT.search(str(cause)) for cause in _causes(error))


def _is_ram(error: BaseException) -> bool:
    """Whether the system refused memory to something that maps files."""
    return isinstance(error, OSError) and (
        error.errno == errno.ENOMEM or getattr(error, "winerror", None) == _COMMIT_LIMIT
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
