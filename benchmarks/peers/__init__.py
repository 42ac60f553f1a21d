"""Other libraries, one file each; every peer and engine runs in a process of its own."""
