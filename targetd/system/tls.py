"""The certificate of the API: read at start, and again when its files change or SIGHUP says so.

The context stays the same object, so the listener need not be touched: connections that are open go on, new
ones get the new certificate. Files that do not fit together leave the old one in force, and a line in the
log; they are looked at again when they change again, as when the key follows the certificate a moment later.
"""

import asyncio
import logging
import ssl
from pathlib import Path

from targetd.system.threads import run_in_thread

__all__ = ["Certificate"]

log = logging.getLogger("targetd.tls")

LOOK_S = 5.0
"""How often the files are looked at."""


class Certificate:
    """A certificate chain and its key, in a context for servers."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """
        Raises:
            OSError: a file cannot be read.
            ssl.SSLError: they are none, or do not fit together.
        """
        self.files = (certificate, key)
        """May be assigned; ``reload`` takes them up."""
        self._seen = self._look()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_cert_chain(certificate, key)

    def _look(self) -> list[tuple[int, int, int]]:
        found = [path.stat() for path in self.files]
        return [(status.st_ino, status.st_mtime_ns, status.st_size) for status in found]

    async def reload(self, *, always: bool = False) -> None:
        """Read the files again if they have changed, or ``always``."""
        try:
            if await run_in_thread(self._try, always):
                self.context.load_cert_chain(*self.files)
                log.info("%s is in force", self.files[0])
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "reason", None) or error.strerror or error
            log.error("%s stays as it was: %s", self.files[0], reason)

    def _try(self, always: bool) -> bool:
        """Whether to load them; on the side, since a load that fails leaves a context with half of it."""
        seen = self._look()
        if seen == self._seen and not always:
            return False
        self._seen = seen
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self.files)
        return True

    async def watch(self) -> None:
        """Follow changes until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.reload()
