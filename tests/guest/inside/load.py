"""Verified load on a disk that goes on until it is told to stop, and the proof that it goes on."""

from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.inside.shell import Background, until

_started = 0


class Load:
    """``fio``: random writes at depth 8, each block read back and verified; any error ends it.

    It has no end of its own, so that what happens meanwhile may take as long as it takes: ``stop`` ends
    it, and raises CheckFailedError if it had met an error.
    """

    def __init__(self, device: str) -> None:
        global _started
        _started += 1
        self.device = device
        self._stop = Path(f"/run/stop-load-{_started}")
        self._fio = Background(
            *("fio", "--name=load", f"--filename={device}", "--rw=randwrite", "--bs=16k", "--size=14M"),
            # With threads, for its processes leave the session, and would outlive it when it is killed.
            *("--thread", "--direct=1", "--ioengine=libaio", "--iodepth=8", "--rate_iops=400"),
            *("--time_based", "--runtime=24h", "--norandommap", "--serialize_overlap=1"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=128", "--eta=never"),
            # fio looks for this file twice a second, ends its job when it is there, and runs the command.
            *(f"--trigger-file={self._stop}", "--trigger=true"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fio.__exit__(kind, error, trace)

    def _writes(self) -> int:
        """Writes that the kernel has completed on the device."""
        name = Path(self.device).resolve().name
        return int(Path(f"/sys/block/{name}/stat").read_text().split()[4])

    def goes_on(self, writes: int = 50) -> None:
        """Wait until so many more writes have been completed."""
        before = self._writes()
        until(
            f"{writes} writes to {self.device}",
            lambda: self._writes() >= before + writes or not self._fio.running(),
        )
        if not self._fio.running():
            self._fio.ended()

    def stop(self) -> None:
        """End it; CheckFailedError if a write failed or a block was not what had been written."""
        self.goes_on()
        self._stop.touch()
        self._fio.ended()
        self._stop.unlink(missing_ok=True)
