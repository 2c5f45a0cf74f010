"""What a run would take of accelerators that are not there."""
