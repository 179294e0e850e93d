"""Volumes, file systems, snapshots and clones of pools: TrueNAS' ``pool.dataset`` and ``zfs.snapshot``.

``service`` gives one answer for all pools; ``directory`` does it over a directory (``--pool NAME=DIR``),
``zfs`` by the commands of OpenZFS. What a pool cannot do is refused in words and never half done.
"""
