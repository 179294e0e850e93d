"""Targets spread over processes: one host, one API, one set of portals.

::

    initiators ── TCP ──▶ front: portals, logins up to TargetName, discovery, API, store, controller
                            │ a Unix socket each: the connection itself (SCM_RIGHTS), changes, questions
                            ├──▶ worker 1: a Runtime over its share of the configuration
                            └──▶ worker 2: …

Rules:

* Targets that show the same extent live in the same worker, so whatever is about one medium (reservations,
  unit attentions, the order of commands, EXTENDED COPY) is decided within one process, as ever.
* Nothing of a command crosses a process: once a connection is handed over, the front has no part in it.
* A change is prepared by every worker that it touches, saved once by the front, and then put in force
  everywhere, or nowhere.
* A worker that ends takes its targets' sessions along and nothing else. It is started again with what is in
  force then. Workers end with the front, however that ends.

``messages`` what is said; ``link`` how it travels; ``placement`` who owns what; ``quota`` the one count that
all share; ``worker`` the process itself; ``handle`` one worker as the front sees it; ``handover`` how the
front reads a login; ``supervisor`` the ``Engine``.
"""
