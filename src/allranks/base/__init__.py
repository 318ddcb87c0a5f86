"""What everything else stands on: errors, words, files, processes, connections. Standard library only."""
