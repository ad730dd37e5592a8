"""Files and folders that are whole or absent, rows and records read and written, and signals. Imports no torch."""
