"""What is not to be imported before a test does: it registers an architecture."""

collect_ignore = ["own_family.py", "own_classes.py"]
