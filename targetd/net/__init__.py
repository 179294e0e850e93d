"""Sockets of iSCSI: portals, connections, admission, access."""
