"""TrueNAS' API: one table of methods, served as REST v2.0 and as JSON-RPC 2.0 over WebSocket.

``methods`` declares what a method is; ``iscsi``, ``datasets``, ``snapshots`` and ``system`` are the tables;
``rest`` serves them below ``/api/v2.0/``, ``rpc`` at ``/api/current``. ``query`` has the filters and options
of all ``….query`` methods, ``jobs`` what takes longer than an answer.

Requests are pydantic models: an unknown field, a wrong type or a value that we cannot honour is refused with
the field's name. The objects behind are those of API v1.0, and the rules about them are in ``api.resources``.
"""
