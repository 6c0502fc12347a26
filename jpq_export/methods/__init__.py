"""The published systems that this project implements beside its own, a package each."""
