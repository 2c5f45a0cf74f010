"""Folders on disks and in buckets: paths of both kinds, locks and ranges of objects."""
