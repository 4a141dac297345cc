"""What a run leaves: its log, the comparison with the pretrained model, the report."""
