"""What a run says, as records for programs and as tables, figures and progress for people."""
