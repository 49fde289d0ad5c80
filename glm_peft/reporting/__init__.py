"""What a command says and writes: exit codes, errors of processes, the log, results, files."""
