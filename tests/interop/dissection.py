"""What tshark reads in a capture of what passed between initiators and portals."""

import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

DISSECTION_LIMIT_S = 600.0

_ALLOCATION = ("scsi.cdb.alloclen", "scsi.cdb.alloclen16", "scsi.cdb.alloclen32", "scsi_sbc.alloclen32")
_KNOWN = "!(scsi.mode.spc.subpagecode == 2)"
"""Logical Block Provisioning, 1Ch/02h (SBC-3 §6.5): the dissector (4.0) reads it as the page 1Ch/00h."""
_MISREAD = ("Inquiry", "Service Action In", "Mode Sense", "Persistent Reserve In")
"""Commands with descriptors, as the dissector calls them."""


@dataclass(frozen=True)
class Capture:
    """A file and what is iSCSI in it."""

    path: Path
    ports: Collection[int]
    """Of portals."""

    def dissect(self, display_filter: str, *fields: str) -> list[list[str]]:
        """The chosen fields of the frames that a display filter lets through."""
        columns = [word for name in fields for word in ("-e", name)]
        known = [word for port in sorted(self.ports) for word in ("-d", f"tcp.port=={port},iscsi")]
        said = subprocess.run(
            ["tshark", "-r", str(self.path), *known, "-Y", display_filter, "-T", "fields", *columns],
            capture_output=True,
            text=True,
            timeout=DISSECTION_LIMIT_S,
            check=True,
        ).stdout
        return [line.split("\t") for line in said.splitlines()]

    @property
    def sent(self) -> str:
        """The filter for what came from a portal."""
        return f"iscsi && tcp.srcport in {{{', '.join(map(str, sorted(self.ports)))}}}"

    def opcodes_sent(self) -> set[int]:
        """The opcodes of a target's PDUs (RFC 7143 §11.2.1.2) that were seen."""
        found = self.dissect(self.sent, "iscsi.opcode")
        opcodes = {int(code, 0) for (row,) in found for code in row.split(",") if code}
        return {opcode for opcode in opcodes if opcode >= 0x20}  # not those quoted in a Reject

    def complaints(self) -> list[list[str]]:
        """Malformed PDUs and expert errors in what came from portals: frame, message, summary.

        A connection is judged up to where the capture has a hole in it, if the kernel dropped a packet that
        came too fast for the recorder: behind it the dissector does not know where a PDU begins.
        """
        bad = self.dissect(
            f'{self.sent} && {_KNOWN} && (_ws.malformed || _ws.expert.severity == "Error")',
            "frame.number",
            "_ws.expert.message",
            "_ws.col.Info",
            "tcp.stream",
        )
        cut, holes = (self._cut_replies(), self._holes()) if bad else (set(), {})
        return [
            [frame, message, info]
            for frame, message, info, stream in bad
            if not (frame in cut and any(name in info for name in _MISREAD))
            and int(frame) < holes.get(stream, int(frame) + 1)
        ]

    def _holes(self) -> dict[str, int]:
        """Connection → number of the first frame before which something is missing."""
        found: dict[str, int] = {}
        missing = "tcp.analysis.lost_segment || tcp.analysis.ack_lost_segment"
        for stream, frame in self.dissect(missing, "tcp.stream", "frame.number"):
            found.setdefault(stream, int(frame))
        return found

    def _cut_replies(self) -> set[str]:
        """Numbers of frames whose data ends where the allocation length cut it, as SPC-4 §4.3.5.6 wants.

        The dissector (4.0) reads on past the end of a descriptor that was cut and then calls it malformed.
        """
        allocated = {
            frame: {length for column in columns for length in column.split(",") if length}
            for frame, *columns in self.dissect(" || ".join(_ALLOCATION), "frame.number", *_ALLOCATION)
        }
        return {
            frame
            for frame, lengths, requests in self.dissect(
                f"{self.sent} && scsi.request_frame",
                "frame.number",
                "iscsi.datasegmentlength",
                "scsi.request_frame",
            )
            if any(allocated.get(request, set()) & set(lengths.split(",")) for request in requests.split(","))
        }
