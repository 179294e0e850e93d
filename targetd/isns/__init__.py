"""The client of iSNS servers, where targets are registered so that initiators find them (RFC 4171)."""
