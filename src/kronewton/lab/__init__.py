"""Tasks, rivals, reports and the command line. Uses public names only; nothing imports it."""
