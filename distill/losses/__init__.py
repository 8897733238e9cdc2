"""Everything that is differentiated, and the objective that adds it up."""
