"""Quality of a model or bundle on text."""
