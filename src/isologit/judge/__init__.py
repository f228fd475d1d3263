"""The organiser's side: entries as separate processes, timed and checked over HTTP and files, then ranked."""
