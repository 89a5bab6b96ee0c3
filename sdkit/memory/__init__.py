"""What a model takes, from shapes alone: the live bytes of a run that computes nothing."""
