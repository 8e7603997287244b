"""Reports: run folders are read, compared in tables and drawn as pictures."""
