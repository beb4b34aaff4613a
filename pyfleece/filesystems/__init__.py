"""File systems inside of images, read without mounting anything.

What is read here was written by a guest, which may be hostile: nothing is believed. Everything is checked before it is
used as an offset, a length or a count, and every loop ends because of a bound that does not come from the data alone.

    base.py         what a file system offers: inodes, names, where the data is
    volumes.py      partition tables
    detect.py       which file system a volume holds, by its signature
    ext.py          ext2, ext3, ext4
    ext_journal.py  what of an ext file system is still in its journal
    xfs.py          XFS
    xfs_log.py      what of an XFS is still in its log
    xfs_trees.py    XFS's block maps and directories
    tsk.py          everything else: by The Sleuth Kit, in a process of its own (tsk_worker.py)
"""
