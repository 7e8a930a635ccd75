"""What every room may use: errors, files written whole, processes, tables, times."""
