"""What is neither library nor recipe: settings and the command line, families, benchmarks, run folders, plans, going on."""
