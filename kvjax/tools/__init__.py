"""What the command line runs: play, verify, convert, bench."""
