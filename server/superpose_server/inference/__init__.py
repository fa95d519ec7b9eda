"""What a request is, whatever door it came in by: checked, bound to a mix, run and answered."""
