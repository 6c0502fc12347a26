"""Records shared by every stage, and the files they are. No torch here."""
