"""`superpose-train --tune`: a search for the options of a run."""
