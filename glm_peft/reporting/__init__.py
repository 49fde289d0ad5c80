"""What a command says and writes: exits, errors of processes, the log, results, files."""
