"""Files on disks and in object stores, tables that are committed part by part, locks, sorting."""
