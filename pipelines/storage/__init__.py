"""Files on disks and in object stores, tables committed part by part, locks, external sorting."""
