"""What everything stands on: arrays, loops, files, pictures. It knows no windows."""
