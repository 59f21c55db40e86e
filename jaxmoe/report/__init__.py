"""What a person reads: tables and progress."""
